"""``effir compress --native``: models of their family's own class."""

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import QUERIES, TEXTS, save_model, save_sentence_files
from sentence_transformers import SentenceTransformer
from transformers import AutoConfig, AutoModel

from effir_search.cli import cli as command
from effir_search.compression.native import with_native_numbers
from effir_search.compression.recipe import as_compression
from effir_search.encoding.encoder import Encoder
from effir_search.pruning.choose_units import choose_units
from effir_search.pruning.dropping_order import RankedPart
from effir_search.pruning.prune import Measurement

OPTIONS = ["--max-steps", 4, "--batch-size", 8, "--device", "cpu"]


def run(*arguments):
    return CliRunner().invoke(command, ["compress", "--native", *map(str, arguments)])


@pytest.mark.parametrize("family", ["bert", "llama", "gemma3"])
def test_the_model_is_a_stock_one_and_encodes_as_the_one_that_was_tuned(tmp_path, texts, short, family):
    encoder = save_sentence_files(save_model(tmp_path / family, family))
    output = tmp_path / "small"
    arguments = ["--encoder", encoder, "--texts", texts, "--recipe", short, "--output", output, *OPTIONS]
    result = run(*arguments, "--narrow", 0.3)
    assert result.exit_code == 0, result.output
    config = AutoConfig.from_pretrained(output)  # without code of ours, and without leave to run any
    # A third of four layers is one; 0.7 * 48 units are 33.6, of which 32 is the nearest multiple of 16.
    assert (config.num_hidden_layers, config.intermediate_size) == (3, 32)
    assert type(AutoModel.from_pretrained(output)) is type(AutoModel.from_pretrained(encoder))
    assert not list(output.glob("*.py")) and "trust_remote_code" not in (output / "README.md").read_text()
    assert "of 3 layers whose MLPs have 32 units" in (output / "README.md").read_text()
    plan = json.loads((output / "plan.json").read_text())
    assert [set(step) & {"block", "widths"} for step in plan] == [{"block"}, {"widths"}]
    vectors = Encoder.from_pretrained(output, dtype="fp32", device="cpu").encode_documents(TEXTS)
    tuned = Encoder.from_pretrained(tmp_path / "small.stages" / "4-tuned", dtype="fp32", device="cpu")
    np.testing.assert_allclose(vectors, tuned.encode_documents(TEXTS), atol=1e-5)
    theirs = SentenceTransformer(str(output), device="cpu").encode_query(QUERIES)
    np.testing.assert_allclose(tuned.encode_queries(QUERIES), theirs, atol=1e-5)
    # The recipe beside the model makes it again.
    again = run("--recipe", output / "recipe.toml", "--output", tmp_path / "again", "--device", "cpu")
    assert again.exit_code == 0, again.output
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("small", "again")]
    assert weights[0] == weights[1]


def test_the_plan_has_the_sizes_of_the_stock_model(tmp_path, bert_folder):
    result = run("--encoder", bert_folder, "--texts", "none.jsonl", "--output", tmp_path / "small", "--plan")
    assert result.exit_code == 0, result.output
    # Two matrices of 32 x 48, or 32, and their biases in each of 4 layers, or 3.
    full, small = 4 * (2 * 32 * 48 + 48 + 32), 3 * (2 * 32 * 32 + 32 + 32)
    assert f"{full:,}" in result.output and f"{small:,}" in result.output
    assert "a plain bert of 3 layers whose MLPs have 32 units" in result.output


def shares(compression):
    return {"share": compression.slim.narrow, "floor": compression.slim.floor}


@pytest.mark.parametrize("width", [1152, 1536, 2304, 3072, 8960, 11008, 14336])
def test_every_share_of_every_width_gives_one_width(bert_folder, width):
    config = AutoConfig.from_pretrained(bert_folder)
    config.intermediate_size = width
    scores = {layer_idx: torch.arange(float(width)) for layer_idx in range(2)}
    for percent in range(1, 100):
        given = {"encoder": "x", "data": {"texts": ["x"]}, "native": True, "slim": {"narrow": percent / 100}}
        compression = with_native_numbers(as_compression(given), config)
        if compression.slim.narrow:
            first, second = (int(mask.sum()) for mask in choose_units(scores, **shares(compression)).values())
            assert first == second and first % 16 == 0 and abs(first - width * (1 - percent / 100)) <= 16


@pytest.mark.parametrize(
    "width, narrow, units", [(1536, 0.3, 1072), (1536, 0.5, 768), (3072, 0.999, 16), (48, 0.1, 48)]
)
def test_widths_are_multiples_of_16_and_the_numbers_of_a_recipe_that_has_them_stay(bert_folder, width, narrow, units):
    config = AutoConfig.from_pretrained(bert_folder)
    config.intermediate_size = width
    given = {"encoder": "x", "data": {"texts": ["x"]}, "native": True, "slim": {"narrow": narrow}}
    compression = with_native_numbers(as_compression(given), config)
    masks = choose_units({layer_idx: torch.rand(width) for layer_idx in range(4)}, **shares(compression))
    assert [int(mask.sum()) for mask in masks.values()] == [units] * 4
    assert compression.prune.drop_block == 1 and compression.prune.drop_mlp == 0
    assert with_native_numbers(compression, config) == compression


@pytest.mark.parametrize("name", ["drop_mlp", "drop_block"])
def test_no_block_goes_where_the_recipe_says_so(bert_folder, name):
    given = {"encoder": "x", "data": {"texts": ["x"]}, "native": True, "prune": {name: 0}}
    compression = with_native_numbers(as_compression(given), AutoConfig.from_pretrained(bert_folder))
    assert compression.prune.drop_block == 0 and compression.slim.criterion == "activation"


@pytest.mark.parametrize(
    "options, message",
    [
        (["--drop-mlp", 2], "--native drops whole blocks: leave out --drop-mlp"),
        (["--drop-attention", 1], "--native drops whole blocks: leave out --drop-mlp"),
        (["--recipe", "floor = 0.2"], "--native cuts all MLPs to one width: leave out floor"),
        (["--recipe", "multiple = 8"], "--native cuts all MLPs to one width: leave out floor"),
        (["--target", "parameters=0.5"], "tries shapes of every kind; leave out --native"),
    ],
)
def test_other_shapes_are_refused(tmp_path, bert_folder, texts, options, message):
    if options[0] == "--recipe":
        (tmp_path / "slim.toml").write_text(f"[slim]\n{options[1]}\n")
        options = ["--recipe", tmp_path / "slim.toml"]
    result = run("--encoder", bert_folder, "--texts", texts, "--output", tmp_path / "small", *options)
    assert result.exit_code == 1 and message in result.output, result.output
    assert not (tmp_path / "small.stages").exists()


@pytest.mark.parametrize("more", [[], ["--plan"]])
def test_an_encoder_that_lacks_an_mlp_already_is_refused_at_once(tmp_path, bert_folder, texts, more):
    pruning = ["prune", "--encoder", bert_folder, "--drop-mlp-layers", 1, "--output", tmp_path / "pruned"]
    assert CliRunner().invoke(command, [*map(str, pruning)]).exit_code == 0
    result = run("--encoder", tmp_path / "pruned", "--texts", texts, "--output", tmp_path / "small", *more)
    assert result.exit_code == 1 and "layer 1 has no MLP, which the class of a bert always has" in result.output
    assert not (tmp_path / "small.stages").exists()


def test_a_shape_that_the_class_lacks_ends_the_job_before_anything_is_learned(tmp_path, texts, short, monkeypatch):
    encoder = save_sentence_files(save_model(tmp_path / "modernbert", "modernbert"))
    monkeypatch.setattr(Measurement, "order", lambda *_args, **_options: [RankedPart(0, 0.1)])
    arguments = ["--encoder", encoder, "--texts", texts, "--recipe", short, "--output", tmp_path / "small", *OPTIONS]
    result = run(*arguments)
    assert result.exit_code == 1 and "the first layer of a modernbert" in result.output
    assert not (tmp_path / "small.stages" / "3-slimmed").exists()
