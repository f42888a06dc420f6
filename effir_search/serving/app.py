"""The application: all routes behind the gate."""

import asyncio
import contextlib
import logging
import signal
from collections.abc import AsyncIterator, Callable
from importlib import resources

from mcp.server import MCPServer
from mcp.server.streamable_http_manager import StreamableHTTPASGIApp
from mcp.server.transport_security import TransportSecuritySettings
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from effir_search.serving.embeddings import EmbeddingsApi
from effir_search.serving.gate import FAILED, HEALTH, Gate, error_response
from effir_search.serving.mcp_tools import mcp_server
from effir_search.serving.metrics import Metrics
from effir_search.serving.refusal import Refusal
from effir_search.serving.rest import Rest
from effir_search.serving.service import Service
from effir_search.settings import ServeSettings

logger = logging.getLogger(__name__)

# Seconds between two looks at the folders of the indexes.
LOOK = 1.0
# Sessions of MCP at the same time, and seconds without a request after which one is closed.
SESSIONS, SESSION_SECONDS = 1000, 600.0
# Files of the page, by path.
PAGE = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
    "/openapi.yaml": ("openapi.yaml", "application/yaml"),
}
# The page runs its own script and style, asks its own server, and nothing else.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def application(
    service: Service, settings: ServeSettings, key: str | None, *, ready: Callable[[], object] = lambda: None
) -> ASGIApp:
    """Return the ASGI application.

    Args:
        service: What answers.
        settings: Limits.
        key: What requests need; None = nothing.
        ready: Called once requests are answered.
    """
    metrics = Metrics()
    tools = mcp_server(service)
    routes = [
        Route(HEALTH, health, methods=["GET"]),
        Route("/metrics", _metrics_of(metrics, service), methods=["GET"]),
        *(Route(path, _file(*file), methods=["GET"]) for path, file in PAGE.items()),
        *EmbeddingsApi(service).routes(),
        *Rest(service).routes(),
        *_mcp_routes(tools),
    ]

    @contextlib.asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        async with background(service), tools.session_manager.run():
            ready()
            yield

    handlers = {HTTPException: _refuse_http, Refusal: _refuse, Exception: _fail}
    app = Starlette(routes=routes, lifespan=lifespan, exception_handlers=handlers)
    app.router.redirect_slashes = False
    return Gate(app, settings, key, metrics)


@contextlib.asynccontextmanager
async def background(service: Service) -> AsyncIterator[None]:
    """Run in the block what answers requests, and what looks for indexes that were replaced."""
    hang_up = asyncio.Event()
    loop = asyncio.get_running_loop()
    if hasattr(signal, "SIGHUP"):
        loop.add_signal_handler(signal.SIGHUP, hang_up.set)
    tasks = [asyncio.create_task(service.batcher.run()), asyncio.create_task(_watch(service, hang_up))]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _watch(service: Service, hang_up: asyncio.Event) -> None:
    """Look for indexes that were replaced, every second; on a hang-up open them all again."""
    while True:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(hang_up.wait(), LOOK)
        asked = hang_up.is_set()
        hang_up.clear()
        try:
            for name in await asyncio.to_thread(service.indexes.reload, all_of_them=asked):
                logger.info("%s was opened again", name)
        except Exception:  # such as too little memory for two models: nobody else would look again
            logger.exception("indexes that were replaced could not be opened, and stay as they were")


def _mcp_routes(tools: MCPServer) -> list[Route]:
    """Return the routes of MCP's streamable HTTP; a stream that waits for messages of the server is not offered."""
    # The gate has checked who asks.
    unchecked = TransportSecuritySettings(enable_dns_rebinding_protection=False)
    tools.streamable_http_app(transport_security=unchecked, max_sessions=SESSIONS, session_idle_timeout=SESSION_SECONDS)
    endpoint = StreamableHTTPASGIApp(tools.session_manager)
    return [Route(path, endpoint, methods=["POST", "DELETE"]) for path in ("/mcp", "/mcp/")]


async def health(request: Request) -> Response:
    """GET /health."""
    return PlainTextResponse("ok\n")


def _metrics_of(metrics: Metrics, service: Service) -> Callable:
    async def show_metrics(request: Request) -> Response:
        text = metrics.text(
            batches_total=service.batcher.num_batches,
            encoded_texts_total=service.batcher.num_texts,
            index_reloads_total=service.indexes.num_reloads,
            indexes=len(service.indexes.by_name),
        )
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    return show_metrics


def _file(name: str, kind: str) -> Callable:
    content = (resources.files("effir_search.serving") / "page" / name).read_bytes()

    async def page(request: Request) -> Response:
        return Response(content, media_type=kind, headers={"Content-Security-Policy": POLICY})

    return page


async def _refuse(request: Request, refused: Refusal) -> Response:
    return error_response(request.scope["path"], refused)


async def _refuse_http(request: Request, error: Exception) -> Response:
    """Say in one sentence what Starlette found wrong: an unknown path or method."""
    messages = {404: "there is nothing at this path; /openapi.yaml lists what there is"}
    messages[405] = f"{request.method} is not what this path answers"
    message = messages.get(error.status_code, str(error.detail))
    response = await _refuse(request, Refusal(error.status_code, message))
    response.headers.update(error.headers or {})  # which methods a path has
    return response


async def _fail(request: Request, _error: Exception) -> Response:
    return await _refuse(request, FAILED)  # the gate logs the error, which Starlette raises again
