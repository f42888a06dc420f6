import logging
from collections import Counter

import pytest
import torch
from conftest import tiny_config

from effir_search.compression.defaults_without_labels import merged
from effir_search.model.arithmetic import count, empty_model
from effir_search.pruning.choose_units import choose_units
from effir_search.study.plan import (
    Cell,
    Plan,
    Planner,
    all_cells,
    as_json,
    as_study,
    cells_of,
    collections_of,
    from_json,
    greedy_numbers,
    start_of,
)

RECIPE = {"encoder": "model", "data": {"texts": ["texts.txt"]}, "study": {"collections": ["toy"]}}
LABELLED = {"encoder": "model", "data": {"train": "train.jsonl"}, "study": {"collections": ["toy"]}}
LAYERS, UNITS = 4, 48


def planner_of(recipe=RECIPE, family="bert", **section):
    return Planner(as_study(merged(recipe, {"study": section})), tiny_config(family))


def rows(planner, name):
    return {row.label: row.plan for row in planner.tables()[name]}


def test_kinds_are_dropped_by_number_a_quarter_half_and_three_quarters_where_none_is_named():
    plans = rows(planner_of(), "kinds")
    assert list(plans) == [
        *("1 MLP", "2 MLPs", "3 MLPs", "1 attention", "2 attentions", "3 attentions"),
        *("1 block", "2 blocks", "3 blocks"),
    ]
    assert plans["3 MLPs"] == Plan(mlp=3, criterion="greedy")


def test_a_number_that_a_model_does_not_have_is_left_out_with_a_warning(caplog):
    plans = rows(planner_of(numbers=[2, 4, 9]), "kinds")
    assert list(plans) == ["2 MLPs", "4 MLPs", "2 attentions", "4 attentions", "2 blocks"]
    assert "block: the model has 4, so dropping 4, 9 is left out" in caplog.text


def test_a_share_of_the_parameters_is_the_nearest_number_of_parts_of_each_kind(caplog):
    planner = planner_of(shares=[0.5])
    # A layer of this BERT: attention 4 * (32 * 32 + 32) + 64 of its norm = 4288; MLP 2 * 32 * 48 + 48 + 32 + 64 = 3216.
    layer, mlp, attention = 7504, 3216, 4288
    total = count(empty_model(tiny_config("bert"))).without_embeddings
    assert planner.full_size == total
    expected = {"mlp": round(0.5 * total / mlp), "attention": round(0.5 * total / attention)}
    plans = rows(planner, "kinds").values()
    assert {kind: number for plan in plans for kind, number in plan.drops.items()} == {
        **{kind: number for kind, number in expected.items() if number <= LAYERS},
        "block": round(0.5 * total / layer),
    }
    with caplog.at_level(logging.WARNING):
        plans = rows(planner_of(shares=[0.75], kinds=["mlp", "block"]), "kinds").values()
    assert [plan.drops for plan in plans] == [{"block": 3}]
    assert "mlp: there are not enough of them to drop 75%, which is left out" in caplog.text


def test_depth_alone_and_width_alone_have_the_size_of_both():
    planner = planner_of()
    both, *alone = (planner.share_left(plan) for plan in rows(planner, "shape").values())
    unit = (2 * 32 + 1) / planner.full_size
    depth, width = alone
    assert width == pytest.approx(both, abs=2 * LAYERS * unit)  # on paper each layer's units are rounded
    assert depth == pytest.approx(both, abs=3216 / 2 / planner.full_size)


def test_a_whole_model_that_is_its_own_teacher_is_narrowed_by_another_criterion_than_taylor():
    for recipe in (RECIPE, merged(RECIPE, {"slim": {"criterion": "taylor"}})):
        plans = [plan for plan in rows(planner_of(recipe), "shape").values() if not plan.drops]
        assert [plan.unit_criterion for plan in plans] == ["activation"]
    (plan,) = [plan for plan in rows(planner_of(LABELLED), "shape").values() if not plan.drops]
    assert plan.unit_criterion == "gates"


def test_criteria_change_what_goes_and_not_how_much():
    planner = planner_of()
    for name, field in (("parts", "criterion"), ("units", "unit_criterion")):
        plans = rows(planner, name)
        assert {label: getattr(plan, field) for label, plan in plans.items()} == {label: label for label in plans}
        assert len({planner.share_left(plan) for plan in plans.values()}) == 1
    assert list(rows(planner, "parts")) == ["cosine", "embedding", "greedy"]
    assert list(rows(planner, "units")) == ["gates", "activation", "taylor", "magnitude", "random"]


def test_every_model_has_the_same_budget_whatever_it_loses():
    planner = planner_of(seeds=[0, 3])
    study = planner.study
    trained = [cell for cell in all_cells(planner.tables(), study) if cell.trained]
    budgets = [study.compression(cell.plan, cell.seed) for cell in trained]
    assert len({(b.finetune.max_steps, b.finetune.batch_size, b.data, b.loss) for b in budgets}) == 1
    assert all(b.finetune.seed == b.slim.seed == b.seed == cell.seed for b, cell in zip(budgets, trained, strict=True))


def test_seeds_are_of_what_is_drawn_or_learned():
    study = as_study(merged(RECIPE, {"study": {"seeds": [0, 1]}}))

    def seeds(plan, trained):
        return [cell.seed for cell in cells_of(plan, study) if cell.trained == trained]

    depth = Plan(mlp=2, criterion="greedy")
    units = {name: Plan(narrow=0.3, unit_criterion=name) for name in ("gates", "magnitude", "random")}
    assert (seeds(depth, False), seeds(depth, True)) == ([0], [0, 1])
    assert (seeds(units["gates"], False), seeds(units["gates"], True)) == ([0, 1], [0, 1])
    assert (seeds(units["magnitude"], False), seeds(units["magnitude"], True)) == ([0], [0, 1])
    assert (seeds(units["random"], False), seeds(units["random"], True)) == ([0, 1, 2], [0, 1, 2])
    assert start_of(Cell(depth, 1, trained=True), study) == Cell(depth, 0)
    assert start_of(Cell(units["gates"], 1, trained=True), study) == Cell(units["gates"], 1)


def test_the_whole_model_is_trained_where_there_is_something_to_learn():
    assert [cell.trained for cell in cells_of(Plan(), as_study(RECIPE))] == [False]
    assert [cell.trained for cell in cells_of(Plan(), as_study(LABELLED))] == [False, True]
    other_teacher = merged(RECIPE, {"data": {"teacher": "another"}})
    assert [cell.trained for cell in cells_of(Plan(), as_study(other_teacher))] == [False, True]


def test_a_model_of_several_tables_is_made_once_and_those_of_one_start_stand_together():
    planner = planner_of(seeds=[0, 1])
    cells = all_cells(planner.tables(), planner.study)
    assert max(Counter(cells).values()) == 1 and cells[0] == Cell(Plan(), 0)
    starts = [start_of(cell, planner.study) for cell in cells]
    assert [start for place, start in enumerate(starts) if place == 0 or starts[place - 1] != start] == list(
        dict.fromkeys(starts)
    )
    assert greedy_numbers(cells) == {"mlp": 3, "attention": 3, "block": 3}
    assert all(from_json(as_json(cell)) == cell for cell in cells)
    assert len({cell.name for cell in cells}) == len(cells)


def test_a_collection_may_name_its_split(tmp_path):
    (tmp_path / "with:colon").mkdir()
    found = collections_of(["data/squad", "data/squad:dev", str(tmp_path / "with:colon")])
    assert [(c.name, c.split) for c in found] == [("squad", "test"), ("squad-dev", "dev"), ("with:colon", "test")]
    assert str(found[1].folder) == "data/squad"


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"encoder": "m", "data": {"texts": ["t"]}}, r"there is no section \[study\]; it has at least collections"),
        (RECIPE | {"study": {}}, r"\[study\] collections: Field required"),
        (RECIPE | {"study": {"collections": []}}, "collections: at least one is needed"),
        (RECIPE | {"study": {"collections": ["a"], "sedes": [1]}}, r"there is no 'sedes'; did you mean seeds\?"),
        (RECIPE | {"study": {"collections": ["a"], "kinds": ["mlps"]}}, r"\[study\] kinds.0: .*'mlps'"),
        (RECIPE | {"study": {"collections": ["a"], "shares": [1.0]}}, r"\[study\] shares.0: .* less than 1, found 1.0"),
        (RECIPE | {"study": {"collections": ["a"], "seeds": [1, 1]}}, "seeds: 1, 1 names one of them twice"),
        (
            RECIPE | {"evaluate": {"collections": ["a"]}},
            r"evaluate is of one model; a study has collections in \[study\]",
        ),
        (RECIPE | {"seed": 3}, r"seed is of one model; a study has seeds in \[study\]"),
        (RECIPE | {"output": "models/small"}, "output is of one model; a study has a folder of its own, --output"),
        (RECIPE | {"target": "parameters=0.5"}, "target is of one model; a study has kinds, numbers and shares"),
        (RECIPE | {"finetune": {"patience": 3}}, "patience in .* ends trainings early"),
    ],
)
def test_a_recipe_that_cannot_be_is_told(recipe, message):
    with pytest.raises(ValueError, match=message):
        as_study(recipe)


def test_two_collections_of_one_name_are_told():
    with pytest.raises(ValueError, match="two of them have the name toy"):
        collections_of(["a/toy", "b/toy"])


@pytest.mark.parametrize("full", [48, 1152, 1536, 3072, 14336])
def test_one_width_for_all_layers_is_that_width_also_where_its_share_has_no_end(full):
    config = tiny_config("bert")
    config.intermediate_size = full
    planner = Planner(as_study(RECIPE), config)
    scores = {layer_idx: torch.arange(float(full)) for layer_idx in range(2)}
    for width in range(1, full, max(1, full // 97)):
        slim = planner.study.compression(planner.uniform(width), seed=0).slim
        masks = choose_units(scores, slim.narrow, floor=slim.floor, multiple=slim.multiple)
        assert [int(mask.sum()) for mask in masks.values()] == [width, width]
