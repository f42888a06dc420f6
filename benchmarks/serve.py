"""Searches a second of ``effir serve``, beside Pyserini's REST server with the same index, model and requests.

    python benchmarks/serve.py FOLDER MODEL --work WORK [--clients 32] [--seconds 60] [--only effir,pyserini]

FOLDER holds collections in the BEIR layout. Their documents together are one corpus, whose index is made in WORK unless
it is there; their queries are what the clients ask, each over one connection, the next as soon as the last is answered.
Both servers get the request that Pyserini 1.6 takes, ``POST /v1/indexes/INDEX/search``, and answer with ten hits and
their texts.

Pyserini 1.6 serves prebuilt indexes alone, which it downloads. ``--as-pyserini``, which this script starts itself, puts
the local FAISS index in their place, with Pyserini's own FaissSearcher and AutoQueryEncoder, and the texts as a Lucene
index. Pyserini opens that index anew for every hit; here it is opened once.
"""

import asyncio
import itertools
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from urllib.request import urlopen

import click
import numpy as np

from effir_search.indexing.build import index_corpus
from effir_search.searching.pyserini_bridge import pyserini_faiss
from effir_search.settings import EncoderOptions
from effir_search.text.corpus import document_text, read_corpus

INDEX, HITS = "all", 10
# Seconds of requests before any is counted.
WARM_UP = 3.0


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, exists=True))
@click.argument("model")
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Where the corpus and the indexes are.")
@click.option("--clients", default=32)
@click.option("--seconds", default=60.0)
@click.option("--dtype", default="auto", help="Of the index that is made, and so of the queries of effir serve.")
@click.option("--only", default="effir,pyserini", help="Servers, divided by commas.")
@click.option("--as-pyserini", type=int, hidden=True, help="Be Pyserini's server on this port.")
def main(
    folder: Path, model: str, work: Path, clients: int, seconds: float, dtype: str, only: str, as_pyserini: int | None
) -> None:
    """Print the table, a line as each server is done."""
    if as_pyserini is not None:
        be_pyserini(work, model, as_pyserini)
        return
    prepare(folder, model, work, dtype, texts="pyserini" in only)
    requests = queries_of(folder)
    print("| server | requests/s | p50 ms | p99 ms | failed | memory at start MB | at the end MB |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |", flush=True)
    for name in only.split(","):
        port = free_port()
        own = ["-m", "effir_search", "serve", "--index", str(work / INDEX), "--corpus", str(work / "corpus.jsonl")]
        theirs = [__file__, str(folder), model, "--work", str(work), "--as-pyserini", str(port)]
        command = [*own, "--port", str(port)] if name == "effir" else theirs
        with open(work / f"{name}.log", "w") as log:
            process = subprocess.Popen([sys.executable, *command], stdout=log, stderr=log)
        try:
            wait_for(port, process)
            asyncio.run(load(port, requests, clients, WARM_UP))
            before = resident_megabytes(process.pid)
            times, failed = asyncio.run(load(port, requests, clients, seconds))
            memory = [before, resident_megabytes(process.pid)]
        finally:
            process.terminate()
            process.wait()
        middle, slow = np.percentile(times, [50, 99]) * 1000
        cells = [name, f"{len(times) / seconds:.1f}", f"{middle:.0f}", f"{slow:.0f}", failed, *map(round, memory)]
        print(f"| {' | '.join(map(str, cells))} |", flush=True)


def prepare(folder: Path, model: str, work: Path, dtype: str, *, texts: bool) -> None:
    """Make the corpus, its index and, for Pyserini, a Lucene index of its texts, unless they are there."""
    work.mkdir(parents=True, exist_ok=True)
    corpus = work / "corpus.jsonl"
    if not corpus.exists():
        unfinished = corpus.with_suffix(".part")
        with open(unfinished, "w", encoding="utf-8") as file:
            for path in sorted(folder.glob("*/corpus.jsonl")):
                for document in read_corpus(path):
                    record = {"_id": f"{path.parent.name}-{document.doc_id}", "title": document.title}
                    file.write(json.dumps({**record, "text": document.text}) + "\n")
        unfinished.rename(corpus)
    if not (work / INDEX).exists():
        index_corpus(str(corpus), model, work / INDEX, options=EncoderOptions(dtype=dtype))
    if texts and not (work / "lucene").exists():
        build_texts(corpus, work / "lucene.part")
        (work / "lucene.part").rename(work / "lucene")


def build_texts(corpus: Path, lucene: Path) -> None:
    """Make a Lucene index that gives the texts of documents, as Pyserini's prebuilt ones do."""
    pyserini_faiss()
    from pyserini.index.lucene import LuceneIndexer

    indexer = LuceneIndexer(args=["-index", str(lucene), "-storeRaw"], threads=1)
    for document in read_corpus(corpus):
        indexer.add_doc_raw(json.dumps({"id": document.doc_id, "contents": document_text(document)}))
    indexer.close()


def queries_of(folder: Path) -> list[bytes]:
    """Return the requests: the queries of the collections in turn, one of each."""
    lists = []
    for path in sorted(folder.glob("*/queries.jsonl")):
        lines = path.read_text(encoding="utf-8").splitlines()[:500]
        lists.append([json.loads(line)["text"] for line in lines])
    mixed = [text for texts in itertools.zip_longest(*lists) for text in texts if text is not None]
    bodies = [json.dumps({"query": text[:2000], "hits": HITS}).encode() for text in mixed]
    head = f"POST /v1/indexes/{INDEX}/search HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return [f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body for body in bodies]


async def load(port: int, requests: list[bytes], clients: int, seconds: float) -> tuple[list[float], int]:
    """Return the seconds of each request that was answered in time, and how many failed."""
    waiting = itertools.cycle(requests)
    times: list[float] = []
    failed = 0
    end = time.perf_counter() + seconds

    async def client() -> None:
        nonlocal failed
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while (start := time.perf_counter()) < end:
            writer.write(next(waiting))
            head = await reader.readuntil(b"\r\n\r\n")
            length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
            content = await reader.readexactly(int(length.split(b":")[1]))
            if time.perf_counter() <= end:
                times.append(time.perf_counter() - start)
            if not head.startswith(b"HTTP/1.1 200") or len(json.loads(content)["candidates"]) != HITS:
                failed += 1
        writer.close()

    ended = await asyncio.gather(*(client() for _ in range(clients)), return_exceptions=True)
    return times, failed + sum(isinstance(one, Exception) for one in ended)


def be_pyserini(work: Path, model: str, port: int) -> None:
    """Run Pyserini 1.6's REST server with the index in place of the prebuilt ones."""
    pyserini_faiss()
    os.environ.setdefault("OPENAI_API_KEY", "not needed")
    from pyserini.encode import AutoQueryEncoder
    from pyserini.search.faiss import FaissSearcher
    from pyserini.search.lucene import LuceneSearcher

    texts = LuceneSearcher(str(work / "lucene"))
    LuceneSearcher.from_prebuilt_index = classmethod(lambda _class, _name, **_options: texts)
    # Its server imports an encoder of images and texts, a package of its own, which is not needed here.
    sys.modules["pyserini.encode.optional._uniir"] = ModuleType("_uniir")
    sys.modules["pyserini.encode.optional._uniir"].UniIRQueryEncoder = None
    import uvicorn
    from pyserini.server.models import IndexConfig
    from pyserini.server.rest.app import app
    from pyserini.server.search_controller import get_controller

    encoder = AutoQueryEncoder(encoder_dir=model, pooling="mean", l2_norm=True)
    searcher = FaissSearcher(str(work / INDEX), encoder)
    config = IndexConfig(name=INDEX, searcher=searcher, base_index="msmarco-v1-passage", index_type="faiss")
    get_controller().indexes[INDEX] = config
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning")


def wait_for(port: int, process: subprocess.Popen) -> None:
    """Return once a server answers."""
    while True:
        if process.poll() is not None:
            raise SystemExit("the server ended; see its log in the folder WORK")
        try:
            urlopen(f"http://127.0.0.1:{port}/", timeout=60).close()
            return
        except OSError:
            time.sleep(0.2)


def resident_megabytes(process_id: int) -> float:
    """Return the memory that a process has now."""
    return int(Path(f"/proc/{process_id}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


if __name__ == "__main__":
    main()
