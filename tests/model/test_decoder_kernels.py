import copy

import pytest
import torch
from conftest import prunable_model
from peft import LoraConfig, get_peft_model
from torch import Tensor

from effir_search.model import decoder_kernels
from effir_search.model.decoder_kernels import use_decoder_kernels
from effir_search.model.layers import lora_targets
from effir_search.model.surgery import prune
from effir_search.training.data import checkpoint_activations

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


def stock_and_ours(model: torch.nn.Module) -> tuple[torch.nn.Module, torch.nn.Module]:
    model.config.use_cache = False  # as in training; with a cache the attention is the stock one
    ours = copy.deepcopy(model)
    use_decoder_kernels(ours)
    return model, ours


def assert_alike(stock: torch.nn.Module, ours: torch.nn.Module, tokens: dict[str, Tensor]) -> None:
    expected = states_and_gradients(stock, tokens, torch.float32)
    found = states_and_gradients(ours, tokens, torch.float32)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-4 * tensor.abs().max().item(), msg=name)


@pytest.mark.parametrize("family", KIN)
@pytest.mark.parametrize("lengths", [[11, 11, 11], [12, 7, 1, 3]])
def test_states_and_gradients_are_those_of_the_stock_modules(monkeypatch, family, lengths):
    # A few rows and one text at a time.
    monkeypatch.setattr(decoder_kernels, "CACHED_BYTES", 700)
    monkeypatch.setattr(decoder_kernels, "SCORE_BYTES", 1)
    assert_alike(*stock_and_ours(prunable_model(family)), batch(lengths))


@pytest.mark.parametrize("family", KIN)
@pytest.mark.parametrize("lengths", [[11, 11, 11], [12, 7]])
def test_a_model_whose_tokens_see_all_others_computes_the_same(family, lengths):
    # What a transformers config says of a language model that was trained on into an encoder of both directions.
    model, tokens = prunable_model(family), batch(lengths)
    before = model(**tokens).last_hidden_state
    model.config.is_causal = False
    assert not torch.allclose(model(**tokens).last_hidden_state, before, atol=1e-2)
    assert_alike(*stock_and_ours(model), tokens)


@pytest.mark.parametrize("family", KIN)
def test_gates_and_norms_of_every_layer_keep_two_tensors_each(family):
    model = prunable_model(family)
    use_decoder_kernels(model)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda x: x):
        model.layers[0].mlp(torch.randn(3, 32, requires_grad=True))
    weights = 3 * 32 * 48
    assert sum(kept) - weights <= 2 * 3 * 48 + 3 * 48 + 2 * 3 * 32  # gate, up, their product, twice the input


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_pruned_model_computes_the_same(family):
    model = prune(prunable_model(family), mlp=[1, 2], attention=[2], units={0: torch.arange(48) % 3 > 0})
    assert_alike(*stock_and_ours(model), batch([9, 4]))


def test_longer_texts_attend_as_in_the_stock_modules(monkeypatch):
    monkeypatch.setattr(decoder_kernels, "LONGEST", 8)
    assert_alike(*stock_and_ours(prunable_model("llama")), batch([9, 4]))


def test_padding_on_the_left_changes_nothing():
    tokens = {name: tensor.flip(1) for name, tensor in batch([9, 4]).items()}
    assert_alike(*stock_and_ours(prunable_model("llama")), tokens)


def test_lora_learns_the_same():
    model = prunable_model("llama")
    torch.manual_seed(2)
    lora = get_peft_model(model, LoraConfig(r=2, target_modules=lora_targets(model), init_lora_weights=False))
    stock, ours = stock_and_ours(lora)
    expected, found = (states_and_gradients(of, batch([9, 4]), torch.float32) for of in (stock, ours))
    trained = [name for name in expected if "lora_" in name]
    assert len(trained) == 2 * 7 * 4
    for name in trained:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-4, msg=name)


def test_checkpointed_activations_give_the_same_gradients():
    stock, ours = stock_and_ours(prunable_model("llama"))
    checkpoint_activations(ours)
    assert_alike(stock, ours, batch([9, 4]))


def test_in_bfloat16_results_are_as_near_to_float32_as_those_of_the_stock_modules():
    stock, ours = stock_and_ours(prunable_model("llama"))
    exact = states_and_gradients(copy.deepcopy(stock), batch([9, 7, 4]), torch.float32)
    errors = []
    for model in (stock, ours):
        found = states_and_gradients(model, batch([9, 7, 4]), torch.bfloat16)
        errors.append({name: (found[name] - tensor).norm() / tensor.norm() for name, tensor in exact.items()})
    assert all(errors[1][name] < 1.5 * errors[0][name] + 0.01 for name in exact), errors


def test_other_models_are_left_as_they_are():
    for family in ("bert", "gemma2"):
        model = prunable_model(family)
        use_decoder_kernels(model)
        assert not any("forward" in vars(module) for module in model.modules())
