import contextlib
import itertools
import re

import numpy as np
import pytest
import torch
from conftest import PRUNABLE, prunable_model, save_model, save_sentence_files
from torch.nn import functional as F

from effir_search.encoding.batching import Tokens
from effir_search.encoding.encoder import Encoder
from effir_search.model.families import family_of
from effir_search.model.layers import PART_KINDS, layers_of, left_out, parts_of
from effir_search.model.surgery import prune
from effir_search.pruning.drift import drift, drifts
from effir_search.pruning.dropping_order import CRITERIA, announce, by_cosine, by_embedding, greedily, num_passes
from effir_search.pruning.importance import importance

every_family = pytest.mark.parametrize("family", PRUNABLE)
pre_norm_families = pytest.mark.parametrize(
    "family", [family for family in PRUNABLE if not family_of(prunable_model(family).config).post_norm]
)
TEXTS = ["the cat eats fish", "hot tomato soup with onion , pepper and oil .", "tea", "the dog sleeps in the kitchen"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny model folder of each family, made when it is first asked for."""
    made = {}

    def folder(family):
        if family not in made:
            made[family] = save_sentence_files(save_model(tmp_path_factory.mktemp(family), family))
        return made[family]

    return folder


def load(folder):
    return Encoder.from_pretrained(folder, dtype="fp32", device="cpu")


def cosine_of(a, b):
    return F.cosine_similarity(a.double(), b.double(), dim=-1)


def one_text(length=7):
    ids = torch.randint(5, 70, (1, length), generator=torch.Generator().manual_seed(5))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@every_family
@torch.no_grad()
def test_a_block_s_importance_is_that_of_the_hidden_states_around_it(family):
    model, tokens = prunable_model(family), one_text()
    states = model(**tokens, output_hidden_states=True).hidden_states
    found = importance(model, [tokens])["block"]
    assert found.dtype == torch.float64 and found.shape == (4,)
    # The last of the hidden states has gone through the final norm in pre-norm families.
    for layer_idx in range(3):
        expected = (1 - cosine_of(states[layer_idx], states[layer_idx + 1])).mean()
        assert found[layer_idx] == pytest.approx(expected.item(), abs=1e-6)


@torch.no_grad()
def test_the_importance_of_a_bert_s_parts_by_its_own_modules():
    model, tokens = prunable_model("bert"), one_text()
    states = model(**tokens, output_hidden_states=True).hidden_states
    found = importance(model, [tokens])
    for layer_idx, layer in enumerate(model.encoder.layer):
        middle = layer.attention(states[layer_idx])[0]  # LN(x + attention(x))
        attention, mlp = cosine_of(states[layer_idx], middle), cosine_of(middle, states[layer_idx + 1])
        assert found["attention"][layer_idx] == pytest.approx(1 - attention.mean().item(), abs=1e-6)
        assert found["mlp"][layer_idx] == pytest.approx(1 - mlp.mean().item(), abs=1e-6)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@torch.no_grad()
def test_the_importance_of_a_decoder_s_mlp_by_its_own_modules(family):
    model, tokens = prunable_model(family), one_text()
    layer, inputs = layers_of(model)[1], []
    before = family_of(model.config).mlp.reads
    handle = layer.get_submodule(before).register_forward_pre_hook(lambda _module, args: inputs.append(args[0]))
    found = importance(model, [tokens])["mlp"][1]
    handle.remove()
    x = inputs[0]  # what the layer's second half reads
    if family == "llama":
        y = x + layer.mlp(layer.post_attention_layernorm(x))
    else:
        y = x + layer.post_feedforward_layernorm(layer.mlp(layer.pre_feedforward_layernorm(x)))
    assert found == pytest.approx((1 - cosine_of(x, y)).mean().item(), abs=1e-6)


@every_family
def test_padding_does_not_count(family):
    model = prunable_model(family)
    tokens = one_text(9)["input_ids"][0]
    lengths = (9, 4)
    rows = [{"input_ids": tokens[None, :n], "attention_mask": torch.ones(1, n, dtype=torch.long)} for n in lengths]
    mask = torch.tensor([[1] * 9, [1] * 4 + [0] * 5])
    padded = {"input_ids": tokens.expand(2, -1) * mask, "attention_mask": mask}
    one_by_one, together = importance(model, rows), importance(model, [padded])
    alone = [importance(model, [row]) for row in rows]
    for kind in PART_KINDS:
        torch.testing.assert_close(together[kind], one_by_one[kind], atol=2e-6, rtol=0)
        # The mean over tokens, not over texts.
        torch.testing.assert_close(one_by_one[kind], (9 * alone[0][kind] + 4 * alone[1][kind]) / 13, atol=1e-9, rtol=0)


@pre_norm_families
@pytest.mark.parametrize("kind", ["mlp", "attention"])
def test_a_part_that_writes_nothing_has_importance_0_and_goes_first(family, kind, folders):
    encoder = load(folders(family))
    model = encoder.model
    part = getattr(family_of(model.config), kind)
    with torch.no_grad():
        for parameter in layers_of(model)[2].get_submodule(part.output).parameters():
            parameter.zero_()
    tokens = encoder.tokenize(TEXTS)
    scores = importance(model, [batch for _, batch in encoder.batches(tokens)])[kind]
    assert scores[2] == pytest.approx(0, abs=1e-6) and scores.argmin() == 2
    for criterion in CRITERIA.values():
        first, second = criterion(encoder, tokens, [kind], 2)[kind]
        assert first.layer_idx == 2 and first.score == pytest.approx(0, abs=1e-6) and second.score > 1e-5


@every_family
def test_what_was_dropped_has_no_importance_and_is_in_no_order(family, folders):
    encoder = load(folders(family))
    encoder = encoder.with_model(prune(encoder.model, mlp=[1], attention=[2], block=[3]))
    tokens = encoder.tokenize(TEXTS)
    scores = importance(encoder.model, [batch for _, batch in encoder.batches(tokens)])
    gone = {kind: [i for i in range(4) if scores[kind][i].isnan()] for kind in PART_KINDS}
    assert gone == {"mlp": [1, 3], "attention": [2, 3], "block": [3]}
    for criterion in CRITERIA.values():
        order = criterion(encoder, tokens, PART_KINDS, None)
        assert {kind: sorted(part.layer_idx for part in order[kind]) for kind in PART_KINDS} == {
            "mlp": [0, 2],
            "attention": [0, 1],
            "block": [0, 1, 2],
        }


@every_family
@pytest.mark.parametrize("kind", PART_KINDS)
def test_the_embedding_criterion_is_the_drift_of_the_really_pruned_model(family, kind, folders):
    encoder = load(folders(family))
    tokens = encoder.tokenize(TEXTS)
    reference = encoder.encode_tokens(tokens).embeddings
    order = by_embedding(encoder, tokens, [kind])[kind]
    assert [part.score for part in order] == sorted(part.score for part in order)
    assert len(order) == 4
    for layer_idx, score in order:
        pruned = load(folders(family))
        pruned.model = prune(pruned.model, **{kind: [layer_idx]})
        vectors = pruned.encode_tokens(tokens).embeddings
        # Vectors have length 1.
        assert score == pytest.approx(1 - (vectors * reference).sum(axis=1).mean(), abs=2e-6)


@pytest.mark.parametrize("family", ["bert", "mpnet", "llama", "gemma2", "modernbert"])
@pytest.mark.parametrize("kind", ["mlp", "attention"])
def test_greedy_takes_the_best_next_part_with_those_before_really_gone(family, kind, folders):
    encoder = load(folders(family))
    tokens = encoder.tokenize(TEXTS)
    reference = encoder.encode_tokens(tokens).embeddings

    def drift_without(layers):
        pruned = load(folders(family))
        pruned.model = prune(pruned.model, **{kind: layers})
        return drift(pruned, tokens, reference)

    order = greedily(encoder, tokens, [kind], 3)[kind]
    assert len(order) == 3
    for number, (layer_idx, score) in enumerate(order):
        before = [part.layer_idx for part in order[:number]]
        drifts = {i: drift_without([*before, i]) for i in range(4) if i not in before}
        assert score == pytest.approx(drifts[layer_idx], abs=2e-6)
        assert drifts[layer_idx] <= min(drifts.values()) + 2e-6


@every_family
@pytest.mark.parametrize("gone", [{}, {"mlp": [1], "attention": [2]}, {"block": [0], "mlp": [2]}])
def test_passes_that_begin_at_the_first_part_left_out_give_what_whole_passes_give(family, gone, folders):
    encoder = Encoder.from_pretrained(folders(family), dtype="fp32", device="cpu", batch_tokens=16)
    encoder = encoder.with_model(prune(prunable_model(family), **gone))  # kinds of attention are mixed, windows short
    tokens = encoder.tokenize([*TEXTS, "milk and honey"])
    assert len(list(encoder.batches(tokens))) > 1
    reference = encoder.encode_tokens(tokens).embeddings
    plans = [[(kind, layer_idx)] for kind in PART_KINDS for layer_idx in parts_of(encoder.model, kind)]
    mlps, attentions = list(parts_of(encoder.model, "mlp")), list(parts_of(encoder.model, "attention"))
    plans += [[("mlp", layer_idx) for layer_idx in mlps[1:]], [("mlp", mlps[-1]), ("attention", attentions[-1])]]
    expected = []
    for plan in plans:
        with contextlib.ExitStack() as out:
            for part in plan:
                out.enter_context(left_out(encoder.model, *part))
            expected.append(drift(encoder, tokens, reference))
    assert drifts(encoder, tokens, plans, reference) == expected and min(expected) > 1e-6
    assert np.array_equal(encoder.encode_tokens(tokens).embeddings, reference) and not hooks_of(encoder.model)


def test_layers_before_the_first_part_left_out_do_not_run_again(folders):
    encoder = load(folders("llama"))
    tokens = encoder.tokenize(TEXTS)
    runs, _ = [0] * 4, encoder.dimension
    for layer_idx, layer in enumerate(layers_of(encoder.model)):

        def count(_module, _args, _output, layer_idx=layer_idx):
            runs[layer_idx] += 1

        layer.input_layernorm.register_forward_hook(count)
    by_embedding(encoder, tokens, ["mlp"])
    # The reference, the pass whose states are kept, and those without the MLP of this layer or of one before.
    assert runs == [2 + 1, 2 + 2, 2 + 3, 2 + 4]
    assert num_passes(encoder.model, "embedding", ["mlp"]) == round(sum(runs) / 4)


@pytest.mark.parametrize(("number", "kinds"), [(None, PART_KINDS), (2, ["mlp"]), (0, PART_KINDS)])
def test_passes_of_greedy_are_about_those_that_are_told(number, kinds, folders):
    encoder = load(folders("llama"))
    runs, _ = [], encoder.dimension
    for layer in layers_of(encoder.model):
        layer.register_forward_hook(lambda *_call: runs.append(1) if "forward" not in vars(_call[0]) else None)
    greedily(encoder, encoder.tokenize(TEXTS), kinds, number)
    assert num_passes(encoder.model, "greedy", kinds, number) == pytest.approx(len(runs) / 4, rel=0.1)


def test_how_many_passes_there_will_be_and_how_long_they_take_is_said_beforehand(folders, caplog):
    encoder = load(folders("bert"))
    with caplog.at_level("INFO"):
        announce(encoder, encoder.tokenize(TEXTS), {"cosine": 1, "greedy": 7})
        announce(encoder, encoder.tokenize(TEXTS), {"cosine": 1})
    assert re.fullmatch(r"measuring on 4 texts: cosine 1 pass, greedy 7 passes; about \d+ s in all", caplog.messages[0])
    assert caplog.messages[1] == "measuring on 4 texts: cosine 1 pass"


def test_texts_that_are_cut_or_equal_to_the_model_are_counted(folders, caplog):
    encoder = Encoder.from_pretrained(folders("llama"), dtype="fp32", max_length=4)
    with caplog.at_level("INFO"):  # <s> and three words are read
        announce(encoder, encoder.tokenize(["the cat eats fish", "tea", "the cat eats butter"]), {"cosine": 1})
    assert caplog.messages[0] == "measuring on 3 texts (2 of them cut): cosine 1 pass"
    assert caplog.messages[1] == "1 of these texts have the tokens of another one, so they tell nothing new"


def test_states_that_are_not_finite_are_an_error_and_no_part_that_is_gone(folders):
    encoder = load(folders("llama"))
    with torch.no_grad():
        layers_of(encoder.model)[2].mlp.down_proj.weight[:, 0] = torch.inf
    with pytest.raises(ValueError, match=r"layer 2: what enters or leaves its mlp is not finite in torch.float32"):
        by_cosine(encoder, encoder.tokenize(TEXTS), ["mlp"])


@pytest.mark.parametrize("name", CRITERIA)
def test_texts_without_a_token_are_an_error(name, folders):
    encoder = load(folders("llama"))
    tokens = Tokens(["a", "b"], [[], []], None, 0, 0)  # as of blanks, by a tokenizer that adds no special token
    for measure in (
        lambda: CRITERIA[name](encoder, tokens, ["mlp"], None),
        lambda: announce(encoder, tokens, {name: 1}),
    ):
        with pytest.raises(ValueError, match="texts with at least one token, got none"):
            measure()


@pytest.mark.parametrize("name", CRITERIA)
def test_a_criterion_leaves_the_encoder_as_it_was(name, folders):
    encoder = load(folders("llama"))
    tokens = encoder.tokenize(TEXTS)
    before = encoder.encode_tokens(tokens).embeddings
    CRITERIA[name](encoder, tokens, PART_KINDS, None)
    assert np.array_equal(encoder.encode_tokens(tokens).embeddings, before)
    assert not hooks_of(encoder.model)


def hooks_of(model):
    return [hook for module in model.modules() for hook in (*module._forward_hooks, *module._forward_pre_hooks)]


def test_hooks_go_when_the_model_fails():
    model = prunable_model("llama")
    with pytest.raises(IndexError):
        importance(model, [{"input_ids": torch.tensor([[10**6]]), "attention_mask": torch.ones(1, 1)}])
    assert not hooks_of(model)


def test_of_equal_parts_the_later_one_goes_first(folders):
    encoder = load(folders("llama"))
    with torch.no_grad():
        for layer in layers_of(encoder.model):
            layer.mlp.down_proj.weight.zero_()
    tokens = encoder.tokenize(TEXTS)
    for criterion in (by_embedding, greedily):
        assert [part.layer_idx for part in criterion(encoder, tokens, ["mlp"], None)["mlp"]] == [3, 2, 1, 0]


def test_a_number_cuts_the_order_short(folders):
    encoder = load(folders("bert"))
    tokens = encoder.tokenize(TEXTS)
    for name, number in itertools.product(CRITERIA, (0, 1, 3)):
        order = CRITERIA[name](encoder, tokens, ["mlp"], None)["mlp"]
        assert CRITERIA[name](encoder, tokens, ["mlp"], number)["mlp"] == order[:number]


def test_scores_do_not_depend_on_the_batches(folders):
    scores = []
    for batch_tokens in (1, 1000):
        encoder = Encoder.from_pretrained(folders("llama"), dtype="fp32", batch_tokens=batch_tokens)
        scores.append([part.score for part in by_cosine(encoder, encoder.tokenize(TEXTS), ["mlp"])["mlp"]])
    assert scores[0] == pytest.approx(scores[1], abs=1e-6)


def test_no_text_is_an_error_and_so_is_a_family_that_cannot_be_pruned(tmp_path):
    with pytest.raises(ValueError, match="at least one token"):
        importance(prunable_model("bert"), [])
    t5 = Encoder.from_pretrained(save_model(tmp_path, "t5"), dtype="fp32")
    with pytest.raises(ValueError, match="'t5' cannot be pruned; those that can: bert, gemma2"):
        by_cosine(t5, t5.tokenize(TEXTS), ["mlp"])
    with pytest.raises(ValueError, match="cannot be pruned"):
        parts_of(t5.model, "mlp")
