"""Indexes served over HTTP and MCP, with a page.

What comes in are index folders, their corpora, and requests; what goes out are hits, documents and embeddings as JSON,
and the page. Open ``service.py`` first: it answers, for ``rest.py``, ``embeddings.py`` and ``mcp_tools.py`` alike.
``indexes.py`` opens and reloads the folders, ``texts.py`` holds the documents, ``batching.py`` lets requests share
forward passes, ``gate.py`` is what every request passes first, ``server.py`` is the process.
"""
