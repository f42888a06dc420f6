"""Parameters, bytes and FLOPs of a model or of a plan, from its config alone: no weights, no memory."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from effir_search.errors import UserError
from effir_search.model.families import family_of
from effir_search.model.layers import NOTHING_LEFT, PartKind, layers_of, parts_of
from effir_search.model.modeling_effir import EffirConfig, EffirModel, has_part

# Tokens of the text whose FLOPs are told where nobody says how long it is.
LENGTH = 256


@dataclass(frozen=True)
class Sizes:
    """Parameters of a model without pooler.

    Attributes:
        parameters: All but the LM head.
        embeddings: Those of them in tables of tokens, positions and types.
        attention: Those of them in the linear layers of attentions.
        mlp: Those of them in the linear layers of MLPs.
        lm_head: What a language model of this config has besides; 0 where it shares the embeddings or has none.
    """

    parameters: int
    embeddings: int
    attention: int
    mlp: int
    lm_head: int

    @property
    def without_embeddings(self) -> int:
        """Parameters without embeddings and LM head."""
        return self.parameters - self.embeddings

    @property
    def with_lm_head(self) -> int:
        """Parameters with embeddings and LM head."""
        return self.parameters + self.lm_head

    def bytes(self, dtype: torch.dtype) -> int:
        """Return the bytes of the weights, without LM head, in a floating-point type."""
        return self.parameters * dtype.itemsize


def empty_model(config: PretrainedConfig) -> EffirModel:
    """Return the model of a config, that of a base model or of a pruned one, on the meta device.

    Raises:
        ValueError: A family that cannot be pruned.
    """
    family_of(config)
    config = type(config).from_dict(config.to_dict())  # building a model writes into its config
    with torch.device("meta"):
        return EffirModel(config if isinstance(config, EffirConfig) else EffirConfig(config))


def count(model: EffirModel) -> Sizes:
    """Return the sizes of a model, which may be on the meta device."""
    family, base = family_of(model.config), model.config.base_config
    layers = layers_of(model)
    sizes = {}
    for kind, sub_layer in (("attention", family.attention), ("mlp", family.mlp)):
        paths = (*sub_layer.inputs, sub_layer.output)
        sizes[kind] = sum(_numel(layers[i].get_submodule(path)) for i in parts_of(model, kind) for path in paths)
    has_head = family.causal and not base.tie_word_embeddings
    return Sizes(
        parameters=_numel(model),
        embeddings=sum(_numel(module) for module in model.modules() if isinstance(module, nn.Embedding)),
        lm_head=base.vocab_size * base.hidden_size if has_head else 0,
        **sizes,
    )


def flops(model: EffirModel, length: int) -> int:
    """Return the floating-point operations of one forward pass of one text, a multiply-add counted as two.

    Over the layers that is the sum of ``2 * length * in * out`` for each linear layer and, for each attention,
    ``4 * length**2 * heads * head_dim``: the scores and the weighted sum of the values, each of them
    ``2 * length**2 * heads * head_dim``. All pairs of tokens count, as common kernels compute them, also those that a
    causal mask or a sliding window hides. Norms, activations, biases, softmax and rotary positions do not count.

    Args:
        model: It may be on the meta device.
        length: Tokens of the text, special ones included.
    """
    family, layers = family_of(model.config), layers_of(model)
    linear = sum(
        module.in_features * module.out_features
        for layer in layers
        for module in layer.modules()
        if isinstance(module, nn.Linear)
    )
    heads = sum(layers[i].get_submodule(family.attention.output).in_features for i in parts_of(model, "attention"))
    return 2 * length * linear + 4 * length**2 * heads


def part_parameters(model: PreTrainedModel, kind: PartKind, layer_idx: int) -> int:
    """Return how many parameters go when one more part of a model is dropped."""
    family, layer = family_of(model.config), layers_of(model)[layer_idx]
    if kind == "block" or not (has_part(layer, "attention") and has_part(layer, "mlp")):
        return _numel(layer)
    removed = (family.attention if kind == "attention" else family.mlp).removed
    return sum(_numel(layer.get_submodule(path)) for path in removed)


def facts(model: EffirModel, *, length: int = LENGTH, dtype: torch.dtype | None = None) -> dict[str, int]:
    """Return the sizes that are told of a model, by name.

    Args:
        model: It may be on the meta device.
        length: Tokens of the text that ``flops_per_text`` is of.
        dtype: Of the weights in ``weights_bytes``; None = the model's.
    """
    sizes = count(model)
    return {
        "parameters": sizes.parameters,
        "parameters_without_embeddings": sizes.without_embeddings,
        "parameters_with_lm_head": sizes.with_lm_head,
        "attention_parameters": sizes.attention,
        "mlp_parameters": sizes.mlp,
        "weights_bytes": sizes.bytes(dtype or model.dtype),
        "flops_per_text": flops(model, length),
    }


def format_facts(
    before: dict[str, int],
    after: dict[str, int],
    *,
    names: tuple[str, str] = ("full", "pruned"),
    length: int = LENGTH,
) -> str:
    """Return the ``facts`` of two models side by side, with the share that the second one has of the first."""
    return aligned([("", *names, ""), *facts_rows(before, after, length)])


def facts_rows(before: dict[str, int], after: dict[str, int], length: int = LENGTH) -> list[tuple[str, ...]]:
    """Return a row for each of the ``facts`` of two models: its name, both numbers, the share."""
    names = {name: name.replace("_", " ") for name in before} | {"flops_per_text": f"flops, text of {length} tokens"}
    return [
        (names[name], f"{number:,}", f"{after[name]:,}", f"{after[name] / number:.1%}" if number else "")
        for name, number in before.items()
    ]


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Return rows as lines, the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [[f"{row[0]:{widths[0]}}", *map(str.rjust, row[1:], widths[1:])] for row in rows]
    return "\n".join("  ".join(line).rstrip() for line in lines)


def planned(
    config: PretrainedConfig,
    *,
    drop_mlp: int = 0,
    drop_attention: int = 0,
    drop_block: int = 0,
    narrow: float = 0.0,
) -> EffirConfig:
    """Return the config of a plan on paper. Which layers it names, the last ones, hardly matters to the sizes.

    Args:
        config: Of a base model, or of a pruned one, of which the plan takes more.
        drop_mlp: How many MLPs to drop.
        drop_attention: How many attentions to drop.
        drop_block: How many blocks to drop, before the other two.
        narrow: The share of the units of every MLP left, 0 <= narrow < 1, to cut.

    Raises:
        ValueError: A family that cannot be pruned, more parts than the model has, a share out of range.
    """
    if not 0 <= narrow < 1:
        raise UserError(f"narrow {narrow} must be a share of the units, at least 0 and below 1")
    family_of(config)
    full = config if isinstance(config, EffirConfig) else EffirConfig(config)
    num_layers = full.num_hidden_layers
    mlps = [i for i in range(num_layers) if full.mlp_widths[i]]
    attentions = [i for i in range(num_layers) if i not in full.dropped_attention]
    blocks = _last([i for i in range(num_layers) if i in mlps or i in attentions], drop_block, "blocks")
    mlps = [i for i in mlps if i not in blocks]
    attentions = [i for i in attentions if i not in blocks]
    no_mlp = {*blocks, *_last(mlps, drop_mlp, "MLPs")}
    no_attention = {*full.dropped_attention, *blocks, *_last(attentions, drop_attention, "attentions")}
    if len(no_mlp | {i for i, width in enumerate(full.mlp_widths) if not width}) == num_layers == len(no_attention):
        raise UserError(NOTHING_LEFT)
    widths = [0 if i in no_mlp else round(width * (1 - narrow)) for i, width in enumerate(full.mlp_widths)]
    return EffirConfig(
        full.base_config,
        mlp_widths=widths,
        dropped_attention=no_attention,
        base_model=full.base_model,
        base_revision=full.base_revision,
        plan=full.plan,
    )


def _last(layers: list[int], number: int, what: str) -> list[int]:
    if not 0 <= number <= len(layers):
        raise UserError(f"{number} {what} cannot be dropped; there are {len(layers)}")
    return layers[len(layers) - number :]


def _numel(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
