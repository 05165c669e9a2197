"""The server's socket, host names and token. Uses only the standard library."""

from __future__ import annotations

import ipaddress
import os
import re
import socket
import stat
from collections.abc import Callable, Collection
from pathlib import Path

from ..errors import RequestError

_LOCAL = ("localhost", "127.0.0.1", "[::1]")
_MIN_TOKEN, _MAX_FILE = 8, 1024  # bytes
_TOKEN = re.compile(rb"[!-~]+")
_HOST = re.compile(r"[A-Za-z0-9_.-]{1,253}")
_BACKLOG = 128


def read_token(path: str) -> str:
    """Reads a token from a file that only its owner can read; raises RequestError."""
    if not path:
        raise RequestError("--token-file is empty; give a file name, or leave the option out")
    mode, data = _head(path)
    words = data.split()
    if len(data) > _MAX_FILE or len(words) != 1 or len(words[0]) < _MIN_TOKEN:
        raise RequestError(f"the token in {path} must be one word of {_MIN_TOKEN} to {_MAX_FILE:,} characters")
    if not _TOKEN.fullmatch(words[0]):
        raise RequestError(f"the token in {path} may have only ASCII letters, digits and punctuation")
    if os.name == "posix" and mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise RequestError(f"other users can read the token file {path}; protect it with chmod 600")
    return words[0].decode("ascii")


def _head(path: str) -> tuple[int, bytes]:
    """A regular file's mode, and its first bytes up to one more than the maximum; never blocks on a pipe."""
    try:
        file = Path(path).expanduser()
        mode = file.stat().st_mode
        if stat.S_ISREG(mode):
            with file.open("rb") as opened:
                return mode, opened.read(_MAX_FILE + 1)
    except OSError as error:
        raise RequestError(f"the token file {path} cannot be read: {(error.strerror or str(error)).lower()}") from error
    except ValueError:
        raise RequestError("the name of the token file is not a valid file name") from None
    except RuntimeError:  # of expanduser
        raise RequestError(f"the token file {path} is in the home folder of an unknown user") from None
    raise RequestError(f"the token file {path} is not a regular file")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a host."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def allowed_host(text: str) -> str:
    """A name of `--allow-host` in the form of a Host header, without a port; raises RequestError."""
    name = text.strip().lower()
    if _is_address(name) and ":" in name:
        return f"[{name.strip('[]')}]"
    if not _HOST.fullmatch(name):
        raise RequestError(
            f"--allow-host is {text!r:.100}, but must be only a name, such as host.docker.internal: "
            "leave out http://, the port and the path"
        )
    return name


def own_hosts(host: str, allowed: Collection[str] = ()) -> Callable[[str], bool]:
    """A predicate for the Host names that a server bound to `host` accepts; `allowed` adds names.

    On loopback only a few names are accepted, so that a foreign web page cannot reach the server under its own name
    (DNS rebinding). On other addresses, where a token is required, all addresses and the machine's names are accepted.
    """
    names = {*_LOCAL, host.lower(), f"[{host.lower()}]", *allowed}
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
    """A listening socket; raises RequestError if it cannot be opened."""
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
