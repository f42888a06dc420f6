"""Looking into a model by the table of families: its layers, the inputs and outputs of their parts, LoRA's targets.

Everything here takes a base model as AutoModel loads it, or an ``EffirModel``. Layers have the 0-based numbers of the
base model, also after pruning.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from torch import Tensor, nn
from transformers import PreTrainedModel

from effir_search.errors import UserError
from effir_search.model.families import Family, SubLayer, family_of
from effir_search.model.modeling_effir import EffirModel, class_without, has_part
from effir_search.settings import PartKind, choices

PART_KINDS: tuple[PartKind, ...] = choices(PartKind)
# Said of a plan that drops every attention and every MLP.
NOTHING_LEFT = "no attention and no MLP would be left, only embeddings; drop fewer"


class PlacedPart(NamedTuple):
    """An attention, an MLP or a block where it stands: what a hook needs to see its input x and its output.

    Attributes:
        reads: Its first positional argument is x, ``(batch, seq, hidden_size)``.
        writes: Its output, or the first item of that, is ``(batch, seq, hidden_size)``.
        adds: Whether the part's output is x plus what ``writes`` returns, not that itself.
    """

    reads: nn.Module
    writes: nn.Module
    adds: bool


def layers_of(model: PreTrainedModel) -> nn.ModuleList:
    """Return a model's layers.

    Raises:
        ValueError: A family that cannot be pruned.
    """
    return model.get_submodule(_layers_path(model))


def parts_of(model: PreTrainedModel, kind: PartKind) -> dict[int, PlacedPart]:
    """Return the parts of one kind that a model still has, by layer. A block is there while anything of it is.

    Raises:
        ValueError: A family that cannot be pruned.
    """
    family = family_of(model.config)
    parts = {}
    for layer_idx, layer in enumerate(layers_of(model)):
        if kind == "block":
            if has_part(layer, "attention") or has_part(layer, "mlp"):
                parts[layer_idx] = PlacedPart(layer, layer, adds=False)
        elif has_part(layer, kind):
            part = _sub_layer(family, kind)
            modules = layer.get_submodule(part.reads), layer.get_submodule(part.writes)
            parts[layer_idx] = PlacedPart(*modules, adds=not family.post_norm)
    return parts


@contextmanager
def watched(
    parts: Iterable[tuple[PartKind, int, PlacedPart]], report: Callable[[PartKind, int, Tensor, Tensor], None]
) -> Iterator[None]:
    """Inside the block, call ``report(kind, layer_idx, x, y)`` for every one of these parts that runs.

    x is the part's input and y its output with the residual added, both ``(batch, seq, hidden_size)``.
    """
    inputs: dict[tuple[PartKind, int], Tensor] = {}
    handles = []
    try:
        for kind, layer_idx, part in parts:

            def remember(_module: nn.Module, args: tuple, kind: PartKind = kind, layer_idx: int = layer_idx) -> None:
                inputs[kind, layer_idx] = args[0]

            def tell(
                _module: nn.Module,
                _args: tuple,
                output: Tensor | tuple,
                kind: PartKind = kind,
                layer_idx: int = layer_idx,
                adds: bool = part.adds,
            ) -> None:
                x, written = inputs.pop((kind, layer_idx)), output[0] if isinstance(output, tuple) else output
                report(kind, layer_idx, x, x + written if adds else written)

            handles += [part.reads.register_forward_pre_hook(remember), part.writes.register_forward_hook(tell)]
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def left_out(model: PreTrainedModel, kind: PartKind, layer_idx: int) -> Iterator[None]:
    """Inside the block, let a model compute what it would with one more part dropped, in the time that this takes.

    Such blocks may be nested.

    Raises:
        ValueError: The model has no such part, or is of a family that cannot be pruned.
    """
    family, layer = family_of(model.config), layers_of(model)[layer_idx]
    kinds = ("attention", "mlp") if kind == "block" else (kind,)
    if not any(has_part(layer, name) for name in kinds):
        raise UserError(f"layer {layer_idx} has no {kind} any more")
    whole = type(layer)
    layer.__class__ = class_without(layer, family, attention="attention" in kinds, mlp="mlp" in kinds)
    try:
        yield
    finally:
        layer.__class__ = whole


@contextmanager
def recorded(model: PreTrainedModel) -> Iterator[list[Tensor | tuple]]:
    """Inside the block, add to the list that is given what each layer returns, in their order, for ``replayed``."""
    outputs: list[Tensor | tuple] = []
    hooks = [layer.register_forward_hook(lambda *call: outputs.append(call[-1])) for layer in layers_of(model)]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def replayed(model: PreTrainedModel, outputs: Sequence[Tensor | tuple], first: int) -> Iterator[None]:
    """Inside the block, let a model compute nothing in the layers before ``first``: they return what was recorded.

    The model must be given the same tokens as when they were. Its own forward pass makes masks, positions and the final
    norm, so this holds for every family.
    """
    skipped = layers_of(model)[:first]
    try:
        for layer, output in zip(skipped, outputs, strict=False):
            layer.forward = lambda *_args, output=output, **_options: output
        yield
    finally:
        for layer in skipped:
            vars(layer).pop("forward", None)


def mlp_output(model: PreTrainedModel, layer_idx: int) -> nn.Linear:
    """Return the last matrix of a layer's MLP: its input, ``(batch, seq, width)``, is the activations of the units."""
    return layers_of(model)[layer_idx].get_submodule(family_of(model.config).mlp.output)


def mlp_inputs(model: PreTrainedModel, layer_idx: int) -> list[nn.Linear]:
    """Return the matrices that a layer's MLP reads by.

    Unit i is row i of each block of ``width`` rows: one block a matrix, in ModernBERT's only one two.
    """
    layer = layers_of(model)[layer_idx]
    return [layer.get_submodule(path) for path in family_of(model.config).mlp.inputs]


def mlp_widths(model: PreTrainedModel) -> list[int]:
    """Return the number of units of each layer's MLP, 0 where it was dropped."""
    layers = layers_of(model)
    return [mlp_output(model, i).in_features if has_part(layer, "mlp") else 0 for i, layer in enumerate(layers)]


def lora_targets(model: PreTrainedModel) -> list[str]:
    """Return the full paths of all linear layers of the attentions and MLPs a model has, for peft's ``target_modules``.

    Short names would not do: BERT calls by "dense" also what is no part of either.
    """
    family = family_of(model.config)
    targets = []
    for layer_idx, layer in enumerate(layers_of(model)):
        for kind in ("attention", "mlp"):
            if has_part(layer, kind):
                part = _sub_layer(family, kind)
                targets += [f"{_layers_path(model)}.{layer_idx}.{path}" for path in (*part.inputs, part.output)]
    return targets


def _sub_layer(family: Family, kind: str) -> SubLayer:
    return family.attention if kind == "attention" else family.mlp


def _layers_path(model: PreTrainedModel) -> str:
    path = family_of(model.config).layers
    return f"model.{path}" if isinstance(model, EffirModel) else path
