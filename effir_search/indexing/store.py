"""The store: embeddings on disk, in parts, from which a stopped job continues and an index is built.

A store is the folder ``NAME.parts`` beside the index ``NAME``::

    manifest.json         what the vectors depend on; in a store of an earlier version also its finished parts
    parts.jsonl           a line for every finished part, with the hashes of its files
    part-00012.npy        (documents, dimension) float32
    part-00012.ids        one document id a line
    part-00012.tokens     a digest of each document's tokens, 16 bytes; texts of the same tokens have the same vector
    kept                  if there: the store stays when the index is written
    *.lock                held (flock) by the jobs at work; a lock vanishes with its process

A part is a fixed number of consecutive documents, encoded by themselves: a continued job repeats the very same
batches. A part counts once it is listed, by a line with its end: lines are appended, so that a part costs the same
however many there are, and what a kill cut off is no line.
"""

import fcntl
import hashlib
import io
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, fields
from glob import escape
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from effir_search.errors import UserError
from effir_search.files.job import differing, try_lock
from effir_search.files.reading import read_json
from effir_search.files.whole import append_line, write_whole
from effir_search.indexing.copies import DIGEST, first_of_equal
from effir_search.indexing.resume import PART_SIZE, StoreSettings
from effir_search.indexing.shard import Shard
from effir_search.text.corpus import Document

logger = logging.getLogger(__name__)

MANIFEST, PARTS, MANIFEST_LOCK, KEPT = "manifest.json", "parts.jsonl", "manifest.lock", "kept"

# The files of a store, and the hidden ones that are written first or that a file system makes.
OWN_FILE = re.compile(
    r"\..*|manifest\.json|parts\.jsonl|kept|(manifest|shards|finish|shard-\d+)\.lock|part-\d+\.(npy|ids|tokens)"
)

REMEDY = "--repair encodes such parts again, --restart all"


class Part(NamedTuple):
    """The record of a finished part; hashes are SHA-256."""

    num_documents: int
    num_empty: int
    num_truncated: int
    documents_sha256: str
    npy_sha256: str = ""
    ids_sha256: str = ""
    tokens_sha256: str = ""  # empty in a store of an earlier version, which has no such file


def number_of_parts(num_documents: int) -> int:
    """Return how many parts a corpus has."""
    return -(-num_documents // PART_SIZE)


def documents_in(parts: range, num_documents: int) -> int:
    """Return how many documents consecutive parts have, of a corpus of so many."""
    return min(parts.stop * PART_SIZE, num_documents) - parts.start * PART_SIZE


class Store:
    """A store on disk. Nothing is kept in memory, so several processes may work on one."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def is_there(self) -> bool:
        """Whether the folder is a store, in which there may be no more than locks yet."""
        return (self.path / MANIFEST_LOCK).is_file()

    def settings(self) -> StoreSettings | None:
        """Return what the manifest says the vectors depend on; None if there is no store (yet, or any more)."""
        return self._manifest()[0]

    def parts(self) -> dict[int, Part]:
        """Return the finished parts, by number."""
        settings, parts = self._manifest()
        return {} if settings is None else self._listed(parts)

    def begin(self, settings: StoreSettings) -> None:
        """Write the manifest of a new store, or check that an old one has these settings.

        Another processor is warned of: shards may be on machines of several kinds.

        Raises:
            ValueError: The store has other settings; the first difference is named.
        """
        with _lock(self.path / MANIFEST_LOCK):
            existing = self.settings()
            if existing is None:
                (self.path / PARTS).unlink(missing_ok=True)  # of a store that was forgotten but for it
                text = json.dumps({"settings": asdict(settings)}, indent=1, ensure_ascii=False).encode("utf-8")
                write_whole(self.path / MANIFEST, lambda file: file.write(text))
                return
        ours, theirs = asdict(settings), asdict(existing)
        changed = [field.name for field in fields(settings) if ours[field.name] != theirs[field.name]]
        if changed == ["processor"]:
            logger.warning(
                "%s was begun on %s, this is %s: the last bits of vectors differ between the two",
                *(self.path, existing.processor, settings.processor),
            )
        elif changed:
            name = changed[0]
            ours, theirs = differing(ours[name], theirs[name])
            raise UserError(
                f"{self.path}: its embeddings are of another job: {name} is {theirs} there and {ours} now; "
                "another --output leaves them, --restart discards them"
            )

    def write(
        self, number: int, embeddings: np.ndarray, documents: list[Document], part: Part, tokens: np.ndarray
    ) -> None:
        """Write a part whole: its files, flushed and renamed, then its record in the manifest.

        Args:
            number: Of the part, 0-based.
            embeddings: ``(documents, dimension)`` float32.
            documents: Of the part.
            part: Its record; the hashes of the files are filled in here.
            tokens: A digest of each document's tokens.

        Raises:
            OSError: The disk is full, or the folder cannot be written.
        """
        ids = "".join(f"{document.doc_id}\n" for document in documents).encode("utf-8")
        part = part._replace(
            npy_sha256=self._write(number, "npy", lambda file: np.save(file, embeddings, allow_pickle=False)),
            ids_sha256=self._write(number, "ids", lambda file: file.write(ids)),
            tokens_sha256=self._write(number, "tokens", lambda file: file.write(tokens.tobytes())),
        )
        with _lock(self.path / MANIFEST_LOCK):
            if not (self.path / MANIFEST).is_file():
                raise FileNotFoundError(f"{self.path / MANIFEST}: has gone while a job was at work")
            self._append({"number": number} | part._asdict())

    def read(self, number: int, part: Part) -> tuple[np.ndarray, list[str]]:
        """Return ``(documents, dimension)`` float32 and the ids of a part, checked against its record.

        Raises:
            ValueError: A byte is not what was written, or a file is missing.
        """
        embeddings, ids = (self._read(number, *file) for file in (("npy", part.npy_sha256), ("ids", part.ids_sha256)))
        self._token_digests(number, part)
        embeddings = np.lib.format.read_array(io.BytesIO(embeddings), allow_pickle=False)
        return embeddings, ids.decode("utf-8").split("\n")[:-1]

    def _token_digests(self, number: int, part: Part) -> np.ndarray | None:
        """Return a digest of the tokens of each document of a part, None where an earlier version wrote none."""
        if not part.tokens_sha256:
            return None
        return np.frombuffer(self._read(number, "tokens", part.tokens_sha256), dtype=DIGEST)

    def _read(self, number: int, suffix: str, sha256: str) -> bytes:
        path = self._file(number, suffix)
        if not path.is_file():
            raise UserError(f"{path}: missing, though the manifest lists it; {REMEDY}")
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != sha256:
            raise UserError(f"{path}: damaged, its SHA-256 is not the manifest's; {REMEDY}")
        return content

    def read_all(self) -> Iterator[tuple[np.ndarray, list[str]]]:
        """Yield vectors and ids of every part in order, one part in memory at a time.

        Documents of the same tokens have the vector of the first of them: the model's own differ in their last bits, in
        bf16 in the third digit, where texts are in other batches.
        """
        parts = sorted(self.parts().items())
        tokens = [self._token_digests(*part) for part in parts]
        is_known = all(part_tokens is not None for part_tokens in tokens)
        first = first_of_equal(tokens) if parts and is_known else None
        starts = np.cumsum([0, *(part.num_documents for _, part in parts)])
        for (number, part), start in zip(parts, starts.tolist(), strict=False):
            vectors, ids = self.read(number, part)
            if first is not None:
                first_rows = first[start : start + len(ids)]
                for row in np.unique(first_rows[first_rows < start]):
                    place = int(np.searchsorted(starts, row, side="right")) - 1
                    earlier = np.load(self._file(parts[place][0], "npy"), mmap_mode="r", allow_pickle=False)
                    vectors[first_rows == row] = earlier[row - starts[place]]
                inside = first_rows >= start
                vectors[inside] = vectors[first_rows[inside] - start]
            yield vectors, ids

    def forget_damaged(self, numbers: range) -> None:
        """Forget every part of these that cannot be read as it was written, with a warning for each."""
        for number, part in self.parts().items():
            if number not in numbers:
                continue
            try:
                self.read(number, part)
            except ValueError as error:
                logger.warning("%s: part %d is encoded again", str(error).removesuffix(f"; {REMEDY}"), number)
                with _lock(self.path / MANIFEST_LOCK):
                    self._append({"number": number, "forgotten": True})

    def keep(self) -> None:
        """Mark the store as one that stays when an index is built from it, until ``clear``."""
        (self.path / KEPT).touch()

    def is_kept(self) -> bool:
        """Whether ``keep`` has marked it."""
        return (self.path / KEPT).is_file()

    def clear(self) -> None:
        """Forget the parts and settings; the locks stay."""
        for name in (MANIFEST, PARTS, KEPT):
            (self.path / name).unlink(missing_ok=True)
        for file in self.path.glob("part-*"):
            file.unlink()

    def remove(self) -> None:
        """Delete the store; the manifest goes first, so that a kill half-way leaves nothing that counts."""
        (self.path / MANIFEST).unlink(missing_ok=True)
        os.replace(self.path, self.path.with_name(f".{self.path.name}.{os.getpid()}"))
        for hidden in self.path.parent.glob(f".{escape(self.path.name)}.*"):  # also what a kill right here has left
            shutil.rmtree(hidden, ignore_errors=True)  # NFS keeps files that are open: the locks of jobs at work

    @contextmanager
    def at_work(self, shard: Shard) -> Iterator[None]:
        """Hold the locks of a job on one shard; the folder is made if it is missing.

        Raises:
            OSError: Another job works on this shard, or on another number of shards, or a file in the folder is none
                of a store's.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        if foreign := sorted(file.name for file in self.path.iterdir() if not OWN_FILE.fullmatch(file.name)):
            raise FileExistsError(
                f"{self.path}: {foreign[0]} in it is no file of this program, which needs the folder to itself and "
                "deletes it in the end; move it, or choose another --output"
            )
        with ExitStack() as stack:
            shards = stack.enter_context(open(self.path / "shards.lock", "a+", encoding="utf-8"))
            with _lock(self.path / MANIFEST_LOCK):
                if try_lock(shards, fcntl.LOCK_EX):  # nobody is at work: this job says how many shards there are
                    shards.truncate(0)
                    shards.write(str(shard.count))
                    shards.flush()
                fcntl.flock(shards, fcntl.LOCK_SH)
            shards.seek(0)
            if (count := shards.read()) != str(shard.count):
                raise OSError(f"{self.path}: another job is at work on it, in {count} shards, not {shard.count}")
            own = stack.enter_context(open(self.path / f"shard-{shard.number}.lock", "w", encoding="utf-8"))
            if not try_lock(own, fcntl.LOCK_EX):
                which = f" on shard {shard.number} of {shard.count}" if shard.count > 1 else ""
                raise OSError(f"{self.path}: another job is at work on it{which}; wait for it, or stop it")
            yield

    @contextmanager
    def finishing(self) -> Iterator[bool]:
        """Hold the lock of the job that writes the index, having waited for it; yield whether the store still is."""
        try:
            file = open(self.path / "finish.lock", "w", encoding="utf-8")
        except FileNotFoundError:
            yield False
            return
        with file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield self.path.is_dir()

    def _manifest(self) -> tuple[StoreSettings | None, dict[int, Part]]:
        """Return what the manifest says: the settings, and the parts that an earlier version listed there."""
        path = self.path / MANIFEST
        try:
            record = read_json(path)
        except FileNotFoundError:
            return None, {}
        try:
            parts = {int(number): Part(**part) for number, part in record.get("parts", {}).items()}
            return StoreSettings(**record["settings"]), parts
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"{path}: not a manifest of this version; --restart encodes all anew ({error!r})"
            ) from error

    def _listed(self, parts: dict[int, Part]) -> dict[int, Part]:
        """Return these parts and those that lines list, less those that later lines forget."""
        path, parts = self.path / PARTS, dict(parts)
        content = path.read_bytes() if path.is_file() else b""
        for place, line in enumerate(content.split(b"\n")[:-1], start=1):  # what has no end is not written yet
            try:
                record = json.loads(line)
                number = record.pop("number")
                if record.pop("forgotten", False):
                    parts.pop(number, None)
                else:
                    parts[int(number)] = Part(**record)
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise UserError(
                    f"{path}, line {place}: damaged, or not of this version; --restart encodes all anew ({error!r})"
                ) from error
        return parts

    def _append(self, record: dict[str, object]) -> None:
        append_line(self.path / PARTS, json.dumps(record, ensure_ascii=False))

    def _write(self, number: int, suffix: str, write: Callable[[IO[bytes]], object]) -> str:
        return write_whole(self._file(number, suffix), write)

    def _file(self, number: int, suffix: str) -> Path:
        return self.path / f"part-{number:05}.{suffix}"


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    with open(path, "w", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
