import json
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import write_jsonl

from effir_search.settings import DataSettings, EncoderOptions, LossSettings
from effir_search.training.data import check_losses, hashes, prepare

READING = EncoderOptions(pooling="mean", query_prompt="", document_prompt="hot ", normalize=True)


def recorded(folder: Path) -> dict:
    return json.loads((folder / "data" / "settings.json").read_text())["teacher_options"]


@pytest.fixture
def data(tmp_path, bert_folder):
    records = [{"query": "hot soup", "positives": ["tomato soup"], "negatives": ["sweet tea"]}]
    return DataSettings(train=str(write_jsonl(tmp_path / "train.jsonl", records)), teacher=str(bert_folder))


def test_prepared_data_remember_how_the_teacher_read_and_nothing_of_the_machine(tmp_path, data):
    prepare(tmp_path / "none", data, 0, "cpu", files={}, teacher_options=EncoderOptions(batch_tokens=64))
    assert recorded(tmp_path / "none") == {}
    prepare(tmp_path / "some", data, 0, "cpu", files={}, teacher_options=EncoderOptions(pooling="cls"))
    assert recorded(tmp_path / "some") == {"pooling": "cls"}
    stock = replace(READING, stock_architecture=True, device="cpu")
    prepare(tmp_path / "all", data, 0, "cpu", files={}, teacher_options=stock)
    assert recorded(tmp_path / "all") == {
        "pooling": "mean",
        "query_prompt": "",
        "document_prompt": "hot ",
        "append_eos": False,
        "normalize": True,
        "stock_architecture": True,
    }


def test_data_for_a_teacher_that_runs_beside_are_the_same_whatever_the_teacher(tmp_path, data, llama_folder):
    train = data.train
    for teacher, options in ((data.teacher, READING), (str(llama_folder), EncoderOptions())):
        data = replace(data, teacher=teacher)
        files = hashes(data)
        assert any(name.startswith(teacher) for name in files)
        prepare(tmp_path, data, 0, "cpu", files=files, teacher_options=options, scored=False)
    record = json.loads((tmp_path / "data" / "settings.json").read_text())
    assert record["teacher"] is None and record["teacher_options"] == {} and list(record["files"]) == [train]
    assert "scores" not in json.loads((tmp_path / "data" / "examples.jsonl").read_text())


BATCH = LossSettings(distill_over="batch")


@pytest.mark.parametrize(
    ("losses", "changes", "message"),
    [
        (BATCH, {"teacher": None, "reranker": "some"}, "--distill-over batch needs a bi-encoder.*too many pairs"),
        (BATCH, {"teacher": None}, "--distill-over batch needs a teacher that scores the batch"),
        (BATCH, {"train": None, "texts": ("a",)}, "--distill-over batch goes with --train"),
        (replace(BATCH, distillation_weight=0.0), {}, "--distillation-weight 0 learns nothing from the teacher"),
        (LossSettings(contrastive_weight=2.0), {"train": None, "texts": ("a",)}, "--contrastive-weight 2 goes with"),
    ],
)
def test_losses_that_the_data_cannot_give_are_refused(data, losses, changes, message):
    check_losses(BATCH, data)
    with pytest.raises(ValueError, match=message):
        check_losses(losses, replace(data, **changes))


def test_two_weights_of_0_leave_nothing_to_learn():
    with pytest.raises(ValueError, match="--contrastive-weight 0 and --distillation-weight 0 leave nothing to learn"):
        LossSettings(contrastive_weight=0.0, distillation_weight=0.0)


def test_data_whose_record_is_silent_of_flags_that_are_off_are_used_again(tmp_path, data):
    prepare(tmp_path, data, 0, "cpu", files={}, teacher_options=READING)
    settings = tmp_path / "data" / "settings.json"
    record = json.loads(settings.read_text())
    del record["teacher_options"]["append_eos"]
    settings.write_text(json.dumps(record))
    examples = tmp_path / "data" / "examples.jsonl"
    written = examples.stat().st_mtime_ns
    for restart in (False, True):
        prepare(tmp_path, data, 0, "cpu", files={}, teacher_options=READING, restart=restart)
        assert examples.stat().st_mtime_ns == written
    with pytest.raises(
        ValueError, match=r"teacher_options was \{'append_eos': None\} there and is .*'append_eos': True"
    ):
        prepare(tmp_path, data, 0, "cpu", files={}, teacher_options=replace(READING, append_eos=True))
