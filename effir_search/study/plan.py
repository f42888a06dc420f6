"""What a study compares: models as cells, and the rows of its tables."""

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import NamedTuple

from pydantic import TypeAdapter, ValidationError
from transformers import PretrainedConfig

from effir_search.compression.defaults_without_labels import merged
from effir_search.compression.recipe import as_compression, check_names, first_problem
from effir_search.errors import UserError
from effir_search.model.arithmetic import count, empty_model, planned
from effir_search.model.layers import mlp_widths, parts_of
from effir_search.pruning.prune import NAMES, counted
from effir_search.settings import CompressionSettings, PartKind, StudySettings, StudyTable

logger = logging.getLogger(__name__)

SECTION = "study"
# What a recipe has for one model, and what a study has in its place.
OF_ONE_MODEL = {
    "evaluate": f"collections in [{SECTION}]",
    "seed": f"seeds in [{SECTION}]",
    "output": "a folder of its own, --output",
    "native": f"a table native, in tables of [{SECTION}]",
    "target": f"kinds, numbers and shares in [{SECTION}]",
}
# A criterion that reads neither texts nor chance: units have the same scores for every seed.
WITHOUT_SEED = "magnitude"
Recipe = Mapping[str, object]


@dataclass(frozen=True)
class Plan:
    """What a model loses; all 0 is the whole model.

    Attributes:
        block: Whole layers, which go first.
        mlp: MLPs.
        attention: Attentions.
        criterion: What tells which of them go; None where none go.
        narrow: Share of the units of the MLPs left.
        unit_criterion: What tells which units go; None where none go.
        uniform: Whether every layer loses the same share of its units.
    """

    block: int = 0
    mlp: int = 0
    attention: int = 0
    criterion: str | None = None
    narrow: float = 0.0
    unit_criterion: str | None = None
    uniform: bool = False

    @property
    def drops(self) -> dict[PartKind, int]:
        """How many parts go by kind, those of which none go left out."""
        return {kind: number for kind in NAMES if (number := getattr(self, kind))}

    @property
    def numbers(self) -> dict[str, int]:
        """The same, by the names that ``arithmetic.planned`` has for them."""
        return {f"drop_{kind}": number for kind, number in self.drops.items()}

    @property
    def is_whole(self) -> bool:
        """Whether nothing goes."""
        return not self.drops and not self.narrow

    @property
    def name(self) -> str:
        """What it is called in names of folders."""
        parts = [f"{kind}-{number}" for kind, number in self.drops.items()]
        parts += [self.criterion] if self.criterion else []
        if self.narrow:
            parts += [f"{'uniform' if self.uniform else 'narrow'}-{self.narrow:.6g}"]
            parts += [self.unit_criterion] if self.unit_criterion else []
        return "-".join(parts) or "full"


@dataclass(frozen=True)
class Cell:
    """A model of a study: what it loses, the seed of what is drawn and learned, and whether it is fine-tuned."""

    plan: Plan
    seed: int
    trained: bool = False

    @property
    def name(self) -> str:
        """The name of its folder."""
        return f"{self.plan.name}-seed-{self.seed}-{'trained' if self.trained else 'untrained'}"


class Row(NamedTuple):
    """A row of a table: a plan, with words for it."""

    label: str
    plan: Plan


Tables = dict[StudyTable, list[Row]]


class StudyRecipe(NamedTuple):
    """A recipe that was checked.

    Attributes:
        recipe: All but the section ``[study]``, as ``recipe.read_recipe`` returns it.
        base: The same with all defaults: EffiR's model of the study.
        settings: The section ``[study]``.
        section: The same as it was given.
    """

    recipe: Recipe
    base: CompressionSettings
    settings: StudySettings
    section: Recipe

    def compression(self, plan: Plan, seed: int) -> CompressionSettings:
        """Return how a plan's model is made, as a recipe of ``effir compress``."""
        return as_compression(merged(self.recipe, _as_recipe(plan), {"seed": seed}))

    @property
    def imitates_itself(self) -> bool:
        """Whether the model learns from what it was before, without labels."""
        return not self.base.data.train and self.base.data.teacher == self.base.encoder


def as_study(recipe: Recipe, *, where: str = "the recipe") -> StudyRecipe:
    """Return a checked recipe of a study: one of a compression, with a section ``[study]``.

    Raises:
        ValueError: An unknown name, a value of another type, or sections that contradict one another.
    """
    section = recipe.get(SECTION)
    if not isinstance(section, Mapping):
        raise UserError(
            f"{where}: there is no section [{SECTION}]; it has at least collections, a list of BEIR folders"
        )
    check_names(section, StudySettings, f"{where}: [{SECTION}]")
    for name, instead in OF_ONE_MODEL.items():
        if name in recipe:
            raise UserError(f"{where}: {name} is of one model; a study has {instead}")
    try:
        settings = TypeAdapter(StudySettings).validate_json(json.dumps(section, default=str), strict=True)
    except ValidationError as error:
        raise UserError(f"{where}: [{SECTION}] {first_problem(error)}") from error
    compressing = {name: value for name, value in recipe.items() if name != SECTION}
    base = as_compression(compressing, where=where)
    if base.finetune.patience and not settings.untrained_only:
        raise UserError(
            f"{where}: patience in [finetune] ends trainings early, and a study gives all the same; leave it"
        )
    return StudyRecipe(compressing, base, settings, section)


def _as_recipe(plan: Plan) -> dict[str, object]:
    """Return what a plan says in the words of a recipe."""
    prune: dict[str, object] = {f"drop_{kind}": getattr(plan, kind) for kind in NAMES}
    slim: dict[str, object] = {"narrow": plan.narrow}
    if plan.criterion:
        prune["criterion"] = plan.criterion
    if plan.unit_criterion:
        slim["criterion"] = plan.unit_criterion
    if plan.uniform:
        slim |= {"floor": 1 - plan.narrow, "multiple": 1}
    return {"prune": prune, "slim": slim}


class Planner:
    """Makes the rows of a study's tables for a model.

    Args:
        study: The recipe.
        config: The model's.
    """

    def __init__(self, study: StudyRecipe, config: PretrainedConfig) -> None:
        self.study, self.settings, self.config = study, study.settings, config
        model = empty_model(config)
        self.available = {kind: len(parts_of(model, kind)) for kind in NAMES}
        self.widths = [width for width in mlp_widths(model) if width]
        self.full_size = count(model).without_embeddings
        numbers = study.base.prune
        mlps = self.available["mlp"] // 2 if numbers.drop_mlp is None else numbers.drop_mlp
        drops = {"mlp": mlps, "attention": numbers.drop_attention, "block": numbers.drop_block}
        self.effir = self.plan(**drops, narrow=study.base.slim.narrow)

    def plan(self, **values: object) -> Plan:
        """Return a plan with the criteria that the recipe has for it, where none are given."""
        plan = Plan(**values)
        if plan.drops and not plan.criterion:
            plan = replace(plan, criterion=self.study.base.prune.criterion)
        if plan.narrow and not plan.unit_criterion:
            plan = replace(plan, unit_criterion=self._unit_criterion(plan))
        return plan

    def _unit_criterion(self, plan: Plan) -> str:
        """Return the recipe's criterion, or its default where that says nothing: of a model that is its own teacher."""
        recipe = self.study.recipe
        if not plan.drops and self.study.imitates_itself and self.study.base.slim.criterion == "taylor":
            slim = {name: value for name, value in recipe.get("slim", {}).items() if name != "criterion"}
            recipe = {**recipe, "slim": slim}
        return as_compression(merged(recipe, _as_recipe(plan))).slim.criterion

    def share_left(self, plan: Plan) -> float:
        """Return the share of the parameters outside the embeddings that a plan leaves."""
        config = planned(self.config, **plan.numbers, narrow=plan.narrow)
        return count(empty_model(config)).without_embeddings / self.full_size

    def is_possible(self, kind: PartKind, number: int) -> bool:
        """Return whether a model has so many parts to lose."""
        limit = self.available[kind] - (kind == "block")
        return 0 < number <= limit

    def tables(self) -> Tables:
        """Return the rows of all tables but ``native``, which needs measured speeds."""
        makers = {"kinds": self._kinds, "shape": self._shape, "parts": self._parts, "units": self._units}
        tables = {name: make() for name, make in makers.items() if name in self.settings.tables}
        if "native" in self.settings.tables:
            tables["native"] = [Row("EffiR", self.effir)]
        return {name: rows for name, rows in tables.items() if rows}

    def _kinds(self) -> list[Row]:
        rows = []
        for kind in self.settings.kinds:
            numbers = {*self.settings.numbers, *(self._nearest(kind, 1 - share) for share in self.settings.shares)}
            if not numbers - {None} and not self.settings.shares:
                layers = self.available["block"]
                numbers = {max(1, layers * quarter // 4) for quarter in (1, 2, 3)}
            possible = sorted(number for number in numbers if number and self.is_possible(kind, number))
            if skipped := sorted(number for number in numbers if number and number not in possible):
                logger.warning(
                    "%s: the model has %d, so dropping %s is left out",
                    kind,
                    self.available[kind],
                    ", ".join(map(str, skipped)),
                )
            rows += [Row(counted(kind, number), self.plan(**{kind: number})) for number in possible]
        return rows

    def _nearest(self, kind: PartKind, share_left: float) -> int | None:
        """Return how many parts of a kind leave a share of the parameters, as nearly as they can; None = too few."""
        distances = {
            number: abs(self.share_left(Plan(**{kind: number})) - share_left)
            for number in range(1, self.available[kind] + 1)
            if self.is_possible(kind, number)
        }
        if not distances:
            return None
        nearest = min(distances, key=lambda number: distances[number])
        one_part = (1 - self.share_left(Plan(**{kind: 1}))) / 2
        if distances[nearest] > one_part + 1e-9:
            logger.warning(
                "%s: there are not enough of them to drop %.0f%%, which is left out", kind, 100 * (1 - share_left)
            )
            return None
        return nearest

    def _shape(self) -> list[Row]:
        """Return EffiR's plan, and depth alone and width alone at its size."""
        size = self.share_left(self.effir)
        rows = [Row("depth and width (EffiR)", self.effir)]
        if depth := self._nearest("mlp", size):
            rows.append(Row(f"depth alone: {counted('mlp', depth)}", self.plan(mlp=depth)))
        narrow = self._narrow_for(size)
        if narrow is None:
            logger.warning("narrowing alone cannot make the model as small as %.0f%%, which is left out", 100 * size)
        else:
            rows.append(Row(f"width alone: {narrow:.1%} of the units", self.plan(narrow=narrow)))
        return rows

    def _narrow_for(self, share_left: float) -> float | None:
        """Return the share of all units whose cut leaves a share of the parameters; None where that is too much."""
        units = sum(self.widths)
        one = (1 - self.share_left(Plan(narrow=0.5))) / (units / 2)
        cut = round((1 - share_left) / one)
        floor = self.study.base.slim.floor
        return round(cut / units, 6) if 0 < cut <= (1 - floor) * units else None

    def _parts(self) -> list[Row]:
        """Return the drops of EffiR's plan, chosen by each criterion."""
        drops = self.effir.drops
        if not drops:
            logger.warning("the recipe drops no part, so criteria of parts are not compared")
            return []
        return [Row(name, Plan(**drops, criterion=name)) for name in self.settings.criteria]

    def _units(self) -> list[Row]:
        """Return EffiR's plan, its units chosen by each criterion."""
        if not self.effir.narrow:
            logger.warning("the recipe narrows nothing, so criteria of units are not compared")
            return []
        alone = not self.effir.drops and self.study.imitates_itself
        names = [name for name in self.settings.unit_criteria if not (alone and name == "taylor")]
        return [Row(name, replace(self.effir, unit_criterion=name)) for name in names]

    def uniform(self, width: int) -> Plan:
        """Return the plan of one width for all layers, which have the same one."""
        return self.plan(narrow=1 - width / self.widths[0], uniform=True)

    def blocks(self, number: int) -> Plan:
        """Return the plan of whole layers alone."""
        return self.plan(block=number)


def cells_of(plan: Plan, study: StudyRecipe) -> list[Cell]:
    """Return the models of a plan: untrained, trained; of each seed where chance has a part in it.

    The whole model is as it is, and trained where that can teach it something: from labels or another teacher.
    """
    settings = study.settings
    seeds = list(settings.seeds)
    if plan.unit_criterion == "random":
        seeds += [seed for seed in range(max(seeds) + settings.random_seeds) if seed not in seeds]
        seeds = seeds[: max(len(settings.seeds), settings.random_seeds)]
    scored = seeds if is_scored_by_chance(plan) else seeds[:1]
    cells = [Cell(plan, seed) for seed in scored]
    if settings.untrained_only or plan.is_whole and study.imitates_itself:
        return cells
    return cells + [Cell(plan, seed, trained=True) for seed in seeds]


def is_scored_by_chance(plan: Plan) -> bool:
    """Return whether the model before training depends on the seed; parts are measured on one sample for all."""
    return bool(plan.narrow) and plan.unit_criterion != WITHOUT_SEED


def start_of(cell: Cell, study: StudyRecipe) -> Cell:
    """Return the model that a cell is trained from: itself, if it is not trained."""
    seed = cell.seed if is_scored_by_chance(cell.plan) else study.settings.seeds[0]
    return Cell(cell.plan, seed)


def all_cells(tables: Tables, study: StudyRecipe) -> list[Cell]:
    """Return the models of all rows, each once, the whole model first; those that share a start beside one another."""
    plans = [Plan(), *(row.plan for rows in tables.values() for row in rows)]
    cells = [cell for plan in dict.fromkeys(plans) for cell in cells_of(plan, study)]
    starts = list(dict.fromkeys(start_of(cell, study) for cell in cells))
    return sorted(cells, key=lambda cell: starts.index(start_of(cell, study)))


def greedy_numbers(cells: Iterable[Cell]) -> dict[PartKind, int]:
    """Return by kind how many parts plans choose greedily on the whole model, at most."""
    numbers: dict[PartKind, int] = {}
    for plan in (cell.plan for cell in cells):
        if plan.criterion == "greedy":
            kind, number = next(iter(plan.drops.items()))
            numbers[kind] = max(number, numbers.get(kind, 0))
    return numbers


def as_json(cell: Cell) -> dict[str, object]:
    """Return a cell in JSON types, as its record has it."""
    return {"plan": asdict(cell.plan), "seed": cell.seed, "trained": cell.trained}


def from_json(record: Mapping[str, object]) -> Cell:
    """Return the cell of a record."""
    names = [field.name for field in fields(Plan)]
    return Cell(Plan(**{name: record["plan"][name] for name in names}), record["seed"], record["trained"])


class Collection(NamedTuple):
    """A test collection: its name in tables, its BEIR folder, the split of its qrels."""

    name: str
    folder: Path
    split: str


def collections_of(names: Sequence[str]) -> list[Collection]:
    """Return the collections of ``StudySettings.collections``.

    Raises:
        ValueError: Two of the same name.
    """
    collections = []
    for text in names:
        folder, colon, split = text.rpartition(":")
        path, split = (Path(folder), split) if colon and not Path(text).is_dir() else (Path(text), "")
        collections.append(Collection(f"{path.name}-{split}" if split else path.name, path, split or "test"))
    named = [collection.name for collection in collections]
    for name in named:
        if named.count(name) > 1:
            raise UserError(f"collections: two of them have the name {name}; rename one")
    return collections
