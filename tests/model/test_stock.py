"""Pruned models as their family's own class."""

import pytest
import torch
from conftest import PRUNABLE, prunable_model
from test_modeling_effir import mask_of, states
from transformers import AutoModel

from effir_search.model.stock import as_stock
from effir_search.model.surgery import prune

every_family = pytest.mark.parametrize("family", PRUNABLE)


def narrow(family, **parts):
    """All MLPs left have 40 of their 48 units, of each layer others."""
    gone = parts.get("block", ())
    units = {i: mask_of(48, *range(i, i + 8)) for i in range(4) if i not in gone}
    return prune(prunable_model(family), units=units, **parts)


@every_family
@pytest.mark.parametrize("block", [(), (2,), (1, 3)])
def test_a_model_of_whole_blocks_and_one_width_computes_the_same_as_its_familys_class(tmp_path, family, block):
    model = narrow(family, block=list(block))
    expected = states(model)
    stock = as_stock(model)
    assert type(stock) is type(prunable_model(family))
    assert (stock.config.num_hidden_layers, stock.config.intermediate_size) == (4 - len(block), 40)
    torch.testing.assert_close(states(stock), expected, rtol=1e-5, atol=1e-5)
    stock.save_pretrained(tmp_path)
    torch.testing.assert_close(states(AutoModel.from_pretrained(tmp_path)), expected, rtol=1e-5, atol=1e-5)


@every_family
def test_the_weights_are_a_copy_in_the_same_dtype(family):
    model = narrow(family, block=[2]).to(torch.bfloat16)
    stock = as_stock(model)
    assert stock.dtype == torch.bfloat16 and sum(p.numel() for p in stock.parameters()) == sum(
        p.numel() for p in model.parameters()
    )
    before = states(model)
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter.zero_()
    assert torch.equal(states(model), before)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"mlp": [1]}, "layer 1 has no MLP, which the class of a llama always has"),
        ({"attention": [2]}, "layer 2 has no attention, which the class of a llama always has"),
        ({"units": {0: mask_of(48, 5)}}, r"MLPs have 2 widths \(47, 48\), and the class of a llama has one"),
    ],
)
def test_another_shape_is_told(parts, message):
    with pytest.raises(ValueError, match=message):
        as_stock(prune(prunable_model("llama"), **parts))


def test_the_first_layer_of_modernbert_cannot_be_replaced():
    with pytest.raises(ValueError, match="the first layer of a modernbert is built like no other"):
        as_stock(prune(prunable_model("modernbert"), block=[0]))
