"""Runs the server: its socket, its names, and an orderly end."""

from __future__ import annotations

import asyncio
import ipaddress
import os
import signal
import socket
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import uvicorn

from ..errors import RequestError
from .app import Service, Setup, create_app

_LOCAL = ("localhost", "127.0.0.1", "[::1]")
_LEAST_TOKEN = 8
_CONNECTIONS = 256
_BACKLOG = 128


def read_token(path: str) -> str:
    """A token from a file that its owner alone can read; raises RequestError."""
    file = Path(path).expanduser()
    try:
        mode, text = file.stat().st_mode, file.read_text("ascii")
    except OSError as error:
        raise RequestError(f"the token file {path} cannot be read: {(error.strerror or str(error)).lower()}") from error
    except ValueError:
        raise RequestError(f"the token file {path} holds no plain text") from None
    token = text.strip()
    if len(token) < _LEAST_TOKEN or len(token.split()) != 1:
        raise RequestError(f"the token in {path} must be one word of at least {_LEAST_TOKEN} characters")
    if os.name == "posix" and mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise RequestError(f"others can read the token file {path}; protect it with chmod 600")
    return token


def is_loopback(host: str) -> bool:
    """Whether nobody but this machine reaches a host."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def own_hosts(host: str) -> Callable[[str], bool]:
    """Tells the names that a server bound to a host is reached by.

    On loopback these are few, so that no foreign page can reach it under a name of its own (DNS rebinding). Elsewhere a
    token is asked for anyway, and its addresses and the machine's names count.
    """
    names = {*_LOCAL, host.lower(), f"[{host.lower()}]"}
    if is_loopback(host):
        return names.__contains__
    machine = socket.gethostname().lower()
    names |= {machine, f"{machine.partition('.')[0]}.local", socket.getfqdn().lower()}
    return lambda name: name in names or _is_address(name)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; raises RequestError if it cannot."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(_BACKLOG)
        except BaseException:
            listener.close()
            raise
    except (OSError, OverflowError, UnicodeError) as error:
        reason = (getattr(error, "strerror", None) or str(error)).lower()
        raise RequestError(f"cannot listen on {host}, port {port}: {reason}") from error
    listener.setblocking(False)
    return listener


def serve(setup: Setup, listener: socket.socket) -> signal.Signals | None:
    """Serves until it is told to end by SIGTERM or SIGINT, which is returned; jobs are then cancelled.

    A second signal ends the process at once.
    """
    service = Service(setup)
    config = uvicorn.Config(
        create_app(service), log_config=None, access_log=False, server_header=False, lifespan="on", ws="none",
        limit_concurrency=_CONNECTIONS, timeout_keep_alive=15, loop="asyncio", http="h11",
    )  # fmt: skip
    server = _Server(config, service.jobs.stop)
    asyncio.run(server.serve(sockets=[listener]))
    return server.ended_by


class _Server(uvicorn.Server):
    """uvicorn's server, which cancels jobs before it waits for their connections, and leaves signals to its caller."""

    def __init__(self, config: uvicorn.Config, stop: Callable[[], None]):
        super().__init__(config)
        self.ended_by: signal.Signals | None = None
        self._stop = stop

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
