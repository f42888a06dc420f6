import copy
import pickle

import pytest
import torch
from conftest import DECODERS, PRUNABLE, prunable_model, tiny_config
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

from effir_search.model.checkpoint import load_transformer
from effir_search.model.families import FAMILIES, family_of
from effir_search.model.layers import PART_KINDS, layers_of, left_out, lora_targets, mlp_output, mlp_widths, parts_of
from effir_search.model.modeling_effir import EffirConfig, EffirModel
from effir_search.model.surgery import kept_units, prune

every_family = pytest.mark.parametrize("family", PRUNABLE)
# The second and third row are padded.
LENGTHS = (9, 6, 3)


def batch(side="right"):
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(5, 70, (len(LENGTHS), max(LENGTHS)), generator=generator)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(LENGTHS):
        mask[row, :length] = 1
    if side == "left":
        ids, mask = ids.flip(1), mask.flip(1)
    return {"input_ids": ids * mask, "attention_mask": mask}


@torch.no_grad()
def states(model, tokens=None):
    """Hidden states of the real tokens, one row each."""
    tokens = tokens or batch()
    return model(**tokens).last_hidden_state[tokens["attention_mask"].bool()]


def zero(linear):
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.zero_()


def projection(model, kind, layer_idx):
    family = family_of(model.config)
    return layers_of(model)[layer_idx].get_submodule((family.mlp if kind == "mlp" else family.attention).output)


def mask_of(width, *off):
    mask = torch.ones(width, dtype=torch.bool)
    mask[list(off)] = False
    return mask


def pruned_model(family):
    """One of everything: layer 0 narrowed, 1 without MLP, 2 without attention, 3 dropped."""
    return prune(prunable_model(family), mlp=[1], attention=[2], block=[3], units={0: mask_of(48, *range(0, 40, 3))})


@every_family
@pytest.mark.parametrize("kind", ["mlp", "attention"])
def test_dropping_a_part_equals_zeroing_its_output_matrix_and_bias(family, kind):
    model, zeroed = prunable_model(family), prunable_model(family)
    full = states(model)
    for layer_idx in (0, 2):
        zero(projection(zeroed, kind, layer_idx))
    if FAMILIES[model.config.model_type] is FAMILIES["gemma2"]:
        part = FAMILIES["gemma2"].mlp if kind == "mlp" else FAMILIES["gemma2"].attention
        # Gemma's norm after the part turns zero into zero: it needs no zeroing.
        assert layers_of(zeroed)[0].get_submodule(part.writes)(torch.zeros(1, 32)).abs().max() == 0
    pruned = states(prune(model, **{kind: [0, 2]}))
    torch.testing.assert_close(pruned, states(zeroed), atol=1e-5, rtol=0)
    assert (pruned - full).abs().max() > 0.05


@every_family
def test_dropping_a_block_equals_removing_its_layer(family):
    model, shorter = prunable_model(family), prunable_model(family)
    del layers_of(shorter)[1]
    shorter.config.num_hidden_layers, shorter.config.use_cache = 3, False
    if getattr(shorter.config, "layer_types", None):
        del shorter.config.layer_types[1]
    both = prune(prunable_model(family), attention=[1], mlp=[1])
    torch.testing.assert_close(states(both), states(shorter), atol=1e-6, rtol=0)
    torch.testing.assert_close(states(prune(model, block=[1])), states(shorter), atol=1e-6, rtol=0)
    assert not list(layers_of(model)[1].parameters())


@every_family
def test_dropping_nothing_changes_nothing(family):
    model = prunable_model(family)
    before = states(model)
    pruned = prune(model)
    assert torch.equal(states(pruned), before)
    assert pruned.config.mlp_widths == [48] * 4 and pruned.config.dropped_attention == [] and pruned.config.plan == []


@every_family
def test_narrowing_equals_zeroing_the_units(family):
    model, zeroed = prunable_model(family), prunable_model(family)
    masks = {1: mask_of(48, 0, 5, 47), 3: mask_of(48, *range(40))}
    for layer_idx, mask in masks.items():
        with torch.no_grad():
            mlp_output(zeroed, layer_idx).weight[:, ~mask] = 0
    pruned = prune(model, units=masks)
    assert pruned.config.mlp_widths == mlp_widths(pruned) == [48, 45, 48, 8]
    torch.testing.assert_close(states(pruned), states(zeroed), atol=1e-5, rtol=0)


@every_family
def test_narrowing_by_no_unit_changes_nothing(family):
    model = prunable_model(family)
    before = states(model)
    pruned = prune(model, units={layer_idx: mask_of(48) for layer_idx in range(4)})
    assert torch.equal(states(pruned), before)
    assert pruned.config.mlp_widths == mlp_widths(pruned) == [48] * 4 and pruned.config.plan == []


@every_family
def test_narrowing_what_is_narrow_equals_narrowing_once(family):
    generator = torch.Generator().manual_seed(11)
    first = {layer_idx: torch.rand(48, generator=generator) < 0.7 for layer_idx in (0, 1, 3)}
    second = {i: torch.rand(int(first[i].sum()) if i in first else 48, generator=generator) < 0.5 for i in (0, 2, 3)}
    steps = prune(prune(prunable_model(family), units=first), units=second)
    kept = {layer_idx: torch.arange(48) for layer_idx in range(4)}
    for masks in (first, second):
        kept |= {layer_idx: kept[layer_idx][mask] for layer_idx, mask in masks.items()}
    assert kept_units(steps.config) == {layer_idx: units.tolist() for layer_idx, units in kept.items()}
    at_once = {layer_idx: torch.isin(torch.arange(48), units) for layer_idx, units in kept.items()}
    once = prune(prunable_model(family), units=at_once)
    assert kept_units(once.config) == kept_units(steps.config)
    assert torch.equal(states(once), states(steps))


def test_kept_units_are_told_of_the_base_model_through_a_file_and_a_drop(tmp_path):
    model = prune(prunable_model("bert"), units={1: mask_of(48, *range(1, 48)), 2: mask_of(48, 0)})
    prune(model, mlp=[2]).config.save_pretrained(tmp_path)
    config = EffirConfig.from_pretrained(tmp_path)
    assert config.plan[0]["units"] == {"1": "8" + 11 * "0", "2": "7" + 11 * "f"}
    assert kept_units(config) == {0: list(range(48)), 1: [0], 3: list(range(48))}


def test_units_that_no_plan_tells_of_are_an_error_and_stay_unknown():
    torch.manual_seed(0)
    model = EffirModel(EffirConfig(tiny_config("bert"), mlp_widths=[48, 20, 48, 48]))
    with pytest.raises(ValueError, match="layer 1: the plan does not say which 20 units it has"):
        kept_units(model.config)
    prune(model, units={0: mask_of(48, 0), 1: mask_of(20, 3)})
    assert model.config.plan == [{"widths": {"0": 47, "1": 19}, "units": {"0": "7" + 11 * "f"}}]
    with pytest.raises(ValueError, match="layer 1: the plan does not say which 19"):
        kept_units(model.config)


@every_family
def test_pruning_a_pruned_model_counts_layers_as_the_original_model_does(family):
    once = pruned_model(family)
    steps = prune(prunable_model(family), block=[3], record={"criterion": "cosine"})
    steps = prune(steps, mlp=[1], units={0: mask_of(48, *range(0, 21, 3))})
    steps = prune(steps, attention=[2], units={0: mask_of(41, *(n for n in range(14, 33) if mask_left(n)))})
    assert steps.config.mlp_widths == once.config.mlp_widths == [34, 0, 48, 0]
    assert steps.config.dropped_attention == once.config.dropped_attention == [2, 3]
    assert steps.config.plan[0] == {"block": [3], "criterion": "cosine"}
    # Units 0, 3, ..., 18 of 48 are cut: 0110 1101 1011 0110 1101, and ones from 20 on.
    assert steps.config.plan[1] == {"mlp": [1], "widths": {"0": 41}, "units": {"0": "6db6d" + 7 * "f"}}
    assert kept_units(steps.config) == kept_units(once.config)
    assert kept_units(once.config) == {0: [n for n in range(48) if n % 3 or n > 39], 2: list(range(48))}
    assert torch.equal(states(steps), states(once))


def mask_left(place):
    """Whether the unit that stands at ``place`` once 0, 3, ..., 18 are cut is one of 21, 24, ..., 39."""
    return (place + 7) % 3 == 0


@every_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saving_and_loading_is_exact_and_keeps_the_dtype(tmp_path, family, dtype):
    pruned_model(family).save_pretrained(tmp_path / "float32")
    # Not .to(dtype), which would round the rotary frequencies too.
    model = AutoModel.from_pretrained(tmp_path / "float32", dtype=dtype)
    model.save_pretrained(tmp_path / "saved")
    loaded = AutoModel.from_pretrained(tmp_path / "saved")
    assert type(loaded) is EffirModel and loaded.dtype == dtype
    assert loaded.config.mlp_widths == [34, 0, 48, 0] and loaded.config.dropped_attention == [2, 3]
    tensors = model.state_dict()
    assert loaded.state_dict().keys() == tensors.keys()
    assert all(torch.equal(tensor, tensors[key]) for key, tensor in loaded.state_dict().items())
    assert torch.equal(states(loaded), states(model))


@every_family
def test_nothing_of_a_dropped_part_is_in_memory_or_in_the_file(tmp_path, family):
    base = prunable_model(family)
    layers, table = layers_of(base), family_of(base.config)
    gone = sum(p.numel() for path in table.mlp.removed for p in layers[1].get_submodule(path).parameters())
    gone += sum(p.numel() for path in table.attention.removed for p in layers[2].get_submodule(path).parameters())
    gone += sum(p.numel() for p in layers[3].parameters())
    before = base.num_parameters()
    pruned = prune(base, mlp=[1], attention=[2], block=[3])
    assert pruned.num_parameters() == before - gone
    pruned.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        stored = {key: file.get_slice(key).get_shape() for key in file.keys()}
    removed = [f"1.{path}." for path in table.mlp.removed] + [f"2.{path}." for path in table.attention.removed] + ["3."]
    prefixes = tuple(f"model.{table.layers}.{place}" for place in removed)
    assert not [key for key in stored if key.startswith(prefixes)]
    assert sum(torch.Size(shape).numel() for shape in stored.values()) == before - gone


@every_family
@pytest.mark.parametrize("side", ["right", "left"])
def test_a_padded_batch_equals_its_rows_one_by_one(family, side):
    if side == "left" and family in ("bert", "roberta", "xlm_roberta", "mpnet"):
        pytest.skip("absolute positions start at the left")
    model, tokens = pruned_model(family), batch(side)
    rows = []
    for ids, mask in zip(tokens["input_ids"], tokens["attention_mask"].bool(), strict=True):
        rows.append(states(model, {"input_ids": ids[mask][None], "attention_mask": torch.ones(1, int(mask.sum()))}))
    torch.testing.assert_close(states(model, tokens), torch.cat(rows), atol=1e-5, rtol=0)


@every_family
def test_gradients_flow_with_and_without_checkpointing(family):
    gradients = []
    for checkpointing in (False, True):
        model = pruned_model(family).train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        if checkpointing and family == "mpnet":
            with pytest.raises(ValueError, match="does not support"):
                model.activation_checkpointing_enable()
            return
        if checkpointing:
            model.activation_checkpointing_enable()
        model(**batch()).last_hidden_state.pow(2).sum().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert all(gradient is not None for gradient in gradients[0].values())
    for name, gradient in gradients[1].items():
        torch.testing.assert_close(gradient, gradients[0][name], atol=1e-4, rtol=1e-4)


@every_family
def test_leaving_a_part_out_computes_what_dropping_it_does(family):
    for kind in PART_KINDS:
        model = prunable_model(family)
        full = states(model)
        with left_out(model, kind, 1):
            without = states(model)
        assert torch.equal(states(model), full)
        torch.testing.assert_close(without, states(prune(model, **{kind: [1]})), atol=1e-5, rtol=0)
    # Without its last part a layer is the identity.
    model = pruned_model(family)
    with left_out(model, "mlp", 2):
        without = states(model)
    torch.testing.assert_close(without, states(prune(model, mlp=[2])), atol=1e-5, rtol=0)


@every_family
def test_parts_show_their_input_and_what_they_write(family):
    """By their hooks the parts of a layer form a chain from its input to its output."""
    model = prune(prunable_model(family), mlp=[0], attention=[3])
    assert list(parts_of(model, "mlp")) == [1, 2, 3] and list(parts_of(model, "attention")) == [0, 1, 2]
    seen = {}

    def watch(kind, layer_idx, part):
        part.reads.register_forward_pre_hook(lambda _m, args: seen.update({(kind, layer_idx, "in"): args[0]}))

        def write(_module, _args, output):
            output = output[0] if isinstance(output, tuple) else output
            seen[kind, layer_idx, "out"] = seen[kind, layer_idx, "in"] + output if part.adds else output

        part.writes.register_forward_hook(write)

    for kind in PART_KINDS:
        for layer_idx, part in parts_of(model, kind).items():
            watch(kind, layer_idx, part)
    states(model)
    for layer_idx in (1, 2):
        assert torch.equal(seen["attention", layer_idx, "in"], seen["block", layer_idx, "in"])
        assert torch.equal(seen["attention", layer_idx, "out"], seen["mlp", layer_idx, "in"])
        torch.testing.assert_close(seen["mlp", layer_idx, "out"], seen["block", layer_idx, "out"])
        assert torch.equal(seen["block", layer_idx, "in"], seen["block", layer_idx - 1, "out"])


@every_family
def test_lora_reaches_every_matrix_and_merged_equals_unmerged(family):
    model = pruned_model(family)
    targets = lora_targets(model)
    in_layers = {f"model.{family_of(model.config).layers}.{i}.{name}" for i, layer in enumerate(model.layers)
                 for name, module in layer.named_modules() if isinstance(module, torch.nn.Linear)}  # fmt: skip
    assert set(targets) == in_layers
    lora = get_peft_model(model, LoraConfig(r=2, target_modules=targets, init_lora_weights=False)).eval()
    wrapped = sum(name.endswith("lora_A") for name, _module in lora.named_modules())
    assert wrapped == len(targets)
    unmerged = states(lora)
    merged = lora.merge_and_unload()
    assert isinstance(merged, EffirModel)
    torch.testing.assert_close(states(merged), unmerged, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", sorted(DECODERS))
def test_with_a_cache_tokens_may_come_one_at_a_time(family):
    model = prune(prunable_model(family), attention=[0, 3], mlp=[1])
    ids = batch()["input_ids"][:1]
    whole = states(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    assert model(input_ids=ids).get("past_key_values") is None
    for asked in ({"use_cache": True}, {}):
        model.config.use_cache = not asked
        cache, pieces = None, []
        with torch.no_grad():
            for token in ids.T:
                output = model(input_ids=token[None], past_key_values=cache, **asked)
                cache = output.past_key_values
                pieces.append(output.last_hidden_state[0])
        torch.testing.assert_close(torch.cat(pieces), whole, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", sorted(DECODERS))
def test_a_decoder_whose_tokens_see_all_others_stays_so_when_it_is_pruned_and_saved(tmp_path, family):
    whole = prunable_model(family)
    before = states(whole)
    whole.config.is_causal = False
    with left_out(whole, "mlp", 1):
        expected = states(whole)
    assert not torch.allclose(expected, before, atol=1e-2)
    pruned = prune(whole, mlp=[1])
    torch.testing.assert_close(states(pruned), expected)
    pruned.save_pretrained(tmp_path)
    torch.testing.assert_close(states(AutoModel.from_pretrained(tmp_path)), expected)


@every_family
def test_a_model_can_be_copied_and_pickled_and_shows_all_hidden_states(family):
    model = pruned_model(family)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(states(other), states(model))
    assert len(model(**batch(), output_hidden_states=True).hidden_states) == 5


@pytest.mark.parametrize("family", ["bert", "mistral", "gemma3"])
def test_a_model_compiles_as_one_graph(family):
    torch.compiler.reset()
    model = pruned_model(family)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    tokens = batch()
    with torch.no_grad():
        output = compiled(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
    torch.testing.assert_close(output.last_hidden_state[tokens["attention_mask"].bool()], states(model))


@every_family
def test_both_kinds_of_attention_kernel_agree(tmp_path, family):
    pruned_model(family).save_pretrained(tmp_path)
    eager = AutoModel.from_pretrained(tmp_path, attn_implementation="eager")
    assert eager.config._attn_implementation == eager.model.config._attn_implementation == "eager"
    if family in ("gemma2", "mpnet"):  # transformers offers no other
        assert AutoModel.from_pretrained(tmp_path).config._attn_implementation == "eager"
        return
    sdpa = AutoModel.from_pretrained(tmp_path, device_map="cpu")
    assert sdpa.config._attn_implementation == sdpa.model.config._attn_implementation == "sdpa"
    torch.testing.assert_close(states(eager), states(sdpa), atol=1e-4, rtol=1e-4)


@every_family
def test_more_token_embeddings_are_kept(tmp_path, family):
    model = pruned_model(family)
    before = states(model)
    model.resize_token_embeddings(80, mean_resizing=False)
    assert model.config.vocab_size == model.config.base_config.vocab_size == 80
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert loaded.get_input_embeddings().num_embeddings == 80
    torch.testing.assert_close(states(loaded), before, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_the_attention_kernel_of_a_model_in_use_stays(kernel):
    model = prunable_model("llama")
    model.set_attn_implementation(kernel)
    before = states(model)
    EffirConfig(model.config)
    assert model.config._attn_implementation == kernel
    pruned = prune(model)
    assert pruned.config._attn_implementation == pruned.model.config._attn_implementation == kernel
    assert torch.equal(states(pruned), before)
    pruned.set_attn_implementation("eager")
    assert pruned.config._attn_implementation == pruned.model.config._attn_implementation == "eager"


def test_a_pooler_is_not_taken_over():
    model = AutoModel.from_config(tiny_config("bert")).eval()
    before = states(model)
    pruned = prune(model)
    assert torch.equal(states(pruned), before)
    assert not [key for key in pruned.state_dict() if "pooler" in key]


def test_weights_are_taken_over_not_copied():
    model = prunable_model("mistral")
    kept = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    pruned = prune(model, mlp=[1])
    assert {name: parameter.data_ptr() for name, parameter in pruned.model.named_parameters()}.items() <= kept.items()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pruned")
    pruned_model("mistral").save_pretrained(folder)
    return folder


def edited(folder, path, edit):
    """A copy of a model folder, its tensors changed by ``edit``."""
    path.mkdir()
    for file in folder.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(path / "model.safetensors")
    edit(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def lacks_one(tensors):
    del tensors["model.layers.0.mlp.up_proj.weight"]


def has_one_too_many(tensors):
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(48, 32)


def has_another_width(tensors):
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(48, 32)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lacks_one, "no tensor model.layers.0.mlp.up_proj.weight"),
        (has_one_too_many, "model.layers.1.mlp.up_proj.weight is not part of the model"),
        (has_another_width, "model.layers.0.mlp.up_proj.weight|mismatch"),
    ],
)
def test_weights_that_do_not_fit_are_refused(tmp_path, folder, edit, message):
    path = edited(folder, tmp_path / "edited", edit)
    with pytest.raises((ValueError, RuntimeError), match=message):
        AutoModel.from_pretrained(path)
    with pytest.raises(ValueError, match=message):
        AutoModel.from_pretrained(path, ignore_mismatched_sizes=True)
    (path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=message):
        load_transformer(path, dtype=torch.float32, device=torch.device("cpu"))


def test_a_family_that_cannot_be_pruned_is_an_error_that_names_those_that_can():
    model = AutoModel.from_config(tiny_config("t5"))
    for attempt in (lambda: prune(model), lambda: layers_of(model), lambda: lora_targets(model)):
        with pytest.raises(ValueError, match="'t5' cannot be pruned; those that can: bert, gemma2, .*xlm-roberta"):
            attempt()


def test_a_language_model_is_an_error_that_names_its_class():
    with pytest.raises(ValueError, match="LlamaForCausalLM cannot be pruned"):
        prune(AutoModelForCausalLM.from_config(tiny_config("llama")))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ({"mlp": [4]}, "no layer 4; layers are 0 to 3"),
        ({"attention": [-1]}, "no layer -1"),
        ({"mlp": [1]}, "layer 1 has no mlp any more"),
        ({"attention": [2]}, "layer 2 has no attention any more"),
        ({"block": [3]}, "of layer 3 nothing is left"),
        ({"units": {1: mask_of(48)}}, "layer 1 has no mlp any more"),
        ({"units": {2: mask_of(47)}}, r"layer 2: the mask must be bool of shape \(48,\)"),
        ({"units": {2: torch.ones(48)}}, "must be bool"),
        ({"units": {2: torch.zeros(48, dtype=torch.bool)}}, "leaves no unit"),
        ({"mlp": [0, 2], "attention": [0, 1]}, "only embeddings"),
    ],
)
def test_a_part_that_is_not_there_is_an_error_and_nothing_is_changed(what, message):
    model = pruned_model("llama")
    before = states(model)
    with pytest.raises(ValueError, match=message):
        prune(model, **{"mlp": [0], **what} if "mlp" not in what else what)
    assert torch.equal(states(model), before) and len(model.config.plan) == 1


def test_leaving_out_what_is_gone_is_an_error():
    model = pruned_model("llama")
    for kind, layer_idx in (("mlp", 1), ("attention", 3), ("block", 3)):
        with (
            pytest.raises(ValueError, match=f"layer {layer_idx} has no {kind} any more"),
            left_out(model, kind, layer_idx),
        ):
            pass


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mlp_widths": [48, 48, 48]}, "must be 4 numbers from 0 to 48"),
        ({"mlp_widths": [48, 48, 48, 49]}, "must be 4 numbers from 0 to 48"),
        ({"dropped_attention": [0, 4]}, "there is no layer 4"),
    ],
)
def test_a_config_that_does_not_fit_the_base_model_is_an_error(settings, message):
    with pytest.raises(ValueError, match=message):
        EffirConfig(tiny_config("bert"), **settings)


def test_a_config_survives_its_file(tmp_path):
    config = EffirConfig(
        tiny_config("gemma3"), mlp_widths=[48, 0, 7, 48], dropped_attention=[3], base_model="org/name",
        base_revision="abc", plan=[{"criterion": "cosine", "scores": [0.5, 1e-9]}],
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    loaded = EffirConfig.from_pretrained(tmp_path)
    for name in ("mlp_widths", "dropped_attention", "base_model", "base_revision", "plan", "vocab_size"):
        assert getattr(loaded, name) == getattr(config, name)
    assert loaded.base_config.to_dict() == config.base_config.to_dict()
    assert loaded != EffirConfig(tiny_config("gemma3"), mlp_widths=[48, 0, 8, 48], dropped_attention=[3])
