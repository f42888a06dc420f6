import copy
import math

import numpy as np
import pytest
import torch
from conftest import PRUNABLE, prunable_model
from torch.nn import functional as F

from effir_search.model.layers import layers_of, mlp_output, mlp_widths
from effir_search.model.surgery import prune
from effir_search.pruning.choose_units import choose_units
from effir_search.pruning.gates import gated
from effir_search.pruning.unit_scores import UNIT_CRITERIA, by_activation, by_chance, by_magnitude, by_taylor

every_family = pytest.mark.parametrize("family", PRUNABLE)


def batch(seed=3, lengths=(9, 6, 3)):
    """Padded on the right, with a token that is no padding token."""
    ids = torch.randint(5, 70, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()}


def distance_to_chance(model):
    """A loss: how far mean-pooled embeddings are from random ones."""
    target = F.normalize(torch.randn(3, 32, generator=torch.Generator().manual_seed(8)), dim=-1)

    def loss(tokens):
        pooled = (model(**tokens).last_hidden_state * tokens["attention_mask"][..., None]).sum(dim=1)
        return (F.normalize(pooled, dim=-1) - target).pow(2).sum()

    return loss


def scores_of(name, model, batches):
    settings = {"steps": 5} if name == "gates" else {}
    return UNIT_CRITERIA[name](model, batches, distance_to_chance(model), **settings)


@every_family
@pytest.mark.parametrize("name", UNIT_CRITERIA)
def test_a_criterion_scores_every_unit_and_leaves_the_model_as_it_was(family, name):
    model = prune(prunable_model(family), mlp=[1], units={2: torch.arange(48) < 30})
    state = copy.deepcopy(model.state_dict())
    scores = scores_of(name, model, [batch()])
    assert {layer_idx: tuple(of_layer.shape) for layer_idx, of_layer in scores.items()} == {
        0: (48,),
        2: (30,),
        3: (48,),
    }
    for of_layer in scores.values():
        assert of_layer.dtype == torch.float32 and of_layer.device.type == "cpu" and not of_layer.requires_grad
        assert of_layer.isfinite().all() and of_layer.unique().numel() > 5
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert not [h for module in model.modules() for h in (*module._forward_hooks, *module._forward_pre_hooks)]


@every_family
@pytest.mark.parametrize("name", ["activation", "taylor", "magnitude"])
def test_a_unit_that_writes_nothing_scores_0_and_is_cut_first(family, name):
    model = prunable_model(family)
    with torch.no_grad():
        mlp_output(model, 2).weight[:, 5] = 0
    scores = scores_of(name, model, [batch(1), batch(2)])
    assert scores[2][5] == 0 and sum((of_layer == 0).sum() for of_layer in scores.values()) == 1
    masks = choose_units(scores, 1 / 192)
    assert [(i, u) for i, mask in masks.items() for u in (~mask).nonzero().flatten().tolist()] == [(2, 5)]


@every_family
def test_activation_is_that_of_the_texts_one_by_one_without_padding(family):
    model = prunable_model(family)
    batches = [batch(1), batch(2, (4, 7, 5))]
    scores = by_activation(model, batches, lambda tokens: model(**tokens))
    seen = {layer_idx: [] for layer_idx in range(4)}
    handles = [
        mlp_output(model, layer_idx).register_forward_pre_hook(lambda _m, args, i=layer_idx: seen[i].append(args[0][0]))
        for layer_idx in seen
    ]
    with torch.no_grad():
        for tokens in batches:
            for ids, mask in zip(tokens["input_ids"], tokens["attention_mask"].bool(), strict=True):
                model(input_ids=ids[mask][None], attention_mask=torch.ones(1, int(mask.sum())))
    for handle in handles:
        handle.remove()
    for layer_idx, activations in seen.items():
        activations = torch.cat(activations).numpy()
        assert activations.shape == (9 + 6 + 3 + 4 + 7 + 5, 48)
        column_norms = np.sqrt((mlp_output(model, layer_idx).weight.detach().numpy() ** 2).sum(axis=0))
        expected = np.abs(activations).mean(axis=0) * column_norms
        np.testing.assert_allclose(scores[layer_idx].numpy(), expected, rtol=1e-4, atol=1e-5)


def test_activations_are_counted_in_every_run_of_the_model_each_with_its_own_mask():
    model = prunable_model("llama")
    one, other = batch(1), batch(2, (2, 5))

    def two_towers(pair):
        return (
            model(**pair[0]).last_hidden_state.sum() + model(pair[1]["input_ids"], pair[1]["attention_mask"])[0].sum()
        )

    both = by_activation(model, [(one, other)], two_towers)
    each = [by_activation(model, [tokens], lambda tokens: model(**tokens)) for tokens in (one, other)]
    for layer_idx, scores in both.items():
        expected = (18 * each[0][layer_idx] + 7 * each[1][layer_idx]) / 25
        torch.testing.assert_close(scores, expected, atol=1e-6, rtol=1e-5)


def test_without_a_mask_all_tokens_count():
    model, tokens = prunable_model("mistral"), batch(1, (9, 9))
    without = by_activation(model, [tokens["input_ids"]], lambda ids: model(input_ids=ids))
    for layer_idx, scores in by_activation(model, [tokens], lambda tokens: model(**tokens)).items():
        torch.testing.assert_close(without[layer_idx], scores, atol=1e-6, rtol=1e-5)


def test_activations_that_no_mask_fits_are_an_error():
    model = prune(prunable_model("bert"))
    with pytest.raises(ValueError, match="must run the model as a whole"):
        by_activation(model, [batch()], lambda tokens: model.model(**tokens))
    with pytest.raises(ValueError, match="at least one token"):
        by_activation(model, [], lambda tokens: model(**tokens))
    four = torch.ones(3, 1, 9, 9)
    with pytest.raises(ValueError, match=r"attention_mask is \(3, 1, 9, 9\), but there are activations of \(3, 9\)"):
        by_activation(model, [batch()["input_ids"]], lambda ids: model(input_ids=ids, attention_mask=four))
    assert not model._forward_pre_hooks and not mlp_output(model, 0)._forward_pre_hooks


@every_family
def test_taylor_is_the_difference_that_a_gate_makes_to_the_loss(family):
    # Norms compute in float32 also in a float64 model; rows without padding, which in float64 is NaN in some kernels.
    model, tokens = prunable_model(family).double(), batch(3, (9, 9, 9))
    loss, step = distance_to_chance(model), 2**-7
    scores = by_taylor(model, [tokens], loss)
    for layer_idx, unit in ((0, 3), (2, 40), (3, 17)):
        values = []
        for z in (1 + step, 1 - step):
            with gated(model) as gates, torch.no_grad():
                gates[layer_idx][unit] = z
                values.append(loss(tokens).item())
        assert scores[layer_idx][unit] == pytest.approx(abs(values[0] - values[1]) / (2 * step), rel=0.01, abs=1e-4)


def test_taylor_is_the_activation_times_its_gradient_in_each_batch_and_the_mean_over_batches():
    model = prunable_model("llama")
    loss, batches, expected = distance_to_chance(model), [batch(1), batch(2)], 0
    for tokens in batches:
        seen = []

        def keep(_module, args, seen=seen):
            args[0].retain_grad()
            seen.append(args[0])

        handle = mlp_output(model, 1).register_forward_pre_hook(keep)
        loss(tokens).backward()
        handle.remove()
        expected = expected + (seen[0] * seen[0].grad).sum(dim=(0, 1)).abs() / 2
    model.zero_grad()
    torch.testing.assert_close(by_taylor(model, batches, loss)[1], expected.detach(), atol=1e-6, rtol=1e-4)


def test_taylor_needs_a_loss_it_can_use():
    model = prunable_model("llama")
    with pytest.raises(ValueError, match="no batches"):
        by_taylor(model, [], distance_to_chance(model))
    with pytest.raises(ValueError, match="batch 2: the loss is nan"):
        by_taylor(model, [1.0, math.nan], lambda factor: factor * distance_to_chance(model)(batch()))
    with pytest.raises(ValueError, match="batch 1: the loss has no gradient"):
        by_taylor(model, [batch()], torch.no_grad()(distance_to_chance(model)))


@pytest.mark.parametrize("family", ["bert", "llama", "modernbert", "mpnet"])
def test_magnitude_by_hand(family):
    model = prunable_model(family)
    layer = layers_of(model)[1]
    match family:
        case "llama":
            incoming, outgoing = [layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight], layer.mlp.down_proj.weight
        case "modernbert":
            incoming, outgoing = [layer.mlp.Wi.weight[:48], layer.mlp.Wi.weight[48:]], layer.mlp.Wo.weight
        case _:
            incoming, outgoing = [layer.intermediate.dense.weight], layer.output.dense.weight
    for unit, score in enumerate(by_magnitude(model)[1].tolist()):
        vectors = [*(matrix[unit] for matrix in incoming), outgoing[:, unit]]
        expected = math.prod(math.sqrt(sum(x * x for x in vector.tolist())) for vector in vectors)
        assert score == pytest.approx(expected, rel=1e-5)


def test_chance_has_a_seed():
    model = prunable_model("bert")
    once, again, other = by_chance(model), by_chance(model, seed=0), by_chance(model, seed=1)
    assert all(torch.equal(once[i], again[i]) and not torch.equal(once[i], other[i]) for i in range(4))
    assert not torch.equal(once[0], once[1])


@pytest.mark.parametrize("name", UNIT_CRITERIA)
def test_a_model_without_mlps_is_an_error(name):
    model = prune(prunable_model("bert"), mlp=range(4))
    with pytest.raises(ValueError, match="no MLP left to narrow"):
        scores_of(name, model, [batch()])


@every_family
def test_what_is_chosen_is_what_is_left(family):
    model = prune(prunable_model(family), mlp=[1], units={2: torch.arange(48) < 30})
    masks = choose_units(by_magnitude(model), 0.3)
    widths = {layer_idx: int(mask.sum()) for layer_idx, mask in masks.items()}
    assert sum(widths.values()) == 126 - round(0.3 * 126)
    narrow = mlp_widths(prune(model, units=masks))
    assert narrow == [widths[0], 0, widths[2], widths[3]]


def chosen(scores, share, **options):
    masks = choose_units(
        {i: torch.tensor(of_layer, dtype=torch.float32) for i, of_layer in scores.items()}, share, **options
    )
    assert all(mask.dtype == torch.bool for mask in masks.values())
    return {layer_idx: mask.nonzero().flatten().tolist() for layer_idx, mask in masks.items()}


def test_the_lowest_units_of_all_layers_go():
    # 0.5, 1, 2 and 3 of eight.
    assert chosen({0: [3, 4, 1, 2], 5: [7, 0.5, 6, 5]}, 0.5) == {0: [1], 5: [0, 2, 3]}
    assert chosen({0: [3, 4, 1, 2], 5: [7, 0.5, 6, 5]}, 0) == {0: [0, 1, 2, 3], 5: [0, 1, 2, 3]}


def test_a_layer_at_its_floor_loses_no_more_and_others_do_instead():
    scores = {0: [1, 2, 3, 4], 1: [5, 6, 7, 8]}
    assert chosen(scores, 0.5, floor=0) == {0: [3], 1: [1, 2, 3]}  # one unit always stays
    assert chosen(scores, 0.5, floor=0.5) == {0: [2, 3], 1: [2, 3]}
    assert chosen(scores, 0.25, floor=0.75) == {0: [1, 2, 3], 1: [1, 2, 3]}
    assert chosen(scores, 0.75, floor=0) == {0: [3], 1: [3]}


def test_of_equal_scores_the_earlier_layer_goes_first_then_the_smaller_number():
    scores = {3: [1, 1, 1], 1: [1, 1, 1]}
    assert chosen(scores, 1 / 6) == {1: [1, 2], 3: [0, 1, 2]}
    assert chosen(scores, 0.5) == {1: [2], 3: [1, 2]}


def test_groups_stay_or_go_by_their_middle_unit():
    scores = {0: [0, 1, 2, 3, 4, 5, 6, 7], 1: [4, 5, 6, 7, 8, 9, 10, 11]}
    # By single units 2 and 6 would stay: 6 and 7, and 6 to 11.
    assert chosen(scores, 0.5) == {0: [6, 7], 1: [2, 3, 4, 5, 6, 7]}
    assert chosen(scores, 0.5, multiple=2) == {0: [6, 7], 1: [2, 3, 4, 5, 6, 7]}
    assert chosen(scores, 0.5, multiple=4) == {0: [4, 5, 6, 7], 1: [4, 5, 6, 7]}
    # Of 11 the best groups of two are 11 10, 9 8, 7 6 of layer 1 and 7 6 of layer 0, which must stay. Of 5 4 and 5 4
    # the later layer's stays, and one unit is left for the other.
    assert chosen(scores, 5 / 16, multiple=2) == {0: [5, 6, 7], 1: [0, 1, 2, 3, 4, 5, 6, 7]}


@pytest.mark.parametrize("multiple", [1, 2, 8, 16])
@pytest.mark.parametrize("share", [0, 0.1, 0.3, 0.5, 0.77])
def test_the_total_is_exact_and_widths_are_near_those_of_single_units(share, multiple):
    generator = torch.Generator().manual_seed(6)
    sizes = {0: 64, 2: 48, 3: 100, 7: 33, 9: 256}
    scores = {i: torch.rand(n, generator=generator).pow(1 + i) for i, n in sizes.items()}
    single, masks = (choose_units(scores, share, floor=0.02, multiple=m) for m in (1, multiple))
    widths = {i: int(mask.sum()) for i, mask in masks.items()}
    assert sum(widths.values()) == 501 - round(share * 501)
    odd = [i for i, width in widths.items() if width % multiple and width != sizes[i]]
    assert len(odd) <= 1
    for i, mask in masks.items():
        assert abs(widths[i] - int(single[i].sum())) <= multiple
        # Within a layer the best stay.
        assert widths[i] == sizes[i] or scores[i][mask].min() > scores[i][~mask].max()
    if multiple == 1 and share < 0.5:  # no floor is reached
        stay = torch.cat([scores[i][mask] for i, mask in masks.items()])
        go = torch.cat([scores[i][~mask] for i, mask in masks.items()])
        assert not len(go) or stay.min() > go.max()


def test_the_paper_s_share_of_the_paper_s_units_is_cut_to_the_unit():
    generator = torch.Generator().manual_seed(0)
    scores = {layer_idx: torch.rand(14336, generator=generator) for layer_idx in range(16)}
    masks = choose_units(scores, 0.3, multiple=128)
    kept = [int(mask.sum()) for mask in masks.values()]
    assert sum(kept) == 229376 - 68813  # round(68812.8)
    assert sum(width % 128 != 0 for width in kept) == 1


@pytest.mark.parametrize(
    ("scores", "options", "message"),
    [
        ({0: [1, 2]}, {"share": -0.1}, "share -0.1 must be at least 0 and below 1"),
        ({0: [1, 2]}, {"share": 1}, "share 1 must be"),
        ({0: [1, 2]}, {"share": math.nan}, "share nan must be"),
        ({0: [1, 2]}, {"share": 0.5, "floor": 1.5}, "floor 1.5 must be"),
        ({0: [1, 2]}, {"share": 0.5, "multiple": 0}, "multiple 0 must be at least 1"),
        ({}, {"share": 0.5}, "no MLP left"),
        ({0: [1, 2], 3: [1, math.nan]}, {"share": 0.5}, "layer 3: the score of unit 1 is NaN"),
        ({0: [1, 2], 1: [1, 2]}, {"share": 0.75}, "--narrow 0.75 leaves 1 of 4 units, .* keep 2; lower"),
        ({0: [1, 2, 3, 4]}, {"share": 0.5, "floor": 0.75}, "leaves 2 of 4 units, .* keep 3"),
        ({0: [1, 2, 3, 4]}, {"share": 0.5, "multiple": 4}, "leaves 2 of 4 units, .* keep 4"),
    ],
)
def test_what_cannot_be_chosen_is_an_error(scores, options, message):
    with pytest.raises(ValueError, match=message):
        chosen(scores, **options)
