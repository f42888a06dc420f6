"""The tools that agents call by MCP, named as Pyserini's."""

from mcp.server import MCPServer
from mcp.server.mcpserver.exceptions import ToolError

from effir_search.serving.refusal import Refusal
from effir_search.serving.rest import check_length, index_list, payload, record
from effir_search.serving.service import HITS, Service

INSTRUCTIONS = "Search collections of documents by meaning: search finds documents, get_document returns one in full."


def mcp_server(service: Service) -> MCPServer:
    """Return an MCP server with the tools ``search``, ``get_document`` and ``list_indexes``."""
    server = MCPServer("effir_search", instructions=INSTRUCTIONS)
    first = next(iter(service.indexes.by_name))

    @server.tool()
    async def search(query: str | dict[str, str], index: str = first, hits: int = HITS) -> dict[str, object]:
        """Search an index and return the best hits, best first.

        Args:
            query: The text that is searched for, or {"query_txt": text}.
            index: Name of the index, see list_indexes.
            hits: Number of hits.

        Returns:
            The hits, each with docid, score, rank and doc, its title and text.
        """
        text = query.get("query_txt", "") if isinstance(query, dict) else query
        try:
            found = await service.search(index, text, hits)
            check_length(found, None)
        except Refusal as refused:
            raise ToolError(refused.message) from refused
        candidates = [
            {"docid": hit.doc_id, "score": hit.score, "rank": hit.rank, "doc": payload(hit.document, True, None)}
            for hit in found
        ]
        return {"index": index, "query": {"text": text}, "candidates": candidates}

    @server.tool()
    async def get_document(docid: str, index: str = first) -> dict[str, str]:
        """Return a document in full.

        Args:
            docid: Its id, as search returns it.
            index: Name of the index, see list_indexes.

        Returns:
            Its id, title and text.
        """
        try:
            return record(service.document(index, docid))
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

    return server
