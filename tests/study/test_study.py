import csv
import fcntl
import json
import re
import shlex
import shutil

import ir_measures
import numpy as np
import pytest
from click.testing import CliRunner
from conftest import WORDS, kill_when_there, write_jsonl
from processes import Command, start_ranks

from effir_search.cli import cli as command
from effir_search.compression.defaults_without_labels import merged
from effir_search.encoding.encoder import Encoder
from effir_search.model.sentence_files import prunable_config
from effir_search.settings import EncoderOptions
from effir_search.study.cells import run_cell
from effir_search.study.commands import commands_of
from effir_search.study.page import FIGURES
from effir_search.study.plan import Cell, Plan, Planner, all_cells, as_study
from effir_search.study.results import results_of
from effir_search.study.run import open_study, prepare_study, run_cells, run_study
from effir_search.study.speed import Shape, SpeedRecords, nearest_in_speed, of_shape, shape_of
from effir_search.text.trec import read_qrels

STEPS = 3


@pytest.fixture(scope="module")
def second(tmp_path_factory, collection):
    """The toy collection with another split, of one query."""
    folder = shutil.copytree(collection, tmp_path_factory.mktemp("second") / "more")
    (folder / "qrels" / "dev.tsv").write_text("query-id\tcorpus-id\tscore\n2\t008\t1\n")
    return folder


@pytest.fixture(scope="module")
def recipe(bert_folder, texts, collection, second):
    return {
        "encoder": str(bert_folder),
        "data": {"texts": [str(texts)]},
        "prune": {"num_texts": 16},
        "slim": {"steps": 2, "batch_size": 8, "narrow": 0.25},
        "finetune": {"max_steps": STEPS, "batch_size": 8, "bf16": False, "eval_steps": STEPS},
        "study": {
            "collections": [str(collection), f"{second}:dev"],
            "numbers": [2],
            "kinds": ["mlp"],
            "criteria": ["greedy"],
            "unit_criteria": ["gates", "taylor"],
            "dtypes": ["fp32"],
            "speed_texts": 8,
        },
    }


def narrow_recipe(recipe, **section):
    """A recipe with few models: one table, unless others are named."""
    return merged(recipe, {"study": {"tables": ["kinds"], "numbers": [2], "kinds": ["mlp"]} | section})


def opened(recipe, folder, **options):
    return open_study(as_study(recipe), folder, device="cpu", **options)


def cells_in(study):
    config = prunable_config(study.recipe.base.encoder)
    return all_cells(Planner(study.recipe, config).tables(), study.recipe)


def times(folder):
    return {path.parent.name: path.stat().st_mtime_ns for path in folder.glob("cells/*/record.json")}


def toml(recipe, path):
    tomli_w = pytest.importorskip("tomli_w")
    path.write_text(tomli_w.dumps(recipe))
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory, recipe):
    """A study with every table, run by its command."""
    folder = tmp_path_factory.mktemp("whole")
    file = toml(recipe, folder / "study.toml")
    arguments = ["study", "--recipe", file, "--output", folder / "study", "--device", "cpu", "--keep-models"]
    result = CliRunner().invoke(command, [*map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return folder / "study", result.output


def csv_of(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_the_command_leaves_tables_figures_and_a_page(whole):
    folder, output = whole
    assert output.rstrip().endswith(f"page -> {folder / 'index.html'}")
    assert {"README.md", "index.html", "results.csv", "differences.csv", "pareto.png", "order.png"} <= {
        path.name for path in folder.iterdir()
    }
    assert {row["table"] for row in csv_of(folder / "results.csv")} == {
        *("full", "kinds", "shape", "parts", "units", "native"),
    }


def test_every_model_was_trained_for_the_same_steps_and_the_record_says_so(whole):
    folder, _ = whole
    records = [json.loads(file.read_text()) for file in folder.glob("cells/*/record.json")]
    trained = [record for record in records if record["trained"]]
    assert {record["training"]["steps"] for record in trained} == {STEPS}
    budgets = [record["settings"]["finetune"] | {"seed": 0} for record in trained]
    assert all(budget == budgets[0] for budget in budgets) and len(trained) == 6
    assert all(record["settings"]["data"] == trained[0]["settings"]["data"] for record in records)


def test_a_number_in_the_csv_is_that_of_the_stored_run(whole, recipe, collection):
    folder, _ = whole
    qrels = [ir_measures.Qrel(*qrel) for qrel in read_qrels(str(collection / "qrels" / "test.tsv"))]
    for row in csv_of(folder / "results.csv"):
        values = []
        for name in row["models"].split():
            run = list(ir_measures.read_trec_run(str(folder / "cells" / name / f"{collection.name}.trec")))
            values.append(ir_measures.calc_aggregate([ir_measures.nDCG @ 10], qrels, run)[ir_measures.nDCG @ 10])
        assert float(row[f"nDCG@10 {collection.name}"]) == pytest.approx(sum(values) / len(values))


def test_a_number_on_the_page_is_in_the_csv(whole):
    folder, _ = whole
    page, rows = (folder / "index.html").read_text(), csv_of(folder / "results.csv")
    figures = [
        [f"{float(row[name]):.4f}" for name in row if name.startswith("nDCG@10") or name in ("macro", "micro")]
        for row in rows
    ]
    shares = [
        f"{float(row[name]):.1%}" for row in rows for name in row if name.startswith(("kept", "share")) if row[name]
    ]
    speeds = [f"{float(row['speedup_fp32']):.2f}x" for row in rows if row["speedup_fp32"]]
    tables = re.sub(r"<[^>]*>", " ", page[page.index("<h2") : page.index('<h2 id="models">')])
    assert set(re.findall(r"(?<![\d.+-])0\.\d{4}\b", tables)) <= {value for row in figures for value in row}
    assert set(re.findall(r"\d+\.\d%", tables)) <= {*shares, "100.0%", *re.findall(r"alone: (\d+\.\d%)", tables)}
    assert set(re.findall(r"\d\.\d\dx", tables)) <= {*speeds, "1.00x"}
    told = {f"{float(row['value']):+.4f}" for row in csv_of(folder / "differences.csv")}
    assert set(re.findall(r"nDCG@10 ([+-]\d\.\d{4})", tables)) <= told and told


def test_a_difference_whose_interval_contains_0_is_called_none(whole):
    folder, _ = whole
    text = (folder / "README.md").read_text()
    for row in csv_of(folder / "differences.csv"):
        none = float(row["low"]) <= 0 <= float(row["high"])
        assert row["none"] == str(none)
        sentence = next(
            line
            for line in text.splitlines()
            if line.startswith(f"- {row['state'].capitalize()}, {row['first']}")
            and f"{float(row['value']):+.4f}" in line
        )
        assert ("no difference is shown" in sentence) == none


def test_the_page_names_no_address_and_no_other_file(whole):
    page = (whole[0] / "index.html").read_text()
    assert "http" not in page and "//" not in re.sub(r"<pre>.*?</pre>", "", page, flags=re.DOTALL)
    assert not re.search(r"<(script|link|img|iframe)", page)
    assert not re.search(r"""(src|href)=["'](?!#)""", page)
    assert page.count("<svg") == len(FIGURES)
    identifiers = re.findall(r'\bid="([^"]+)"', page)
    assert len(set(identifiers)) == len(identifiers)
    assert {name.removeprefix("#") for name in re.findall(r'href="(#[^"]+)"', page)} <= set(identifiers)


def test_the_commands_of_a_model_make_it_again(whole, recipe, tmp_path, monkeypatch):
    folder, _ = whole
    page = (folder / "index.html").read_text()
    study = opened(recipe, folder)
    cells = [cell for cell in cells_in(study) if cell.trained and cell.plan.unit_criterion in ("gates", "taylor")]
    monkeypatch.chdir(tmp_path)
    for cell in {cell.plan.unit_criterion: cell for cell in cells}.values():
        lines = commands_of(study, cell, cell.name)
        assert len(lines) == 3 and all(line.replace("&", "&amp;").replace("'", "&#x27;") in page for line in lines)
        for line in lines:
            result = CliRunner().invoke(command, [*shlex.split(line)[1:], "--device", "cpu"])
            assert result.exit_code == 0, (line, result.output)
        made = tmp_path / cell.name
        kept = folder / "cells" / cell.name / "model"
        assert (made / "model.safetensors").read_bytes() == (kept / "model.safetensors").read_bytes()


def test_the_same_study_again_makes_nothing(whole, recipe):
    folder, _ = whole
    before = times(folder)
    run_study(opened(recipe, folder))
    assert times(folder) == before


def test_changed_training_makes_the_trained_models_again_and_no_other(tmp_path, recipe):
    recipe = narrow_recipe(recipe)
    run_study(opened(recipe, tmp_path / "study"))
    before = times(tmp_path / "study")
    run_study(opened(merged(recipe, {"finetune": {"max_steps": STEPS + 1}}), tmp_path / "study"))
    after = times(tmp_path / "study")
    assert before.keys() == after.keys()
    assert {name for name in after if after[name] != before[name]} == {n for n in after if not n.endswith("untrained")}


def test_another_collection_is_searched_by_the_models_and_the_runs_that_are_there_stay(tmp_path, recipe, second):
    recipe = narrow_recipe(recipe, collections=recipe["study"]["collections"][:1], untrained_only=True)
    run_study(opened(recipe, tmp_path / "study"))
    runs = {path: path.stat().st_mtime_ns for path in (tmp_path / "study").glob("cells/*/*.trec")}
    both = merged(recipe, {"study": {"collections": [*recipe["study"]["collections"], f"{second}:dev"]}})
    run_study(opened(both, tmp_path / "study"))
    assert {path: path.stat().st_mtime_ns for path in runs} == runs
    assert len(list((tmp_path / "study").glob("cells/*/*.trec"))) == 2 * len(runs) > 0


def test_weights_are_deleted_unless_they_are_to_be_kept(tmp_path, recipe, whole):
    run_study(opened(narrow_recipe(recipe), tmp_path / "study"))
    assert not list((tmp_path / "study").rglob("*.safetensors"))
    assert list((tmp_path / "study").glob("cells/*trained/*.trec"))
    assert list(whole[0].glob("cells/*-trained/model/model.safetensors"))


@pytest.mark.processes
def test_a_killed_study_goes_on_where_it_was(tmp_path, recipe):
    file = toml(narrow_recipe(recipe), tmp_path / "study.toml")
    folder = tmp_path / "study"
    line = ["study", "--recipe", file, "--output", folder, "--device", "cpu"]
    kill_when_there(Command(*line), folder / "cells" / "mlp-2-greedy-seed-0-untrained" / "record.json")
    before = times(folder)
    assert 0 < len(before) < 3
    result = CliRunner().invoke(command, [*map(str, line)])
    assert result.exit_code == 0, result.output
    after = times(folder)
    assert len(after) == 3 and {name: after[name] for name in before} == before


@pytest.mark.processes
def test_processes_share_the_models_and_find_the_same(tmp_path, recipe, whole):
    study = opened(narrow_recipe(recipe), tmp_path / "study")
    cells = cells_in(study)
    prepare_study(study, cells)
    run_cells(study, cells, devices=["cpu", "cpu"])
    for cell in cells:
        file = study.cell_folder(cell) / "ndcg.json"
        assert json.loads(file.read_text()) == json.loads((whole[0] / "cells" / cell.name / "ndcg.json").read_text())


def test_a_cell_is_a_function_of_the_study_and_gives_its_record(tmp_path, recipe):
    study = opened(narrow_recipe(recipe), tmp_path / "study")
    cell = Cell(Plan(mlp=2, criterion="greedy"), 0)
    prepare_study(study, [cell])
    record = run_cell(study, cell)
    assert record["shape"]["widths"].count(0) == 2
    assert list(record["queries"].values()) == [3, 1] and "more-dev" in record["queries"]
    assert run_cell(study, cell) == record


def test_labels_teach_the_whole_model_too_and_it_is_what_others_are_compared_with(tmp_path, recipe):
    train = write_jsonl(
        tmp_path / "train.jsonl",
        [
            {"query": f"{a} {b}", "positives": [f"the {a} eats {b}"]}
            for a, b in zip(WORDS[:24], WORDS[24:48], strict=True)
        ],
    )
    labelled = narrow_recipe({**recipe, "data": {"train": str(train)}})
    study = opened(labelled, tmp_path / "study")
    results = results_of(study, run_study(study))
    full = results.outcomes[Plan(), True]
    assert full.steps == STEPS and full.kept.value == 1
    for (_plan, trained), outcome in results.outcomes.items():
        of = full if trained else results.outcomes[Plan(), False]
        assert outcome.kept.value == pytest.approx(outcome.macro / of.macro)


def test_the_mean_over_seeds_is_told_with_the_lowest_and_the_highest(tmp_path, recipe):
    study = opened(narrow_recipe(recipe, seeds=[0, 1]), tmp_path / "study")
    results = results_of(study, run_study(study))
    outcome = results.outcomes[Plan(mlp=2, criterion="greedy"), True]
    assert [cell.seed for cell in outcome.cells] == [0, 1]
    records = [json.loads((study.cell_folder(cell) / "record.json").read_text()) for cell in outcome.cells]
    macros = [np.mean(list(record["ndcg"].values())) for record in records]
    full = results.outcomes[Plan(), False].macro
    assert outcome.macro == pytest.approx(np.mean(macros))
    assert outcome.seed_range == pytest.approx((min(macros) / full, max(macros) / full))


def test_the_plan_is_printed_and_nothing_is_made(tmp_path, recipe):
    file = toml(recipe, tmp_path / "study.toml")
    arguments = ["study", "--recipe", file, "--output", tmp_path / "study", "--plan", "--tables", "kinds,native"]
    result = CliRunner().invoke(command, [*map(str, arguments)])
    assert result.exit_code == 0 and "2 MLPs" in result.output and "native shapes" in result.output
    assert "units" not in result.output.splitlines() and not (tmp_path / "study").exists()


def test_the_nearest_speed_is_found_by_few_measurements():
    asked = []

    def speedup(number):
        asked.append(number)
        return 1 + number / 10

    candidates = list(range(100))
    for target in (1.0, 1.04, 3.333, 8.88, 20.0):
        asked.clear()
        expected = min(candidates, key=lambda number: abs(np.log((1 + number / 10) / target)))
        assert nearest_in_speed(target, candidates, speedup) == expected
        assert len(set(asked)) <= 8  # log2(100) and the neighbour


def test_a_model_cut_to_a_shape_has_it_and_one_of_the_same_layers_in_another_order_is_measured_once(
    tmp_path, bert_folder
):
    options = EncoderOptions(device="cpu")
    shape = Shape((48, 0, 16, 48), (True, True, False, False))
    assert shape_of(of_shape(str(bert_folder), shape, options)) == shape
    other = Shape((0, 48, 48, 16), (True, True, False, False))
    assert shape.canonical == other.canonical and shape.name == other.name
    records = SpeedRecords(tmp_path / "speeds", str(bert_folder), options, ["the cat eats fish"] * 4)
    measured = records.of(shape, "fp32")
    assert records.of(other, "fp32") == measured and measured.speedup > 0
    assert len(list((tmp_path / "speeds").iterdir())) == 1


def test_a_kept_model_encodes(whole):
    folder, _ = whole
    model = next(whole[0].glob("cells/mlp-2-greedy-seed-0-trained/model"))
    assert Encoder.from_pretrained(model, device="cpu").encode_queries(["hot soup"]).shape == (1, 32)


def test_a_folder_of_anything_else_is_left_as_it_is(tmp_path, recipe):
    file = toml(recipe, tmp_path / "study.toml")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    result = CliRunner().invoke(command, [*map(str, ["study", "--recipe", file, "--output", tmp_path / "other"])])
    assert result.exit_code == 1 and "exists already, with 'notes.txt' in it" in result.output
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["notes.txt"]


def test_models_that_another_process_is_at_work_at_are_told(tmp_path, recipe):
    study = opened(narrow_recipe(recipe, untrained_only=True), tmp_path / "study")
    cells = cells_in(study)
    prepare_study(study, cells)
    lock = study.folder / "models" / f"{cells[1].name}.lock"
    lock.parent.mkdir()
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(OSError, match=f"another process is at work at {cells[1].name} and 0 more"):
            run_study(study)
    assert (study.cell_folder(cells[0]) / "record.json").is_file()


@pytest.mark.processes
def test_a_launcher_of_several_processes_is_refused(tmp_path, recipe):
    file = toml(recipe, tmp_path / "study.toml")
    for rank in start_ranks(2, "study", "--recipe", file, "--output", tmp_path / "study", "--device", "cpu"):
        _, told = rank.communicate()
        assert rank.returncode == 1 and "was started as 2: give --devices, no launcher" in told
    assert not (tmp_path / "study").exists()
