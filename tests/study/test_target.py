"""``effir compress --target``: plans that meet a target, and the one that learns best."""

import json

import pytest
from click.testing import CliRunner
from conftest import kill_when_there, save_model, save_sentence_files
from processes import Command
from transformers import AutoConfig

from effir_search.cli import cli as command
from effir_search.model.arithmetic import count, empty_model
from effir_search.pruning.prune import NAMES
from effir_search.study import target
from effir_search.study.plan import Plan
from effir_search.study.target_plans import MOST_NARROW, Planner, Target, parse_target

OPTIONS = ["--max-steps", 24, "--batch-size", 8, "--device", "cpu"]


def planner(config, speedup=lambda shape: 1.0):
    return Planner(config, bytes_a_parameter=4, speedup=speedup)


def config_with_layers(folder, num_layers=6):
    config = AutoConfig.from_pretrained(folder)
    config.num_hidden_layers = num_layers
    return config


def run(*arguments):
    return CliRunner().invoke(command, ["compress", *map(str, arguments)])


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("parameters=0.5", "parameters", 0.5),
        ("speedup=2", "speedup", 2),
        ("bytes=40MB", "bytes", 40_000_000),
        ("bytes=1.5 GiB", "bytes", 1.5 * 2**30),
        ("bytes=1000", "bytes", 1000),
        ("quality=0.98", "quality", 0.98),
    ],
)
def test_a_target_is_read_as_a_user_writes_it(text, kind, value):
    assert parse_target(text) == Target(kind, value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0.5", "give parameters=0.5"),
        ("size=0.5", "give parameters=0.5"),
        ("parameters=half", "'half' is no number"),
        ("parameters=nan", "must be above 0 and below 1"),
        ("parameters=1", "must be above 0 and below 1"),
        ("parameters=0", "must be above 0 and below 1"),
        ("quality=98", "must be above 0 and below 1"),
        ("speedup=1", "must be above 1"),
        ("speedup=inf", "must be above 1"),
        ("bytes=40 apples", "takes a number with B, KB"),
        ("bytes=.", "takes a number with B, KB"),
        ("bytes=0.1", "at least one byte"),
    ],
)
def test_a_target_that_is_none_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_target(text)


@pytest.mark.parametrize("share", [0.3, 0.5, 0.7, 0.9])
def test_plans_for_a_size_meet_it_and_cut_no_unit_that_could_stay(bert_folder, share):
    config = config_with_layers(bert_folder)
    full = count(empty_model(config)).without_embeddings
    makes = planner(config)
    plans = makes.plans(Target("parameters", share))
    assert len(set(plans)) == len(plans) >= 1
    for plan in plans:
        assert makes.share_left(plan) <= share
        assert 0 <= plan.narrow <= MOST_NARROW + 1e-6
        if plan.narrow:
            units = makes._dropped(Plan(plan.block, plan.mlp, plan.attention)).units
            one_more = Plan(plan.block, plan.mlp, plan.attention, (round(plan.narrow * units) - 1) / units)
            assert makes.share_left(one_more) > share
            # Less than one unit of an MLP below the target: gate, up and down, or two matrices with their biases.
            assert share - makes.share_left(plan) < (3 * config.hidden_size + 2) / full
        else:
            fewer = [
                Plan(**{other: getattr(plan, other) - (other == kind) for other in NAMES})
                for kind in NAMES
                if getattr(plan, kind)
            ]
            assert all(makes.share_left(one) > share for one in fewer)


def test_a_size_in_bytes_is_that_of_all_weights(bert_folder):
    config = config_with_layers(bert_folder)
    full = count(empty_model(config)).parameters
    for plan in planner(config).plans(Target("bytes", 0.7 * 4 * full)):
        assert planner(config)._count(plan).parameters * 4 <= 0.7 * 4 * full


def test_plans_for_a_speed_have_it_by_what_is_measured(bert_folder):
    # As fast as a model whose time is that of its attentions, each a unit, and of its MLPs by their width.
    def speedup(shape):
        width = config.intermediate_size
        return 2 * len(shape.widths) / (sum(shape.attentions) + sum(shape.widths) / width)

    config = config_with_layers(bert_folder)
    makes = planner(config, speedup)
    plans = makes.plans(Target("speedup", 1.5))
    assert any(plan.block for plan in plans) and any(plan.mlp for plan in plans)
    assert all(makes.speedup_of(plan) >= 1.5 for plan in plans)


def test_a_target_that_no_plan_meets_names_the_smallest_there_is(bert_folder):
    with pytest.raises(ValueError, match=r"no plan meets it; the smallest that can be made has \d+% of the parameters"):
        planner(config_with_layers(bert_folder)).plans(Target("bytes", 1000))


def check_result(result, output, texts):
    assert result.exit_code == 0, result.output
    card = (output / "README.md").read_text()
    assert "## Candidates for parameters=0.6" in card
    table = [line for line in card.splitlines() if line.startswith("| ") and ("MLPs" in line or "units" in line)]
    chosen = [line for line in table if "(chosen)" in line]
    assert len(chosen) == 1 and chosen == [line for line in table if "chosen" in line]
    benchmark = json.loads((output / "benchmark.json").read_text())
    full, compressed = (sizes["parameters_without_embeddings"] for sizes in benchmark["sizes"])
    assert 0.4 < compressed / full <= 0.6
    assert all(line in result.output for line in chosen)
    return card


@pytest.fixture(scope="module")
def whole(tmp_path_factory, bert_folder, texts, short):
    """The output of a job that nothing stopped, and what it printed."""
    output = tmp_path_factory.mktemp("whole") / "small"
    arguments = ["--encoder", bert_folder, "--texts", texts, "--recipe", short, *OPTIONS]
    return output, run(*arguments, "--output", output, "--target", "parameters=0.6")


def test_the_best_candidate_is_compressed_and_the_card_shows_them_all(whole, texts):
    output, result = whole
    card = check_result(result, output, texts)
    rows = [line.split("|")[1:-1] for line in card.splitlines() if line.startswith("| ") and "x |" in line]
    rows = [[cell.strip() for cell in row] for row in rows]
    # Of each round the better half goes on, and the chosen one is the best of the last.
    rounds = list(zip(*(row[3:] for row in rows), strict=True))
    for earlier, later in zip(rounds, rounds[1:], strict=False):
        figures = sorted((float(cell) for cell in earlier if cell), reverse=True)
        went_on = [float(one) for one, two in zip(earlier, later, strict=True) if two]
        assert went_on and sorted(went_on, reverse=True) == figures[: len(went_on)]
        assert len(went_on) == -(-len(figures) // 2)
    last = [float(cell) for cell in rounds[-1] if cell]
    assert rows[0][0].endswith("(chosen)") and float(rows[0][-1]) == max(last)
    # All of it learns in as many steps as one model would.
    spent, left = (int(part.split()[0]) for part in card.split("Training steps: ")[1].split(", ")[:2])
    assert spent + left == 24
    assert json.loads((output / "training.json").read_text())["recipe"]["max_steps"] == left


@pytest.mark.processes
def test_a_job_that_was_killed_goes_on_and_chooses_the_same(tmp_path, whole, bert_folder, texts, short):
    arguments = ["--encoder", bert_folder, "--texts", texts, "--recipe", short, *OPTIONS, "--target", "parameters=0.6"]
    output = tmp_path / "small"
    killed = Command("compress", *map(str, arguments), "--output", str(output))
    kill_when_there(killed, tmp_path / "small.candidates" / "1-analysis" / "numbers.json")
    check_result(run(*arguments, "--output", output), output, texts)
    tables = [(folder.with_name("small.candidates") / "candidates.md").read_text() for folder in (whole[0], output)]
    # Speed is measured anew; what is learned is the same.
    plans = [[[c for c in line.split("|") if "x" not in c] for line in table.splitlines()] for table in tables]
    assert plans[0] == plans[1]


def test_the_smallest_that_keeps_a_quality_is_found(tmp_path, collection, bert_folder, texts, short, monkeypatch):
    monkeypatch.setattr(target, "SIZES", (0.4, 0.6, 0.8))  # fewer, for time
    output = tmp_path / "small"
    arguments = ["--encoder", bert_folder, "--texts", texts, "--recipe", short, "--output", output, *OPTIONS]
    measured = ["--dev", collection, "--target", "quality=0.2"]
    split = tmp_path / "split.toml"
    split.write_text(short.read_text() + '[data]\ndev_split = "test"\n')
    arguments[arguments.index(short)] = split
    result = run(*arguments, *measured)
    assert result.exit_code == 0, result.output
    assert "% of the parameters: " in (output / "README.md").read_text()
    benchmark = json.loads((output / "benchmark.json").read_text())
    full, compressed = (sizes["parameters_without_embeddings"] for sizes in benchmark["sizes"])
    assert compressed < full


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--target", "parameters=0.5", "--drop-mlp", 2], "finds what to drop and to narrow; leave out --drop-mlp"),
        (["--target", "parameters=0.5", "--narrow", 0.2], "finds what to drop and to narrow; leave out --drop-mlp"),
        (["--target", "quality=0.9"], "is measured on a dev split: give --dev"),
        (["--target", "quarter"], "give parameters=0.5"),
        (["--target", "parameters=0.5", "--plan"], "what goes is found by effir compress --target, without --plan"),
    ],
)
def test_a_target_beside_what_it_is_to_find_is_an_error(tmp_path, bert_folder, texts, options, message):
    result = run("--encoder", bert_folder, "--texts", texts, "--output", tmp_path / "small", *options)
    assert result.exit_code == 1 and message in result.output
    assert not (tmp_path / "small.candidates").exists()


@pytest.mark.parametrize("family", ["llama"])
def test_a_decoder_meets_a_target_too(tmp_path, texts, short, family):
    encoder = save_sentence_files(save_model(tmp_path / family, family), pooling="lasttoken")
    output = tmp_path / "small"
    arguments = ["--encoder", encoder, "--texts", texts, "--recipe", short, "--output", output, *OPTIONS]
    check_result(run(*arguments, "--target", "parameters=0.6"), output, texts)
