"""Files read by line: gzip, UTF-16, JSON; what is no text is called what it is."""

import codecs
import gzip
import hashlib
import io
import json
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from effir_search.errors import UserError

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
            raise UserError(f"{path}: cut or damaged gzip file ({error})") from error
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: invalid {error.encoding.upper()} ({error.reason})") from error


def _as_utf8(file: io.BufferedReader | gzip.GzipFile, path: Path) -> io.BufferedReader | gzip.GzipFile:
    head = file.peek(_HEAD)
    for begin, what, remedy in _FOREIGN:
        if begin.match(head):
            raise UserError(f"{path}: is {what}, of which no text is read; {remedy}")
    if head.startswith(codecs.BOM_UTF8):
        file.read(len(codecs.BOM_UTF8))
        return file
    for mark, encoding in _WIDE.items():
        if head.startswith(mark):
            return io.BufferedReader(_AsUtf8(io.TextIOWrapper(file, encoding, newline="\n")))
    # In damaged gzip data there may be anything; what is wrong with it is said where it is read to the end.
    if b"\x00" in head[:_HEAD] and not isinstance(file, gzip.GzipFile):
        raise UserError(f"{path}: holds NUL bytes, so it is binary, or UTF-16 without its mark; save it as UTF-8 text")
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
        raise UserError(f"{path}: cut or damaged gzip file, after line {line_number} ({error})") from error


def decode(line: bytes, where: str) -> str:
    """Return a line as text; ``where`` (file and line) opens the error if it is not UTF-8."""
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: invalid UTF-8 at byte {error.start} of the line") from error


def parse_json_object(line: str, where: str) -> dict:
    """Return the JSON object on a line; ``where`` opens the error if there is none."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        found = _other_format(line) or error
        raise UserError(f"{where}: not JSON, of which each line holds one object ({found})") from error
    if not isinstance(record, dict):
        raise UserError(f"{where}: not a JSON object but {type(record).__name__}; each line holds one object")
    return record


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> dict:
    """Return the object in a JSON file.

    Raises:
        ValueError: No JSON object, or not UTF-8.
        OSError: The file cannot be read.
    """
    try:
        content = json.loads(decode(path.read_bytes(), str(path)))
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a JSON object but {type(content).__name__}")
    return content


def _other_format(line: str) -> str:
    """What a line that is no JSON may be; "" where it says nothing."""
    start = line.lstrip()[:1]
    if start == "<":
        return "it looks like XML or HTML"
    for name, separator in (("TSV", "\t"), ("CSV", ",")):
        if start not in "{[" and separator in line:
            return f"it looks like {name}; a corpus in {name} has a name in .{name.lower()}"
    return ""
