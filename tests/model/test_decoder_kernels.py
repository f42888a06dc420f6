import copy

import pytest
import torch
from conftest import prunable_model
from torch import Tensor

from effir_search.model import decoder_kernels
from effir_search.model.decoder_kernels import use_decoder_kernels

KIN = ["llama", "mistral", "qwen2", "qwen3"]


def states_and_gradients(model: torch.nn.Module, tokens: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The last states of real tokens, and the gradient of a sum of them by every parameter."""
    model.train()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        states = model(**tokens).last_hidden_state
    real = tokens["attention_mask"].unsqueeze(-1)
    weights = torch.linspace(-1, 1, states.shape[-1])
    (states.float() * weights * real).sum().backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    return found | {"states": (states * real).detach()}


def batch(lengths: list[int]) -> dict[str, Tensor]:
    torch.manual_seed(0)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)).long()
    return {"input_ids": torch.randint(5, 60, mask.shape), "attention_mask": mask}


@pytest.mark.parametrize("family", KIN)
@pytest.mark.parametrize("lengths", [[11, 11, 11], [12, 7, 1, 3]])
def test_states_and_gradients_are_those_of_the_stock_modules(monkeypatch, family, lengths):
    # A few rows and one text at a time.
    monkeypatch.setattr(decoder_kernels, "CACHED_BYTES", 700)
    monkeypatch.setattr(decoder_kernels, "SCORE_BYTES", 1)
    stock = prunable_model(family)
    ours = copy.deepcopy(stock)
    use_decoder_kernels(ours)
    expected = states_and_gradients(stock, batch(lengths), torch.float32)
    found = states_and_gradients(ours, batch(lengths), torch.float32)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-4 * tensor.abs().max().item(), msg=name)


@pytest.mark.parametrize("family", KIN)
def test_gates_and_norms_of_every_layer_keep_two_tensors_each(family):
    model = prunable_model(family)
    use_decoder_kernels(model)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda x: x):
        model.layers[0].mlp(torch.randn(3, 32, requires_grad=True))
    weights = 3 * 32 * 48
    assert sum(kept) - weights <= 2 * 3 * 48 + 3 * 48 + 2 * 3 * 32  # gate, up, their product, twice the input
