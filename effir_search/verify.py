"""Is an index what it says it is? Counts, hashes, a sample encoded again, and found."""

from pathlib import Path
from typing import NamedTuple

import faiss
import numpy as np

from effir_search.corpus import CorpusHasher, Document, document_text, read_corpus
from effir_search.encoder import Encoder
from effir_search.index import (
    INFO_FILE,
    IndexInfo,
    check_encoder,
    check_files,
    read_index,
    read_index_info,
    require_index,
    scale,
)


class Verification(NamedTuple):
    """What ``verify_index`` measured on its sample."""

    num_documents: int
    num_sampled: int
    lowest_cosine: float


def verify_index(
    index_dir: Path, encoder: Encoder, *, corpus: str | Path | None = None, num_sampled: int = 64, seed: int = 0
) -> Verification:
    """Check counts and hashes of a folder, encode a sample of its documents again, and find them by their own vectors.

    Args:
        index_dir: A folder that ``build_index`` wrote.
        encoder: The encoder it was built with.
        corpus: Where the documents are; the default is where they were.
        num_sampled: How many documents are encoded again.
        seed: Of the sample.

    Raises:
        ValueError: The first thing that is not as it should be.
        OSError: A file cannot be read.
    """
    require_index(index_dir)
    info = read_index_info(index_dir)
    if info is None:
        raise ValueError(f"{index_dir}: no {INFO_FILE} in it, so there is nothing to verify it against")
    check_files(index_dir, info)
    index, doc_ids = read_index(index_dir)
    if (index.ntotal, index.d) != (info.num_documents, info.dimension):
        raise ValueError(
            f"{index_dir}: {index.ntotal} vectors of {index.d}, not {info.num_documents} of {info.dimension}"
        )
    check_encoder(info, encoder, index_dir)
    source = corpus or info.corpus
    if source is None:
        raise ValueError(
            f"{index_dir}: the documents came from a program; give --corpus to encode a sample of them again"
        )

    rows = np.sort(np.random.default_rng(seed).choice(len(doc_ids), min(num_sampled, len(doc_ids)), replace=False))
    try:
        documents = _rows_of_corpus(source, info, rows, doc_ids)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{index_dir}: counts and hashes are right, but no document could be encoded again: {error}; give the "
            "corpus that the index was built from as --corpus"
        ) from error
    encoded = encoder.encode([document_text(d) for d in documents], prompt=encoder.config.document_prompt)
    again = scale(encoded.embeddings, encoder.config)
    lists = faiss.try_extract_index_ivf(index)
    if lists is not None:
        lists.make_direct_map()
        lists.nprobe = lists.nlist
    stored = np.stack([index.reconstruct(int(row)) for row in rows])
    cosines = cosine(again, stored)
    if "PQ" not in info.kind and cosines.min() < 0.999:  # product quantisation keeps no more than a sketch
        row = int(cosines.argmin())
        raise ValueError(
            f'{index_dir}: document "{documents[row].doc_id}" encoded again has cosine {cosines[row]:.4f} '
            "to its stored vector, below 0.999"
        )
    # An approximate kind may put near neighbours, whose codes are alike, before the document itself.
    scores, found = index.search(stored, 1 if info.kind == "Flat" else min(100, index.ntotal))
    own = np.einsum("nd,nd->n", stored, stored)
    for row, score, hits, self_score in zip(rows, scores[:, 0], found, own, strict=True):
        # With unnormalised vectors a longer one may rightly score above the document itself.
        if row not in hits and score < self_score * (1 - 1e-5):
            raise ValueError(f'{index_dir}: document "{doc_ids[row]}" is not found by its own vector')
    return Verification(index.ntotal, len(rows), float(cosines.min()))


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the cosine of each pair of rows of two ``(n, dimension)`` arrays; two zero vectors have cosine 1."""
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    same = np.where((a == b).all(axis=1), 1.0, 0.0)
    return np.where(lengths > 0, np.einsum("nd,nd->n", a, b) / np.where(lengths > 0, lengths, 1), same)


def _rows_of_corpus(source: str | Path, info: IndexInfo, rows: np.ndarray, doc_ids: list[str]) -> list[Document]:
    """Return the documents of these rows, having checked that ids and texts are those the index was built from."""
    wanted, hasher, documents = set(rows.tolist()), CorpusHasher(), []
    skip = (lambda _complaint: None) if info.num_skipped else None
    read = read_corpus(source, fields=info.corpus_fields, id_field=info.corpus_id_field, on_bad_line=skip)
    for row, document in enumerate(read):
        if row >= len(doc_ids) or document.doc_id != doc_ids[row]:
            raise ValueError(
                f'{source}: document {row + 1}, "{document.doc_id}", is not the one the index has in that row'
            )
        hasher.add(document)
        if row in wanted:
            documents.append(document)
    if hasher.hexdigest() != info.corpus_sha256:
        raise ValueError(f"{source}: its documents are not those the index was built from (SHA-256 differs)")
    return documents
