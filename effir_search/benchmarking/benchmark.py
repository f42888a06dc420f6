"""Several encoders side by side: what ``effir benchmark`` does."""

import hashlib
import itertools
import json
import logging
import re
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from effir_search.benchmarking.machine import energy_meter, machine_facts, matmul_peak, versions
from effir_search.benchmarking.memory import Memory, measure_memory
from effir_search.benchmarking.record import BenchmarkRecord, Measured
from effir_search.benchmarking.report import write_report
from effir_search.encoding.devices import DTYPES
from effir_search.encoding.encoder import DEFAULT_OPTIONS, Encoder
from effir_search.errors import UserError
from effir_search.evaluation.benchmark import check_topics, ndcg_of_queries, search_collection
from effir_search.evaluation.turns import answer_in_turns, encode_in_turns
from effir_search.files.job import job_folder
from effir_search.files.reading import read_json
from effir_search.model.arithmetic import empty_model, facts, flops
from effir_search.model.checkpoint import exported_backend, lasting_name
from effir_search.model.families import is_prunable
from effir_search.model.graph_model import EXPORT_FILE, graph_files
from effir_search.searching.search_topics import load_topics
from effir_search.settings import BenchmarkSettings, EncoderOptions
from effir_search.text.corpus import document_text, read_corpus, scan_corpus
from effir_search.text.trec import Query, read_qrels, read_topics

logger = logging.getLogger(__name__)

DEFAULT_SETTINGS = BenchmarkSettings()
# Queries that latency is measured on, at most; each is asked once a round.
QUERIES = 200
RUNS = "runs"
_SHORT_NAMES = {dtype: name for name, dtype in reversed(DTYPES.items())}


class Contender(NamedTuple):
    """An encoder that is measured: what it is called, how it was named and is loaded, and itself."""

    label: str
    model: str
    options: EncoderOptions
    encoder: Encoder


@dataclass(frozen=True)
class Collection:
    """What quality is measured on.

    Attributes:
        corpus: As ``read_corpus`` takes it.
        topics: As ``read_topics`` takes it.
        qrels: Judgments.
        corpus_sha256: Of ids and texts.
        remove_query: Leave out the document whose id is the query's.
    """

    corpus: str
    topics: str
    qrels: str
    corpus_sha256: str
    remove_query: bool


def benchmark(
    models: Sequence[str],
    output: Path,
    *,
    corpus: str,
    topics: str | None = None,
    qrels: str | None = None,
    settings: BenchmarkSettings = DEFAULT_SETTINGS,
    options: EncoderOptions = DEFAULT_OPTIONS,
) -> str:
    """Measure encoders and write a report; return its tables as text.

    Runs of topics stay in the folder and are used again. All else is measured anew, since speeds compare only where
    they were measured together.

    Args:
        models: Folders or hub names; the first one is what the others are compared with.
        output: Folder that gets ``benchmark.json``, ``benchmark.md``, ``pareto.png``, ``index.html`` and the runs.
        corpus: As ``read_corpus`` takes it.
        topics: As ``read_topics`` takes it; None = latency is measured on the documents' titles.
        qrels: Judgments of the topics; None = quality is not measured.
        settings: How they are measured.
        options: How they are loaded; ``dtype`` is that of ``settings``.

    Raises:
        ValueError: A bad model, corpus, topics or qrels; a model that stands twice.
        OSError: A file cannot be read or written, or another benchmark is at work in the folder.
    """
    if qrels is not None and topics is None:
        raise UserError("--qrels goes with --topics")
    if options.backend == "auto":
        raise UserError("--backend auto is for effir index; name the one that is to be measured")
    summary = scan_corpus(corpus)
    documents = list(itertools.islice(read_corpus(corpus), settings.limit))
    texts = [document_text(document) for document in documents]
    queries, source = _queries(topics, qrels, [document.title for document in documents])
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    threads = torch.get_num_threads()
    contenders = load_contenders(models, settings.dtypes or ("auto",), options)
    with job_folder(output, {"command": "benchmark"}):
        collection = None
        if topics is not None and qrels is not None:
            collection = Collection(corpus, topics, qrels, summary.sha256, settings.remove_query)
            check_topics(Path(corpus), corpus, topics, qrels, remove_query=settings.remove_query)
        ndcg = [_ndcg(contender, collection, output / RUNS) for contender in contenders] if collection else []
        torch.set_num_threads(threads)
        record = BenchmarkRecord(
            command=_command(models, output, corpus, topics, qrels, settings, options),
            machine=machine_facts(contenders[0].encoder.device),
            versions=versions(),
            corpus={"name": corpus, "sha256": summary.sha256, "documents": summary.num_documents},
            num_texts=len(texts),
            num_queries=(len(queries), source),
            encoders=_measure(contenders, texts, queries, ndcg, settings, scratch=output / ".memory.json"),
        )
        return write_report(record, output)


def load_contenders(models: Sequence[str], dtypes: Sequence[str], options: EncoderOptions) -> list[Contender]:
    """Return every model in every arithmetic, the dtypes of a model together.

    Raises:
        ValueError: A bad model, or one that stands twice in an arithmetic.
        OSError: A file cannot be read.
    """
    contenders: list[Contender] = []
    names = [lasting_name(model) for model in models]
    for model, name in zip(models, names, strict=True):
        unique = name if names.count(name) == 1 else model
        for dtype in dtypes:
            of_model = replace(options, dtype=dtype)
            encoder = Encoder.from_pretrained(model, of_model)
            label = f"{unique} {arithmetic_of(encoder)}"
            if any(label == other.label for other in contenders):
                raise UserError(f"{label} stands twice; name each model and each --dtype once")
            contenders.append(Contender(label, model, of_model, encoder))
    return contenders


def arithmetic_of(encoder: Encoder) -> str:
    """Return in which numbers an encoder computes, such as "bf16", and by what if not by torch: "int8 openvino"."""
    if encoder.backend == "torch":
        return _SHORT_NAMES[encoder.dtype]
    record = encoder.files.transformer_folder / EXPORT_FILE
    is_int8 = record.is_file() and read_json(record)["int8"]
    return f"{'int8' if is_int8 else _SHORT_NAMES[encoder.dtype]} {encoder.backend}"


def _queries(topics: str | None, qrels: str | None, titles: Sequence[str]) -> tuple[list[str], str]:
    """Return the texts that latency is measured on, and what they are."""
    if topics is None:
        return [title for title in titles if title.strip()][:QUERIES], "titles of documents"
    found = load_topics(topics, qrels=read_qrels(qrels)) if qrels else read_topics(topics)
    return [query.text for query in found if query.text.strip()][:QUERIES], "topics"


def _measure(
    contenders: Sequence[Contender],
    texts: list[str],
    queries: Sequence[str],
    ndcg: Sequence[dict[str, float]],
    settings: BenchmarkSettings,
    *,
    scratch: Path,
) -> list[Measured]:
    """Measure all but quality; whatever is slow and steady first, so that what is compared is measured together."""
    encoders = [contender.encoder for contender in contenders]
    threads = torch.get_num_threads()
    works = [_work(encoder, texts) for encoder in encoders]  # before their weights are laid out for speed
    memories: list[Memory] = []
    for contender in tqdm(contenders, desc="Memory", unit=" encoders", disable=None):
        memories.append(measure_memory(contender.model, contender.options, texts, threads=threads, scratch=scratch))
    peaks = {dtype: matmul_peak(dtype, encoders[0].device) for dtype in {encoder.dtype for encoder in encoders}}
    latencies = answer_in_turns(encoders, queries, rounds=settings.rounds) if queries else None
    meter = energy_meter() if encoders[0].device.type == "cpu" else None  # its counters are not a GPU's
    turns = encode_in_turns(encoders, texts, rounds=settings.rounds, joules=meter)
    return [
        Measured(
            label=contender.label,
            model=contender.model,
            dtype=str(encoders[place].dtype).removeprefix("torch."),
            weights_sha256=encoders[place].weights_sha256,
            config=asdict(encoders[place].config),
            sizes=works[place].sizes,
            tokens=works[place].tokens,
            flops=works[place].flops,
            matmul_flops=peaks[encoders[place].dtype],
            seconds=turns.seconds[:, place].tolist(),
            joules=None if turns.joules is None else turns.joules[:, place].tolist(),
            latencies=[] if latencies is None else latencies[:, :, place].tolist(),
            memory=memories[place]._asdict(),
            cosine=turns.cosines[place],
            ndcg=ndcg[place] if ndcg else None,
        )
        for place, contender in enumerate(contenders)
    ]


class Work(NamedTuple):
    """What a model is and does, on paper; see ``Measured``."""

    sizes: dict[str, int]
    tokens: int
    flops: int | None


def _work(encoder: Encoder, texts: Sequence[str]) -> Work:
    """Return what a model is, and the work of encoding texts: the FLOPs of each text's own tokens, no padding."""
    lengths = [len(ids) for ids in encoder.tokenize(texts, prompt=encoder.config.document_prompt).input_ids]
    config = encoder.model.config
    if is_prunable(config):
        empty = empty_model(config)
        sizes = facts(empty, length=round(float(np.mean(lengths))), dtype=encoder.dtype)
        operations = sum(times * flops(empty, length) for length, times in Counter(lengths).items())
    else:
        parameters = encoder.model.num_parameters()
        sizes = {"parameters": parameters, "weights_bytes": parameters * encoder.dtype.itemsize}
        operations = None
    place = encoder.files.transformer_folder
    if exported_backend(place):  # its weights have types of their own, such as int8
        sizes["weights_bytes"] = sum(file.stat().st_size for file in graph_files(place))
    return Work(sizes, sum(lengths), operations)


def _ndcg(contender: Contender, collection: Collection, folder: Path) -> dict[str, float]:
    """Return an encoder's nDCG@10 by query; its run is made unless a folder has it."""
    judgments = read_qrels(collection.qrels)
    run = folder / run_name(contender, collection, load_topics(collection.topics, qrels=judgments))
    if run.is_file():
        logger.info("%s: was searched before, %s", contender.label, run)
    else:
        logger.info("%s: indexing and searching", contender.label)
        folder.mkdir(parents=True, exist_ok=True)
        search_collection(
            *(collection.corpus, collection.topics, collection.qrels, run), contender.model, contender.options
        )
    return ndcg_of_queries(run, judgments, remove_query=collection.remove_query)


def run_name(contender: Contender, collection: Collection, judged: Sequence[Query]) -> str:
    """Return the name of a run: another one wherever its hits may be others."""
    encoder = contender.encoder
    depends_on = {
        "weights": encoder.weights_sha256,
        "config": asdict(encoder.config),
        "options": contender.options.given(),
        "dtype": str(encoder.dtype),
        "corpus": collection.corpus_sha256,
        "topics": judged,
    }
    sha256 = hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()
    return f"{re.sub('[^A-Za-z0-9.-]+', '-', contender.label)}-{sha256[:12]}.trec"


def _command(
    models: Sequence[str],
    output: Path,
    corpus: str,
    topics: str | None,
    qrels: str | None,
    settings: BenchmarkSettings,
    options: EncoderOptions,
) -> str:
    """Return the command that measures this."""
    files = [("--corpus", corpus), ("--topics", topics), ("--qrels", qrels), ("--output", str(output))]
    given = [word for option, file in files if file is not None for word in (option, file)]
    words = ["effir", "benchmark", *models, *given, *settings.as_options(), *options.as_options(without=["dtype"])]
    return shlex.join(words)
