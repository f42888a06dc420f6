"""The folder of a job that can be stopped: whose it is, what goes, what stays."""

import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest

from effir_search import settings
from effir_search.files.job import job_folder, same_settings

# What jobs recorded before contrastive_weight and distill_over were settings.
EARLIER = json.loads(Path(__file__).with_name("settings_of_an_earlier_version.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("name", ["train.jsonl", ".env", "data/train.jsonl"])
def test_a_folder_that_is_not_a_jobs_is_left_as_it_is(tmp_path, name, restart):
    file = tmp_path / "model.training" / name
    file.parent.mkdir(parents=True)
    file.write_text("mine")
    with (
        pytest.raises(FileExistsError, match=r"model\.training: is not a job's folder, and is left as it is"),
        job_folder(tmp_path / "model.training", {"a": 1}, restart=restart, keep=("data",)),
    ):
        pass
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [file] and file.read_text() == "mine"


def test_a_job_that_was_killed_before_its_settings_stood_is_begun_again(tmp_path):
    (tmp_path / "job.lock").touch()
    (tmp_path / ".settings.json.x7").write_text('{"a"')
    with job_folder(tmp_path, {"a": 1}):
        (tmp_path / "work").write_text("begun")
    assert {path.name for path in tmp_path.iterdir()} == {"job.lock", "settings.json", "work"}


def test_what_a_killed_job_was_writing_goes_and_what_it_wrote_stays(tmp_path):
    with job_folder(tmp_path / "job", {"a": 1}):
        (tmp_path / "job" / "work").write_text("done")
        (tmp_path / "job" / ".other.tmp").write_text("half")
    with job_folder(tmp_path / "job", {"a": 1}):
        assert not (tmp_path / "job" / ".other.tmp").exists()
        assert (tmp_path / "job" / "work").read_text() == "done"


def test_other_settings_are_an_error_and_restart_discards_all_but_what_is_kept(tmp_path):
    with job_folder(tmp_path / "job", {"a": 1}):
        (tmp_path / "job" / "work").write_text("done")
        (tmp_path / "job" / "data").mkdir()
    with (
        pytest.raises(ValueError, match="a was 1 there and is 2 now; --restart discards what depends on it"),
        job_folder(tmp_path / "job", {"a": 2}),
    ):
        pass
    assert (tmp_path / "job" / "work").is_file()
    with job_folder(tmp_path / "job", {"a": 2}, restart=True, keep=("data",)):
        assert {path.name for path in (tmp_path / "job").iterdir()} == {"job.lock", "settings.json", "data"}


@pytest.mark.parametrize("nothing", [None, False, "", [], {}, {"b": None, "c": {"d": []}}])
def test_a_job_of_before_there_was_a_setting_goes_on_where_the_setting_asks_for_nothing(tmp_path, nothing):
    with job_folder(tmp_path / "job", {"a": {"x": 1}}):
        (tmp_path / "job" / "work").write_text("done")
    with job_folder(tmp_path / "job", {"a": {"x": 1, "new": nothing}, "new": nothing}):
        assert (tmp_path / "job" / "work").is_file()


@pytest.mark.parametrize("asked", [True, 0, 0.0, "x", [0], {"b": 1}])
def test_a_setting_that_asks_for_something_makes_it_another_job(tmp_path, asked):
    with job_folder(tmp_path / "job", {"a": {"x": 1}}):
        (tmp_path / "job" / "work").write_text("done")
    message = rf"a was \{{'new': None\}} there and is \{{'new': {re.escape(repr(asked))}\}} now"
    with (
        pytest.raises(ValueError, match=message),
        job_folder(tmp_path / "job", {"a": {"x": 1, "new": asked}}),
    ):
        pass


def test_settings_that_both_jobs_have_are_compared_as_they_are():
    # bf16 of None is what the machine does best, False is float32.
    assert not same_settings({"bf16": None}, {"bf16": False})
    assert not same_settings({"texts": []}, {"texts": None})
    assert same_settings({"a": [{"b": 1}]}, {"a": [{"b": 1}]})


def test_two_jobs_cannot_be_at_work_in_a_folder(tmp_path):
    with (
        job_folder(tmp_path / "job", {"a": 1}),
        pytest.raises(OSError, match="another job is at work in it"),
        job_folder(tmp_path / "job", {"a": 1}),
    ):
        pass


@pytest.mark.parametrize("kind", EARLIER)
def test_the_jobs_of_an_earlier_version_go_on_unless_something_new_is_asked_for(kind):
    today = json.loads(json.dumps(asdict(getattr(settings, kind)())))
    assert same_settings(today, EARLIER[kind])
    assert set(EARLIER[kind]) <= set(today)


@pytest.mark.parametrize("asked", [{"distill_over": "batch"}, {"contrastive_weight": 0.0}])
def test_a_loss_that_an_earlier_version_did_not_have_makes_it_another_job(asked):
    assert not same_settings(EARLIER["LossSettings"] | asked, EARLIER["LossSettings"])
