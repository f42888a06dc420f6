"""How long a job takes that continues one killed at 70 %, beside an undisturbed job.

    python benchmarks/resume.py CORPUS MODEL [--limit 10240] [--share 0.7] [--threads 2] [--dtype fp32]

All are ``effir index``, timed from start to exit, one after the other: the undisturbed job; a second one, killed with
``kill -9`` as soon as its manifest lists so large a share of the parts, of 1,024 documents each; the second one's
command again; and the undisturbed job once more, of which the faster one counts: a busy moment of the machine must not
make a continued job look quick. Says also whether ``index`` and ``docid`` are the same bytes.
"""

import itertools
import json
import math
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click

from effir_search.indexing.index_record import DOCID_FILE, INDEX_FILE, store_of
from effir_search.indexing.store import number_of_parts
from effir_search.text.corpus import document_text, read_corpus


def write_first(corpus: str, limit: int, path: Path) -> int:
    """Write the first documents of a corpus as JSONL and return their number."""
    documents = list(itertools.islice(read_corpus(corpus), limit))
    lines = [json.dumps({"_id": document.doc_id, "text": document_text(document)}) for document in documents]
    path.write_text("\n".join(lines), encoding="utf-8")
    return len(documents)


def timed(command: list[str]) -> float:
    """Run a command that must succeed and return the seconds it took."""
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - start


def run_and_kill(command: list[str], index_dir: Path, num_parts: int) -> tuple[float, int]:
    """Kill a job as soon as it has finished so many parts; return its seconds, and how many parts it left."""
    store = store_of(index_dir)
    start = time.perf_counter()
    job = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while len(store.parts()) < num_parts:
        if job.poll() is not None:
            raise SystemExit("the job ended before it could be killed")
        time.sleep(0.01)
    job.send_signal(signal.SIGKILL)
    job.wait()
    return time.perf_counter() - start, len(store.parts())


@click.command()
@click.argument("corpus")
@click.argument("model")
@click.option("--limit", default=10240, help="Documents that are indexed.")
@click.option("--share", default=0.7, help="Of the parts, those after which the second job is killed.")
@click.option("--threads", default=2)
@click.option("--dtype", default="fp32")
def main(corpus: str, model: str, limit: int, share: float, threads: int, dtype: str) -> None:
    """Print the times, the ratio, and whether the bytes are the same."""
    with tempfile.TemporaryDirectory() as work:
        texts, whole, killed, again = (Path(work) / name for name in ("corpus.jsonl", "whole", "killed", "again"))
        num_documents = write_first(corpus, limit, texts)
        num_parts = number_of_parts(num_documents)
        command = [sys.executable, "-m", "effir_search", "index", "--corpus", str(texts), "--encoder", model]
        command += ["--threads", str(threads), "--dtype", dtype, "--output"]
        undisturbed = [timed([*command, str(whole)])]
        until_kill, num_left = run_and_kill([*command, str(killed)], killed, math.ceil(share * num_parts))
        continued = timed([*command, str(killed)])
        undisturbed.append(timed([*command, str(again)]))
        same = all((whole / name).read_bytes() == (killed / name).read_bytes() for name in (INDEX_FILE, DOCID_FILE))
    print(f"{num_documents:,} documents in {num_parts} parts, {dtype}, {threads} threads")
    print(f"undisturbed: {undisturbed[0]:.1f} s before, {undisturbed[1]:.1f} s after")
    print(f"killed: after {until_kill:.1f} s, with {num_left} of {num_parts} parts ({num_left / num_parts:.0%})")
    print(f"continued: {continued:.1f} s, {continued / min(undisturbed):.1%} of the faster undisturbed job")
    print(f"{INDEX_FILE} and {DOCID_FILE}: {'the same bytes' if same else 'NOT the same bytes'}")
    if not same:
        sys.exit(1)


if __name__ == "__main__":
    main()
