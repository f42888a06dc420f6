import json
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import write_jsonl

from effir_search.settings import DataSettings, EncoderOptions
from effir_search.training.data import prepare

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
