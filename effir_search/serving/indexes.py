"""The indexes that are served: opened once, replaced when their folders are; encoders and texts are shared."""

import logging
import re
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from effir_search.encoding.encoder import Encoder
from effir_search.errors import UserError
from effir_search.indexing.index_record import (
    DOCID_FILE,
    INDEX_FILE,
    INFO_FILE,
    IndexInfo,
    absolute_name,
    read_index_info,
    require_index,
)
from effir_search.searching.searcher import Searcher, load_encoder
from effir_search.serving.texts import Texts, corpus_signature
from effir_search.settings import EncoderOptions, SearchSettings
from effir_search.text.corpus import DEFAULT_FIELDS, CorpusFields, Document

logger = logging.getLogger(__name__)

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
# Paths of Pyserini 1.6 begin with it.
RESERVED = ("indexes",)


@dataclass(frozen=True)
class ServedIndex:
    """An index as it is at the moment; a request keeps the one that it began with.

    Attributes:
        name: In paths and answers.
        folder: Its folder.
        searcher: Over the folder.
        texts: Where its documents are; the first that has an id counts.
        signature: Of its files, see ``signature``.
        num_bytes: Of all its files.
    """

    name: str
    folder: Path
    searcher: Searcher
    texts: tuple[Texts, ...]
    signature: tuple
    num_bytes: int

    @property
    def info(self) -> IndexInfo | None:
        """What its record says."""
        return self.searcher.infos[0]

    @property
    def num_documents(self) -> int:
        """Documents that it holds."""
        return self.searcher.num_documents

    def documents(self, doc_ids: Iterable[str]) -> dict[str, Document]:
        """Return the documents of these ids, as far as there are texts of them."""
        missing, found = list(doc_ids), {}
        for texts in self.texts:
            found |= texts.find(missing)
            missing = [doc_id for doc_id in missing if doc_id not in found]
        return found


def named_folders(arguments: Sequence[str]) -> dict[str, Path]:
    """Return index folders by name, from arguments that are ``DIR`` or ``NAME=DIR``; a folder's name is its own.

    Raises:
        ValueError: A name that is used twice, or none that can stand in a path.
    """
    folders: dict[str, Path] = {}
    for argument in arguments:
        name, equals, rest = argument.partition("=")
        is_named = equals and NAME.fullmatch(name) and not Path(argument).exists()
        folder = Path(rest if is_named else argument)
        name = name if is_named else folder.absolute().name
        if not NAME.fullmatch(name) or name in RESERVED:
            raise UserError(f"--index {argument}: {name!r} is no name for a path; give one: --index docs={folder}")
        if name in folders:
            raise UserError(f"--index {argument}: another index is called {name}; name one, as in --index {name}-2=DIR")
        folders[name] = folder
    return folders


def signature(folder: Path) -> tuple:
    """Return what changes when an index is replaced.

    Raises:
        OSError: A file of it is missing.
    """
    names = [INDEX_FILE, DOCID_FILE, *([INFO_FILE] if (folder / INFO_FILE).exists() else [])]
    stats = [(folder / name).stat() for name in names]
    return tuple((stat.st_ino, stat.st_mtime_ns, stat.st_size) for stat in stats)


class Indexes:
    """The indexes by name.

    Attributes:
        by_name: Never changed in place but replaced as a whole, so that it can be read at any time.
        num_reloads: Indexes that were replaced since the start.
    """

    def __init__(
        self,
        folders: Mapping[str, Path],
        *,
        corpora: Sequence[str],
        encoder: str | None,
        settings: SearchSettings,
        options: EncoderOptions,
    ) -> None:
        """Open indexes.

        Args:
            folders: By name, at least one.
            corpora: Where the texts are; none = in the corpora that the indexes name, as far as these are there.
            encoder: Model folder or hub name for all of them; None = each index's own.
            settings: How they are searched.
            options: How encoders are loaded.

        Raises:
            ValueError: What ``Searcher`` and ``Texts`` raise.
            OSError: A file cannot be read.
        """
        self._corpora, self._encoder, self._settings, self._options = corpora, encoder, settings, options
        self._encoders: dict[tuple, Encoder] = {}
        self._texts: dict[tuple, Texts] = {}
        self._turn = threading.Lock()
        self.num_reloads = 0
        self.by_name: dict[str, ServedIndex] = {}
        for folder in folders.values():
            require_index(folder)
        self._infos = {folder: read_index_info(folder) for folder in folders.values()}
        for name, folder in folders.items():
            self.by_name[name] = self._open(name, folder)
        self._forget_unused()

    def _open(self, name: str, folder: Path) -> ServedIndex:
        before = signature(folder)
        info = self._infos[folder] = read_index_info(folder)
        texts = tuple(self._texts_of(source, fields, info) for source, fields in self._sources_of(folder, info).items())
        searcher = Searcher(folder, self._encoder_of(folder, info), self._settings)
        num_bytes = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
        if signature(folder) != before:  # so what was read may be of two indexes
            raise UserError(f"{folder}: was replaced while it was opened")
        # Of corpora that have moved, that of this index is known by its hash: ids of others may be the same.
        own = tuple(one for one in texts if info is not None and one.sha256 == info.corpus_sha256)
        return ServedIndex(name, folder, searcher, own or texts, before, num_bytes)

    def _encoder_of(self, folder: Path, info: IndexInfo | None) -> Encoder:
        """Return the encoder of an index, the one of another if it is the same: a model is in memory once."""
        if info is None:
            key = (self._encoder,)
        else:
            arithmetic = (info.dtype, info.backend, info.stock_architecture)
            key = (self._encoder or info.model, info.model_sha256, *arithmetic, replace(info.encoder, dimension=None))
        if key not in self._encoders:
            self._encoders[key] = load_encoder(folder, self._encoder, self._options)
        encoder = self._encoders[key]
        if info is not None and encoder.config.dimension != info.encoder.dimension:
            key = (*key, info.encoder.dimension)
            self._encoders.setdefault(key, encoder.with_config(dimension=info.encoder.dimension))
        return self._encoders[key]

    def _sources_of(self, folder: Path, info: IndexInfo | None) -> dict[str, CorpusFields]:
        """Return the corpora of an index, with the fields that are read.

        Of several corpora the one that an index names is its own; those that no index names are everybody else's.
        """
        fields = CorpusFields(info.corpus_fields, info.corpus_id_field) if info else DEFAULT_FIELDS
        own = info.corpus if info else None
        if not self._corpora:
            if own is not None and Path(own).is_absolute() and Path(own).exists():
                return {own: fields}
            logger.warning("%s: its corpus is not there, so its hits have no texts; give it as --corpus", folder)
            return {}
        if own is not None and own in map(absolute_name, self._corpora):
            return {own: fields}
        named = {known.corpus for known in self._infos.values() if known is not None}
        return {corpus: fields for corpus in self._corpora if absolute_name(corpus) not in named}

    def _texts_of(self, source: str, fields: CorpusFields, info: IndexInfo | None) -> Texts:
        key = (corpus_signature(source), repr(fields))
        if key not in self._texts:
            self._texts[key] = Texts(source, fields)
        if info is not None and info.corpus_sha256 != self._texts[key].sha256 and info.corpus == absolute_name(source):
            logger.warning("%s has changed since it was indexed, so texts may be other ones than were searched", source)
        return self._texts[key]

    def reload(self, *, all_of_them: bool = False) -> list[str]:
        """Open again those indexes whose folders were replaced; return their names.

        A folder that is not there, or is damaged, is passed over, with a warning; the index stays as it was.

        Args:
            all_of_them: Also those whose files are as they were.
        """
        with self._turn:
            replaced = {}
            for name, index in self.by_name.items():
                try:
                    if all_of_them or signature(index.folder) != index.signature:
                        replaced[name] = self._open(name, index.folder)
                except (UserError, OSError) as error:
                    logger.warning("%s stays as it was: %s", name, error)
            if replaced:
                self.by_name = {**self.by_name, **replaced}
                self.num_reloads += len(replaced)
                self._forget_unused()
            return list(replaced)

    def _forget_unused(self) -> None:
        """Let go of encoders and texts that no index has any more."""
        encoders = {id(index.searcher.encoder.model) for index in self.by_name.values()}
        texts = {id(one) for index in self.by_name.values() for one in index.texts}
        self._encoders = {key: one for key, one in self._encoders.items() if id(one.model) in encoders}
        self._texts = {key: one for key, one in self._texts.items() if id(one) in texts}
