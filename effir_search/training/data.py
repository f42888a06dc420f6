"""What is learned from: examples with labels, or texts with a teacher, prepared in a job's folder."""

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from torch.utils.data import Subset
from transformers import PreTrainedModel

from effir_search.encoding.encoder import DEFAULT_OPTIONS, Encoder
from effir_search.errors import UserError
from effir_search.files.job import job_folder, read_settings, same_settings
from effir_search.files.lines import Lines
from effir_search.files.reading import file_sha256
from effir_search.model.checkpoint import resolve_model
from effir_search.model.decoder_kernels import use_decoder_kernels
from effir_search.model.layers import layers_of
from effir_search.model.packed import use_short_attention
from effir_search.model.sentence_files import read_sentence_files
from effir_search.settings import DataSettings, EncoderOptions, LossSettings, TextSettings
from effir_search.text.examples import Example, Examples, prepare_examples, with_scores
from effir_search.training.imitation_objective import ImitationObjective, read_differently
from effir_search.training.objective import Objective
from effir_search.training.plain_texts import PlainText, PlainTexts, as_batch, prepare_texts
from effir_search.training.retrieval_objective import RetrievalObjective
from effir_search.training.teachers import load_teacher

# Where in a job's folder prepared data is: another recipe leaves it as it is.
DATA = "data"
# Texts that are held out to measure likeness to the teacher.
HELD_OUT = 256
TEXT_FIELDS = tuple(field.name for field in fields(TextSettings))


class PreparedData(NamedTuple):
    """What ``prepare`` wrote.

    Attributes:
        dataset: ``Example`` or ``PlainText``; none of them is in memory.
        collate: Makes of some of them the keyword arguments that the objective takes.
        held_out: Texts that are not in the dataset; none beside examples.
    """

    dataset: Sequence[Example] | Sequence[PlainText]
    collate: Callable[[Sequence], dict[str, object]]
    held_out: list[PlainText]


class ShuffledSequence:
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
        self._pass_number, self._order = -1, np.empty(0, dtype=np.int64)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, number: int) -> object:
        if not 0 <= number < self.length:
            raise IndexError(number)
        pass_number, place = divmod(number, len(self.dataset))
        if pass_number != self._pass_number:
            self._pass_number = pass_number
            self._order = np.random.default_rng([self.seed, pass_number]).permutation(len(self.dataset))
        return self.dataset[int(self._order[place])]


def prepare(
    folder: Path,
    data: DataSettings,
    seed: int,
    device: str,
    *,
    files: dict[str, str],
    restart: bool = False,
    teacher_options: EncoderOptions = DEFAULT_OPTIONS,
    scored: bool = True,
) -> None:
    """Write what is learned from into the folder ``data`` of a job's folder; what a stopped job has written is kept.

    Args:
        folder: See ``job.job_folder``.
        data: What is learned from.
        seed: Of the sample of texts.
        device: Of a teacher that scores candidates, see ``EncoderOptions``.
        files: The data's ``hashes``.
        restart: Discard what an earlier job prepared with other settings, instead of raising.
        teacher_options: How that teacher is loaded, but for ``device`` and ``batch_tokens``, which is the default.
        scored: Whether examples get the scores of the teacher, if there is one. Without them the data are the same
            whatever the teacher.

    Raises:
        ValueError: Bad data, a model that cannot be a teacher, or data of other settings in the folder.
        OSError: A file cannot be read or written.
    """
    folder = folder / DATA
    if data.train and not scored:
        of_teacher = set(map(str, _files(data.teacher)))
        files = {name: digest for name, digest in files.items() if name not in of_teacher}
        data = replace(data, teacher=None)
    existing = read_settings(folder)
    record = _prepared_record(data, seed, files, teacher_options)
    changed = existing is None or not same_settings(record, existing)
    file = folder / ("examples.jsonl" if data.train else "texts.jsonl")
    if not changed and file.is_file():  # without the folder's lock, so that several jobs may share it
        return
    with job_folder(folder, record, restart=restart and changed):
        if not data.train:
            prepare_texts(data.texts, data.queries, file, size=data.num_texts, seed=seed)
            return
        # Scores in bfloat16 depend on the batch, so its size is not that of what learns.
        options = replace(teacher_options, device=device, batch_tokens=None)
        _write_examples(data, file, options)


def _write_examples(data: DataSettings, file: Path, options: EncoderOptions) -> None:
    """Write examples, with their teacher's scores if they have one, whose options these are."""
    has_teacher = bool(data.teacher or data.reranker)
    unscored = file.with_name("unscored.jsonl") if has_teacher else file
    prepare_examples(
        data.train,
        unscored,
        corpus=data.corpus,
        topics=data.topics,
        split=data.split,
        max_negatives=data.negatives,
    )
    if has_teacher:
        with_scores(unscored, file, load_teacher(data.teacher, data.reranker, options))


def _prepared_record(
    data: DataSettings, seed: int, files: dict[str, str], teacher_options: EncoderOptions
) -> dict[str, object]:
    """Return what prepared data depend on, in JSON types."""
    record = {name: value for name, value in asdict(data).items() if not name.startswith("dev")}
    reading: dict[str, object] = {}
    if data.train and data.teacher:
        reading = _reading(teacher_options)
    return json.loads(json.dumps(record | {"seed": seed, "files": files, "teacher_options": reading}))


def _reading(options: EncoderOptions) -> dict[str, object]:
    """Return the options that a teacher's scores depend on, as far as they say other than its own files."""
    reading = options.given()
    for name in ("device", "batch_tokens"):
        reading.pop(name, None)
    if options.pooling is not None and options.query_prompt is not None and options.document_prompt is not None:
        # All is said, as by ``teacher_reading``: that a flag is off, too.
        reading = {name: getattr(options, name) for name in TEXT_FIELDS} | reading
    return reading


def load(folder: Path, data: DataSettings, seed: int) -> PreparedData:
    """Return what ``prepare`` wrote; of texts a tenth is held out, at most 256, the same for the same seed."""
    if data.train:
        return PreparedData(Examples(folder / DATA / "examples.jsonl"), _as_examples, [])
    texts = PlainTexts(Lines(folder / DATA / "texts.jsonl"))
    held_out = random.Random(seed).sample(range(len(texts)), min(HELD_OUT, len(texts) // 10))
    dataset = Subset(texts, sorted(set(range(len(texts))) - set(held_out)))
    return PreparedData(dataset, as_batch, [texts[number] for number in held_out])


def sampled_texts(prepared_data: PreparedData, size: int, seed: int) -> list[PlainText]:
    """Return a seeded sample of what is learned from; an example gives its query and its positive."""
    texts: list[PlainText] = []
    for row in random.Random(seed).sample(range(len(prepared_data.dataset)), min(size, len(prepared_data.dataset))):
        item = prepared_data.dataset[row]
        if isinstance(item, Example):
            texts += [PlainText(item.query, query=True), PlainText(item.positive, query=False)]
        else:
            texts.append(item)
    return texts


def teacher_reading(data: DataSettings, encoder: Encoder, options: EncoderOptions) -> EncoderOptions:
    """Return how the teacher is loaded; if its own files do not say how it reads a text, it reads as the encoder does.

    A language model has no such files, but what was pruned from it has them, and learns from it.

    Args:
        data: What is learned from.
        encoder: What learns.
        options: How that was loaded; the teacher's device and ``stock_architecture`` are the same.
    """
    machine = EncoderOptions(device=options.device, stock_architecture=options.stock_architecture)
    if data.teacher is None or read_sentence_files(resolve_model(data.teacher)).pooling is not None:
        return machine
    config, tokenizer = encoder.config, encoder.tokenizer
    ends_with_eos = tokenizer.eos_token_id is not None and tokenizer("")["input_ids"][-1:] == [tokenizer.eos_token_id]
    return replace(
        machine,
        pooling=config.pooling,
        query_prompt=config.query_prompt,
        document_prompt=config.document_prompt,
        append_eos=ends_with_eos,
        normalize=config.similarity == "cosine",
    )


def teacher_beside(
    data: DataSettings, losses: LossSettings, encoder: Encoder, options: EncoderOptions
) -> Encoder | None:
    """Return the teacher that runs beside the training, which reads no more of a text than the encoder does.

    It is imitated on texts, or scores every document of a batch of examples; None where scores are prepared, or none.

    Args:
        data: What is learned from.
        losses: What is minimised.
        encoder: What learns; the teacher's batches are as large.
        options: How the teacher is loaded.

    Raises:
        ValueError: The folder is no model, or the losses do not fit the data.
        OSError: It cannot be read.
    """
    check_losses(losses, data)
    if data.train and losses.distill_over == "candidates":
        return None
    teacher = Encoder.from_pretrained(data.teacher, options, batch_tokens=encoder.batch_tokens)
    return teacher.with_config(max_length=min(teacher.config.max_length, encoder.config.max_length)).pack()


def check_losses(losses: LossSettings, data: DataSettings) -> None:
    """Raise ValueError for losses that this data cannot give."""
    if losses.distill_over == "batch":
        if not data.train:
            raise UserError("--distill-over batch goes with --train; on --texts the whole score matrix is imitated")
        if data.reranker:
            raise UserError(
                "--distill-over batch needs a bi-encoder, --teacher: a reranker reads each query with each document, "
                "which are too many pairs in a batch; leave --distill-over out, or give --teacher"
            )
        if not data.teacher:
            raise UserError("--distill-over batch needs a teacher that scores the batch: give --teacher, a bi-encoder")
        if not losses.distillation_weight:
            raise UserError("--distill-over batch with --distillation-weight 0 learns nothing from the teacher")
    if not data.train and losses.contrastive_weight != 1:
        raise UserError(f"--contrastive-weight {losses.contrastive_weight:g} goes with --train")


def resolved_losses(
    losses: LossSettings, data: DataSettings, encoder: Encoder, teacher: Encoder | None
) -> LossSettings:
    """Return the settings with a value for every None that stands for one.

    Args:
        losses: The settings.
        data: What is learned from.
        encoder: What learns.
        teacher: See ``teacher_beside``.

    Raises:
        ValueError: The states of tokens are to be matched with those of a teacher that makes others.
    """
    temperature = losses.temperature or (0.02 if encoder.config.similarity == "cosine" else 1.0)
    teacher_temperature = losses.teacher_temperature or (temperature if data.teacher else 1.0)
    token_weight = losses.token_weight
    if data.train:
        if token_weight:
            raise UserError(f"--token-weight {token_weight:g} goes with --texts and a teacher that is imitated")
        token_weight = 0.0
    elif token_weight is None:
        pool_means = teacher.config.pooling == encoder.config.pooling == "mean"
        token_weight = float(pool_means and read_differently(teacher, encoder) is None)
    elif token_weight and (difference := read_differently(teacher, encoder)):
        raise UserError(f"--token-weight {token_weight:g}: {data.teacher} has another {difference}")
    return replace(losses, temperature=temperature, teacher_temperature=teacher_temperature, token_weight=token_weight)


def objective_of(
    encoder: Encoder, losses: LossSettings, teacher: Encoder | None, *, bf16: bool, alone: bool = False
) -> Objective:
    """Return the loss of an encoder that learns from examples, or from texts and a teacher that it imitates.

    Args:
        encoder: What learns.
        losses: See ``resolved_losses``.
        teacher: See ``teacher_beside``.
        bf16: Whether it will run in bfloat16.
        alone: See ``Objective``.
    """
    if bf16 and encoder.device.type == "cpu":
        use_short_attention(encoder.model)
        use_decoder_kernels(encoder.model)
    if teacher is None or losses.distill_over == "batch":
        return RetrievalObjective(encoder, losses, teacher, alone=alone)
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
