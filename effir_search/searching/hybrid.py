"""A dense search and BM25 as one, their lists fused; and which searcher a command's options ask for."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ir_measures import ScoredDoc

from effir_search.encoding.encoder import DEFAULT_OPTIONS, Encoder
from effir_search.errors import UserError
from effir_search.searching.bm25 import Bm25Searcher, is_bm25
from effir_search.searching.fuse import MissingCounts, fuse_lists
from effir_search.searching.searcher import (
    DEFAULT_SETTINGS,
    HITS,
    HITS_OF_TEXT,
    NO_FEEDBACK,
    Searcher,
    check_hits_and_topics,
    with_text,
)
from effir_search.settings import Bm25Settings, EncoderOptions, FeedbackSettings, HybridSettings, SearchSettings
from effir_search.text.trec import Query

logger = logging.getLogger(__name__)

DEFAULT_HYBRID = HybridSettings()


@dataclass(frozen=True)
class Ranking:
    """What ranks documents besides the products of vectors.

    Attributes:
        feedback: Whether queries are searched a second time, with what they found.
        bm25_index: Folder of a BM25 index whose lists are fused with the dense ones; None = none.
        bm25: How BM25 weighs words.
        hybrid: How the lists are fused.
    """

    feedback: FeedbackSettings = NO_FEEDBACK
    bm25_index: Path | None = None
    bm25: Bm25Settings = Bm25Settings()
    hybrid: HybridSettings = DEFAULT_HYBRID


PLAIN = Ranking()


class HybridSearcher:
    """A dense searcher and BM25's over the same documents; it has the methods of ``searcher.Searcher``.

    Attributes:
        dense: The one; it gives ``depth`` hits.
        bm25: The other, likewise.
        settings: Of the fused lists.
        hybrid: How they are fused.
        folders: Of the dense indexes and of BM25's.
        infos: The records of the dense indexes.
    """

    def __init__(
        self,
        dense: Searcher,
        bm25: Bm25Searcher,
        settings: SearchSettings = DEFAULT_SETTINGS,
        hybrid: HybridSettings = DEFAULT_HYBRID,
    ) -> None:
        """Join two searchers.

        Args:
            dense: Its number of hits is the depth of the dense list.
            bm25: Likewise.
            settings: Hits, and whether a query's own document is left out, which both must do too.
            hybrid: How the lists are fused.

        Raises:
            ValueError: The indexes were built from different corpora.
        """
        self.dense, self.bm25, self.settings, self.hybrid = dense, bm25, settings, hybrid
        self.folders, self.infos = [*dense.folders, *bm25.folders], dense.infos
        _check_same_corpus(dense, bm25)

    def with_settings(self, hybrid: HybridSettings) -> "HybridSearcher":
        """Return a searcher of the same indexes that fuses otherwise; their depth stays."""
        return HybridSearcher(self.dense, self.bm25, self.settings, hybrid)

    def search(self, topics: Sequence[Query]) -> Iterator[ScoredDoc]:
        """Return the fused hits of each topic, in the order of the topics, best first, with decreasing scores.

        Raises:
            ValueError: No topic with a text, fewer hits than one; once hits are asked for, a score that a sound index
                does not give.
        """
        return self._fused(self.lists(topics), self.settings.with_defaults(hits=HITS).hits)

    def search_text(self, text: str, hits: int | None = None) -> list[ScoredDoc]:
        """Return the best hits of one text; None = as many as the settings say, or 10."""
        settings = replace(self.settings, hits=self.settings.hits if hits is None else hits)
        depth = self.hybrid.depth
        lists = [(self.dense.search_text(text, depth), self.bm25.search_text(text, depth))]
        return list(self._fused(lists, settings.with_defaults(hits=HITS_OF_TEXT).hits))

    def lists(self, topics: Sequence[Query]) -> Iterator[tuple[list[ScoredDoc], list[ScoredDoc]]]:
        """Return the dense hits and BM25's of each topic that has a text, in their order; a list may be empty."""
        check_hits_and_topics(self.hybrid.depth, topics)
        topics = with_text(topics)
        searches = [self.dense.search(topics), self.bm25.search(topics)]
        return zip(*(_by_topic(topics, hits) for hits in searches), strict=True)

    def _fused(self, lists: Iterable[tuple[list[ScoredDoc], list[ScoredDoc]]], num_hits: int) -> Iterator[ScoredDoc]:
        if num_hits < 1:
            raise UserError(f"--hits {num_hits}: must be at least 1")
        counts = MissingCounts()
        for pair in lists:
            if any(pair):
                yield from fuse_lists(pair, **fusion_of(self.hybrid), counts=counts)[:num_hits]
        counts.say(["the dense list", "the BM25 list"], self.hybrid.fusion, self.hybrid)


def fusion_of(hybrid: HybridSettings) -> dict[str, object]:
    """Return the arguments of ``fuse_lists`` for a dense list and BM25's."""
    weight = 0.5 if hybrid.weight is None else hybrid.weight
    weights = (1.0, 1.0) if hybrid.fusion == "rrf" else (weight, 1 - weight)
    return {"method": hybrid.fusion, "weights": weights, "settings": hybrid}


def _by_topic(topics: Sequence[Query], hits: Iterable[ScoredDoc]) -> Iterator[list[ScoredDoc]]:
    """Yield the hits of each topic, from hits in the order of the topics; of a topic without any, none."""
    hits = iter(hits)
    following = next(hits, None)
    for query in topics:
        of_topic = []
        while following is not None and following.query_id == query.query_id:
            of_topic.append(following)
            following = next(hits, None)
        yield of_topic


def _check_same_corpus(dense: Searcher, bm25: Bm25Searcher) -> None:
    """Raise ValueError if the records tell that the indexes hold different documents."""
    (sparse,), known = bm25.infos, [info for info in dense.infos if info is not None]
    if sparse is None or len(known) < len(dense.infos):
        return
    num_documents = sum(info.num_documents for info in known)
    same = known[0].corpus_sha256 == sparse.corpus_sha256 if len(known) == 1 else num_documents == sparse.num_documents
    if not same:
        raise UserError(
            f"{dense.folders[0]} and {bm25.folders[0]} were not built from the same documents ({num_documents} and "
            f"{sparse.num_documents}); index the corpus of one for the other"
        )


def open_index(
    index_dir: Path | Sequence[Path],
    encoder: Encoder | str | None = None,
    settings: SearchSettings = DEFAULT_SETTINGS,
    options: EncoderOptions = DEFAULT_OPTIONS,
    ranking: Ranking = PLAIN,
) -> Searcher | Bm25Searcher | HybridSearcher:
    """Return the searcher that is asked for: dense, BM25's for a folder of BM25, or both as one.

    Args:
        index_dir: As ``Searcher`` takes it, or one folder of a BM25 index.
        encoder: As ``Searcher`` takes it.
        settings: How indexes are searched.
        options: As ``Searcher`` takes them.
        ranking: What ranks documents besides the vectors.

    Raises:
        ValueError: A damaged index, another encoder, settings that do not go together.
        OSError: A file cannot be read.
    """
    folders = [index_dir] if isinstance(index_dir, Path) else list(index_dir)
    if sparse := [folder for folder in folders if is_bm25(folder)]:
        _check_only_bm25(sparse, folders, encoder, ranking)
        return Bm25Searcher(sparse[0], settings, ranking.bm25)
    if ranking.bm25_index is None:
        return Searcher(folders, encoder, settings, options, ranking.feedback)
    of_list = replace(settings, hits=ranking.hybrid.depth)
    bm25 = Bm25Searcher(ranking.bm25_index, replace(of_list, ef_search=None, nprobe=None), ranking.bm25)
    dense = Searcher(folders, encoder, of_list, options, ranking.feedback)
    return HybridSearcher(dense, bm25, settings, ranking.hybrid)


def _check_only_bm25(
    sparse: Sequence[Path], folders: Sequence[Path], encoder: Encoder | str | None, ranking: Ranking
) -> None:
    """Raise ValueError if a BM25 index is asked for what it cannot do."""
    if len(folders) > 1:
        raise UserError(
            f"{sparse[0]} is a BM25 index, whose scores no others compare with; "
            "search it alone, or beside a dense one as --bm25"
        )
    if ranking.bm25_index is not None:
        raise UserError(f"{sparse[0]} is a BM25 index itself; --index takes the dense one, --bm25 this")
    if encoder is not None:
        raise UserError(f"{sparse[0]} is a BM25 index, which has no encoder; leave --encoder out")
    if ranking.feedback.prf is not None:
        raise UserError(f"{sparse[0]} is a BM25 index; --prf needs vectors")
