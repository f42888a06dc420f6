"""How fast a model of a shape is beside the full one: documents a second depend on the shape, not on the weights."""

import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch

from effir_search.encoding.encoder import Encoder
from effir_search.evaluation.turns import encode_in_turns
from effir_search.files.reading import read_json
from effir_search.files.whole import whole_file
from effir_search.model.layers import mlp_widths, parts_of
from effir_search.model.surgery import prune
from effir_search.pruning.prune import load_prunable
from effir_search.settings import EncoderOptions

T = TypeVar("T")


class Shape(NamedTuple):
    """What a model's speed depends on: by layer the units of its MLP, 0 = none, and whether it has an attention."""

    widths: tuple[int, ...]
    attentions: tuple[bool, ...]

    @property
    def canonical(self) -> "Shape":
        """The same for all models whose layers differ in their order alone, which are as fast."""
        layers = sorted(zip(self.widths, self.attentions, strict=True), reverse=True)
        return Shape(tuple(width for width, _ in layers), tuple(attention for _, attention in layers))

    @property
    def name(self) -> str:
        """The name of its record: runs of equal layers, as in ``3x1536a-3x0a``."""
        layers = [f"{width}{'a' * attention}" for width, attention in zip(*self.canonical, strict=True)]
        return "-".join(f"{layers.count(layer)}x{layer}" for layer in dict.fromkeys(layers))


class Speed(NamedTuple):
    """What was measured of a shape; medians of the rounds.

    Attributes:
        full: Documents a second of the full model.
        shape: Of the shape.
        speedup: The ratio.
    """

    full: float
    shape: float
    speedup: float


class SpeedRecords:
    """Measures shapes in turns with the full model, each once; what was measured is a file in a folder.

    Args:
        folder: Of the records; it is made if it is missing.
        encoder: The full model.
        options: How it is loaded.
        texts: That are encoded.
    """

    def __init__(self, folder: Path, encoder: str, options: EncoderOptions, texts: Sequence[str]) -> None:
        self.folder, self.encoder, self.options, self.texts = folder, encoder, options, texts
        folder.mkdir(parents=True, exist_ok=True)

    def of(self, shape: Shape, dtype: str) -> Speed:
        """Return the speed of a shape, measured now or before."""
        file = self.file(shape, dtype)
        if not file.is_file():
            measured = self._measure(shape, dtype)
            with whole_file(file) as out:
                out.write(json.dumps(measured._asdict(), indent=1) + "\n")
        return Speed(**read_json(file))

    def file(self, shape: Shape, dtype: str) -> Path:
        """Return where the record of a shape is."""
        return self.folder / f"{shape.name}.{dtype}.json"

    def _measure(self, shape: Shape, dtype: str) -> Speed:
        options = replace(self.options, dtype=dtype)
        full = Encoder.from_pretrained(self.encoder, options)
        turns = encode_in_turns([full, of_shape(self.encoder, shape, options)], self.texts)
        speeds = len(self.texts) / turns.seconds
        ratios = speeds[:, 1] / speeds[:, 0]
        return Speed(*(statistics.median(column) for column in (speeds[:, 0], speeds[:, 1], ratios)))


def shape_of(encoder: Encoder) -> Shape:
    """Return the shape of a model."""
    attentions = parts_of(encoder.model, "attention")
    widths = mlp_widths(encoder.model)
    return Shape(tuple(widths), tuple(layer_idx in attentions for layer_idx in range(len(widths))))


def of_shape(encoder_name: str, shape: Shape, options: EncoderOptions) -> Encoder:
    """Return the encoder cut to a shape: the first units of each MLP, which are as fast as any."""
    encoder = load_prunable(encoder_name, options)
    before = shape_of(encoder)
    units = {
        layer_idx: torch.arange(width) < shape.widths[layer_idx]
        for layer_idx, width in enumerate(before.widths)
        if 0 < shape.widths[layer_idx] < width
    }
    prune(
        encoder.model,
        mlp=[i for i, width in enumerate(shape.widths) if not width and before.widths[i]],
        attention=[i for i, has_one in enumerate(shape.attentions) if not has_one and before.attentions[i]],
        units=units,
    )
    return encoder


def nearest_in_speed(target: float, candidates: Sequence[T], speedup: Callable[[T], float]) -> T:
    """Return the candidate whose speedup is nearest to a target's, by ratio, found by halving.

    Args:
        target: A speedup.
        candidates: At least one, the slowest first.
        speedup: Measures one; it is asked for few of them.
    """
    low, high = 0, len(candidates) - 1
    while low < high:  # the first that is at least as fast
        middle = (low + high) // 2
        if speedup(candidates[middle]) < target:
            low = middle + 1
        else:
            high = middle
    nearby = candidates[max(0, low - 1) : low + 1]
    return min(nearby, key=lambda candidate: abs(math.log(speedup(candidate) / target)))
