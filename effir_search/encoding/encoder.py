"""Text in, float32 vectors out: the one forward pass, and the batching around it."""

import inspect
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from effir_search.encoding.batching import Tokens, batches_by_length, default_batch_tokens
from effir_search.encoding.config import EncoderConfig, encoder_config
from effir_search.encoding.devices import chosen_device, chosen_dtype, to_device
from effir_search.encoding.pooling import pool
from effir_search.encoding.tokenizing import lower_case
from effir_search.errors import UserError
from effir_search.files.reading import read_json
from effir_search.model.checkpoint import (
    empty_transformer,
    exported_backend,
    load_tokenizer,
    load_transformer,
    resolve_model,
    weights_sha256,
)
from effir_search.model.graph_model import (
    EXPORT_FILE,
    GRAPH_DTYPES,
    GRAPH_FILES,
    PACKAGES,
    GraphModel,
    load_graph,
    require_packages,
)
from effir_search.model.packed import pack
from effir_search.model.save import WEIGHTS_FIELD, save_model
from effir_search.model.sentence_files import SentenceFiles, check_stock_encoder, load_head, read_sentence_files
from effir_search.model.to_graph import write_onnx
from effir_search.model.unpadded import HALVES, can_unpad, joined, states_of
from effir_search.settings import EncoderOptions
from effir_search.text.corpus import Document, document_text

logger = logging.getLogger(__name__)

DEFAULT_OPTIONS = EncoderOptions()

# The least cosine to the same text's vector, computed in another way in 16 bits, that rounding explains.
AGREES = 0.999
# Texts that are tokenized and sorted by length together.
WINDOW = 4096


class NotFiniteError(UserError):
    """A vector with a NaN or an infinity."""


class Encoded(NamedTuple):
    """``embeddings`` is ``(texts, dimension)`` float32; ``num_truncated`` texts were longer than max_length."""

    embeddings: np.ndarray
    num_truncated: int


def embed(
    model: nn.Module,
    tokens: Mapping[str, Tensor],
    config: EncoderConfig,
    *,
    head: nn.Module | None = None,
    prompt_length: int = 0,
) -> Tensor:
    """Return one vector per row: transformer, pooling, head, normalisation, truncation. Gradients flow.

    Args:
        model: Anything whose output has ``last_hidden_state``, ``(batch, seq, hidden_size)``.
        tokens: ``input_ids`` and ``attention_mask``, each ``(batch, seq)``, with at least one real token a row; or
            what ``model.unpadded.joined`` makes of them.
        config: Pooling, normalisation and dimension are taken from it.
        head: Maps pooled vectors, ``(batch, hidden_size)`` to ``(batch, dimension)``.
        prompt_length: Leading tokens that are not pooled.

    Returns:
        ``(batch, dimension)`` float32, whatever the dtype of the model.
    """
    hidden_states = states_of(model, tokens) if "places" in tokens else model(**tokens).last_hidden_state
    return vectors(hidden_states, tokens["attention_mask"], config, head=head, prompt_length=prompt_length)


def vectors(
    hidden_states: Tensor,
    attention_mask: Tensor,
    config: EncoderConfig,
    *,
    head: nn.Module | None = None,
    prompt_length: int = 0,
) -> Tensor:
    """Return what ``embed`` makes of a transformer's output, ``(batch, seq, hidden_size)``."""
    embeddings = pool(hidden_states.float(), attention_mask, config.pooling, prompt_length=prompt_length)
    if head is not None:
        with torch.autocast(embeddings.device.type, enabled=False):
            embeddings = head(embeddings)
    if config.normalize:
        embeddings = F.normalize(embeddings, dim=-1)
    return embeddings[:, : config.dimension]


class Encoder:
    """A model, its tokenizer and an ``EncoderConfig``: what turns queries and documents into vectors.

    Attributes:
        name: The folder or hub name it was loaded from.
        files: What the sentence-transformers files of that folder say.
        config: See ``EncoderConfig``.
        dtype: Of the transformer; pooling and everything after it is float32.
        batch_tokens: Upper bound of rows times longest row in a forward pass.
        backend: What computes: "torch", or a key of ``model.graph_model.GRAPH_FILES``.
        unpads: Whether texts share a forward pass one behind the other, without padding; see ``pack``.
        stock_architecture: Whether it may be transformers' stock model in place of one with code of its own.
    """

    def __init__(
        self,
        model: PreTrainedModel | GraphModel,
        tokenizer: PreTrainedTokenizerBase,
        config: EncoderConfig,
        *,
        name: str,
        files: SentenceFiles,
        head: nn.Sequential | None = None,
        batch_tokens: int | None = None,
        stock_architecture: bool = False,
    ) -> None:
        self.model, self.tokenizer, self.config, self.head = model, tokenizer, config, head
        self.name, self.files, self.stock_architecture = name, files, stock_architecture
        self.dtype, self.device, self.backend = model.dtype, model.device, "torch"
        # Where no types are given, BERT takes zeros and GPT-2 none at all, so zeros are handed on like any others.
        self._takes_types = "token_type_ids" in inspect.signature(model.base_model.forward).parameters
        self.batch_tokens = batch_tokens or default_batch_tokens(model)
        self.unpads = False

    @classmethod
    def from_pretrained(
        cls, path: str | Path, options: EncoderOptions = DEFAULT_OPTIONS, **changes: object
    ) -> "Encoder":
        """Load a Hugging Face or sentence-transformers model; what is None is taken from the model's own files.

        Args:
            path: Model folder, or a name on the Hugging Face hub.
            options: How it is loaded and run; a ``dtype`` of None is "auto".
            changes: Fields of ``EncoderOptions`` by name, which come before those of ``options``; ``dtype`` may be one
                of torch's, too.

        Raises:
            ValueError: The folder is not a model this project can run, or an option does not fit it.
            OSError: A file cannot be read.
        """
        options = replace(options, **changes)
        stock = {"stock_architecture": options.stock_architecture}
        check_stock_encoder(path, **stock)  # before gigabytes are fetched
        folder = resolve_model(path)
        files = read_sentence_files(folder)
        backend, device, dtype = _arithmetic(files.transformer_folder, options)
        head = load_head(files.head).to(device) if files.head else None
        if exported_backend(files.transformer_folder):
            model = empty_transformer(files.transformer_folder, **stock)  # its graph takes its place below
        else:
            of_torch = torch.float32 if backend != "torch" else dtype
            model = load_transformer(files.transformer_folder, dtype=of_torch, device=device, **stock)
        tokenizer = load_tokenizer(files.transformer_folder, model, **stock)
        if files.lower_case:
            lower_case(tokenizer)
        if files.pooling is None and tokenizer.chat_template:
            logger.warning("%s has a chat template, which is not used: texts are read as they are", path)
        config = encoder_config(files, model, tokenizer, options)
        parts = {"files": files, "head": head, "batch_tokens": options.batch_tokens}
        encoder = cls(model, tokenizer, config, name=str(path), **parts, **stock)
        if backend != "torch":
            encoder = encoder.as_graph(backend, dtype)
        if options.dimension is not None and encoder.dimension < options.dimension:
            raise UserError(
                f"--dimension {options.dimension}: the vectors of {path} have {encoder.dimension} components"
            )
        return encoder

    def as_graph(self, backend: str, dtype: torch.dtype) -> "Encoder":
        """Return an encoder whose transformer another backend computes: its exported graph, or one made of it now.

        Args:
            backend: A key of ``GRAPH_FILES``.
            dtype: Of the arithmetic.

        Raises:
            ValueError: A model that torch cannot write as a graph, or a dtype that the backend has not.
            ModuleNotFoundError: A package of the extra ``export`` is missing.
        """
        place = self.files.transformer_folder
        if exported_backend(place):
            self._check_graph(place)
            graph = load_graph(place / GRAPH_FILES[backend], backend, self.model, dtype)
        else:
            require_packages(PACKAGES[backend])
            with tempfile.TemporaryDirectory() as folder:
                self.write_onnx(Path(folder, "model.onnx"))
                graph = load_graph(Path(folder, "model.onnx"), backend, self.model, dtype)
        encoder = self.with_model(graph)
        encoder.backend = backend
        return encoder

    def _check_graph(self, place: Path) -> None:
        """Raise ValueError if an exported graph is not the one that its record was written for."""
        record = read_json(place / EXPORT_FILE) if (place / EXPORT_FILE).is_file() else {}
        if record.get(WEIGHTS_FIELD, self.weights_sha256) != self.weights_sha256:
            raise UserError(
                f"{place}: its graph is damaged or another than {EXPORT_FILE} was written for; export it again"
            )

    def write_onnx(self, file: Path) -> None:
        """Write the transformer as an ONNX graph, see ``model.to_graph.write_onnx``."""
        texts = self.tokenize(["two texts", "of more than a token"])
        _, tokens = next(self.batches(texts))
        write_onnx(self.model, tokens, file)

    def with_config(self, **changes: object) -> "Encoder":
        """Return an encoder that differs in these fields of its ``EncoderConfig``; the model is shared."""
        encoder = copy(self)
        encoder.config = replace(self.config, **changes)
        return encoder

    def with_model(self, model: PreTrainedModel) -> "Encoder":
        """Return an encoder with another transformer, its device and its dtype; the rest is shared."""
        encoder = copy(self)
        encoder.model, encoder.dtype, encoder.device, encoder.unpads = model, model.dtype, model.device, False
        encoder.__dict__.pop("_states_of_one_token", None)  # of the model before
        return encoder

    @cached_property
    def weights_sha256(self) -> str:
        """SHA-256 of the files that the weights were loaded from; see ``model.checkpoint.weights_sha256``."""
        return weights_sha256(self.files.folder, self.files.weight_folders)

    def pack(self) -> "Encoder":
        """Lay the weights out for inference, see ``model.packed``; the model can then be neither trained nor saved.

        On a GPU in 16-bit arithmetic texts are no longer padded, if this gives a few of them the vectors they had.
        """
        if self.backend == "torch":
            pack(self.model)
            if self.device.type == "cuda" and self.dtype in HALVES and can_unpad(self.model):
                self.unpads = self._agrees_unpadded()
        return self

    def _agrees_unpadded(self) -> bool:
        """Return whether texts of several lengths get without padding the vectors that they have with it."""
        texts = ["a", "some words", "more words " * 20, "a text that is longer than most windows " * 60]
        padded, trial = self.encode(texts).embeddings, copy(self)
        trial.unpads = True
        try:
            found = trial.encode(texts).embeddings
        except RuntimeError as error:  # a GPU for which torch has no such kernel
            logger.warning("texts are padded: torch cannot do without on this GPU (%s)", str(error).splitlines()[0])
            return False
        cosines = (padded * found).sum(axis=1) / np.linalg.norm(padded, axis=1) / np.linalg.norm(found, axis=1)
        if not cosines.min() > AGREES:
            logger.warning("texts are padded: without padding a vector's cosine to itself is %.4f", cosines.min())
        return bool(cosines.min() > AGREES)

    def save(
        self,
        output: Path,
        *,
        training: dict | None = None,
        beside: Mapping[str, str] = MappingProxyType({}),
        measured: str = "",
    ) -> None:
        """Save the model with its tokenizer and settings as a folder of its own.

        Loaded from there, the encoder gives the same vectors. What ``append_eos`` added is then part of the tokenizer.

        Args:
            output: The new folder.
            training: How the model was trained, kept beside it; JSON types.
            beside: Text files to lie beside it, by name.
            measured: A last section of the model card.

        Raises:
            OSError: ``output`` exists, or cannot be written.
        """
        files = self.own_files()
        save_model(self.model, self.tokenizer, files, output, training=training, beside=beside, measured=measured)

    def own_files(self) -> SentenceFiles:
        """Return what the files of a folder are to say from which this encoder is loaded; EOS is the tokenizer's."""
        settings = {name: value for name, value in asdict(self.config).items() if name != "append_eos"}
        return self.files._replace(**settings)

    @property
    def dimension(self) -> int:
        """Components of a vector, by the config as it is."""
        with torch.inference_mode():
            mask = torch.ones(1, 1, dtype=torch.long, device=self.device)
            return vectors(self._states_of_one_token, mask, self.config, head=self.head).shape[1]

    @cached_property
    def _states_of_one_token(self) -> Tensor:
        """States as the model makes them, ``(1, 1, hidden_size)``; only their size is of use."""
        with torch.inference_mode():
            token = torch.ones(1, 1, dtype=torch.long, device=self.device)
            return self.model(input_ids=token, attention_mask=token).last_hidden_state

    def encode_queries(self, texts: Sequence[str]) -> np.ndarray:
        """Return ``(texts, dimension)`` float32, rows in input order, each text with the query prompt before it."""
        return self.encode(texts, prompt=self.config.query_prompt).embeddings

    def encode_documents(self, documents: Sequence[Document | str]) -> np.ndarray:
        """Return ``(documents, dimension)`` float32, rows in input order, each with the document prompt before it."""
        texts = [document if isinstance(document, str) else document_text(document) for document in documents]
        return self.encode(texts, prompt=self.config.document_prompt).embeddings

    def encode(self, texts: Sequence[str], *, prompt: str = "") -> Encoded:
        """Return one vector per text, in order, and how many texts were cut at ``max_length``.

        Raises:
            NotFiniteError: A vector with a NaN or an infinity.
            ValueError: Not enough GPU memory for one batch.
        """
        windows = (texts[start : start + WINDOW] for start in range(0, len(texts), WINDOW))
        encoded = [self.encode_tokens(self.tokenize(window, prompt=prompt)) for window in windows]
        empty = np.zeros((0, self.dimension), dtype=np.float32)
        embeddings = np.concatenate([empty, *(window.embeddings for window in encoded)])
        return Encoded(embeddings, sum(window.num_truncated for window in encoded))

    def tokenize(self, texts: Sequence[str], *, prompt: str = "") -> "Tokens":
        """Return the texts tokenized with the prompt before each, for ``encode_tokens``; other threads may do this."""
        # What the tokenizer returns, without the offsets and copies it makes: a call of it sets its backend up.
        self.tokenizer("", truncation=True, max_length=self.config.max_length)
        encodings = self.tokenizer.backend_tokenizer.encode_batch_fast([prompt + text for text in texts])
        has_types = self._takes_types and "token_type_ids" in self.tokenizer.model_input_names
        return Tokens(
            texts=texts,
            input_ids=[encoding.ids for encoding in encodings],
            token_type_ids=[encoding.type_ids for encoding in encodings] if has_types else None,
            prompt_length=0 if self.config.include_prompt else self._prompt_length(prompt),
            num_truncated=sum(bool(encoding.overflowing) for encoding in encodings),
        )

    @torch.inference_mode()
    def encode_tokens(self, tokens: "Tokens", *, done: Callable[[int], object] = lambda _rows: None) -> Encoded:
        """Return one vector per text, in order: the second half of ``encode``.

        Texts of similar length share a forward pass. A text without any token, which an empty one is for a tokenizer
        that adds no special tokens, gets the zero vector.

        Args:
            tokens: From ``tokenize``.
            done: Called after each forward pass with the number of its rows, for a progress bar.

        Raises:
            NotFiniteError: A vector with a NaN or an infinity.
            ValueError: Not enough GPU memory for one batch.
        """
        embeddings = np.zeros((len(tokens.texts), self.dimension), dtype=np.float32)
        computed = []  # fetched at the end: to wait for vectors would keep a GPU from its next batch
        for rows, batch in self.batches(tokens):
            try:
                vectors = embed(self.model, batch, self.config, head=self.head, prompt_length=tokens.prompt_length)
            except torch.OutOfMemoryError as error:
                shape = tuple(batch["input_ids"].shape)
                raise UserError(f"out of GPU memory at a batch of {shape} tokens; lower --batch-tokens") from error
            computed.append((rows, vectors))
            done(len(rows))
        for rows, vectors in computed:
            embeddings[rows] = vectors.cpu().numpy()
        finite = np.isfinite(embeddings).all(axis=1)
        if not finite.all():
            row = int(finite.argmin())
            text = f"text {row + 1} of {len(finite)} ({tokens.texts[row][:40]!r})"
            advice = "; --dtype fp32 or bf16 has the range that fp16 lacks" if self.dtype == torch.float16 else ""
            raise NotFiniteError(f"{text}: its vector is not finite in {self.dtype}{advice}")
        return Encoded(embeddings, tokens.num_truncated)

    def batches(self, tokens: "Tokens") -> Iterator[tuple[np.ndarray, dict[str, Tensor]]]:
        """Yield the rows of each forward pass, and what ``embed`` takes for them; texts without a token are in none."""
        for rows in batches_by_length([len(ids) for ids in tokens.input_ids], self.batch_tokens):
            batch = tokens.batch(rows, self.tokenizer.pad_token_id or 0)
            if self.unpads:
                batch = joined(batch, self.model)
            yield rows, {name: to_device(tensor, self.device) for name, tensor in batch.items()}

    def _prompt_length(self, prompt: str) -> int:
        """Tokens of the prompt alone, a special token at its end left out, as sentence-transformers counts them."""
        ids = self.tokenizer(prompt, truncation=True, max_length=self.config.max_length)["input_ids"] if prompt else []
        return len(ids) - bool(ids and ids[-1] in self.tokenizer.all_special_ids)


def _arithmetic(place: Path, options: EncoderOptions) -> tuple[str, torch.device, torch.dtype | None]:
    """Return what computes for the model in a folder, where, and in which type of numbers.

    Raises:
        ValueError: The backend is not to be had for this model, this device or this type.
    """
    asked = None if options.backend == "auto" else options.backend
    exported = exported_backend(place)
    if exported is not None and (asked == "torch" or options.dtype == "saved"):
        reason = "which torch needs; give the model it was made from"
        raise UserError(f"{place}: was exported to {exported} and has no weights, {reason}")
    if exported is not None and asked not in (None, exported):
        raise UserError(f"{place}: was exported to {exported} and has no weights, so --backend {asked} cannot run it")
    backend = exported or asked or "torch"
    if backend == "torch":
        device = chosen_device(options.device)
        return backend, device, chosen_dtype(options.dtype or "auto", device)
    if options.dtype == "saved":
        raise UserError(f"--dtype saved: the backend {backend} computes in {' and '.join(GRAPH_DTYPES[backend])}")
    if not options.device.startswith(("auto", "cpu")):
        raise UserError(f"--device {options.device}: the backend {backend} computes on the CPU alone")
    device = torch.device("cpu")
    if backend == "onnx" and options.dtype in (None, "auto"):
        return backend, device, torch.float32
    return backend, device, chosen_dtype(options.dtype or "auto", device)
