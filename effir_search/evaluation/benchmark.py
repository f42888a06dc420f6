"""Two models side by side: nDCG@10 on test collections through the whole path, sizes, documents a second."""

import json
import logging
import shutil
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from glob import escape
from pathlib import Path

import numpy as np

from effir_search.encoding.encoder import DEFAULT_OPTIONS, Encoder
from effir_search.evaluation.bootstrap import interval, resample
from effir_search.evaluation.measures import evaluate_queries, parse_measures
from effir_search.evaluation.turns import ROUNDS, encode_in_turns
from effir_search.files.reading import file_sha256, read_json
from effir_search.files.whole import whole_file
from effir_search.indexing.build import index_corpus
from effir_search.model.arithmetic import aligned, empty_model, facts, facts_rows
from effir_search.model.families import is_prunable
from effir_search.searching.search_topics import load_topics
from effir_search.searching.searcher import Searcher
from effir_search.settings import EncoderOptions, EvaluationSettings, SearchSettings, TextSettings
from effir_search.text.corpus import existing_documents
from effir_search.text.folders import beir_file
from effir_search.text.own_documents import check_own_documents
from effir_search.text.trec import Qrel, read_qrels, read_run, read_topics, write_run

logger = logging.getLogger(__name__)

HITS = 100
DEFAULT_SETTINGS, OWN_TEXT = EvaluationSettings(), TextSettings()
# In the folder of the runs: by collection the hashes of its files.
COLLECTIONS_FILE = "collections.json"


@dataclass(frozen=True)
class Benchmark:
    """What was measured; of two figures the first is the full model's.

    Attributes:
        sizes: ``arithmetic.facts``, FLOPs those of a text of the mean length; None of a family that cannot be pruned,
            whose parts are not known.
        tokens: Of a text, the mean.
        speed: Documents encoded a second, medians of the rounds.
        speedup: The median of the rounds' ratios.
        cosine: Between both models' embeddings of a text, the mean.
        ndcg: By collection nDCG@10, the mean over judged queries with a relevant document.
        queries: By collection, how many these are.
        kept: The share of the full model's mean over collections that the other keeps, with the ends of its 95 %
            interval; None without collections, or where the full model finds nothing.
    """

    sizes: tuple[dict[str, int], dict[str, int]] | None
    tokens: float
    speed: tuple[float, float]
    speedup: float
    cosine: float
    ndcg: dict[str, tuple[float, float]]
    queries: dict[str, int]
    kept: tuple[float, float, float] | None


def benchmark(
    full: str,
    compressed: str,
    folder: Path,
    *,
    texts: Sequence[str],
    settings: EvaluationSettings = DEFAULT_SETTINGS,
    seed: int = 0,
    options: EncoderOptions = DEFAULT_OPTIONS,
    text: TextSettings = OWN_TEXT,
) -> Benchmark:
    """Measure a model beside the one it was made from; runs stay in a folder and are not made again.

    Args:
        full: Model folder or hub name.
        compressed: The other.
        folder: Gets ``COLLECTION-full.trec`` and ``COLLECTION-compressed.trec``, and what they were made from.
        texts: Documents that speed and cosine are measured on.
        settings: The collections, which are BEIR folders. A document whose id is the query's is only left out of the
            measures, not of the runs.
        seed: Of the bootstrap.
        options: How both models are loaded.
        text: How the full model alone reads a text; the other has that in its files.

    Raises:
        ValueError: A bad model or collection.
        OSError: A file cannot be read or written.
    """
    models = {"full": (full, replace(options, **text.given())), "compressed": (compressed, options)}
    ndcg_by_collection = _evaluate(models, folder, settings)
    encoders = [Encoder.from_pretrained(*model) for model in models.values()]
    tokens = encoders[0].tokenize(texts, prompt=encoders[0].config.document_prompt)
    length = statistics.mean(map(len, tokens.input_ids))
    sizes = None
    if all(is_prunable(encoder.model.config) for encoder in encoders):
        sizes = tuple(facts(empty_model(e.model.config), length=round(length), dtype=e.dtype) for e in encoders)
    turns = encode_in_turns(encoders, texts)
    speeds = len(texts) / turns.seconds
    return Benchmark(
        sizes=sizes,
        tokens=length,
        speed=(statistics.median(speeds[:, 0]), statistics.median(speeds[:, 1])),
        speedup=statistics.median(speeds[:, 1] / speeds[:, 0]),
        cosine=turns.cosines[1],
        ndcg={name: tuple(values.mean(axis=1).tolist()) for name, values in ndcg_by_collection.items()},
        queries={name: values.shape[1] for name, values in ndcg_by_collection.items()},
        kept=_share_kept(ndcg_by_collection, seed),
    )


def _evaluate(
    models: Mapping[str, tuple[str, EncoderOptions]], folder: Path, settings: EvaluationSettings
) -> dict[str, np.ndarray]:
    """Return by collection nDCG@10, ``(models, queries)``; runs that a folder lacks are made."""
    collections = list(map(Path, settings.collections))
    _remove_other_runs(folder, collections, settings.split)
    ndcg_by_collection = {}
    for collection in collections:
        corpus, topics, qrels = map(str, collection_files(collection, settings.split))
        runs = {role: folder / f"{collection.name}-{role}.trec" for role in models}
        for role, run in runs.items():
            if not run.is_file():
                search_collection(corpus, topics, qrels, run, *models[role])
        per_query = ndcg_per_query(list(runs.values()), qrels, remove_query=settings.remove_query)
        ndcg_by_collection[collection.name] = per_query
        check_topics(collection, corpus, topics, qrels, remove_query=settings.remove_query)
    return ndcg_by_collection


def _share_kept(ndcg_by_collection: Mapping[str, np.ndarray], seed: int) -> tuple[float, float, float] | None:
    """Return the share of the full model's mean that the other keeps, see ``Benchmark``."""
    shares = shares_kept(ndcg_by_collection, seed=seed) if ndcg_by_collection else None
    return shares[1] if shares else None


def shares_kept(figures: Mapping[str, np.ndarray], *, seed: int = 0) -> list[tuple[float, float, float]] | None:
    """Return the share of the first model's mean over collections that each model keeps, with its 95 % interval's ends.

    None where the first model finds nothing, in the queries as they are or in a sample of them.

    Args:
        figures: By collection ``(models, queries)``.
        seed: Of the paired bootstrap.
    """
    means = resampled_means(figures, seed=seed)
    if not means[:, 0].all():
        return None
    return [(float(shares[0]), *interval(shares)) for shares in (means / means[:, :1]).T]


def _remove_other_runs(folder: Path, collections: Sequence[Path], split: str) -> None:
    """Remove what a folder has of collections of the same names whose files were others."""
    path = folder / COLLECTIONS_FILE
    known = read_json(path) if path.is_file() else {}
    now = {
        collection.name: [file_sha256(file) for file in collection_files(collection, split)]
        for collection in collections
    }
    for name in now:
        if name in known and known[name] != now[name]:
            for outdated in folder.glob(f"{escape(name)}-*"):  # of another collection too, if its name begins so
                shutil.rmtree(outdated) if outdated.is_dir() else outdated.unlink()
    with whole_file(path) as file:
        file.write(json.dumps(known | now, indent=1) + "\n")


def collection_files(collection: Path, split: str) -> list[Path]:
    """Return a BEIR folder's corpus, queries and qrels.

    Raises:
        FileNotFoundError: One is missing.
    """
    return [beir_file(collection, name) for name in ("corpus.jsonl", "queries.jsonl", f"qrels/{split}.tsv")]


def search_collection(corpus: str, topics: str, qrels: str, run: Path, model: str, options: EncoderOptions) -> None:
    """Index a collection, search its judged topics, write the run; the index goes.

    Args:
        corpus: As ``read_corpus`` takes it.
        topics: As ``read_topics`` takes it.
        qrels: Judgments.
        run: The file that is written; what is left of an index beside it is continued.
        model: Folder or hub name.
        options: How it is loaded.
    """
    index_dir = run.with_suffix(".index")
    if not index_dir.is_dir():
        index_corpus(corpus, model, index_dir, options=options)
    judged = load_topics(topics, qrels=read_qrels(qrels))
    searcher = Searcher(index_dir, settings=SearchSettings(hits=HITS), options=options)
    write_run(searcher.search(judged), run, tag=run.stem)
    shutil.rmtree(index_dir)


def check_topics(collection: Path, corpus: str, topics: str, qrels: str, *, remove_query: bool) -> None:
    """Warn of what hides differences between models: queries that are documents, and judged ones without a text.

    Args:
        collection: Opens the warnings.
        corpus: As ``read_corpus`` takes it.
        topics: As ``read_topics`` takes it.
        qrels: Judgments.
        remove_query: Whether the document whose id is the query's is left out.
    """
    judged = {qrel.query_id for qrel in read_qrels(qrels) if qrel.relevance > 0}
    queries = [query for query in read_topics(topics) if query.query_id in judged]
    if lacking := len(judged) - len(queries):
        logger.warning("%s: %d of %d judged queries are no topics and count 0", collection, lacking, len(judged))
    documents = existing_documents(corpus, [query.query_id for query in queries])
    option = "--remove-query (remove_query in [evaluate] of a recipe)"
    check_own_documents(str(collection), queries, documents, remove_query=remove_query, option=option)


def ndcg_per_query(runs: Sequence[Path], qrels: str, *, remove_query: bool = False) -> np.ndarray:
    """Return nDCG@10 of each run, ``(runs, queries)``, for the judged queries that have a relevant document.

    Args:
        runs: TREC runs.
        qrels: Judgments.
        remove_query: Leave out hits whose document has the query's id.
    """
    judgments = read_qrels(qrels)
    return np.array([list(ndcg_of_queries(run, judgments, remove_query=remove_query).values()) for run in runs])


def ndcg_of_queries(run: Path, judgments: Sequence[Qrel], *, remove_query: bool = False) -> dict[str, float]:
    """Return a run's nDCG@10 by query, in the order of the judgments; see ``ndcg_per_query``."""
    (measure,) = parse_measures("nDCG@10")
    hits = [hit for hit in read_run(run) if not (remove_query and hit.doc_id == hit.query_id)]
    evaluation = evaluate_queries(hits, judgments, [measure], only_with_positives=True)
    return {query_id: values[measure] for query_id, values in evaluation.per_query.items()}


def resampled_means(figures: Mapping[str, np.ndarray], *, seed: int = 0) -> np.ndarray:
    """Return each model's mean over collections, ``(resamples + 1, models)``.

    Row 0 is that of the queries as they are, the others are those of ``bootstrap.resample``.

    Args:
        figures: By collection ``(models, queries)``.
        seed: Of the draws.
    """
    return resample(figures, seed=seed).macro


def read_benchmark(path: Path) -> Benchmark:
    """Return what was measured, from the JSON of a ``Benchmark``."""
    return Benchmark(**read_json(path))


def format_benchmark(
    measured: Benchmark, *, names: tuple[str, str] = ("full", "compressed"), sizes: bool = True
) -> str:
    """Return a table: sizes, speed and quality, with the share of the first model's figures that the other has.

    Args:
        measured: The figures.
        names: Of both models.
        sizes: Whether sizes are told, which are counted in torch's types of numbers.
    """
    rows = [
        ("", *names, ""),
        *(facts_rows(*measured.sizes, round(measured.tokens)) if sizes and measured.sizes else []),
    ]
    rows.append(("documents/s", *(f"{speed:.0f}" for speed in measured.speed), f"{measured.speedup:.2f}x"))
    for name, (full, compressed) in measured.ndcg.items():
        share = f"{compressed / full:.1%}" if full else "-"
        rows.append((f"nDCG@10 {name}", f"{full:.4f}", f"{compressed:.4f}", share))
    if measured.kept:
        full, compressed = (statistics.mean(column) for column in zip(*measured.ndcg.values(), strict=True))
        rows.append(("nDCG@10, mean", f"{full:.4f}", f"{compressed:.4f}", f"{measured.kept[0]:.1%}"))
    lines = [aligned(rows)]
    lines += ["", f"Speed is the median of {ROUNDS} rounds in turns, its ratio that of the rounds' ratios."]
    lines.append(f"Mean cosine of the embeddings to the {names[0]} model's: {measured.cosine:.4f}")
    if measured.kept:
        share, low, high = measured.kept
        lines.append(f"Quality kept: {share:.1%}, 95 % interval {low:.1%} to {high:.1%} (paired bootstrap)")
    return "\n".join(lines)
