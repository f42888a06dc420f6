import datetime
from pathlib import Path

import pytest
from transformers import MistralConfig

from effir_search.compression.defaults_without_labels import WITHOUT_LABELS, merged
from effir_search.compression.recipe import as_compression, format_recipe, read_recipe
from effir_search.model.arithmetic import count, empty_model, planned
from effir_search.pruning.dropping_order import CRITERIA
from effir_search.pruning.unit_scores import UNIT_CRITERIA
from effir_search.settings import CompressionSettings, DataSettings

RECIPES = Path(__file__).parents[2] / "docs" / "recipes"
LABELS = {"encoder": "model", "data": {"train": "train.jsonl"}}
TEXTS = {"encoder": "model", "data": {"texts": ["corpus.jsonl"]}}


@pytest.mark.parametrize("given", [LABELS, TEXTS])
def test_a_recipe_that_was_written_is_read_as_it_was(tmp_path, given):
    compression = as_compression(merged(given, {"max_length": 64, "seed": 3, "slim": {"narrow": 0.5}}))
    file = tmp_path / "recipe.toml"
    file.write_text(format_recipe(compression))
    assert as_compression(read_recipe(file)) == compression


def test_with_labels_the_defaults_are_the_papers():
    compression = as_compression(LABELS)
    assert compression == CompressionSettings("model", DataSettings(train="train.jsonl"))
    assert (compression.prune.criterion, compression.prune.num_texts) == ("cosine", 256)
    slim = compression.slim
    assert (slim.criterion, slim.steps, slim.penalty, slim.narrow) == ("gates", 500, 1e-8, 0.3)
    assert (compression.data.negatives, compression.finetune.epochs) == (7, 1)


def test_without_labels_the_encoder_is_its_own_teacher_and_what_is_given_comes_before_the_defaults():
    compression = as_compression(TEXTS)
    assert compression.data.teacher == "model"
    assert compression.prune.criterion == WITHOUT_LABELS["prune"]["criterion"]
    given = {"data": {"teacher": "other"}, "prune": {"criterion": "cosine"}, "finetune": {"max_steps": 7}}
    compression = as_compression(merged(TEXTS, given))
    assert (compression.data.teacher, compression.prune.criterion) == ("other", "cosine")
    assert compression.finetune.max_steps == 7


def test_gates_are_learned_for_as_many_steps_without_labels_as_with():
    given = {"slim": {"criterion": "gates"}}
    assert as_compression(merged(TEXTS, given)).slim.steps == as_compression(LABELS).slim.steps == 500
    assert as_compression(merged(TEXTS, given, {"slim": {"steps": 7}})).slim.steps == 7
    assert as_compression(TEXTS).slim.steps == WITHOUT_LABELS["slim"]["steps"]


def test_units_of_a_whole_model_that_imitates_itself_are_told_apart_by_what_they_write():
    whole = merged(TEXTS, {"prune": {"drop_mlp": 0}})
    assert as_compression(whole).slim.criterion == "activation"
    for given in ({"prune": {"drop_mlp": 0, "drop_attention": 1}}, {"data": {"teacher": "other"}}):
        assert as_compression(merged(whole, given)).slim.criterion == "taylor"
    assert as_compression(merged(whole, {"slim": {"criterion": "random"}})).slim.criterion == "random"


def test_the_encoders_folder_by_another_path_is_the_encoder(tmp_path, monkeypatch):
    for name in ("model", "other"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    for path in ("./model", str(tmp_path / "model"), "other/../model"):
        whole = {"encoder": "model", "data": {"texts": ["x"], "teacher": path}, "prune": {"drop_mlp": 0}}
        compression = as_compression(whole)
        assert compression.data.teacher == "model" and compression.slim.criterion == "activation"
    another = as_compression({"encoder": "model", "data": {"texts": ["x"], "teacher": "./other"}})
    assert another.data.teacher == "./other"


def test_a_seed_is_that_of_every_section():
    compression = as_compression(merged(LABELS, {"seed": 5}))
    assert {compression.seed, compression.slim.seed, compression.finetune.seed} == {5}


def test_later_settings_win_field_by_field():
    assert merged({"a": 1, "b": {"c": 1, "d": 1}}, {"b": {"d": 2}}, {"a": 3}) == {"a": 3, "b": {"c": 1, "d": 2}}


@pytest.mark.parametrize(
    "given, message",
    [
        ({"encodr": "x"}, "there is no 'encodr'; did you mean encoder?"),
        ({"slim": {"narow": 0.2}}, r"\[slim\]: there is no 'narow'; did you mean narrow?"),
        ({"slim": {"seed": 1}}, r"\[slim\]: there is no 'seed'"),
        ({"slim": {"narrow": 1.0}}, "slim.narrow: Input should be less than 1, found 1.0"),
        ({"slim": {"narrow": "0.3"}}, "slim.narrow: Input should be a valid number, found '0.3'"),
        ({"slim": {"criterion": "gate"}}, "slim.criterion: Input should be 'gates', .* found 'gate'"),
        ({"slim": 0.3}, r"slim must be a section, \[slim\]"),
        ({"prune": {"drop_mlp": -1}}, "prune.drop_mlp: .*greater than or equal to 0, found -1"),
        ({"finetune": {"schedule": "step"}}, "finetune.schedule: .* found 'step'"),
        ({"slim": {"batch_size": 0}}, "slim.batch_size: .*greater than or equal to 1, found 0"),
        ({"slim": {"penalty": float("nan")}}, "slim.penalty: .*finite"),
        ({"finetune": {"learning_rate": -1.0}}, "finetune.learning_rate: .*greater than 0, found -1"),
        ({"finetune": {"warmup": 7.0}}, "finetune.warmup: .*less than or equal to 1, found 7"),
        ({"loss": {"temperature": 0.0}}, "loss.temperature: .*greater than 0, found 0"),
        ({"data": {"num_texts": 0}}, "data.num_texts: .*greater than or equal to 1, found 0"),
        ({"max_length": datetime.date(2024, 1, 1)}, "max_length: Input should be a valid integer, found '2024-01-01'"),
        ({"data": {"texts": ["x"]}}, "data: give either --train"),
        ({"data": {"train": ["x"]}}, "data.train: Input should be a valid string"),
        ({"evaluate": {"collections": "x"}}, "evaluate.collections: must be a list, as in .*, found 'x'"),
    ],
)
def test_what_is_wrong_in_a_recipe_is_named(given, message):
    with pytest.raises(ValueError, match=f"^r.toml: {message}"):
        as_compression(merged(LABELS, given), where="r.toml")


def test_a_recipe_needs_an_encoder_and_data(tmp_path):
    with pytest.raises(ValueError, match="which encoder is compressed?"):
        as_compression({"data": LABELS["data"]})
    with pytest.raises(ValueError, match="nothing to learn from; give --train, or --texts"):
        as_compression({"encoder": "model"})
    (tmp_path / "r.toml").write_text("encoder = \n")
    with pytest.raises(ValueError, match="r.toml: is no TOML: .*line 1"):
        read_recipe(tmp_path / "r.toml")


def test_the_criteria_of_recipes_are_those_of_the_library():
    for section, table in (("prune", CRITERIA), ("slim", UNIT_CRITERIA)):
        for name in table:
            assert getattr(as_compression(merged(LABELS, {section: {"criterion": name}})), section).criterion == name


def test_the_recipe_for_mistral_7b_leads_to_the_papers_size():
    compression = as_compression(read_recipe(RECIPES / "mistral-7b-effir.toml"))
    left = planned(MistralConfig(), drop_mlp=compression.prune.drop_mlp, narrow=compression.slim.narrow)
    assert round(count(empty_model(left)).parameters / 1e9, 1) == 3.4
