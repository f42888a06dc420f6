"""Tokenizers in GGUF's words: llama.cpp's algorithms find the same tokens by them."""

import json
import unicodedata

import pytest
from conftest import TEXTS
from test_gguf_writer import (
    MORE,
    byte_tokenizer,
    load,
    refused,
    save_encoder,
    sentencepiece_tokenizer,
    value,
    wordpiece_tokenizer,
    written,
)
from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors

from effir_search.export.gguf_tokenizer import vocabulary
from effir_search.model.gguf_file import convert_gguf


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "tekken", "qwen2"])
def test_the_way_texts_are_split_has_llama_cpps_name(tmp_path, pre):
    encoder, reader = written(tmp_path, "llama", tokenizer=byte_tokenizer(pre))
    assert value(reader, "tokenizer.ggml.pre") == pre
    convert_gguf(tmp_path / "model.gguf", tmp_path / "back")
    back = load(tmp_path / "back")
    assert back.tokenize(TEXTS + MORE).input_ids == encoder.tokenize(TEXTS + MORE).input_ids


def wordpiece_of_llama_cpp(text, reader):
    """llama.cpp's algorithm (llm_tokenizer_wpm_session) on what the file says; special tokens left out."""
    tokens = {token: index for index, token in enumerate(value(reader, "tokenizer.ggml.tokens"))}
    lower, strip = (value(reader, f"tokenizer.ggml.normalizer.{name}") for name in ("lowercase", "strip_accents"))
    text = unicodedata.normalize("NFD", text) if strip else text
    kept = [letter for letter in text if not (strip and unicodedata.category(letter) == "Mn")]
    apart = [f" {x} " if unicodedata.category(x)[0] == "P" or 0x4E00 <= ord(x) <= 0x9FFF else x for x in kept]
    ids = []
    for word in "".join(apart).split():
        word, place, found = "\u2581" + (word.lower() if lower else word), 0, []
        while place < len(word):
            end = next((end for end in range(len(word), place, -1) if word[place:end] in tokens), None)
            if end is None:
                found = []
                break
            found.append(tokens[word[place:end]])
            place = end
        ids += found or [value(reader, "tokenizer.ggml.unknown_token_id")]
    return ids


@pytest.mark.parametrize("options", [{}, {"lowercase": False}, {"strip_accents": False}])
def test_a_berts_tokens_are_found_by_llama_cpps_algorithm(tmp_path, options):
    encoder, reader = written(tmp_path, "bert", tokenizer=wordpiece_tokenizer(**options))
    texts = [text.title() for text in TEXTS] + [*TEXTS, *MORE, "Thé cát, tHe töp"]
    for text, ids in zip(texts, encoder.tokenize(texts).input_ids, strict=True):
        assert ids == [2, *wordpiece_of_llama_cpp(text, reader)[:94], 3], text


def sentencepiece_of_llama_cpp(text, reader):
    """llama.cpp's algorithm (llm_tokenizer_spm_session): of neighbours the pair whose token scores highest first."""
    tokens = {token: index for index, token in enumerate(value(reader, "tokenizer.ggml.tokens"))}
    scores = value(reader, "tokenizer.ggml.scores")
    pieces = list(("▁" + text.replace(" ", "▁")) if value(reader, "tokenizer.ggml.add_space_prefix") else text)
    while True:
        pairs = [(place, tokens.get(a + b)) for place, (a, b) in enumerate(zip(pieces, pieces[1:], strict=False))]
        pairs = [(-scores[token], place) for place, token in pairs if token is not None]
        if not pairs:
            break
        place = min(pairs)[1]
        pieces[place : place + 2] = [pieces[place] + pieces[place + 1]]
    parts = [[piece] if piece in tokens else [f"<0x{byte:02X}>" for byte in piece.encode()] for piece in pieces]
    return [tokens[part] for piece in parts for part in piece]


def test_tokens_of_sentencepieces_kind_are_found_by_llama_cpps_algorithm(tmp_path):
    encoder, reader = written(tmp_path, "mistral")
    texts = [text for text in TEXTS + MORE if text]
    for text, ids in zip(texts, encoder.tokenize(texts).input_ids, strict=True):
        assert ids == [1, *sentencepiece_of_llama_cpp(text, reader)][:96], text


TWO_BEFORE = processors.TemplateProcessing(single="</s> <s> $A", special_tokens=[("<s>", 0), ("</s>", 1)])


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"pre_tokenizer": pre_tokenizers.Whitespace()}, "splits texts in a way that is not known .*Whitespace"),
        ({"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=True)}, "splits texts in a way that is not known"),
        ({"normalizer": normalizers.Lowercase()}, "normalises texts, which llama.cpp does not: Lowercase"),
        ({"post_processor": TWO_BEFORE}, "makes of a text </s> <s> TEXT; llama.cpp puts at most one token before"),
    ],
)  # fmt: skip
def test_a_step_of_the_tokenizer_that_llama_cpp_does_not_have_is_named(tmp_path, change, match):
    encoder = load(save_encoder(tmp_path / "model", "llama"))
    for part, step in change.items():
        setattr(encoder.tokenizer.backend_tokenizer, part, step)
    refused(tmp_path, encoder, match)


def test_a_token_without_an_embedding_is_refused():
    with pytest.raises(ValueError, match="the tokenizer has an id 299, and the model 200 embeddings"):
        vocabulary(byte_tokenizer(), 200)


def test_two_tokens_that_would_be_spelled_alike_are_refused():
    tokenizer = wordpiece_tokenizer()
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    # A word "x" and the end of a word "\u2581x".
    state["model"]["vocab"] |= {"xx": 120, "##\u2581xx": 121}
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state))
    with pytest.raises(ValueError, match="two tokens that GGUF calls alike: '\u2581xx'"):
        vocabulary(tokenizer, 122)


def without_a_pair(model):
    model["merges"].remove(["\u2581", "c"])


def with_a_pair_too_late(model):
    """ "\u2581cat" is merged of "\u2581ca" and "t", then others are, and then it is of "\u2581c" and "at"."""
    model["vocab"]["at"] = len(model["vocab"])
    model["merges"] += [["a", "t"], ["\u2581c", "at"]]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (without_a_pair, "does not merge '\u2581' and 'c', which llama.cpp would"),
        (with_a_pair_too_late, "merges are in an order that scores of tokens cannot say: '\u2581cat'"),
    ],
)
def test_merges_that_scores_cannot_say_are_refused(change, match):
    tokenizer = sentencepiece_tokenizer()
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary(tokenizer, 500)
    change(state["model"])
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state))
    with pytest.raises(ValueError, match=match):
        vocabulary(tokenizer, 500)
