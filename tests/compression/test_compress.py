import json
import shutil

import ir_measures
import numpy as np
import pytest
from click.testing import CliRunner
from conftest import QRELS, kill_when_there, save_model, save_sentence_files, write_jsonl
from ir_measures import nDCG
from processes import Command, torchrun
from safetensors.numpy import load_file, save_file

from effir_search.cli import cli as command
from effir_search.compression.compress import compress, job_settings, with_numbers
from effir_search.compression.defaults_without_labels import merged
from effir_search.compression.recipe import as_compression, read_recipe
from effir_search.compression.stages import STAGES, unchanged_names
from effir_search.encoding.encoder import Encoder
from effir_search.pruning.dropping_order import greedily
from effir_search.pruning.prune import prune_encoder
from effir_search.settings import EncoderOptions
from effir_search.text.texts import read_texts
from effir_search.training.teachers import bi_encoder_scores

UNITS = 2 * 48  # of the two MLPs that half of four dropped leaves
OPTIONS = ["--narrow", 0.25, "--max-steps", 4, "--batch-size", 8, "--device", "cpu"]


@pytest.fixture(scope="module")
def models(tmp_path_factory, bert_folder):
    def decoder(family):
        return save_sentence_files(save_model(tmp_path_factory.mktemp(family), family), pooling="lasttoken")

    return {"bert": bert_folder} | {family: decoder(family) for family in ("mistral", "llama", "qwen2", "qwen3")}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """What makes a job on tiny models short."""
    path = tmp_path_factory.mktemp("recipe") / "short.toml"
    path.write_text(
        "[prune]\nnum_texts = 16\n[slim]\nsteps = 3\nbatch_size = 8\n[finetune]\nbf16 = false\neval_steps = 1\n"
    )
    return path


def run(*arguments):
    return CliRunner().invoke(command, ["compress", *map(str, arguments)])


def read_json(path):
    return json.loads(path.read_text())


@pytest.mark.parametrize("family", ["mistral", "llama", "qwen2", "qwen3", "bert"])
def test_the_whole_recipe_leaves_a_folder_of_each_stage_and_a_model_of_the_size_that_was_asked_for(
    tmp_path, models, texts, recipe, collection, family
):
    output = tmp_path / "small"
    result = run(
        *("--recipe", recipe, "--encoder", models[family], "--texts", texts, "--evaluate", collection),
        *("--output", output, *OPTIONS),
    )
    assert result.exit_code == 0, result.output
    stages = output.with_name("small.stages")
    assert (stages / "1-analysis" / "analysis.json").is_file()
    widths = {
        name: read_json(stages / name / "config.json")["mlp_widths"] for name in ("2-dropped", "3-slimmed", "4-tuned")
    }
    assert sorted(widths["2-dropped"]) == [0, 0, 48, 48]
    assert sum(widths["3-slimmed"]) == UNITS - UNITS // 4
    assert widths["4-tuned"] == widths["3-slimmed"] == read_json(output / "config.json")["mlp_widths"]
    measured = read_json(output / "benchmark.json")
    runs = sorted(path.name for path in (stages / "5-evaluation").iterdir())
    assert runs == [f"{collection.name}-compressed.trec", f"{collection.name}-full.trec", "collections.json"]
    judged = {query_id: {} for query_id, _ in QRELS}
    for (query_id, doc_id), grade in QRELS.items():
        judged[query_id][doc_id] = grade
    judged = {query_id: of_query for query_id, of_query in judged.items() if any(of_query.values())}
    for role, ndcg in zip(("full", "compressed"), measured["ndcg"][collection.name], strict=True):
        run_file = stages / "5-evaluation" / f"{collection.name}-{role}.trec"
        found = ir_measures.calc_aggregate([nDCG @ 10], judged, list(ir_measures.read_trec_run(str(run_file))))
        assert found[nDCG @ 10] == pytest.approx(ndcg)
    card = (output / "README.md").read_text()
    assert f"-> {output}" in result.output and "Quality kept" in card and ", pruned as above |" in card
    # The model is the fine-tuned one, file by file; the card and the record of training have another name in them.
    named = {"README.md", "training.json"}
    for file in (file for file in (stages / "4-tuned").rglob("*") if file.is_file() and file.name not in named):
        assert (output / file.relative_to(stages / "4-tuned")).read_bytes() == file.read_bytes()
    # The recipe beside the model is the whole of what was done.
    kept = as_compression(read_recipe(output / "recipe.toml"))
    assert (kept.prune.drop_mlp, kept.slim.narrow, kept.finetune.max_steps) == (2, 0.25, 4)
    assert Encoder.from_pretrained(output, device="cpu").dimension == 32


@pytest.mark.parametrize("numbers", [{"mlp": 2}, {"block": 1, "mlp": 1}])
def test_importance_is_measured_once_and_the_model_is_that_of_a_stage_that_measures_itself(
    tmp_path, models, texts, recipe, numbers, caplog
):
    options = [option for kind, number in numbers.items() for option in (f"--drop-{kind}", number)]
    options += ["--recipe", recipe, "--encoder", models["llama"], "--texts", texts, "--max-length", 9, *OPTIONS]
    with caplog.at_level("INFO"):
        result = run(*options, "--narrow", 0, "--output", tmp_path / "small")
    assert result.exit_code == 0, result.output
    stages = tmp_path / "small.stages"
    analysis = read_json(stages / "1-analysis" / "analysis.json")
    assert list(analysis["order"]) == ["cosine", "greedy"] and analysis["curves"] == {}
    # One analysis; what kinds besides the first are chosen by is measured on what that has left.
    measured = [message for message in caplog.messages if message.startswith("measuring on 16 texts")]
    assert len(measured) == len(numbers)
    sources = [str(stages / "calibration.jsonl")]
    options = {"numbers": numbers, "layers": {}, "criterion": "greedy", "sources": sources, "size": 16}
    reading = EncoderOptions(device="cpu", max_length=9)
    prune_encoder(str(models["llama"]), tmp_path / "dropped", options=reading, **options)
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "dropped" / name).read_bytes() == (stages / "2-dropped" / name).read_bytes()


def test_how_the_recipe_reads_texts_is_how_importance_is_measured(tmp_path, models, texts, recipe):
    given = read_recipe(recipe)
    text = {"pooling": "mean", "append_eos": True, "normalize": True, "document_prompt": "hot "}
    given |= {"encoder": str(models["llama"]), "data": {"texts": [str(texts)]}, "text": text, "slim": {"narrow": 0.0}}
    given["finetune"] |= {"max_steps": 1}
    compress(as_compression(merged(given, {"prune": {"drop_mlp": 1}})), tmp_path / "small", device="cpu")
    stages = tmp_path / "small.stages"
    analysis = read_json(stages / "1-analysis" / "analysis.json")
    assert {name: analysis["encoder"][name] for name in text} == text
    encoder = Encoder.from_pretrained(models["llama"], device="cpu", dtype="saved", **text)
    tokens = encoder.tokenize(list(read_texts(str(stages / "calibration.jsonl"))), prompt="hot ")
    (first,) = greedily(encoder, tokens, ["mlp"], 1)["mlp"]
    assert read_json(stages / "2-dropped" / "config.json")["plan"][0]["scores"] == {str(first.layer_idx): first.score}
    assert Encoder.from_pretrained(tmp_path / "small").config.document_prompt == "hot "


def test_labels_train_all_stages_too(tmp_path, models, recipe):
    examples = [{"query": "hot soup", "positives": ["tomato soup"], "negatives": ["red car"]}] * 8
    examples += [{"query": "fast car", "positives": ["red car"], "negatives": ["tomato soup"]}] * 8
    train = write_jsonl(tmp_path / "train.jsonl", examples)
    output = tmp_path / "small"
    result = run("--recipe", recipe, "--encoder", models["bert"], "--train", train, "--output", output, *OPTIONS)
    assert result.exit_code == 0, result.output
    config = read_json(output / "config.json")
    assert [step.get("criterion") for step in config["plan"]] == ["cosine", "gates"]
    assert "nDCG" not in result.output


def test_a_teacher_that_scores_the_batch_is_learned_from_in_all_stages(tmp_path, models, recipe):
    examples = [
        {"query": "hot soup", "positives": ["tomato soup"]},
        {"query": "fast car", "positives": ["red car"]},
    ] * 8
    train = write_jsonl(tmp_path / "train.jsonl", examples)
    told = tmp_path / "recipe.toml"
    told.write_text(recipe.read_text() + '[loss]\ndistill_over = "batch"\ncontrastive_weight = 0\n')
    given = ["--recipe", told, "--encoder", models["llama"], "--train", train, *OPTIONS, "--output", tmp_path / "small"]
    refused = run(*given)
    assert refused.exit_code == 1 and "Error: --distill-over batch needs a teacher" in refused.output
    assert not (tmp_path / "small.stages").exists()
    result = run(*given, "--teacher", models["bert"])
    assert result.exit_code == 0, result.output
    assert "scores" not in (tmp_path / "small.stages" / "data" / "examples.jsonl").read_text()
    losses = read_json(tmp_path / "small" / "training.json")["losses"]
    assert (losses["distill_over"], losses["contrastive_weight"]) == ("batch", 0)


@pytest.mark.parametrize("options", [["--batch-size", 1], ["--negatives", 0, "--batch-size", 1]])
def test_examples_that_nothing_can_be_learned_from_are_an_error_before_the_first_stage(
    tmp_path, models, recipe, options
):
    train = write_jsonl(tmp_path / "train.jsonl", [{"query": "hot soup", "positives": ["tomato soup"]}] * 8)
    output = tmp_path / "small"
    given = ["--encoder", models["bert"], "--train", train, "--output", output, "--device", "cpu", *options]
    result = run("--recipe", recipe, *given)
    assert result.exit_code == 1 and "without hard negatives: no query meets a document" in result.output
    assert not (output.with_name("small.stages") / "1-analysis").exists() and not output.exists()


# What is there when a job is in the stage.
MARKS = {
    "analysis": "calibration.jsonl",
    "drop": "1-analysis/analysis.json",
    "narrow": "2-dropped/config.json",
    "gates": "3-slimmed.slimming/gates.safetensors",
    "fine-tune": "4-tuned.training/checkpoint-2/trainer_state.json",
    "evaluation": "4-tuned/config.json",
    "second evaluation": "5-evaluation/{collection}-full.trec",
}


@pytest.mark.processes
@pytest.mark.parametrize(
    "family", ["bert", *(pytest.param(family, marks=pytest.mark.slow) for family in ("mistral", "llama", "qwen2"))]
)
def test_a_job_that_was_killed_in_every_stage_ends_with_the_weights_of_an_undisturbed_one(
    tmp_path, models, texts, recipe, collection, family
):
    options = ["--recipe", recipe, "--encoder", models[family], "--texts", texts, "--evaluate", collection, *OPTIONS]
    options += ["--unit-criterion", "gates"]
    whole = Command("compress", *options, "--output", tmp_path / "whole")
    _, told = whole.communicate()
    assert whole.returncode == 0, told
    stages = tmp_path / "stopped.stages"
    for stage, mark in MARKS.items():
        process = Command("compress", *options, "--output", tmp_path / "stopped")
        kill_when_there(process, stages / mark.format(collection=collection.name))
        assert not (tmp_path / "stopped").exists(), stage
    last = Command("compress", *options, "--output", tmp_path / "stopped")
    answer, told = last.communicate()
    assert last.returncode == 0, told
    assert "4 of 5: done already: fine-tuning" in told and "-> " in answer
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("stopped", "whole"))
    assert ours.keys() == theirs.keys() and all(np.array_equal(ours[name], theirs[name]) for name in ours)
    assert (tmp_path / "stopped" / "recipe.toml").read_text() == (tmp_path / "whole" / "recipe.toml").read_text()


@pytest.mark.processes
def test_another_recipe_does_not_continue_a_stopped_job_unless_it_is_told_to(tmp_path, models, texts, recipe):
    folder = shutil.copytree(models["bert"], tmp_path / "model")
    options = ["--recipe", recipe, "--encoder", folder, "--texts", texts, *OPTIONS]
    process = Command("compress", *options, "--output", tmp_path / "small")
    kill_when_there(process, tmp_path / "small.stages" / "3-slimmed" / "config.json")
    other = [*options, "--output", tmp_path / "small", "--narrow", 0.5]
    refused = run(*other)
    assert refused.exit_code == 1
    assert "is of another job: slim was {'narrow': 0.25} there and is {'narrow': 0.5} now" in refused.output
    weights = load_file(folder / "model.safetensors")
    save_file({name: 2 * tensor for name, tensor in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    changed = run(*options, "--output", tmp_path / "small")
    assert changed.exit_code == 1 and "is of another job: " in changed.output
    again = run(*other, "--restart")
    assert again.exit_code == 0, again.output
    assert sum(read_json(tmp_path / "small" / "config.json")["mlp_widths"]) == UNITS // 2


@pytest.mark.processes
def test_other_settings_after_a_stop_cost_only_the_stages_that_depend_on_them(tmp_path, models, texts, recipe):
    options = ["--recipe", recipe, "--encoder", models["bert"], "--texts", texts, *OPTIONS]
    options += ["--output", tmp_path / "small"]
    stages = tmp_path / "small.stages"
    process = Command("compress", *options, "--max-steps", 400)
    kill_when_there(process, stages / "4-tuned.training" / "checkpoint-1" / "trainer_state.json")

    def written(name):
        return (stages / name / "model.safetensors").stat().st_mtime_ns

    dropped, slimmed = written("2-dropped"), written("3-slimmed")
    other = [*options, "--learning-rate", 1e-3]
    refused = run(*other)
    assert refused.exit_code == 1 and "finetune was {" in refused.output and "discards what depends" in refused.output
    done = run(*other, "--restart")
    assert done.exit_code == 0, done.output
    assert (written("2-dropped"), written("3-slimmed")) == (dropped, slimmed)
    shutil.rmtree(tmp_path / "small")
    done = run(*other, "--narrow", 0.5, "--restart")
    assert done.exit_code == 0, done.output
    assert written("2-dropped") == dropped and written("3-slimmed") != slimmed
    shutil.rmtree(tmp_path / "small")
    done = run(*other, "--narrow", 0.5, "--restart")  # of the same settings: all
    assert done.exit_code == 0, done.output
    assert written("2-dropped") != dropped


def test_a_job_of_before_there_was_a_setting_goes_on(tmp_path, models, texts, recipe):
    options = ["--recipe", recipe, "--encoder", models["bert"], "--texts", texts, *OPTIONS]
    options += ["--output", tmp_path / "small"]
    assert run(*options).exit_code == 0
    shutil.rmtree(tmp_path / "small")
    file = tmp_path / "small.stages" / "settings.json"
    settings = read_json(file)
    del settings["stock_architecture"], settings["finetune"]["dev_remove_query"]
    file.write_text(json.dumps(settings))
    written = (tmp_path / "small.stages" / "4-tuned" / "model.safetensors").stat().st_mtime_ns
    refused = run(*options, "--dev-remove-query", "--dev", tmp_path)
    assert refused.exit_code == 1 and not (tmp_path / "small").exists()
    again = run(*options)
    assert again.exit_code == 0, again.output
    assert (tmp_path / "small.stages" / "4-tuned" / "model.safetensors").stat().st_mtime_ns == written


@pytest.mark.parametrize(
    ("changed", "kept"),
    [
        (["finetune"], ["1-analysis", "calibration.jsonl", "2-dropped", "3-slimmed", "3-slimmed.slimming"]),
        (["slim"], ["1-analysis", "calibration.jsonl", "2-dropped"]),
        (["loss", "finetune"], ["1-analysis", "calibration.jsonl", "2-dropped"]),
        (["prune"], []),
        (["data"], []),
        (["finetune", "seed"], []),
    ],
)
def test_what_stages_before_the_first_that_depends_on_a_change_have_left_is_kept(tmp_path, changed, kept):
    (tmp_path / "3-slimmed.slimming").mkdir()
    (tmp_path / "4-tuned.training").mkdir()
    assert unchanged_names(changed, tmp_path) == kept


def test_settings_that_stages_depend_on_are_those_that_a_job_records(tmp_path, models, texts):
    given = {"encoder": str(models["bert"]), "data": {"texts": [str(texts)]}}
    recorded = job_settings(with_numbers(as_compression(given)), {})
    assert {name for stage in STAGES for name in stage.depends_on} <= recorded.keys()
    assert [stage.name[0] for stage in STAGES] == ["1", "2", "3", "4", "5"]


def test_a_recipe_may_say_where_to(tmp_path, models, texts, recipe, monkeypatch):
    monkeypatch.chdir(tmp_path)
    told = tmp_path / "told.toml"
    told.write_text(f'output = "models/small"\nencoder = "{models["bert"]}"\n' + recipe.read_text())
    given = ["--recipe", told, "--texts", texts, *OPTIONS]
    assert run(*given).exit_code == 0
    assert "output" not in read_recipe(tmp_path / "models" / "small" / "recipe.toml")
    assert run(*given, "--output", "elsewhere").exit_code == 0 and (tmp_path / "elsewhere").is_dir()
    nowhere = run("--recipe", recipe, "--encoder", models["bert"], "--texts", texts)
    assert nowhere.exit_code == 2 and "where to? give --output, or output in the recipe" in nowhere.output


def test_the_teachers_scores_are_made_as_the_recipe_reads_texts(tmp_path, models):
    text = {"pooling": "cls", "append_eos": True, "normalize": True, "query_prompt": "hot "}
    model = save_model(tmp_path / "model", "llama")
    example = {"query": "hot soup", "positives": ["tomato soup"], "negatives": ["red car"]}
    train = write_jsonl(tmp_path / "train.jsonl", [example] * 16)
    given = {"encoder": str(model), "data": {"train": str(train), "teacher": str(model)}, "text": text}
    given |= {"slim": {"narrow": 0.25, "criterion": "taylor", "steps": 1}}
    given |= {"finetune": {"max_steps": 1, "batch_size": 4}, "prune": {"num_texts": 4}}
    compress(as_compression(given), tmp_path / "small", device="cpu")
    encoder = Encoder.from_pretrained(model, device="cpu", dtype="fp32", **text)
    pairs = [("hot soup", "tomato soup"), ("hot soup", "red car")]
    line = (tmp_path / "small.stages" / "data" / "examples.jsonl").read_text().splitlines()[0]
    assert json.loads(line)["scores"] == pytest.approx(bi_encoder_scores(encoder, pairs), abs=0.02)


@pytest.mark.processes
def test_what_is_evaluated_may_change_after_a_stop(tmp_path, models, texts, recipe, collection):
    other = shutil.copytree(collection, tmp_path / "other")
    options = ["--recipe", recipe, "--encoder", models["bert"], "--texts", texts, *OPTIONS]
    process = Command(
        "compress", *options, "--evaluate", collection, "--evaluate", other, "--output", tmp_path / "small"
    )
    stages = tmp_path / "small.stages"
    kill_when_there(process, stages / "5-evaluation" / "other-full.trec")
    kept = stages / "5-evaluation" / f"{collection.name}-full.trec"
    written = kept.stat().st_mtime_ns
    # The one that stays is not searched again; of the other, which has one topic less, both runs are made anew.
    rows = (other / "qrels" / "test.tsv").read_text().splitlines(keepends=True)
    (other / "qrels" / "test.tsv").write_text("".join(row for row in rows if not row.startswith("2\t")))
    result = run(*options, "--evaluate", other, "--evaluate", collection, "--output", tmp_path / "small")
    assert result.exit_code == 0, result.output
    assert kept.stat().st_mtime_ns == written
    assert {line.split()[0] for line in (stages / "5-evaluation" / "other-full.trec").open()} == {"1", "007"}
    measured = read_json(tmp_path / "small" / "benchmark.json")
    assert measured["queries"] == {"other": 2, collection.name: 3}


def test_depth_alone_and_width_alone(tmp_path, models, texts, recipe):
    given = ["--recipe", recipe, "--encoder", models["bert"], "--texts", texts, *OPTIONS]
    assert run(*given, "--narrow", 0, "--output", tmp_path / "deep").exit_code == 0
    assert not (tmp_path / "deep.stages" / "3-slimmed").exists()
    result = run(*given, "--drop-mlp", 0, "--output", tmp_path / "wide")
    assert result.exit_code == 0, result.output
    assert not (tmp_path / "wide.stages" / "2-dropped").exists()
    assert sum(read_json(tmp_path / "wide" / "config.json")["mlp_widths"]) == 4 * 48 * 3 // 4


@pytest.mark.processes
def test_processes_of_a_launcher_share_the_training_and_nothing_else(tmp_path, models, texts, recipe):
    options = ["--recipe", recipe, "--encoder", models["bert"], "--texts", texts, *OPTIONS]
    two = torchrun("compress", *options, "--output", tmp_path / "two")
    answer, told = two.communicate()
    assert two.returncode == 0, told
    assert answer.count("-> ") == 1 and told.count("1 of 5: ") == 1
    assert read_json(tmp_path / "two" / "training.json")["processes"] == 2
    one = Command("compress", *options, "--output", tmp_path / "one")
    _, told = one.communicate()
    assert one.returncode == 0, told
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("two", "one"))
    for name in (name for name in theirs if not name.endswith("key.bias")):  # see test_finetune.py
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-3, atol=1e-4, err_msg=name)


def test_the_model_that_is_imitated_reads_texts_as_the_recipe_says(tmp_path, models, texts, recipe):
    given = read_recipe(recipe)
    text = {"pooling": "mean", "append_eos": True, "normalize": True, "query_prompt": "hot "}
    given |= {"encoder": str(models["llama"]), "data": {"texts": [str(texts)]}, "text": text, "slim": {"narrow": 0.0}}
    given["finetune"] |= {"max_steps": 1}
    compress(as_compression(merged(given, {"prune": {"drop_mlp": 1}})), tmp_path / "small", device="cpu")
    # Only of a teacher that reads the same tokens and pools their mean are tokens' states matched.
    assert read_json(tmp_path / "small" / "training.json")["losses"]["token_weight"] == 1


def test_the_plan_is_the_whole_recipe_and_its_sizes(tmp_path, models):
    result = run("--encoder", models["mistral"], "--texts", "no-file.jsonl", "--output", tmp_path / "small", "--plan")
    assert result.exit_code == 0, result.output
    recipe, sizes = result.output.split("\n\n  ")
    (tmp_path / "plan.toml").write_text(recipe)
    assert as_compression(read_recipe(tmp_path / "plan.toml")).prune.drop_mlp == 2
    # 4 MLPs of 3 matrices of 32 x 48; of them 2 MLPs stay, with 48 - round(14.4) units.
    assert f"{4 * 3 * 32 * 48:,}" in sizes and f"{2 * 3 * 32 * 34:,}" in sizes
    assert not (tmp_path / "small.stages").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        (["--evaluate", "{tmp}"], "has no corpus.jsonl, which a BEIR folder has"),
        (["--evaluate", "{collection}", "--evaluate", "{collection}"], "two collections to evaluate on have this name"),
        (["--drop-mlp", 5], "5 MLPs cannot be dropped; there are 4"),
        (["--narrow", 0.97], "lower --narrow or --floor"),
        (["--drop-mlp", 0, "--unit-criterion", "taylor"], "--unit-criterion taylor: nothing is dropped"),
        (["--recipe", "{tmp}/lora.toml"], "--lora-alpha and --lora-dropout go with LoRA"),
        (["--device", "cuda:99"], "--device cuda:99: this torch ("),
        (["--dev", "{tmp}"], "--dev takes a BEIR folder"),
        (["--reranker", "x"], "--reranker scores the candidates of --train examples"),
        (["--recipe", "{tmp}/missing.toml"], "missing.toml: No such file"),
    ],
)
def test_bad_options_end_in_one_line(tmp_path, models, texts, collection, options, message):
    (tmp_path / "lora.toml").write_text("[finetune]\nlora_alpha = 16\n")
    given = [str(option).format(tmp=tmp_path, collection=collection) for option in options]
    result = run("--encoder", models["bert"], "--texts", texts, "--output", tmp_path / "small", *given)
    assert result.exit_code == 1
    assert message in result.output and len(result.output.strip().splitlines()[-1]) < 310
    assert not (tmp_path / "small.stages").exists()
