"""Text in, float32 vectors out: the one forward pass, and the batching around it."""

import inspect
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer, normalizers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from effir_search.encoding.pooling import pool
from effir_search.errors import UserError
from effir_search.files.reading import read_json
from effir_search.model.checkpoint import load_tokenizer, load_transformer, resolve_model, weights_sha256
from effir_search.model.packed import pack
from effir_search.model.save import save_model
from effir_search.model.sentence_files import SentenceFiles, check_stock_encoder, load_head, read_sentence_files
from effir_search.settings import pooling_modes
from effir_search.text.corpus import Document, document_text

logger = logging.getLogger(__name__)

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
# Texts that are tokenized and sorted by length together.
WINDOW = 4096
# A length of a text from which on it is no bound, and tokens that are read where there is none.
UNBOUNDED, NO_LENGTH = 10**9, 512
# Parameters from which on a model is large.
LARGE = 1_000_000_000


class NotFiniteError(UserError):
    """A vector with a NaN or an infinity."""


@dataclass(frozen=True)
class EncoderConfig:
    """How a text becomes a vector, beyond the weights: what an index and its searches must agree on.

    Attributes:
        pooling: See ``pooling.pooling_modes``.
        normalize: Whether vectors are scaled to length 1.
        similarity: "cosine" or "dot": what the inner product in an index stands for.
        query_prompt: Put before every query, with nothing between.
        document_prompt: Put before every document, with nothing between.
        include_prompt: Whether the prompt's tokens are pooled.
        max_length: Tokens of a text that are read, special tokens included.
        append_eos: Whether an end-of-sequence token was added to what the tokenizer does by itself.
        dimension: Leading components that are kept; None = all.
    """

    pooling: str
    normalize: bool = False
    similarity: str = "dot"
    query_prompt: str = ""
    document_prompt: str = ""
    include_prompt: bool = True
    max_length: int = 512
    append_eos: bool = False
    dimension: int | None = None

    def __post_init__(self) -> None:
        pooling_modes(self.pooling)
        if self.similarity not in ("cosine", "dot"):
            raise UserError(f"similarity {self.similarity!r} is unknown; known are cosine, dot")
        if self.max_length < 1:
            raise UserError(f"max_length {self.max_length} must be at least 1 token")
        if self.dimension is not None and self.dimension < 1:
            raise UserError(f"dimension {self.dimension} must be at least 1 component")


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
        tokens: ``input_ids`` and ``attention_mask``, each ``(batch, seq)``, with at least one real token a row.
        config: Pooling, normalisation and dimension are taken from it.
        head: Maps pooled vectors, ``(batch, hidden_size)`` to ``(batch, dimension)``.
        prompt_length: Leading tokens that are not pooled.

    Returns:
        ``(batch, dimension)`` float32, whatever the dtype of the model.
    """
    hidden_states = model(**tokens).last_hidden_state
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
        stock_architecture: Whether it may be transformers' stock model in place of one with code of its own.
    """

    def __init__(
        self,
        model: PreTrainedModel,
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
        self.dtype, self.device = model.dtype, model.device
        # Where no types are given, BERT takes zeros and GPT-2 none at all, so zeros are handed on like any others.
        self._takes_types = "token_type_ids" in inspect.signature(model.base_model.forward).parameters
        self.batch_tokens = batch_tokens or default_batch_tokens(model)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        device: str = "auto",
        dtype: str | torch.dtype = "auto",
        pooling: str | None = None,
        query_prompt: str | None = None,
        document_prompt: str | None = None,
        max_length: int | None = None,
        append_eos: bool = False,
        normalize: bool = False,
        dimension: int | None = None,
        batch_tokens: int | None = None,
        stock_architecture: bool = False,
    ) -> "Encoder":
        """Load a Hugging Face or sentence-transformers model; what is None is taken from the model's own files.

        Args:
            path: Model folder, or a name on the Hugging Face hub.
            device: "cpu", "cuda", "cuda:1"; "auto" takes a GPU if there is one, under a launcher each process its own.
            dtype: A key of ``DTYPES`` or one of its values; "auto" is bf16 where the processor computes in it, float32
                elsewhere; "saved" is that of the weights.
            pooling: See ``pooling.pooling_modes``.
            query_prompt: Put before every query.
            document_prompt: Put before every document.
            max_length: Tokens of a text that are read, special tokens included.
            append_eos: Add the end-of-sequence token to the end of every text, also of a truncated one.
            normalize: Let vectors have length 1 and be compared by the cosine, whatever the model's files say.
            dimension: Leading components of a vector that are kept, for models trained so (Matryoshka).
            batch_tokens: See the class; None = by device.
            stock_architecture: Of a model with code of its own, which is never run, take transformers' stock model and
                tokenizer, whose vectors may be others, instead of raising ValueError.

        Raises:
            ValueError: The folder is not a model this project can run, or an option does not fit it.
            OSError: A file cannot be read.
        """
        check_stock_encoder(path, stock_architecture=stock_architecture)  # before gigabytes are fetched
        folder = resolve_model(path)
        files = read_sentence_files(folder)
        torch_device = chosen_device(device)
        head = load_head(files.head).to(torch_device) if files.head else None
        stock = {"stock_architecture": stock_architecture}
        numbers = _dtype(dtype, torch_device)
        model = load_transformer(files.transformer_folder, dtype=numbers, device=torch_device, **stock)
        tokenizer = load_tokenizer(files.transformer_folder, model, **stock)
        if files.lower_case:
            _lower_case(tokenizer)
        if files.pooling is None and tokenizer.chat_template:
            logger.warning("%s has a chat template, which is not used: texts are read as they are", path)
        config = encoder_config(
            files, model, tokenizer,
            pooling=pooling, query_prompt=query_prompt, document_prompt=document_prompt, max_length=max_length,
            append_eos=append_eos, normalize=normalize, dimension=dimension,
        )  # fmt: skip
        parts = {"files": files, "head": head, "batch_tokens": batch_tokens}
        encoder = cls(model, tokenizer, config, name=str(path), **parts, **stock)
        if dimension is not None and encoder.dimension < dimension:
            raise UserError(f"--dimension {dimension}: the vectors of {path} have {encoder.dimension} components")
        return encoder

    @cached_property
    def weights_sha256(self) -> str:
        """SHA-256 of the weights; see ``model.checkpoint.weights_sha256``."""
        return weights_sha256(self.files.folder, self.files.weight_folders)

    def pack(self) -> "Encoder":
        """Lay the weights out for inference, see ``model.packed``; the model can then be neither trained nor saved."""
        pack(self.model)
        return self

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
        settings = {name: value for name, value in asdict(self.config).items() if name != "append_eos"}
        files = self.files._replace(**settings)
        save_model(self.model, self.tokenizer, files, output, training=training, beside=beside, measured=measured)

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
        for rows, batch in self.batches(tokens):
            try:
                vectors = embed(self.model, batch, self.config, head=self.head, prompt_length=tokens.prompt_length)
            except torch.OutOfMemoryError as error:
                shape = tuple(batch["input_ids"].shape)
                raise UserError(f"out of GPU memory at a batch of {shape} tokens; lower --batch-tokens") from error
            embeddings[rows] = vectors.cpu().numpy()
            done(len(rows))
        finite = np.isfinite(embeddings).all(axis=1)
        if not finite.all():
            row = int(finite.argmin())
            text = f"text {row + 1} of {len(finite)} ({tokens.texts[row][:40]!r})"
            advice = "; --dtype fp32 or bf16 has the range that fp16 lacks" if self.dtype == torch.float16 else ""
            raise NotFiniteError(f"{text}: its vector is not finite in {self.dtype}{advice}")
        return Encoded(embeddings, tokens.num_truncated)

    def batches(self, tokens: "Tokens") -> Iterator[tuple[np.ndarray, dict[str, Tensor]]]:
        """Yield the rows of each forward pass, and what the model takes for them; texts without a token are in none."""
        for rows in batches_by_length([len(ids) for ids in tokens.input_ids], self.batch_tokens):
            batch = tokens.batch(rows, self.tokenizer.pad_token_id or 0)
            yield rows, {name: tensor.to(self.device) for name, tensor in batch.items()}

    def _prompt_length(self, prompt: str) -> int:
        """Tokens of the prompt alone, a special token at its end left out, as sentence-transformers counts them."""
        ids = self.tokenizer(prompt, truncation=True, max_length=self.config.max_length)["input_ids"] if prompt else []
        return len(ids) - bool(ids and ids[-1] in self.tokenizer.all_special_ids)


class Tokens(NamedTuple):
    """Tokenized texts, not yet padded; ``token_type_ids`` is None where the tokenizer or the model has none."""

    texts: Sequence[str]
    input_ids: list[list[int]]
    token_type_ids: list[list[int]] | None
    prompt_length: int
    num_truncated: int

    def of(self, rows: np.ndarray) -> "Tokens":
        """Return those of some texts."""
        return self._replace(
            texts=[self.texts[row] for row in rows],
            input_ids=[self.input_ids[row] for row in rows],
            token_type_ids=None if self.token_type_ids is None else [self.token_type_ids[row] for row in rows],
        )

    def batch(self, rows: np.ndarray, pad_token_id: int) -> dict[str, Tensor]:
        """Return these rows padded on the right, where no position shifts: each tensor is ``(rows, longest)``."""
        longest = max(len(self.input_ids[row]) for row in rows)
        arrays = {
            "input_ids": np.full((len(rows), longest), pad_token_id),
            "attention_mask": np.zeros((len(rows), longest), dtype=np.int64),
        }
        if self.token_type_ids is not None:
            arrays["token_type_ids"] = np.zeros((len(rows), longest), dtype=np.int64)
        for place, row in enumerate(rows):
            length = len(self.input_ids[row])
            arrays["input_ids"][place, :length] = self.input_ids[row]
            arrays["attention_mask"][place, :length] = 1
            if self.token_type_ids is not None:
                arrays["token_type_ids"][place, :length] = self.token_type_ids[row]
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


def batches_by_length(lengths: Sequence[int], batch_tokens: int) -> Iterator[np.ndarray]:
    """Yield row numbers, longest texts first, so that rows times longest row stays within ``batch_tokens``.

    Rows of length 0 are in no batch. A row longer than the budget is a batch of its own.
    """
    order = np.argsort(-np.asarray(lengths), kind="stable")
    order = order[: np.count_nonzero(lengths)]
    start = 0
    while start < len(order):
        size = max(1, batch_tokens // lengths[order[start]])
        yield order[start : start + size]
        start += size


def default_batch_tokens(model: PreTrainedModel) -> int:
    """Return the budget of a forward pass: what keeps the processor busy and, on a CPU, stays in its caches.

    The smaller it is, the less padding short texts need. A large model fills a GPU with few tokens.
    """
    if model.device.type != "cuda":
        return 2048
    return 8192 if model.num_parameters() >= LARGE else 32768


def append_eos_token(tokenizer: PreTrainedTokenizerBase) -> None:
    """Let the tokenizer end every text with its EOS token, truncated ones too, besides what it adds already.

    The token goes into the post-processor, which ``save_pretrained`` keeps; transformers 5 drops the
    ``add_eos_token`` flag of a ``tokenizer_config.json`` on loading.

    Raises:
        ValueError: The tokenizer has no EOS token, or a post-processor of a kind that cannot be extended.
    """
    if tokenizer.eos_token_id is None:
        raise UserError("--append-eos: the tokenizer has no EOS token")
    if tokenizer("")["input_ids"][-1:] == [tokenizer.eos_token_id]:
        return
    # Two templates in a row lose the second one's token (tokenizers 0.23), so an existing template is extended.
    backend = tokenizer.backend_tokenizer
    state = json.loads(backend.to_str())
    present = state["post_processor"]
    steps = present["processors"] if present and present["type"] == "Sequence" else [present] if present else []
    template = next((step for step in reversed(steps) if step["type"] == "TemplateProcessing"), None)
    if template is None:
        template = {"type": "TemplateProcessing", "special_tokens": {}}
        template |= {"single": [_piece("A")], "pair": [_piece("A"), _piece("B")]}
        steps.append(template)
    eos = str(tokenizer.eos_token)
    for kind in ("single", "pair"):
        template[kind].append({"SpecialToken": {"id": eos, "type_id": 0}})
    template["special_tokens"][eos] = {"id": eos, "ids": [tokenizer.eos_token_id], "tokens": [eos]}
    state["post_processor"] = {"type": "Sequence", "processors": steps}
    backend.post_processor = Tokenizer.from_str(json.dumps(state)).post_processor
    if tokenizer("")["input_ids"][-1:] != [tokenizer.eos_token_id]:
        raise UserError(
            f"--append-eos: the tokenizer's post-processor ({present['type']}) cannot be given an EOS token"
        )


def _piece(name: str) -> dict:
    return {"Sequence": {"id": name, "type_id": 0}}


def _warn_of_lost_eos(tokenizer: PreTrainedTokenizerBase) -> None:
    path = Path(tokenizer.name_or_path) / "tokenizer_config.json"
    wanted = path.is_file() and read_json(path).get("add_eos_token")
    if wanted and tokenizer("")["input_ids"][-1:] != [tokenizer.eos_token_id]:
        logger.warning(
            "%s asks for add_eos_token, which transformers 5 ignores, and tokenizer.json adds no EOS: "
            "if the model was trained with one, give --append-eos",
            path,
        )


def _lower_case(tokenizer: PreTrainedTokenizerBase) -> None:
    backend = tokenizer.backend_tokenizer
    present = [backend.normalizer] if backend.normalizer is not None else []
    backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), *present])


def own_config(files: SentenceFiles, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> EncoderConfig:
    """Return what a model's own files say; where they are silent, what sentence-transformers does.

    That is last-token pooling for causal language models and mean pooling for others, no prompts, no normalisation.
    ``model`` may be on the meta device.
    """
    return EncoderConfig(
        pooling=files.pooling or ("last" if _is_causal(model) else "mean"),
        normalize=files.normalize,
        similarity=files.similarity or ("cosine" if files.normalize else "dot"),
        query_prompt=files.query_prompt,
        document_prompt=files.document_prompt,
        include_prompt=files.include_prompt,
        max_length=_own_length(files, model, tokenizer) or NO_LENGTH,
        dimension=files.dimension,
    )


def encoder_config(
    files: SentenceFiles,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    pooling: str | None,
    query_prompt: str | None,
    document_prompt: str | None,
    max_length: int | None,
    append_eos: bool,
    normalize: bool = False,
    dimension: int | None = None,
) -> EncoderConfig:
    """Return the settings that are given, and for those that are None the model's own; see ``Encoder.from_pretrained``.

    With ``append_eos`` the tokenizer is changed.
    """
    if append_eos:
        append_eos_token(tokenizer)
    else:
        _warn_of_lost_eos(tokenizer)
    given = {"pooling": pooling, "query_prompt": query_prompt, "document_prompt": document_prompt}
    config = replace(
        own_config(files, model, tokenizer),
        append_eos=append_eos,
        **{name: value for name, value in given.items() if value is not None},
    )
    if max_length is None and _own_length(files, model, tokenizer) is None:
        logger.warning("the model sets no length of a text: %d tokens are read; --max-length sets another", NO_LENGTH)
    if max_length is not None:
        config = replace(config, max_length=checked_max_length(max_length, model, tokenizer))
    if normalize:
        config = replace(config, normalize=True, similarity="cosine")
    if dimension is not None:
        config = replace(config, dimension=dimension)
    return config


def _is_causal(model: PreTrainedModel) -> bool:
    """Whether sentence-transformers takes the model for a causal language model: by the class it was saved as."""
    architectures = model.config.architectures or [""]
    return architectures[0].endswith("ForCausalLM") and getattr(model.config, "is_causal", True)


def _longest_input(model: PreTrainedModel) -> int | None:
    """Tokens the model has positions for; None where its config sets no bound."""
    positions = getattr(model.config, "max_position_embeddings", None) or -1
    return positions - _position_offset(model) if positions > 0 else None


def _own_length(files: SentenceFiles, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Tokens of a text that are read by what the model's files say; None where they set no bound, as of T5 and BLOOM.

    A tokenizer without a length says 10^30.
    """
    lengths = [files.max_length or tokenizer.model_max_length, _longest_input(model)]
    return min((int(length) for length in lengths if length is not None and length < UNBOUNDED), default=None)


def checked_max_length(asked: int, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return a number of tokens of a text that a model can read; ValueError if it cannot."""
    longest = _longest_input(model)
    if longest is not None and asked > longest:
        raise UserError(f"--max-length {asked}: the model takes at most {longest} tokens")
    if asked >= UNBOUNDED:
        raise UserError(f"--max-length {asked}: must be below {UNBOUNDED:,} tokens")
    if asked <= (special := tokenizer.num_special_tokens_to_add()):
        raise UserError(f"--max-length {asked}: {special} special tokens leave no room for text")
    return asked


def _position_offset(model: nn.Module) -> int:
    """Positions that RoBERTa and its kin leave unused: they count from the padding index on."""
    for module in model.modules():
        table = getattr(module, "position_embeddings", None)
        if isinstance(table, nn.Embedding) and table.padding_idx is not None:
            return table.padding_idx + 1
    return 0


def chosen_device(name: str) -> torch.device:
    """Return the device of a name: "auto" is a GPU if there is one, under a launcher each process its own.

    Raises:
        ValueError: No such device.
    """
    if name == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu")
        local_rank = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0"))  # torchrun's and SLURM's
        return torch.device("cuda", int(local_rank) % torch.cuda.device_count())
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device {name!r}: known are auto, cpu, cuda, cuda:1, ...") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name!r}: known are auto, cpu, cuda, cuda:1, ...")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"--device {name}: this torch ({torch.__version__}) sees {torch.cuda.device_count()} CUDA devices"
        )
    return device


def _dtype(name: str | torch.dtype, device: torch.device) -> torch.dtype | None:
    if isinstance(name, torch.dtype) and name in DTYPES.values():
        return name
    if name == "saved":
        return None
    if name == "auto":
        return torch.bfloat16 if computes_in_bf16(device) else torch.float32
    if name not in DTYPES:
        raise UserError(f"--dtype {name!r}: known are auto, saved, {', '.join(DTYPES)}")
    return DTYPES[name]


def computes_in_bf16(device: torch.device) -> bool:
    """Whether the processor multiplies in bfloat16 by itself, instead of converting to float32 and back."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    able = torch.cpu.get_capabilities()
    return able.get("avx512_bf16", False) or able.get("amx_bf16", False)
