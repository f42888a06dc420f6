import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import PRUNABLE, save_model, save_sentence_files
from transformers import AutoModel

from effir_search.cli import cli
from effir_search.encoding.encoder import Encoder
from effir_search.files.reading import file_sha256
from effir_search.model.surgery import prune
from effir_search.pruning.analyze import analyze
from effir_search.pruning.calibration import sample_texts
from effir_search.pruning.dropping_order import CRITERIA
from effir_search.pruning.prune import prune_encoder
from effir_search.settings import EncoderOptions

TEXTS = ["the cat eats fish", "tea", "", "the dog sleeps in the warm kitchen"]


@pytest.fixture(scope="module")
def sources(collection):
    return [str(collection / "corpus.jsonl"), str(collection / "queries.jsonl")]


def vectors(folder):
    return Encoder.from_pretrained(folder, dtype="fp32").encode_documents(TEXTS)


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def pruned_by_hand(folder, **parts):
    encoder = Encoder.from_pretrained(folder, dtype="fp32")
    encoder = encoder.with_model(prune(encoder.model, **parts))
    return encoder.encode_documents(TEXTS)


@pytest.mark.parametrize("family", PRUNABLE)
def test_named_layers_are_dropped_and_nothing_else(tmp_path, family):
    folder = save_sentence_files(save_model(tmp_path / "full", family))
    pruned = prune_encoder(
        str(folder), tmp_path / "pruned", numbers={}, layers={"mlp": [3, 0], "attention": [2], "block": [1]}
    )
    assert np.array_equal(vectors(tmp_path / "pruned"), pruned_by_hand(folder, mlp=[0, 3], attention=[2], block=[1]))
    assert config_of(tmp_path / "pruned")["mlp_widths"] == [0, 0, 48, 0]
    assert config_of(tmp_path / "pruned")["dropped_attention"] == [1, 2]
    assert pruned.cosine is None and pruned.after["parameters"] < pruned.before["parameters"]


@pytest.mark.parametrize("criterion", CRITERIA)
def test_the_least_important_are_dropped_and_the_plan_says_why(tmp_path, bert_folder, sources, criterion):
    options = {"criterion": criterion, "sources": sources, "size": 9, "seed": 4}
    pruned = prune_encoder(str(bert_folder), tmp_path / "pruned", numbers={"mlp": 2}, layers={}, **options)

    encoder = Encoder.from_pretrained(bert_folder, dtype="fp32")
    calibration = sample_texts(sources, size=9, seed=4)
    order = CRITERIA[criterion](encoder, encoder.tokenize(calibration.texts), ["mlp"], None)["mlp"]
    chosen = sorted(part.layer_idx for part in order[:2])
    assert np.array_equal(vectors(tmp_path / "pruned"), pruned_by_hand(bert_folder, mlp=chosen))
    assert pruned.dropped == {"mlp": order[:2]}
    scored = order[:2] if criterion == "greedy" else order
    config = config_of(tmp_path / "pruned")
    assert config["plan"] == [
        {
            "mlp": chosen,
            "model_sha256": file_sha256(bert_folder / "model.safetensors"),
            "criterion": criterion,
            "scores": {str(layer_idx): score for layer_idx, score in sorted(scored)},
            "calibration": calibration.record(encoder.config.max_length),
        }
    ]
    assert config["base_model"] == bert_folder.name
    assert str(bert_folder) not in (tmp_path / "pruned" / "config.json").read_text()


def test_the_length_that_is_measured_on_is_recorded_and_not_that_of_the_model(tmp_path, bert_folder, sources):
    own = Encoder.from_pretrained(bert_folder).config.max_length
    arguments = ["prune", "--encoder", bert_folder, "--drop-mlp", 1, "--texts", sources[0], "--max-length", 4]
    result = CliRunner().invoke(cli, [str(a) for a in (*arguments, "--output", tmp_path / "small")])
    assert result.exit_code == 0, result.output
    assert config_of(tmp_path / "small")["plan"][0]["calibration"]["max_length"] == 4 < own
    assert Encoder.from_pretrained(tmp_path / "small").config.max_length == own


def test_texts_become_vectors_as_the_options_say_and_the_saved_model_keeps_that(tmp_path, llama_folder, sources):
    arguments = ["prune", "--encoder", llama_folder, "--drop-mlp", 1, "--texts", sources[0], "--criterion", "embedding"]
    arguments += ["--pooling", "mean", "--append-eos", "--normalize", "--query-prompt", "hot ", "--max-length", 9]
    arguments += ["--document-prompt", "the ", "--output", tmp_path / "small"]
    result = CliRunner().invoke(cli, list(map(str, arguments)))
    assert result.exit_code == 0, result.output
    options = {"pooling": "mean", "normalize": True, "query_prompt": "hot ", "document_prompt": "the "}
    encoder = Encoder.from_pretrained(llama_folder, dtype="fp32", append_eos=True, max_length=9, **options)
    tokens = encoder.tokenize(sample_texts(sources[:1]).texts, prompt="the ")
    expected = CRITERIA["embedding"](encoder, tokens, ["mlp"], None)["mlp"]
    assert config_of(tmp_path / "small")["plan"][0]["scores"] == {str(i): score for i, score in sorted(expected)}
    saved = Encoder.from_pretrained(tmp_path / "small", dtype="fp32")
    assert {name: getattr(saved.config, name) for name in options} == options
    assert saved.tokenize(["tea"]).input_ids[0][-1] == saved.tokenizer.eos_token_id
    assert saved.config.max_length == Encoder.from_pretrained(llama_folder).config.max_length


@pytest.fixture(scope="module")
def analysis(tmp_path_factory, llama_folder, sources):
    report = tmp_path_factory.mktemp("analysis") / "analysis"
    options = {"sources": sources, "size": 9, "criteria": ["cosine", "embedding", "greedy"]}
    options |= {"options": EncoderOptions(pooling="mean")}
    analyze(str(llama_folder), report, greedy_numbers={"mlp": 2}, **options)
    return report


@pytest.mark.parametrize("criterion", CRITERIA)
def test_what_an_analysis_measured_is_used_and_gives_the_same_model(
    tmp_path, llama_folder, sources, analysis, criterion, caplog
):
    numbers = {"mlp": 2, "attention": 1}  # attentions are measured on what is left then
    options = {"numbers": numbers, "layers": {}, "criterion": criterion, "sources": sources, "size": 9}
    prune_encoder(str(llama_folder), tmp_path / "measured", options=EncoderOptions(pooling="mean"), **options)
    caplog.clear()
    with caplog.at_level("INFO"):
        prune_encoder(
            str(llama_folder), tmp_path / "known", options=EncoderOptions(pooling="mean"), analysis=analysis, **options
        )
    assert [message.startswith("measuring on 7 texts") for message in caplog.messages] == [True]  # the attentions
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "known" / name).read_bytes() == (tmp_path / "measured" / name).read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 6}, "analysis.json is of another calibration, so importance is measured"),
        ({"seed": 1}, "is of another calibration"),
        ({"options": EncoderOptions(pooling="last")}, "is of another encoder"),
        ({"options": EncoderOptions(pooling="mean", max_length=5)}, "is of another encoder"),
        ({"criterion": "greedy", "numbers": {"mlp": 3}}, "does not order 3 MLPs by greedy"),
        ({"criterion": "greedy", "numbers": {"block": 1}}, "does not order 1 block by greedy"),
    ],
)
def test_an_analysis_of_anything_else_is_not_used_and_that_is_said(
    tmp_path, llama_folder, sources, analysis, options, message, caplog
):
    reading = EncoderOptions(pooling="mean")
    options = {"numbers": {"mlp": 2}, "layers": {}, "sources": sources, "size": 9, "options": reading, **options}
    with caplog.at_level("INFO"):
        prune_encoder(str(llama_folder), tmp_path / "small", analysis=analysis, **options)
    assert any(message in line for line in caplog.messages)
    prune_encoder(str(llama_folder), tmp_path / "measured", **options)
    assert config_of(tmp_path / "small") == config_of(tmp_path / "measured")


def test_an_analysis_of_other_weights_is_not_used(tmp_path, bert_folder, sources, analysis, caplog):
    options = {"numbers": {"mlp": 2}, "layers": {}, "sources": sources, "size": 9, "analysis": analysis}
    with caplog.at_level("INFO"):
        prune_encoder(str(bert_folder), tmp_path / "small", **options)
    assert any("is of another model_sha256, so importance is measured" in line for line in caplog.messages)


@pytest.mark.parametrize(("length", "message"), [(500, "the model takes at most 96"), (1, "leave no room for text")])
def test_a_length_that_the_model_cannot_read_is_an_error(tmp_path, bert_folder, sources, length, message):
    options = {"layers": {}, "sources": sources, "options": EncoderOptions(max_length=length)}
    with pytest.raises(ValueError, match=f"--max-length {length}: .*{message}"):
        prune_encoder(str(bert_folder), tmp_path / "small", numbers={"mlp": 1}, **options)
    assert not (tmp_path / "small").exists()


def test_the_cosine_told_is_that_of_the_saved_model_s_embeddings(tmp_path, bert_folder, sources):
    pruned = prune_encoder(str(bert_folder), tmp_path / "pruned", numbers={"mlp": 2}, layers={}, sources=sources)
    texts = sample_texts(sources).texts
    before, after = (
        Encoder.from_pretrained(f, dtype="fp32").encode(texts).embeddings for f in (bert_folder, tmp_path / "pruned")
    )
    assert pruned.cosine == pytest.approx((before * after).sum(axis=1).mean(), abs=1e-6)
    assert pruned.cosine < 0.999


def test_kinds_are_dropped_one_after_the_other_each_measured_on_what_is_left(tmp_path, llama_folder, sources):
    options = {"criterion": "embedding", "sources": sources}
    prune_encoder(str(llama_folder), tmp_path / "at once", numbers={"mlp": 1, "block": 1}, layers={}, **options)
    prune_encoder(str(llama_folder), tmp_path / "first", numbers={"block": 1}, layers={}, **options)
    prune_encoder(str(tmp_path / "first"), tmp_path / "second", numbers={"mlp": 1}, layers={}, **options)
    assert np.array_equal(vectors(tmp_path / "at once"), vectors(tmp_path / "second"))


def test_pruning_a_pruned_folder_composes_and_keeps_the_numbers_and_the_plans(tmp_path, bert_folder, sources):
    prune_encoder(str(bert_folder), tmp_path / "a", numbers={}, layers={"block": [0]})
    prune_encoder(str(tmp_path / "a"), tmp_path / "b", numbers={"mlp": 1}, layers={}, sources=sources)
    prune_encoder(str(tmp_path / "b"), tmp_path / "c", numbers={}, layers={"attention": [3]})
    config = config_of(tmp_path / "c")
    (mlp,) = config["plan"][1]["mlp"]
    assert mlp in (1, 2, 3) and [set(step) & {"block", "mlp", "attention"} for step in config["plan"]] == [
        {"block"},
        {"mlp"},
        {"attention"},
    ]
    assert set(config["plan"][1]["scores"]) == {"1", "2", "3"}
    assert config["base_model"] == bert_folder.name
    assert np.array_equal(vectors(tmp_path / "c"), pruned_by_hand(bert_folder, block=[0], mlp=[mlp], attention=[3]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_dtype_of_the_weights_stays(tmp_path, bert_folder, dtype):
    save_sentence_files(save_model(tmp_path / "full", "bert"))
    AutoModel.from_pretrained(tmp_path / "full", dtype=dtype).save_pretrained(tmp_path / "full")
    prune_encoder(str(tmp_path / "full"), tmp_path / "pruned", numbers={}, layers={"mlp": [1]})
    assert AutoModel.from_pretrained(tmp_path / "pruned", dtype="auto").dtype == dtype


@pytest.mark.parametrize(
    ("numbers", "layers", "message"),
    [
        ({}, {}, "nothing to drop: give --drop-mlp N"),
        ({"mlp": 0}, {}, "nothing to drop"),
        ({"mlp": 1}, {"mlp": [2]}, "--drop-mlp and --drop-mlp-layers: give a number or the layers, not both"),
        ({"mlp": 5}, {}, "5 MLPs cannot be dropped; there are 4"),
        ({"block": 2, "attention": 3}, {}, "3 attentions cannot be dropped; there are 2"),
        ({"block": 4}, {}, "only embeddings"),
        ({"attention": 4}, {"mlp": [0, 1, 2, 3]}, "only embeddings"),
        ({}, {"block": [0, 1, 2], "mlp": [3], "attention": [3]}, "only embeddings"),
        ({}, {"mlp": [4]}, "there is no layer 4; layers are 0 to 3"),
        ({}, {"attention": [-1]}, "there is no layer -1"),
    ],
)
def test_what_cannot_be_dropped_is_an_error_and_nothing_is_written(
    tmp_path, bert_folder, sources, numbers, layers, message
):
    with pytest.raises(ValueError, match=message):
        prune_encoder(str(bert_folder), tmp_path / "out", numbers=numbers, layers=layers, sources=sources)
    assert not list(tmp_path.iterdir())


def test_numbers_need_texts_and_an_existing_folder_stays(tmp_path, bert_folder):
    with pytest.raises(ValueError, match="--texts is needed"):
        prune_encoder(str(bert_folder), tmp_path / "out", numbers={"mlp": 1}, layers={})
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    with pytest.raises(FileExistsError, match="exists already"):
        prune_encoder(str(bert_folder), tmp_path / "out", numbers={}, layers={"mlp": [1]})
    assert (tmp_path / "out" / "mine").read_text() == "mine"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-length", 8], "--max-length goes with --texts, and changes nothing in the saved model"),
        (["--num-texts", 8], "--num-texts goes with --texts"),
        (["--seed", 8], "--seed goes with --texts"),
        (["--criterion", "greedy"], "--criterion goes with a number of parts, such as --drop-mlp 2"),
    ],
)
def test_an_option_that_would_be_ignored_is_an_error(tmp_path, bert_folder, options, message):
    arguments = ["prune", "--encoder", bert_folder, "--drop-mlp-layers", 3, "--output", tmp_path / "small", *options]
    refused = CliRunner().invoke(cli, list(map(str, arguments)))
    assert refused.exit_code == 2 and message in refused.output
    assert not (tmp_path / "small").exists()


def test_other_families_are_an_error_that_names_the_ones_there_are(tmp_path):
    (save_model(tmp_path / "t5", "t5") / "model.safetensors").unlink()  # the type is told before what else is wrong
    with pytest.raises(ValueError, match="'t5' cannot be pruned; those that can: bert,"):
        prune_encoder(str(tmp_path / "t5"), tmp_path / "out", numbers={}, layers={"mlp": [1]})


def test_the_command_prunes_and_says_what_it_did(tmp_path, bert_folder, sources):
    arguments = [
        "prune",
        "--encoder",
        str(bert_folder),
        "--output",
        str(tmp_path / "small"),
        "--drop-attention-layers",
        "3",
    ]
    result = CliRunner().invoke(cli, [*arguments, "--drop-mlp", "2", "--texts", sources[0]])
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[0] == "attentions dropped: 3" and lines[1].startswith("MLPs dropped: ")
    assert lines[-1] == f"-> {tmp_path / 'small'}" and "mean cosine" in lines[-2]
    # Two of four MLPs of 32 * 48 + 48 + 48 * 32 + 32 = 3,152 parameters.
    (mlp,) = (line.split() for line in lines if line.startswith("mlp parameters"))
    assert mlp == ["mlp", "parameters", "12,608", "6,304", "50.0%"]

    refused = CliRunner().invoke(cli, [*arguments, "--drop-mlp-layers", "1,x"])
    assert refused.exit_code == 2 and "'1,x' is not a list of numbers such as" in refused.output
    again = CliRunner().invoke(cli, arguments)
    assert again.exit_code == 1 and again.output.startswith(f"Error: {tmp_path / 'small'}: exists already")
