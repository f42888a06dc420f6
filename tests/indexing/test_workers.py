import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import NUM_DOCUMENTS
from test_embeddings import files_of, kill_after, run
from worker_jobs import fail_or_wait, kill_itself, leave, write_variable

from effir_search.indexing.build import index_corpus
from effir_search.indexing.index_record import store_of
from effir_search.indexing.shard import Shard
from effir_search.indexing.workers import run_workers, this_shard, worker_devices
from effir_search.settings import EncoderOptions, IndexSettings


def pid_of(path):
    while not path.exists():
        time.sleep(0.01)
    return int(path.read_text())


def is_alive(pid):
    """Whether a process works; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for_end(pid, seconds=20):
    end = time.monotonic() + seconds
    while is_alive(pid) and time.monotonic() < end:
        time.sleep(0.05)
    return not is_alive(pid)


@pytest.mark.processes
def test_workers_give_the_index_that_one_process_gives(tmp_path, corpus, bert_folder, whole):
    done = run(corpus, bert_folder, tmp_path / "index", "--workers", "2")
    assert done.returncode == 0, done.stderr
    assert files_of(tmp_path / "index") == files_of(whole)
    assert [path.name for path in tmp_path.iterdir()] == ["index"]


@pytest.mark.processes
def test_a_killed_job_with_workers_is_continued_by_one_without(tmp_path, corpus, bert_folder, whole):
    kill_after(4, corpus, bert_folder, tmp_path / "index", "--workers", "2")
    store, now = store_of(tmp_path / "index"), time.monotonic()
    while time.monotonic() < now + 20:  # its workers let go of their locks when they are gone
        try:
            with store.at_work(Shard()):
                break
        except OSError:
            time.sleep(0.1)
    reused = sum(part.num_documents for part in store.parts().values())
    done = run(corpus, bert_folder, tmp_path / "index")
    assert done.returncode == 0, done.stderr
    assert f"continuing: {reused} documents" in done.stderr
    assert files_of(tmp_path / "index") == files_of(whole)


@pytest.mark.processes
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_workers_die_with_their_parent(tmp_path, how):
    program = (
        "import signal, sys; from pathlib import Path; from effir_search.indexing.workers import run_workers\n"
        "from worker_jobs import write_pid_and_wait\n"
        "if __name__ == '__main__':\n"
        "    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
        # A shell starts what it runs in the background with SIGINT ignored, and its children inherit that.
        "    signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"    run_workers(write_pid_and_wait, [Path({str(tmp_path)!r}) / name for name in 'ab'])\n"
    )
    (tmp_path / "program.py").write_text(program)
    parent = subprocess.Popen(
        [sys.executable, tmp_path / "program.py"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(str(folder) for folder in Path(__file__).parents[:3])},
        stderr=subprocess.DEVNULL,
    )
    pids = [pid_of(tmp_path / name) for name in "ab"]
    assert all(map(is_alive, pids))
    parent.send_signal(how)
    parent.wait()
    assert all(map(wait_for_end, pids))


@pytest.mark.processes
def test_a_module_in_the_folder_of_the_moment_is_not_taken_for_one_that_workers_need(tmp_path):
    program = (
        "import sys; from pathlib import Path; from effir_search.indexing.workers import run_workers\n"
        "from worker_jobs import write_variable\n"
        "if __name__ == '__main__':\n"
        f"    run_workers(write_variable, [Path({str(tmp_path)!r}) / name for name in 'ab'])\n"
    )
    (tmp_path / "programs").mkdir()
    (tmp_path / "programs" / "program.py").write_text(program)
    (tmp_path / "worker_jobs.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w').close()")
    path = os.pathsep.join(str(folder) for folder in Path(__file__).parents[:3])
    subprocess.run(
        [sys.executable, tmp_path / "programs" / "program.py"],
        env=os.environ | {"PYTHONPATH": path},
        cwd=tmp_path,
        check=True,
    )
    assert (tmp_path / "b").is_file() and not (tmp_path / "executed").exists()


@pytest.mark.processes
def test_workers_have_the_variables_that_this_process_has_at_the_moment(tmp_path, monkeypatch):
    for value in "12":
        monkeypatch.setenv("EFFIR_TEST", value)
        run_workers(write_variable, [tmp_path / f"a{value}", tmp_path / f"b{value}"])
        assert [(tmp_path / f"{name}{value}").read_text() for name in "ab"] == [value, value]


@pytest.mark.processes
def test_what_a_worker_raises_is_raised_and_the_others_are_stopped(tmp_path):
    with pytest.raises(ValueError, match="a bad line"):
        run_workers(fail_or_wait, [tmp_path / "waits", ValueError("docs.jsonl:3: a bad line")])
    assert not (tmp_path / "waits").exists() or wait_for_end(pid_of(tmp_path / "waits"))


@pytest.mark.processes
@pytest.mark.timeout(120)
def test_an_error_too_long_for_the_pipe_is_raised_too(tmp_path):
    long = "docs.jsonl:3: " + 300_000 * "x"
    with pytest.raises(ValueError) as raised:
        run_workers(fail_or_wait, [tmp_path / "waits", ValueError(long)])
    assert str(raised.value) == long


@pytest.mark.processes
def test_any_other_error_of_a_worker_is_raised_and_every_error_has_the_workers_traceback(tmp_path):
    for raised, expected, message in (
        (ValueError("a bad line"), ValueError, "a bad line"),
        (KeyError("lost"), RuntimeError, "KeyError: 'lost'"),
    ):
        with pytest.raises(expected) as caught:
            run_workers(fail_or_wait, [raised])
        assert str(caught.value) == message
        (note,) = caught.value.__notes__
        assert note.startswith("In the worker:\nTraceback") and "in fail_or_wait" in note


@pytest.mark.processes
@pytest.mark.parametrize(
    ("work", "message"), [(leave, "ended with status 3"), (kill_itself, "was killed by signal 9; .* continues")]
)
def test_a_worker_that_ends_without_a_word_is_an_error(work, message):
    with pytest.raises(OSError, match=message):
        run_workers(work, [3])


@pytest.mark.processes
def test_shards_of_several_machines_are_divided_among_their_workers(tmp_path, corpus, bert_folder, whole):
    for number in ("0", "1"):
        options = ("--workers", "2", "--num-shards", "2", "--shard-id", number)
        done = run(corpus, bert_folder, tmp_path / "index", *options)
        assert done.returncode == 0, done.stderr
        assert ("the job that encodes the last part" in done.stdout) == (number == "0")
    assert files_of(tmp_path / "index") == files_of(whole)


@pytest.mark.processes
@pytest.mark.parametrize("more", [[], ["--keep-embeddings"]])
def test_workers_replace_an_index_when_they_are_told_to(tmp_path, corpus, bert_folder, whole, more):
    index_dir = shutil.copytree(whole, tmp_path / "index")
    content = bytearray((index_dir / "index").read_bytes())
    content[-1] ^= 1
    (index_dir / "index").write_bytes(content)
    refused = run(corpus, bert_folder, index_dir, "--workers", "2", *more)
    assert refused.returncode == 1 and "an index is there already" in refused.stderr
    done = run(corpus, bert_folder, index_dir, "--workers", "2", "--overwrite", *more)
    assert done.returncode == 0, done.stderr
    assert files_of(index_dir) == files_of(whole)
    assert store_of(index_dir).is_kept() == bool(more)


@pytest.mark.processes
def test_a_shard_that_comes_late_finds_the_index_done(tmp_path, corpus, bert_folder, whole):
    job = (str(corpus), str(bert_folder), tmp_path / "index", IndexSettings(threads=1), EncoderOptions(dtype="fp32"))
    for number in range(2):
        index_corpus(*job, shard=Shard(number, 2))
    before = (tmp_path / "index" / "effir.json").read_bytes()
    info = index_corpus(*job, shard=Shard(0, 2))
    assert info.num_documents == NUM_DOCUMENTS
    assert (tmp_path / "index" / "effir.json").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["index"]


@pytest.mark.processes
def test_shards_write_into_an_empty_folder(tmp_path, corpus, bert_folder, whole):
    (tmp_path / "index").mkdir()
    done = run(corpus, bert_folder, tmp_path / "index", "--workers", "2")
    assert done.returncode == 0, done.stderr
    assert files_of(tmp_path / "index") == files_of(whole)


@pytest.fixture
def launcher(monkeypatch):
    """Set the variables of a launcher, and none of another."""
    for name in [name for name in os.environ if name.startswith("SLURM_")] + ["RANK", "WORLD_SIZE"]:
        monkeypatch.delenv(name, raising=False)

    def set_variables(**variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, str(value))

    return set_variables


def test_the_shard_is_the_launchers_unless_options_say_otherwise(launcher):
    assert this_shard(None, None) == Shard(0, 1)
    launcher(SLURM_PROCID=3, SLURM_STEP_NUM_TASKS=8, SLURM_STEP_ID=0, SLURM_NTASKS=8)
    assert this_shard(None, None) == Shard(3, 8)
    launcher(RANK=1, WORLD_SIZE=2)
    assert this_shard(None, None) == Shard(1, 2)
    assert this_shard(4, 0) == Shard(0, 4)


# Those of sbatch's script, of salloc's shell, and of salloc's shell where it is a step of one task.
@pytest.mark.parametrize(
    "variables",
    [
        {"SLURM_PROCID": 0, "SLURM_NTASKS": 4, "SLURM_NPROCS": 4, "SLURM_LOCALID": 0, "SLURM_JOB_ID": 7},
        {"SLURM_NTASKS": 4, "SLURM_NPROCS": 4, "SLURM_JOB_ID": 7},
        {"SLURM_PROCID": 0, "SLURM_NTASKS": 4, "SLURM_STEP_NUM_TASKS": 1, "SLURM_STEP_ID": 4294967290},
    ],
)
def test_a_batch_script_and_an_allocations_shell_are_the_whole_job(launcher, variables):
    launcher(**variables)
    assert this_shard(None, None) == Shard(0, 1)


@pytest.mark.parametrize(("number", "count"), [("4", "4"), ("-1", "4"), ("", "4"), ("0", "four"), ("0", "0")])
def test_a_launchers_variables_that_name_no_shard_are_an_error(launcher, number, count):
    launcher(RANK=number, WORLD_SIZE=count)
    with pytest.raises(ValueError, match=f"^RANK={number} and WORLD_SIZE={count} name no shard; unset them, or give"):
        this_shard(None, None)


@pytest.mark.processes
def test_a_batch_script_writes_the_index(tmp_path, corpus, bert_folder, whole):
    batch = {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "7"}
    done = run(corpus, bert_folder, tmp_path / "index", environment=batch)
    assert done.returncode == 0, done.stderr
    assert files_of(tmp_path / "index") == files_of(whole)


@pytest.mark.processes
def test_a_shard_that_ends_before_others_says_that_no_index_was_written(tmp_path, corpus, bert_folder):
    step = {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}
    done = run(corpus, bert_folder, tmp_path / "index", environment=step)
    assert done.returncode == 0, done.stderr
    assert "WARNING" in done.stderr and "no index was written, since other shards than this, 1 of 2, are" in done.stderr
    # A shard without any part, of more shards than parts, in which nobody else has begun.
    done = run(corpus, bert_folder, tmp_path / "other", "--num-shards", "100", "--shard-id", "0")
    assert done.returncode == 0 and "no index was written, since" in done.stderr


def test_half_a_shard_or_one_too_many_is_an_error():
    with pytest.raises(ValueError, match="go together"):
        this_shard(4, None)
    with pytest.raises(ValueError, match="must be below --num-shards 4"):
        this_shard(4, 4)


def test_the_devices_of_the_workers():
    assert worker_devices(None, None) == []
    assert worker_devices(3, None) == ["cpu"] * 3
    assert worker_devices(None, "cuda:0, cuda:1") == ["cuda:0", "cuda:1"]
    for devices in ("", "cuda:0,", "cuda:0,cuda:0"):
        with pytest.raises(ValueError, match="each once"):
            worker_devices(None, devices)
    with pytest.raises(ValueError, match="not both"):
        worker_devices(2, "cuda:0")
