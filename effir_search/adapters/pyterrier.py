"""PyTerrier: an index as a retriever, in pipelines and experiments; its vectors as a FlexIndex."""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pyterrier as pt
from ir_measures import ScoredDoc

from effir_search.encoding.encoder import DEFAULT_OPTIONS, Encoder
from effir_search.export.flex_index import to_flex_index
from effir_search.searching.searcher import DEFAULT_SETTINGS, HITS, Searcher
from effir_search.settings import EncoderOptions, SearchSettings
from effir_search.text.trec import Query

__all__ = ["EffirRetriever", "to_flex_index"]


class EffirRetriever(pt.Transformer):
    """Retrieves from an index, or from several as if they were one: queries in, ranked documents out.

    Attributes:
        searcher: What searches; its ``encoder`` may be shared with an ``EffirBiEncoder``.
        num_results: Hits a query, at most.
    """

    def __init__(
        self,
        index_dir: str | Path | Sequence[str | Path],
        encoder: Encoder | str | None = None,
        *,
        num_results: int = HITS,
        settings: SearchSettings = DEFAULT_SETTINGS,
        options: EncoderOptions = DEFAULT_OPTIONS,
    ) -> None:
        """Open indexes.

        Args:
            index_dir: A folder that ``effir index`` or Pyserini wrote; or several.
            encoder: The encoder they were built with, or a student of it; or its folder or hub name; None = the one the
                first index names.
            num_results: Hits a query.
            settings: How they are searched; its ``hits`` is not looked at.
            options: How an encoder is loaded that is not there yet; what is None is as the first index was built.

        Raises:
            ValueError: A damaged index, another encoder, a parameter of another kind of index.
            OSError: A file cannot be read.
        """
        super().__init__()
        folders = [Path(index_dir)] if isinstance(index_dir, str | Path) else list(map(Path, index_dir))
        self.num_results = num_results
        self._remove_query = settings.remove_query
        # Its queries are numbers of rows, so what has the id of a query is left out here, and one hit more is needed.
        settings = replace(settings, hits=num_results + self._remove_query, remove_query=False)
        self.searcher = Searcher(folders, encoder, settings, options)

    def transform(self, inp: pd.DataFrame) -> pd.DataFrame:
        """Return the hits of each query, best first, with the columns docno, score and rank, which counts from 0.

        Scores are those of a run: strictly decreasing. A query without a text gets no hits.

        Args:
            inp: Columns qid and query; others that describe the query are handed on. Of hits the queries are
                taken.

        Raises:
            pyterrier.validate.InputValidationError: A column is missing.
        """
        pt.validate.columns(inp, includes=["qid", "query"], context=self)
        of_query = set(pt.model.query_columns(inp))
        queries = inp[[name for name in inp.columns if name in of_query]].drop_duplicates(["qid", "query"])
        # Rows are told apart by their number: a frame may have ids that are no text, or one id twice.
        topics = [Query(str(row), text) for row, text in enumerate(queries["query"])]
        hits = list(self.searcher.search(topics)) if any(query.text.strip() for query in topics) else []
        if self._remove_query:
            hits = self._without_own(hits, [str(query_id) for query_id in queries["qid"]])
        rows = [int(hit.query_id) for hit in hits]
        found = queries.iloc[rows].reset_index(drop=True)
        found["docno"] = pd.Series([hit.doc_id for hit in hits], dtype=object)
        found["score"] = pd.Series([hit.score for hit in hits], dtype=float)
        found["rank"] = pd.Series(rows, dtype=int).groupby(rows).cumcount() if rows else pd.Series(dtype=int)
        return found

    def _without_own(self, hits: Iterable[ScoredDoc], query_ids: Sequence[str]) -> list[ScoredDoc]:
        """Return the hits without those whose document has the id of the query."""
        others = (hit for hit in hits if hit.doc_id != query_ids[int(hit.query_id)])
        by_query = itertools.groupby(others, key=lambda hit: hit.query_id)
        return [hit for _, of_query in by_query for hit in itertools.islice(of_query, self.num_results)]

    def __repr__(self) -> str:
        folders = [str(folder) for folder in self.searcher.folders]
        return f"EffirRetriever({folders if len(folders) > 1 else folders[0]!r}, num_results={self.num_results})"
