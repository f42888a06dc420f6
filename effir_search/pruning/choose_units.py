"""Which units of MLPs go, once each has a score.

Source: EffiR (Lei, He, Li, Yates), arXiv 2512.20612, section on width: one ranking over all units of all MLPs left.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from effir_search.errors import UserError


def choose_units(
    scores: Mapping[int, Tensor], share: float, *, floor: float = 0.05, multiple: int = 1
) -> dict[int, Tensor]:
    """Return which units stay when a share of all is cut, those of the lowest scores over all layers.

    Exactly ``round(share * total)`` units go. Of equal scores the unit of the earlier layer goes first, then the one of
    the smaller number. A layer never gets narrower than its floor; others lose the next units in its stead.

    With ``multiple`` units stay or go in groups: of a layer's units in the order of their scores the best ``multiple``,
    the next, and so on. A group's place in the ranking is that of its middle unit, so each width becomes about the
    multiple that is nearest to what it would be otherwise. The total is met exactly: the rest of it that is no multiple
    goes to one layer. Besides that one only a layer that loses nothing can have a width that is no multiple.

    Args:
        scores: By layer, ``(width,)``, from a criterion.
        share: Of all units, 0 <= share < 1.
        floor: The share of each layer's own units that stays in any case, 0 to 1; at least 1 unit, rounded up to
            ``multiple``.
        multiple: Of which widths are to be multiples.

    Returns:
        By layer ``(width,)`` bool on the CPU, True = stays: what ``surgery.prune`` takes.

    Raises:
        ValueError: No scores, a NaN among them, a share, floor or multiple out of range, or floors that leave less to
            cut than the share.
    """
    if not 0 <= share < 1:
        raise UserError(f"share {share} must be at least 0 and below 1")
    if not 0 <= floor <= 1:
        raise UserError(f"floor {floor} must be a share of a layer's units, 0 to 1")
    if multiple < 1:
        raise UserError(f"multiple {multiple} must be at least 1")
    if not scores:
        raise UserError("no scores: the model has no MLP left to narrow")
    layers = sorted(scores)
    # (width,) by layer, the best unit first, of equal ones that of the larger number.
    best = {layer_idx: _descending(scores[layer_idx], layer_idx) for layer_idx in layers}
    widths = {layer_idx: len(order) for layer_idx, order in best.items()}
    total = sum(widths.values())
    num_kept = total - round(share * total)
    floors = {layer_idx: _floor(width, floor, multiple) for layer_idx, width in widths.items()}
    above_floors = num_kept - sum(floors.values())
    if above_floors < 0:
        raise UserError(
            f"--narrow {share:g} leaves {num_kept} of {total} units, but the floors ({floor:g} of a layer, at least "
            f"{multiple}) keep {sum(floors.values())}; lower --narrow{', --multiple' * (multiple > 1)} or --floor"
        )

    kept = _kept_above_floors(scores, best, floors, above_floors, multiple)
    masks = {}
    for layer_idx in layers:
        masks[layer_idx] = torch.zeros(widths[layer_idx], dtype=torch.bool)
        masks[layer_idx][best[layer_idx][: floors[layer_idx] + kept[layer_idx]]] = True
    return masks


def _kept_above_floors(
    scores: Mapping[int, Tensor],
    best: Mapping[int, Tensor],
    floors: Mapping[int, int],
    number: int,
    multiple: int,
) -> dict[int, int]:
    """Return how many units of each layer stay besides those of its floor, ``number`` in all."""
    # All groups that may go, in the order of layers, of a layer the worst one first: sorted by the scores of their
    # middle units and read from the end, the best comes first and equal ones are in the order of ``choose_units``.
    owners, sizes, middles = [], [], []
    for layer_idx, order in best.items():
        starts = torch.arange(floors[layer_idx], len(order), multiple).flip(0)
        size = (len(order) - starts).clamp(max=multiple)
        middle = order[starts + (size - 1) // 2]
        owners.append(torch.full_like(starts, layer_idx))
        sizes.append(size)
        middles.append(scores[layer_idx].double().cpu()[middle])
    ranking = torch.cat(middles).argsort(stable=True).flip(0)
    owner, size = torch.cat(owners)[ranking], torch.cat(sizes)[ranking]
    before = size.cumsum(0) - size
    kept = torch.minimum(size, (number - before).clamp(min=0))
    return {layer_idx: int(kept[owner == layer_idx].sum()) for layer_idx in best}


def _descending(scores: Tensor, layer_idx: int) -> Tensor:
    if scores.isnan().any():
        raise UserError(f"layer {layer_idx}: the score of unit {int(scores.isnan().int().argmax())} is NaN")
    return scores.double().cpu().argsort(stable=True).flip(0)


def _floor(width: int, floor: float, multiple: int) -> int:
    units = max(1, math.ceil(round(floor * width, 6)))  # 0.07 * 100 is above 7
    return min(width, math.ceil(units / multiple) * multiple)
