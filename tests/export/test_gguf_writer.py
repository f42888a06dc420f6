"""Files for llama.cpp: read back, read by others, and told apart from what cannot be one."""

import sys

import numpy as np
import pytest
import torch
from conftest import TEXTS, randomized, save_sentence_files, tiny_config, word_tokenizer
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoModel, PreTrainedTokenizerFast
from transformers.tokenization_utils_base import generate_merges

from effir_search.encoding.encoder import Encoder
from effir_search.export.gguf_tokenizer import LLAMA_3, QWEN_2, TEKKEN
from effir_search.export.gguf_writer import write_gguf
from effir_search.model.gguf_file import LLAMA3, convert_gguf
from effir_search.model.surgery import prune

gguf = pytest.importorskip("gguf")
# Of a BERT, by their names in llama.cpp's source (src/llama-arch.cpp).
BERT = {
    "embeddings.word_embeddings": "token_embd", "embeddings.position_embeddings": "position_embd",
    "embeddings.token_type_embeddings": "token_types", "embeddings.LayerNorm": "token_embd_norm",
    "attention.self.query": "attn_q", "attention.self.key": "attn_k", "attention.self.value": "attn_v",
    "attention.output.dense": "attn_output", "attention.output.LayerNorm": "attn_output_norm",
    "intermediate.dense": "ffn_up", "output.dense": "ffn_down", "output.LayerNorm": "layer_output_norm",
}  # fmt: skip
DECODERS = ("llama", "mistral", "qwen2", "qwen3")
SPLITS = {"qwen2": QWEN_2, "qwen3": QWEN_2, "llama-bpe": LLAMA_3, "tekken": TEKKEN}
MORE = ["I've 1234 cats, don't we'LL", "Héllo  wörld\n\n x", "日本 ½ 🙂", " a", ""]


def byte_tokenizer(pre="gpt-2", *, bos=False, eos=False):
    """A byte-level tokenizer with some merges, that splits texts in one of llama.cpp's ways."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=pre in ("llama-bpe", "tekken")))
    if pre in SPLITS:
        split = pre_tokenizers.Split(Regex(SPLITS[pre]), behavior="isolated")
        steps = [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    else:
        digits = [pre_tokenizers.Digits(individual_digits=True)] if pre == "smollm" else []
        steps = [*digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS + MORE, trainer)
    return around(tokenizer, bos=bos, eos=eos)


def around(tokenizer, *, bos, eos):
    """A tokenizer that puts these tokens around each text."""
    ids = {name: tokenizer.token_to_id(name) for name in ("<s>", "</s>")}
    single = " ".join(["<s>"] * bos + ["$A"] + ["</s>"] * eos)
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=list(ids.items()))
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=96, **names)


def sentencepiece_tokenizer(*, bos=True, eos=False):
    """A tokenizer of Llama 2's kind: words' pieces by score, unknown letters as bytes."""
    pieces = sorted({f"▁{word[:end]}" for text in TEXTS for word in text.split() for end in range(1, len(word) + 1)})
    letters = sorted({letter for piece in pieces for letter in piece} | set("XYZ"))
    pieces = sorted({piece for piece in pieces if len(piece) > 1}, key=lambda piece: (len(piece), piece))
    start = ["<unk>", "<s>", "</s>", "<pad>", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocab = {token: index for index, token in enumerate([*start, *pieces, *letters])}
    scores = {piece: -float(index) for index, piece in enumerate(pieces)}
    merges = generate_merges(vocab, scores)
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>", "<pad>"])
    return around(tokenizer, bos=bos, eos=eos)


def wordpiece_tokenizer(*, lowercase=True, strip_accents=None):
    """A tokenizer of BERT's kind."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase, strip_accents=strip_accents)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=120, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=96, **names)


def tokenizer_for(family):
    match family:
        case "bert":
            return wordpiece_tokenizer()
        case "mistral":
            return sentencepiece_tokenizer()
    return byte_tokenizer("qwen2" if family.startswith("qwen") else "smollm", eos=family == "qwen3")


def save_encoder(folder, family, *, tokenizer=None, pooling="mean", normalize=True, files=None, **settings):
    """A seeded tiny encoder whose sizes suit blocks of 32 numbers."""
    tokenizer = tokenizer or tokenizer_for(family)
    config = tiny_config(family)
    config.vocab_size, config.intermediate_size, config.num_hidden_layers = len(tokenizer) + 3, 64, 2
    for name, value in settings.items():
        setattr(config, name, value)
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:2]
    torch.manual_seed(11)
    model = randomized(AutoModel.from_config(config))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return save_sentence_files(folder, pooling=pooling, normalize=normalize, **(files or {}))


def load(folder, **options):
    return Encoder.from_pretrained(folder, dtype="fp32", device="cpu", **options)


def written(tmp_path, family, *, weights="f32", options=None, **settings):
    """An encoder, and what gguf's own reader finds in the file that is written of it."""
    encoder = load(save_encoder(tmp_path / "model", family, **settings), **(options or {}))
    write_gguf(encoder, tmp_path / "model.gguf", weights=weights)
    return encoder, gguf.GGUFReader(tmp_path / "model.gguf")


def value(reader, key):
    field = reader.get_field(key)
    return None if field is None else field.contents()


@pytest.mark.parametrize("family", DECODERS)
def test_a_decoder_comes_back_as_it_was(tmp_path, family):
    encoder, _ = written(tmp_path, family, pooling="lasttoken")
    convert_gguf(tmp_path / "model.gguf", tmp_path / "back")
    back = load(tmp_path / "back", pooling="last", normalize=True)
    tensors, expected = back.model.state_dict(), encoder.model.state_dict()
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensors[name], tensor), name
    # Without the blank at the beginning: there transformers' classes of sentencepiece's kind differ from one another.
    texts = [text for text in TEXTS + MORE if not text.startswith(" ") and text]
    assert back.tokenize(texts).input_ids == encoder.tokenize(texts).input_ids
    assert np.array_equal(back.encode(texts).embeddings, encoder.encode(texts).embeddings)


@pytest.mark.parametrize("family", DECODERS)
def test_transformers_own_reader_gives_the_same_states(tmp_path, family):
    # transformers does not read the size of a Qwen3's heads, and takes it for 128.
    encoder, _ = written(tmp_path, family, **({"head_dim": 128} if family == "qwen3" else {}))
    loaded = AutoModel.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32).eval()
    ids = torch.tensor([[3, 100, 7, 257, 20]])
    with torch.no_grad():
        expected = encoder.model(ids).last_hidden_state
        torch.testing.assert_close(loaded(ids).last_hidden_state, expected, atol=1e-5, rtol=1e-5)


def test_a_bert_has_its_tensors_under_llama_cpps_names(tmp_path):
    encoder, reader = written(tmp_path, "bert")
    found = {tensor.name: tensor.data for tensor in reader.tensors}
    for name, parameter in encoder.model.named_parameters():
        if name.startswith("pooler."):
            continue
        module, _, suffix = name.rpartition(".")
        layer = module.split(".")[2] if module.startswith("encoder") else None
        there = BERT[module if layer is None else module.removeprefix(f"encoder.layer.{layer}.")]
        there = f"{there}.{suffix}" if layer is None else f"blk.{layer}.{there}.{suffix}"
        np.testing.assert_array_equal(found.pop(there), parameter.detach().numpy())
    assert not found


def test_the_file_says_what_llama_cpp_needs_for_embeddings(tmp_path):
    _, reader = written(tmp_path, "bert", pooling="cls", type_vocab_size=2)
    expected = {
        "general.architecture": "bert", "bert.context_length": 96, "bert.embedding_length": 32, "bert.block_count": 2,
        "bert.feed_forward_length": 64, "bert.attention.head_count": 4, "bert.attention.causal": False,
        "bert.pooling_type": 2, "tokenizer.ggml.token_type_count": 2, "tokenizer.ggml.model": "bert",
        "tokenizer.ggml.bos_token_id": 2, "tokenizer.ggml.cls_token_id": 2, "tokenizer.ggml.seperator_token_id": 3,
        "tokenizer.ggml.padding_token_id": 0, "tokenizer.ggml.unknown_token_id": 1, "tokenizer.ggml.mask_token_id": 4,
        "tokenizer.ggml.normalizer.lowercase": True, "tokenizer.ggml.normalizer.strip_accents": True,
    }  # fmt: skip
    assert {key: value(reader, key) for key in expected} == expected
    assert value(reader, "bert.attention.layer_norm_epsilon") == pytest.approx(1e-12)


def test_of_a_decoder_it_says_heads_rope_and_the_tokens_around_a_text(tmp_path):
    tokenizer = byte_tokenizer("gpt-2", bos=True, eos=True)
    _, reader = written(tmp_path, "llama", tokenizer=tokenizer, pooling="lasttoken")
    expected = {
        "general.architecture": "llama", "llama.attention.head_count": 4, "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 8, "llama.rope.dimension_count": 8, "llama.rope.freq_base": 10000.0,
        "llama.pooling_type": 3, "llama.attention.causal": True, "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True,
        "tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.eos_token_id": 1,
    }  # fmt: skip
    assert {key: value(reader, key) for key in expected} == expected
    kinds = value(reader, "tokenizer.ggml.token_type")
    # Three special tokens, 297 others, three embeddings without a token.
    assert kinds == [3] * 3 + [1] * 297 + [5] * 3


def test_the_rows_of_a_llamas_queries_and_keys_alternate_between_the_halves_of_a_head(tmp_path):
    encoder, reader = written(tmp_path, "llama")
    found = {tensor.name: tensor.data for tensor in reader.tensors}
    # Two heads of eight rows for keys.
    order = [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15]
    keys = encoder.model.layers[1].self_attn.k_proj.weight.detach().numpy()
    np.testing.assert_array_equal(found["blk.1.attn_k.weight"], keys[order])


def test_a_bidirectional_model_stays_one(tmp_path):
    encoder, reader = written(tmp_path, "qwen3", is_causal=False)
    assert value(reader, "qwen3.attention.causal") is False
    convert_gguf(tmp_path / "model.gguf", tmp_path / "back")
    back = load(tmp_path / "back", normalize=True)
    assert back.config.pooling == "mean"
    assert np.array_equal(back.encode(TEXTS).embeddings, encoder.encode(TEXTS).embeddings)


def test_the_scaled_rope_of_llama_3_is_written(tmp_path):
    rope = LLAMA3 | {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0}
    encoder, _ = written(tmp_path, "llama", head_dim=64, rope_parameters=rope)
    convert_gguf(tmp_path / "model.gguf", tmp_path / "back")
    back = load(tmp_path / "back", pooling="mean", normalize=True)
    assert np.array_equal(back.encode(TEXTS).embeddings, encoder.encode(TEXTS).embeddings)


@pytest.mark.parametrize(("weights", "error"), [("f16", 2**-11), ("bf16", 2**-8), ("q8_0", 1 / 127)])
def test_matrices_are_stored_as_asked_and_vectors_as_they_are(tmp_path, weights, error):
    encoder, reader = written(tmp_path, "bert", weights=weights, intermediate_size=48)
    found = {tensor.name: tensor for tensor in reader.tensors}
    layer = encoder.model.encoder.layer[0]
    for name, parameter in (("attn_v", layer.attention.self.value), ("ffn_down", layer.output.dense)):
        matrix, bias = found[f"blk.0.{name}.weight"], found[f"blk.0.{name}.bias"]
        # 48 units are no multiple of 32.
        assert matrix.tensor_type.name == ("F16" if weights == "q8_0" and name == "ffn_down" else weights.upper())
        expected = parameter.weight.detach().numpy()
        numbers = gguf.dequantize(matrix.data, matrix.tensor_type)
        assert not np.array_equal(numbers, expected)
        np.testing.assert_allclose(numbers, expected, rtol=0, atol=error * np.abs(expected).max())
        np.testing.assert_array_equal(bias.data, parameter.bias.detach().numpy())
    assert found["position_embd.weight"].tensor_type.name == "F32"


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_pruned_model_of_stock_shape_is_written_as_its_familys(tmp_path, family):
    encoder = load(save_encoder(tmp_path / "model", family))
    units = torch.arange(64) % 4 > 0  # 48 of 64
    encoder = encoder.with_model(prune(encoder.model, block=[0], units={1: units}))
    write_gguf(encoder, tmp_path / "model.gguf")
    convert_gguf(tmp_path / "model.gguf", tmp_path / "back")
    back = load(tmp_path / "back", pooling="mean", normalize=True)
    assert (back.model.config.num_hidden_layers, back.model.config.intermediate_size) == (1, 48)
    np.testing.assert_allclose(back.encode(TEXTS).embeddings, encoder.encode(TEXTS).embeddings, atol=1e-6)


def refused(tmp_path, encoder, match, error=ValueError, **options):
    with pytest.raises(error, match=match) as raised:
        write_gguf(encoder, tmp_path / "model.gguf", **options)
    assert "\n" not in str(raised.value)
    assert not [path.name for path in tmp_path.iterdir() if path.name != "model"]


@pytest.mark.parametrize(
    ("family", "settings", "match"),
    [
        ("modernbert", {}, "a modernbert cannot be written as GGUF; those that can: bert, llama, mistral, qwen2"),
        ("bert", {"hidden_act": "relu"}, "its activation is relu; llama.cpp's bert has gelu"),
        ("llama", {"hidden_act": "gelu"}, "its activation is gelu; llama.cpp's llama has silu"),
        ("bert", {"pooling": "max"}, "pooling max is not among those of GGUF: mean, cls, last"),
        ("mistral", {"sliding_window": 8}, "sees 8 tokens, .*and texts may have 96; --max-length 8 makes both the"),
        ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}, "scaled .linear"),
        ("bert", {"files": {"prompts": {"query": "q: "}, "include_prompt": False}}, "prompts are not pooled"),
        ("bert", {"tokenizer": word_tokenizer(bos=True, eos=True)}, "a tokenizer of kind WordLevel cannot be written"),
    ],
)
def test_what_llama_cpp_does_not_have_is_refused(tmp_path, family, settings, match):
    if family == "modernbert":
        settings = {"tokenizer": byte_tokenizer(), "pad_token_id": 0, "cls_token_id": 0, "sep_token_id": 0}
    refused(tmp_path, load(save_encoder(tmp_path / "model", family, **settings)), match)


def test_a_pruned_model_of_another_shape_is_refused(tmp_path):
    encoder = load(save_encoder(tmp_path / "model", "llama"))
    encoder = encoder.with_model(prune(encoder.model, mlp=[1]))
    refused(tmp_path, encoder, "layer 1 has no MLP, which the class of a llama always has")


def test_numbers_too_large_for_f16_are_refused(tmp_path):
    encoder = load(save_encoder(tmp_path / "model", "llama"))
    with torch.no_grad():
        encoder.model.layers[0].mlp.up_proj.weight[3, 5] = -1e5
    refused(tmp_path, encoder, "layers.0.mlp.up_proj.weight has numbers that do not fit in f16", weights="f16")
    refused(tmp_path, encoder, "weights 'q4' are unknown; known are f32, f16, bf16, q8_0", weights="q4")
    write_gguf(encoder, tmp_path / "model.gguf", weights="bf16")


def test_a_dense_head_is_refused(tmp_path):
    encoder = load(save_encoder(tmp_path / "model", "bert"))
    encoder.head = torch.nn.Sequential(torch.nn.Linear(32, 16))
    refused(tmp_path, encoder, "no place for what comes between pooling and the end: Dense modules")


def test_a_file_that_is_there_stays(tmp_path):
    encoder = load(save_encoder(tmp_path / "model", "bert"))
    (tmp_path / "model.gguf").write_text("mine")
    with pytest.raises(FileExistsError, match=r"model\.gguf: exists already; choose another --output"):
        write_gguf(encoder, tmp_path / "model.gguf")
    assert (tmp_path / "model.gguf").read_text() == "mine"


def test_without_the_package_its_name_is_told(tmp_path, monkeypatch):
    encoder = load(save_encoder(tmp_path / "model", "bert"))
    monkeypatch.setitem(sys.modules, "gguf", None)
    refused(tmp_path, encoder, r"writing GGUF needs gguf: pip install 'effir_search\[gguf\]'")


def test_what_is_left_to_the_caller_is_said_in_one_line(tmp_path, caplog):
    files = {"prompts": {"query": "query: "}, "similarity": "dot", "max_length": 20}
    options = {"dimension": 16}
    written(tmp_path, "bert", normalize=False, files=files, options=options)
    (line,) = [record.getMessage() for record in caplog.records if "GGUF" in record.getMessage()]
    for part in (
        "put 'query: ' before each query; ", "cut texts to 20 tokens, special ones included (the file says 96); ",
        "keep the first 16 components of a vector; ", "keep the length of vectors (--embd-normalize -1)",
    ):  # fmt: skip
        assert part in line
    assert "document" not in line


@pytest.mark.parametrize("family", ["bert", *DECODERS])
def test_llama_cpp_makes_the_same_embeddings(tmp_path, family):
    llama_cpp = pytest.importorskip("llama_cpp")
    encoder, _ = written(tmp_path, family, pooling="mean" if family == "bert" else "lasttoken")
    model = llama_cpp.Llama(str(tmp_path / "model.gguf"), embedding=True, n_ctx=96, verbose=False)
    texts = [text for text in TEXTS + MORE if text]
    vectors = encoder.encode(texts).embeddings
    for text, ids, expected in zip(texts, encoder.tokenize(texts).input_ids, vectors, strict=True):
        found = model.tokenize(text.encode())
        assert found == ids or len(found) > 96
        if found == ids:
            assert np.dot(model.embed(text, normalize=True), expected) > 0.9999
