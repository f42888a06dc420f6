import math

import pytest
import torch
from conftest import PRUNABLE, prunable_model, tiny_config
from torch.nn import functional as F
from transformers import AutoModel

from effir_search.model.families import family_of
from effir_search.model.layers import mlp_output
from effir_search.model.surgery import prune
from effir_search.pruning import gates as gates_module
from effir_search.pruning.gates import PAPER_UNITS, GatesFile, gated, learn_gates, open_of_paper, open_units

every_family = pytest.mark.parametrize("family", PRUNABLE)


def batch(seed=3, lengths=(9, 6, 3)):
    """Padded on the right."""
    ids = torch.randint(5, 70, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(seed))
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def embedded(model, tokens):
    """``(batch, 32)``, the normalised means of the real tokens."""
    mask = tokens["attention_mask"][..., None]
    return F.normalize((model(**tokens).last_hidden_state * mask).sum(dim=1), dim=-1)


def distance_to_chance(model):
    """A loss: how far embeddings are from random ones."""
    target = F.normalize(torch.randn(3, 32, generator=torch.Generator().manual_seed(8)), dim=-1)
    return lambda tokens: (embedded(model, tokens) - target).pow(2).sum()


def distance_to_itself(model, batches):
    """A loss: how far embeddings are from what they are now."""
    with torch.no_grad():
        now = {id(tokens): embedded(model, tokens) for tokens in batches}
    return lambda tokens: (embedded(model, tokens) - now[id(tokens)]).pow(2).sum()


def hooks_of(model):
    return [hook for module in model.modules() for hook in (*module._forward_hooks, *module._forward_pre_hooks)]


@every_family
@torch.no_grad()
def test_gates_at_1_change_nothing(family):
    for dtype in (torch.float32, torch.bfloat16):
        model = prune(prunable_model(family), mlp=[1], units={2: torch.arange(48) < 30}).to(dtype)
        before = model(**batch()).last_hidden_state
        with gated(model) as gates:
            assert {layer_idx: (z.dtype, *z.shape) for layer_idx, z in gates.items()} == {
                0: (torch.float32, 48),
                2: (torch.float32, 30),
                3: (torch.float32, 48),
            }
            assert torch.equal(model(**batch()).last_hidden_state, before)
            gates[2].zero_()
            assert model(**batch()).last_hidden_state.dtype == dtype
            assert not torch.equal(model(**batch()).last_hidden_state, before)
        assert torch.equal(model(**batch()).last_hidden_state, before)


@every_family
def test_the_masked_model_and_the_cut_one_agree_in_embeddings_loss_and_gradients(family):
    generator = torch.Generator().manual_seed(4)
    masks = {layer_idx: torch.rand(48, generator=generator) < 0.6 for layer_idx in (0, 2, 3)}
    # ReLU(z) is 0 for a z below 0, too.
    closed = {layer_idx: mask.float() - (torch.arange(48) % 2) * ~mask for layer_idx, mask in masks.items()}
    masked, cut = (prune(prunable_model(family), mlp=[1]) for _ in range(2))
    prune(cut, units=masks)
    with gated(masked) as gates, torch.no_grad():
        for layer_idx, z in gates.items():
            z.copy_(closed[layer_idx])
        found = embedded(masked, batch())
        with torch.enable_grad():
            found_loss = distance_to_chance(masked)(batch())
            found_loss.backward()
    expected = embedded(cut, batch())
    expected_loss = distance_to_chance(cut)(batch())
    expected_loss.backward()

    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(found_loss, expected_loss, atol=1e-5, rtol=1e-5)
    mlp, layers = family_of(cut.config).mlp, f"model.{family_of(cut.config).layers}"
    full = dict(masked.named_parameters())
    for name, parameter in cut.named_parameters():
        live = full[name].grad
        for layer_idx, mask in masks.items():
            if name.startswith(tuple(f"{layers}.{layer_idx}.{path}." for path in mlp.inputs)):
                rows = mask.repeat(len(live) // 48)
                assert not live[~rows].any()
                live = live[rows]
            elif name == f"{layers}.{layer_idx}.{mlp.output}.weight":
                assert not live[:, ~mask].any()
                live = live[:, mask]
        scale = max(1.0, float(parameter.grad.abs().max()))
        torch.testing.assert_close(live, parameter.grad, atol=1e-5 * scale, rtol=1e-4, msg=name)


def test_hooks_go_when_the_model_fails():
    model = prunable_model("llama")
    with pytest.raises(IndexError), gated(model):
        model(input_ids=torch.tensor([[10**6]]))
    assert not hooks_of(model)
    with pytest.raises(ValueError, match="'t5' cannot be pruned"), gated(AutoModel.from_config(tiny_config("t5"))):
        pass


def test_open_units_by_hand():
    one = 2 / (1 + math.exp(-5)) - 1  # 2 * sigmoid(5 * 1) - 1
    assert open_units(torch.zeros(3)) == 0 and open_units(torch.tensor([-2.0])) == 0
    assert open_units(torch.ones(1)).item() == pytest.approx(one)
    assert open_units(torch.tensor([-1.0, 0.0, 1.0, 1.0])).item() == pytest.approx(2 * one)
    assert open_units(torch.tensor([0.5]), beta=2).item() == pytest.approx(2 / (1 + math.exp(-1)) - 1)
    assert open_units(torch.tensor([100.0])).item() == pytest.approx(1)


def test_a_closed_gate_stays_closed():
    z = torch.tensor([-1.0, 0.0, 0.5], requires_grad=True)
    open_units(z).backward()
    assert z.grad[:2].tolist() == [0, 0] and z.grad[2] > 0


def test_lambda_weighs_the_sum_in_the_paper_s_setting_and_the_same_share_elsewhere():
    gates = [torch.rand(14336) for _ in range(16)]
    assert sum(map(len, gates)) == PAPER_UNITS
    assert open_of_paper(gates).item() == pytest.approx(sum(open_units(z).item() for z in gates), rel=1e-5)
    few = [torch.tensor([1.0, 0.0]), torch.tensor([1.0, 0.0, -1.0, 0.0])]  # a third is open
    assert open_of_paper(few).item() == pytest.approx(PAPER_UNITS / 3 * open_units(torch.ones(1)).item())


@every_family
def test_a_unit_that_writes_nothing_has_no_gradient_and_ends_lowest_by_the_penalty(family):
    model, batches = prunable_model(family), [batch(1), batch(2)]
    with torch.no_grad():
        mlp_output(model, 2).weight[:, 5] = 0
    loss = distance_to_chance(model)
    z = learn_gates(model, batches, loss, steps=4, penalty=0)
    assert z[2][5] == 1 and (torch.cat(list(z.values())) != 1).sum() > 100
    z = learn_gates(model, batches, distance_to_itself(model, batches), steps=20)
    assert z[2][5] < 0.8 and z[2][5] <= min(of_layer.min() for of_layer in z.values()) + 1e-4


@every_family
def test_training_lowers_the_loss(family):
    model = prunable_model(family)
    loss = distance_to_chance(model)
    before = loss(batch()).item()
    z = learn_gates(model, [batch()], loss, steps=10)
    with gated(model) as gates, torch.no_grad():
        for layer_idx, gate in gates.items():
            gate.copy_(z[layer_idx])
        assert loss(batch()).item() < before - 0.01
    assert loss(batch()).item() == before


def test_the_penalty_closes_more_the_larger_it_is():
    model = prunable_model("llama")
    num_open = []
    for penalty in (0, 1e-6, 1e-4):
        z = learn_gates(model, [batch()], distance_to_chance(model), steps=30, learning_rate=0.05, penalty=penalty)
        num_open.append(sum(int((of_layer > 0).sum()) for of_layer in z.values()))
    assert num_open[0] > num_open[1] > num_open[2]


@pytest.mark.parametrize("training", [False, True])
def test_training_gates_leaves_the_model_as_it_was(training):
    model = prunable_model("mistral").train(training)
    names = [name for name, _parameter in model.named_parameters()]
    model.get_parameter(names[2]).requires_grad_(False)
    model.get_parameter(names[3]).grad = torch.full_like(model.get_parameter(names[3]), 7)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    z = learn_gates(model, [batch()], distance_to_chance(model), steps=3, progress=False)
    assert {layer_idx: (of_layer.dtype, *of_layer.shape) for layer_idx, of_layer in z.items()} == {
        layer_idx: (torch.float32, 48) for layer_idx in range(4)
    }
    assert not any(of_layer.requires_grad for of_layer in z.values())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.requires_grad == (name != names[2])
        assert (parameter.grad == 7).all() if name == names[3] else parameter.grad is None
    assert model.training == training and not hooks_of(model)


def test_checkpointing_does_not_change_the_gates():
    found = []
    for checkpointing in (False, True):
        model = prune(prunable_model("llama"), mlp=[1]).train()
        if checkpointing:
            model.activation_checkpointing_enable()
        found.append(learn_gates(model, [batch()], distance_to_chance(model), steps=5))
    for layer_idx, z in found[0].items():
        torch.testing.assert_close(found[1][layer_idx], z, atol=1e-5, rtol=0)


def stopped_before(step, model):
    """A loss that ends the training, as Ctrl-C would, when it is asked for a step."""
    loss, asked = distance_to_chance(model), []

    def stopping(tokens):
        asked.append(tokens)
        if len(asked) == step:
            raise KeyboardInterrupt
        return loss(tokens)

    return stopping


@pytest.mark.parametrize("stopped_at", [2, 4, 7])
def test_a_training_that_was_stopped_goes_on_to_the_same_gates(tmp_path, monkeypatch, stopped_at):
    monkeypatch.setattr(gates_module, "SECONDS", 0)
    model, batches = prunable_model("bert"), [batch(1), batch(2), batch(3)]
    whole = learn_gates(model, batches, distance_to_chance(model), steps=7)
    given = {"steps": 7, "checkpoint": GatesFile(tmp_path / "gates", {"seed": 0})}
    with pytest.raises(KeyboardInterrupt):
        learn_gates(model, batches, stopped_before(stopped_at, model), **given)
    left = 7 - stopped_at + 1
    with pytest.raises(KeyboardInterrupt):  # the last step that is left, and no earlier one, is that many further
        learn_gates(model, batches, stopped_before(left, model), **given)
    found = learn_gates(model, batches, distance_to_chance(model), **given)
    assert all(torch.equal(found[layer_idx], z) for layer_idx, z in whole.items())


def test_gates_of_other_settings_or_in_a_damaged_file_begin_anew(tmp_path, caplog):
    caplog.set_level("INFO")
    model, batches, file = prunable_model("bert"), [batch(1), batch(2)], tmp_path / "gates"
    whole = learn_gates(model, batches, distance_to_chance(model), steps=3)

    def same_as_whole(seed):
        checkpoint = GatesFile(file, {"seed": seed})
        found = learn_gates(model, batches, distance_to_chance(model), steps=3, checkpoint=checkpoint)
        return all(torch.equal(found[layer_idx], z) for layer_idx, z in whole.items())

    learn_gates(model, batches, distance_to_chance(model), steps=1, checkpoint=GatesFile(file, {"seed": 1}))
    assert same_as_whole(2) and "other settings" in caplog.text
    file.write_bytes(file.read_bytes()[:-1])
    assert same_as_whole(2) and "cannot be read" in caplog.text


def test_a_checkpoint_is_written_at_once_and_then_now_and_again(tmp_path, monkeypatch):
    model, file, now = prunable_model("bert"), tmp_path / "gates", [0.0]
    monkeypatch.setattr(gates_module.time, "monotonic", lambda: now[0])
    loss, contents = distance_to_chance(model), []

    def timed(tokens):  # a step takes 25 seconds
        contents.append(file.read_bytes() if file.exists() else None)
        now[0] += 25
        return loss(tokens)

    learn_gates(model, [batch()], timed, steps=6, checkpoint=GatesFile(file, {}))
    # Written after the steps 1, at 25 s, and 4, at 100 s.
    assert [a == b for a, b in zip(contents, contents[1:], strict=False)] == [False, True, True, False, True]


def test_batches_are_repeated_if_they_can_be():
    model, seen = prunable_model("bert"), []

    def loss(tokens):
        seen.append(tokens)
        return distance_to_chance(model)(tokens)

    batches = [batch(1), batch(2), batch(3)]
    learn_gates(model, batches, loss, steps=7)
    assert [id(tokens) for tokens in seen] == [id(batches[i]) for i in (0, 1, 2, 0, 1, 2, 0)]
    unread = iter(batches)
    learn_gates(model, unread, loss, steps=2)
    assert next(unread) is batches[2]
    with pytest.raises(ValueError, match="the batches ended after 3 of 4 steps; give a list"):
        learn_gates(model, iter(batches), loss, steps=4)
    with pytest.raises(ValueError, match="no batches"):
        learn_gates(model, [], loss, steps=4)


def test_a_loss_that_gates_cannot_be_trained_by_is_an_error_that_names_the_step():
    model = prunable_model("llama")
    with pytest.raises(ValueError, match="step 3: the loss is nan"):
        learn_gates(model, [1.0, 2.0, math.nan], lambda factor: factor * embedded(model, batch()).sum(), steps=9)
    with pytest.raises(ValueError, match="step 1: the loss is inf"):
        learn_gates(model, [math.inf], lambda factor: factor + embedded(model, batch()).sum(), steps=9)
    with pytest.raises(ValueError, match="step 1: the loss has no gradient"):
        learn_gates(model, [0], lambda _batch: torch.tensor(1.0), steps=9)
    with pytest.raises(ValueError, match="steps 0 must be at least 1"):
        learn_gates(model, [0], lambda _batch: torch.tensor(1.0), steps=0)
    with pytest.raises(ValueError, match="no MLP left"):
        learn_gates(prune(model, mlp=range(4)), [0], lambda _batch: torch.tensor(1.0))
