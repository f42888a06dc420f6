import inspect
import json
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import DOCUMENTS, QRELS, TOPICS, WORDS, kill_when_there, save_model, save_sentence_files, write_jsonl
from processes import Command

from effir_search.cli import cli as command
from effir_search.cli.options import data_settings, encoder_options, taken
from effir_search.cli.pruning import slim as slim_command
from effir_search.compression.slim import WITHOUT_TEXTS, Batches, slim_encoder
from effir_search.encoding.encoder import Encoder
from effir_search.model.layers import mlp_output
from effir_search.model.surgery import kept_units, prune
from effir_search.pruning.choose_units import choose_units
from effir_search.pruning.gates import gated, learn_gates
from effir_search.pruning.unit_scores import UNIT_CRITERIA
from effir_search.settings import DataSettings, EncoderOptions, LossSettings, WidthSettings
from effir_search.text.texts import read_texts, sampled
from effir_search.training.data import PreparedData, checkpoint_activations

TEXTS = [text for _, text in DOCUMENTS.values() if text]
RECORDS = [
    {"query": TOPICS[query_id], "positives": [DOCUMENTS[doc_id][1]], "negatives": [DOCUMENTS["002"][1]]}
    for (query_id, doc_id), grade in QRELS.items()
    if grade and DOCUMENTS[doc_id][1]
]
LOSSES = LossSettings(temperature=0.1)
UNITS = 4 * 48


@pytest.fixture(scope="module")
def mistral_folder(tmp_path_factory):
    return save_sentence_files(save_model(tmp_path_factory.mktemp("mistral"), "mistral"), pooling="lasttoken")


@pytest.fixture(scope="module")
def folders(bert_folder, mistral_folder):
    return {"bert": bert_folder, "mistral": mistral_folder}


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("data") / "texts.txt"
    path.write_text("".join(" ".join(rng.choice(WORDS, rng.integers(3, 12))) + "\n" for _ in range(40)))
    return str(path)


@pytest.fixture(scope="module")
def data(tmp_path_factory, texts, folders):
    """The two kinds of data, by name; the teacher is another model than those that are cut."""
    teacher = save_sentence_files(save_model(tmp_path_factory.mktemp("teacher"), "llama"), pooling="mean")
    train = write_jsonl(tmp_path_factory.mktemp("data") / "train.jsonl", RECORDS * 4)
    return {"labels": DataSettings(train=str(train)), "texts": DataSettings(texts=(texts,), teacher=str(teacher))}


def slim(encoder, output, narrow=0.3, data=None, *, max_length=None, **settings):
    settings = WidthSettings(**{"bf16": False, "steps": 5, "batch_size": 8, "narrow": narrow, **settings})
    options = EncoderOptions(device="cpu", max_length=max_length)
    return slim_encoder(str(encoder), output, data, settings, LOSSES, options)


def run(*arguments):
    return CliRunner().invoke(command, ["slim", *map(str, arguments)])


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def vectors(folder):
    return Encoder.from_pretrained(folder, device="cpu", dtype="fp32").encode_documents(TEXTS)


def masked_vectors(folder, kept):
    """Embeddings of the model of a folder with the gates of all units closed but for those that are kept, by layer."""
    encoder = Encoder.from_pretrained(folder, device="cpu", dtype="fp32")
    with gated(encoder.model) as gates:
        for layer_idx, z in gates.items():
            z.data = torch.isin(torch.arange(len(z)), torch.tensor(kept[layer_idx])).float()
        return encoder.encode_documents(TEXTS)


@pytest.mark.parametrize("kind", ["labels", "texts"])
@pytest.mark.parametrize("family", ["bert", "mistral"])
def test_the_share_is_cut_exactly_and_the_saved_model_is_the_masked_one(tmp_path, folders, data, family, kind):
    slimmed = slim(folders[family], tmp_path / "slim", 0.3, data[kind])
    left = UNITS - round(0.3 * UNITS)
    assert sum(slimmed.widths_after.values()) == left
    assert slimmed.widths_before == dict.fromkeys(range(4), 48)
    assert config_of(tmp_path / "slim")["mlp_widths"] == list(slimmed.widths_after.values())
    saved = Encoder.from_pretrained(tmp_path / "slim", device="cpu")
    assert [mlp_output(saved.model, i).in_features for i in range(4)] == list(slimmed.widths_after.values())
    kept = kept_units(saved.model.config)
    np.testing.assert_allclose(vectors(tmp_path / "slim"), masked_vectors(folders[family], kept), atol=1e-5)
    assert slimmed.after["mlp_parameters"] < slimmed.before["mlp_parameters"]
    assert 0 < slimmed.cosine < 1
    assert not (tmp_path / "slim.slimming").exists()


@pytest.mark.parametrize("criterion", ["activation", "taylor", "magnitude"])
def test_a_unit_that_writes_nothing_is_cut_first(tmp_path, bert_folder, data, criterion):
    encoder = Encoder.from_pretrained(bert_folder, device="cpu", dtype="saved")
    encoder = encoder.with_model(prune(encoder.model))
    with torch.no_grad():
        mlp_output(encoder.model, 2).weight[:, 5] = 0
    encoder.save(tmp_path / "model")
    given = [] if criterion == "magnitude" else ["--texts", *data["texts"].texts, "--teacher", data["texts"].teacher]
    # A share of which just one of the 192 units is cut.
    arguments = ["--encoder", tmp_path / "model", "--narrow", 0.005, "--output", tmp_path / "slim", *given]
    result = run(*arguments, "--criterion", criterion, "--device", "cpu", "--no-bf16")
    assert result.exit_code == 0, result.output
    assert config_of(tmp_path / "slim")["mlp_widths"] == [48, 48, 47, 48]
    kept = kept_units(Encoder.from_pretrained(tmp_path / "slim", device="cpu").model.config)
    assert set(range(48)) - set(kept[2]) == {5}
    np.testing.assert_allclose(vectors(tmp_path / "slim"), vectors(tmp_path / "model"), atol=1e-5)


def test_texts_become_vectors_as_the_options_say_and_the_saved_model_keeps_that(tmp_path, llama_folder, data):
    options = ["--pooling", "mean", "--normalize", "--append-eos", "--query-prompt", "hot ", "--document-prompt", "a "]
    given = ["--texts", *data["texts"].texts, "--teacher", data["texts"].teacher, "--max-length", 9, "--steps", 1]
    arguments = ["--encoder", llama_folder, "--narrow", 0.25, "--output", tmp_path / "slim", *given, *options]
    result = run(*arguments, "--criterion", "taylor", "--device", "cpu", "--no-bf16")
    assert result.exit_code == 0, result.output
    saved = Encoder.from_pretrained(tmp_path / "slim", device="cpu")
    config = saved.config
    assert (config.pooling, config.normalize, config.query_prompt, config.document_prompt) == (
        "mean",
        True,
        "hot ",
        "a ",
    )
    assert saved.tokenize(["tea"]).input_ids[0][-1] == saved.tokenizer.eos_token_id
    assert config.max_length == Encoder.from_pretrained(llama_folder).config.max_length


def test_a_length_is_refused_where_no_text_is_read(tmp_path, bert_folder):
    arguments = ["--encoder", bert_folder, "--narrow", 0.25, "--output", tmp_path / "slim", "--max-length", 8]
    refused = run(*arguments, "--criterion", "magnitude")
    assert refused.exit_code == 2 and "--max-length goes with --train or --texts" in refused.output


def test_slimming_again_composes(tmp_path, bert_folder, data):
    slim(bert_folder, tmp_path / "once", 0.25, data["texts"])
    slim(tmp_path / "once", tmp_path / "twice", 0.5, criterion="magnitude")
    once, twice = (kept_units(Encoder.from_pretrained(tmp_path / name).model.config) for name in ("once", "twice"))
    assert sum(map(len, once.values())) == 144  # 192 - 48
    assert sum(map(len, twice.values())) == 72
    assert all(set(twice[layer_idx]) < set(once[layer_idx]) for layer_idx in range(4))
    np.testing.assert_allclose(vectors(tmp_path / "twice"), masked_vectors(bert_folder, twice), atol=1e-5)
    plan = config_of(tmp_path / "twice")["plan"]
    assert [step["criterion"] for step in plan] == ["gates", "magnitude"]
    assert plan[1]["widths_before"] == plan[0]["widths"]


def test_after_a_dropped_mlp_the_share_is_of_what_is_left(tmp_path, bert_folder):
    encoder = Encoder.from_pretrained(bert_folder, device="cpu", dtype="saved")
    encoder = encoder.with_model(prune(encoder.model, mlp=[1]))
    encoder.save(tmp_path / "pruned")
    slimmed = slim(tmp_path / "pruned", tmp_path / "slim", 0.5, criterion="magnitude")
    assert slimmed.widths_after.keys() == slimmed.widths_before.keys() == {0, 2, 3}
    assert sum(slimmed.widths_after.values()) == 72  # half of 3 * 48
    assert config_of(tmp_path / "slim")["mlp_widths"][1] == 0


def test_the_plan_says_what_led_to_it_without_folders_of_this_machine(tmp_path, mistral_folder, data):
    slim(mistral_folder, tmp_path / "slim", 0.25, data["texts"], floor=0.1, multiple=4, seed=3, penalty=1e-7)
    config = config_of(tmp_path / "slim")
    (step,) = config["plan"]
    assert (step["criterion"], step["narrow"], step["floor"], step["multiple"]) == ("gates", 0.25, 0.1, 4)
    settings = {"steps": 5, "learning_rate": 0.01, "penalty": 1e-7, "batch_size": 8, "seed": 3, "bf16": False}
    assert settings.items() <= step["settings"].items()
    assert step["settings"]["losses"]["temperature"] == 0.1
    assert step["data"] == {"texts": ["texts.txt"], "teacher": data["texts"].teacher.split("/")[-1], "num_texts": None}
    assert step["widths_before"] == {str(layer_idx): 48 for layer_idx in range(4)}
    assert config["base_model"] == mistral_folder.name
    assert str(tmp_path.parent) not in (tmp_path / "slim" / "config.json").read_text()
    assert all(width % 4 == 0 for width in config["mlp_widths"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_keep_their_dtype_and_values(tmp_path, bert_folder, data, dtype):
    encoder = Encoder.from_pretrained(bert_folder, device="cpu", dtype="saved")
    encoder = encoder.with_model(prune(encoder.model.to(dtype)))
    encoder.save(tmp_path / "half")
    slimmed = slim(tmp_path / "half", tmp_path / "slim", 0.3, data["labels"], max_length=16)
    saved = Encoder.from_pretrained(tmp_path / "slim", device="cpu", dtype="saved")
    assert saved.dtype == dtype and config_of(tmp_path / "slim")["dtype"] == str(dtype).removeprefix("torch.")
    assert saved.config == Encoder.from_pretrained(tmp_path / "half", device="cpu").config  # max_length, too
    for layer_idx, kept in kept_units(saved.model.config).items():
        before, after = (mlp_output(model, layer_idx).weight for model in (encoder.model, saved.model))
        assert torch.equal(after, before[:, kept])
    assert slimmed.before["weights_bytes"] == 2 * slimmed.before["parameters"]
    assert slimmed.after["weights_bytes"] == 2 * slimmed.after["parameters"]


def test_the_cosine_told_is_that_of_the_texts_before_and_after(tmp_path, texts, data):
    prompts = {"query": "what eats ", "document": "the cat "}
    model = save_sentence_files(save_model(tmp_path / "model", "bert"), prompts=prompts)
    given = DataSettings(queries=(texts,), teacher=data["texts"].teacher, num_texts=5)  # of 5 texts none is held out
    slimmed = slim(model, tmp_path / "slim", 0.5, given, criterion="activation")
    before, after = (Encoder.from_pretrained(path, dtype="fp32") for path in (model, tmp_path / "slim"))
    sample = sampled(read_texts(texts), 5, 0)
    a, b = before.encode_queries(sample), after.encode_queries(sample)
    assert slimmed.cosine == pytest.approx(float((a * b).sum(axis=1).mean()), abs=1e-5)


def test_the_same_seed_gives_the_same_units_and_bf16_is_allowed(tmp_path, bert_folder, data):
    for name in ("a", "b"):
        slim(bert_folder, tmp_path / name, 0.3, data["labels"], bf16=True, seed=5)
    assert config_of(tmp_path / "a")["plan"] == config_of(tmp_path / "b")["plan"]


@pytest.mark.parametrize("criterion", WITHOUT_TEXTS)
def test_weights_alone_need_no_texts_but_take_them_for_the_cosine(tmp_path, bert_folder, data, criterion):
    alone = slim(bert_folder, tmp_path / "alone", criterion=criterion)
    beside = slim(bert_folder, tmp_path / "beside", data=data["labels"], criterion=criterion)
    assert alone.cosine is None and 0 < beside.cosine < 1
    assert config_of(tmp_path / "alone")["plan"][0]["units"] == config_of(tmp_path / "beside")["plan"][0]["units"]
    assert "data" not in config_of(tmp_path / "alone")["plan"][0]


def test_batches_run_through_passes_that_are_each_in_an_order_of_their_own():
    batches = Batches(PreparedData(list(range(10)), lambda rows: {"rows": rows}, []), size=4, number=5, seed=1)
    rows = [batch["rows"] for batch in batches]
    assert len(batches) == len(rows) == 5 and all(len(of_batch) == 4 for of_batch in rows)
    flat = [row for of_batch in rows for row in of_batch]
    assert sorted(flat[:10]) == sorted(flat[10:]) == list(range(10)) and flat[:10] != flat[10:]
    assert [batch["rows"] for batch in batches] == rows
    (small,) = Batches(PreparedData([7, 8], lambda rows: {"rows": rows}, []), size=4, number=1, seed=1)
    assert sorted(small["rows"]) == [7, 8]


def test_other_criteria_than_gates_read_the_data_once(tmp_path, bert_folder, data):
    slim(bert_folder, tmp_path / "slim", 0.3, data["texts"], criterion="taylor", steps=500)
    # 40 texts of which 4 are held out: 36 / 8 = 4 batches and a rest.
    assert config_of(tmp_path / "slim")["plan"][0]["settings"]["steps"] == 4


def in_a_process(encoder, output, *options):
    return Command("slim", "--encoder", encoder, "--output", output, *options)


@pytest.mark.parametrize("criterion", ["gates", "taylor", "activation"])
def test_a_loss_that_is_0_whatever_the_model_is_an_error_where_units_are_scored_by_it(tmp_path, bert_folder, criterion):
    train = write_jsonl(tmp_path / "train.jsonl", [{"query": "hot soup", "positives": ["tomato soup"]}])
    settings = WidthSettings(narrow=0.25, criterion=criterion, steps=1)
    data, options = DataSettings(train=str(train)), EncoderOptions(device="cpu")
    slimming = partial(slim_encoder, str(bert_folder), tmp_path / "slim", data, settings, LossSettings(), options)
    if criterion == "activation":
        slimming()
    else:
        with pytest.raises(ValueError, match="a batch of 1 example without hard negatives"):
            slimming()
    assert (tmp_path / "slim").exists() == (criterion == "activation")


@pytest.mark.processes
@pytest.mark.parametrize(
    "mark, more", [("data/texts.jsonl", []), ("gates.safetensors", []), ("gates.safetensors", ["--restart"])]
)
def test_a_job_that_was_killed_is_done_by_the_same_command(tmp_path, bert_folder, data, mark, more):
    options = [
        "--texts",
        *data["texts"].texts,
        "--teacher",
        data["texts"].teacher,
        "--narrow",
        "0.3",
        "--device",
        "cpu",
    ]
    options += ["--no-bf16", "--steps", "60", "--batch-size", "8"]  # some seconds
    killed = in_a_process(bert_folder, tmp_path / "slim", *options)
    work = tmp_path / "slim.slimming"
    kill_when_there(killed, work / mark)
    assert work.is_dir() and not (tmp_path / "slim").exists()
    again = in_a_process(bert_folder, tmp_path / "slim", *options, *more)
    answer, told = again.communicate()
    assert again.returncode == 0, told
    assert f"-> {tmp_path / 'slim'}" in answer and not work.exists()
    assert ("gates go on from step 1" in told) == (mark == "gates.safetensors" and not more)
    undisturbed = in_a_process(bert_folder, tmp_path / "whole", *options)
    _, told = undisturbed.communicate()
    assert undisturbed.returncode == 0, told
    assert config_of(tmp_path / "slim")["plan"] == config_of(tmp_path / "whole")["plan"]


def test_what_a_stopped_job_prepared_serves_another_criterion_but_no_other_data(tmp_path, bert_folder, data, texts):
    given = data["texts"]
    one = write_jsonl(tmp_path / "one.jsonl", [{"query": "hot soup", "positives": ["tomato"]}])
    with pytest.raises(ValueError, match="a batch of 1 example without hard negatives"):
        slim(bert_folder, tmp_path / "slim", 0.3, DataSettings(train=str(one)))
    assert (tmp_path / "slim.slimming" / "data" / "examples.jsonl").is_file()
    with pytest.raises(ValueError, match="is of another job: train was .* --restart discards what depends on it"):
        slim(bert_folder, tmp_path / "slim", 0.3, given)
    slim(bert_folder, tmp_path / "slim", 0.3, DataSettings(train=str(one)), criterion="activation")
    assert not (tmp_path / "slim.slimming").exists()


def test_batches_that_tell_no_unit_from_another_are_an_error(tmp_path, bert_folder):
    records = [{"query": "hot soup", "positives": ["tomato", "onion"]}, {"query": "tea", "positives": ["lemon"]}]
    data = DataSettings(train=str(write_jsonl(tmp_path / "train.jsonl", records)))
    # The only batch is that of the two examples which share their positives.
    seed = next(s for s in range(99) if set(np.random.default_rng([s, 0]).permutation(3)[:2]) == {0, 1})
    settings = WidthSettings(criterion="taylor", steps=1, batch_size=2, seed=seed)
    with pytest.raises(ValueError, match="every unit has the same score, .*: the loss tells none from another"):
        slim_encoder(str(bert_folder), tmp_path / "slim", data, settings, LossSettings(), EncoderOptions(device="cpu"))


def test_bad_options_are_one_line_errors(tmp_path, bert_folder, data, texts):
    common = ["--encoder", bert_folder, "--output", tmp_path / "slim", "--device", "cpu"]
    copy = shutil.copytree(bert_folder, tmp_path / "copy")
    weights = ["--criterion", "magnitude"]
    teacher = ["--teacher", data["texts"].teacher]
    for options, status, message in (
        (["--narrow", 0, *weights], 1, "--narrow 0 of 192 units is none, so nothing would be cut"),
        (["--narrow", 0.001, *weights], 1, "--narrow 0.001 of 192 units is none"),
        (["--narrow", 1, *weights], 2, "Invalid value for '--narrow'"),
        (["--narrow", 0.9, "--floor", 0.5, *weights], 1, "lower --narrow or --floor"),
        (["--narrow", 0.3], 1, "--criterion gates scores units on texts: give --train"),
        (["--narrow", 0.3, "--criterion", "activation"], 1, "--criterion activation scores units on texts"),
        (["--narrow", 0.3, "--texts", texts], 1, "--texts without --teacher"),
        (["--narrow", 0.3, "--texts", texts, "--train", "x", *teacher], 1, "give either --train"),
        (["--narrow", 0.3, "--train", tmp_path / "absent.jsonl"], 1, "absent.jsonl"),
        (["--narrow", 0.3, *weights, *teacher], 2, "--teacher goes with --train or --texts"),
        (["--narrow", 0.3, *weights, "--steps", 3], 2, "--steps goes with criteria that score on texts"),
        (["--narrow", 0.3, *weights, "--penalty", 3], 2, "--penalty goes with --criterion gates"),
        (["--narrow", 0.3, "--criterion", "taylor", "--texts", texts, "--teacher", bert_folder], 1, "is the encoder"),
        (["--narrow", 0.3, "--criterion", "taylor", "--texts", texts, "--teacher", copy], 1, "is the encoder"),
        (["--narrow", 0.5, "--multiple", 32, *weights], 1, "lower --narrow, --multiple or --floor"),
    ):
        result = run(*common, *options)
        assert result.exit_code == status and message in result.output.splitlines()[-1], (options, result.output)
        assert result.output.splitlines()[-1].startswith("Error: ") and len(result.output.splitlines()) in (1, 4)
        assert not (tmp_path / "slim").exists()
    (tmp_path / "slim").mkdir()
    (tmp_path / "slim" / "mine").touch()
    assert "exists already" in run(*common, "--narrow", 0.3, *weights).output


def test_checkpointing_repeats_the_layers_of_a_model_in_eval_mode_and_changes_no_unit(tmp_path, mistral_folder, data):
    model = Encoder.from_pretrained(mistral_folder, device="cpu", dtype="fp32").model.requires_grad_(True)
    calls = []
    mlp_output(model, 0).register_forward_pre_hook(lambda *_: calls.append(1))
    checkpoint_activations(model)
    model(torch.tensor([[1, 2, 3]])).last_hidden_state.sum().backward()
    assert len(calls) == 2 and not model.training
    for name, checkpointing in (("plain", False), ("checkpointed", True)):
        slim(mistral_folder, tmp_path / name, data=data["labels"], gradient_checkpointing=checkpointing)
    plain, checkpointed = (config_of(tmp_path / name) for name in ("plain", "checkpointed"))
    assert plain["mlp_widths"] == checkpointed["mlp_widths"]
    assert plain["plan"][-1]["units"] == checkpointed["plan"][-1]["units"]


def test_a_model_without_mlps_is_an_error(tmp_path, bert_folder):
    encoder = Encoder.from_pretrained(bert_folder, device="cpu", dtype="saved")
    encoder = encoder.with_model(prune(encoder.model, mlp=range(4)))
    encoder.save(tmp_path / "pruned")
    with pytest.raises(ValueError, match="the model has no MLP left to narrow"):
        slim(tmp_path / "pruned", tmp_path / "slim", criterion="random")


def test_the_commands_defaults_are_the_librarys():
    arguments = ["--encoder", "x", "--output", "y", "--narrow", "0.3", "--train", "a"]
    context = slim_command.make_context("slim", arguments)
    options = dict(context.params)
    with context:
        assert data_settings(options) == DataSettings("a")
    assert [taken(kind, options) for kind in (WidthSettings, LossSettings)] == [WidthSettings(), LossSettings()]
    assert encoder_options(options) == EncoderOptions()
    (choice,) = (parameter for parameter in slim_command.params if parameter.name == "criterion")
    assert tuple(choice.type.choices) == tuple(UNIT_CRITERIA)

    def defaults(function):
        parameters = inspect.signature(function).parameters.values()
        return {
            parameter.name: parameter.default for parameter in parameters if parameter.default is not parameter.empty
        }

    library = defaults(slim_encoder)
    # What compress gives, which prepares data for all its stages and has a teacher that reads as its recipe says.
    assert library.pop("prepared") is None and library.pop("teacher_options") is None
    assert library == {"options": EncoderOptions(), "restart": options["restart"]}
    settings = WidthSettings()
    assert {name: getattr(settings, name) for name in ("floor", "multiple")} == defaults(choose_units)
    of_gates = defaults(learn_gates)
    assert all(getattr(settings, name) == of_gates[name] for name in ("steps", "learning_rate", "penalty"))


def test_the_answer_tells_widths_sizes_and_cosine(tmp_path, bert_folder, data):
    arguments = ["--encoder", bert_folder, "--train", data["labels"].train, "--narrow", 0.5, "--output", tmp_path / "s"]
    result = run(*arguments, "--steps", 2, "--batch-size", 4, "--temperature", 0.1, "--device", "cpu")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    widths = config_of(tmp_path / "s")["mlp_widths"]
    assert [line.split()[:3] for line in lines[:5]] == [
        ["layer", "units", "left"],
        *([str(layer_idx), "48", str(width)] for layer_idx, width in enumerate(widths)),
    ]
    # A BERT unit has 32 weights in, 32 out and a bias; 96 of 192 are cut.
    (row,) = (line.split() for line in lines if line.startswith("mlp parameters"))
    assert int(row[2].replace(",", "")) - int(row[3].replace(",", "")) == 96 * (32 + 32 + 1)
    assert lines[-2].startswith("mean cosine of the embeddings to those before: 0.")
    assert lines[-1] == f"-> {tmp_path / 's'}"
