"""Families of models: where their layers keep attentions and MLPs.

To prune models of another family, add a line to ``FAMILIES``. This file needs nothing but the config's type, and is
copied beside the weights of every pruned model, as ``modeling_effir.py`` is.
"""

from typing import NamedTuple

from transformers import PretrainedConfig

try:
    from effir_search.errors import UserError
except ImportError:  # this file lies beside weights, and the package is not installed
    UserError = ValueError


class SubLayer(NamedTuple):
    """Where a layer keeps its attention or its MLP; all names are paths of modules that start at the layer.

    Attributes:
        reads: The module whose first argument is the sub-layer's input x.
        runs: The attention or MLP itself: in pre-norm families what reads the normed x, in post-norm families what
            returns LN(x + F(x)).
        writes: The module that returns what is added to x (pre-norm), or LN(x + F(x)) (post-norm).
        inputs: Linear layers that read the sub-layer's input. The rows of an MLP's are its units; a matrix with several
            rows for each unit holds them as blocks, one after the other.
        output: The linear layer that writes; the columns of an MLP's are its units.
        removed: What goes when the sub-layer is dropped and the other one of the layer stays.
    """

    reads: str
    runs: str
    writes: str
    inputs: tuple[str, ...]
    output: str
    removed: tuple[str, ...]


class Family(NamedTuple):
    """What this project knows about a family of models.

    Attributes:
        layers: Path of the list of layers, from the base model on.
        attention: See ``SubLayer``.
        mlp: See ``SubLayer``.
        post_norm: Whether a sub-layer is LN(x + F(x)), not x + F(norm(x)).
        causal: Whether a token sees only those before it; such models have a cache and were trained with an LM head.
        has_pooler: Whether the base model takes ``add_pooling_layer``.
        returns_tuple: Whether a layer returns a tuple.
    """

    layers: str
    attention: SubLayer
    mlp: SubLayer
    post_norm: bool = False
    causal: bool = False
    has_pooler: bool = False
    returns_tuple: bool = False


_DECODER_ATTENTION = SubLayer(
    reads="input_layernorm",
    runs="self_attn",
    writes="self_attn",
    inputs=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    output="self_attn.o_proj",
    removed=("input_layernorm", "self_attn"),
)
_DECODER_MLP = SubLayer(
    reads="post_attention_layernorm",
    runs="mlp",
    writes="mlp",
    inputs=("mlp.gate_proj", "mlp.up_proj"),
    output="mlp.down_proj",
    removed=("post_attention_layernorm", "mlp"),
)
_BERT_ATTENTION = SubLayer(
    reads="attention",
    runs="attention",
    writes="attention.output.LayerNorm",
    inputs=("attention.self.query", "attention.self.key", "attention.self.value"),
    output="attention.output.dense",
    removed=("attention.self", "attention.output.dense"),
)
_BERT_MLP = SubLayer(
    reads="intermediate",
    runs="output",
    writes="output.LayerNorm",
    inputs=("intermediate.dense",),
    output="output.dense",
    removed=("intermediate", "output.dense"),
)
_LLAMA = Family("layers", _DECODER_ATTENTION, _DECODER_MLP, causal=True)
# Gemma norms what a sub-layer writes, too.
_GEMMA = Family(
    "layers",
    _DECODER_ATTENTION._replace(
        writes="post_attention_layernorm", removed=("input_layernorm", "self_attn", "post_attention_layernorm")
    ),
    _DECODER_MLP._replace(
        reads="pre_feedforward_layernorm",
        writes="post_feedforward_layernorm",
        removed=("pre_feedforward_layernorm", "mlp", "post_feedforward_layernorm"),
    ),
    causal=True,
)
_BERT = Family("encoder.layer", _BERT_ATTENTION, _BERT_MLP, post_norm=True, has_pooler=True)
_MPNET_ATTENTION = SubLayer(
    reads="attention",
    runs="attention",
    writes="attention.LayerNorm",
    inputs=("attention.attn.q", "attention.attn.k", "attention.attn.v"),
    output="attention.attn.o",
    removed=("attention.attn",),
)
_MODERNBERT = Family(
    "layers",
    SubLayer("attn_norm", "attn", "attn", ("attn.Wqkv",), "attn.Wo", ("attn_norm", "attn")),
    SubLayer("mlp_norm", "mlp", "mlp", ("mlp.Wi",), "mlp.Wo", ("mlp_norm", "mlp")),
)
# By the model_type of a config.
FAMILIES = {
    "bert": _BERT,
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "modernbert": _MODERNBERT,
    "mpnet": _BERT._replace(attention=_MPNET_ATTENTION, returns_tuple=True),
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
}


def is_prunable(config: PretrainedConfig) -> bool:
    """Whether a model, or the one that a pruned model was made from, is of a family in ``FAMILIES``."""
    return getattr(config, "base_config", config).model_type in FAMILIES


def family_of(config: PretrainedConfig) -> Family:
    """Return the family of a model by its config, of a pruned model that of its base.

    Raises:
        ValueError: A family that cannot be pruned; the message names those that can.
    """
    model_type = getattr(config, "base_config", config).model_type
    if model_type not in FAMILIES:
        raise UserError(f"models of type {model_type!r} cannot be pruned; those that can: {', '.join(FAMILIES)}")
    return FAMILIES[model_type]
