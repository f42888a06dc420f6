"""An encoder as a GGUF file, llama.cpp's format, with which its programs make the same embeddings.

Written are models of their family's own class; ``effir convert`` reads the decoders among them back.

Source: github.com/ggml-org/ggml, docs/gguf.md; github.com/ggml-org/llama.cpp, conversion/base.py, llama.py and bert.py.
"""

import logging
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import IO, TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from effir_search.encoding.encoder import Encoder
from effir_search.errors import UserError
from effir_search.export.gguf_tokenizer import Vocabulary, vocabulary
from effir_search.files.whole import write_whole
from effir_search.model.checkpoint import lasting_name
from effir_search.model.modeling_effir import EffirModel
from effir_search.model.stock import as_stock

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter

logger = logging.getLogger(__name__)

# llama.cpp's names of families, by the model_type of a config.
ARCHITECTURES = {"bert": "bert", "llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
# The only activations that llama.cpp has for these families. For BERT that is GELU by tanh, also in place of erf.
ACTIVATIONS = {"bert": ("gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast"), None: ("silu", "swish")}
# GGUF's names for poolings.
POOLINGS = {"mean": "MEAN", "cls": "CLS", "last": "LAST"}
# What matrices can be stored as: the type of a tensor and that of the file.
WEIGHTS = {
    "f32": ("F32", "ALL_F32"),
    "f16": ("F16", "MOSTLY_F16"),
    "bf16": ("BF16", "MOSTLY_BF16"),
    "q8_0": ("Q8_0", "MOSTLY_Q8_0"),
}
# Matrices that llama.cpp wants in float32 whatever the others are.
ALWAYS_F32 = ("position_embd", "token_types")
LARGEST_F16 = 65504
ROPE_FACTORS = "rope_freqs.weight"


class Placed(NamedTuple):
    """A tensor of the file: its name there, what it is made of, and the type it is stored as."""

    name: str
    tensor: Tensor
    kind: "GGMLQuantizationType"


def write_gguf(encoder: Encoder, output: Path, *, weights: str = "f32") -> None:
    """Write an encoder as one GGUF file that llama.cpp makes embeddings with, whole or not at all.

    What GGUF has no place for, such as prompts, is named in a warning: it is left to whoever calls llama.cpp.

    Args:
        encoder: A BERT, Llama, Mistral, Qwen2 or Qwen3, or one pruned to a shape that its family's own class has; not
            packed.
        output: The new file.
        weights: One of ``WEIGHTS``, for matrices; vectors are float32. A matrix whose rows q8_0 cannot cut into blocks
            of 32 numbers is f16, as in llama.cpp.

    Raises:
        ValueError: gguf is not installed; a model of another family or shape; a Dense head, a pooling, an attention or
            a step of the tokenizer that llama.cpp does not have; or weights that do not fit in f16.
        OSError: ``output`` exists or cannot be written.
    """
    if find_spec("gguf") is None:
        raise UserError("writing GGUF needs gguf: pip install 'effir_search[gguf]'")
    if weights not in WEIGHTS:
        raise UserError(f"weights {weights!r} are unknown; known are {', '.join(WEIGHTS)}")
    if output.exists():
        raise FileExistsError(f"{output}: exists already; choose another --output")
    _check_vectors(encoder)
    model = as_stock(encoder.model) if isinstance(encoder.model, EffirModel) else encoder.model
    _check_shape(model.config, encoder)
    words = vocabulary(encoder.tokenizer, len(model.get_input_embeddings().weight))
    placed = _placed(model, weights)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_whole(output, lambda file: _write(file, encoder, model, words, placed, weights))
    if left := _left_to_the_caller(encoder, words):
        logger.warning("%s: GGUF has no place for this: %s", output, "; ".join(left))


def _check_vectors(encoder: Encoder) -> None:
    """Raise ValueError if a vector is made of a model's states in a way that GGUF cannot say."""
    config = encoder.config
    if config.pooling not in POOLINGS:
        raise UserError(f"pooling {config.pooling} is not among those of GGUF: {', '.join(POOLINGS)}")
    if encoder.head is not None and len(encoder.head):
        raise UserError("GGUF has no place for what comes between pooling and the end: Dense modules")
    if not config.include_prompt and (config.query_prompt or config.document_prompt):
        raise UserError("the model's prompts are not pooled (include_prompt is false), which llama.cpp cannot do")


def _check_shape(config: PretrainedConfig, encoder: Encoder) -> None:
    """Raise ValueError if llama.cpp has no such model."""
    family = config.model_type
    if family not in ARCHITECTURES:
        raise UserError(f"a {family} cannot be written as GGUF; those that can: {', '.join(ARCHITECTURES)}")
    known = ACTIVATIONS.get(family, ACTIVATIONS[None])
    if config.hidden_act not in known:
        raise UserError(f"its activation is {config.hidden_act}; llama.cpp's {family} has {known[0]}")
    window = _window(config)
    if window is not None and encoder.config.max_length > window:
        raise UserError(
            f"its attention sees {window:,} tokens, which llama.cpp's does not heed, and texts may have "
            f"{encoder.config.max_length:,}; --max-length {window} makes both the same"
        )
    scaling = _rope(config).get("rope_type", "default")
    if scaling not in ("default", "llama3"):
        raise UserError(f"its RoPE is scaled ({scaling}), which is not written; only that of Llama 3 is")


def _rope(config: PretrainedConfig) -> dict:
    return getattr(config, "rope_parameters", None) or {}


def _window(config: PretrainedConfig) -> int | None:
    """Return how many tokens the layer that sees least sees; None = all."""
    window = getattr(config, "sliding_window", None)
    slides = "sliding_attention" in (getattr(config, "layer_types", None) or ["sliding_attention"])
    return window if slides and getattr(config, "use_sliding_window", True) else None


def _context(config: PretrainedConfig) -> int:
    """Return how many tokens of a text llama.cpp reads as the model does."""
    return min(config.max_position_embeddings, _window(config) or config.max_position_embeddings)


def _left_to_the_caller(encoder: Encoder, words: Vocabulary) -> list[str]:
    """Return what a caller of llama.cpp has to do for the same vectors."""
    config = encoder.config
    prompts = {"query": config.query_prompt, "document": config.document_prompt}
    left = [f"put {prompt!r} before each {kind}" for kind, prompt in prompts.items() if prompt]
    longest = _context(encoder.model.config)
    if config.max_length < longest:
        left.append(f"cut texts to {config.max_length:,} tokens, special ones included (the file says {longest:,})")
    if words.normalises:
        left.append(f"bring texts to Unicode's {words.normalises}")
    if config.dimension is not None:
        left.append(f"keep the first {config.dimension:,} components of a vector")
    if not config.normalize and config.similarity == "dot":
        left.append("keep the length of vectors (--embd-normalize -1)")
    return left


def _placed(model: PreTrainedModel, weights: str) -> list[Placed]:
    """Return the model's tensors in their order, with their names and types in the file."""
    from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, GGMLQuantizationType, get_tensor_name_map

    config = model.config
    arch = {name: arch for arch, name in MODEL_ARCH_NAMES.items()}[ARCHITECTURES[config.model_type]]
    names = get_tensor_name_map(MODEL_ARCH(arch), config.num_hidden_layers)
    prefix = "" if config.model_type == "bert" else "model."  # as in the class with the LM head
    kinds, plain = GGMLQuantizationType, GGMLQuantizationType.F32
    placed = []
    for ours, tensor in model.named_parameters():
        if ours.startswith("pooler."):
            continue  # its output is not what is pooled here
        name = names.get_name(prefix + ours, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise UserError(f"llama.cpp has no place for {ours} in a {config.model_type}")
        kind = kinds[WEIGHTS[weights][0]] if tensor.dim() > 1 and not name.startswith(ALWAYS_F32) else plain
        if kind == kinds.Q8_0 and tensor.shape[-1] % 32:
            kind = kinds.F16
        if kind == kinds.F16 and tensor.abs().max() > LARGEST_F16:
            raise UserError(f"{ours} has numbers that do not fit in f16; write bf16 or f32")
        placed.append(Placed(name, tensor, kind))
    if _rope(config).get("rope_type") == "llama3":
        placed.append(Placed(ROPE_FACTORS, _rope_factors(config), plain))
    return placed


def _rope_factors(config: PretrainedConfig) -> Tensor:
    """Return by how much each wavelength of RoPE is longer than without scaling, ``(head_dim / 2,)``."""
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    count = 2 * len(scaled)
    return 1 / _rope(config)["rope_theta"] ** (torch.arange(0, count, 2) / count) / scaled


def _write(
    file: IO[bytes],
    encoder: Encoder,
    model: PreTrainedModel,
    words: Vocabulary,
    placed: list[Placed],
    weights: str,
) -> None:
    """Write all of a GGUF file; a tensor at a time is converted, so that memory holds the model once."""
    from gguf import GGML_QUANT_SIZES, GGML_QUANT_VERSION, GGUFWriter, LlamaFileType

    # The writer opens a file by its name; what is open here already is flushed to the disk when it is done.
    writer = GGUFWriter(file.name, ARCHITECTURES[model.config.model_type])
    writer.add_type("model")
    writer.add_name(lasting_name(encoder.name))
    writer.add_file_type(LlamaFileType[WEIGHTS[weights][1]])
    if weights == "q8_0":
        writer.add_quantization_version(GGML_QUANT_VERSION)
    _add_shape(writer, model.config, encoder)
    _add_vocabulary(writer, words)
    for name, tensor, kind in placed:
        block, size = GGML_QUANT_SIZES[kind]
        num_bytes = tensor.numel() // block * size
        writer.add_tensor_info(name, tensor.shape, np.dtype(np.float32), num_bytes, raw_dtype=kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for array in _arrays(placed, model.config):
            writer.write_tensor_data(array)
    finally:
        writer.close()


def _add_shape(writer: "GGUFWriter", config: PretrainedConfig, encoder: Encoder) -> None:
    """Add what the model is and how its vectors are made."""
    from gguf import PoolingType

    writer.add_context_length(_context(config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    writer.add_pooling_type(PoolingType[POOLINGS[encoder.config.pooling]])
    if config.model_type == "bert":
        writer.add_layer_norm_eps(config.layer_norm_eps)
        writer.add_causal_attention(False)
        writer.add_token_type_count(config.type_vocab_size)
        return
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(_rope(config)["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_causal_attention(getattr(config, "is_causal", True))


def _add_vocabulary(writer: "GGUFWriter", words: Vocabulary) -> None:
    writer.add_tokenizer_model(words.model)
    writer.add_tokenizer_pre(words.pre)
    writer.add_token_list(words.tokens)
    writer.add_token_types(words.kinds)
    if words.merges is not None:
        writer.add_token_merges(words.merges)
    if words.scores is not None:
        writer.add_token_scores(words.scores)
    for name, index in words.ids.items():
        key = {"unk": "unknown", "sep": "seperator", "pad": "padding"}.get(name, name)  # GGUF spells it so
        writer.add_uint32(f"tokenizer.ggml.{key}_token_id", index)
    for name, flag in words.flags.items():
        writer.add_bool(f"tokenizer.ggml.{name}", flag)


def _arrays(placed: list[Placed], config: PretrainedConfig) -> Iterator[np.ndarray]:
    """Yield each tensor as it is stored."""
    from gguf import quantize

    heads = {"attn_q": config.num_attention_heads, "attn_k": getattr(config, "num_key_value_heads", None)}
    for name, tensor, kind in placed:
        array = tensor.detach().cpu().float().contiguous().numpy()
        turned = heads.get(name.split(".")[-2]) if ARCHITECTURES[config.model_type] == "llama" else None
        if turned:
            # RoPE turns pairs of neighbours in llama.cpp's Llama, and here those half a head apart.
            array = array.reshape(turned, 2, -1, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
        yield quantize(np.ascontiguousarray(array), kind)
