"""How a text becomes a vector, beyond the weights: what an index and its searches must agree on."""

import logging
from dataclasses import dataclass, replace

import numpy as np
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from effir_search.encoding.tokenizing import append_eos_token, warn_of_lost_eos
from effir_search.errors import UserError
from effir_search.model.sentence_files import SentenceFiles
from effir_search.settings import EncoderOptions, pooling_modes

logger = logging.getLogger(__name__)

# A length of a text from which on it is no bound, and tokens that are read where there is none.
UNBOUNDED, NO_LENGTH = 10**9, 512


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


def scale(embeddings: np.ndarray, config: EncoderConfig) -> np.ndarray:
    """Return the vectors whose inner product is the model's similarity: of length 1 for cosine, else as they are."""
    if config.similarity == "dot" or (config.normalize and config.dimension is None):
        return embeddings
    lengths = np.linalg.norm(embeddings, axis=1, keepdims=True)
    return embeddings / np.where(lengths == 0, 1, lengths)


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
    files: SentenceFiles, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, options: EncoderOptions
) -> EncoderConfig:
    """Return the settings that the options say, and for those that are None the model's own.

    With ``append_eos`` the tokenizer is changed.
    """
    if options.append_eos:
        append_eos_token(tokenizer)
    else:
        warn_of_lost_eos(tokenizer)
    config = replace(own_config(files, model, tokenizer), append_eos=options.append_eos)
    asked = {name: getattr(options, name) for name in ("pooling", "query_prompt", "document_prompt", "dimension")}
    config = replace(config, **{name: value for name, value in asked.items() if value is not None})
    if options.max_length is not None:
        config = replace(config, max_length=checked_max_length(options.max_length, model, tokenizer))
    elif _own_length(files, model, tokenizer) is None:
        logger.warning("the model sets no length of a text: %d tokens are read; --max-length sets another", NO_LENGTH)
    return replace(config, normalize=True, similarity="cosine") if options.normalize else config


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
