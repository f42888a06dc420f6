"""What came out of a study: the figures of every row, with intervals, from the records of its models."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from effir_search.evaluation.bootstrap import interval, resample
from effir_search.settings import StudyTable
from effir_search.study.cells import Study, read_queries, read_record
from effir_search.study.plan import Cell, Plan, Row, Tables, cells_of
from effir_search.study.run import StudyResult, timed_shapes
from effir_search.study.speed import Speed

# Sizes that differ by no more than this share of the full model's parameters are told as one.
SAME_SIZE = 0.01


class Estimate(NamedTuple):
    """A figure with two 95 % intervals.

    Attributes:
        value: Of the queries as they are.
        low: Lower end where other queries of the same collections are drawn.
        high: Upper end.
        low_over_collections: Lower end where collections are drawn too.
        high_over_collections: Upper end.
    """

    value: float
    low: float
    high: float
    low_over_collections: float
    high_over_collections: float

    @property
    def is_none(self) -> bool:
        """Whether a difference may be none: the interval over queries has 0 in it."""
        return self.low <= 0 <= self.high


@dataclass(frozen=True)
class Outcome:
    """The models of a plan, trained or not: one for each seed, told as one.

    Attributes:
        plan: What they lose.
        trained: Whether they are fine-tuned.
        cells: The models.
        parameters: With embeddings.
        share_left: Of the parameters outside the embeddings.
        ndcg: By collection, the mean over seeds.
        macro: Mean over collections.
        micro: Mean over all queries.
        kept: The share of the full model's macro mean.
        kept_micro: The same of the micro mean.
        seed_range: The lowest and the highest share kept of a seed; None of a single one.
        likeness: What was watched in training, before it and at its best, means over seeds; None without.
        steps: Of training.
    """

    plan: Plan
    trained: bool
    cells: tuple[Cell, ...]
    parameters: int
    share_left: float
    ndcg: dict[str, float]
    macro: float
    micro: float
    kept: Estimate
    kept_micro: Estimate
    seed_range: tuple[float, float] | None
    likeness: tuple[float, float] | None
    steps: int


class Difference(NamedTuple):
    """Two rows compared by their macro means, alike trained: ``first`` less ``second``."""

    first: str
    second: str
    share_left: tuple[float, float]
    trained: bool
    estimate: Estimate


class Results(NamedTuple):
    """All that is told.

    Attributes:
        tables: The rows.
        outcomes: By plan and whether it is trained.
        differences: By table: of every row from the one it is compared with; of kinds those of one size.
        speeds: By plan and dtype.
        queries: By collection the number of judged queries.
    """

    tables: Tables
    outcomes: dict[tuple[Plan, bool], Outcome]
    differences: dict[StudyTable, list[Difference]]
    speeds: dict[tuple[Plan, str], Speed]
    queries: dict[str, int]


def results_of(study: Study, made: StudyResult) -> Results:
    """Return what came out of a study whose models are all done."""
    plans = list(dict.fromkeys([Plan(), *(row.plan for rows in made.tables.values() for row in rows)]))
    groups = {(plan, trained): _cells(plan, study, trained=trained) for plan in plans for trained in (False, True)}
    groups = {key: cells for key, cells in groups.items() if cells}
    cells = [cell for group in groups.values() for cell in group]
    per_cell = {cell: read_queries(study, cell) for cell in cells}
    # (cells + groups, queries): each model, then each group's mean over its seeds.
    figures = {}
    for collection in study.collections:
        models = np.array([list(per_cell[cell][collection.name].values()) for cell in cells])
        places = [[cells.index(cell) for cell in group] for group in groups.values()]
        figures[collection.name] = np.vstack([models, *(models[rows].mean(axis=0, keepdims=True) for rows in places)])
    samples = _Samples(figures, study.first_seed)
    columns = {key: len(cells) + number for number, key in enumerate(groups)}
    outcomes = {}
    full_size = read_record(study, groups[Plan(), False][0])["sizes"]["parameters_without_embeddings"]
    for key, group in groups.items():
        full = columns[Plan(), key[1]] if (Plan(), key[1]) in columns else columns[Plan(), False]
        records = [read_record(study, cell) for cell in group]
        own = [float(samples.macro[0, cells.index(cell)] / samples.macro[0, full]) for cell in group]
        outcomes[key] = Outcome(
            plan=key[0],
            trained=key[1],
            cells=tuple(group),
            parameters=records[0]["sizes"]["parameters"],
            share_left=records[0]["sizes"]["parameters_without_embeddings"] / full_size,
            ndcg={name: float(values[columns[key]].mean()) for name, values in figures.items()},
            macro=float(samples.macro[0, columns[key]]),
            micro=float(samples.micro[0, columns[key]]),
            kept=samples.ratio(columns[key], full),
            kept_micro=samples.ratio(columns[key], full, micro=True),
            seed_range=(min(own), max(own)) if len(own) > 1 else None,
            likeness=_likeness(records),
            steps=records[0]["training"]["steps"] if key[1] else 0,
        )
    differences = {
        name: [
            Difference(
                first.label,
                second.label,
                (outcomes[first.plan, trained].share_left, outcomes[second.plan, trained].share_left),
                trained,
                samples.difference(columns[first.plan, trained], columns[second.plan, trained]),
            )
            for trained in (False, True)
            for first, second in _pairs(name, rows, outcomes, study)
            if (first.plan, trained) in outcomes and (second.plan, trained) in outcomes
        ]
        for name, rows in made.tables.items()
    }
    shapes = timed_shapes(study, made.tables)
    speeds = {
        (plan, dtype): made.speeds.of(shape, dtype)
        for plan, shape in shapes.items()
        for dtype in study.recipe.settings.dtypes
    }
    queries = {name: values.shape[1] for name, values in figures.items()}
    return Results(made.tables, outcomes, differences, speeds, queries)


def _cells(plan: Plan, study: Study, *, trained: bool) -> list[Cell]:
    return [cell for cell in cells_of(plan, study.recipe) if cell.trained == trained]


def _likeness(records: Sequence[dict]) -> tuple[float, float] | None:
    trainings = [record["training"] for record in records if record["training"] and record["training"]["measure"]]
    if not trainings:
        return None
    return tuple(statistics.mean(training[name] for training in trainings) for name in ("before", "best"))


def _pairs(name: StudyTable, rows: Sequence[Row], outcomes: dict, study: Study) -> list[tuple[Row, Row]]:
    """Return which rows of a table are compared with which: kinds of one size, others with the recipe's model."""
    if name == "kinds":
        size = {row: outcomes[row.plan, False].share_left for row in rows}
        kinds = {row: next(iter(row.plan.drops)) for row in rows}
        return [
            (first, second)
            for place, first in enumerate(rows)
            for second in rows[place + 1 :]
            if kinds[first] != kinds[second] and abs(size[first] - size[second]) <= SAME_SIZE
        ]
    own = {"parts": study.recipe.base.prune.criterion, "units": study.recipe.base.slim.criterion}
    reference = next((row for row in rows if row.label == own.get(name)), rows[0])
    return [(row, reference) for row in rows if row is not reference]


class _Samples:
    """Resampled means of all models, over queries and over collections, and figures made of them."""

    def __init__(self, figures: dict[str, np.ndarray], seed: int) -> None:
        self.macro, self.micro = resample(figures, seed=seed)
        self.over_collections = resample(figures, seed=seed, over_collections=True)

    def ratio(self, column: int, of: int, *, micro: bool = False) -> Estimate:
        """Return the share that a model has of another's mean."""
        queries = self.micro if micro else self.macro
        collections = self.over_collections.micro if micro else self.over_collections.macro
        with np.errstate(divide="ignore", invalid="ignore"):
            return _estimate(queries[:, column] / queries[:, of], collections[:, column] / collections[:, of])

    def difference(self, column: int, other: int) -> Estimate:
        """Return how much a model's macro mean is above another's."""
        over = self.over_collections.macro
        return _estimate(self.macro[:, column] - self.macro[:, other], over[:, column] - over[:, other])


def _estimate(queries: np.ndarray, collections: np.ndarray) -> Estimate:
    return Estimate(float(queries[0]), *interval(queries), *interval(collections))
