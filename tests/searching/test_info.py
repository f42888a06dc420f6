import json

import pytest
from click.testing import CliRunner
from conftest import save_model
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from effir_search.cli import cli
from effir_search.encoding.encoder import Encoder
from effir_search.model.surgery import prune

MISTRAL_7B = {
    "architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000,
    "tie_word_embeddings": False, "dtype": "bfloat16",
}  # fmt: skip


def info(*arguments):
    result = CliRunner().invoke(cli, ["info", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.output


def error_of(*arguments):
    result = CliRunner().invoke(cli, ["info", *map(str, arguments)])
    assert result.exit_code == 1, result.output
    (line,) = result.output.splitlines()
    return line


@pytest.fixture
def mistral(tmp_path):
    path = tmp_path / "mistral-7b.json"
    path.write_text(json.dumps(MISTRAL_7B))
    return path


# The paper's table: parameters in billions, without LM head.
@pytest.mark.parametrize(
    ("plan", "billions"),
    [
        ([], 7.1),
        (["--drop-mlp", 16], 4.3),
        (["--drop-mlp", 20], 3.6),
        (["--drop-mlp", 24], 2.9),
        (["--drop-attention", 16], 6.4),
        (["--drop-block", 8], 5.4),
        (["--drop-mlp", 16, "--narrow", 0.3], 3.4),
    ],
)
def test_plans_of_mistral_7b_need_its_config_alone(mistral, plan, billions):
    facts = json.loads(info("--config", mistral, *plan, "--format", "json"))
    assert round(facts["pruned"]["parameters"] / 1e9, 1) == billions
    assert round(facts["full"]["parameters"] / 1e9, 1) == 7.1
    assert facts["pruned"]["weights_bytes"] == 2 * facts["pruned"]["parameters"]  # bfloat16
    # 2 * 32 * (41,943,040 + 176,160,768) a token in the linear layers, 4 * 256 * 4096 * 32 in the attentions.
    assert facts["full"]["flops_per_text"] == 256 * (2 * 32 * (41_943_040 + 176_160_768) + 4 * 256 * 4096 * 32)


def test_a_pooler_does_not_count_whether_or_not_the_model_was_pruned(tmp_path, bert_folder):
    encoder = Encoder.from_pretrained(bert_folder, dtype="fp32")
    assert encoder.model.pooler is not None
    encoder.model = prune(encoder.model, mlp=[1])
    encoder.save(tmp_path / "pruned")
    before, after = (json.loads(info(folder, "--format", "json")) for folder in (bert_folder, tmp_path / "pruned"))
    assert before["parameters"] == after["full"]["parameters"]


def test_a_plan_as_text_shows_both_sizes_and_the_share(mistral):
    lines = info("--config", mistral, "--drop-mlp", 16, "--narrow", 0.3, "--length", 100).splitlines()
    (mlp,) = (line.split() for line in lines if line.startswith("mlp parameters"))
    # 32 and 16 MLPs of 176,160,768 weights; 30 % of 14,336 units are 4,300.8, and round(14336 * 0.7) = 10,035 are left.
    assert mlp == ["mlp", "parameters", f"{32 * 176_160_768:,}", f"{16 * 3 * 4096 * 10_035:,}", "35.0%"]
    assert "text length  100" in lines and "plan         drop mlp 16, narrow 0.3" in lines


def test_a_pruned_model_says_what_it_lost(tmp_path, llama_folder):
    encoder = Encoder.from_pretrained(llama_folder, dtype="fp32")
    encoder.model = prune(
        encoder.model, mlp=[1], attention=[0, 2], record={"criterion": "cosine"}, base_model="org/name"
    )
    encoder.save(tmp_path / "pruned")
    facts = json.loads(info(tmp_path / "pruned", "--format", "json"))
    assert (facts["base_model"], facts["mlps_dropped"], facts["attentions_dropped"]) == ("org/name", [1], [0, 2])
    assert facts["criteria"] == ["cosine"] and facts["pruned"]["parameters"] == facts["parameters"]
    assert facts["pruned"]["mlp_parameters"] == 3 / 4 * facts["full"]["mlp_parameters"]
    text = info(tmp_path / "pruned")
    assert "mlps dropped" in text and "75.0%" in text

    more = json.loads(info(tmp_path / "pruned", "--drop-mlp", 1, "--format", "json"))
    assert more["pruned"]["mlp_parameters"] == 2 / 4 * facts["full"]["mlp_parameters"]
    assert more["mlps_dropped"] == [1] and more["plan"] == "besides, drop mlp 1"


def test_a_pruned_model_that_lacks_a_tensor_is_one_line(tmp_path, bert_folder):
    encoder = Encoder.from_pretrained(bert_folder, dtype="fp32")
    encoder.model = prune(encoder.model, mlp=[1])
    encoder.save(tmp_path / "pruned")
    tensors = load_file(tmp_path / "pruned" / "model.safetensors")
    name = "model.encoder.layer.3.attention.output.LayerNorm.bias"
    del tensors[name]
    save_file(tensors, tmp_path / "pruned" / "model.safetensors", {"format": "pt"})
    assert error_of(tmp_path / "pruned").endswith(f"the weights do not fit config.json: no tensor {name}")


@pytest.mark.parametrize(("left", "complaint"), [(-1, "bytes and its header says"), (100, "header"), (5, "header")])
@pytest.mark.parametrize("shard_size", ["1GB", "20KB"])
def test_cut_weights_are_one_line_that_names_the_file(tmp_path, shard_size, left, complaint):
    folder = save_model(tmp_path / "model", "bert")
    model = AutoModel.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size=shard_size)
    last = sorted(folder.glob("*.safetensors"))[-1]
    assert (last.name == "model.safetensors") == (shard_size == "1GB")
    info(folder)
    last.write_bytes(last.read_bytes()[:left])
    error = error_of(folder)
    assert error.startswith(f"Error: {last}: cut or damaged, ") and complaint in error


def test_a_missing_shard_is_one_line_that_names_it(tmp_path):
    folder = save_model(tmp_path / "model", "bert")
    AutoModel.from_pretrained(folder).save_pretrained(folder, max_shard_size="20KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    first = sorted(folder.glob("model-*.safetensors"))[0]
    first.unlink()
    assert error_of(folder) == f"Error: {first}: No such file or directory"


def test_a_model_that_cannot_be_pruned_is_described_all_the_same(tmp_path):
    save_model(tmp_path, "t5")
    assert "model type" in info(tmp_path) and "flops" not in info(tmp_path)
    assert "'t5' cannot be pruned; those that can: bert," in error_of(tmp_path, "--drop-mlp", 1)


def test_wrong_questions_are_one_line(tmp_path, mistral, toy_index, bert_folder):
    assert "give a model, an index, or --config" in error_of()
    assert error_of(bert_folder, "--config", mistral).endswith(f"--config {mistral}, not both")
    assert "is an index; a plan is for a model" in error_of(toy_index, "--drop-mlp", 1)
    assert "40 MLPs cannot be dropped; there are 32" in error_of("--config", mistral, "--drop-mlp", 40)
    assert "nowhere.json: No such file" in error_of("--config", tmp_path / "nowhere.json")
    mistral.write_text('{"hidden_size": 3}')
    assert "no model_type" in error_of("--config", mistral)
    mistral.write_text('{"model_type": "unheard-of"}')
    assert "unheard-of" in error_of("--config", mistral)


def test_a_t5_encoder_is_counted_without_a_decoder_and_its_shared_table_once(tmp_path):
    folder = save_model(tmp_path, "t5", model_max_length=int(1e30))
    config = json.loads((folder / "config.json").read_text())
    for whole in (True, False):
        (folder / "config.json").write_text(json.dumps(config | {"is_encoder_decoder": whole}))
        told = json.loads(info(folder, "--format", "json"))
        # By layer q, k, v, o of 32 x 32, 2 matrices of 32 x 48, 2 norms of 32; a norm at the end.
        assert told["parameters_without_embeddings"] == 4 * (4 * 32 * 32 + 2 * 32 * 48 + 2 * 32) + 32
        # 70 tokens of 32, and 32 distances for each of 4 heads.
        assert told["parameters"] == told["parameters_without_embeddings"] + 70 * 32 + 32 * 4
        assert (told["architecture"], told["max_length"]) == ("T5EncoderModel", 512)
