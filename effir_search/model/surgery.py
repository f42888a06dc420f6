"""Take parts out of a model that is in memory, for good."""

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from effir_search.errors import UserError
from effir_search.model.families import family_of
from effir_search.model.layers import NOTHING_LEFT, layers_of, mlp_output
from effir_search.model.modeling_effir import EffirConfig, EffirModel, drop_parts, has_part, narrow_mlp


def prune(
    model: PreTrainedModel,
    *,
    mlp: Iterable[int] = (),
    attention: Iterable[int] = (),
    block: Iterable[int] = (),
    units: Mapping[int, Tensor] | None = None,
    record: dict | None = None,
    base_model: str | None = None,
    base_revision: str | None = None,
) -> EffirModel:
    """Return the model without some parts; pruning a pruned model goes on from there.

    The weights are taken over, not copied, so ``model`` is of no use afterwards; an ``EffirModel`` is changed in place
    and returned. A pooler and an LM head are not taken over. Only matrices that get narrower are allocated anew, one
    MLP at a time.

    Args:
        model: A base model as AutoModel loads it, or an ``EffirModel``.
        mlp: Layers that lose their MLP. All layers have the 0-based numbers of the base model.
        attention: Layers that lose their attention.
        block: Layers that lose both.
        units: For each layer whose MLP is to be narrowed ``(width,)`` bool, True = the unit stays.
        record: Kept in ``config.plan`` with the layers and units above: criterion, scores, ...; JSON types only.
        base_model: Name of the base model; kept in the config of one that was not pruned before.
        base_revision: Its revision on the hub.

    Raises:
        ValueError: A family or a class that cannot be pruned, a layer that does not exist or lacks the part already, a
            mask of another length, or one that leaves no unit, or no part would be left. The model is unchanged then.
    """
    family = family_of(model.config)
    if not isinstance(model, EffirModel) and model.base_model is not model:
        raise UserError(f"{type(model).__name__} cannot be pruned; what can is its base model, as AutoModel loads it")
    mlp, attention, block = sorted(set(mlp)), sorted(set(attention)), sorted(set(block))
    units = dict(units or {})
    _check(model, mlp=mlp, attention=attention, block=block, units=units)
    units = {layer_idx: mask.cpu() for layer_idx, mask in sorted(units.items()) if not mask.all()}
    pruned = model if isinstance(model, EffirModel) else _wrap(model, base_model, base_revision)
    config = pruned.config
    step = {"mlp": mlp, "attention": attention, "block": block}
    step["widths"] = {str(layer_idx): int(mask.sum()) for layer_idx, mask in units.items()}
    step["units"] = _units_of_base(config, units)
    step = {name: value for name, value in step.items() if value} | (record or {})

    no_mlp, no_attention = {*mlp, *block}, {*attention, *block}
    for layer_idx, mask in units.items():
        narrow_mlp(pruned.layers[layer_idx], family, mask.nonzero().flatten())
        config.mlp_widths[layer_idx] = int(mask.sum())
    for layer_idx in no_mlp | no_attention:
        layer = pruned.layers[layer_idx]
        drop_parts(layer, family, attention=layer_idx in no_attention, mlp=layer_idx in no_mlp)
    for layer_idx in no_mlp:
        config.mlp_widths[layer_idx] = 0
    config.dropped_attention = sorted({*config.dropped_attention, *no_attention})
    if step:
        config.plan.append(step)
    pruned.adopt(pruned.model)
    return pruned


def kept_units(config: EffirConfig) -> dict[int, list[int]]:
    """Return by layer which units of the base model's MLP are left, 0-based, in the order they have in the matrices.

    Layers without MLP are left out.

    Raises:
        ValueError: A layer was narrowed, and the plan does not say to which units.
    """
    kept = {}
    for layer_idx, mask in _masks_of_base(config).items():
        if mask is None:
            raise UserError(
                f"layer {layer_idx}: the plan does not say which {config.mlp_widths[layer_idx]} units it has"
            )
        kept[layer_idx] = mask.nonzero()[0].tolist()
    return kept


def _masks_of_base(config: EffirConfig) -> dict[int, np.ndarray | None]:
    """Return for each layer that has an MLP ``(base width,)`` bool, True = the unit is left; None = not known."""
    width = config.base_config.intermediate_size
    masks: dict[int, np.ndarray | None] = {i: np.ones(width, dtype=bool) for i, n in enumerate(config.mlp_widths) if n}
    for step in config.plan:
        for layer_idx, digits in step.get("units", {}).items():
            if int(layer_idx) in masks:
                packed = np.frombuffer(bytes.fromhex(digits), dtype=np.uint8)
                masks[int(layer_idx)] = np.unpackbits(packed, count=width).astype(bool)
    return {i: mask if mask.sum() == config.mlp_widths[i] else None for i, mask in masks.items()}


def _units_of_base(config: EffirConfig, units: Mapping[int, Tensor]) -> dict[str, str]:
    """Return what a plan says of the units that stay, see ``EffirConfig``, given the masks over those there are now."""
    kept_units = {}
    for layer_idx, before in _masks_of_base(config).items():
        if layer_idx in units and before is not None:
            after = before.copy()
            after[before] = units[layer_idx].numpy()
            kept_units[str(layer_idx)] = np.packbits(after).tobytes().hex()
    return kept_units


def _check(model: PreTrainedModel, *, mlp: list[int], attention: list[int], block: list[int], units: dict) -> None:
    layers = layers_of(model)
    for layer_idx in (*mlp, *attention, *block, *units):
        if not 0 <= layer_idx < len(layers):
            raise UserError(f"there is no layer {layer_idx}; layers are 0 to {len(layers) - 1}")
    for kind, chosen in (("mlp", [*mlp, *units]), ("attention", attention)):
        if missing := [layer_idx for layer_idx in chosen if not has_part(layers[layer_idx], kind)]:
            raise UserError(f"layer {missing[0]} has no {kind} any more")
    for layer_idx in block:
        if not (has_part(layers[layer_idx], "mlp") or has_part(layers[layer_idx], "attention")):
            raise UserError(f"of layer {layer_idx} nothing is left")
    dropped = {"mlp": {*mlp, *block}, "attention": {*attention, *block}}
    if not any(has_part(layer, kind) and i not in dropped[kind] for kind in dropped for i, layer in enumerate(layers)):
        raise UserError(NOTHING_LEFT)
    for layer_idx, mask in units.items():
        width = mlp_output(model, layer_idx).in_features
        if mask.dtype != torch.bool or mask.shape != (width,):
            raise UserError(f"layer {layer_idx}: the mask must be bool of shape ({width},), one for each unit")
        if not mask.any():
            raise UserError(f"layer {layer_idx}: the mask leaves no unit; drop the MLP instead")


def _wrap(base: PreTrainedModel, base_model: str | None, base_revision: str | None) -> EffirModel:
    """Return an ``EffirModel`` around a base model, nothing of which is dropped yet."""
    base.config.name_or_path = ""  # a path of this machine has no place in a saved config
    config = EffirConfig(base.config, base_model=base_model, base_revision=base_revision)
    # A shell without memory, and no weight is initialised a second time.
    with torch.device("meta"):
        model = EffirModel(config)
    if getattr(base, "pooler", None) is not None:
        base.pooler = None
    model.adopt(base)
    config.dtype = base.config.dtype = base.dtype
    return model.train(base.training)
