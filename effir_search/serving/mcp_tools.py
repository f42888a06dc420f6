"""The tools that agents call by MCP; they and their arguments are named as Pyserini's."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ir_measures import ScoredDoc
from mcp.server import MCPServer
from mcp.server.mcpserver.exceptions import ToolError

from effir_search.errors import UserError
from effir_search.searching.fuse import fuse_lists
from effir_search.serving.refusal import Refusal
from effir_search.serving.rest import check_length, index_list, payload, record
from effir_search.serving.service import HITS, Service
from effir_search.settings import FuseSettings

INSTRUCTIONS = "Search collections of documents by meaning: search finds documents, get_document returns one in full."


@dataclass
class ScoredDocument:
    """A hit, as an agent hands it back."""

    docid: str
    score: float


class Tools(MCPServer):
    """An MCP server that refuses arguments a tool does not have, which would be ignored."""

    async def call_tool(self, name: str, arguments: dict[str, Any], *context: object) -> object:
        """Call a tool.

        Raises:
            ToolError: An unknown tool or argument, or what the tool refuses.
        """
        known = {tool.name: tool.input_schema.get("properties", {}) for tool in await self.list_tools()}
        unknown = sorted(arguments.keys() - known[name].keys()) if name in known else []
        if unknown:
            raise ToolError(f"{name} has no argument {unknown[0]!r}; it has: {', '.join(known[name])}")
        return await super().call_tool(name, arguments, *context)


def mcp_server(service: Service) -> MCPServer:
    """Return an MCP server with the tools of agents."""
    server = Tools("effir_search", instructions=INSTRUCTIONS)
    first = next(iter(service.indexes.by_name))

    @server.tool()
    async def search(query: str | dict[str, str], index_name: str = first, k: int = HITS) -> dict[str, object]:
        """Search an index and return the best hits, best first.

        Args:
            query: The text that is searched for, or {"query_txt": text}.
            index_name: Name of the index, see list_indexes.
            k: Number of hits.

        Returns:
            The hits, each with docid, score, rank and doc, its title and text.
        """
        text = query.get("query_txt", "") if isinstance(query, dict) else query
        try:
            found = await service.search(index_name, text, k)
            check_length(found, None)
        except Refusal as refused:
            raise ToolError(refused.message) from refused
        candidates = [
            {"docid": hit.doc_id, "score": hit.score, "rank": hit.rank, "doc": payload(hit.document, True, None)}
            for hit in found
        ]
        return {"index": index_name, "query": {"text": text}, "candidates": candidates}

    @server.tool()
    async def get_document(docid: str, index_name: str = first) -> dict[str, str]:
        """Return a document in full.

        Args:
            docid: Its id, as search returns it.
            index_name: Name of the index, see list_indexes.

        Returns:
            Its id, title and text.
        """
        try:
            return record(service.document(index_name, docid))
        except Refusal as refused:
            raise ToolError(refused.message) from refused

    @server.tool()
    async def list_indexes(index_type: str = "") -> dict[str, object]:
        """List the indexes that can be searched.

        Args:
            index_type: For agents that know Pyserini; all indexes are listed whatever it is.

        Returns:
            The indexes, each with its name, number of documents, dimension and kind.
        """
        return {"indexes": index_list(service)}

    @server.tool()
    async def fuse_search_results(
        hits1: list[ScoredDocument], hits2: list[ScoredDocument], k: int = HITS
    ) -> dict[str, object]:
        """Make one list of the hits of two searches: the mean of their scores, each list's scaled to 0 to 1.

        Args:
            hits1: Hits of one search, each with docid and score.
            hits2: Hits of the other.
            k: Number of hits.

        Returns:
            The hits, best first, each with docid, score and rank.
        """
        try:
            return {"candidates": fused(service, [hits1, hits2], k)}
        except (Refusal, UserError) as refused:
            raise ToolError(str(refused)) from refused

    return server


def fused(service: Service, lists: Sequence[Sequence[ScoredDocument]], k: int) -> list[dict[str, object]]:
    """Return hits of two searches as one list.

    Raises:
        Refusal: Too many hits, or a document that is twice in a list.
        ValueError: A score that is not finite.
    """
    number = service.checked_hits(k)
    for hits in lists:
        service.checked_hits(max(1, len(hits)))
        if len({hit.docid for hit in hits}) < len(hits):
            raise Refusal(400, "a document is twice in one list")
    scored = [[ScoredDoc("query", hit.docid, hit.score) for hit in hits] for hits in lists]
    found = fuse_lists(scored, method="average", weights=[0.5, 0.5], settings=FuseSettings(method="average"))
    return [{"docid": hit.doc_id, "score": hit.score, "rank": rank} for rank, hit in enumerate(found[:number], start=1)]
