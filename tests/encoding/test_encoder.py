import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import (
    FAMILIES,
    QUERIES,
    SPECIAL,
    TEXTS,
    WORDS,
    save_model,
    save_sentence_files,
    tiny_config,
    word_tokenizer,
)
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertModel, GPT2Config, GPT2Model, PreTrainedTokenizerFast, T5EncoderModel

from effir_search.encoding.batching import batches_by_length
from effir_search.encoding.config import EncoderConfig
from effir_search.encoding.devices import DTYPES
from effir_search.encoding.encoder import Encoder
from effir_search.encoding.tokenizing import append_eos_token
from effir_search.text.corpus import Document

ID = {word: number for number, word in enumerate([*SPECIAL, *WORDS])}


def assert_equals_sentence_transformers(folder, **options):
    reference = SentenceTransformer(str(folder), device="cpu")
    ours = Encoder.from_pretrained(folder, dtype="fp32", device="cpu", batch_tokens=100)
    np.testing.assert_allclose(ours.encode_documents(TEXTS), reference.encode_document(TEXTS), atol=1e-5)
    np.testing.assert_allclose(ours.encode_queries(QUERIES), reference.encode_query(QUERIES), atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_plain_model_equals_sentence_transformers(tmp_path, family):
    assert_equals_sentence_transformers(save_model(tmp_path, family))


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_plain_causal_model_equals_sentence_transformers(tmp_path, family):
    folder = save_model(tmp_path, family, causal=True)
    assert Encoder.from_pretrained(folder).config.pooling == "last"
    assert_equals_sentence_transformers(folder)


@pytest.mark.parametrize("pooling", Pooling.POOLING_MODES)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_sentence_files_equal_sentence_transformers(tmp_path, family, pooling, normalize):
    prompts = {"query": "red ? ", "document": "green : "}
    save_sentence_files(
        save_model(tmp_path, family), pooling=pooling, normalize=normalize, prompts=prompts, max_length=20
    )
    assert_equals_sentence_transformers(tmp_path)


@pytest.mark.parametrize(
    "prompts", [{"query": "red ", "passage": "green "}, {"corpus": "green "}, {"other": "green "}, {}]
)
def test_prompt_names_are_those_sentence_transformers_uses(tmp_path, prompts):
    save_sentence_files(save_model(tmp_path, "bert"), prompts=prompts)
    assert_equals_sentence_transformers(tmp_path)


@pytest.mark.parametrize("pooling", Pooling.POOLING_MODES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_prompt_left_out_of_pooling_equals_sentence_transformers(tmp_path, pooling, side):
    save_model(tmp_path, "llama", padding_side=side)
    save_sentence_files(tmp_path, pooling=pooling, prompts={"query": "red hot "}, include_prompt=False)
    assert_equals_sentence_transformers(tmp_path)


@pytest.mark.parametrize("modes", [["cls", "mean"], ["weightedmean", "max", "lasttoken"]])
def test_several_poolings_equal_sentence_transformers_also_when_they_are_saved(tmp_path, modes):
    plain = save_model(tmp_path / "plain", "bert")
    width = 32 * len(modes)
    modules = [Transformer(str(plain)), Pooling(32, modes, include_prompt=False), Dense(width, 8)]
    prompts = {"query": "red hot ", "document": "green "}
    SentenceTransformer(modules=modules, device="cpu", prompts=prompts).save(str(tmp_path / "saved"))
    assert_equals_sentence_transformers(tmp_path / "saved")
    encoder = Encoder.from_pretrained(tmp_path / "saved", dtype="fp32")
    assert encoder.config.pooling == "+".join(modes).replace("lasttoken", "last")
    encoder.save(tmp_path / "again")
    again = SentenceTransformer(str(tmp_path / "again"), device="cpu")
    np.testing.assert_allclose(encoder.encode_queries(QUERIES), again.encode_query(QUERIES), atol=1e-5)


def test_a_text_that_is_all_prompt_is_a_zero_vector_where_the_prompt_is_left_out(tmp_path):
    save_model(tmp_path, "llama", bos=False)
    for pooling in ("mean", "max", "weightedmean", "mean_sqrt_len_tokens"):
        save_sentence_files(tmp_path, pooling=pooling, prompts={"query": "red hot "}, include_prompt=False)
        vectors = Encoder.from_pretrained(tmp_path).encode_queries(["", "soup"])
        assert not vectors[0].any() and vectors[1].any(), pooling


def test_a_t5_encoder_as_sentence_transformers_saves_it_is_equal(tmp_path, caplog):
    torch.manual_seed(0)
    T5EncoderModel(tiny_config("t5")).save_pretrained(tmp_path / "plain")
    word_tokenizer(eos=True, model_max_length=int(1e30)).save_pretrained(tmp_path / "plain")
    linear = Dense(32, 16, bias=False, activation_function=torch.nn.Identity())
    modules = [Transformer(str(tmp_path / "plain")), Pooling(32, "mean"), linear, Normalize()]
    SentenceTransformer(modules=modules, device="cpu").save(str(tmp_path / "saved"))
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["is_encoder_decoder"] is False
    encoder = Encoder.from_pretrained(tmp_path / "saved", dtype="fp32")
    expected = SentenceTransformer(str(tmp_path / "saved"), device="cpu").encode_document(TEXTS)
    np.testing.assert_allclose(encoder.encode_documents(TEXTS), expected, atol=1e-6)
    assert caplog.messages == ["the model sets no length of a text: 512 tokens are read; --max-length sets another"]


@pytest.mark.parametrize("types", [False, True])
def test_gpt2_equals_sentence_transformers_with_and_without_types(tmp_path, types):
    # GPT-2 adds the embedding of token 0 to every token whose type is 0, and nothing without types.
    sizes = dict(vocab_size=len(SPECIAL) + len(WORDS), n_embd=32, n_layer=2, n_head=4, n_positions=48)
    torch.manual_seed(0)
    model = GPT2Model(GPT2Config(**sizes, bos_token_id=1, eos_token_id=2))
    with torch.no_grad():
        model.wte.weight.mul_(20)
    model.save_pretrained(tmp_path)
    names = ["input_ids", *(["token_type_ids"] if types else []), "attention_mask"]
    word_tokenizer(bos=True, model_input_names=names, model_max_length=int(1e30)).save_pretrained(tmp_path)
    assert Encoder.from_pretrained(tmp_path).config.max_length == 48
    assert_equals_sentence_transformers(tmp_path)


def test_a_model_without_a_length_reads_512_tokens_or_as_many_as_are_asked_for(tmp_path, caplog):
    save_model(tmp_path, "t5", model_max_length=int(1e30))
    long = Encoder.from_pretrained(tmp_path).encode(["tea " * 600])
    assert long.num_truncated == 1 and len(caplog.messages) == 1
    caplog.clear()
    encoder = Encoder.from_pretrained(tmp_path, max_length=700)
    assert encoder.encode(["tea " * 600]).num_truncated == 0 and not caplog.messages
    with pytest.raises(ValueError, match="--max-length 1000000000000: must be below 1,000,000,000"):
        Encoder.from_pretrained(tmp_path, max_length=10**12)


@pytest.mark.parametrize("length", ["long", True, -1, [64]])
def test_a_length_that_is_no_number_of_tokens_is_an_error(tmp_path, length):
    save_sentence_files(save_model(tmp_path, "bert"), max_length=length)
    with pytest.raises(ValueError, match="max_seq_length .* is no number of tokens"):
        Encoder.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp16"])
def test_a_dtype_of_torch_is_as_good_as_its_name(bert_folder, name):
    encoder = Encoder.from_pretrained(bert_folder, dtype=DTYPES[name])
    assert encoder.dtype == Encoder.from_pretrained(bert_folder, dtype=name).dtype == DTYPES[name]


def test_another_dtype_of_torch_is_an_error(bert_folder):
    for dtype in (torch.float64, torch.int8):
        with pytest.raises(ValueError, match=rf"--dtype {dtype!r}: known are auto, saved, fp32, bf16"):
            Encoder.from_pretrained(bert_folder, dtype=dtype)


def test_the_dimension_is_that_of_the_config_as_it_is(bert_folder):
    encoder = Encoder.from_pretrained(bert_folder)
    for changes, dimension in (({}, 32), ({"dimension": 5}, 5), ({"pooling": "cls+max"}, 64), ({"dimension": 40}, 32)):
        config = encoder.config
        encoder.config = replace(config, **changes)
        assert encoder.dimension == encoder.encode_documents(TEXTS).shape[1] == dimension
        encoder.config = config


def test_left_padding_tokenizer_equals_sentence_transformers(tmp_path):
    save_model(tmp_path, "llama", causal=True, padding_side="left")
    assert_equals_sentence_transformers(tmp_path)


def test_lower_case_setting_equals_sentence_transformers(tmp_path):
    folder = save_sentence_files(save_model(tmp_path, "bert"))
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["normalizer"] = None
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    upper = ["THE CAT", "Hot Soup"]
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 32, "do_lower_case": True}))
    encoder = Encoder.from_pretrained(folder, dtype="fp32")
    np.testing.assert_allclose(
        encoder.encode_documents(upper),
        SentenceTransformer(str(folder), device="cpu").encode_document(upper),
        atol=1e-5,
    )
    np.testing.assert_allclose(
        encoder.encode_documents(upper), encoder.encode_documents(["the cat", "hot soup"]), atol=1e-6
    )


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("truncate_dim", [None, 5])
def test_dense_modules_as_sentence_transformers_saves_them_are_equal(tmp_path, residual, truncate_dim):
    torch.manual_seed(0)
    plain = save_model(tmp_path / "plain", "bert")
    modules = [
        Transformer(str(plain)),
        Pooling(32, "mean"),
        Dense(32, 24, activation_function=torch.nn.Tanh()),
        Dense(24, 24, bias=False, activation_function=torch.nn.Identity(), use_residual=residual),
        Normalize(),
    ]
    SentenceTransformer(modules=modules, device="cpu", truncate_dim=truncate_dim).save(str(tmp_path / "saved"))
    assert_equals_sentence_transformers(tmp_path / "saved")


def test_normalize_before_dense_equals_sentence_transformers(tmp_path):
    plain = save_model(tmp_path / "plain", "bert")
    modules = [Transformer(str(plain)), Pooling(32, "cls"), Normalize(), Dense(32, 8)]
    SentenceTransformer(modules=modules, device="cpu").save(str(tmp_path / "saved"))
    assert_equals_sentence_transformers(tmp_path / "saved")
    assert not Encoder.from_pretrained(tmp_path / "saved").config.normalize


@pytest.mark.parametrize("family", ["bert", "roberta", "llama", "gemma2", "t5"])
def test_a_text_has_the_same_vector_in_any_batch(tmp_path, family):
    folder = save_model(tmp_path, family)
    alone = Encoder.from_pretrained(folder, dtype="fp32", batch_tokens=1).encode_documents(TEXTS)
    together = Encoder.from_pretrained(folder, dtype="fp32", batch_tokens=10**6).encode_documents(TEXTS)
    np.testing.assert_allclose(alone, together, rtol=1e-4, atol=1e-5)


def test_any_batching_agrees_to_cosine_09999_in_bf16(bert_folder):
    alone = Encoder.from_pretrained(bert_folder, dtype="bf16", batch_tokens=1).encode_documents(TEXTS)
    together = Encoder.from_pretrained(bert_folder, dtype="bf16", batch_tokens=10**6).encode_documents(TEXTS)
    assert alone.dtype == together.dtype == np.float32
    assert np.einsum("nd,nd->n", alone, together).min() >= 0.9999


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32", "auto"])
def test_vectors_are_float32_in_any_arithmetic_and_close_to_float32(bert_folder, dtype):
    vectors = Encoder.from_pretrained(bert_folder, dtype=dtype).encode_documents(TEXTS)
    exact = Encoder.from_pretrained(bert_folder, dtype="fp32").encode_documents(TEXTS)
    assert vectors.dtype == np.float32
    assert np.einsum("nd,nd->n", vectors, exact).min() > 0.99


def test_rows_come_in_input_order(bert_folder):
    encoder = Encoder.from_pretrained(bert_folder, batch_tokens=64)
    order = np.random.default_rng(0).permutation(len(TEXTS))
    np.testing.assert_allclose(
        encoder.encode_documents([TEXTS[row] for row in order]), encoder.encode_documents(TEXTS)[order], atol=1e-6
    )


def test_normalised_vectors_have_length_one(bert_folder):
    lengths = np.linalg.norm(Encoder.from_pretrained(bert_folder).encode_documents(TEXTS), axis=1)
    np.testing.assert_allclose(lengths, 1, atol=1e-6)


def test_documents_and_their_joined_texts_have_the_same_vector(bert_folder):
    encoder = Encoder.from_pretrained(bert_folder)
    documents = [Document("1", "eats fish", "cat"), Document("2", "eats fish", ""), Document("3", "", "cat")]
    np.testing.assert_array_equal(
        encoder.encode_documents(documents), encoder.encode_documents(["cat eats fish", "eats fish", "cat"])
    )


def test_truncated_texts_are_counted_exactly(bert_folder):
    encoder = Encoder.from_pretrained(bert_folder, max_length=6)
    # <s> and </s> leave room for four words: four fit, five do not.
    assert encoder.encode(["cat " * 4, "cat " * 5, "cat", "", "cat " * 50]).num_truncated == 2


def byte_level_tokenizer():
    """Byte-level BPE, which Qwen and ModernBERT have; every word is cut into bytes here."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def tokenizer_with_types():
    """Its second special token is of type 1, its words of type 0."""
    tokenizer = word_tokenizer(model_input_names=["input_ids", "token_type_ids", "attention_mask"])
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>:1", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return tokenizer


def tokenizer_that_pads_and_cuts_by_itself():
    tokenizer = word_tokenizer(bos=True, eos=True)
    tokenizer.backend_tokenizer.enable_padding(pad_id=0, pad_token="<pad>", length=40)
    tokenizer.backend_tokenizer.enable_truncation(3)
    return tokenizer


def tokenizer_with_appended_eos():
    tokenizer = word_tokenizer(bos=True, truncation_side="left")
    append_eos_token(tokenizer)
    return tokenizer


TOKENIZERS = {
    "no special tokens": word_tokenizer,
    "BOS and EOS": lambda: word_tokenizer(bos=True, eos=True),
    "cut on the left": lambda: word_tokenizer(bos=True, eos=True, truncation_side="left"),
    "padded on the left": lambda: word_tokenizer(bos=True, padding_side="left"),
    "appended EOS": tokenizer_with_appended_eos,
    "types": tokenizer_with_types,
    "types that are all 0": lambda: word_tokenizer(eos=True, model_input_names=["input_ids", "token_type_ids"]),
    "special tokens are text": lambda: word_tokenizer(bos=True, split_special_tokens=True),
    "byte-level": byte_level_tokenizer,
    "its own padding and length": tokenizer_that_pads_and_cuts_by_itself,
}


@pytest.mark.parametrize("make", TOKENIZERS.values(), ids=TOKENIZERS)
@pytest.mark.parametrize("prompt", ["", "red : "])
def test_tokens_are_those_the_tokenizer_gives(bert_folder, make, prompt):
    encoder, tokenizer = Encoder.from_pretrained(bert_folder, max_length=9), make()
    encoder.tokenizer = tokenizer
    texts = ["", "cat", "the cat eats fish and drinks milk", "cat eats fish </s> drinks", "Ünknown \n words", *TEXTS]
    tokenizer(texts, padding=True)  # what somebody else's call leaves behind
    tokens = encoder.tokenize(texts, prompt=prompt)
    expected = make()([prompt + text for text in texts], truncation=True, max_length=9)
    types = expected.get("token_type_ids")
    assert tokens.input_ids == expected["input_ids"]
    assert tokens.token_type_ids == types
    full = make()([prompt + text for text in texts], truncation=False, padding=False)["input_ids"]
    assert tokens.num_truncated == sum(len(ids) > 9 for ids in full) > 0


def test_empty_text_without_any_token_is_the_zero_vector(tmp_path):
    folder = save_model(tmp_path, "llama", bos=False, eos=False)
    encoder = Encoder.from_pretrained(folder)
    vectors = encoder.encode_documents(["", "cat", ""])
    assert not vectors[0].any() and not vectors[2].any() and vectors[1].any()
    assert encoder.encode_documents([""]).shape == (1, 32)
    assert encoder.encode_documents([]).shape == (0, 32)


def test_options_override_what_the_files_say(bert_folder):
    options = {
        "pooling": "cls",
        "query_prompt": "red ",
        "document_prompt": "green ",
        "max_length": 9,
        "append_eos": True,
    }
    config = Encoder.from_pretrained(bert_folder, **options).config
    assert {name: getattr(config, name) for name in options} == options
    own = Encoder.from_pretrained(bert_folder).config
    assert (own.pooling, own.query_prompt, own.document_prompt, own.max_length) == ("mean", "", "", 64)


def test_a_prompt_is_the_text_before_the_text(bert_folder):
    prompted = Encoder.from_pretrained(bert_folder, query_prompt="red ", document_prompt="green ")
    plain = Encoder.from_pretrained(bert_folder)
    np.testing.assert_allclose(prompted.encode_queries(["cat"]), plain.encode_queries(["red cat"]), atol=1e-6)
    np.testing.assert_allclose(prompted.encode_documents(["cat"]), plain.encode_documents(["green cat"]), atol=1e-6)


# Token ids worked out from the vocabulary: <s> is 1, </s> is 2, words follow from 5 on.
@pytest.mark.parametrize(
    ("bos", "eos", "ids"),
    [
        (False, False, [ID["cat"], ID["eats"], 2]),
        (True, False, [1, ID["cat"], ID["eats"], 2]),
        (True, True, [1, ID["cat"], ID["eats"], 2]),
        (False, True, [ID["cat"], ID["eats"], 2]),
    ],
)
def test_append_eos_adds_exactly_one_eos_and_keeps_bos(tmp_path, bos, eos, ids):
    tokenizer = word_tokenizer(bos=bos, eos=eos)
    append_eos_token(tokenizer)
    assert tokenizer("cat eats")["input_ids"] == ids
    tokenizer.save_pretrained(tmp_path)
    assert type(tokenizer).from_pretrained(tmp_path)("cat eats")["input_ids"] == ids


def test_append_eos_survives_truncation(tmp_path):
    tokenizer = word_tokenizer(bos=True)
    append_eos_token(tokenizer)
    assert tokenizer("cat eats fish and drinks milk", truncation=True, max_length=4)["input_ids"] == [
        1, ID["cat"], ID["eats"], 2,
    ]  # fmt: skip


def test_append_eos_keeps_a_byte_level_post_processor():
    tokenizer = word_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    append_eos_token(tokenizer)
    assert tokenizer("cat eats")["input_ids"] == [ID["cat"], ID["eats"], 2]


def test_append_eos_without_an_eos_token_is_an_error():
    with pytest.raises(ValueError, match="no EOS token"):
        append_eos_token(word_tokenizer(eos_token=None))


def test_last_pooling_with_append_eos_reads_the_eos_state(llama_folder):
    encoder = Encoder.from_pretrained(llama_folder, append_eos=True, dtype="fp32")
    ids = torch.tensor([[1, ID["cat"], ID["eats"], 2]])
    with torch.no_grad():
        expected = encoder.model(input_ids=ids).last_hidden_state[0, -1]
    np.testing.assert_allclose(encoder.encode_queries(["cat eats"])[0], expected, atol=1e-5)


def test_a_lost_add_eos_token_flag_is_warned_of(tmp_path, caplog):
    folder = save_model(tmp_path, "llama")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"add_bos_token": True, "add_eos_token": True}))
    Encoder.from_pretrained(folder)
    assert "--append-eos" in caplog.text
    caplog.clear()
    Encoder.from_pretrained(folder, append_eos=True)
    assert caplog.text == ""


def test_a_chat_template_that_is_not_used_is_warned_of(tmp_path, caplog):
    Encoder.from_pretrained(save_model(tmp_path, "llama", chat_template="{{ messages }}"))
    assert "chat template, which is not used" in caplog.text


def test_the_cache_is_off_and_no_gradients_are_kept(llama_folder):
    encoder = Encoder.from_pretrained(llama_folder)
    tokens = {"input_ids": torch.ones(1, 3, dtype=torch.long), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    assert encoder.model(**tokens).past_key_values is None
    assert not encoder.model.training


def test_weights_hash_of_one_file_is_that_of_the_file(bert_folder):
    import hashlib

    expected = hashlib.sha256((bert_folder / "model.safetensors").read_bytes()).hexdigest()
    assert Encoder.from_pretrained(bert_folder).weights_sha256 == expected


def test_batches_cover_every_row_once_within_the_budget():
    lengths = np.random.default_rng(0).integers(0, 50, size=200).tolist()
    batches = list(batches_by_length(lengths, 120))
    rows = np.concatenate(batches)
    assert sorted(rows.tolist()) == [row for row, length in enumerate(lengths) if length > 0]
    assert all(len(batch) * max(lengths[row] for row in batch) <= 120 for batch in batches)


def test_a_row_longer_than_the_budget_is_a_batch_of_its_own():
    assert [batch.tolist() for batch in batches_by_length([3, 500, 2], 10)] == [[1], [0, 2]]


def test_sharded_and_single_weights_give_the_same_vectors(tmp_path, bert_folder):
    from transformers import AutoModel

    shutil.copytree(bert_folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.safetensors").unlink()
    AutoModel.from_pretrained(bert_folder).save_pretrained(tmp_path, max_shard_size="20kB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    sharded, single = Encoder.from_pretrained(tmp_path), Encoder.from_pretrained(bert_folder)
    np.testing.assert_array_equal(sharded.encode_documents(TEXTS), single.encode_documents(TEXTS))
    assert sharded.weights_sha256 != single.weights_sha256


# What must not load. Each case damages a copy of a good folder.


@pytest.fixture
def folder(tmp_path, bert_folder):
    shutil.copytree(bert_folder, tmp_path / "model")
    return tmp_path / "model"


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_missing_tensor_is_an_error(folder):
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("layer.2.output.dense.weight"))
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"do not fit config.json: no tensor {name}"):
        Encoder.from_pretrained(folder)


def test_a_tensor_of_another_shape_is_an_error(folder):
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("layer.2.output.dense.weight"))
    tensors[name] = torch.zeros(32, 7)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=str(folder)):
        Encoder.from_pretrained(folder)


def test_a_cut_weights_file_is_an_error(folder):
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(ValueError, match=f"{folder / 'model.safetensors'}: cut or damaged, .*; get it again"):
        Encoder.from_pretrained(folder)


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_missing_file_is_an_error_that_names_it(folder, missing):
    (folder / missing).unlink()
    with pytest.raises(ValueError, match=f"no {missing}"):
        Encoder.from_pretrained(folder)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"model_type": "no-such-model"}'])
def test_a_bad_config_is_an_error(folder, content):
    (folder / "config.json").write_text(content)
    with pytest.raises(ValueError, match=str(folder)):
        Encoder.from_pretrained(folder)


def test_neither_a_folder_nor_a_hub_model_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such"):
        Encoder.from_pretrained(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="no such"):
        Encoder.from_pretrained("some-user/no-such-model")


def test_a_file_in_place_of_a_folder_is_an_error(folder):
    with pytest.raises(NotADirectoryError, match="model.safetensors: is a file"):
        Encoder.from_pretrained(folder / "model.safetensors")


def test_a_lora_adapter_is_an_error_that_says_what_to_do(folder):
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="LoRA adapter; merge"):
        Encoder.from_pretrained(folder)


def test_remote_code_is_never_run(folder):
    edit(folder / "config.json", model_type="mine", auto_map={"AutoConfig": "mine.Config", "AutoModel": "mine.Model"})
    (folder / "mine.py").write_text(f"open({str(folder / 'ran')!r}, 'w')")
    with pytest.raises(ValueError, match=str(folder)):
        Encoder.from_pretrained(folder)
    assert not (folder / "ran").exists()


CODE = [
    {"AutoModel": "modeling_qwen.Qwen2Model"},
    {"AutoConfig": "configuration_qwen.Qwen2Config"},
    {"AutoModelForCausalLM": "modeling_qwen.Qwen2ForCausalLM"},
    {"AutoModel": "someone/else--modeling_qwen.Qwen2Model"},
    {"AutoTokenizer": [None, "tokenization_qwen.Fast"]},
    {"AutoModel": "modeling_effir.EffirModel"},  # a name of ours, but not a type of ours
]


@pytest.mark.parametrize("auto_map", CODE)
@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_beside_the_weights_is_an_error_that_names_the_option(folder, auto_map, file):
    edit(folder / file, auto_map=auto_map)
    with pytest.raises(ValueError, match=rf"{file}: names code of its own \(.*which is not run; --stock-architecture"):
        Encoder.from_pretrained(folder)


@pytest.mark.parametrize("auto_map", [{}, {"AutoTokenizer": [None, None]}])
def test_an_auto_map_that_names_nothing_is_no_code(folder, auto_map):
    edit(folder / "config.json", auto_map=auto_map)
    assert not Encoder.from_pretrained(folder).stock_architecture


def test_the_stock_architecture_is_the_model_without_the_code_also_when_it_is_saved(folder, tmp_path):
    plain = Encoder.from_pretrained(folder, dtype="fp32").encode_documents(TEXTS)
    edit(folder / "config.json", auto_map=CODE[0])
    edit(folder / "tokenizer_config.json", auto_map=CODE[4])
    encoder = Encoder.from_pretrained(folder, dtype="fp32", stock_architecture=True)
    np.testing.assert_array_equal(encoder.encode_documents(TEXTS), plain)
    encoder.save(tmp_path / "saved")
    for file in ("config.json", "tokenizer_config.json"):
        assert "auto_map" not in json.loads((tmp_path / "saved" / file).read_text())
    saved = Encoder.from_pretrained(tmp_path / "saved", dtype="fp32")
    np.testing.assert_array_equal(saved.encode_documents(TEXTS), plain)


def test_code_of_the_transformer_of_a_folder_with_modules_is_found(tmp_path):
    modules = [Transformer(str(save_model(tmp_path / "plain", "bert"))), Pooling(32, "mean")]
    SentenceTransformer(modules=modules, device="cpu").save(str(tmp_path / "saved"))
    inner = tmp_path / "saved" / "0_Transformer"
    inner.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "saved" / name).rename(inner / name)
    entries = json.loads((tmp_path / "saved" / "modules.json").read_text())
    entries[0]["path"] = inner.name
    (tmp_path / "saved" / "modules.json").write_text(json.dumps(entries))
    Encoder.from_pretrained(tmp_path / "saved")
    edit(inner / "config.json", auto_map=CODE[0])
    with pytest.raises(ValueError, match="0_Transformer/config.json: names code"):
        Encoder.from_pretrained(tmp_path / "saved")


def test_a_module_of_code_of_its_own_is_an_error(folder):
    entries = json.loads((folder / "modules.json").read_text())
    entries[0]["type"] = "custom_st.Transformer"
    (folder / "modules.json").write_text(json.dumps(entries))
    for stock in (False, True):
        with pytest.raises(ValueError, match="module 0 is custom_st.Transformer, which is not supported"):
            Encoder.from_pretrained(folder, stock_architecture=stock)


def test_no_stock_architecture_is_an_error_that_does_not_offer_one(folder):
    edit(folder / "config.json", model_type="mine", auto_map=CODE[0])
    for stock in (False, True):
        with pytest.raises(ValueError, match="no model of type 'mine' to take instead"):
            Encoder.from_pretrained(folder, stock_architecture=stock)


def test_a_tokenizer_with_more_tokens_than_embeddings_is_an_error(folder):
    tokenizer = word_tokenizer(bos=True, eos=True)
    tokenizer.add_tokens([f"new{number}" for number in range(9)])
    tokenizer.save_pretrained(folder)
    with pytest.raises(ValueError, match="embeddings for"):
        Encoder.from_pretrained(folder)


@pytest.mark.parametrize("kind", ["LSTM", "WeightedLayerPooling", "Router"])
def test_another_module_is_an_error_that_names_it(folder, kind):
    modules = json.loads((folder / "modules.json").read_text())
    modules[-1]["type"] = f"sentence_transformers.models.{kind}"
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ValueError, match=kind):
        Encoder.from_pretrained(folder)


def test_a_module_of_another_package_is_an_error_that_names_it(folder):
    modules = json.loads((folder / "modules.json").read_text())
    modules[-1]["type"] = "custom_code.Normalize"
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ValueError, match="custom_code.Normalize"):
        Encoder.from_pretrained(folder)


def test_an_unknown_pooling_is_an_error_that_names_it(folder):
    with pytest.raises(ValueError, match="median"):
        Encoder.from_pretrained(folder, pooling="median")
    with pytest.raises(ValueError, match=r"pooling 'cls\+' is unknown; known are .* as in cls\+mean"):
        Encoder.from_pretrained(folder, pooling="cls+")
    edit(folder / "1_Pooling" / "config.json", pooling_mode=["mean", "median"])
    with pytest.raises(ValueError, match="pooling median is not supported; known are cls, max, mean"):
        Encoder.from_pretrained(folder)


def test_a_setting_that_changes_the_vectors_and_is_not_supported_is_an_error_that_names_it(folder):
    edit(folder / "sentence_bert_config.json", query_length=32)
    with pytest.raises(ValueError, match="query_length"):
        Encoder.from_pretrained(folder)


def test_a_similarity_that_is_no_inner_product_is_an_error_that_names_it(folder):
    edit(folder / "config_sentence_transformers.json", similarity_fn_name="euclidean")
    with pytest.raises(ValueError, match="euclidean"):
        Encoder.from_pretrained(folder)


def test_an_activation_from_elsewhere_is_not_imported(tmp_path):
    plain = save_model(tmp_path / "plain", "bert")
    SentenceTransformer(modules=[Transformer(str(plain)), Pooling(32), Dense(32, 8)], device="cpu").save(
        str(tmp_path / "m")
    )
    edit(tmp_path / "m" / "2_Dense" / "config.json", activation_function="os.system")
    with pytest.raises(ValueError, match="os.system"):
        Encoder.from_pretrained(tmp_path / "m")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 97}, "at most 96 tokens"),
        ({"max_length": 2}, "no room for text"),
        ({"device": "tpu:9"}, "tpu:9"),
        ({"device": "nonsense"}, "nonsense"),
        ({"dtype": "int3"}, "int3"),
    ],
)
def test_a_bad_option_is_an_error_that_names_it(bert_folder, options, message):
    with pytest.raises(ValueError, match=message):
        Encoder.from_pretrained(bert_folder, **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_missing_gpu_is_an_error(bert_folder):
    with pytest.raises(ValueError, match="0 CUDA devices"):
        Encoder.from_pretrained(bert_folder, device="cuda")


def test_roberta_takes_no_more_tokens_than_it_has_positions_for(tmp_path):
    folder = save_model(tmp_path, "roberta", model_max_length=10**30)
    encoder = Encoder.from_pretrained(folder)
    # RoBERTa counts positions from the padding index on: pad_token_id 0 leaves 96 - 1.
    assert encoder.config.max_length == 95
    assert np.isfinite(encoder.encode_documents(["cat " * 200])).all()


def test_a_vector_that_is_not_finite_is_an_error_that_names_the_text(folder):
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("word_embeddings.weight"))
    tensors[name][ID["cat"]] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="text 2 of 2 .*cat.*: its vector is not finite in torch"):
        Encoder.from_pretrained(folder).encode_documents(["dog", "cat"])


def test_config_rejects_an_unknown_similarity():
    with pytest.raises(ValueError, match="similarity"):
        EncoderConfig(pooling="mean", similarity="manhattan")


@pytest.mark.gpu
def test_a_gpu_gives_the_vectors_of_the_cpu(bert_folder):
    cpu = Encoder.from_pretrained(bert_folder, device="cpu", dtype="fp32").encode_documents(TEXTS)
    gpu = Encoder.from_pretrained(bert_folder, device="cuda", dtype="fp32").encode_documents(TEXTS)
    np.testing.assert_allclose(cpu, gpu, atol=1e-4)


def test_the_dimension_of_an_encoder_with_another_model_is_that_models(tmp_path):
    encoder = Encoder.from_pretrained(save_model(tmp_path / "bert", "bert"), device="cpu")
    assert encoder.dimension == 32
    config = tiny_config("bert")
    config.hidden_size = 16
    other = encoder.with_model(BertModel(config))
    assert (encoder.dimension, other.dimension) == (32, 16)
