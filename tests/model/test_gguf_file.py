import re
import sys

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import randomized, tiny_config
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from effir_search.cli import cli
from effir_search.encoding.encoder import Encoder
from effir_search.model.families import FAMILIES
from effir_search.model.gguf_file import LLAMA3, convert_gguf

gguf = pytest.importorskip("gguf")
Q8_0, Q4_1, F32 = (gguf.GGMLQuantizationType[name] for name in ("Q8_0", "Q4_1", "F32"))
NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "pre_feedforward_layernorm": "ffn_norm", "post_feedforward_layernorm": "post_ffw_norm",
}  # fmt: skip
GEMMA = {"post_attention_layernorm": "post_attention_norm"}


def alphabet():
    """The 256 signs that GPT-2 writes bytes as, in the order of the bytes."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte if byte in plain else next(others)) for byte in range(256)]


def language_model(family="llama", **settings):
    """A seeded tiny language model whose sizes suit blocks of 32 numbers."""
    config = tiny_config(family)
    config.vocab_size, config.intermediate_size, config.num_hidden_layers = 259, 64, 2
    for name, value in settings.items():
        setattr(config, name, value)
    if hasattr(config, "layer_types") and config.layer_types:
        config.layer_types = config.layer_types[:2]
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(config)
    return randomized(model)


def gguf_name(name, family):
    name, _, suffix = name.rpartition(".")
    layer = re.fullmatch(r"model\.layers\.(\d+)\.(.*)", name)
    names = NAMES | (GEMMA if family.startswith("gemma") else {})
    return f"{f'blk.{layer[1]}.' if layer else ''}{names[layer[2] if layer else name]}.{suffix}"


def as_written(name, tensor, model):
    """What llama.cpp's converter makes of a tensor: Llama's queries and keys in another order, Gemma's norms + 1."""
    array, config = tensor.numpy(), model.config
    if config.model_type == "llama" and re.search(r"[qk]_proj", name):
        heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
        array = array.reshape(heads, 2, -1, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
    return array + 1 if config.model_type.startswith("gemma") and "norm" in name else array


def write_gguf(
    path, model, *, matrices=F32, architecture=None, pre="gpt-2", merges=("a b",), extra=(), settings=(), without=()
):
    """Write a model as llama.cpp's converter does; return what its tensors stand for, by transformers' names."""
    config = model.config
    architecture = architecture or config.model_type.removesuffix("_text")
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("Tiny")
    writer.add_license("mit")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    if getattr(config, "sliding_window", None):
        writer.add_sliding_window(config.sliding_window)
    if pre is not None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list([*alphabet(), "<s>", "</s>", "ab"])
        writer.add_token_types([1] * 256 + [3] * 2 + [1])
        writer.add_token_merges(list(merges))
        writer.add_bos_token_id(256)
        writer.add_eos_token_id(257)
        writer.add_pad_token_id(257)
    for key, value in settings:
        (writer.add_string if isinstance(value, str) else writer.add_uint16)(key, value)
    stands_for = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        array = as_written(name, tensor, model)
        kind = matrices if array.ndim > 1 else F32
        blocks = gguf.quantize(array, kind)
        stands_for[name] = gguf.dequantize(blocks, kind)
        if name not in without:
            writer.add_tensor(gguf_name(name, config.model_type), blocks, raw_dtype=kind)
    for name, array in extra:
        writer.add_tensor(name, np.asarray(array, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stands_for


@pytest.mark.parametrize("matrices", [F32, Q8_0, Q4_1])
@pytest.mark.parametrize("tied", [True, False])
def test_a_llama_comes_out_as_the_numbers_in_the_file(tmp_path, matrices, tied):
    model = language_model(tie_word_embeddings=tied)
    stands_for = write_gguf(tmp_path / "tiny.gguf", model, matrices=matrices)
    read = convert_gguf(tmp_path / "tiny.gguf", tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    assert tensors.keys() == stands_for.keys()
    for name, array in stands_for.items():
        assert tensors[name].dtype == torch.float32
        # gguf's own numbers, bit for bit, compared in the order of the file.
        np.testing.assert_array_equal(as_written(name, tensors[name], model), array)
    assert read.architecture == "LlamaForCausalLM" and read.parameters == model.num_parameters()
    if matrices == F32:
        ids = torch.tensor([[3, 100, 7, 257]])
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
        with torch.no_grad():
            torch.testing.assert_close(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "gemma2", "gemma3"])
def test_other_families_are_the_models_they_were(tmp_path, family):
    model = language_model(family, tie_word_embeddings=True)
    write_gguf(tmp_path / "tiny.gguf", model)
    convert_gguf(tmp_path / "tiny.gguf", tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    ids = torch.tensor([[3, 100, 7, 257]])
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, atol=1e-4, rtol=1e-4)


def test_the_folder_is_a_plain_encoder_and_says_where_it_is_from(tmp_path):
    write_gguf(tmp_path / "tiny.gguf", language_model(), matrices=Q4_1)
    arguments = ["convert", "--from", str(tmp_path / "tiny.gguf"), "--output", str(tmp_path / "model")]
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 0, result.output
    # Two layers of 7 matrices, embeddings and LM head; two norms a layer and the last one.
    what = r"LlamaForCausalLM, 0\.0\d M parameters, float32 of Q4_1 \(16 tensors\), F32 \(5 tensors\) -> "
    assert re.match(what, result.stdout)
    card = (tmp_path / "model" / "README.md").read_text()
    assert "tiny.gguf" in card and "The source is quantised (Q4_1)" in card and "license: mit" in card
    encoder = Encoder.from_pretrained(tmp_path / "model", pooling="last", append_eos=True, dtype="fp32")
    model = AutoModel.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    ids = [*tokenizer("tea").input_ids, 257]
    assert ids[-4:] == [*b"tea", 257]
    with torch.no_grad():
        expected = model(torch.tensor([ids])).last_hidden_state[0, -1]
    np.testing.assert_allclose(encoder.encode(["tea"]).embeddings[0], expected, atol=1e-5)


def test_tokens_of_a_bidirectional_model_see_what_comes_after_them_also_when_it_is_saved_again(tmp_path):
    write_gguf(tmp_path / "tiny.gguf", language_model())
    for name, more in (("causal", []), ("both", ["--bidirectional"])):
        arguments = ["convert", "--from", str(tmp_path / "tiny.gguf"), "--output", str(tmp_path / name), *more]
        result = CliRunner().invoke(cli, arguments)
        assert result.exit_code == 0, result.output
    assert "see those after it" in (tmp_path / "both" / "README.md").read_text()
    both = Encoder.from_pretrained(tmp_path / "both", pooling="cls", dtype="fp32", device="cpu")
    assert Encoder.from_pretrained(tmp_path / "both").config.pooling == "mean"
    both.save(tmp_path / "again")
    tea = {}
    for name in ("causal", "both", "again"):
        encoder = Encoder.from_pretrained(tmp_path / name, pooling="cls", dtype="fp32", device="cpu")
        tea[name], cups = encoder.encode(["tea", "tea cups"]).embeddings
        # The first token alone, "t", is what both begin with.
        assert np.allclose(tea[name], cups, atol=1e-5) == (name == "causal")
    assert np.array_equal(tea["both"], tea["again"])


def test_bidirectional_is_for_language_models_alone(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama", "drop_mlp_list": [0]}')
    arguments = ["convert", "--from", str(tmp_path), "--output", str(tmp_path / "out"), "--bidirectional"]
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 2 and "--bidirectional goes with a GGUF file" in result.output


def test_a_family_that_may_not_heed_it_is_not_made_bidirectional(tmp_path, monkeypatch):
    write_gguf(tmp_path / "tiny.gguf", language_model())
    others = {name: family for name, family in FAMILIES.items() if name != "llama"}
    monkeypatch.setattr("effir_search.model.gguf_file.FAMILIES", others)
    with pytest.raises(ValueError, match="--bidirectional goes with .*mistral.*, and this is a llama"):
        convert_gguf(tmp_path / "tiny.gguf", tmp_path / "model", bidirectional=True)
    assert not (tmp_path / "model").exists()


def test_the_scaled_rope_of_llama_3_is_read(tmp_path):
    settings = LLAMA3 | {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0}
    model = language_model(head_dim=64, rope_parameters=settings)
    inv_freq, _ = ROPE_INIT_FUNCTIONS["llama3"](model.config, torch.device("cpu"))
    plain = 1 / 500000.0 ** (torch.arange(0, 64, 2) / 64)
    write_gguf(tmp_path / "tiny.gguf", model, extra=[("rope_freqs.weight", plain / inv_freq)])
    convert_gguf(tmp_path / "tiny.gguf", tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    ids = torch.arange(90).unsqueeze(0)
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits)


def test_digits_are_parted_where_the_file_asks_for_it(tmp_path):
    write_gguf(tmp_path / "tiny.gguf", language_model(), pre="smollm")
    convert_gguf(tmp_path / "tiny.gguf", tmp_path / "model")
    backend = AutoTokenizer.from_pretrained(tmp_path / "model").backend_tokenizer
    assert [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str("ab 12")] == ["ab", "Ġ", "1", "2"]


def test_a_way_to_split_that_is_not_known_is_told(tmp_path, caplog):
    write_gguf(tmp_path / "tiny.gguf", language_model(), pre="new-way")
    convert_gguf(tmp_path / "tiny.gguf", tmp_path / "model")
    assert "splits texts as 'new-way'" in caplog.text


def refused(tmp_path, match):
    with pytest.raises(ValueError, match=match) as error:
        convert_gguf(tmp_path / "tiny.gguf", tmp_path / "model")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    "options, match",
    [
        ({"architecture": "unheard"}, "unheard"),
        ({"without": ["model.layers.1.mlp.up_proj.weight"]}, "no tensor for model.layers.1.mlp.up_proj.weight"),
        ({"extra": [("blk.0.attn_q.bias", np.ones(32))]}, "it holds .* numbers, of which LlamaForCausalLM takes"),
        ({"extra": [("rope_freqs.weight", [1, 3, 2, 9])]}, "are not those of a Llama 3"),
        ({"settings": [("llama.rope.scaling.type", "yarn")]}, "RoPE is scaled"),
        ({"settings": [("split.count", 3)]}, "one of 3 parts"),
        ({"pre": None}, "cannot be loaded"),
        ({"merges": ["a c"]}, "its tokenizer cannot be read: .*`ac` out of vocabulary"),
    ],
)
def test_what_cannot_be_read_in_full_is_refused(tmp_path, options, match):
    write_gguf(tmp_path / "tiny.gguf", language_model(), **options)
    refused(tmp_path, match)


def test_a_cut_file_is_refused_wherever_it_is_cut(tmp_path):
    write_gguf(tmp_path / "tiny.gguf", language_model(), matrices=Q8_0)
    whole = (tmp_path / "tiny.gguf").read_bytes()
    for size in (0, 3, 4, 10, 30, 300, 3000, len(whole) // 2, len(whole) - 64):
        (tmp_path / "tiny.gguf").write_bytes(whole[:size])
        refused(tmp_path, "cut or damaged|no GGUF file|cannot be loaded")


def test_options_of_checkpoints_are_usage_errors(tmp_path):
    write_gguf(tmp_path / "tiny.gguf", language_model())
    arguments = ["convert", "--from", str(tmp_path / "tiny.gguf"), "--output", str(tmp_path / "model")]
    result = CliRunner().invoke(cli, [*arguments, "--pooling", "last"])
    assert result.exit_code == 2 and "--pooling does not go with a GGUF file" in result.output


def test_without_the_package_its_name_is_told(tmp_path, monkeypatch):
    write_gguf(tmp_path / "tiny.gguf", language_model())
    monkeypatch.setitem(sys.modules, "gguf", None)
    refused(tmp_path, r"reading GGUF needs gguf: pip install 'effir_search\[gguf\]'")


def test_a_file_that_is_not_there_is_named(tmp_path):
    arguments = ["convert", "--from", str(tmp_path / "no.gguf"), "--output", str(tmp_path / "model")]
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 1 and re.search(r"Error: .*no\.gguf: No such file", result.output)


def test_what_lies_beside_the_file_is_not_read(tmp_path):
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors", "adapter_config.json"):
        (tmp_path / name).write_text("no JSON")
    write_gguf(tmp_path / "tiny.gguf", language_model())
    assert convert_gguf(tmp_path / "tiny.gguf", tmp_path / "model").architecture == "LlamaForCausalLM"


def test_a_gguf_file_given_as_an_encoder_is_told_how_to_become_one(tmp_path):
    write_gguf(tmp_path / "tiny.gguf", language_model())
    with pytest.raises(OSError, match="is a file; .*; effir convert makes one of it"):
        Encoder.from_pretrained(tmp_path / "tiny.gguf")


def test_a_foreign_file_is_refused(tmp_path):
    (tmp_path / "tiny.gguf").write_bytes(b"PK\x03\x04 something else")
    refused(tmp_path, "is no GGUF file: it begins with")
