"""Where a server listens, by which names it is reached, and the token it asks for. Needs the standard library alone."""

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
_LEAST_TOKEN, _LONGEST_FILE = 8, 1024
_TOKEN = re.compile(rb"[!-~]+")
_HOST = re.compile(r"[A-Za-z0-9_.-]{1,253}")
_BACKLOG = 128


def read_token(path: str) -> str:
    """A token from a file that its owner alone can read; raises RequestError."""
    if not path:
        raise RequestError("the token file has no name: give one, or ask for no token")
    mode, data = _head(path)
    words = data.split()
    if len(data) > _LONGEST_FILE or len(words) != 1 or len(words[0]) < _LEAST_TOKEN:
        raise RequestError(f"the token in {path} must be one word of {_LEAST_TOKEN} to {_LONGEST_FILE:,} characters")
    if not _TOKEN.fullmatch(words[0]):
        raise RequestError(f"the token in {path} must be of ASCII's letters, digits and punctuation alone")
    if os.name == "posix" and mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise RequestError(f"others can read the token file {path}; protect it with chmod 600")
    return words[0].decode("ascii")


def _head(path: str) -> tuple[int, bytes]:
    """A plain file's mode and as much of it as can be a token, and a byte more; waits for nothing."""
    try:
        file = Path(path).expanduser()
        mode = file.stat().st_mode
        if stat.S_ISREG(mode):
            with file.open("rb") as opened:
                return mode, opened.read(_LONGEST_FILE + 1)
    except OSError as error:
        raise RequestError(f"the token file {path} cannot be read: {(error.strerror or str(error)).lower()}") from error
    except ValueError:
        raise RequestError("the token file has a name that no file can have") from None
    except RuntimeError:  # of expanduser
        raise RequestError(f"the token file {path} is in the folder of a user who is not known") from None
    raise RequestError(f"the token file {path} is no plain file")


def is_loopback(host: str) -> bool:
    """Whether nobody but this machine reaches a host."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def allowed_host(text: str) -> str:
    """A name of `--allow-host` as a Host header has it, without its port; raises RequestError."""
    name = text.strip().lower()
    if _is_address(name) and ":" in name:
        return f"[{name.strip('[]')}]"
    if not _HOST.fullmatch(name):
        raise RequestError(
            f"--allow-host is {text!r:.100}, but must be a name alone, as in host.docker.internal: "
            "leave out http://, the port and the path"
        )
    return name


def own_hosts(host: str, allowed: Collection[str] = ()) -> Callable[[str], bool]:
    """Tells the names that a server bound to a host is reached by; `allowed` adds others.

    On loopback these are few, so that no foreign page can reach it under a name of its own (DNS rebinding). Elsewhere a
    token is asked for anyway, and its addresses and the machine's names count.
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
