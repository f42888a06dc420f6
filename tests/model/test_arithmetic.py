import time

import pytest
import torch
import transformers
from conftest import PRUNABLE, prunable_model, tiny_config
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel

from effir_search.model.arithmetic import count, empty_model, facts, flops, format_facts, part_parameters, planned
from effir_search.model.layers import PART_KINDS, parts_of
from effir_search.model.surgery import prune

every_family = pytest.mark.parametrize("family", PRUNABLE)


def mistral_7b():
    return transformers.MistralConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8,
    )  # fmt: skip


def test_the_paper_s_table_comes_out_of_mistral_7b_s_config_in_seconds():
    """Source: arXiv 2512.20612, parameters without LM head, in 10^9."""
    start = time.process_time()
    plans = {
        7.1: {},
        4.3: {"drop_mlp": 16},
        3.6: {"drop_mlp": 20},
        2.9: {"drop_mlp": 24},
        6.4: {"drop_attention": 16},
        5.4: {"drop_block": 8},
        3.4: {"drop_mlp": 16, "narrow": 0.3},
    }
    for billions, plan in plans.items():
        parameters = count(empty_model(planned(mistral_7b(), **plan))).parameters
        assert round(parameters / 1e9, 1) == billions
    assert time.process_time() - start < 5


def test_the_parts_of_mistral_7b():
    sizes = count(empty_model(mistral_7b()))
    # A layer: attention 2 * 4096 * 4096 + 2 * 4096 * 1024, MLP 3 * 4096 * 14336.
    assert sizes.attention == 32 * 41_943_040
    assert sizes.mlp == 32 * 176_160_768
    assert sizes.embeddings == sizes.lm_head == 32000 * 4096
    # Two norms a layer and the last one.
    assert sizes.parameters == sizes.attention + sizes.mlp + sizes.embeddings + 65 * 4096
    assert sizes.without_embeddings == sizes.parameters - 131_072_000
    assert sizes.with_lm_head == 7_241_732_096  # what the published model has
    assert sizes.bytes(torch.bfloat16) == 2 * sizes.parameters and sizes.bytes(torch.float32) == 4 * sizes.parameters
    half = count(empty_model(planned(mistral_7b(), drop_mlp=16, narrow=0.3)))
    # Of the MLP weights 35 % are left: 16 of 32, 10035 of 14336 units each.
    assert half.mlp / sizes.mlp == pytest.approx(0.35, abs=1e-4)


def test_flops_of_mistral_7b():
    # A token: 2 * (41,943,040 + 176,160,768) * 32; the attention of 100 tokens: 4 * 100^2 * 4096 in each of 32 layers.
    by_hand = 100 * 2 * 218_103_808 * 32 + 4 * 100**2 * 4096 * 32
    assert flops(empty_model(mistral_7b()), 100) == by_hand


@every_family
def test_flops_are_those_torch_counts(family):
    model = prune(prunable_model(family), mlp=[1], attention=[2], block=[3], units={0: torch.arange(48) < 31})
    model.set_attn_implementation("eager")  # its two products are plain ones, which torch counts on a CPU
    ids = torch.arange(5, 16)[None]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=ids, attention_mask=torch.ones_like(ids))
    assert flops(model, 11) == counter.get_total_flops()


@every_family
def test_a_config_alone_has_the_sizes_of_the_model(family):
    base = prunable_model(family)
    full = base.num_parameters()
    assert count(empty_model(base.config)).parameters == full
    pruned = prune(base, mlp=[2, 3], attention=[3])
    on_paper = count(empty_model(planned(base.config, drop_mlp=2, drop_attention=1)))
    assert count(pruned) == on_paper == count(empty_model(pruned.config))
    assert on_paper.parameters == sum(tensor.numel() for tensor in pruned.state_dict().values()) < full
    again = planned(pruned.config, drop_block=1, narrow=0.5)
    assert again.mlp_widths == [24, 24, 0, 0] and again.dropped_attention == [2, 3]


@every_family
def test_narrowing_on_paper_is_narrowing(family):
    base = prunable_model(family)
    masks = {layer_idx: torch.arange(48) < 36 for layer_idx in range(4)}
    on_paper = count(empty_model(planned(base.config, narrow=0.25)))
    assert on_paper == count(prune(base, units=masks))


@pytest.mark.parametrize("family", ["llama", "gemma2", "bert"])
def test_an_lm_head_counts_where_a_language_model_has_its_own(family):
    config = tiny_config(family)
    sizes = count(empty_model(config))
    if family == "llama":
        language_model = transformers.AutoModelForCausalLM.from_config(config)
        assert sizes.with_lm_head == language_model.num_parameters()
        assert sizes.without_embeddings == AutoModel.from_config(config).num_parameters(exclude_embeddings=True)
    else:  # Gemma's is its embeddings, BERT has none
        assert sizes.lm_head == 0


@pytest.mark.parametrize("build", [empty_model, planned])
def test_the_config_is_left_as_it_is(build):
    config = tiny_config("mistral")
    before = config.to_dict()
    build(config)
    assert config.to_dict() == before


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"drop_mlp": 5}, "5 MLPs cannot be dropped; there are 4"),
        ({"drop_attention": -1}, "-1 attentions"),
        ({"drop_block": 2, "drop_mlp": 3}, "3 MLPs cannot be dropped; there are 2"),
        ({"drop_block": 4}, "only embeddings"),
        ({"drop_mlp": 4, "drop_attention": 4}, "only embeddings"),
        ({"drop_block": 3, "drop_mlp": 1, "drop_attention": 1}, "only embeddings"),
        ({"narrow": 1.0}, "narrow 1.0 must be"),
    ],
)
def test_a_plan_that_cannot_be_is_an_error(plan, message):
    with pytest.raises(ValueError, match=message):
        planned(tiny_config("bert"), **plan)


def test_a_family_that_cannot_be_pruned_is_an_error():
    for attempt in (planned, empty_model):
        with pytest.raises(ValueError, match="'t5' cannot be pruned"):
            attempt(tiny_config("t5"))


@every_family
@pytest.mark.parametrize("kind", PART_KINDS)
def test_a_part_s_parameters_are_those_that_go_with_it(family, kind):
    for earlier in ({}, {"mlp": [1], "attention": [2]}):
        for layer_idx in parts_of(prune(prunable_model(family), **earlier), kind):
            model = prune(prunable_model(family), **earlier)
            before, expected = count(model).parameters, part_parameters(model, kind, layer_idx)
            assert before - count(prune(model, **{kind: [layer_idx]})).parameters == expected > 0


def test_two_models_side_by_side():
    full = facts(empty_model(mistral_7b()), length=10, dtype=torch.float16)
    half = facts(empty_model(planned(mistral_7b(), drop_mlp=16)), length=10, dtype=torch.float16)
    assert full["weights_bytes"] == 2 * full["parameters"] == 14_221_320_192
    lines = format_facts(full, half).splitlines()
    assert lines[0].split() == ["full", "pruned"]
    assert lines[1].split() == ["parameters", "7,110,660,096", "4,292,022,272", "60.4%"]
    assert len(set(map(len, lines[1:]))) == 1
