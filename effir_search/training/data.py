"""What is learned from: examples with labels, or texts with a teacher, prepared in a job's folder."""

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import MappingProxyType
from typing import Literal, NamedTuple

import numpy as np
from torch.utils.data import Subset
from transformers import PreTrainedModel

from effir_search.encoding.encoder import Encoder
from effir_search.errors import UserError
from effir_search.files.job import job_folder, read_settings
from effir_search.files.lines import Lines
from effir_search.files.reading import file_sha256
from effir_search.model.checkpoint import resolve_model
from effir_search.model.layers import layers_of
from effir_search.model.packed import use_short_attention
from effir_search.model.sentence_files import read_sentence_files
from effir_search.settings import DataSettings, LossSettings
from effir_search.text.examples import Example, Examples, prepare_examples, with_scores
from effir_search.training.objective import ImitationObjective, Objective, RetrievalObjective, read_differently
from effir_search.training.teachers import load_teacher
from effir_search.training.unlabelled import PlainText, PlainTexts, as_batch, prepare_texts

# Where in a job's folder prepared data is: another recipe leaves it as it is.
DATA = "data"
# Texts that are held out to measure likeness to the teacher.
HELD_OUT = 256


class Loaded(NamedTuple):
    """Prepared data.

    Attributes:
        dataset: ``Example`` or ``PlainText``; none of them is in memory.
        collate: Makes of some of them the keyword arguments that the objective takes.
        held_out: Texts that are not in the dataset; none beside examples.
    """

    dataset: Sequence[Example] | Sequence[PlainText]
    collate: Callable[[Sequence], dict[str, object]]
    held_out: list[PlainText]


class Shuffled:
    """A dataset in a seeded order, pass after pass, as one long sequence.

    transformers then sees a single pass to the end: a continued job skips what was seen, whatever the number of
    processes, and every batch is full, since one pass runs into the next.

    Args:
        dataset: At least one item.
        length: Items of the sequence.
        seed: Of the order, which differs from pass to pass.
    """

    def __init__(self, dataset: Sequence, length: int, seed: int) -> None:
        self.dataset, self.length, self.seed = dataset, length, seed
        self._pass, self._order = -1, np.empty(0, dtype=np.int64)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, number: int) -> object:
        if not 0 <= number < self.length:
            raise IndexError(number)
        of_pass, place = divmod(number, len(self.dataset))
        if of_pass != self._pass:
            self._pass = of_pass
            self._order = np.random.default_rng([self.seed, of_pass]).permutation(len(self.dataset))
        return self.dataset[int(self._order[place])]


def prepare(
    folder: Path,
    data: DataSettings,
    seed: int,
    device: str,
    *,
    files: dict[str, str],
    restart: bool = False,
    teacher_options: Mapping[str, object] = MappingProxyType({}),
) -> None:
    """Write what is learned from into the folder ``data`` of a job's folder; what a stopped job has written is kept.

    Args:
        folder: See ``job.job_folder``.
        data: What is learned from.
        seed: Of the sample of texts.
        device: Of the teacher, as ``Encoder.from_pretrained`` takes it.
        files: The data's ``hashes``.
        restart: Discard data that is there and of other settings, instead of raising.
        teacher_options: Of a bi-encoder that scores candidates, as ``Encoder.from_pretrained`` takes them; of a
            cross-encoder ``stock_architecture`` counts.

    Raises:
        ValueError: Bad data, a model that cannot be a teacher, or data of other settings in the folder.
        OSError: A file cannot be read or written.
    """
    settings = {name: value for name, value in asdict(data).items() if not name.startswith("dev")}
    scores = bool(data.train and data.teacher)
    settings |= {"seed": seed, "files": files, "teacher_options": dict(teacher_options) if scores else {}}
    settings = json.loads(json.dumps(settings))
    folder = folder / DATA
    with job_folder(folder, settings, restart=restart and read_settings(folder) != settings):
        if not data.train:
            file = folder / "texts.jsonl"
            if not file.is_file():
                prepare_texts(data.texts, data.queries, file, size=data.num_texts, seed=seed)
            return
        file = folder / "examples.jsonl"
        if file.is_file():
            return
        prepared = folder / "unscored.jsonl" if data.teacher or data.reranker else file
        options = {"corpus": data.corpus, "topics": data.topics, "split": data.split, "max_negatives": data.negatives}
        prepare_examples(data.train, prepared, **options)
        if prepared != file:
            with_scores(prepared, file, load_teacher(data.teacher, data.reranker, device=device, **teacher_options))


def load(folder: Path, data: DataSettings, seed: int) -> Loaded:
    """Return what ``prepare`` wrote; of texts a tenth is held out, at most 256, the same for the same seed."""
    if data.train:
        return Loaded(Examples(folder / DATA / "examples.jsonl"), _as_examples, [])
    texts = PlainTexts(Lines(folder / DATA / "texts.jsonl"))
    held_out = random.Random(seed).sample(range(len(texts)), min(HELD_OUT, len(texts) // 10))
    dataset = Subset(texts, sorted(set(range(len(texts))) - set(held_out)))
    return Loaded(dataset, as_batch, [texts[number] for number in held_out])


def sampled_texts(loaded: Loaded, size: int, seed: int) -> list[PlainText]:
    """Return a seeded sample of what is learned from; an example gives its query and its positive."""
    texts: list[PlainText] = []
    for row in random.Random(seed).sample(range(len(loaded.dataset)), min(size, len(loaded.dataset))):
        item = loaded.dataset[row]
        if isinstance(item, Example):
            texts += [PlainText(item.query, query=True), PlainText(item.positive, query=False)]
        else:
            texts.append(item)
    return texts


def teacher_reading(data: DataSettings, encoder: Encoder) -> dict[str, object]:
    """Return how the teacher makes a vector of a text: as the encoder does if its own files do not say how.

    So a language model teaches what was pruned from it, which has been told.

    Args:
        data: What is learned from.
        encoder: What learns.

    Returns:
        Options of ``Encoder.from_pretrained``; none for a teacher whose files say it, or without one.
    """
    if data.teacher is None or read_sentence_files(resolve_model(data.teacher)).pooling is not None:
        return {}
    config, tokenizer = encoder.config, encoder.tokenizer
    ends_with_eos = tokenizer.eos_token_id is not None and tokenizer("")["input_ids"][-1:] == [tokenizer.eos_token_id]
    return {
        "pooling": config.pooling,
        "query_prompt": config.query_prompt,
        "document_prompt": config.document_prompt,
        "append_eos": ends_with_eos,
        "normalize": config.similarity == "cosine",
    }


def imitated(data: DataSettings, encoder: Encoder, device: str, **text_options: object) -> Encoder | None:
    """Return the teacher that is imitated, which reads no more of a text than the encoder does; None with labels.

    Args:
        data: What is learned from.
        encoder: What learns.
        device: As ``Encoder.from_pretrained`` takes it.
        text_options: Of the teacher, likewise.

    Raises:
        ValueError: The folder is no model.
        OSError: It cannot be read.
    """
    if data.train:
        return None
    teacher = Encoder.from_pretrained(data.teacher, device=device, batch_tokens=encoder.batch_tokens, **text_options)
    shorter = min(teacher.config.max_length, encoder.config.max_length)
    teacher.config = replace(teacher.config, max_length=shorter)
    return teacher.pack()


def resolved(losses: LossSettings, data: DataSettings, encoder: Encoder, teacher: Encoder | None) -> LossSettings:
    """Return the settings with a value for every None that stands for one.

    Args:
        losses: The settings.
        data: What is learned from.
        encoder: What learns.
        teacher: See ``imitated``.

    Raises:
        ValueError: The states of tokens are to be matched with those of a teacher that makes others.
    """
    temperature = losses.temperature or (0.02 if encoder.config.similarity == "cosine" else 1.0)
    of_teacher = losses.teacher_temperature or (temperature if data.teacher else 1.0)
    of_tokens = losses.token_weight
    if teacher is None:
        if of_tokens:
            raise UserError(f"--token-weight {of_tokens:g} goes with --texts and a teacher that is imitated")
        of_tokens = 0.0
    elif of_tokens is None:
        pool_means = teacher.config.pooling == encoder.config.pooling == "mean"
        of_tokens = float(pool_means and read_differently(teacher, encoder) is None)
    elif of_tokens and (different := read_differently(teacher, encoder)):
        raise UserError(f"--token-weight {of_tokens:g}: {data.teacher} has another {different}")
    return replace(losses, temperature=temperature, teacher_temperature=of_teacher, token_weight=of_tokens)


def objective_of(
    encoder: Encoder, losses: LossSettings, teacher: Encoder | None, *, bf16: bool, alone: bool = False
) -> Objective:
    """Return the loss of an encoder that imitates a teacher, or with None learns from labels.

    Args:
        encoder: What learns.
        losses: See ``resolved``.
        teacher: See ``imitated``.
        bf16: Whether it will run in bfloat16.
        alone: See ``Objective``.
    """
    if bf16 and encoder.device.type == "cpu":
        use_short_attention(encoder.model)
    if teacher is None:
        return RetrievalObjective(encoder, losses, alone=alone)
    return ImitationObjective(encoder, losses, teacher, alone=alone)


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Let a model keep only its layers' inputs for the backward pass, in eval mode as well.

    Raises:
        ValueError: One that cannot.
    """
    if not model.supports_gradient_checkpointing:
        raise UserError(f"--gradient-checkpointing: {model.config.model_type} models do not support it")
    _switch_checkpointing(model, "enable")
    for layer in layers_of(model):
        layer.training = True  # what a layer looks at; its parts stay in the mode they are in


def keep_activations(model: PreTrainedModel) -> None:
    """Undo ``checkpoint_activations``; the mode of the layers is the caller's to set."""
    _switch_checkpointing(model, "disable")


def _switch_checkpointing(model: PreTrainedModel, state: Literal["enable", "disable"]) -> None:
    """Enable or disable it, by its name in transformers 5.23 and later or by that of those before."""
    name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    getattr(model, f"{name}_checkpointing_{state}")()


def hashes(data: DataSettings) -> dict[str, str]:
    """Return the SHA-256 of every file that is learned from, by name."""
    files = _files(data.train, data.split)
    for name in (*data.texts, *data.queries, data.corpus, data.topics, data.teacher, data.reranker):
        files += _files(name)
    return {str(file): file_sha256(file) for file in files}


def dev_hashes(data: DataSettings) -> dict[str, str]:
    """Return the SHA-256 of every file that is measured on, by name."""
    return {str(file): file_sha256(file) for file in _files(data.dev, data.dev_split)}


def _files(name: str | None, split: str | None = None) -> list[Path]:
    """The files behind a name, as far as it is one on this disk; of a BEIR folder those of a split."""
    path = Path(name or "")
    if name is None or not path.exists():
        return []
    if not path.is_dir():
        return [path]
    if split is not None:
        inside = [f"{stem}.jsonl{end}" for stem in ("corpus", "queries") for end in ("", ".gz")]
        return [path / file for file in (*inside, f"qrels/{split}.tsv") if (path / file).is_file()]
    if (path / "corpus.jsonl").is_file():
        return [path / "corpus.jsonl"]
    return [file for file in sorted(path.rglob("*")) if file.is_file()]


def _as_examples(examples: Sequence[Example]) -> dict[str, object]:
    return {"examples": examples}
