"""Files and folders that stand under their name only once they are complete."""

import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

# What a write raises, without a file name, when there is no room for it.
DISK_ERRORS = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EIO)


@contextmanager
def whole_file(path: Path) -> Iterator[IO[str]]:
    """Open a text file that stands under ``path`` only once the block has ended without an error.

    Until then it is a temporary file in the same folder, which is made if it is missing.
    """
    with _naming(path):
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "is a folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with open(descriptor, "w", encoding="utf-8", newline="\n") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException as error:
        Path(name).unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in DISK_ERRORS and error.filename is None:
            raise OSError(error.errno, f"cannot be written: {error.strerror}", str(path)) from error
        raise


def write_whole(path: Path, write: Callable[[IO[bytes]], object]) -> str:
    """Write a file under a temporary name, flush it to the disk, rename it; return its SHA-256.

    The temporary name is always the same, so that what a killed job left is overwritten by the next one.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(
            error.errno, f"cannot be written: {error.strerror or error}; is the disk full?", str(path)
        ) from error
    with open(temporary, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    os.replace(temporary, path)
    _sync(path.parent)
    return sha256


def append_line(path: Path, line: str) -> None:
    """Append a line to a file and flush it to the disk; a line that has no end, since a kill cut it off, goes first.

    Whoever reads the file while it is written must take no notice of a last line without an end. One writes at a time.

    Raises:
        OSError: The disk is full, or the file cannot be written; its lines are then as they were.
    """
    is_new = not path.exists()
    try:
        with open(path, "ab+") as file:
            end = _end_of_lines(file)
            file.truncate(end)
            try:
                file.write(f"{line}\n".encode())
                file.flush()
                os.fsync(file.fileno())
            except OSError:
                os.ftruncate(file.fileno(), end)
                raise
    except OSError as error:
        raise OSError(
            error.errno, f"cannot be written: {error.strerror or error}; is the disk full?", str(path)
        ) from error
    if is_new:
        _sync(path.parent)


def _end_of_lines(file: IO[bytes]) -> int:
    """Return the place behind the last line that has its end."""
    end = file.seek(0, os.SEEK_END)
    while end:
        start = max(0, end - 4096)
        file.seek(start)
        if (newline := file.read(end - start).rfind(b"\n")) >= 0:
            return start + newline + 1
        end = start
    return 0


@contextmanager
def whole_folder(path: Path, *, replaces: Collection[str] = ()) -> Iterator[Path]:
    """Give a temporary folder that stands under ``path`` only once the block has ended without an error.

    Args:
        path: Final name.
        replaces: A folder of that name is replaced, after the new one is complete, if it holds only files named here.

    Raises:
        FileExistsError: ``path`` exists, and must not be replaced.
    """
    refuse_existing(path, replaces=replaces)
    path = path.resolve()  # of a link to a folder, the folder is replaced
    with _naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield temporary
        mode = 0o666 & ~_umask()
        for file in temporary.rglob("*"):
            if file.is_file():  # some libraries let nobody else read what they write
                os.chmod(file, mode)
        for file in temporary.iterdir():
            _sync(file)
        os.chmod(temporary, 0o777 & ~_umask())
        if path.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=path.parent))
            os.replace(path, old)
            try:
                os.replace(temporary, path)
            except OSError:
                os.replace(old, path)
                raise
            shutil.rmtree(old)
        else:
            os.replace(temporary, path)
        _sync(path.parent)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in DISK_ERRORS and error.filename is None:
            raise OSError(error.errno, f"cannot be written: {error.strerror}", str(path)) from error
        raise


def refuse_existing(path: Path, *, replaces: Collection[str]) -> None:
    """Raise FileExistsError if there is something under ``path`` that ``whole_folder`` must not replace."""
    if path.is_dir():
        if others := sorted(child.name for child in path.iterdir() if child.name not in replaces):
            raise FileExistsError(f"{path}: exists already, with {others[0]!r} in it; choose another --output")
    elif path.exists():
        raise FileExistsError(f"{path}: exists already, and is no folder; choose another --output")


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Let an OSError name the file that was asked for, not a temporary one or a parent folder."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, f"cannot be written: {error.strerror}", str(path)) from error


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
