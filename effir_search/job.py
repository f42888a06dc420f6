"""The folder in which a job that can be stopped keeps what it continues from."""

import fcntl
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from effir_search.files import decode, whole_file

SETTINGS = "settings.json"


@contextmanager
def job_folder(path: Path, settings: dict, *, restart: bool = False) -> Iterator[None]:
    """Hold a job's folder, made if it is missing; what an earlier job of the same settings left in it may be used.

    Args:
        path: The folder.
        settings: What the job's result depends on, in JSON types.
        restart: Discard what an earlier job left.

    Raises:
        OSError: Another job is at work in it, or it cannot be written.
        ValueError: What is there is of other settings; the first difference is named.
    """
    path.mkdir(parents=True, exist_ok=True)
    with open(path / "job.lock", "w", encoding="utf-8") as lock:
        if not try_lock(lock, fcntl.LOCK_EX):
            raise OSError(f"{path}: another job is at work in it; wait for it, or stop it")
        if restart:
            for child in path.iterdir():
                if child.is_dir():
                    shutil.rmtree(child)
                elif child.name != "job.lock":
                    child.unlink()
        settings = json.loads(json.dumps(settings))
        file = path / SETTINGS
        if not file.is_file():
            with whole_file(file) as out:
                out.write(json.dumps(settings, indent=1, ensure_ascii=False) + "\n")
        found = json.loads(decode(file.read_bytes(), str(file)))
        for name in settings | found:
            if settings.get(name) != found.get(name):
                ours, theirs = differing(settings.get(name), found.get(name))
                raise ValueError(
                    f"{path}: is of another job: {name} was {theirs} there and is {ours} now; --restart discards it"
                )
        yield


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
    names = [name for name in ours | theirs if ours.get(name) != theirs.get(name)]
    return {name: ours.get(name) for name in names}, {name: theirs.get(name) for name in names}
