"""What every request passes before it is answered: names, key, size, number, time; and no error leaves as a trace."""

import asyncio
import base64
import hmac
import ipaddress
import logging
import time
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from effir_search.serving.metrics import Metrics
from effir_search.serving.refusal import Refusal
from effir_search.settings import ServeSettings

logger = logging.getLogger(__name__)

# What anybody may ask, without a key.
HEALTH = "/health"
# Paths whose errors have OpenAI's shape.
OPENAI = ("/v1/embeddings", "/v1/models")
FAILED = Refusal(500, "the server failed; its log says more")
# Nothing here is for another site: not to be framed, sniffed, kept or read by one.
HEADERS = {
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class Gate:
    """The outermost layer of the application."""

    def __init__(self, app: ASGIApp, settings: ServeSettings, key: str | None, metrics: Metrics) -> None:
        self._app, self._settings, self._metrics = app, settings, metrics
        self._key = None if key is None else key.encode("utf-8")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.perf_counter(), 0

        async def send_noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                names = {name.lower() for name, _ in message["headers"]}
                extra = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]
                message["headers"] = [*message["headers"], *(pair for pair in extra if pair[0] not in names)]
            await send(message)

        refused = await self._answer(scope, receive, send_noting)
        if refused is not None and not status:
            await error_response(scope["path"], refused)(scope, receive, send_noting)
        endpoint = getattr(scope.get("endpoint"), "__name__", "none")
        self._metrics.add(endpoint, status, time.perf_counter() - started)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> Refusal | None:
        """Let the application answer; return why it does not."""
        headers = Headers(scope=scope)
        try:
            self._check_caller(scope, headers)
        except Refusal as refused:
            return refused
        if scope["path"] != HEALTH and self._metrics.in_flight >= self._settings.max_requests:
            return Refusal(429, f"the server answers {self._settings.max_requests} requests already; try again soon")
        self._metrics.in_flight += 1
        try:
            body = await self._read_body(headers, receive)  # uvicorn throws away what is left of one that is refused
            async with asyncio.timeout(self._settings.timeout):
                await self._app(scope, _given(body, receive), send)
        except Refusal as refused:
            return refused
        except TimeoutError:
            return Refusal(503, f"the request took more than {self._settings.timeout:g} seconds")
        except Exception:  # the last place where an error can be kept from leaving as it is
            logger.exception("%s %s failed", scope["method"], scope["path"])
            return FAILED
        finally:
            self._metrics.in_flight -= 1
        return None

    def _check_caller(self, scope: Scope, headers: Headers) -> None:
        """Raise a Refusal unless a request is one for this server, of no other site's page, and has the key."""
        hosts = headers.getlist("host")
        if len(hosts) != 1 or not self._is_own_name(hosts[0]):
            raise Refusal(421, "this server is not called so; --server-name NAME lets requests call it by another name")
        origin = headers.get("origin")
        if origin is not None and origin.lower().partition("://")[2] != hosts[0].lower():
            raise Refusal(403, "requests of other sites' pages are not answered")
        opens_page = scope["path"] == "/" and headers.get("sec-fetch-mode") == "navigate"
        if headers.get("sec-fetch-site") in ("cross-site", "same-site") and not opens_page:
            raise Refusal(403, "requests of other sites' pages are not answered")
        if self._key is not None and scope["path"] != HEALTH:
            keys = given_keys(headers)
            if not keys:
                raise Refusal(401, "a key is needed: as Authorization: Bearer KEY, or as X-API-Key: KEY")
            if not any([hmac.compare_digest(key, self._key) for key in keys]):
                raise Refusal(401, "the key is wrong")

    def _is_own_name(self, host: str) -> bool:
        """Return whether a Host header names this server: a page that lets its own name point here has another one."""
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        try:
            ipaddress.ip_address(name)
        except ValueError:
            own = {"localhost", self._settings.host.lower(), *map(str.lower, self._settings.server_name)}
            return name in own
        return True

    async def _read_body(self, headers: Headers, receive: Receive) -> bytes:
        """Return the body, or raise a Refusal if it is too large or too slow."""
        length = headers.get("content-length")
        if length is None and "transfer-encoding" not in headers:
            return b""
        limit = self._settings.max_body
        too_large = Refusal(413, f"the body is larger than {limit:,} bytes")
        if length is not None and int(length) > limit:
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(self._settings.timeout):
                async for chunk in _chunks(receive):
                    body += chunk
                    if len(body) > limit:
                        raise too_large
        except TimeoutError:
            raise Refusal(408, f"the body did not arrive within {self._settings.timeout:g} seconds") from None
        return bytes(body)


def given_keys(headers: Headers) -> list[bytes]:
    """Return the keys that a request has: X-API-Key, a bearer token, or the password of a browser's login."""
    keys = [headers["x-api-key"]] if "x-api-key" in headers else []
    kind, _, value = headers.get("authorization", "").partition(" ")
    if kind.lower() == "bearer":
        keys.append(value.strip())
    if kind.lower() == "basic":
        try:
            keys.append(base64.b64decode(value, validate=True).decode("latin-1").partition(":")[2])
        except ValueError:  # not Base64, or not even ASCII
            keys.append("")
    # A header's bytes arrive as Latin-1.
    return [key.encode("latin-1") for key in keys]


def error_response(path: str, refused: Refusal) -> Response:
    """Return a refusal as JSON, in the shape that clients of this path read."""
    content: dict[str, object] = {"error": refused.message}
    if path in OPENAI:
        kind = "server_error" if refused.status >= 500 else "invalid_request_error"
        content = {"error": {"message": refused.message, "type": kind, "param": None, "code": None}}
    headers = {}
    if refused.status == 401:
        # A browser that opens the page asks for a name, which does not matter, and a password, which is the key.
        headers["WWW-Authenticate"] = 'Basic realm="effir_search"' if path == "/" else "Bearer"
    if refused.status in (429, 503):
        headers["Retry-After"] = "1"
    if refused.status == 408:
        headers["Connection"] = "close"
    return JSONResponse(content, refused.status, headers)


async def _chunks(receive: Receive):  # noqa: ANN202, an asynchronous iterator of bytes
    """Yield the parts of a body."""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Refusal(400, "the body is cut")
        yield message.get("body", b"")
        if not message.get("more_body", False):
            return


def _given(body: bytes, receive: Receive) -> Receive:
    """Return a ``receive`` that gives a body that was read, and then what comes."""
    was_given = False

    async def receive_again() -> Message:
        nonlocal was_given
        if was_given:
            return await receive()
        was_given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receive_again
