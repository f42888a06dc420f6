"""Text files read line by line with their numbers; files and folders written whole or not at all."""

import codecs
import errno
import gzip
import hashlib
import io
import os
import re
import shutil
import tempfile
import zlib
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

# What a write raises, without a file name, when there is no room for it.
DISK_ERRORS = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EIO)


# How files begin that hold no text, what they are, and what makes text of them.
FOREIGN = (
    (rb"PK(\x03\x04|\x05\x06)", "a zip archive", "unpack it"),
    (rb".{257}ustar", "a tar archive", "unpack it"),
    (rb"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it"),
    (rb"BZh[1-9](1AY&SY|\x17rE8P\x90)", "compressed by bzip2", "decompress it with bunzip2"),
    (rb"\xfd7zXZ\x00", "compressed by xz", "decompress it with unxz"),
    (rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18", "compressed by Zstandard", "decompress it with unzstd"),
    (rb"\x04\x22\x4d\x18", "compressed by LZ4", "decompress it with unlz4"),
    (rb"\x1f\x9d", "compressed by compress", "decompress it with uncompress"),
    (rb"\x1f\x8b", "gzip in gzip", "decompress it once with gunzip"),
    (rb"PAR[1E]\x15", "a Parquet file", "write it as JSONL, for instance with pandas"),
    (rb"ARROW1\x00\x00|\xff\xff\xff\xff", "an Arrow file", "write it as JSONL, for instance with datasets"),
)
_FOREIGN = [(re.compile(begin, re.DOTALL), what, remedy) for begin, what, remedy in FOREIGN]
_GZIP = b"\x1f\x8b"
_GZIP_ERRORS = (EOFError, zlib.error, gzip.BadGzipFile)
_WIDE = {  # the longer marks first, since UTF-32's begins with UTF-16's
    b"\xff\xfe\x00\x00": "utf-32",
    b"\x00\x00\xfe\xff": "utf-32",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
}
# Bytes that tell what a file is; what a buffer holds at least, where there is so much.
_HEAD = 512


@contextmanager
def open_text(path: Path) -> Iterator[io.BufferedReader | gzip.GzipFile]:
    """Open a text file as bytes: decompressed where it is gzip, in UTF-8, without a byte order mark.

    UTF-16 and UTF-32 are known by their mark. Both files that are given have ``peek``.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is no text but an archive, of another compression or binary; or it is damaged.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{path}: is a folder, a file is needed")
    with open(path, "rb") as file:
        try:
            if path.suffix.lower() == ".gz" or file.peek(_HEAD).startswith(_GZIP):
                file = gzip.GzipFile(fileobj=file)
            yield _as_utf8(file, path)
        except _GZIP_ERRORS as error:
            raise ValueError(f"{path}: cut or damaged gzip file ({error})") from error
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: invalid {error.encoding.upper()} ({error.reason})") from error


def _as_utf8(file: io.BufferedReader | gzip.GzipFile, path: Path) -> io.BufferedReader | gzip.GzipFile:
    head = file.peek(_HEAD)
    for begin, what, remedy in _FOREIGN:
        if begin.match(head):
            raise ValueError(f"{path}: is {what}, of which no text is read; {remedy}")
    if head.startswith(codecs.BOM_UTF8):
        file.read(len(codecs.BOM_UTF8))
        return file
    for mark, encoding in _WIDE.items():
        if head.startswith(mark):
            return io.BufferedReader(_AsUtf8(io.TextIOWrapper(file, encoding, newline="\n")))
    # In damaged gzip data there may be anything; what is wrong with it is said where it is read to the end.
    if b"\x00" in head[:_HEAD] and not isinstance(file, gzip.GzipFile):
        raise ValueError(f"{path}: holds NUL bytes, so it is binary, or UTF-16 without its mark; save it as UTF-8 text")
    return file


class _AsUtf8(io.RawIOBase):
    """The text of a file of another encoding, as UTF-8."""

    def __init__(self, text: io.TextIOWrapper) -> None:
        self._text, self._left = text, b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        self._left = self._left or self._text.read(1 << 13).encode("utf-8")
        taken = self._left[: len(buffer)]
        self._left = self._left[len(taken) :]
        buffer[: len(taken)] = taken
        return len(taken)


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield ``(line_number, line)`` of a file, as ``open_text`` opens it, blank lines left out.

    Line numbers are 1-based. Lines come as bytes, without their line end, so that a line that is not UTF-8 can be
    reported with its number.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is no text, or damaged.
    """
    with open_text(path) as file:
        yield from lines_of(file, path)


def lines_of(file: io.BufferedReader | gzip.GzipFile, path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield what ``read_lines`` yields, of a file that ``open_text`` opened."""
    line_number = 0
    try:
        for line_number, line in enumerate(file, start=1):  # noqa: B007, the handler below reports the number
            if line.strip():
                yield line_number, line.rstrip(b"\r\n")
    except _GZIP_ERRORS as error:
        raise ValueError(f"{path}: cut or damaged gzip file, after line {line_number} ({error})") from error


def decode(line: bytes, where: str) -> str:
    """Return a line as text; ``where`` (file and line) opens the error if it is not UTF-8."""
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: invalid UTF-8 at byte {error.start} of the line") from error


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
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
    return sha256


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
