"""Runs the server and shuts it down cleanly."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import uvicorn

from ..errors import RankError
from ..runtime.ranks import alone
from .app import create_app
from .connections import Connection
from .service import Service, Setup

_PATIENCE = 20  # seconds for connections to end after the jobs are cancelled
_FAULT_SHOWN = 1.5  # seconds for which `/health` says why the server ends


def serve(setup: Setup, listener: socket.socket, ready: Callable[[], None]) -> signal.Signals | None:
    """Runs the server until SIGTERM or SIGINT, cancels all jobs, and returns the signal.

    A second signal ends the process at once. If this process can no longer work, the server ends by itself.

    Args:
        setup: the configuration.
        listener: a listening socket.
        ready: called when the server accepts requests.

    Raises:
        GPUError: the server ended because of the GPU.
        RankError: the server ended because a rank has ended; then nothing more can be exchanged.
    """
    service = Service(setup, lambda: server.leave())
    config = uvicorn.Config(
        create_app(service), log_config=None, access_log=False, server_header=False, lifespan="on", ws="none",
        timeout_keep_alive=15, timeout_graceful_shutdown=_PATIENCE, loop="asyncio", http=Connection,
    )  # fmt: skip
    server = _Server(config, service.jobs.stop, ready)
    asyncio.run(server.serve(sockets=[listener]))
    over = service.jobs.health.over
    if over is not None and server.ended_by is None:
        raise over
    if not isinstance(over, RankError):
        alone()  # the other ranks have ended
    return server.ended_by


class _Server(uvicorn.Server):
    """uvicorn's server. It cancels jobs before it waits for connections, and does not raise signals again."""

    def __init__(self, config: uvicorn.Config, stop: Callable[[], None], ready: Callable[[], None]):
        super().__init__(config)
        self.ended_by: signal.Signals | None = None
        self._stop, self._ready = stop, ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()

    def leave(self) -> None:
        """Ends the server like a signal, once `/health` could be read; called in the event loop."""
        asyncio.get_running_loop().call_later(_FAULT_SHOWN, setattr, self, "should_exit", True)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop, before = asyncio.get_running_loop(), {}

        def on_signal(number: int, frame: FrameType | None) -> None:
            if self.ended_by is not None:
                os._exit(128 + number)
            self.ended_by = signal.Signals(number)
            self.should_exit = True
            loop.call_soon_threadsafe(self._stop)

        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, on_signal)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
