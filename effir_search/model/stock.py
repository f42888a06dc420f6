"""A pruned model as one of its family's own class, which every program runs that runs the family.

That class has as many layers as its config says, each with an attention, and MLPs of one width. So blocks may be gone,
and all MLPs may be narrower by the same number of units; anything else is told in a word.
"""

import copy
from collections import Counter

from transformers import AutoModel, PretrainedConfig, PreTrainedModel

from effir_search.errors import UserError
from effir_search.model.families import family_of
from effir_search.model.modeling_effir import EffirConfig, EffirModel


def stock_config(config: EffirConfig) -> PretrainedConfig:
    """Return the config of the family's own class for a pruned model.

    Raises:
        ValueError: A layer without attention or without MLP, MLPs of several widths, no layer, or a first layer that
            is built in another way than the one which would take its place.
    """
    kept = _layers_left(config)
    widths = Counter(config.mlp_widths[layer_idx] for layer_idx in kept)
    if len(widths) > 1:
        shown = ", ".join(map(str, sorted(widths)))
        raise UserError(
            f"MLPs have {len(widths)} widths ({shown[:60]}{'...' if len(shown) > 60 else ''}), and the class of a "
            f"{config.base_config.model_type} has one; effir compress --native makes such models"
        )
    if config.base_config.model_type == "modernbert" and kept[0] != 0:
        raise UserError("the first layer of a modernbert is built like no other, and it is gone")
    stock = copy.deepcopy(config.base_config)
    stock.num_hidden_layers, stock.intermediate_size = len(kept), next(iter(widths))
    if getattr(stock, "layer_types", None):
        stock.layer_types = [stock.layer_types[layer_idx] for layer_idx in kept]
    return stock


def as_stock(model: EffirModel) -> PreTrainedModel:
    """Return a copy of a pruned model as one of its family's own class, in eval mode.

    Raises:
        ValueError: See ``stock_config``.
    """
    config, family = stock_config(model.config), family_of(model.config)
    options = {"add_pooling_layer": False} if family.has_pooler else {}
    stock = AutoModel.from_config(config, dtype=model.dtype, trust_remote_code=False, **options)
    places = {
        f"{family.layers}.{layer_idx}.": f"{family.layers}.{place}."
        for place, layer_idx in enumerate(_layers_left(model.config))
    }
    tensors = {}
    for name, tensor in model.model.state_dict().items():
        if name.startswith(f"{family.layers}."):
            number = name.removeprefix(f"{family.layers}.").partition(".")[0]
            before = f"{family.layers}.{number}."
            name = places[before] + name.removeprefix(before)
        tensors[name] = tensor
    stock.load_state_dict(tensors)
    return stock.to(model.device).eval()


def _layers_left(config: EffirConfig) -> list[int]:
    """Return the layers that are whole; those of which nothing is left do nothing."""
    kept = []
    for layer_idx, width in enumerate(config.mlp_widths):
        has_attention = layer_idx not in config.dropped_attention
        if has_attention != bool(width):
            lacks = "attention" if width else "MLP"
            raise UserError(
                f"layer {layer_idx} has no {lacks}, which the class of a {config.base_config.model_type} always has; "
                "effir compress --native drops whole blocks"
            )
        kept += [layer_idx] if width else []
    return kept
