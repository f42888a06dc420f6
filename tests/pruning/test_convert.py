import copy
import json
import logging
import os
import shutil
import sys

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import (
    DECODERS,
    QUERIES,
    SPECIAL,
    TEXTS,
    WORDS,
    randomized,
    save_sentence_files,
    tiny_config,
    word_tokenizer,
)
from huggingface_hub import constants
from huggingface_hub.utils import filter_repo_objects
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from test_modeling_effir import states
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, MistralConfig

from effir_search.cli import cli
from effir_search.encoding.encoder import Encoder
from effir_search.model.checkpoint import ADAPTER_FILES, HUB_FILES, read_config_file
from effir_search.model.modeling_effir import EffirConfig
from effir_search.model.sentence_files import read_sentence_files
from effir_search.pruning.convert import QUERY_PROMPT, convert, describe_conversion
from effir_search.settings import EncoderOptions

MLP, ATTENTION = [3, 1], [2]
LISTS = {"drop_mlp_list": MLP, "drop_attn_list": ATTENTION}
VOCABULARY = len(SPECIAL) + len(WORDS)
MATRICES = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
LEFT_OVER = "This file would run if the folder's code were trusted."


def language_model(family="mistral", dtype=torch.float32):
    """A seeded tiny language model with weights that are large enough to tell errors apart."""
    torch.manual_seed(sum(map(ord, family)))
    model = AutoModelForCausalLM.from_config(tiny_config(family), dtype=dtype)
    return randomized(model)


def save_checkpoint(folder, model, **settings):
    """Save a language model whole, in several files, with settings that LLM-Drop adds and code that must not run."""
    model.save_pretrained(folder, max_shard_size="40KB")
    word_tokenizer(bos=True).save_pretrained(folder)
    kind = model.config.model_type
    own = {name: f"{file}_dropped_{kind}.Dropped" for name, file in
           (("AutoConfig", "configuration"), ("AutoModelForCausalLM", "modeling"))}  # fmt: skip
    for file in ("configuration", "modeling"):
        (folder / f"{file}_dropped_{kind}.py").write_text(f"raise SystemExit({LEFT_OVER!r})")
    (folder / "pytorch_model.bin.index.json").write_text('{"weight_map": {"stale": "pytorch_model-1-of-9.bin"}}')
    return edit(folder / "config.json", **({"auto_map": own} if settings else {}), **settings)


def edit(path, **settings):
    """Change some settings in a JSON file, which may not be there yet; return its folder."""
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | settings))
    return path.parent


def save_adapter(folder, model, *, alpha=6, target_modules=MATRICES, **options):
    """Save a LoRA of rank 2 with random weights; return the language model with the LoRA merged."""
    config = LoraConfig(
        r=2, lora_alpha=alpha, target_modules=target_modules, init_lora_weights=False, task_type="CAUSAL_LM", **options
    )
    lora = get_peft_model(copy.deepcopy(model), config)
    with torch.no_grad():
        for name, parameter in lora.named_parameters():
            if "magnitude" in name or name.endswith("bias"):
                parameter.mul_(1.5)
    lora.save_pretrained(folder, save_embedding_layers=False)
    edit(folder / "adapter_config.json", base_model_name_or_path="org/base")
    return lora.merge_and_unload()


def zeroed(model, mlp=MLP, attention=ATTENTION):
    """The stock transformer of a language model, silenced where parts were dropped."""
    model = copy.deepcopy(model.model)
    with torch.no_grad():
        for layer_idx in mlp:
            model.layers[layer_idx].mlp.down_proj.weight.zero_()
        for layer_idx in attention:
            model.layers[layer_idx].self_attn.o_proj.weight.zero_()
    return model


def converted(source, output, **options):
    convert(source, output, **options)
    return AutoModel.from_pretrained(output)


def assert_equal_states(model, reference, tolerance=1e-5):
    torch.testing.assert_close(states(model), states(reference), atol=tolerance, rtol=tolerance)


def tensors_of(folder):
    return load_file(folder / "model.safetensors")


def same_weights(*folders):
    return len({(folder / "model.safetensors").read_bytes() for folder in folders}) == 1


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A plain tiny Mistral in float32; tests do not change it."""
    return save_checkpoint(tmp_path_factory.mktemp("base"), language_model())


@pytest.fixture(scope="module")
def dropped(tmp_path_factory):
    """The same as an LLM-Drop checkpoint; tests do not change it."""
    return save_checkpoint(tmp_path_factory.mktemp("dropped"), language_model(), **LISTS)


@pytest.fixture(scope="module")
def saved_lora(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    save_adapter(folder, language_model(), target_modules=["q_proj", "down_proj"])
    return edit(folder / "config.json", **LISTS)


@pytest.fixture
def lora(tmp_path, saved_lora):
    """A LoRA folder on the full Mistral that says what was dropped; a test may change it."""
    return shutil.copytree(saved_lora, tmp_path / "lora")


@pytest.fixture
def copied(tmp_path, dropped):
    """An LLM-Drop checkpoint to change."""
    return shutil.copytree(dropped, tmp_path / "copied")


# LLM-Drop


@pytest.mark.parametrize("family", sorted(DECODERS))
def test_a_converted_checkpoint_equals_the_stock_model_with_silenced_parts(tmp_path, family):
    model = language_model(family)
    save_checkpoint(tmp_path / "source", model, **LISTS)
    pruned = converted(tmp_path / "source", tmp_path / "pruned")
    assert pruned.config.mlp_widths == [48, 0, 48, 0] and pruned.config.dropped_attention == [2]
    assert pruned.config.plan == [{"mlp": [1, 3], "attention": [2], "source": "LLM-Drop"}]
    assert_equal_states(pruned, zeroed(model))
    assert (states(pruned) - states(model.model)).abs().max() > 0.05


@pytest.mark.parametrize(
    "lists",
    [
        {"drop_mlp_list": [1, 3], "drop_attn_list": [2]},
        {"drop_mlp_list": [False, True, False, True], "drop_attn_list": [False, False, True, False]},
    ],
)
def test_numbers_in_any_order_and_booleans_say_the_same(tmp_path, dropped, copied, lists):
    edit(copied / "config.json", **lists)
    one, two = convert(dropped, tmp_path / "one"), convert(copied, tmp_path / "two")
    assert one.to_dict() == two.to_dict() and same_weights(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize("nothing", [None, [], [False] * 4])
def test_null_an_empty_list_and_no_true_boolean_drop_nothing(tmp_path, copied, nothing):
    edit(copied / "config.json", drop_attn_list=nothing)
    config = convert(copied, tmp_path / "one")
    assert config.mlp_widths == [48, 0, 48, 0] and config.dropped_attention == []
    edit(copied / "config.json", drop_mlp_list=nothing)
    assert_equal_states(converted(copied, tmp_path / "none"), language_model().model)


@pytest.mark.parametrize("lists", [{"drop_mlp_list": [0]}, {"drop_attn_list": [False, True, False, False]}])
def test_a_checkpoint_is_no_encoder_before_it_is_converted(copied, lists):
    edit(copied / "config.json", **{"drop_mlp_list": None, "drop_attn_list": [False] * 4} | lists)
    message = f"is an LLM-Drop checkpoint .{next(iter(lists))}., .*effir convert makes it a model"
    with pytest.raises(ValueError, match=message):
        Encoder.from_pretrained(copied)
    with pytest.raises(ValueError, match=message):
        read_config_file(copied / "config.json")
    edit(copied / "config.json", drop_mlp_list=[], drop_attn_list=[False] * 4)
    assert Encoder.from_pretrained(copied, device="cpu").dimension == 32


def test_weights_of_dropped_parts_may_be_in_the_files_or_not(tmp_path, dropped):
    model = language_model()
    for layer_idx in MLP:
        del model.model.layers[layer_idx].mlp, model.model.layers[layer_idx].post_attention_layernorm
    save_checkpoint(tmp_path / "without", model, **LISTS)
    convert(tmp_path / "without", tmp_path / "one")
    convert(dropped, tmp_path / "two")
    assert same_weights(tmp_path / "one", tmp_path / "two")
    assert not [key for key in tensors_of(tmp_path / "one") if "layers.1.mlp" in key or "lm_head" in key]


@pytest.mark.parametrize("layout", ["one file", "one pickle", "pickles", "old pickle", "without prefix"])
def test_weights_may_lie_in_other_files(tmp_path, dropped, copied, layout):
    shards = sorted(copied.glob("model-*.safetensors"))
    tensors = {key: tensor for shard in shards for key, tensor in load_file(shard).items()}
    for file in (*shards, copied / "model.safetensors.index.json", copied / "pytorch_model.bin.index.json"):
        file.unlink()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)  # old versions saved it
    if layout == "without prefix":  # as AutoModel saves
        tensors = {key.removeprefix("model."): tensor for key, tensor in tensors.items()}
    match layout:
        case "one file" | "without prefix":
            save_file(tensors, copied / "model.safetensors")
        case "one pickle" | "old pickle":
            new = layout == "one pickle"
            torch.save(tensors, copied / "pytorch_model.bin", _use_new_zipfile_serialization=new)
        case "pickles":
            places = {key: f"pytorch_model-{number % 2}.bin" for number, key in enumerate(tensors)}
            for name in set(places.values()):
                torch.save({key: tensors[key] for key in places if places[key] == name}, copied / name)
            edit(copied / "pytorch_model.bin.index.json", weight_map=places)
    convert(copied, tmp_path / "one")
    convert(dropped, tmp_path / "two")
    assert same_weights(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize("name", ["dtype", "torch_dtype", None])
def test_bfloat16_stays_as_it_is(tmp_path, name):
    model = language_model(dtype=torch.bfloat16)
    save_checkpoint(tmp_path / "source", model, **LISTS)
    settings = json.loads((tmp_path / "source/config.json").read_text())
    assert settings.pop("dtype") == "bfloat16"
    settings |= {name: "bfloat16"} if name else {}
    (tmp_path / "source/config.json").write_text(json.dumps(settings))
    convert(tmp_path / "source", tmp_path / "pruned")
    config = json.loads((tmp_path / "pruned/config.json").read_text())
    assert config["dtype"] == config["base_config"]["dtype"] == "bfloat16"
    stock = model.state_dict()
    assert all(torch.equal(tensor, stock[key]) for key, tensor in tensors_of(tmp_path / "pruned").items())


def test_a_converted_checkpoint_is_an_encoder_like_any_other(tmp_path, dropped):
    convert(dropped, tmp_path / "pruned")
    encoder = Encoder.from_pretrained(tmp_path / "pruned", device="cpu", dtype="fp32")
    assert encoder.config.pooling == "last" and not encoder.config.normalize and not encoder.config.query_prompt
    reference = SentenceTransformer(str(tmp_path / "pruned"), device="cpu")
    np.testing.assert_allclose(encoder.encode_documents(TEXTS), reference.encode_document(TEXTS), atol=1e-5)


def test_a_checkpoint_keeps_what_its_sentence_files_say_unless_an_option_says_more(tmp_path, copied):
    save_sentence_files(copied, pooling="mean", prompts={"query": "red "}, max_length=20)
    convert(copied, tmp_path / "own")
    config = Encoder.from_pretrained(tmp_path / "own").config
    assert (config.pooling, config.normalize, config.query_prompt, config.max_length) == ("mean", True, "red ", 20)
    options = {"pooling": "cls", "query_prompt": "tea ", "document_prompt": "the ", "max_length": 30}
    convert(copied, tmp_path / "given", options=EncoderOptions(append_eos=True, **options))
    encoder = Encoder.from_pretrained(tmp_path / "given")
    assert options.items() <= vars(encoder.config).items()
    assert encoder.tokenizer("cat")["input_ids"][-1] == encoder.tokenizer.eos_token_id


def test_no_code_no_list_and_no_path_of_the_checkpoint_is_in_the_result(tmp_path, copied):
    edit(copied / "config.json", _name_or_path="org/base")
    config = convert(copied, tmp_path / "pruned")
    assert config.base_model == "org/base"
    content = "".join(path.read_text() for path in (tmp_path / "pruned").rglob("*.*") if path.suffix != ".safetensors")
    assert LEFT_OVER not in content and "drop_mlp_list" not in content and "_dropped_" not in content
    assert str(tmp_path) not in content and "org/base (mistral), pruned" in content


@pytest.mark.parametrize("name", ["/home/someone/base", "../base", "base", "out/base/checkpoint-3", 7, None])
def test_a_base_model_is_recorded_only_under_a_name_that_can_be_on_the_hub(tmp_path, copied, name):
    edit(copied / "config.json", _name_or_path=name)
    assert convert(copied, tmp_path / "pruned").base_model is None


# LoRA


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("mistral", {}),
        ("llama", {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"up_proj": 1}}),
        ("gemma2", {}),
        ("mistral", {"use_rslora": True}),
        ("mistral", {"use_dora": True}),
        ("qwen2", {"bias": "lora_only"}),
    ],
    ids=["mistral", "llama, patterns", "gemma2", "rslora", "dora", "qwen2, bias"],
)
def test_a_converted_lora_equals_peft_on_the_language_model_with_silenced_parts(tmp_path, family, options):
    model = language_model(family)
    save_checkpoint(tmp_path / "base", model)
    merged = save_adapter(tmp_path / "lora", model, **options)
    edit(tmp_path / "lora/config.json", **LISTS)
    pruned = converted(tmp_path / "lora", tmp_path / "pruned", base=tmp_path / "base")
    assert pruned.config.mlp_widths == [48, 0, 48, 0] and pruned.config.dropped_attention == [2]
    assert pruned.config.plan == [{"mlp": [1, 3], "attention": [2], "source": "EffiR LoRA"}]
    assert_equal_states(pruned, zeroed(merged))
    assert (states(pruned) - states(zeroed(model))).abs().max() > 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("file", ["safetensors", "bin"])
def test_a_merged_weight_is_the_sum_in_float32_rounded_once(tmp_path, lora, file, dtype):
    model = language_model(dtype=dtype)
    save_checkpoint(tmp_path / "base", model)
    path = lora / "adapter_model.safetensors"
    adapter = {key: tensor.to(dtype) for key, tensor in load_file(path).items()}
    path.unlink()
    if file == "bin":
        torch.save(adapter, lora / "adapter_model.bin")
    else:
        save_file(adapter, path)
    convert(lora, tmp_path / "pruned", base=tmp_path / "base")
    found, stock = tensors_of(tmp_path / "pruned"), model.state_dict()
    merged = 0
    for key, tensor in found.items():
        expected = stock[key]
        path = f"base_model.model.{key.removesuffix('.weight')}"
        if f"{path}.lora_A.weight" in adapter:
            a, b = (adapter[f"{path}.lora_{name}.weight"].float() for name in "AB")
            expected = (expected.float() + 3 * (b @ a)).to(dtype)  # alpha 6, rank 2: 6 / 2 = 3
            merged += 1
        assert tensor.dtype == dtype
        torch.testing.assert_close(tensor, expected, rtol=2**-8 if dtype == torch.bfloat16 else 1e-6, atol=1e-6)
        # One rounding: all but sums that fall on the edge between two numbers are the same to the bit.
        assert (tensor == expected).float().mean() > 0.99 or dtype == torch.float32
    assert merged == 3 + 2  # attentions and MLPs left


def test_an_adapter_trained_without_the_dropped_parts_gives_the_same(tmp_path, base, lora):
    convert(lora, tmp_path / "one", base=base)
    path = lora / "adapter_model.safetensors"
    gone = ("layers.1.mlp.", "layers.3.mlp.", "layers.2.self_attn.")
    save_file({key: tensor for key, tensor in load_file(path).items() if not any(part in key for part in gone)}, path)
    convert(lora, tmp_path / "two", base=base)
    assert same_weights(tmp_path / "one", tmp_path / "two")


def test_a_lora_on_the_lm_head_is_left_out_and_one_on_the_embeddings_is_not(tmp_path, base):
    model = language_model()
    merged = save_adapter(tmp_path / "lora", model, target_modules=["q_proj", "embed_tokens", "lm_head"])
    edit(tmp_path / "lora/config.json", **LISTS)
    keys = load_file(tmp_path / "lora/adapter_model.safetensors").keys()
    assert any("lm_head.lora_A" in key for key in keys) and any("lora_embedding_A" in key for key in keys)
    assert_equal_states(converted(tmp_path / "lora", tmp_path / "pruned", base=base), zeroed(merged))


def test_the_last_checkpoint_of_a_training_folder_is_taken(tmp_path, base, lora):
    convert(lora, tmp_path / "one", base=base)
    (tmp_path / "run").mkdir()
    edit(tmp_path / "run/config.json", **LISTS)
    for number in (90, 100):  # 100 is the larger number and the smaller word
        shutil.copytree(lora, tmp_path / f"run/checkpoint-{number}")
        (tmp_path / f"run/checkpoint-{number}/config.json").unlink()
    (tmp_path / "run/checkpoint-90/adapter_model.safetensors").write_bytes(b"old")
    convert(tmp_path / "run", tmp_path / "two", base=base)
    assert same_weights(tmp_path / "one", tmp_path / "two")


def test_what_was_dropped_is_said_by_the_lora_folder_the_base_or_the_options(tmp_path, base, dropped, lora):
    convert(lora, tmp_path / "lora says", base=base)
    convert(lora, tmp_path / "all say", base=dropped, drop_mlp_layers=[1, 3], drop_attention_layers=[2])
    (lora / "config.json").unlink()
    convert(lora, tmp_path / "base says", base=dropped)
    convert(lora, tmp_path / "options say", base=base, drop_mlp_layers=[1, 3], drop_attention_layers=[2])
    assert same_weights(*(tmp_path / who for who in ("lora says", "all say", "base says", "options say")))


def test_a_lora_folder_gets_the_contract_of_the_released_checkpoints(tmp_path, base, lora):
    convert(lora, tmp_path / "pruned", base=base)
    encoder = Encoder.from_pretrained(tmp_path / "pruned", device="cpu", dtype="fp32")
    config = encoder.config
    assert (config.pooling, config.normalize, config.similarity) == ("last", True, "cosine")
    prompt = "<instruct>Given a query, retrieve relevant passages that answer the query.\n<query>"
    assert config.query_prompt == prompt == QUERY_PROMPT and config.document_prompt == ""
    assert config.max_length == 96  # 512, but the tiny model has 96 positions
    assert json.loads((tmp_path / "pruned/sentence_bert_config.json").read_text())["max_seq_length"] == 96
    assert encoder.tokenizer("cat")["input_ids"] == word_tokenizer(bos=True)("cat")["input_ids"]
    reference = SentenceTransformer(str(tmp_path / "pruned"), device="cpu")
    np.testing.assert_allclose(encoder.encode_documents(TEXTS), reference.encode_document(TEXTS), atol=1e-5)
    np.testing.assert_allclose(encoder.encode_queries(QUERIES), reference.encode_query(QUERIES), atol=1e-5)


def test_512_tokens_are_read_where_the_model_has_positions_for_more_unless_an_option_says_so(tmp_path, lora):
    save_checkpoint(tmp_path / "base", language_model())
    edit(tmp_path / "base/config.json", max_position_embeddings=4096)
    convert(lora, tmp_path / "pruned", base=tmp_path / "base")
    assert read_sentence_files(tmp_path / "pruned").max_length == 512
    convert(lora, tmp_path / "longer", base=tmp_path / "base", options=EncoderOptions(max_length=600))
    assert read_sentence_files(tmp_path / "longer").max_length == 600


def test_a_base_model_is_recorded_by_what_names_it(tmp_path, base, lora):
    edit(lora / "adapter_config.json", revision="abc")
    config = convert(lora, tmp_path / "pruned", base=base)
    assert (config.base_model, config.base_revision) == ("org/base", "abc")


def test_a_lost_eos_is_warned_of(tmp_path, base, lora, caplog):
    word_tokenizer(bos=True).save_pretrained(lora)
    edit(lora / "tokenizer_config.json", add_eos_token=True)
    with caplog.at_level(logging.WARNING):
        convert(lora, tmp_path / "pruned", base=base)
    assert "asks for add_eos_token" in caplog.text


# Embeddings of their own


def save_embeddings(lora, *names, rows=VOCABULARY):
    """Put pickled modules into a LoRA folder, as the training code does; return the embeddings."""
    torch.manual_seed(1)
    (lora / "embedding").mkdir(exist_ok=True)
    modules = {"lm_head.pth": nn.Linear(32, rows, bias=False)}
    for name in names:
        torch.save(modules.setdefault(name, nn.Embedding(rows, 32, padding_idx=0)), lora / "embedding" / name)
    return modules[names[0]].weight.detach()


def test_added_tokens_bring_their_embeddings_and_their_tokenizer(tmp_path, base, lora):
    tokenizer = word_tokenizer(bos=True)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<instruct>", "<query>"]})
    tokenizer.save_pretrained(lora)
    weight = save_embeddings(lora, "input_emb.pth", "lm_head.pth", rows=VOCABULARY + 2)
    config = convert(lora, tmp_path / "pruned", base=base)
    assert config.base_config.vocab_size == VOCABULARY + 2
    assert torch.equal(tensors_of(tmp_path / "pruned")["model.embed_tokens.weight"], weight)
    encoder = Encoder.from_pretrained(tmp_path / "pruned", device="cpu", dtype="fp32")
    ids = encoder.tokenizer("<instruct>the <query>cat")["input_ids"]
    assert VOCABULARY in ids and VOCABULARY + 1 in ids
    assert np.isfinite(encoder.encode_queries(QUERIES)).all()


@pytest.mark.parametrize("before", [True, False])
def test_emb_is_set_before_the_adapter_and_input_emb_after(tmp_path, base, before):
    save_adapter(tmp_path / "lora", language_model(), target_modules=["embed_tokens", "q_proj"])
    edit(tmp_path / "lora/config.json", **LISTS)
    names = ["emb.pth"] if before else ["input_emb.pth", "lm_head.pth"]
    weight = save_embeddings(tmp_path / "lora", *names)
    if before:
        path = "base_model.model.model.embed_tokens.lora_embedding_"
        adapter = load_file(tmp_path / "lora/adapter_model.safetensors")
        weight = weight + 3 * (adapter[f"{path}B"] @ adapter[f"{path}A"]).T
    convert(tmp_path / "lora", tmp_path / "pruned", base=base)
    torch.testing.assert_close(tensors_of(tmp_path / "pruned")["model.embed_tokens.weight"], weight)


@pytest.mark.parametrize("name", ["weight", "base_layer.weight"])
def test_embeddings_that_peft_saved_are_set(tmp_path, base, lora, name):
    path = lora / "adapter_model.safetensors"
    weight = torch.randn(VOCABULARY, 32)
    save_file(load_file(path) | {f"base_model.model.model.embed_tokens.{name}": weight}, path)
    convert(lora, tmp_path / "pruned", base=base)
    assert torch.equal(tensors_of(tmp_path / "pruned")["model.embed_tokens.weight"], weight)


class Malicious:
    """What creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("place", ["lora/embedding/emb.pth", "lora/adapter_model.bin", "copied/pytorch_model.bin"])
@pytest.mark.parametrize("old", [True, False])
def test_a_malicious_pickle_is_refused_and_does_not_run(tmp_path, base, lora, copied, place, old):
    path = tmp_path / place
    path.parent.mkdir(exist_ok=True)
    for file in path.parent.glob("*model*.safetensors*"):
        file.unlink()
    torch.save({"a": Malicious(tmp_path / "ran")}, path, _use_new_zipfile_serialization=not old)
    source = tmp_path / place.split("/")[0]
    with pytest.raises(ValueError, match=f"{path}: cannot be loaded: Weights only load failed"):
        convert(source, tmp_path / "pruned", base=base if source == lora else None)
    assert not (tmp_path / "ran").exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / "ran").is_dir()  # so it would have run


# Errors


def refused(source, message, error=ValueError, **options):
    """The conversion fails with this message, and nothing is left of its output."""
    output = source.parent / "refused"
    with pytest.raises(error, match=message):
        convert(source, output, **options)
    assert not output.exists() and not list(source.parent.glob(".refused*"))


def in_first_shard(folder, change):
    """Change the tensors of a checkpoint's first file."""
    path = min(folder.glob("model-*.safetensors"))
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def in_adapter(folder, change):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize("field", ["drop_mlp_list", "drop_attn_list"])
@pytest.mark.parametrize(
    ("value", "found"),
    [
        ([1, True], r"is \[1, True\]"),
        ([1, "2"], r"is \[1, '2'\]"),
        ([1, None], r"is \[1, None\]"),
        ("12", "is 12"),
        (2, "is 2"),
        ([True, False, True], "has 3 booleans"),
        ([0, 4], "names layer 4"),
        ([0, -1], "names layer -1"),
        ([2, 0, 2], "names layer 2 twice"),
    ],
)
def test_a_malformed_list_is_an_error_that_names_the_field(copied, field, value, found):
    edit(copied / "config.json", **{field: value})
    form = "it must be null, different layers from 0 to 3 or 4 booleans"
    refused(copied, f"config.json: {field} {found}; {form}")


def test_a_folder_of_neither_format_is_an_error_that_names_both(tmp_path, base):
    both = r"neither an LLM-Drop checkpoint \(config.json with drop_mlp_list .*nor an EffiR LoRA folder \(adapter_conf"
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", both)
    stock = shutil.copytree(base, tmp_path / "stock")
    refused(stock, both)
    refused(stock, both, drop_mlp_layers=[1])


def test_what_is_pruned_already_is_an_error(tmp_path, copied, lora):
    convert(copied, tmp_path / "pruned")
    refused(tmp_path / "pruned", "pruned: is a pruned model of this project already")
    refused(lora, "pruned: is a pruned model of this project already", base=tmp_path / "pruned")


@pytest.mark.parametrize("kind", ["baichuan", "deepseek", "bert", "t5", None])
def test_another_family_is_an_error_that_names_those_that_can_be_converted(copied, kind):
    edit(copied / "config.json", model_type=kind)
    refused(copied, f"copied: models of type '{kind}' cannot be converted; those that can: gemma2, .*llama, mistral")


def test_a_base_with_a_full_checkpoint_and_a_lora_without_one_are_errors(base, dropped, copied, lora):
    refused(copied, "is no LoRA folder, so it goes without --base", base=base)
    refused(lora, "lora: is a LoRA adapter of org/base; give that one with --base")
    edit(lora / "adapter_config.json", base_model_name_or_path=None)
    refused(lora, "is a LoRA adapter of a base model; give")


def test_a_base_that_is_an_adapter_or_not_there_is_an_error(tmp_path, lora):
    refused(lora, "LoRA adapter; merge it into its base model first", base=lora)
    refused(lora, "nothing: no such", error=FileNotFoundError, base=tmp_path / "nothing")


def test_accounts_that_disagree_are_an_error_that_names_both(dropped, copied, lora):
    options = "and --drop-mlp-layers and --drop-attention-layers disagree on the dropped layers"
    plans = r"\{'mlp': \[1, 3\], 'attention': \[2\]\} or \{'mlp': \[1\], 'attention': \[\]\}"
    refused(copied, f"copied/config.json {options}, which are {plans}", drop_mlp_layers=[1])
    refused(lora, f"lora/config.json {options}", base=dropped, drop_mlp_layers=[1])
    edit(lora / "config.json", drop_mlp_list=[0])
    refused(lora, f"lora/config.json and {dropped}/config.json disagree on the dropped layers", base=dropped)


def test_a_lora_about_which_nobody_says_what_was_dropped_is_an_error(base, lora):
    edit(lora / "config.json", drop_mlp_list=None, drop_attn_list=None)
    message = f"must be said by --drop-mlp-layers, --drop-attention-layers or both.* neither {lora}'s nor {base}'s"
    refused(lora, message, base=base)
    refused(lora, "--drop-mlp-layers names layer 9", base=base, drop_mlp_layers=[9])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(next(iter(t))), r"the weights do not fit config.json: no tensor model.*\(1 such problems\)"),
        (lambda t: t.update(extra=torch.zeros(1)), "model.extra is not part of the model"),
        (lambda t: t.update({"model.layers.1.mlp.gate": torch.zeros(1)}), "layers.1.mlp.gate is not part"),
        (lambda t: t.update({"lm_head.bias": torch.zeros(1)}), "lm_head.bias is not part of the model"),
        (lambda t: t.update({"model.embed_tokens.weight": torch.zeros(2, 32)}), r"has shape \[2, 32\], not \[7"),
        (lambda t: t.update({"model.norm.weight": torch.zeros(32)}), "model.norm.weight is in another file"),
    ],
)
def test_weights_that_do_not_fit_are_an_error_that_names_them(copied, change, message):
    in_first_shard(copied, change)
    refused(copied, message)


def test_files_that_are_missing_or_damaged_are_errors_that_name_them(copied):
    shards = sorted(copied.glob("model-*.safetensors"))
    shards[1].write_bytes(shards[1].read_bytes()[:200])
    refused(copied, f"{shards[1].name}: cannot be loaded")
    shards[1].unlink()
    refused(copied, f"{shards[1].name}: cannot be loaded: No such file")
    for file in copied.glob("*model*.json"):
        file.unlink()
    refused(copied, "copied: no model.safetensors or pytorch_model.bin")
    torch.save([torch.zeros(1)], copied / "pytorch_model.bin")
    refused(copied, "pytorch_model.bin: cannot be loaded: not a dictionary of tensors")


def test_a_tokenizer_with_more_tokens_than_embeddings_is_an_error(base, lora):
    tokenizer = word_tokenizer(bos=True)
    tokenizer.add_tokens(["<instruct>", "<query>"])
    tokenizer.save_pretrained(lora)
    refused(lora, f"the tokenizer has {VOCABULARY + 2} tokens, the model embeddings for {VOCABULARY}", base=base)


def test_an_option_that_does_not_fit_is_an_error(copied):
    refused(copied, "--max-length 97: the model takes at most 96 tokens", options=EncoderOptions(max_length=97))
    refused(copied, "pooling 'min' is unknown", options=EncoderOptions(pooling="min"))


def test_an_output_that_exists_is_an_error_before_anything_is_read(tmp_path, copied):
    (tmp_path / "output").mkdir()
    (tmp_path / "output/file").touch()
    with pytest.raises(FileExistsError, match="output: exists already"):
        convert(tmp_path / "nothing", tmp_path / "output")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(next(iter(t))), r"do not fit adapter_config.json: no tensor base_model.*\(1 such problems\)"),
        (lambda t: t.update({"base_model.model.layers.0.q": torch.zeros(1)}), "layers.0.q is not part of the model"),
        (lambda t: t.update({"base_model.model.model.norm.weight": torch.zeros(32)}), "norm.weight is not part"),
        (lambda t: t.update({key: torch.zeros(3, 32) for key in list(t)[:1]}), r"has shape \[3, 32\], not \[2, "),
        (lambda t: t.update({key: t[key] + float("nan") for key in list(t)[:1]}), "adapter_model.*NaNs detected"),
    ],
)
def test_an_adapter_that_does_not_fit_is_an_error_that_names_the_key(base, lora, change, message):
    in_adapter(lora, change)
    refused(lora, message, base=base)


def test_a_module_of_the_adapter_without_weights_is_an_error(base, lora):
    in_adapter(lora, lambda tensors: [tensors.pop(key) for key in list(tensors) if "layers.0.mlp.down_proj" in key])
    refused(
        lora, r"no tensor base_model.model.model.layers.0.mlp.down_proj.lora_A.weight \(2 such problems\)", base=base
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3' is not supported, only LORA"),
        ({"peft_type": None}, "peft_type None is not supported"),
        ({"lora_alpha": None}, 'no "lora_alpha", which the merged weights depend on'),
        ({"target_modules": []}, 'no "target_modules"'),
        ({"init_lora_weights": "pissa"}, r'the setting "init_lora_weights" \(pissa\) is not supported'),
        ({"modules_to_save": ["norm"]}, r"""the setting "modules_to_save" \(\['norm'\]\) is not supported"""),
        ({"megatron_config": {"a": 1}, "megatron_core": "os"}, 'the setting "megatron_config"'),
        ({"a_setting_of_next_year": 1}, 'the setting "a_setting_of_next_year"'),
        ({"target_modules": ["no_such_module"]}, "adapter_model.safetensors: cannot be loaded: Target modules"),
    ],
)
def test_an_adapter_of_another_kind_is_an_error_that_names_the_setting(base, lora, settings, message):
    edit(lora / "adapter_config.json", **settings)
    refused(lora, message, base=base)


def test_an_adapter_without_weights_is_an_error(base, lora):
    (lora / "adapter_model.safetensors").unlink()
    refused(lora, "lora: no adapter_model.safetensors or adapter_model.bin beside adapter_config.json", base=base)


def test_without_peft_a_lora_is_an_error_that_says_what_to_install(base, lora, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    refused(lora, r"merging a LoRA needs peft: pip install 'effir_search\[train\]'", base=base)


def test_embeddings_that_cannot_be_used_are_errors(base, lora):
    save_embeddings(lora, "input_emb.pth")
    refused(
        lora, "input_emb.pth: EffiR uses input_emb.pth and lm_head.pth together, and the other one is not", base=base
    )
    path = lora / "embedding/emb.pth"
    (lora / "embedding/input_emb.pth").unlink()
    torch.save(nn.Embedding(VOCABULARY, 16), path)
    refused(lora, rf"emb.pth: embeddings of shape \[{VOCABULARY}, 16\]; the model's hidden size is 32", base=base)
    torch.save(torch.zeros(VOCABULARY, 32), path)
    refused(lora, "emb.pth: holds a Tensor, not an Embedding", base=base)
    torch.save(nn.Linear(32, VOCABULARY), path)
    refused(lora, "emb.pth: cannot be loaded: Weights only load failed", base=base)
    for damaged in (b"", path.read_bytes()[:300]):
        path.write_bytes(damaged)
        refused(lora, "emb.pth: cannot be loaded", base=base)


# The hub


def cached(cache, name, folder):
    """Put a folder into a Hugging Face cache as a model of the hub."""
    place = cache / f"models--{name.replace('/', '--')}"
    shutil.copytree(folder, place / "snapshots" / "abc123")
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("abc123")


def test_both_models_may_be_named_as_on_the_hub(tmp_path, base, lora, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    cached(tmp_path / "hub", "someone/lora", lora)
    cached(tmp_path / "hub", "someone/base", base)
    config = convert("someone/lora", tmp_path / "pruned", base="someone/base")
    assert (config.base_model, config.base_revision) == ("someone/base", "abc123")
    assert config.plan[0]["checkpoint"] == "someone/lora" and config.plan[0]["revision"] == "abc123"
    with pytest.raises(ValueError, match="LoRA adapter; merge"):
        Encoder.from_pretrained("someone/lora")


def test_the_hub_is_asked_for_pickles_only_where_a_lora_is_wanted():
    names = ["adapter_model.bin", "checkpoint-9/adapter_model.bin", "embedding/emb.pth", "pytorch_model.bin", "a.py"]
    wanted = [list(filter_repo_objects(names, allow_patterns=of)) for of in (HUB_FILES, [*HUB_FILES, *ADAPTER_FILES])]
    assert wanted == [[], names[:3]]


# The command


def test_the_command_prints_what_it_made(tmp_path, base, lora):
    (lora / "config.json").unlink()
    options = ["--drop-mlp-layers", "1, 3", "--drop-attention-layers", "2", "--query-prompt", "tea "]
    arguments = ["convert", "--from", lora, "--base", base, "--output", tmp_path / "pruned", *options]
    result = CliRunner().invoke(cli, list(map(str, arguments)))
    assert result.exit_code == 0, result.output
    now, before = (
        model.num_parameters() for model in (AutoModel.from_pretrained(tmp_path / "pruned"), language_model().model)
    )
    sizes = f"{now / 1e6:.2f} M parameters ({before / 1e6:.2f} M)"
    line = f"mistral, 2 of 4 MLPs and 1 of 4 attentions dropped, {sizes} -> {tmp_path / 'pruned'}\n"
    assert result.stdout == line
    assert Encoder.from_pretrained(tmp_path / "pruned").config.query_prompt == "tea "


def test_layers_that_are_no_numbers_are_a_usage_error(tmp_path, dropped):
    arguments = ["convert", "--from", str(dropped), "--output", str(tmp_path / "pruned"), "--drop-mlp-layers", "1;3"]
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 2 and "'1;3' is not a list of numbers such as 16,17,18" in result.output


def test_the_line_about_mistral_7b_has_the_figures_of_the_paper():
    sizes = dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32)
    base = MistralConfig(vocab_size=32000, num_key_value_heads=8, **sizes)
    config = EffirConfig(base, mlp_widths=[14336] * 16 + [0] * 16)
    # 16 MLPs of 176,160,768 weights, and their norms: 7.11 - 2.82 = 4.29.
    assert describe_conversion(config) == "mistral, 16 of 32 MLPs dropped, 4.29 B parameters (7.11 B)"
    assert describe_conversion(EffirConfig(base)).startswith("mistral, nothing dropped, 7.11 B")


def test_code_that_is_not_llm_drops_is_an_error_that_names_the_option(tmp_path, copied):
    edit(copied / "config.json", auto_map={"AutoModel": "modeling_qwen.Qwen2Model"})
    with pytest.raises(ValueError, match=r"names code of its own \(modeling_qwen.Qwen2Model\).*--stock-architecture"):
        convert(copied, tmp_path / "one")
    convert(copied, tmp_path / "one", options=EncoderOptions(stock_architecture=True))
    assert Encoder.from_pretrained(tmp_path / "one").config.pooling == "last"


def test_code_of_the_base_of_a_lora_is_an_error_that_names_the_option(tmp_path):
    model = language_model()
    base = save_checkpoint(tmp_path / "base", model)
    save_adapter(tmp_path / "lora", model)
    edit(base / "config.json", auto_map={"AutoModel": "modeling_dropped_mistral.Dropped"})  # without lists no LLM-Drop
    given = {"base": base, "drop_mlp_layers": [1]}
    with pytest.raises(ValueError, match="base/config.json: names code of its own.*--stock-architecture"):
        convert(tmp_path / "lora", tmp_path / "one", **given)
    convert(tmp_path / "lora", tmp_path / "one", **given, options=EncoderOptions(stock_architecture=True))
