"""The process that serves: over HTTP, or as an MCP server on standard input and output. What ``effir serve`` does."""

import asyncio
import logging
import os
import socket
from collections.abc import Callable, Sequence
from pathlib import Path

import uvicorn

from effir_search.encoding.encoder import DEFAULT_OPTIONS
from effir_search.errors import UserError
from effir_search.searching.searcher import DEFAULT_SETTINGS
from effir_search.serving.app import application, background
from effir_search.serving.batching import Batcher
from effir_search.serving.connection import Connection
from effir_search.serving.indexes import Indexes, named_folders
from effir_search.serving.mcp_tools import mcp_server
from effir_search.serving.service import Service
from effir_search.settings import EncoderOptions, SearchSettings, ServeSettings

logger = logging.getLogger(__name__)

KEY_VARIABLE = "EFFIR_API_KEY"
# Seconds beyond a request's own that requests in flight have when the server is to end.
GRACE = 5


def serve(
    index_dirs: Sequence[str],
    settings: ServeSettings,
    *,
    corpora: Sequence[str] = (),
    encoder: str | None = None,
    search: SearchSettings = DEFAULT_SETTINGS,
    options: EncoderOptions = DEFAULT_OPTIONS,
    mcp: bool = False,
    announce: Callable[[str], object] = logger.info,
) -> None:
    """Serve indexes until a signal ends the process; requests in flight are answered first.

    Args:
        index_dirs: Folders, each ``DIR`` or ``NAME=DIR``.
        settings: Where it listens, and limits.
        corpora: Where the texts are; none = in the corpora that the indexes name.
        encoder: Model folder or hub name; None = each index's own.
        search: How the indexes are searched.
        options: How encoders are loaded.
        mcp: Speak MCP on standard input and output instead of HTTP.
        announce: Called with the server's address once it answers.

    Raises:
        ValueError: A bad index, name or key.
        OSError: A file cannot be read, or the address cannot be listened on.
    """
    folders = named_folders(index_dirs)
    key = None if mcp else api_key(settings)
    listener = None if mcp else _listener(settings)  # before the models are loaded: it fails at once or not at all
    indexes = Indexes(folders, corpora=corpora, encoder=encoder, settings=search, options=options)
    if listener is None:
        asyncio.run(_speak_mcp(indexes, settings))
        return
    host, port = settings.host, listener.getsockname()[1]
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    if key is None and not _is_loopback(host):
        logger.warning("whoever reaches %s may search: no key is set, in %s or --api-key-file", address, KEY_VARIABLE)
    asyncio.run(_serve_http(indexes, settings, key, listener, lambda: announce(address)))


async def _serve_http(
    indexes: Indexes, settings: ServeSettings, key: str | None, listener: socket.socket, ready: Callable[[], object]
) -> None:
    app = application(Service(indexes, Batcher(), settings), settings, key, ready=ready)
    config = uvicorn.Config(
        app,
        http=type("Connection", (Connection,), {"seconds": settings.timeout}),
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=int(settings.timeout) + GRACE,
    )
    await uvicorn.Server(config).serve(sockets=[listener])


async def _speak_mcp(indexes: Indexes, settings: ServeSettings) -> None:
    service = Service(indexes, Batcher(), settings)
    async with background(service):
        await mcp_server(service).run_stdio_async()


def api_key(settings: ServeSettings) -> str | None:
    """Return the key that requests need, or None.

    Raises:
        ValueError: It is empty, or not of visible ASCII characters, which alone a header can hold.
        OSError: Its file cannot be read.
    """
    if settings.api_key_file is not None:
        # Any bytes are characters of Latin-1, of which those that no key has are refused below.
        where, key = settings.api_key_file, Path(settings.api_key_file).read_text(encoding="latin-1").strip()
    elif KEY_VARIABLE in os.environ:
        where, key = KEY_VARIABLE, os.environ[KEY_VARIABLE].strip()
    else:
        return None
    if not key or not all("!" <= character <= "~" for character in key):
        raise UserError(f"{where}: the key must be of visible ASCII characters, and not empty")
    return key


def _listener(settings: ServeSettings) -> socket.socket:
    """Return a socket that is bound, and listens once the server runs."""
    where = f"{settings.host}:{settings.port}"
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise OSError(f"--host and --port: cannot listen on {where}: {error.strerror or error}") from error
    return listener


def _is_loopback(host: str) -> bool:
    return host == "localhost" or host == "::1" or host.startswith("127.")
