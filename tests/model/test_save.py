import json
import logging
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import PRUNABLE, QUERIES, TEXTS, peak_memory, save_model, save_sentence_files, word_tokenizer
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from transformers import AutoModel, LlamaConfig

from effir_search.encoding.encoder import Encoder
from effir_search.model.checkpoint import hub_revision, lasting_name
from effir_search.model.sentence_files import read_sentence_files
from effir_search.model.surgery import prune
from effir_search.pruning.prune import prune_encoder
from effir_search.searching.info import describe_model


def pruned_encoder(folder, **options):
    encoder = Encoder.from_pretrained(folder, device="cpu", dtype="fp32", **options)
    units = {0: torch.arange(48) % 3 > 0}
    encoder.model = prune(encoder.model, mlp=[1], attention=[2], units=units, base_model="org/base")
    return encoder


def vectors(encoder):
    return np.concatenate([encoder.encode_documents(TEXTS), encoder.encode_queries(QUERIES)])


def reference(folder, **options):
    model = SentenceTransformer(str(folder), device="cpu", **options)
    return np.concatenate([model.encode_document(TEXTS), model.encode_query(QUERIES)])


@pytest.mark.parametrize("family", PRUNABLE)
def test_a_saved_encoder_is_the_same_for_us_and_for_sentence_transformers(tmp_path, family):
    pooling = "lasttoken" if family in ("mistral", "qwen3") else "mean"
    source = save_sentence_files(
        save_model(tmp_path / "source", family),
        pooling=pooling, prompts={"query": "red ? ", "passage": "x "}, max_length=20,
    )  # fmt: skip
    encoder = pruned_encoder(source)
    before = vectors(encoder)
    encoder.save(tmp_path / "saved")
    np.testing.assert_array_equal(vectors(encoder), before)
    loaded = Encoder.from_pretrained(tmp_path / "saved", device="cpu", dtype="fp32")
    assert loaded.config == encoder.config
    np.testing.assert_array_equal(vectors(loaded), before)
    np.testing.assert_allclose(reference(tmp_path / "saved"), before, atol=1e-5)
    # sentence-transformers saves it, and what it saved can be loaded and saved again.
    for name, previous in (("again", "saved"), ("and again", "again")):
        SentenceTransformer(str(tmp_path / previous), device="cpu").save(str(tmp_path / name))
        assert (tmp_path / name / "modeling_effir.py").is_file()
        np.testing.assert_allclose(
            vectors(Encoder.from_pretrained(tmp_path / name, device="cpu", dtype="fp32")), before, atol=1e-5
        )


ELSEWHERE = """
import json, sys
sys.modules["effir_search"] = None  # no import of it can succeed
import torch
from sentence_transformers import SentenceTransformer
from transformers import AutoModel

def load(path, **options):
    try:
        return AutoModel.from_pretrained(path, **options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"

good, bad, again = sys.argv[1:]
model = load(good, trust_remote_code=True)
model.save_pretrained(again)
ids = torch.arange(5, 14)[None]
print(json.dumps({
    "module": type(model).__module__,
    "same": torch.equal(model(ids).last_hidden_state, load(again, trust_remote_code=True)(ids).last_hidden_state),
    "vectors": SentenceTransformer(good, trust_remote_code=True).encode(["the cat", "hot soup ?"]).tolist(),
    "untrusted": load(good, trust_remote_code=False),
    "bad": load(bad, trust_remote_code=True),
}))
"""


@pytest.mark.processes
def test_the_copied_code_loads_saves_and_refuses_where_this_package_is_not(tmp_path, bert_folder):
    encoder = pruned_encoder(bert_folder)
    encoder.save(tmp_path / "good")
    shutil.copytree(tmp_path / "good", tmp_path / "bad")
    tensors = load_file(tmp_path / "bad" / "model.safetensors")
    del tensors["model.encoder.layer.0.output.dense.weight"]
    save_file(tensors, tmp_path / "bad" / "model.safetensors", metadata={"format": "pt"})
    result = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, *(str(tmp_path / name) for name in ("good", "bad", "again"))],
        capture_output=True, text=True, cwd=tmp_path,
        env={"PATH": "", "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    seen = json.loads(result.stdout.splitlines()[-1])
    assert seen["module"].startswith("transformers_modules.") and seen["same"]
    np.testing.assert_allclose(seen["vectors"], encoder.encode_documents(["the cat", "hot soup ?"]), atol=1e-5)
    assert seen["untrusted"].startswith("ValueError") and "trust_remote_code" in seen["untrusted"]
    no_tensor = "no tensor model.encoder.layer.0.output.dense.weight"
    assert seen["bad"].startswith(f"ValueError: the weights do not fit config.json: {no_tensor}")
    with pytest.raises(ValueError, match=no_tensor):
        Encoder.from_pretrained(tmp_path / "bad")


def test_settings_given_by_hand_are_saved(tmp_path, llama_folder):
    encoder = pruned_encoder(
        llama_folder, pooling="cls", query_prompt="red ", document_prompt="green ", max_length=30, append_eos=True
    )
    encoder.save(tmp_path / "saved")
    loaded = Encoder.from_pretrained(tmp_path / "saved", device="cpu", dtype="fp32")
    assert loaded.config.query_prompt == "red " and loaded.config.max_length == 30 and loaded.config.pooling == "cls"
    assert loaded.tokenizer("cat")["input_ids"] == encoder.tokenizer("cat")["input_ids"]
    np.testing.assert_array_equal(vectors(loaded), vectors(encoder))


def test_a_causal_model_without_sentence_files_keeps_its_last_token_pooling(tmp_path, llama_folder):
    encoder = pruned_encoder(llama_folder)
    assert encoder.config.pooling == "last"
    encoder.save(tmp_path / "saved")
    np.testing.assert_allclose(reference(tmp_path / "saved"), vectors(encoder), atol=1e-5)


def test_dense_modules_and_other_settings_of_the_source_are_kept(tmp_path):
    torch.manual_seed(0)
    modules = [Transformer(str(save_model(tmp_path / "plain", "bert"))), Pooling(32, "cls"), Normalize()]
    modules += [Dense(32, 24), Dense(24, 8, activation_function=torch.nn.Identity()), Normalize()]
    prompts = {"query": "red ", "document": "", "summary": "the "}
    SentenceTransformer(modules=modules, device="cpu", prompts=prompts, truncate_dim=5).save(str(tmp_path / "source"))
    encoder = pruned_encoder(tmp_path / "source")
    encoder.save(tmp_path / "saved")
    for place in ("3_Dense", "4_Dense"):
        for file in (tmp_path / "source" / place).iterdir():
            assert (tmp_path / "saved" / place / file.name).read_bytes() == file.read_bytes()
    settings = json.loads((tmp_path / "saved" / "config_sentence_transformers.json").read_text())
    assert settings["prompts"] == prompts
    before = read_sentence_files(tmp_path / "source")
    after = read_sentence_files(tmp_path / "saved")
    here = {"folder": after.folder, "transformer_folder": after.transformer_folder, "head": after.head}
    assert after == before._replace(max_length=encoder.config.max_length, **here)
    assert vectors(Encoder.from_pretrained(tmp_path / "saved")).shape[1] == 5
    np.testing.assert_allclose(reference(tmp_path / "saved"), vectors(encoder), atol=1e-5)


def test_the_dtype_is_kept_on_disk(tmp_path, bert_folder):
    encoder = Encoder.from_pretrained(bert_folder, device="cpu", dtype="bf16")
    encoder.model = prune(encoder.model, mlp=[1])
    encoder.save(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["dtype"] == "bfloat16"
    assert encoder.model.config.base_config.dtype == torch.bfloat16
    assert SentenceTransformer(str(tmp_path / "saved"), device="cpu").dtype == torch.bfloat16
    loaded = Encoder.from_pretrained(tmp_path / "saved", device="cpu", dtype="bf16")
    np.testing.assert_array_equal(vectors(loaded), vectors(encoder))


def test_the_model_card_says_what_was_dropped_from_what(tmp_path, bert_folder):
    encoder = pruned_encoder(bert_folder)
    encoder.save(tmp_path / "saved")
    card = (tmp_path / "saved" / "README.md").read_text()
    for line in (
        "org/base (bert), pruned",
        "| MLPs dropped | 1 of 4: 1 |",
        "| Attentions dropped | 1 of 4: 2 |",
        "| MLPs narrowed from 48 units | layer 0: 32 |",
        f"| Parameters | {encoder.model.num_parameters():,} of ",
        f"| Weights | {encoder.model.num_parameters() * 4:,} bytes, float32 |",
        'SentenceTransformer("saved", trust_remote_code=True)',
    ):
        assert line in card
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["base_model"] == "org/base" and config["plan"][0]["mlp"] == [1]
    assert str(tmp_path) not in json.dumps(config)


def test_the_commands_take_a_pruned_folder_as_any_other(tmp_path, bert_folder):
    encoder = pruned_encoder(bert_folder)
    encoder.save(tmp_path / "saved")
    _config, facts = describe_model(str(tmp_path / "saved"))
    assert facts["parameters"] == encoder.model.num_parameters() and facts["architecture"] == "EffirModel"
    assert Encoder.from_pretrained(tmp_path / "saved").weights_sha256 == facts["weights_sha256"]


def test_a_folder_is_whole_or_not_there(tmp_path, bert_folder):
    encoder = pruned_encoder(bert_folder)
    encoder.tokenizer = None  # breaks after the weights are written
    with pytest.raises(AttributeError):
        encoder.save(tmp_path / "saved")
    assert not list(tmp_path.iterdir())
    encoder = pruned_encoder(bert_folder)
    encoder.save(tmp_path / "saved")
    with pytest.raises(FileExistsError, match="exists already"):
        encoder.save(tmp_path / "saved")


def test_a_model_that_is_not_pruned_is_saved_as_it_is(tmp_path, bert_folder):
    encoder = Encoder.from_pretrained(bert_folder, dtype="fp32")
    encoder.save(tmp_path / "saved")
    saved = Encoder.from_pretrained(tmp_path / "saved", dtype="fp32")
    assert type(saved.model).__name__ == "BertModel"
    assert saved.config == encoder.config
    texts = ["the cat chases the small mouse", "hot soup"]
    np.testing.assert_array_equal(saved.encode_queries(texts), encoder.encode_queries(texts))
    assert str(bert_folder) not in (tmp_path / "saved" / "config.json").read_text()
    assert "trust_remote_code" not in (tmp_path / "saved" / "README.md").read_text()


# A text is encoded, since weights of the dtype that is asked for stay in the file until they are read.
LOAD_AND_ENCODE = """
import sys
from effir_search.encoding.encoder import Encoder

Encoder.from_pretrained(sys.argv[1], device="cpu", dtype="fp32").encode_documents(["the cat"])
"""


@pytest.fixture
def large_folder(tmp_path):
    """A Llama of 6 layers in float32, its MLPs 201 MB each, removed after the test."""
    config = LlamaConfig(
        vocab_size=128, hidden_size=1024, intermediate_size=16384, num_hidden_layers=6, num_attention_heads=8,
        max_position_embeddings=96, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    AutoModel.from_config(config).save_pretrained(tmp_path / "full")
    word_tokenizer(bos=True).save_pretrained(tmp_path / "full")
    yield tmp_path / "full"
    shutil.rmtree(tmp_path)


@pytest.mark.processes
@pytest.mark.slow
def test_a_pruned_model_takes_as_much_less_memory_as_was_dropped(large_folder):
    pruned_folder = large_folder.with_name("pruned")
    dropped = [1, 3, 4]
    prune_encoder(str(large_folder), pruned_folder, numbers={}, layers={"mlp": dropped})
    folders = [large_folder, pruned_folder]
    peaks = [peak_memory([sys.executable, "-c", LOAD_AND_ENCODE, str(folder)]) for folder in folders]
    sizes = [(folder / "model.safetensors").stat().st_size for folder in folders]
    assert sizes[1] > 500e6
    # Three matrices of 1,024 x 16,384 in float32 and a norm of 1,024 for each MLP.
    of_dropped = len(dropped) * 4 * (3 * 1024 * 16384 + 1024)
    assert sizes[0] - sizes[1] == pytest.approx(of_dropped, rel=1e-4)
    saved = peaks[0] - peaks[1]
    logging.info(f"peak memory: {peaks[0] / 1e6:.0f} MB full, {peaks[1] / 1e6:.0f} MB pruned")
    logging.info(f"{saved / 1e6:.0f} MB less, {saved / of_dropped:.1%} of the {of_dropped / 1e6:.0f} MB dropped")
    assert saved >= 0.9 * of_dropped


def test_the_revision_is_that_of_the_cache(tmp_path):
    assert hub_revision(tmp_path / "models--org--name" / "snapshots" / "abc123") == "abc123"
    assert hub_revision(tmp_path / "abc123") is None


def test_the_name_of_a_folder_says_nothing_of_where_it_lay_and_is_that_of_a_model(tmp_path):
    places = {
        "models/small": "small",
        "package/model": "package/model",
        "scifact/corpus.jsonl.gz": "scifact/corpus.jsonl.gz",
        "models--org--name/snapshots/a1": "org/name",
    }
    for place, name in places.items():
        (tmp_path / place).mkdir(parents=True)
        assert lasting_name(str(tmp_path / place)) == name
    assert lasting_name("org/name") == "org/name"


def test_others_may_read_every_file_of_a_model_as_the_umask_says(tmp_path, bert_folder):
    Encoder.from_pretrained(bert_folder, dtype="saved").save(tmp_path / "saved")
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "saved").rglob("*") if path.is_file()}
    os.umask(umask := os.umask(0))
    assert modes == {0o666 & ~umask}
