"""What is learned from: examples with labels, or texts with a teacher, prepared in a job's folder."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from torch.utils.data import Subset

from effir_search.encoder import Encoder
from effir_search.model.checkpoint import file_sha256
from effir_search.training.examples import Example, Examples, prepare_examples, with_scores
from effir_search.training.lines import Lines
from effir_search.training.objective import ImitationObjective, LossSettings, Objective, RetrievalObjective
from effir_search.training.taught import TaughtText, TaughtTexts, as_batch, prepare_texts, teach
from effir_search.training.teachers import load_teacher

# Texts that are held out to measure likeness to the teacher.
HELD_OUT = 256


@dataclass(frozen=True)
class Data:
    """What is learned from, and what is measured on meanwhile.

    Attributes:
        train: Examples, see ``examples.read_records``; or None, and
        texts: texts to imitate a teacher on, as documents,
        queries: and as queries; each as ``texts.read_texts`` takes it.
        num_texts: At most so many of them; None = all.
        corpus: For examples that are ids.
        topics: For examples that are ids.
        split: Of a BEIR folder.
        negatives: Hard negatives of an example that are used, the first ones.
        teacher: A bi-encoder: what is imitated, or what scores candidates.
        reranker: A cross-encoder that scores candidates.
        dev: BEIR folder with a split for nDCG@10 while training.
        dev_split: Its name.
        dev_queries: At most so many of its queries.
        dev_documents: In so many of its documents.
    """

    train: str | None = None
    texts: tuple[str, ...] = ()
    queries: tuple[str, ...] = ()
    num_texts: int | None = None
    corpus: str | None = None
    topics: str | None = None
    split: str = "train"
    negatives: int = 7
    teacher: str | None = None
    reranker: str | None = None
    dev: str | None = None
    dev_split: str = "dev"
    dev_queries: int = 200
    dev_documents: int = 2000

    def __post_init__(self) -> None:
        imitates = bool(self.texts or self.queries)
        if bool(self.train) == imitates:
            raise ValueError(
                "give either --train with examples, or --texts (or --queries) and --teacher without labels"
            )
        if imitates and not self.teacher:
            raise ValueError("--texts without --teacher: name the model to imitate, such as the one before pruning")
        if self.reranker and (imitates or self.teacher):
            raise ValueError("--reranker scores the candidates of --train examples; it does not go with --teacher")


class Loaded(NamedTuple):
    """Prepared data.

    Attributes:
        dataset: ``Example`` or ``TaughtText``; none of them is in memory.
        collate: Makes of some of them the keyword arguments that the objective takes.
        held_out: Texts that are not in the dataset; none beside examples.
    """

    dataset: Sequence[Example] | Sequence[TaughtText]
    collate: Callable[[Sequence], dict[str, object]]
    held_out: list[TaughtText]


def prepare(folder: Path, data: Data, seed: int, device: str) -> None:
    """Write what is learned from into a job's folder, a file at a time; what a stopped job has written is kept.

    Args:
        folder: See ``job.job_folder``.
        data: What is learned from.
        seed: Of the sample of texts.
        device: Of the teacher, as ``Encoder.from_pretrained`` takes it.

    Raises:
        ValueError: Bad data, or a model that cannot be a teacher.
        OSError: A file cannot be read or written.
    """
    if not data.train:
        file = folder / "texts.jsonl"
        if not file.is_file():
            prepare_texts(data.texts, data.queries, file, size=data.num_texts, seed=seed)
        teach(Lines(file), Encoder.from_pretrained(data.teacher, device=device).pack(), folder)
        return
    file = folder / "examples.jsonl"
    if file.is_file():
        return
    prepared = folder / "unscored.jsonl" if data.teacher or data.reranker else file
    options = {"corpus": data.corpus, "topics": data.topics, "split": data.split, "max_negatives": data.negatives}
    prepare_examples(data.train, prepared, **options)
    if prepared != file:
        with_scores(prepared, file, load_teacher(data.teacher, data.reranker, device=device))


def load(folder: Path, data: Data, seed: int) -> Loaded:
    """Return what ``prepare`` wrote; of texts a tenth is held out, at most 256, the same for the same seed."""
    if data.train:
        return Loaded(Examples(folder / "examples.jsonl"), _as_examples, [])
    taught = TaughtTexts(Lines(folder / "texts.jsonl"), folder)
    held_out = random.Random(seed).sample(range(len(taught)), min(HELD_OUT, len(taught) // 10))
    dataset = Subset(taught, sorted(set(range(len(taught))) - set(held_out)))
    return Loaded(dataset, as_batch, [taught[number] for number in held_out])


def resolved(losses: LossSettings, data: Data, encoder: Encoder) -> LossSettings:
    """Return the settings with a value for every None that stands for one."""
    temperature = losses.temperature or (0.02 if encoder.config.similarity == "cosine" else 1.0)
    of_teacher = losses.teacher_temperature or (temperature if data.teacher else 1.0)
    return replace(losses, temperature=temperature, teacher_temperature=of_teacher)


def objective_of(encoder: Encoder, data: Data, losses: LossSettings) -> Objective:
    """Return the loss of an encoder on such data; ``losses`` are ``resolved``."""
    return (RetrievalObjective if data.train else ImitationObjective)(encoder, losses)


def hashes(data: Data) -> dict[str, str]:
    """Return the SHA-256 of every file that is learned from or measured on, by name."""
    names = [data.train, *data.texts, *data.queries, data.corpus, data.topics, data.dev, data.teacher, data.reranker]
    found = {}
    for name in filter(None, names):
        path = Path(name)
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        found |= {str(file): file_sha256(file) for file in files if file.is_file()}
    return found


def _as_examples(examples: Sequence[Example]) -> dict[str, object]:
    return {"examples": examples}
