"""What is measured on a collection: BM25, encoders, both as one, feedback; each writes a run unless it is there."""

import hashlib
import itertools
import json
import logging
import random
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from ir_measures import Qrel, ScoredDoc

from effir_search.encoding.encoder import Encoder
from effir_search.errors import UserError
from effir_search.evaluation.tune import MEASURE, best_candidate, separate, tune
from effir_search.files.reading import file_sha256, read_json
from effir_search.files.whole import whole_file
from effir_search.indexing.build import index_corpus
from effir_search.indexing.index_record import INDEX_FILE, store_of
from effir_search.model.sentence_files import SentenceFiles
from effir_search.searching.bm25 import Bm25Searcher, index_bm25, is_bm25
from effir_search.searching.hybrid import HybridSearcher, Ranking, open_index
from effir_search.searching.search_topics import load_topics
from effir_search.searching.searcher import Searcher, load_encoder
from effir_search.settings import (
    EncoderOptions,
    FeedbackSettings,
    HybridSettings,
    SearchSettings,
    SuiteSettings,
)
from effir_search.suite.collections import Collection, fingerprint_of
from effir_search.text.trec import Query, read_qrels, write_run

logger = logging.getLogger(__name__)

BM25 = "BM25"
TUNED, RRF = "tuned", "RRF"
# Beside the indexes of a collection: the hash of the corpus that they are of.
CORPUS_FILE = "corpus.json"
# Options that change no more than the last digits of a vector: an index that was made with others stays.
FREE = ("device", "batch_tokens")
FEEDBACK = {"PRF average": FeedbackSettings("average"), "PRF Rocchio": FeedbackSettings("rocchio")}


@dataclass(frozen=True)
class Model:
    """An encoder of a suite.

    Attributes:
        name: In the tables, and of its indexes and runs.
        source: Folder or hub name.
        sha256: See ``model.checkpoint.weights_sha256``.
        settings_sha256: See ``settings_sha256``.
    """

    name: str
    source: str
    sha256: str
    settings_sha256: str


def settings_sha256(files: SentenceFiles) -> str:
    """Return a hash of all that a model's folder says beside its weights: pooling, prompts, tokenizer, lengths."""
    places = {files.folder, files.transformer_folder, *(place for _, place in files.head)}
    records = sorted(file for place in places for file in place.glob("*.json"))
    lines = [f"{file.relative_to(files.folder).as_posix()} {file_sha256(file)}" for file in records]
    return hashlib.sha256("\n".join([f"{files.pooling} {files.include_prompt}", *lines]).encode()).hexdigest()


@dataclass(frozen=True)
class System:
    """One row of the table.

    Attributes:
        model: What encodes; None = BM25 alone.
        kind: "" = BM25 or the encoder alone; else ``RRF``, ``TUNED`` or a key of ``FEEDBACK``.
    """

    model: Model | None
    kind: str = ""

    @property
    def name(self) -> str:
        """What it is called in the tables."""
        if self.model is None:
            return BM25
        if self.kind in FEEDBACK:
            return f"{self.model.name}, {self.kind}"
        return f"{self.model.name} + {BM25}, {self.kind}" if self.kind else self.model.name

    @property
    def file_name(self) -> str:
        """What its run is called, without the ending."""
        words = [BM25.lower()] if self.model is None else [self.model.name, *self.kind.lower().split()]
        return "-".join(words).replace("/", "_")


def systems_of(models: Sequence[Model], settings: SuiteSettings) -> list[System]:
    """Return the rows of the table."""
    kinds = ["", *([RRF, TUNED] if settings.hybrid else []), *(FEEDBACK if settings.prf else [])]
    of_models = [System(model, kind) for model in models for kind in kinds]
    return [System(None)] * (settings.bm25 or settings.hybrid) + of_models


def check_names(systems: Sequence[System]) -> None:
    """Raise ValueError if the runs of two systems would be one file."""
    names = {system.file_name: system.name for system in systems}
    for system in systems:
        if (other := names[system.file_name]) != system.name:
            raise UserError(
                f'the runs of "{system.name}" and of "{other}" would both be {system.file_name}.trec; give the encoder '
                "another name, as in --encoder NAME=MODEL"
            )


class CollectionSearch:
    """A collection's indexes, opened when they are needed, and the runs of the systems on it.

    Attributes:
        collection: What is searched.
        folder: Of the suite.
    """

    def __init__(self, collection: Collection, folder: Path, settings: SuiteSettings, options: EncoderOptions) -> None:
        self.collection, self.folder = collection, folder
        self._settings, self._options = settings, options
        self._search = SearchSettings(collection.hits, collection.remove_query)
        self._fingerprint = collection.fingerprint()
        self._encoders: dict[str, Encoder] = {}
        self._discard_others()

    def _discard_others(self) -> None:
        """Discard indexes of another corpus of this name, and what a job that was killed was writing."""
        places = [self.folder / kind / self.collection.name for kind in ("indexes", "runs")]
        for place in places:
            place.mkdir(parents=True, exist_ok=True)
        of_corpus = places[0] / CORPUS_FILE
        if of_corpus.is_file() and read_json(of_corpus) != {"corpus": self._fingerprint["corpus"]}:
            logger.info("%s: the corpus is another one than before, so it is indexed again", self.collection.name)
            shutil.rmtree(places[0])
            places[0].mkdir()
        for unfinished in (file for place in places for file in place.glob(".*")):
            shutil.rmtree(unfinished) if unfinished.is_dir() else unfinished.unlink()
        with whole_file(of_corpus) as file:
            file.write(json.dumps({"corpus": self._fingerprint["corpus"]}) + "\n")

    def run_file(self, system: System) -> Path:
        """Return where the run of a system is, or will be."""
        return self.folder / "runs" / self.collection.name / f"{system.file_name}.trec"

    def is_done(self, system: System) -> bool:
        """Return whether the run is there and was made of the same files, weights and settings."""
        run = self.run_file(system)
        record = run.with_name(f"{run.name}.json")
        return run.is_file() and record.is_file() and read_json(record).get("made_of") == self._made_of(system)

    def _made_of(self, system: System) -> dict[str, object]:
        search = {"hits": self.collection.hits, "remove_query": self.collection.remove_query}
        made_of = {"collection": self._fingerprint, "search": search, "kind": system.kind}
        if system.model is not None:
            made_of |= self._vectors_of(system.model) | {"options": self._options.given()}
        if system.kind == TUNED:
            made_of["tuning"] = {"dev": fingerprint_of(self.collection.dev_qrels), "seed": self._settings.seed}
            made_of["tuning"] |= {"queries": self._settings.tune_queries}
        return json.loads(json.dumps(made_of))

    def write(self, system: System) -> None:
        """Search with a system and write its run, then the record that says what it was made of."""
        qrels = read_qrels(self.collection.qrels)
        queries = load_topics(self.collection.topics, qrels=qrels)
        searcher, run = self._searcher(system), self.run_file(system)
        record = run.with_name(f"{run.name}.json")
        record.unlink(missing_ok=True)
        tuned: list[dict[str, object]] = []
        hits = searcher.search(queries)
        if system.kind == TUNED:
            hits = self._tuned(searcher, queries, qrels, tuned)
        write_run(hits, run, tag=run.stem.replace(" ", "_"))
        with whole_file(record) as file:
            made_of = {"system": system.name, "made_of": self._made_of(system), "tuned": tuned}
            file.write(json.dumps(made_of, indent=1, ensure_ascii=False) + "\n")

    def _searcher(self, system: System) -> Searcher | Bm25Searcher | HybridSearcher:
        if system.model is None:
            return Bm25Searcher(self._bm25_index(), self._search)
        index_dir = self._index(system.model)
        encoder = self._encoder(system.model, index_dir)
        ranking = Ranking(FEEDBACK.get(system.kind, Ranking().feedback))
        if system.kind in (RRF, TUNED):
            fusion = "rrf" if system.kind == RRF else "interpolation"
            ranking = Ranking(bm25_index=self._bm25_index(), hybrid=HybridSettings(fusion=fusion))
        return open_index(index_dir, encoder, self._search, ranking=ranking)

    def _encoder(self, model: Model, index_dir: Path) -> Encoder:
        if model.name not in self._encoders:
            options = replace(self._options, dimension=None)  # which the index has
            self._encoders = {model.name: load_encoder(index_dir, model.source, options)}  # one in memory
        return self._encoders[model.name]

    def close(self) -> None:
        """Let go of the encoder."""
        self._encoders.clear()

    def _index_dir(self, name: str) -> Path:
        return self.folder / "indexes" / self.collection.name / name.replace("/", "_")

    def _bm25_index(self) -> Path:
        index_dir = self._index_dir("bm25")
        if not is_bm25(index_dir):
            index_bm25(self.collection.corpus, index_dir)
        return index_dir

    def _index(self, model: Model) -> Path:
        index_dir = self._index_dir(model.name)
        record, vectors = index_dir.with_name(f"{index_dir.name}.made_of.json"), self._vectors_of(model)
        if not record.is_file() or read_json(record) != vectors:
            for others in filter(Path.exists, (index_dir, store_of(index_dir).path)):
                shutil.rmtree(others)
            with whole_file(record) as file:
                file.write(json.dumps(vectors) + "\n")
        if not (index_dir / INDEX_FILE).is_file():
            index_corpus(self.collection.corpus, model.source, index_dir, options=self._options)
        return index_dir

    def _vectors_of(self, model: Model) -> dict[str, object]:
        """Return what the vectors of an index depend on besides the corpus."""
        options = {name: value for name, value in self._options.given().items() if name not in FREE}
        return {"model": model.sha256, "model_settings": model.settings_sha256, "index_options": options}

    def _tuned(
        self,
        searcher: HybridSearcher,
        queries: Sequence[Query],
        qrels: Sequence[Qrel],
        record: list[dict[str, object]],
    ) -> Iterator[ScoredDoc]:
        """Return hits with weights that were tuned on other queries, and note how.

        Those of a dev or train split where there is one. Else the queries are divided into two halves, by turns in the
        order of their ids, and each half is searched with what is best on the other.
        """
        if self.collection.dev_qrels is not None:
            dev_qrels = read_qrels(self.collection.dev_qrels)
            dev = load_topics(self.collection.dev_topics, qrels=dev_qrels)
            parts = [(dev, dev_qrels, queries, self.collection.dev_qrels)]
        else:
            in_order = sorted(queries, key=lambda query: query.query_id)
            halves = in_order[::2], in_order[1::2]
            if not halves[1]:
                raise UserError(f"{self.collection.name}: one query alone leaves none to tune on; leave --hybrid out")
            parts = [(halves[1], qrels, halves[0], "the other half"), (halves[0], qrels, halves[1], "the other half")]
        found = []
        for dev, judgments, part, where in parts:
            dev = separate(dev, part, f"{self.collection.name}, {where}")
            positive = {qrel.query_id for qrel in judgments if qrel.relevance > 0}
            dev = [query for query in dev if query.query_id in positive]
            most = self._settings.tune_queries
            sample = random.Random(self._settings.seed).sample(dev, most) if len(dev) > most else dev
            best = best_candidate(tune(searcher, sample, judgments))
            record.append({"on": where, "queries": len(sample), "measure": MEASURE, **asdict(best)})
            logger.info(
                "%s: weight %g, %s, by %d queries of %s",
                *(self.collection.name, best.weight, best.normalization, len(sample), where),
            )
            hybrid = HybridSettings(fusion="interpolation", weight=best.weight, normalization=best.normalization)
            found.append(searcher.with_settings(hybrid).search(part))
        return itertools.chain(*found)
