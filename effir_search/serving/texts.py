"""The documents of a corpus by id, in a database on the disk: memory does not grow with the corpus."""

import logging
import sqlite3
import threading
from collections.abc import Iterable
from pathlib import Path

from effir_search.text.corpus import IR_DATASETS, CorpusFields, CorpusHasher, Document, read_corpus
from effir_search.text.folders import corpus_files

logger = logging.getLogger(__name__)

# Pages that SQLite keeps in memory, in KiB: while it is filled, and afterwards.
FILLING, READING = 65_536, 8_192


class Texts:
    """A corpus, read once into a temporary database that vanishes with the process.

    SQLite puts it where TMPDIR says. Threads may ask at once.

    Attributes:
        sha256: Of ids and texts, see ``corpus.CorpusHasher``.
    """

    def __init__(self, source: str | Path, fields: CorpusFields) -> None:
        """Read a corpus.

        Args:
            source: As ``read_corpus`` takes it; bad lines are passed over, as they may be in an index.
            fields: JSON fields that are read.

        Raises:
            ValueError: A file that is no text.
            OSError: A file cannot be read, or there is no room for the texts.
        """
        # An empty name is a database on the disk whose file is deleted as soon as it is open.
        self._database = sqlite3.connect("", check_same_thread=False, isolation_level=None)
        self._turn = threading.Lock()
        self._run(f"PRAGMA cache_size = -{FILLING}")
        self._run("PRAGMA journal_mode = OFF")
        self._run("CREATE TABLE documents (doc_id TEXT PRIMARY KEY, title TEXT, text TEXT)")
        hasher, bad_lines = CorpusHasher(), []
        documents = read_corpus(source, fields=fields.texts, id_field=fields.id, on_bad_line=bad_lines.append)
        self._run("BEGIN")
        for document in documents:
            hasher.add(document)
            self._run("INSERT INTO documents VALUES (?, ?, ?)", document.doc_id, document.title, document.text)
        self._run("COMMIT")
        self._run(f"PRAGMA cache_size = -{READING}")
        self.sha256 = hasher.hexdigest()
        logger.info("%s: the texts of %d documents", source, hasher.num_documents)

    def _run(self, statement: str, *values: str) -> list[tuple]:
        try:
            with self._turn:
                return self._database.execute(statement, values).fetchall()
        except sqlite3.Error as error:
            raise OSError(f"texts cannot be kept in a file where TMPDIR says ({error})") from error

    def find(self, doc_ids: Iterable[str]) -> dict[str, Document]:
        """Return the documents of these ids, as far as the corpus has them."""
        found = {}
        for doc_id in doc_ids:
            for title, text in self._run("SELECT title, text FROM documents WHERE doc_id = ?", doc_id):
                found[doc_id] = Document(doc_id, text, title)
        return found


def corpus_signature(source: str | Path) -> tuple:
    """Return what changes when the files of a corpus do."""
    if str(source).startswith(IR_DATASETS):
        return (str(source),)
    stats = [(path, path.stat()) for path in corpus_files(Path(source))]
    return tuple((str(path), stat.st_ino, stat.st_mtime_ns, stat.st_size) for path, stat in stats)
