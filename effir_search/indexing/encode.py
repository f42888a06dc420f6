"""A corpus into the parts of a store: what is read, tokenized ahead in a thread, and encoded."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from effir_search.encoding.batching import Tokens
from effir_search.encoding.encoder import Encoder
from effir_search.errors import UserError
from effir_search.indexing.copies import digests
from effir_search.indexing.read_ahead import read_ahead
from effir_search.indexing.resume import PART_SIZE
from effir_search.indexing.shard import WHOLE, Shard
from effir_search.indexing.store import Part, Store, documents_in, number_of_parts
from effir_search.text.corpus import CorpusHasher, Document, document_text, documents_sha256

logger = logging.getLogger(__name__)


def in_parts(documents: Iterable[Document], part_size: int = PART_SIZE) -> Iterator[list[Document]]:
    """Yield consecutive documents in lists of ``part_size``; the last may be shorter."""
    iterator = iter(documents)
    while part := list(islice(iterator, part_size)):
        yield part


class PreparedPart(NamedTuple):
    """A part that is yet to be encoded: its number, documents, and tokens, and its record but for the hashes."""

    number: int
    documents: list[Document]
    record: Part
    tokens: Tokens


class CorpusRead(NamedTuple):
    """What is known of a corpus once all of it was read."""

    num_parts: int
    sha256: str


def encode_corpus(
    documents: Iterable[Document],
    encoder: Encoder,
    store: Store,
    *,
    shard: Shard = WHOLE,
    num_documents: int | None = None,
) -> CorpusRead:
    """Encode the documents of a shard that the store lacks; return the number of all parts and the corpus' hash.

    A thread reads and tokenizes the next parts while the model works on one.

    Args:
        documents: The whole corpus, in order, whatever the shard.
        encoder: Turns documents into vectors.
        store: Of this corpus and encoder, with the locks held.
        shard: The block of parts that is this job's.
        num_documents: Of the whole corpus; needed if there is more than one shard.

    Raises:
        ValueError: A repeated id, a vector that is not finite, or a finished part that is of other documents.
        OSError: The disk is full, or a file cannot be read.
    """
    if shard.count > 1 and num_documents is None:
        raise UserError("shards need the number of all documents")
    finished = store.parts()
    numbers = None if num_documents is None else shard.parts(number_of_parts(num_documents))
    num_reused = sum(part.num_documents for number, part in finished.items() if numbers is None or number in numbers)
    if num_reused:
        logger.info("continuing: %d documents are encoded already", num_reused)
    total = num_documents if numbers is None else documents_in(numbers, num_documents)
    steps = read_ahead(_prepare(documents, encoder, store, finished, numbers))
    with tqdm(
        total=total, initial=num_reused, desc="Encoding", unit=" documents", disable=None, smoothing=0.1
    ) as progress:
        for step in steps:
            if isinstance(step, PreparedPart):
                _encode_part(step, encoder, store, done=progress.update)
            elif step is not None:
                corpus = step
    if extra := [number for number in finished if number >= corpus.num_parts]:
        raise UserError(f"{store.path}: part {extra[0]} is beyond the corpus; --restart discards it")
    return corpus


def _prepare(
    documents: Iterable[Document],
    encoder: Encoder,
    store: Store,
    finished: Mapping[int, Part],
    numbers: range | None,
) -> Iterator[PreparedPart | CorpusRead | None]:
    """Yield each part: prepared, or None if it is finished or another shard's; at the end what the corpus is.

    None is yielded so that a thread which runs this notices an end while it reads parts that nobody waits for.

    Args:
        documents: The whole corpus, in order.
        encoder: Tokenizes it.
        store: Named in errors.
        finished: The store's parts.
        numbers: Of this job's parts; None = all.
    """
    hasher, doc_ids, num_parts = CorpusHasher(), set(), 0
    for number, part in enumerate(in_parts(documents)):
        num_parts += 1
        for document in part:
            if document.doc_id in doc_ids:
                raise UserError(f'repeated document id "{document.doc_id}"')
            doc_ids.add(document.doc_id)
            hasher.add(document)
        if numbers is not None and number not in numbers:
            yield None
            continue
        sha256 = documents_sha256(part)
        if number not in finished:
            yield _tokenize(number, part, sha256, encoder)
        elif finished[number].documents_sha256 == sha256:
            yield None
        else:
            raise UserError(
                f"{store.path}: part {number} is of other documents than the corpus has now; --restart discards it"
            )
    yield CorpusRead(num_parts, hasher.hexdigest())


def _tokenize(number: int, documents: list[Document], sha256: str, encoder: Encoder) -> PreparedPart:
    texts = [document_text(document) for document in documents]
    tokens = encoder.tokenize(texts, prompt=encoder.config.document_prompt)
    record = Part(len(documents), texts.count(""), tokens.num_truncated, sha256)
    return PreparedPart(number, documents, record, tokens)


def _encode_part(part: PreparedPart, encoder: Encoder, store: Store, *, done: Callable[[int], object]) -> None:
    embeddings = encoder.encode_tokens(part.tokens, done=done).embeddings
    token_digests = digests(np.array(ids) for ids in part.tokens.input_ids)
    store.write(part.number, embeddings, part.documents, part.record, token_digests)
