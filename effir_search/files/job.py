"""The folder in which a job that can be stopped keeps what it continues from."""

import fcntl
import json
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from effir_search.errors import UserError
from effir_search.files.reading import decode, parse_json_object
from effir_search.files.whole import whole_file

SETTINGS, LOCK = "settings.json", "job.lock"
# Settings that came later, with what jobs did before there was a choice.
BEFORE_THE_CHOICE = {"contrastive_weight": 1.0, "distill_over": "candidates"}


@contextmanager
def job_folder(path: Path, settings: dict, *, restart: bool = False, keep: Collection[str] = ()) -> Iterator[None]:
    """Hold a job's folder, made if it is missing; what an earlier job of the same settings left in it may be used.

    Args:
        path: The folder.
        settings: What the job's result depends on, in JSON types; see ``same_settings``.
        restart: Discard what an earlier job left.
        keep: Names in the folder that are not discarded, and depend on settings of their own.

    Raises:
        OSError: Another job is at work in it, it is not a job's, or it cannot be written.
        ValueError: What is there is of other settings; the first difference is named.
    """
    path.mkdir(parents=True, exist_ok=True)
    names = {child.name for child in path.iterdir()}
    # A job writes its settings before anything else, under a temporary name at first.
    if SETTINGS not in names and any(name != LOCK and not name.startswith(f".{SETTINGS}.") for name in names):
        raise FileExistsError(f"{path}: is not a job's folder, and is left as it is; move it, or give another --output")
    with open(path / LOCK, "w", encoding="utf-8") as lock:
        if not try_lock(lock, fcntl.LOCK_EX):
            raise OSError(f"{path}: another job is at work in it; wait for it, or stop it")
        for child in path.glob(".*"):  # what a job that was killed was writing
            _remove(child)
        earlier_work = [child for child in path.iterdir() if child.name not in (LOCK, SETTINGS, *keep)]
        if restart:
            for child in earlier_work:
                _remove(child)
        settings, recorded = json.loads(json.dumps(settings)), read_settings(path)
        if restart or not earlier_work:
            with whole_file(path / SETTINGS) as file:
                file.write(json.dumps(settings, indent=1, ensure_ascii=False) + "\n")
        elif changed := changed_settings(settings, recorded):
            ours, theirs = differing(settings.get(changed[0]), recorded.get(changed[0]))
            raise UserError(
                f"{path}: is of another job: {changed[0]} was {theirs} there and is {ours} now; "
                "--restart discards what depends on it"
            )
        try:
            yield
        except BaseException:
            if all(child.name in (LOCK, SETTINGS) for child in path.iterdir()):
                shutil.rmtree(path, ignore_errors=True)  # nothing was begun
            raise


def read_settings(path: Path) -> dict | None:
    """Return the settings of the job whose folder this is; None where there are none.

    Raises:
        ValueError: The file is damaged.
    """
    file = path / SETTINGS
    return parse_json_object(decode(file.read_bytes(), str(file)), str(file)) if file.is_file() else None


def changed_settings(ours: dict, theirs: dict) -> list[str]:
    """Return the names of the settings in which two jobs differ, see ``same_settings``."""
    return [name for name in ours | theirs if not _same_entry(name, ours, theirs)]


def same_settings(ours: object, theirs: object) -> bool:
    """Return whether two jobs' settings, in JSON types, are the same.

    A setting that one of them lacks is the same as one that asks for nothing, None, False or empty, or for what was
    done before there was a choice. So the job of a version that did not have this setting yet is continued.
    """
    if isinstance(ours, dict) and isinstance(theirs, dict):
        return not changed_settings(ours, theirs)
    return ours == theirs


def _same_entry(name: str, ours: dict, theirs: dict) -> bool:
    if name in ours and name in theirs:
        return same_settings(ours[name], theirs[name])
    value = ours[name] if name in ours else theirs[name]
    return value == BEFORE_THE_CHOICE.get(name) or _asks_for_nothing(value)


def _asks_for_nothing(value: object) -> bool:
    if isinstance(value, dict):
        return all(map(_asks_for_nothing, value.values()))
    return value is None or value is False or value in ("", [])  # 0 is a number that was asked for


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def try_lock(file: IO[str], kind: int) -> bool:
    """Take a lock of a kind of ``fcntl`` on an open file; return whether it could be had."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def differing(ours: object, theirs: object) -> tuple[object, object]:
    """Return both values; of two dicts only the entries in which they differ."""
    if not isinstance(ours, dict) or not isinstance(theirs, dict):
        return ours, theirs
    names = changed_settings(ours, theirs)
    return {name: ours.get(name) for name in names}, {name: theirs.get(name) for name in names}
