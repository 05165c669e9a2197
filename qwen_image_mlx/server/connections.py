"""Connections before they are requests: how many there may be, and how long one may take to say what it wants.

uvicorn begins to count at a whole header; before that a connection costs a file alone, but files are few as well.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from .api_errors import ApiError

_CONNECTIONS = 192  # below the 256 files that macOS gives a process
_HEADER_SECONDS = 10.0  # for the whole of a request's header, from its first byte or the connection's begin


class Connection(H11Protocol):
    """uvicorn's connection, which is closed if its header does not come, or if it idles where others need room."""

    def __init__(self, *arguments: Any, **more: Any):
        super().__init__(*arguments, **more)
        self._idle_since = time.monotonic()
        self._late: asyncio.TimerHandle | None = None

    @property
    def is_idle(self) -> bool:
        """Whether no request is being worked at."""
        return self.cycle is None or self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # a server has these
        """Makes room: of those that ask for nothing the oldest goes, and where there are none this one."""
        if len(self.connections) >= _CONNECTIONS:
            idle = (other for other in self.connections if isinstance(other, Connection) and other.is_idle)
            oldest = min(idle, key=lambda other: other._idle_since, default=None)
            if oldest is not None:
                oldest.drop()
        full = len(self.connections) >= _CONNECTIONS
        super().connection_made(transport)
        if full:
            self.drop()
        else:
            self._await_header()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forgets its timer."""
        self._header_came()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Takes what came; a header that has begun has to end."""
        super().data_received(data)
        if not self.is_idle:
            self._header_came()
        elif self._late is None and not self.transport.is_closing():
            self._await_header()

    def on_response_complete(self) -> None:
        """Idles from now on."""
        self._idle_since = time.monotonic()
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:
        """Says in the API's form that this is no HTTP."""
        error = ApiError("malformed", "this is not a request of HTTP/1.1")
        body = error.body("")
        headers = [
            ("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close"),
        ]  # fmt: skip
        for event in (h11.Response(status_code=400, headers=headers), h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def drop(self) -> None:
        """Closes it at once."""
        self.connections.discard(self)
        self._header_came()
        self.transport.abort()

    def _await_header(self) -> None:
        self._late = self.loop.call_later(_HEADER_SECONDS, self.drop)

    def _header_came(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None
