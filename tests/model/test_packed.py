from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DOCUMENTS, FAMILIES, PRUNABLE, save_model
from torch import nn
from torch.nn import functional as F

from effir_search.encoding.encoder import Encoder
from effir_search.model import packed
from effir_search.model.layers import mlp_widths
from effir_search.model.packed import SHORT, SHORT_ATTENTION, PackedLinear, align_units, short_attention
from effir_search.model.surgery import prune

needs_bf16 = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="oneDNN has no bfloat16 on this processor"
)


@needs_bf16
@pytest.mark.parametrize("activation", ["none", "gelu"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 24), (7, 24), (3, 5, 24)])
def test_a_packed_linear_gives_the_products_of_the_linear(shape, bias, activation):
    torch.manual_seed(0)
    linear = nn.Linear(24, 40, bias=bias, dtype=torch.bfloat16)
    x = torch.randn(shape, dtype=torch.bfloat16)
    with torch.inference_mode():
        found = PackedLinear(linear, activation)(x)
        exact = F.linear(x.double(), linear.weight.double(), linear.bias.double() if bias else None)
        exact = F.gelu(exact) if activation == "gelu" else exact
    assert found.dtype == torch.bfloat16
    # bfloat16 keeps 8 bits: what is nearest to the exact product is within 1 / 256 of it.
    torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=1e-3)


@needs_bf16
@pytest.mark.parametrize("family", FAMILIES)
def test_packing_an_encoder_changes_no_vector_by_more_than_rounding(tmp_path, family):
    folder = save_model(tmp_path / family, family)
    texts = [text for _, text in DOCUMENTS.values() if text]
    plain, laid_out = (Encoder.from_pretrained(folder, device="cpu", dtype="bf16") for _ in range(2))
    laid_out.pack()
    assert any(isinstance(module, PackedLinear) for module in laid_out.model.modules())
    a, b = plain.encode_documents(texts), laid_out.encode_documents(texts)
    cosines = (a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert cosines.min() > 0.999


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("length", [1, 5, SHORT, SHORT + 1])
def test_short_attention_is_attention(length, masked):
    torch.manual_seed(0)
    query, key, value = (torch.randn(3, 2, length, 4, requires_grad=True) for _ in range(3))
    lengths = torch.tensor([length, max(1, length - 2), 1])
    mask = (torch.arange(length) < lengths[:, None])[:, None, None].expand(3, 1, length, length) if masked else None
    module = nn.Module()
    module.is_causal = False
    found, _ = short_attention(module, query, key, value, mask, scaling=0.3, dropout=0.0)
    products = 0.3 * torch.einsum("bhqd,bhkd->bhqk", query.double(), key.double())
    weights = (products if mask is None else products.masked_fill(~mask, -torch.inf)).softmax(-1)
    exact = torch.einsum("bhqk,bhkd->bqhd", weights, value.double())
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-6)
    direction = torch.randn(found.shape)
    for ours, theirs in zip(
        *(torch.autograd.grad((y * direction).sum(), (query, key, value)) for y in (found, exact)), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("shift", [0, 100, -100])
@pytest.mark.parametrize("length", [1, 5, SHORT])
def test_short_attention_in_bfloat16_is_attention_whatever_the_size_of_the_scores(length, shift, masked):
    torch.manual_seed(0)
    # Whole numbers below 128, as are their products, which bfloat16 holds as they are; the last one shifts all scores.
    query, key = (torch.randint(-3, 4, (3, 2, length, 4)).bfloat16() for _ in range(2))
    query[..., -1], key[..., -1] = 10, shift // 10
    value = torch.randn(3, length, 2, 4, dtype=torch.bfloat16).transpose(1, 2)
    mask = torch.rand(3, 1, length, length) < 0.7 if masked else None
    if masked:
        mask[..., 0] = True
    module = nn.Module()
    module.is_causal = False
    with torch.inference_mode():
        found, _ = short_attention(module, query, key, value, mask, scaling=1.0)
    scores = torch.einsum("bhqd,bhkd->bhqk", query.double(), key.double())
    weights = (scores if mask is None else scores.masked_fill(~mask, -torch.inf)).softmax(-1)
    assert found.dtype == torch.bfloat16 and found.shape == (3, length, 2, 4)
    torch.testing.assert_close(
        found.double(), torch.einsum("bhqk,bhkd->bqhd", weights, value.double()), rtol=2**-6, atol=2**-7
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("own", [True, False])
@torch.inference_mode()
def test_texts_that_attend_a_few_at_a_time_attend_as_all_at_once(monkeypatch, own, dtype):
    torch.manual_seed(0)
    query, key, value = (torch.randn(5, 2, 7, 4, dtype=dtype) for _ in range(3))
    mask = torch.rand(5 if own else 1, 1, 7, 7) < 0.7
    whole, _ = short_attention(nn.Module(), query, key, value, mask)
    monkeypatch.setattr(packed, "CACHED_BYTES", 2 * 2 * 7 * 7 * dtype.itemsize)  # two texts
    parts, _ = short_attention(nn.Module(), query, key, value, mask)
    torch.testing.assert_close(parts, whole)


def test_a_causal_attention_without_a_mask_stays_causal():
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, 6, 4) for _ in range(3))
    module = nn.Module()
    module.is_causal = True
    found, _ = short_attention(module, query, key, value, None)
    torch.testing.assert_close(found[:, 0], value[:, :, 0])  # the first token sees itself alone


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_a_row_that_sees_nothing_stays_finite(dtype):
    states = torch.randn(1, 1, 2, 4, dtype=dtype)
    found, _ = short_attention(nn.Module(), states, states, states, torch.zeros(1, 1, 2, 2, dtype=torch.bool))
    assert found.isfinite().all()


@needs_bf16
def test_a_packed_bert_runs_short_attention(bert_folder):
    encoder = Encoder.from_pretrained(bert_folder, device="cpu", dtype="bf16").pack()
    assert encoder.model.config._attn_implementation == SHORT_ATTENTION


def test_matrices_in_float32_are_left_as_they_are(bert_folder):
    encoder = Encoder.from_pretrained(bert_folder, device="cpu", dtype="fp32").pack()
    assert not any(isinstance(module, PackedLinear) for module in encoder.model.modules())


@pytest.mark.parametrize("family", PRUNABLE)
def test_units_that_are_added_to_narrowed_mlps_change_nothing(tmp_path, family):
    folder = save_model(tmp_path / family, family)
    narrowed, aligned = (Encoder.from_pretrained(folder, device="cpu", dtype="fp32") for _ in range(2))
    kept = torch.arange(mlp_widths(narrowed.model)[0]) % 5 > 0
    for encoder in (narrowed, aligned):
        encoder.model = prune(encoder.model, units={0: kept}, mlp=[1])
    align_units(aligned.model)
    widths = mlp_widths(aligned.model)
    assert widths[0] > int(kept.sum()) and not any(width % 16 for width in widths)
    texts = [text for _, text in DOCUMENTS.values() if text]
    np.testing.assert_allclose(aligned.encode_documents(texts), narrowed.encode_documents(texts), rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="this system does not list the processor's features")
def test_the_arithmetic_is_bfloat16_where_the_processor_says_it_has_it(bert_folder):
    flags = set(Path("/proc/cpuinfo").read_text().split())
    has_it = bool(flags & {"avx512_bf16", "amx_bf16"})
    found = Encoder.from_pretrained(bert_folder, device="cpu").dtype
    assert found == (torch.bfloat16 if has_it else torch.float32)
