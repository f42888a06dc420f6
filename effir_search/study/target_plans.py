"""Plans of what a model can lose so that it meets a target of size or speed."""

import bisect
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Literal, NamedTuple

from transformers import PretrainedConfig

from effir_search.errors import UserError
from effir_search.model.arithmetic import count, empty_model, planned
from effir_search.model.layers import parts_of
from effir_search.pruning.prune import NAMES, counted
from effir_search.study.plan import Plan
from effir_search.study.speed import Shape

TargetKind = Literal["parameters", "bytes", "speedup", "quality"]

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}

# Shares of the blocks, of the MLPs and of the attentions that a plan drops; narrowing does the rest. The third one is
# EffiR's. None = so many that nothing is left to narrow.
SHARES: tuple[tuple[float | None, float | None, float], ...] = (
    (0, 0, 0),
    (0, 1 / 4, 0),
    (0, 1 / 2, 0),
    (0, None, 0),
    (1 / 6, 0, 0),
    (1 / 3, 0, 0),
    (1 / 2, 0, 0),
    (2 / 3, 0, 0),
    (None, 0, 0),
    (1 / 6, 1 / 4, 0),
    (0, 1 / 2, 1 / 6),
)

# Of the units that are left, at most so many are cut; more would leave layers that are hardly there.
MOST_NARROW = 0.75


class Target(NamedTuple):
    """What a compressed model must be, at most or at least.

    Attributes:
        kind: "parameters", at most this share of those outside the embeddings; "bytes" of all weights, at most;
            "speedup" in documents a second over the full model, at least; "quality", at least this share of the full
            model's nDCG@10 on the dev split.
        value: That number.
    """

    kind: TargetKind
    value: float


def words_of(plan: Plan) -> str:
    """Return what a plan drops and narrows, in words."""
    parts = [counted(kind, number) for kind, number in plan.drops.items()]
    share = f"{plan.narrow:.1%}" if plan.narrow >= 0.0005 else "under 0.1%"
    return ", ".join([*parts, f"{share} of the units"] if plan.narrow else parts)


def parse_target(text: str) -> Target:
    """Return a target as a user writes it, as in ``parameters=0.5``, ``bytes=40MB``, ``speedup=2``, ``quality=0.98``.

    Raises:
        ValueError: Another kind, no number, or one out of range.
    """
    kind, _, value = text.replace(" ", "").partition("=")
    if kind == "bytes":
        match = re.fullmatch(r"([0-9.]+)([A-Za-z]*)", value)
        if not match or match[2].upper() not in UNITS or match[1].count(".") > 1 or not match[1].strip("."):
            raise UserError(
                f"--target {text}: bytes takes a number with B, KB, MB, GB, KiB, MiB or GiB, as in bytes=40MB"
            )
        number = float(match[1]) * UNITS[match[2].upper()]
        if number < 1:
            raise UserError(f"--target {text}: a model has at least one byte")
        return Target("bytes", number)
    ranges = {"parameters": (0, 1), "quality": (0, 1), "speedup": (1, math.inf)}
    if kind not in ranges:
        raise UserError(f"--target {text}: give parameters=0.5, bytes=40MB, speedup=2 or quality=0.98")
    try:
        number = float(value)
    except ValueError:
        raise UserError(f"--target {text}: {value!r} is no number") from None
    low, high = ranges[kind]
    if not low < number < high:
        raise UserError(f"--target {text}: must be above {low}" + (f" and below {high}" if high < math.inf else ""))
    return Target(kind, number)


class Sizes(NamedTuple):
    """Sizes of a model.

    Attributes:
        parameters: All of them.
        without_embeddings: Those outside the embeddings.
        units: Of all MLPs.
        a_unit: Parameters of one of these.
    """

    parameters: int
    without_embeddings: int
    units: int
    a_unit: int


class Planner:
    """Makes the plans that meet a target.

    Args:
        config: The full model's.
        bytes_a_parameter: Of the weights that are saved.
        speedup: Measures that of a shape.
    """

    def __init__(self, config: PretrainedConfig, *, bytes_a_parameter: int, speedup: Callable[[Shape], float]) -> None:
        self.config, self.bytes_a_parameter, self.speedup = config, bytes_a_parameter, speedup
        self._sizes: dict[Plan, Sizes] = {}
        model = empty_model(config)
        self.available = {kind: len(parts_of(model, kind)) for kind in NAMES}
        self.full_size = count(model).without_embeddings

    def share_left(self, plan: Plan) -> float:
        """Return the share of the parameters outside the embeddings that a plan leaves."""
        return self._count(plan).without_embeddings / self.full_size

    def speedup_of(self, plan: Plan) -> float:
        """Return how many times as many documents a second a plan's model encodes, measured."""
        return self.speedup(self._shape(plan))

    def plans(self, target: Target) -> list[Plan]:
        """Return the plans that meet a target, each narrowed no more than it must be.

        Raises:
            ValueError: There is none.
        """
        plans = []
        for shares in SHARES:
            for drops in self._numbers(shares, target):
                plan = self._narrowed(drops, target)
                if plan is not None and plan not in plans:
                    plans.append(plan)
        if not plans:
            raise UserError(
                f"--target {target.kind}={target.value:g}: no plan meets it; the smallest that can be made has "
                f"{self.share_left(self._smallest()):.0%} of the parameters outside the embeddings"
            )
        return plans

    def _numbers(self, shares: tuple[float | None, float | None, float], target: Target) -> Iterator[Plan]:
        """Give the numbers of parts for some shares of them; where None stands, the fewest that meet the target."""
        block, mlp, attention = shares
        if None not in shares:
            yield Plan(*(round(share * self.available[kind]) for share, kind in zip(shares, NAMES, strict=True)))
            return
        kind = "block" if block is None else "mlp"
        plans = [Plan(**{kind: number}) for number in range(1, self.available[kind] + (kind != "block"))]
        first = self._first(plans, target)
        if first is not None:
            yield first

    def _narrowed(self, plan: Plan, target: Target) -> Plan | None:
        """Return a plan narrowed as little as the target asks for; None where no narrowing, or too much, is needed."""
        if self._meets(plan, target):
            before = [
                replace(plan, **{kind: getattr(plan, kind) - 1}) for kind in ("block", "mlp") if getattr(plan, kind)
            ]
            # Parts that need not go are not dropped.
            return None if any(self._meets(one, target) for one in before) or not before else plan
        units = self._dropped(plan).units
        if not units:
            return None
        if target.kind == "speedup":
            steps = [replace(plan, narrow=step / 32) for step in range(1, round(32 * MOST_NARROW) + 1)]
        else:
            steps = [replace(plan, narrow=cut / units) for cut in range(1, round(MOST_NARROW * units) + 1)]
        first = self._first(steps, target)
        return first and replace(first, narrow=math.ceil(first.narrow * 1e6) / 1e6)

    def _first(self, plans: Sequence[Plan], target: Target) -> Plan | None:
        """Return the first plan that meets the target, of plans that lose more and more; None if none does."""
        place = bisect.bisect_left(plans, True, key=lambda plan: self._meets(plan, target))
        return plans[place] if place < len(plans) else None

    def _meets(self, plan: Plan, target: Target) -> bool:
        if target.kind == "speedup":
            return self.speedup_of(plan) >= target.value
        if target.kind == "bytes":
            return self._count(plan).parameters * self.bytes_a_parameter <= target.value
        return self.share_left(plan) <= target.value

    def _count(self, plan: Plan) -> Sizes:
        """Count a plan's parameters exactly: of the units left just the rounded share goes, from whatever layers."""
        dropped = self._dropped(replace(plan, narrow=0.0))
        gone = dropped.a_unit * round(plan.narrow * dropped.units)
        return dropped._replace(
            parameters=dropped.parameters - gone, without_embeddings=dropped.without_embeddings - gone
        )

    def _dropped(self, plan: Plan) -> Sizes:
        """Return the sizes of a model that parts are dropped from and nothing is narrowed of."""
        if plan not in self._sizes:
            self._sizes[plan] = self._counted(plan)
        return self._sizes[plan]

    def _counted(self, plan: Plan) -> Sizes:
        config = planned(self.config, **plan.numbers)
        sizes, units, a_unit = count(empty_model(config)), sum(config.mlp_widths), 0
        if units:
            config.mlp_widths[next(i for i, width in enumerate(config.mlp_widths) if width)] -= 1
            a_unit = sizes.parameters - count(empty_model(config)).parameters
        return Sizes(sizes.parameters, sizes.without_embeddings, units, a_unit)

    def _shape(self, plan: Plan) -> Shape:
        config = planned(self.config, **plan.numbers, narrow=plan.narrow)
        attentions = tuple(i not in config.dropped_attention for i in range(config.num_hidden_layers))
        return Shape(tuple(config.mlp_widths), attentions)

    def _smallest(self) -> Plan:
        return Plan(block=self.available["block"] - 1, narrow=MOST_NARROW)
