"""A compressed model of its family's own class, which every server of that family runs: ``effir compress --native``.

Such a model has whole blocks and MLPs of one width; see ``model.stock``.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from transformers import PretrainedConfig

from effir_search.encoding.encoder import Encoder
from effir_search.errors import UserError
from effir_search.model.arithmetic import empty_model
from effir_search.model.checkpoint import read_config_file
from effir_search.model.layers import mlp_widths, parts_of
from effir_search.model.modeling_effir import EffirConfig, EffirModel
from effir_search.model.packed import ALIGNED
from effir_search.model.stock import as_stock, stock_config
from effir_search.settings import CompressionSettings, EncoderOptions, WidthSettings

# What an EffirConfig has as ``plan``, for a config that has no place for it.
PLAN_FILE = "plan.json"
# Where a recipe says nothing of depth, one of so many blocks goes.
BLOCKS = 3


def with_native_numbers(compression: CompressionSettings, config: PretrainedConfig) -> CompressionSettings:
    """Return a recipe that drops blocks alone and cuts all MLPs to one width, a multiple of ``packed.ALIGNED``.

    Args:
        compression: A recipe with ``native``. Where ``drop_mlp`` is None and ``drop_block`` is 0, which is what a
            recipe has that says neither, a third of the blocks goes.
        config: The encoder's.

    Raises:
        ValueError: Single MLPs or attentions are to go, layers may keep different widths, or the encoder's differ.
    """
    prune, slim = compression.prune, compression.slim
    if prune.drop_mlp or prune.drop_attention:
        raise UserError("--native drops whole blocks: leave out --drop-mlp and --drop-attention, give --drop-block")
    model = empty_model(config)
    blocks = prune.drop_block
    if prune.drop_mlp is None and not blocks:
        blocks = len(parts_of(model, "block")) // BLOCKS
    prune = replace(prune, drop_mlp=0, drop_block=blocks)
    if slim.narrow:
        widths = {width for width in mlp_widths(model) if width}
        if len(widths) > 1:
            raise UserError("--native: the encoder's MLPs differ in width already, so one width for all cannot be cut")
        (full,) = widths
        # Shares as they are: rounded, they would ask for a unit more.
        floor = min(ALIGNED * max(1, round((1 - slim.narrow) * full / ALIGNED)), full) / full
        narrow, default = 1 - floor, WidthSettings.floor
        if slim.floor not in (default, floor) or slim.multiple != WidthSettings.multiple:
            raise UserError("--native cuts all MLPs to one width: leave out floor and multiple")
        slim = replace(slim, narrow=narrow, floor=floor)
    return replace(compression, prune=prune, slim=slim)


def check_native(model: str) -> None:
    """Raise ValueError if the model in a folder is of another shape than its family's own class has."""
    config = read_config_file(Path(model) / "config.json") if Path(model).is_dir() else None
    if isinstance(config, EffirConfig):
        stock_config(config)


def save_native(model: Path, output: Path, *, training: dict, beside: Mapping[str, str], measured: str) -> None:
    """Save the model in a folder as one of its family's own class.

    Args:
        model: Of the shape that class has.
        output: The new folder.
        training: See ``model.save.save_model``.
        beside: Likewise.
        measured: Likewise.
    """
    encoder = Encoder.from_pretrained(model, EncoderOptions(device="cpu", dtype="saved"))
    if isinstance(encoder.model, EffirModel):
        beside = {**beside, PLAN_FILE: json.dumps(encoder.model.config.plan, indent=1) + "\n"}
        measured = f"{_shape(encoder.model.config)}\n{measured}"
        encoder = encoder.with_model(as_stock(encoder.model))
    encoder.save(output, training=training, beside=beside, measured=measured)


def shape_in_words(config: PretrainedConfig) -> str:
    """Return what a stock model is."""
    width = config.intermediate_size
    return f"a plain {config.model_type} of {config.num_hidden_layers} layers whose MLPs have {width:,} units"


def _shape(config: EffirConfig) -> str:
    """Return a section of the model card: what was cut, and what the model is now."""
    base, stock = config.base_config, stock_config(config)
    gone = ", ".join(str(layer_idx) for layer_idx, width in enumerate(config.mlp_widths) if not width)
    return f"""## Shape

This is {shape_in_words(stock)}, cut from
{base.num_hidden_layers} layers with {base.intermediate_size:,} units; layers that are gone, 0-based: {gone or "none"}.
It runs wherever a {stock.model_type} does, without code of its own. Which units are left is in `{PLAN_FILE}`.
"""
