import gzip
import importlib.util
import json
import shutil
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import (
    DOCUMENTS,
    QRELS,
    TOPICS,
    WORDS,
    kill_when_there,
    save_cross_encoder,
    save_model,
    save_sentence_files,
    word_tokenizer,
    write_jsonl,
)
from processes import Command, start_ranks
from safetensors.torch import load_file, save_file
from transformers import MistralConfig, MistralModel

from effir_search.cli import cli as command
from effir_search.cli.options import taken
from effir_search.encoding.encoder import Encoder
from effir_search.model.layers import lora_targets
from effir_search.model.surgery import prune
from effir_search.settings import DataSettings, EncoderOptions, LossSettings, TrainingSettings
from effir_search.text.examples import Examples
from effir_search.training.data import ShuffledSequence, teacher_reading
from effir_search.training.dev import likeness, ndcg, read_dev_split
from effir_search.training.finetune import check_processes, finetune
from effir_search.training.plain_texts import PlainText
from effir_search.training.teachers import bi_encoder_scores, cross_encoder_scores, load_cross_encoder
from effir_search.training.trainable import make_plain, make_trainable
from effir_search.training.trainer import last_whole_checkpoint

TEXTS = [text for _, text in DOCUMENTS.values() if text]
RECORDS = [
    {
        "query": TOPICS[query_id],
        "positives": [DOCUMENTS[doc_id][1]],
        "negatives": [DOCUMENTS["002"][1]],
        "scores": [2, 1],
    }
    for (query_id, doc_id), grade in QRELS.items()
    if grade and DOCUMENTS[doc_id][1] and doc_id != "002"
]
CPU = EncoderOptions(device="cpu")
QUICK = {"options": CPU, "losses": LossSettings(temperature=0.1)}


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory, bert_folder: Path) -> Path:
    """The tiny BERT without the MLP of layer 1 and the attention of layer 2."""
    encoder = Encoder.from_pretrained(bert_folder, device="cpu", dtype="saved")
    encoder.model = prune(encoder.model, mlp=[1], attention=[2])
    folder = tmp_path_factory.mktemp("pruned") / "model"
    encoder.save(folder)
    return folder


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_jsonl(tmp_path_factory.mktemp("data") / "train.jsonl", RECORDS * 4))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_fine_tuning_a_pruned_model_lowers_the_loss_and_saves_a_pruned_model(tmp_path, pruned, examples):
    settings = TrainingSettings(batch_size=4, epochs=10, learning_rate=3e-3)
    done = finetune(str(pruned), tmp_path / "tuned", DataSettings(train=examples), settings=settings, **QUICK)
    record = json.loads((tmp_path / "tuned" / "training.json").read_text())
    losses = [entry["loss"] for entry in record["log"] if "loss" in entry]
    assert losses[-1] < losses[0] / 2
    assert (done.num_examples, done.steps) == (4 * len(RECORDS), record["result"]["steps"])
    before, after = (Encoder.from_pretrained(path, dtype="fp32") for path in (pruned, tmp_path / "tuned"))
    assert after.config == before.config
    assert after.model.config.mlp_widths == before.model.config.mlp_widths
    assert not np.allclose(after.encode_queries(TEXTS), before.encode_queries(TEXTS), atol=1e-3)
    card = (tmp_path / "tuned" / "README.md").read_text()
    assert "train.jsonl" in card and "learning rate | 0.003" in card
    assert not (tmp_path / "tuned.training").exists()


def test_a_model_that_was_never_pruned_is_fine_tuned_alike(tmp_path, bert_folder, examples):
    finetune(
        str(bert_folder),
        tmp_path / "tuned",
        DataSettings(train=examples),
        settings=TrainingSettings(batch_size=4),
        **QUICK,
    )
    assert Encoder.from_pretrained(tmp_path / "tuned").model.config.model_type == "bert"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_lora_equals_unmerged(tmp_path, pruned, examples, dtype):
    encoder = Encoder.from_pretrained(pruned, device="cpu", dtype="saved")
    encoder.model.to(dtype)
    original = {name: tensor.clone() for name, tensor in encoder.model.state_dict().items()}
    encoder = make_trainable(encoder, TrainingSettings(lora_rank=2, lora_alpha=4))
    adapted = {name: m for name, m in encoder.model.named_modules() if hasattr(m, "lora_A")}
    for name, lora in adapted.items():
        torch.manual_seed(len(name))
        torch.nn.init.normal_(lora.lora_B["default"].weight)
    assert len(adapted) == len(lora_targets(Encoder.from_pretrained(pruned, device="cpu").model))
    tokens = encoder.tokenizer(TEXTS[:3], padding=True, return_tensors="pt")
    with torch.no_grad():
        unmerged = encoder.model(**tokens).last_hidden_state
        expected = {
            name.removeprefix("base_model.model."): (
                lora.get_base_layer().weight.float()
                + 2 * lora.lora_B["default"].weight.float() @ lora.lora_A["default"].weight.float()
            ).to(dtype)
            for name, lora in adapted.items()
        }
    encoder = make_plain(encoder, dtype)
    state = encoder.model.state_dict()
    assert state.keys() == original.keys()
    for name, matrix in expected.items():
        torch.testing.assert_close(
            state[f"{name}.weight"], matrix, rtol=0 if dtype == torch.bfloat16 else 1e-6, atol=1e-6
        )
    if dtype == torch.float32:
        with torch.no_grad():
            torch.testing.assert_close(encoder.model(**tokens).last_hidden_state, unmerged, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["bert", "llama", "modernbert", "mpnet"])
def test_lora_trains_the_matrices_of_what_is_left_alone(tmp_path, examples, family):
    encoder = Encoder.from_pretrained(save_model(tmp_path / "base", family), device="cpu", dtype="saved")
    encoder.model = prune(encoder.model, mlp=[1], attention=[2])
    encoder.save(tmp_path / "pruned")
    settings = TrainingSettings(batch_size=4, lora_rank=2, learning_rate=1e-2, gradient_checkpointing=family != "mpnet")
    finetune(str(tmp_path / "pruned"), tmp_path / "tuned", DataSettings(train=examples), settings=settings, **QUICK)
    before, after = weights(tmp_path / "pruned"), weights(tmp_path / "tuned")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"{path}.weight" for path in lora_targets(encoder.model)}


def test_without_labels_a_pruned_model_becomes_more_like_its_teacher(tmp_path, bert_folder, pruned, texts):
    data = DataSettings(texts=(texts,), teacher=str(bert_folder))
    settings = TrainingSettings(batch_size=16, epochs=20, learning_rate=2e-3)
    done = finetune(str(pruned), tmp_path / "tuned", data, settings=settings, **QUICK)
    assert done.measure == "likeness"
    assert done.best > done.before + 0.05
    teacher, before, after = (
        Encoder.from_pretrained(path, dtype="fp32").encode_documents(TEXTS)
        for path in (bert_folder, pruned, tmp_path / "tuned")
    )
    assert (teacher * after).sum(axis=1).mean() > (teacher * before).sum(axis=1).mean()


def without_scores(path: Path) -> str:
    records = [{name: value for name, value in record.items() if name != "scores"} for record in RECORDS]
    return str(write_jsonl(path, records))


@pytest.mark.parametrize("kind", ["teacher", "reranker"])
def test_the_scores_that_are_learned_are_the_teachers(tmp_path, bert_folder, pruned, kind):
    train = without_scores(tmp_path / "train.jsonl")
    if kind == "teacher":
        name = bert_folder
        score = partial(bi_encoder_scores, Encoder.from_pretrained(bert_folder, device="cpu"))
    else:
        name = save_cross_encoder(tmp_path / "reranker")
        score = partial(cross_encoder_scores, load_cross_encoder(name, device="cpu"))
    data = DataSettings(train=str(train), **{kind: str(name)})
    settings = TrainingSettings(batch_size=2, max_steps=2)
    finetune(str(pruned), tmp_path / "tuned", data, settings=settings, **QUICK, keep_checkpoints=True)
    prepared = Examples(tmp_path / "tuned.training" / "data" / "examples.jsonl")
    assert len(prepared) == len(RECORDS)
    for example in prepared:
        pairs = [(example.query, text) for text in (example.positive, *example.negatives)]
        assert example.scores == pytest.approx(score(pairs), abs=0.02)  # several pairs share a batch in bfloat16
    losses = json.loads((tmp_path / "tuned" / "training.json").read_text())["losses"]
    # A bi-encoder's scores are like the student's own; a cross-encoder's are logits.
    assert losses["teacher_temperature"] == (0.1 if kind == "teacher" else 1.0)


@pytest.mark.parametrize("told", [False, True])
def test_a_teacher_that_does_not_say_how_it_reads_reads_as_the_student(tmp_path, llama_folder, examples, told):
    reading = {"pooling": "cls", "query_prompt": "hot ", "append_eos": True, "normalize": True}
    student = tmp_path / "student"
    Encoder.from_pretrained(llama_folder, device="cpu", dtype="saved", **reading).save(student)
    teacher = llama_folder
    if told:  # by files of its own, which then hold
        teacher = save_sentence_files(save_model(tmp_path / "teacher", "llama"), pooling="mean", normalize=False)
        reading = {}
    given = Encoder.from_pretrained(teacher, device="cpu", dtype="fp32", **reading)
    data = DataSettings(train=without_scores(tmp_path / "train.jsonl"), teacher=str(teacher))
    settings = TrainingSettings(batch_size=2, max_steps=1)
    finetune(str(student), tmp_path / "tuned", data, settings=settings, **QUICK, keep_checkpoints=True)
    for example in Examples(tmp_path / "tuned.training" / "data" / "examples.jsonl"):
        pairs = [(example.query, text) for text in (example.positive, *example.negatives)]
        assert example.scores == pytest.approx(bi_encoder_scores(given, pairs), rel=0.02, abs=0.02)
    imitation = DataSettings(texts=(str(tmp_path / "train.jsonl"),), teacher=str(teacher))
    imitated_as = teacher_reading(imitation, Encoder.from_pretrained(student, device="cpu"), CPU)
    assert imitated_as == (CPU if told else replace(CPU, **reading, document_prompt=""))


def loss_settings(folder: Path) -> dict:
    return json.loads((folder / "training.json").read_text())["losses"]


def test_tokens_are_matched_where_the_teacher_reads_the_same_ones(tmp_path, bert_folder, pruned, texts):
    settings = TrainingSettings(batch_size=16, max_steps=1)
    other = save_sentence_files(save_model(tmp_path / "other", "bert"), prompts={"query": "soup "})
    first = save_sentence_files(save_model(tmp_path / "first", "bert"), pooling="cls")
    for name, teacher, asked, expected in (
        ("same", bert_folder, None, 1.0),
        ("asked", bert_folder, 2.0, 2.0),
        ("none", bert_folder, 0.0, 0.0),
        ("unlike", other, None, 0.0),
        ("cls", first, None, 0.0),
    ):
        losses = LossSettings(token_weight=asked)
        data = DataSettings(texts=(texts,), teacher=str(teacher))
        finetune(str(pruned), tmp_path / name, data, settings=settings, losses=losses, options=CPU)
        assert loss_settings(tmp_path / name)["token_weight"] == expected
    with pytest.raises(ValueError, match="--token-weight 2: .*other has another query_prompt"):
        data = DataSettings(texts=(texts,), teacher=str(other))
        finetune(
            str(pruned), tmp_path / "bad", data, settings=settings, losses=LossSettings(token_weight=2.0), options=CPU
        )


def test_a_model_that_imitates_itself_starts_at_a_loss_of_zero(tmp_path, bert_folder, texts):
    data = DataSettings(texts=(texts,), teacher=str(bert_folder))
    settings = TrainingSettings(batch_size=16, max_steps=1, bf16=False, eval_steps=1)
    finetune(str(bert_folder), tmp_path / "tuned", data, settings=settings, losses=LossSettings(), options=CPU)
    log = json.loads((tmp_path / "tuned" / "training.json").read_text())["log"]
    first = next(entry["loss"] for entry in log if "loss" in entry)
    assert first == pytest.approx(0, abs=1e-3)  # the teacher may compute in bfloat16


def test_the_best_checkpoint_is_kept_and_training_ends_early(tmp_path, bert_folder, examples, collection):
    dev = tmp_path / "dev"
    dev.mkdir()
    for name in ("corpus.jsonl", "queries.jsonl"):
        (dev / f"{name}.gz").write_bytes(gzip.compress((collection / name).read_bytes()))
    (dev / "qrels").mkdir()
    (dev / "qrels" / "dev.tsv").write_text((collection / "qrels" / "test.tsv").read_text())
    data = DataSettings(train=examples, dev=str(dev))
    settings = TrainingSettings(batch_size=4, epochs=50, learning_rate=5e-2, eval_steps=2, patience=3)
    train = partial(
        finetune, str(bert_folder), tmp_path / "tuned", data, settings=settings, **QUICK, keep_checkpoints=True
    )
    done = train()
    # As if it had been killed before it wrote down that it was done.
    (tmp_path / "tuned.training" / "trained.json").unlink()
    kept = (tmp_path / "tuned").rename(tmp_path / "kept")
    again = train()
    assert (again.steps, again.best, again.best_step) == (done.steps, done.best, done.best_step)
    ours, theirs = weights(kept), weights(tmp_path / "tuned")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    record = json.loads((tmp_path / "tuned" / "training.json").read_text())
    figures = [entry["measure"] for entry in record["log"] if "measure" in entry]
    assert done.measure == "nDCG@10" and done.before == figures[0]
    assert done.best == max(figures[1:]) and done.steps < 50 * len(RECORDS)
    split = read_dev_split(dev, "dev")
    assert ndcg(split)[1](Encoder.from_pretrained(tmp_path / "tuned", dtype="fp32")) == pytest.approx(
        done.best, abs=1e-4
    )


def test_the_measure_of_a_dev_split_is_that_of_the_commands(tmp_path, toy_index, bert_folder, collection):
    split = read_dev_split(collection, "test", num_documents=12)
    assert len(split.documents) == 12 and len(split.queries) == 3
    found = ndcg(split)[1](Encoder.from_pretrained(bert_folder, dtype="fp32"))
    run = tmp_path / "run.trec"
    arguments = ["search", "--index", toy_index, "--topics", collection / "queries.jsonl", "--output", run]
    assert CliRunner().invoke(command, [str(a) for a in arguments]).exit_code == 0
    arguments = ["evaluate", "--run", run, "--qrels", collection / "qrels" / "test.tsv", "--measures", "nDCG@10"]
    assert f"{found:.4f}" in CliRunner().invoke(command, [str(a) for a in arguments]).stdout


@pytest.mark.parametrize("losses", [{"cached": True}, {"dimensions": (16,)}, {}])
def test_a_batch_of_one_without_negatives_is_an_error_and_leaves_no_model(tmp_path, bert_folder, losses):
    records = [{"query": "hot soup", "positives": ["tomato soup"]}, {"query": "red", "positives": ["red tomato"]}]
    data = DataSettings(train=str(write_jsonl(tmp_path / "train.jsonl", records)))
    settings, losses = TrainingSettings(batch_size=1, max_steps=1, bf16=False), LossSettings(**losses)
    with pytest.raises(ValueError, match="a batch of 1 example without hard negatives: no query meets a document"):
        finetune(str(bert_folder), tmp_path / "tuned", data, settings=settings, losses=losses, options=CPU)
    assert not (tmp_path / "tuned").exists()


def test_a_dev_split_is_sampled_from_the_queries_that_are_there(tmp_path, collection, caplog):
    folder = shutil.copytree(collection, tmp_path / "folder")
    with open(folder / "qrels" / "test.tsv", "a") as file:
        file.write("7\t001\t1\n2\tgone\t1\n")
    split = read_dev_split(folder, "test", num_queries=3)
    assert [query.query_id for query in split.queries] == list(TOPICS)
    topics, documents = (record.getMessage() for record in caplog.records)
    assert topics.startswith(f"{folder / 'queries.jsonl'}: 1 of 4 topics that qrels/test.tsv names")
    assert documents.startswith(f"{folder / 'corpus.jsonl'}: 1 of 6 documents that qrels/test.tsv names")
    (folder / "queries.jsonl").write_text('{"_id": "other", "text": "soup"}\n')
    with pytest.raises(ValueError, match=r'queries\.jsonl: has no topic of qrels/test\.tsv, such as "007"'):
        read_dev_split(folder, "test")


def test_a_sample_of_a_dev_split_keeps_what_is_judged(collection):
    split = read_dev_split(collection, "test", num_queries=1, num_documents=5)
    assert len(split.queries) == 1 and len(split.documents) == 5
    assert {qrel.doc_id for qrel in split.qrels} <= {document.doc_id for document in split.documents}
    with pytest.raises(FileNotFoundError):
        read_dev_split(collection, "absent")


def test_empty_topics_of_a_dev_split_are_left_out_and_counted(tmp_path, collection, caplog):
    folder = shutil.copytree(collection, tmp_path / "collection")
    write_jsonl(folder / "queries.jsonl", [{"_id": i, "text": text if i != "1" else " "} for i, text in TOPICS.items()])
    split = read_dev_split(folder, "test", num_documents=12)
    assert [query.query_id for query in split.queries] == ["2", "007"]
    assert {qrel.query_id for qrel in split.qrels} == {"2", "007"}
    assert "1 of 3 judged topics are empty and left out" in caplog.text
    write_jsonl(folder / "queries.jsonl", [{"_id": i, "text": ""} for i in TOPICS])
    with pytest.raises(ValueError, match="no topic with a text is judged in the split 'test'"):
        read_dev_split(folder, "test")


def test_likeness_is_one_for_the_teacher_itself(bert_folder):
    encoder = Encoder.from_pretrained(bert_folder, dtype="fp32")
    assert likeness([PlainText(text, False) for text in TEXTS], encoder)[1](encoder) == pytest.approx(1.0)


def test_a_random_mistral_learns_to_rank_a_toy_task(tmp_path):
    """From chance to perfect: each query is a word that one document of twenty contains, among shared words."""
    words = WORDS[:40]
    pairs = [
        (words[i], f"the {words[20 + i]} is here") for i in range(20)
    ]  # which word belongs to which must be learned
    write_jsonl(tmp_path / "train.jsonl", [{"query": q, "positives": [d], "negatives": []} for q, d in pairs] * 20)
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=80, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    MistralModel(config).save_pretrained(tmp_path / "model")
    word_tokenizer(bos=True, eos=True).save_pretrained(tmp_path / "model")
    save_sentence_files(tmp_path / "model", pooling="lasttoken")
    settings = TrainingSettings(batch_size=20, epochs=8, learning_rate=3e-3)
    data = DataSettings(train=str(tmp_path / "train.jsonl"))
    finetune(
        str(tmp_path / "model"),
        tmp_path / "tuned",
        data,
        settings=settings,
        options=CPU,
        losses=LossSettings(temperature=0.05),
    )

    def first(folder: Path) -> float:
        encoder = Encoder.from_pretrained(folder, device="cpu", dtype="fp32")
        scores = encoder.encode_queries([q for q, _ in pairs]) @ encoder.encode_documents([d for _, d in pairs]).T
        return float((scores.argmax(axis=1) == np.arange(20)).mean())

    assert first(tmp_path / "model") < 0.3
    assert first(tmp_path / "tuned") == 1.0


def arguments(model: Path, examples: str, output: Path) -> list[str]:
    options = "--batch-size 2 --epochs 6 --learning-rate 1e-3 --eval-steps 3 --temperature 0.1 --device cpu --dropout"
    return ["finetune", "--encoder", str(model), "--train", examples, "--output", str(output), *options.split()]


@pytest.mark.processes
def test_a_killed_job_continues_to_the_same_weights(tmp_path, pruned, examples):
    whole = Command(*arguments(pruned, examples, tmp_path / "whole"))
    _, told = whole.communicate()
    assert whole.returncode == 0, told
    killed = Command(*arguments(pruned, examples, tmp_path / "killed"))
    work = tmp_path / "killed.training"
    kill_when_there(killed, work / "checkpoint-12" / "trainer_state.json")
    assert not (tmp_path / "killed").exists()
    latest = max(work.glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))
    (latest.with_name("checkpoint-999")).mkdir()  # as if it had been killed while it wrote one more
    save_file({}, latest.with_name("checkpoint-999") / "model.safetensors")
    again = Command(*arguments(pruned, examples, tmp_path / "killed"))
    _, told = again.communicate()
    assert again.returncode == 0, told
    assert "checkpoint-999 is not whole" in told and "continuing from" in told
    found, expected = weights(tmp_path / "killed"), weights(tmp_path / "whole")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    before = weights(pruned)
    assert any(not torch.equal(found[name], before[name]) for name in before)


@pytest.mark.parametrize("dataset_size", [1, 5, 8])
def test_every_pass_has_every_item_once_in_an_order_of_its_own(dataset_size):
    items = list(range(100, 100 + dataset_size))
    sequence = ShuffledSequence(items, 3 * dataset_size, seed=1)
    passes = [[sequence[p * dataset_size + i] for i in range(dataset_size)] for p in range(3)]
    assert all(sorted(of_pass) == items for of_pass in passes)
    assert dataset_size < 5 or passes[0] != passes[1]
    assert [sequence[i] for i in reversed(range(len(sequence)))] == [*reversed(sum(passes, []))]
    assert [ShuffledSequence(items, dataset_size, seed=1)[i] for i in range(dataset_size)] == passes[0]
    with pytest.raises(IndexError):
        sequence[3 * dataset_size]


def test_a_job_that_was_stopped_while_it_saved_trains_no_further(tmp_path, pruned, examples):
    data, settings = DataSettings(train=examples), TrainingSettings(batch_size=4, max_steps=4, schedule="constant")
    finetune(str(pruned), tmp_path / "tuned", data, settings=settings, **QUICK, keep_checkpoints=True)
    first = weights(tmp_path / "tuned")
    shutil.rmtree(tmp_path / "tuned")
    for checkpoint in (tmp_path / "tuned.training").glob("checkpoint-*"):
        (checkpoint / "optimizer.pt").unlink()  # what another step would need
    done = finetune(str(pruned), tmp_path / "tuned", data, settings=settings, **QUICK)
    assert done.steps == 4
    assert all(torch.equal(tensor, first[name]) for name, tensor in weights(tmp_path / "tuned").items())


def test_a_teacher_that_scores_the_batch_is_learned_from_and_recorded(tmp_path, bert_folder, llama_folder, examples):
    out = tmp_path / "tuned"
    command_line = (
        f"finetune --encoder {llama_folder} --train {examples} --teacher {bert_folder} --output {out} --full "
    )
    command_line += "--distill-over batch --contrastive-weight 0 --batch-size 4 --epochs 8 --learning-rate 3e-3 "
    command_line += (
        "--pooling last --append-eos --normalize --temperature 0.1 --device cpu --no-bf16 --keep-checkpoints"
    )
    result = CliRunner().invoke(command, command_line.split())
    assert result.exit_code == 0, result.output
    record = json.loads((out / "training.json").read_text())
    losses = [entry["loss"] for entry in record["log"] if "loss" in entry]
    assert losses[-1] < losses[0] / 2
    assert (record["losses"]["distill_over"], record["losses"]["teacher_temperature"]) == ("batch", 0.1)
    assert "| distill over | batch |" in (out / "README.md").read_text()
    prepared = (tmp_path / "tuned.training" / "data" / "examples.jsonl").read_text().splitlines()
    assert all(json.loads(line)["scores"] == RECORDS[0]["scores"] for line in prepared)  # the file's own
    # After a stop: from the checkpoint in the middle, to the same weights.
    first = weights(out)
    shutil.rmtree(out)
    (tmp_path / "tuned.training" / "trained.json").unlink()
    steps = record["result"]["steps"]
    shutil.rmtree(tmp_path / "tuned.training" / f"checkpoint-{steps}")
    result = CliRunner().invoke(command, command_line.split())
    assert result.exit_code == 0 and record["result"]["steps"] == steps, result.output
    assert all(torch.equal(tensor, first[name]) for name, tensor in weights(out).items())


def test_a_restart_with_another_recipe_keeps_the_prepared_data(tmp_path, bert_folder, pruned, texts):
    data = DataSettings(texts=(texts,), teacher=str(bert_folder))
    run = partial(finetune, str(pruned), tmp_path / "tuned", **QUICK, keep_checkpoints=True)
    run(data, settings=TrainingSettings(batch_size=16, max_steps=2))
    file = tmp_path / "tuned.training" / "data" / "texts.jsonl"
    written = file.stat().st_mtime_ns
    shutil.rmtree(tmp_path / "tuned")
    run(data, settings=TrainingSettings(batch_size=16, max_steps=3), restart=True)
    assert file.stat().st_mtime_ns == written
    shutil.rmtree(tmp_path / "tuned")
    run(
        DataSettings(texts=(texts,), teacher=str(bert_folder), num_texts=20),
        settings=TrainingSettings(batch_size=16, max_steps=2),
        restart=True,
    )
    assert file.stat().st_mtime_ns != written and len(file.read_text().splitlines()) == 20


def test_steps_are_the_fewer_of_epochs_and_max_steps_and_a_constant_rate_is_warmed_up(tmp_path, pruned, examples):
    data = DataSettings(train=examples)
    order = {"batch_size": 4, "epochs": 2, "max_steps": 1000, "eval_steps": 1}
    settings = TrainingSettings(**order, warmup=0.25, schedule="constant", learning_rate=1e-3)
    done = finetune(str(pruned), tmp_path / "tuned", data, settings=settings, **QUICK)
    assert done.steps == 2 * 4 * len(RECORDS) / 4
    rates = [
        e["learning_rate"] for e in json.loads((tmp_path / "tuned" / "training.json").read_text())["log"] if "loss" in e
    ]
    # Two warm-up steps of eight: what is logged after a step is the rate of the next one.
    assert rates[0] < 1e-3 and rates[-1] == 1e-3


@pytest.mark.processes
def test_two_processes_killed_and_continued_train_to_the_weights_of_one(tmp_path, pruned, examples):
    options = [
        "--batch-size",
        "4",
        "--epochs",
        "4",
        "--learning-rate",
        "1e-4",
        "--temperature",
        "0.1",
        "--device",
        "cpu",
    ]
    common = ["finetune", "--encoder", str(pruned), "--train", examples, "--no-bf16", *options]
    one = Command(*common, "--output", tmp_path / "one")
    _, told = one.communicate()
    assert one.returncode == 0, told
    first, second = start_ranks(2, *common, "--output", tmp_path / "two")
    kill_when_there(first, tmp_path / "two.training" / "checkpoint-2" / "trainer_state.json")
    second.send_signal(signal.SIGKILL)
    assert second.wait() != 0 and not (tmp_path / "two").exists()
    two = start_ranks(2, *common, "--output", tmp_path / "two")
    told = [rank.communicate()[1] for rank in two]
    assert [rank.returncode for rank in two] == [0, 0] and "continuing from" in told[0], told
    found, expected = weights(tmp_path / "two"), weights(tmp_path / "one")
    # A key's bias shifts all products of a query alike, which softmax does not see: its gradient is rounding alone, of
    # which Adam makes steps as large as any other.
    for name in (name for name in expected if not name.endswith("key.bias")):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-4, msg=name)


def test_the_last_whole_checkpoint_is_the_one_to_continue_from(tmp_path):
    assert last_whole_checkpoint(tmp_path) is None
    for number in (9, 10, 11, 12):
        (tmp_path / f"checkpoint-{number}").mkdir()
        save_file({"a": torch.zeros(1)}, tmp_path / f"checkpoint-{number}" / "model.safetensors")
        (tmp_path / f"checkpoint-{number}" / "trainer_state.json").write_text("{}")
    (tmp_path / "checkpoint-12" / "trainer_state.json").write_text('{"global_')
    (tmp_path / "checkpoint-11" / "model.safetensors").write_bytes(b"cut")
    (tmp_path / "checkpoint-old").mkdir()
    assert last_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-10"


def test_a_job_of_other_settings_is_not_continued(tmp_path, pruned, examples):
    run = lambda **more: finetune(  # noqa: E731
        str(pruned),
        tmp_path / "tuned",
        DataSettings(train=examples),
        settings=TrainingSettings(batch_size=4, max_steps=2, **more),
        **QUICK,
        keep_checkpoints=True,
    )
    run()
    assert (tmp_path / "tuned.training" / "log.jsonl").is_file()
    (tmp_path / "tuned").rename(tmp_path / "elsewhere")
    with pytest.raises(
        ValueError,
        match=r"recipe was \{'seed': 0\} there and is \{'seed': 1\} now; --restart discards what depends on it",
    ):
        run(seed=1)


def test_a_loss_that_is_not_finite_ends_in_one_error_and_leaves_the_checkpoints(tmp_path, pruned, examples):
    settings = TrainingSettings(batch_size=4, epochs=5, learning_rate=1e25, warmup=0.9, eval_steps=1, bf16=False)
    with pytest.raises(ValueError, match="lower --learning-rate"):
        finetune(str(pruned), tmp_path / "tuned", DataSettings(train=examples), settings=settings, **QUICK)
    assert not (tmp_path / "tuned").exists()
    checkpoint = last_whole_checkpoint(tmp_path / "tuned.training")
    assert all(tensor.isfinite().all() for tensor in load_file(checkpoint / "model.safetensors").values())


def test_embeddings_that_are_not_finite_any_more_end_in_the_same_error(tmp_path, bert_folder, pruned, texts):
    data = DataSettings(texts=(texts,), teacher=str(bert_folder))
    settings = TrainingSettings(batch_size=8, max_steps=4, learning_rate=1e30, warmup=0.5, eval_steps=2, bf16=False)
    with pytest.raises(ValueError, match=r"step 2: .* not finite any more.*lower --learning-rate"):
        finetune(str(pruned), tmp_path / "tuned", data, settings=settings, **QUICK)


@pytest.mark.parametrize(
    ("settings", "losses", "message"),
    [
        (TrainingSettings(lora_alpha=4), LossSettings(), "--lora-alpha and --lora-dropout go with LoRA"),
        (TrainingSettings(), LossSettings(token_weight=1.0), "--token-weight 1 goes with --texts"),
        (TrainingSettings(patience=1), LossSettings(), "--patience needs something that is measured"),
    ],
)
def test_what_would_have_no_effect_is_refused_and_leaves_nothing(
    tmp_path, bert_folder, examples, settings, losses, message
):
    with pytest.raises(ValueError, match=message):
        finetune(
            str(bert_folder),
            tmp_path / "tuned",
            DataSettings(train=examples),
            settings=settings,
            losses=losses,
            options=CPU,
        )
    assert not (tmp_path / "tuned").exists()
    if settings.patience is None:
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("refused", ["no positives", "no file"])
def test_refused_examples_leave_no_folder(tmp_path, bert_folder, refused):
    if refused == "no positives":
        write_jsonl(tmp_path / "train.jsonl", [{"query": "soup", "positives": []}])
    with pytest.raises((ValueError, OSError)):
        finetune(
            str(bert_folder),
            tmp_path / "tuned",
            DataSettings(train=str(tmp_path / "train.jsonl")),
            settings=TrainingSettings(),
            **QUICK,
        )
    assert not (tmp_path / "tuned.training").exists()


@pytest.mark.parametrize(("scores", "warned"), [([0.9, -0.2], True), ([9.0, -2.0], False)])
def test_scores_that_look_like_cosines_are_warned_of(tmp_path, bert_folder, caplog, scores, warned):
    train = write_jsonl(
        tmp_path / "t.jsonl", [{"query": "soup", "positives": ["a"], "negatives": ["b"], "scores": scores}]
    )
    finetune(
        str(bert_folder),
        tmp_path / "tuned",
        DataSettings(train=str(train)),
        settings=TrainingSettings(max_steps=1),
        **QUICK,
    )
    assert any("give --teacher-temperature 0.1" in record.getMessage() for record in caplog.records) == warned


def test_a_reporter_that_is_not_installed_is_named(tmp_path, bert_folder, examples, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    settings = TrainingSettings(log_to=("wandb",))
    with pytest.raises(ValueError, match="--log-to wandb: is not installed"):
        finetune(str(bert_folder), tmp_path / "tuned", DataSettings(train=examples), settings=settings, **QUICK)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "give either --train"),
        ({"train": "a", "texts": ("b",)}, "give either --train"),
        ({"texts": ("b",)}, "--texts without --teacher"),
        ({"train": "a", "teacher": "b", "reranker": "c"}, "--reranker scores"),
        ({"texts": ("b",), "teacher": "c", "corpus": "d"}, "--corpus goes with --train, not with --texts"),
        ({"train": "a", "num_texts": 9}, "--num-texts goes with --texts"),
    ],
)
def test_data_that_says_too_much_or_too_little_is_refused(data, message):
    with pytest.raises(ValueError, match=message):
        DataSettings(**data)


def test_the_commands_defaults_are_the_librarys():
    context = command.commands["finetune"].make_context("finetune", ["--encoder", "x", "--output", "y", "--train", "a"])
    options = dict(context.params)
    assert [taken(kind, options) for kind in (DataSettings, TrainingSettings, LossSettings)] == [
        DataSettings("a"),
        TrainingSettings(),
        LossSettings(),
    ]


def test_the_model_is_told_when_it_is_done(tmp_path, pruned, examples):
    result = CliRunner().invoke(command, [*arguments(pruned, examples, tmp_path / "tuned"), "--max-steps", "3"])
    assert result.exit_code == 0, result.output
    assert f"{4 * len(RECORDS)} examples, 3 steps" in result.stdout and f"-> {tmp_path / 'tuned'}" in result.stdout


def test_full_and_lora_exclude_each_other(tmp_path, pruned, examples):
    result = CliRunner().invoke(
        command, [*arguments(pruned, examples, tmp_path / "tuned"), "--full", "--lora-rank", "2"]
    )
    assert result.exit_code == 2 and "--lora-rank does not go with --full" in result.output
    result = CliRunner().invoke(
        command, [*arguments(pruned, examples, tmp_path / "tuned"), "--full", "--max-steps", "1"]
    )
    assert result.exit_code == 0, result.output


def test_a_bare_language_model_gets_pooling_prompt_and_cosine(tmp_path, llama_folder, examples):
    options = "--pooling last --append-eos --query-prompt soup --normalize --lora-rank 2 --max-steps 2".split()
    result = CliRunner().invoke(command, [*arguments(llama_folder, examples, tmp_path / "tuned"), *options])
    assert result.exit_code == 0, result.output
    encoder = Encoder.from_pretrained(tmp_path / "tuned", device="cpu", dtype="fp32")
    config = encoder.config
    assert (config.pooling, config.query_prompt, config.similarity, config.normalize) == (
        "last",
        "soup",
        "cosine",
        True,
    )
    assert encoder.tokenizer("tea")["input_ids"][-1] == encoder.tokenizer.eos_token_id


def test_the_card_names_every_source(tmp_path, bert_folder, pruned, texts):
    other = tmp_path / "more.txt"
    other.write_text("hot soup\nsweet tea\n" * 2)
    data = DataSettings(texts=(texts, str(other)), teacher=str(bert_folder))
    finetune(str(pruned), tmp_path / "tuned", data, settings=TrainingSettings(batch_size=16, max_steps=1), **QUICK)
    card = (tmp_path / "tuned" / "README.md").read_text()
    assert "| Texts | texts.txt, more.txt |" in card and f"| Teacher | {bert_folder.name} |" in card
    assert f"| Trained from | {pruned.parent.name}/model |" in card and str(tmp_path) not in card


def test_vectors_cut_to_a_dimension_are_searched_by_cosine(tmp_path, bert_folder, collection):
    options = ["--corpus", collection / "corpus.jsonl", "--encoder", bert_folder, "--dimension", 8, "--dtype", "fp32"]
    result = CliRunner().invoke(command, [str(a) for a in ("index", *options, "--output", tmp_path / "cut")])
    assert result.exit_code == 0, result.output
    result = CliRunner().invoke(
        command, ["search", "--index", str(tmp_path / "cut"), "--query", "hot soup", "--hits", "1"]
    )
    encoder = Encoder.from_pretrained(bert_folder, dtype="fp32")
    documents = encoder.encode_documents([" ".join(filter(None, d)) for d in DOCUMENTS.values()])[:, :8]
    query = encoder.encode_queries(["hot soup"])[0, :8]
    cosines = documents @ query / np.linalg.norm(documents, axis=1) / np.linalg.norm(query)
    assert f"{cosines.max():.4f}" in result.stdout
    result = CliRunner().invoke(
        command, [str(a) for a in ("index", *options[:-4], "--dimension", 99, "--output", tmp_path / "x")]
    )
    assert "--dimension 99: the vectors of" in result.output and result.exit_code == 1


def test_a_gpu_that_is_not_there_is_an_error_before_anything_is_loaded(tmp_path):
    with pytest.raises(ValueError, match=r"--device cuda:99: this torch \(.*\) sees \d+ CUDA devices"):
        finetune(
            "no-model",
            tmp_path / "out",
            DataSettings(train="x"),
            settings=TrainingSettings(),
            losses=LossSettings(),
            options=EncoderOptions(device="cuda:99"),
        )


def test_one_gpu_for_several_processes_is_an_error():
    check_processes(TrainingSettings(), 1, "cuda:1")
    check_processes(TrainingSettings(), 2, "auto")
    with pytest.raises(ValueError, match="--device cuda:1: each of the 2 processes takes a GPU of its own; give auto"):
        check_processes(TrainingSettings(), 2, "cuda:1")


@pytest.mark.gpu
def test_it_trains_on_the_last_gpu(tmp_path, bert_folder, examples):
    device = f"cuda:{torch.cuda.device_count() - 1}"
    settings, options = TrainingSettings(max_steps=2, batch_size=4), EncoderOptions(device=device)
    done = finetune(str(bert_folder), tmp_path / "out", DataSettings(train=str(examples)), settings, options=options)
    assert done.steps == 2 and torch.cuda.current_device() == torch.cuda.device_count() - 1
