"""What a suite measures on: BEIR folders, folders of them, ids of ir_datasets, and what each of them asks for."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from effir_search.errors import UserError
from effir_search.files.reading import file_sha256
from effir_search.settings import SuiteSettings
from effir_search.text.corpus import IR_DATASETS
from effir_search.text.folders import CORPUS_FILES, beir_file

logger = logging.getLogger(__name__)

CQADUPSTACK = (
    *("android", "english", "gaming", "gis", "mathematica", "physics"),
    *("programmers", "stats", "tex", "unix", "webmasters", "wordpress"),
)
# The public collections of BEIR as ir_datasets names them. MS MARCO's is the dev split, as in BEIR's paper.
BEIR = (
    *("msmarco/dev", "trec-covid", "nfcorpus/test", "nq", "hotpotqa/test", "fiqa/test", "arguana"),
    *("webis-touche2020/v2", "quora/test", "dbpedia-entity/test", "scidocs", "fever/test", "climate-fever"),
    *("scifact/test", *(f"cqadupstack/{name}" for name in CQADUPSTACK)),
)
NANO = (
    *("arguana", "climate-fever", "dbpedia-entity", "fever", "fiqa", "hotpotqa", "msmarco", "nfcorpus", "nq"),
    *("quora", "scidocs", "scifact", "webis-touche2020"),
)
SPLITS = ("train", "dev", "test")
# Collections of more than one corpus, whose mean counts as one.
GROUPS = ("cqadupstack",)


@dataclass(frozen=True)
class Collection:
    """A corpus with queries and judgments.

    Attributes:
        name: In the tables, and of its folder.
        corpus: As ``read_corpus`` takes it.
        topics: As ``load_topics`` takes it.
        qrels: As ``read_qrels`` takes it.
        dev_topics: Queries that a hybrid search may be tuned on; None = there are none.
        dev_qrels: Their judgments.
        group: Name of the collection that it is a part of; "" = none.
        hits: Depth of its runs.
        remove_query: Whether the document whose id is the query's is left out.
    """

    name: str
    corpus: str
    topics: str
    qrels: str
    dev_topics: str | None
    dev_qrels: str | None
    group: str
    hits: int
    remove_query: bool

    def fingerprint(self) -> dict[str, str | None]:
        """Return what its files are, by what they hold: see ``fingerprint_of``."""
        return {name: fingerprint_of(getattr(self, name)) for name in ("corpus", "topics", "qrels")}


def fingerprint_of(source: str | None) -> str | None:
    """Return the hash of a file, or an id of ir_datasets as it is."""
    return source if source is None or source.startswith(IR_DATASETS) else file_sha256(Path(source))


def find_collections(settings: SuiteSettings) -> list[Collection]:
    """Return the collections that are asked for, in order.

    Raises:
        ValueError: A name that is none, one that is there twice; ids of ir_datasets that are not on this machine and
            must not be downloaded; an option for a collection that is not among them.
        OSError: A folder lacks a file.
    """
    found = [one for name in settings.collections for one in _of_name(name, settings)]
    names = [one.name for one in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"{twice[0]}: two collections of this name; give one of them, or rename a folder")
    for option in (*hits_by_name(settings), *(settings.remove_query_of or ())):
        if not any(_is_named(one.name, option) for one in found) and option not in ("arguana", "quora"):
            raise UserError(f'no collection is called "{option}"; there are {", ".join(names)}')
    _check_downloads([one for one in found if one.corpus.startswith(IR_DATASETS)], download=settings.download)
    return found


def hits_by_name(settings: SuiteSettings) -> dict[str, int]:
    """Return the depths that are asked for by name.

    Raises:
        ValueError: A text that is not NAME=NUMBER.
    """
    depths = {}
    for text in settings.hits_of:
        name, _, number = text.rpartition("=")
        if not name or not number.isdecimal() or len(number) > 9 or int(number) < 1:
            raise UserError(f"--hits-of {text}: is not NAME=NUMBER, as in arguana=100")
        depths[name] = int(number)
    return depths


def _is_named(name: str, option: str) -> bool:
    """Whether a collection is meant: by its name, or by a part of it, as quora of beir/quora/test."""
    return name.casefold() == option.casefold() or option.casefold() in name.casefold().split("/")


def _of_name(name: str, settings: SuiteSettings) -> Iterator[Collection]:
    if name == "nano":
        yield from (_of_ir_datasets(f"nano-beir/{one}", settings) for one in NANO)
    elif name == f"{IR_DATASETS}beir":
        yield from (_of_ir_datasets(f"beir/{one}", settings) for one in BEIR)
    elif name == f"{IR_DATASETS}beir/cqadupstack":
        yield from (_of_ir_datasets(f"beir/cqadupstack/{one}", settings) for one in CQADUPSTACK)
    elif name.startswith(IR_DATASETS):
        yield _of_ir_datasets(name.removeprefix(IR_DATASETS), settings)
    else:
        yield from _of_folder(Path(name), settings)


def _of_folder(folder: Path, settings: SuiteSettings, group: str = "") -> Iterator[Collection]:
    """Yield a BEIR folder, or those in a folder; of a group of them, such as CQADupStack, its parts."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder of a collection; ir_datasets' are called irds:NAME")
    if _is_beir(folder):
        name = f"{group}/{folder.resolve().name}" if group else folder.resolve().name
        files = [beir_file(folder, file) for file in ("corpus.jsonl", "queries.jsonl", f"qrels/{settings.split}.tsv")]
        others = [split for split in ("dev", "train") if split != settings.split]
        dev = next((file for split in others if (file := folder / "qrels" / f"{split}.tsv").is_file()), None)
        yield _collection(name, *map(str, files), str(files[1]) if dev else None, dev and str(dev), group, settings)
        return
    inside = sorted(child for child in folder.iterdir() if child.is_dir() and not child.name.startswith("."))
    parts = [child for child in inside if _is_beir(child) or any(map(_is_beir, child.iterdir()))]
    if not parts:
        raise UserError(f"{folder}: neither a BEIR folder nor a folder of them; a BEIR folder has a corpus.jsonl")
    group = folder.name if folder.name.casefold() in GROUPS else group
    for part in parts:
        yield from _of_folder(part, settings, group)


def _is_beir(folder: Path) -> bool:
    return folder.is_dir() and any((folder / name).is_file() for name in CORPUS_FILES)


def _of_ir_datasets(name: str, settings: SuiteSettings) -> Collection:
    import ir_datasets

    if name not in ir_datasets.registry:
        raise UserError(f"{IR_DATASETS}{name}: ir_datasets knows no data set of this name")
    dataset = ir_datasets.load(name)
    if missing := [kind for kind in ("docs", "queries", "qrels") if not getattr(dataset, f"has_{kind}")()]:
        raise UserError(f"{IR_DATASETS}{name}: has no {missing[0]}; names like irds:beir/scifact/test have all kinds")
    parent, _, split = name.rpartition("/")
    dev = None
    if split in SPLITS:
        others = [f"{parent}/{other}" for other in ("dev", "train") if other != split]
        dev = next((other for other in others if other in ir_datasets.registry), None)
    source, dev_source = f"{IR_DATASETS}{name}", dev and f"{IR_DATASETS}{dev}"
    group = next((f"{group}" for group in GROUPS if group in name.split("/")), "")
    return _collection(name, source, source, source, dev_source, dev_source, group, settings)


def _collection(
    name: str,
    corpus: str,
    topics: str,
    qrels: str,
    dev_topics: str | None,
    dev_qrels: str | None,
    group: str,
    settings: SuiteSettings,
) -> Collection:
    depths = hits_by_name(settings)
    hits = next((depth for option, depth in depths.items() if _is_named(name, option)), settings.hits)
    remove = any(_is_named(name, option) for option in settings.remove_query_of)
    return Collection(name, corpus, topics, qrels, dev_topics, dev_qrels, group, hits, remove)


def _check_downloads(collections: Sequence[Collection], *, download: bool) -> None:
    """Raise ValueError for ids of ir_datasets that are not on this machine; where they may be had, say which."""
    absent = [one.name for one in collections if not is_on_disk(one.name)]
    if not absent:
        return
    names = _listed(absent)
    if not download:
        raise UserError(
            f"{len(absent)} of {len(collections)} ids of ir_datasets are not on this machine: {names}; --download "
            "lets ir_datasets fetch them"
        )
    logger.info("ir_datasets downloads what it lacks of %d data sets: %s", len(absent), names)


def _listed(names: Iterable[str], most: int = 8) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def is_on_disk(name: str) -> bool:
    """Return whether ir_datasets has built the document store of an id, which it does at the first reading."""
    import ir_datasets

    home, parts = ir_datasets.util.home_path(), name.split("/")
    return any((home.joinpath(*parts[:number]) / "docs.pklz4").exists() for number in range(len(parts), 0, -1))
