"""Queries that stand in the corpus as documents of their own id, as in ArguAna: each of them finds itself first."""

import logging
from collections.abc import Mapping, Sequence

from effir_search.text.corpus import Document, document_text
from effir_search.text.trec import Query

logger = logging.getLogger(__name__)


def comparable(text: str) -> str:
    """Return a text without differences in case and white space."""
    return " ".join(text.casefold().split())


def has_text(document: Document, text: str) -> bool:
    """Return whether a document says this, with its title or without; case and white space do not count."""
    return comparable(text) in (comparable(document_text(document)), comparable(document.text))


def check_own_documents(
    where: str, queries: Sequence[Query], documents: Mapping[str, Document], *, remove_query: bool, option: str
) -> None:
    """Warn of queries that are documents of their own id and stay; or of other documents that go for their id.

    Args:
        where: Opens the warning.
        queries: What is searched for.
        documents: By id; those that have a query's id are looked at.
        remove_query: Whether the document whose id is the query's is left out.
        option: What leaves it out.
    """
    own = [(query, documents[query.query_id]) for query in queries if query.query_id in documents]
    num_same = sum(has_text(document, query.text) for query, document in own)
    if num_same and not remove_query:
        warn_of_own_documents(where, num_same, len(queries), option)
    if len(own) > num_same and remove_query:
        logger.warning(
            "%s: %s leaves out %d documents that have the id of a query and another text; without it they are found",
            *(where, option, len(own) - num_same),
        )


def warn_of_own_documents(where: str, number: int, num_queries: int, option: str) -> None:
    """Warn of so many queries that find themselves."""
    logger.warning(
        "%s: %d of %d queries stand in the corpus with their id and text, and find themselves before what is relevant; "
        "%s leaves the document with the query's id out",
        *(where, number, num_queries, option),
    )
