"""Limits for connections: their maximum number, and the time to send a request's header.

uvicorn's own limits start at a complete header. Before that a connection costs only a file descriptor, but those are
limited too.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from .api_errors import ApiError

_CONNECTIONS = 192  # below the 256 files that macOS gives a process
_HEADER_SECONDS = 10.0  # for the whole of a request's header, from its first byte or the start of the connection


class Connection(H11Protocol):
    """uvicorn's connection. It is closed if its header is late, or if it is idle and others need its place."""

    def __init__(self, *arguments: Any, **more: Any):
        super().__init__(*arguments, **more)
        self._idle_since = time.monotonic()
        self._late: asyncio.TimerHandle | None = None

    @property
    def is_idle(self) -> bool:
        """Whether no request is in progress."""
        return self.cycle is None or self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # servers only
        """Closes the longest idle connection if there are too many; closes this one if none is idle."""
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
        """Cancels the header's timer."""
        self._header_came()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Processes data; starts the header's timer if the header is incomplete."""
        super().data_received(data)
        if not self.is_idle:
            self._header_came()
        elif self._late is None and not self.transport.is_closing():
            self._await_header()

    def on_response_complete(self) -> None:
        """Marks the connection as idle."""
        self._idle_since = time.monotonic()
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:
        """Answers, in the API's format, data that is not HTTP."""
        error = ApiError("malformed", "this is not an HTTP/1.1 request")
        body = error.body("")
        headers = [
            ("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close"),
        ]  # fmt: skip
        for event in (h11.Response(status_code=400, headers=headers), h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def drop(self) -> None:
        """Closes the connection at once."""
        self.connections.discard(self)
        self._header_came()
        self.transport.abort()

    def _await_header(self) -> None:
        self._late = self.loop.call_later(_HEADER_SECONDS, self.drop)

    def _header_came(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None
