"""Reading lines with their numbers; writing files and folders whole or not at all."""

import bz2
import codecs
import gzip
import io
import lzma
import os
import stat
import tarfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from effir_search.cli.errors import describe_error
from effir_search.files.reading import decode, read_lines
from effir_search.files.whole import append_line, refuse_existing, whole_file, whole_folder


class Interrupted(Exception):
    """Stands for anything that ends a block early."""


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def permissions(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def test_blank_lines_are_left_out_but_counted(tmp_path):
    (tmp_path / "lines.txt").write_bytes(b"first\n\n \t\nfourth\r\nfifth")
    assert list(read_lines(tmp_path / "lines.txt")) == [(1, b"first"), (4, b"fourth"), (5, b"fifth")]


def test_only_line_ends_are_stripped_from_a_line(tmp_path):
    (tmp_path / "lines.txt").write_bytes(b" a\tb \t\r\n")
    assert list(read_lines(tmp_path / "lines.txt")) == [(1, b" a\tb \t")]


def test_a_byte_order_mark_is_no_part_of_line_1(tmp_path):
    (tmp_path / "lines.txt").write_text("a\nb\n", encoding="utf-8-sig")
    assert list(read_lines(tmp_path / "lines.txt")) == [(1, b"a"), (2, b"b")]


def test_a_gzipped_file_reads_like_the_plain_one(tmp_path):
    (tmp_path / "lines.txt").write_bytes(b"a\n\nb\n")
    (tmp_path / "lines.txt.gz").write_bytes(gzip.compress(b"a\n\nb\n"))
    assert list(read_lines(tmp_path / "lines.txt.gz")) == list(read_lines(tmp_path / "lines.txt"))


def test_a_cut_gzip_file_gives_its_whole_lines_and_then_an_error_with_the_last_of_them(tmp_path):
    path = tmp_path / "lines.txt.gz"
    path.write_bytes(gzip.compress(b"a\nb\n") + gzip.compress(b"c\nd\n")[:-12])
    lines = read_lines(path)
    assert [next(lines), next(lines)] == [(1, b"a"), (2, b"b")]
    with pytest.raises(ValueError, match=r"lines\.txt\.gz: cut or damaged gzip file, after line 2"):
        list(lines)


def test_a_file_that_is_no_gzip_in_spite_of_its_name_is_an_error(tmp_path):
    (tmp_path / "lines.txt.gz").write_bytes(b"a\nb\n")
    with pytest.raises(ValueError, match=r"lines\.txt\.gz: cut or damaged gzip file"):
        list(read_lines(tmp_path / "lines.txt.gz"))


def test_a_gzip_file_with_a_changed_byte_is_an_error(tmp_path):
    compressed = bytearray(gzip.compress(bytes(range(256)) * 4))
    compressed[-6] ^= 1  # in the check sum, which stands 8 bytes before the end
    (tmp_path / "lines.txt.gz").write_bytes(compressed)
    with pytest.raises(ValueError, match=r"lines\.txt\.gz: cut or damaged gzip file"):
        list(read_lines(tmp_path / "lines.txt.gz"))


def test_a_folder_cannot_be_read_as_a_file(tmp_path):
    with pytest.raises(IsADirectoryError, match="is a folder, a file is needed"):
        list(read_lines(tmp_path))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"missing\.txt"):
        list(read_lines(tmp_path / "missing.txt"))


def test_bytes_that_are_not_utf_8_are_reported_with_their_place():
    # "é" is two bytes in UTF-8, so the bad byte stands at 3.
    with pytest.raises(ValueError, match=r"^docs\.jsonl:7: invalid UTF-8 at byte 3 of the line$"):
        decode("éa".encode() + b"\xff", "docs.jsonl:7")


def test_a_whole_file_is_under_its_name_only_after_the_block(tmp_path):
    path = tmp_path / "new" / "run.txt"
    with whole_file(path) as file:
        file.write("été\n")
        assert not path.exists()
    assert path.read_bytes() == "été\n".encode()
    assert names(path.parent) == ["run.txt"]


@pytest.mark.parametrize("error", [Interrupted, KeyboardInterrupt])
def test_a_block_that_fails_leaves_neither_a_file_nor_a_temporary_one(tmp_path, error):
    with pytest.raises(error), whole_file(tmp_path / "run.txt") as file:
        file.write("half")
        raise error
    assert names(tmp_path) == []


def test_a_block_that_fails_leaves_the_old_file_as_it_was(tmp_path):
    (tmp_path / "run.txt").write_text("old")
    with pytest.raises(Interrupted), whole_file(tmp_path / "run.txt") as file:
        file.write("half of the new")
        raise Interrupted
    assert (tmp_path / "run.txt").read_text() == "old"
    assert names(tmp_path) == ["run.txt"]


def test_an_old_file_is_replaced_only_after_the_block(tmp_path):
    (tmp_path / "run.txt").write_text("old")
    with whole_file(tmp_path / "run.txt") as file:
        file.write("new")
        file.flush()
        assert (tmp_path / "run.txt").read_text() == "old"
    assert (tmp_path / "run.txt").read_text() == "new"


def test_a_file_cannot_stand_where_a_folder_is_and_the_error_names_that_folder(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError) as caught, whole_file(tmp_path / "folder") as file:
        file.write("text")
    assert describe_error(caught.value).startswith(f"{tmp_path / 'folder'}: ")
    assert names(tmp_path) == ["folder"]


@pytest.mark.parametrize(("mask", "file_mode", "folder_mode"), [(0o022, 0o644, 0o755), (0o077, 0o600, 0o700)])
def test_permissions_follow_the_umask(tmp_path, mask, file_mode, folder_mode):
    with umask(mask):
        with whole_file(tmp_path / "file") as file:
            file.write("text")
        with whole_folder(tmp_path / "folder") as folder:
            (folder / "inside").write_text("text")
    assert permissions(tmp_path / "file") == file_mode
    assert permissions(tmp_path / "folder") == folder_mode
    assert permissions(tmp_path / "folder" / "inside") == file_mode


def test_the_umask_is_the_same_afterwards(tmp_path):
    with umask(0o027):
        with whole_file(tmp_path / "file") as file:
            file.write("text")
        assert os.umask(0o027) == 0o027


def test_a_whole_folder_is_under_its_name_only_after_the_block(tmp_path):
    path = tmp_path / "new" / "index"
    with whole_folder(path) as folder:
        (folder / "docid").write_text("1\n")
        assert not path.exists()
    assert names(path) == ["docid"]
    assert names(path.parent) == ["index"]


@pytest.mark.parametrize("error", [Interrupted, KeyboardInterrupt])
def test_a_block_that_fails_leaves_neither_a_folder_nor_a_temporary_one(tmp_path, error):
    with pytest.raises(error), whole_folder(tmp_path / "index") as folder:
        (folder / "docid").write_text("1\n")
        raise error
    assert names(tmp_path) == []


def test_a_block_that_fails_leaves_the_old_folder_as_it_was(tmp_path):
    (tmp_path / "index").mkdir()
    (tmp_path / "index" / "old").write_text("old")
    with pytest.raises(Interrupted), whole_folder(tmp_path / "index", replaces={"old"}) as folder:
        (folder / "new").write_text("new")
        raise Interrupted
    assert names(tmp_path) == ["index"]
    assert (tmp_path / "index" / "old").read_text() == "old"


def test_an_old_folder_is_replaced_only_after_the_block(tmp_path):
    (tmp_path / "index").mkdir()
    (tmp_path / "index" / "old").write_text("old")
    with whole_folder(tmp_path / "index", replaces={"old"}) as folder:
        (folder / "new").write_text("new")
        assert names(tmp_path / "index") == ["old"]
    assert names(tmp_path / "index") == ["new"]
    assert names(tmp_path) == ["index"]


def test_of_a_link_to_a_folder_the_folder_is_replaced(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "old").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with whole_folder(tmp_path / "link", replaces={"old"}) as folder:
        (folder / "new").write_text("new")
    assert names(tmp_path / "real") == names(tmp_path / "link") == ["new"]
    assert names(tmp_path) == ["link", "real"]


@pytest.mark.parametrize("write", [whole_file, whole_folder])
def test_a_path_below_a_file_cannot_be_written_and_is_named(tmp_path, write):
    (tmp_path / "file").write_text("text")
    with pytest.raises(OSError) as caught, write(tmp_path / "file" / "output"):
        pytest.fail("the block was entered")
    assert describe_error(caught.value).startswith(f"{tmp_path / 'file' / 'output'}: cannot be written: ")
    assert names(tmp_path) == ["file"]


def test_a_folder_with_something_in_it_is_refused_before_the_block(tmp_path):
    (tmp_path / "index").mkdir()
    (tmp_path / "index" / "old").write_text("old")
    with pytest.raises(FileExistsError, match="index: exists already, with 'old' in it; choose another --output"):
        with whole_folder(tmp_path / "index"):
            pytest.fail("the block was entered")
    assert names(tmp_path) == ["index"]


def test_an_empty_folder_may_be_filled_without_overwrite(tmp_path):
    (tmp_path / "index").mkdir()
    with whole_folder(tmp_path / "index") as folder:
        (folder / "docid").write_text("1\n")
    assert names(tmp_path / "index") == ["docid"]
    assert names(tmp_path) == ["index"]


def test_a_file_is_never_replaced_by_a_folder(tmp_path):
    (tmp_path / "index").write_text("a file")
    with pytest.raises(FileExistsError, match="index: exists already, and is no folder"):
        refuse_existing(tmp_path / "index", replaces={"index"})


def test_a_folder_with_anything_else_in_it_is_never_replaced(tmp_path):
    (tmp_path / "home").mkdir()
    for name in ("docid", "thesis.tex"):
        (tmp_path / "home" / name).write_text("text")
    with pytest.raises(FileExistsError, match="home: exists already, with 'thesis.tex' in it"):
        refuse_existing(tmp_path / "home", replaces={"docid", "index"})


FOREIGN_FILES = {
    "zip": lambda data: zipped(data),
    "tar": lambda data: tarred(data, "w"),
    "tar.gz": lambda data: tarred(data, "w:gz"),
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": lambda data: b"\x28\xb5\x2f\xfd" + data,
    "parquet": lambda data: b"PAR1\x15\x04" + data + b"PAR1",
    "gz in gz": lambda data: gzip.compress(gzip.compress(data)),
}
NAMES = {
    "zip": "is a zip archive, .* unpack it", "tar": "is a tar archive", "tar.gz": "is a tar archive",
    "bz2": "is compressed by bzip2, .* bunzip2", "xz": "is compressed by xz", "zst": "is compressed by Zstandard",
    "parquet": "is a Parquet file", "gz in gz": "is gzip in gzip",
}  # fmt: skip


def zipped(data):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("lines.txt", data)
    return file.getvalue()


def tarred(data, mode):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as archive:
        info = tarfile.TarInfo("lines.txt")
        info.size = len(data)
        archive.addfile(info, io.BytesIO(data))
    return file.getvalue()


@pytest.mark.parametrize("kind", FOREIGN_FILES)
def test_a_file_that_is_no_text_is_called_what_it_is(tmp_path, kind):
    (tmp_path / "lines.jsonl").write_bytes(FOREIGN_FILES[kind](b'{"_id": "1", "text": "cat"}\n'))
    with pytest.raises(ValueError, match=rf"lines\.jsonl: {NAMES[kind]}"):
        list(read_lines(tmp_path / "lines.jsonl"))


@pytest.mark.parametrize("start", ["BZh9\tcat", "PAR1\tcat", "PK\tcat", "7z cat"])
def test_a_text_may_begin_as_the_name_of_a_compression(tmp_path, start):
    (tmp_path / "lines.tsv").write_text(start)
    assert list(read_lines(tmp_path / "lines.tsv")) == [(1, start.encode())]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_file_with_a_byte_order_mark_is_read_in_its_encoding_gzipped_too(tmp_path, encoding):
    lines = [f"{number}: été, 東京 😀\u2028" for number in range(3000)]
    data = "\r\n".join(lines).encode(encoding)
    (tmp_path / "plain").write_bytes(data)
    (tmp_path / "compressed").write_bytes(gzip.compress(data))
    for name in ("plain", "compressed"):
        assert [line.decode() for _, line in read_lines(tmp_path / name)] == lines


def test_utf_16_of_the_other_byte_order_is_read_and_without_a_mark_or_cut_it_is_an_error(tmp_path):
    path = tmp_path / "lines.txt"
    path.write_bytes(codecs.BOM_UTF16_BE + "cat\ndog".encode("utf-16-be"))
    assert list(read_lines(path)) == [(1, b"cat"), (2, b"dog")]
    path.write_bytes("cat".encode("utf-16-le"))
    with pytest.raises(ValueError, match=r"lines\.txt: holds NUL bytes, so it is binary, or UTF-16 without its mark"):
        list(read_lines(path))
    path.write_bytes("cat".encode("utf-16") + b"x")
    with pytest.raises(ValueError, match=r"lines\.txt: invalid UTF-16.* \(truncated data\)"):
        list(read_lines(path))


def test_lines_are_appended_where_the_last_whole_one_ends(tmp_path):
    path = tmp_path / "lines"
    append_line(path, "one")
    assert path.read_bytes() == b"one\n"
    for cut in (b"tw", b"x" * 10_000):
        with open(path, "ab") as file:
            file.write(cut)
        append_line(path, "tw\u00f6")
    assert path.read_text(encoding="utf-8") == "one\ntw\u00f6\ntw\u00f6\n"
    path.write_bytes(b"y" * 9000)
    append_line(path, "three")
    assert path.read_bytes() == b"three\n"


def test_a_full_disk_leaves_the_lines_as_they_were(tmp_path, monkeypatch):
    path = tmp_path / "lines"
    append_line(path, "one")

    def full(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="cannot be written: No space left on device; is the disk full"):
        append_line(path, "two")
    assert path.read_bytes() == b"one\n"
