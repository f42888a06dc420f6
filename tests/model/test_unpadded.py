"""Texts one behind the other, without padding, against the same texts padded."""

import numpy as np
import pytest
import torch
from conftest import DOCUMENTS, PRUNABLE, prunable_model, save_model

from effir_search.encoding.encoder import Encoder
from effir_search.model.surgery import prune
from effir_search.model.unpadded import NEED_PADDING, can_unpad, joined, states_of, unpadded_attention

UNPADDED = [family for family in PRUNABLE if family not in NEED_PADDING]
# Longer and shorter than the windows of prunable_model, one of a single token, two alike.
LENGTHS = (11, 7, 7, 1, 14)


def padded_batch(model) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).long()
    ids = torch.randint(3, model.config.vocab_size, mask.shape)
    batch = {"input_ids": ids * mask + (1 - mask) * (model.config.pad_token_id or 0), "attention_mask": mask}
    if model.config.model_type == "bert":
        batch["token_type_ids"] = mask * torch.randint(0, 2, mask.shape)
    return batch


def check_equal(model) -> None:
    batch = padded_batch(model)
    real = batch["attention_mask"][..., None]
    with torch.inference_mode():
        padded, without = model(**batch).last_hidden_state, states_of(model, joined(batch, model))
    torch.testing.assert_close(without, padded * real, rtol=1e-5, atol=1e-5)


def test_joined_texts_by_hand():
    model = prunable_model("llama")
    batch = {"input_ids": torch.tensor([[5, 6, 7], [8, 0, 0]]), "attention_mask": torch.tensor([[1, 1, 1], [1, 0, 0]])}
    found = joined(batch, model)
    assert found["input_ids"].tolist() == [[5, 6, 7, 8]]
    assert found["position_ids"].tolist() == [[0, 1, 2, 0]]
    assert found["starts"].tolist() == [0, 3, 4]
    assert found["starts"].dtype == torch.int32
    assert found["places"].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("family", UNPADDED)
def test_texts_have_the_states_they_have_with_padding(family):
    model = prunable_model(family)
    check_equal(model)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("family", ["bert", "modernbert", "llama", "qwen2", "xlm_roberta"])
def test_pruned_models_too(family):
    check_equal(prune(prunable_model(family), attention=[0], mlp=[1], block=[2]))


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_decoders_that_see_all_of_a_text_too(family):
    causal, model = prunable_model(family), prunable_model(family)
    model.config.is_causal = False
    check_equal(model)
    batch = padded_batch(model)
    with torch.inference_mode():
        a, b = (states_of(one, joined(batch, one)) for one in (causal, model))
    assert not torch.allclose(a, b, atol=0.1)


@pytest.mark.parametrize("family", NEED_PADDING)
def test_what_the_attention_lacks_is_padded(family):
    assert not can_unpad(prunable_model(family))


@pytest.mark.parametrize(("causal", "window"), [(False, None), (True, None), (True, 3), (False, 3)])
def test_attention_by_the_formula(causal, window):
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, 9, 4) for heads in (4, 2, 2))
    starts = torch.tensor([0, 5, 9], dtype=torch.int32)
    options = {"cu_seq_lens_q": starts, "max_length_q": 5, "scaling": 0.3, "sliding_window": window}
    found, _ = unpadded_attention(torch.nn.Module(), query, key, value, None, is_causal=causal, **options)
    text = torch.tensor([0] * 5 + [1] * 4)
    place = torch.arange(9)
    seen = text[:, None] == text
    if causal:
        seen &= place <= place[:, None]
    if window:
        seen &= (place - place[:, None]).abs() < window
    keys, values = (tensor.double().repeat_interleave(2, dim=1) for tensor in (key, value))
    products = 0.3 * torch.einsum("bhqd,bhkd->bhqk", query.double(), keys)
    exact = torch.einsum("bhqk,bhkd->bqhd", products.masked_fill(~seen, -torch.inf).softmax(-1), values)
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_an_encoder_without_padding_gives_the_same_vectors(tmp_path, family):
    encoder = Encoder.from_pretrained(save_model(tmp_path / family, family), dtype="fp32", device="cpu")
    texts = [text for _, text in DOCUMENTS.values()]
    padded = encoder.encode_documents(texts)
    assert encoder._agrees_unpadded()
    encoder.unpads = True
    np.testing.assert_allclose(encoder.encode_documents(texts), padded, rtol=1e-4, atol=1e-5)


def test_an_encoder_whose_vectors_differ_without_padding_is_found_out(tmp_path, monkeypatch, caplog):
    encoder = Encoder.from_pretrained(save_model(tmp_path / "model", "bert"), dtype="fp32", device="cpu")

    def shifted(batch, model):
        found = joined(batch, model)
        return found | {"position_ids": found["position_ids"] * 0}

    monkeypatch.setattr("effir_search.encoding.encoder.joined", shifted)
    assert not encoder._agrees_unpadded()
    assert "texts are padded" in caplog.text


@pytest.mark.gpu
@pytest.mark.parametrize("family", UNPADDED)
def test_a_gpu_gives_the_vectors_of_the_cpu_without_padding(tmp_path, family):
    folder, texts = save_model(tmp_path / family, family), [text for _, text in DOCUMENTS.values() if text]
    exact = Encoder.from_pretrained(folder, device="cpu", dtype="fp32").encode_documents(texts)
    encoder = Encoder.from_pretrained(folder, device="cuda", dtype="bf16").pack()
    assert encoder.unpads
    found = encoder.encode_documents(texts)
    cosines = (exact * found).sum(axis=1) / np.linalg.norm(exact, axis=1) / np.linalg.norm(found, axis=1)
    assert cosines.min() > 0.99
