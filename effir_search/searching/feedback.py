"""Vector pseudo-relevance feedback: a query's vector moved towards those of its first hits, as Pyserini moves it."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import faiss
import numpy as np

from effir_search.errors import UserError
from effir_search.indexing.faiss_kinds import innermost
from effir_search.settings import FeedbackSettings


class DocumentVectors:
    """The vectors of an index by document id, as the index gives them back: those of Flat exactly, others rounded."""

    def __init__(
        self, folder: Path, index: faiss.Index, doc_ids: Sequence[str], copies: Mapping[int, Sequence[str]]
    ) -> None:
        """Look whether an index gives vectors back.

        Args:
            folder: Of the index, for the message.
            index: Of any kind.
            doc_ids: Of its rows.
            copies: Ids of documents that have the vector of a row, by row.

        Raises:
            ValueError: It does not.
        """
        self._index = index
        self._rows = {doc_id: row for row, doc_id in enumerate(doc_ids)}
        self._rows |= {doc_id: row for row, others in copies.items() for doc_id in others}
        inner = innermost(index)
        try:
            if isinstance(inner, faiss.IndexIVF):
                inner.make_direct_map()  # where in the lists each row is
            if index.ntotal:
                index.reconstruct(0)
        except RuntimeError as error:
            raise UserError(
                f"{folder}: --prf needs the vectors of the hits, and {type(faiss.downcast_index(index)).__name__} does "
                "not give vectors back; search an index of another kind, such as Flat, or without --prf"
            ) from error

    def of(self, doc_id: str) -> np.ndarray:
        """Return the vector of a document of the index, ``(dimension,)`` float32."""
        return self._index.reconstruct(self._rows[doc_id])


def fed_back(query: np.ndarray, hits: np.ndarray, settings: FeedbackSettings) -> np.ndarray:
    """Return a query's vector moved towards those of its first hits, ``(dimension,)`` float32.

    As Pyserini's classes do it, the vector is not given its length again. Scores are products with it, so they are no
    cosines; their order does not depend on its length.

    Args:
        query: ``(dimension,)``.
        hits: ``(hits, dimension)``, best first; without any the query stays as it is.
        settings: How.

    Source: ``pyserini/search/faiss/_prf.py`` (DenseVectorAveragePrf, DenseVectorRocchioPrf); Li et al., Pseudo
        Relevance Feedback with Deep Language Models and Dense Retrievers (arXiv 2108.11044).
    """
    if len(hits) == 0:
        return query
    if settings.prf == "average":
        return np.vstack([query, hits]).mean(axis=0, dtype=np.float64).astype(np.float32)
    vector = settings.rocchio_alpha * query.astype(np.float64)
    vector += settings.rocchio_beta * hits[: settings.rocchio_topk].mean(axis=0, dtype=np.float64)
    if settings.rocchio_bottomk:
        vector -= settings.rocchio_gamma * hits[-settings.rocchio_bottomk :].mean(axis=0, dtype=np.float64)
    return vector.astype(np.float32)
