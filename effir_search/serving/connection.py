"""Connections that do not ask: uvicorn waits for a first request for ever, and takes in more than there are files."""

import asyncio
import resource

from uvicorn.protocols.http.h11_impl import H11Protocol


class Connection(H11Protocol):
    """A connection that is closed if it does not ask in time, or if half of all files that may be open are connections.

    Attributes:
        seconds: Within which the first request's head must be there.
    """

    seconds = 30.0

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Take a connection, or close it at once."""
        super().connection_made(transport)
        if len(self.connections) > resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2:
            transport.close()
        self.loop.call_later(self.seconds, self._close_unless_asked)

    def _close_unless_asked(self) -> None:
        if self.cycle is None and not self.transport.is_closing():
            self.transport.close()
