"""Stands before the application: who may ask, from where, how many at once, with how large a body, and how soon.

Pure ASGI, so that streams pass through as they come. A body is counted until its request is answered, or until whoever
keeps what was in it says so (`hand_over`). Every answer leaves with headers that keep a browser from running,
framing or guessing anything but the page's own files.
"""

from __future__ import annotations

import asyncio
import hmac
import re
import time
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from contextlib import suppress
from typing import Any

from .api_errors import ApiError

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

CSP = (
    "default-src 'self'; img-src 'self' data: blob:; object-src 'none'; base-uri 'none'; form-action 'self'; "
    "frame-ancestors 'none'"
)
_HEADERS = {
    "content-security-policy": CSP,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "accept-ranges": "none",
}
_AUTHORITY = re.compile(r"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9_.-]+)(?::\d{1,5})?")
_DRAINED_BYTES, _DRAINED_SECONDS = 8 << 20, 2.0  # of a refused body, so that its sender can read why
_BODIES_AT_ONCE = 4  # of the largest size, in memory
_SMALL = 1 << 20  # bytes of a body that finds room whatever else arrives: so many requests are not at once
_LEAST_BYTES, _LEAST_SECONDS = 1 << 18, 10.0  # of a body: so much has to come in so long
_REQUESTS_AT_ONCE = 96
_STREAMS_AT_ONCE = 48  # of them
_BODY = "qwen_image_mlx.body"  # in the scope of a request


class Guard:
    """Middleware around an ASGI application.

    Args:
        app: what is guarded.
        is_own_host: whether a Host header's name, in lower case and without its port, is one of this server's.
        token: what requests must carry as `Authorization: Bearer TOKEN`; None asks for nothing.
        origins: web origins beside the server's own that may use it.
        max_body_bytes: a longer body is refused, announced or not.
        body_seconds: by when a body must have arrived; one that stalls is refused sooner.
    """

    def __init__(
        self,
        app: Callable[[Message, Receive, Send], Awaitable[None]],
        *,
        is_own_host: Callable[[str], bool],
        token: str | None = None,
        origins: Collection[str] = (),
        max_body_bytes: int,
        body_seconds: float = 120.0,
    ):
        self._app = app
        self._is_own_host = is_own_host
        self._token = None if token is None else token.encode()
        self._origins = frozenset(origins)
        self._max_body_bytes = max_body_bytes
        self._body_seconds = body_seconds
        self._room = _BODIES_AT_ONCE * max_body_bytes
        self._requests = self._streams = 0

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Lets a request pass, or answers it."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        headers = _Headers(scope)
        body = _Body(self, receive, headers)
        answer = _decorated(send, scope["path"], self._cors(headers), body)
        try:
            self._check(scope, headers)
        except ApiError as error:
            await _refuse(answer, error, scope["path"])
            return
        if self._is_preflight(scope, headers):
            await answer({"type": "http.response.start", "status": 204, "headers": []})
            await answer({"type": "http.response.body", "body": b""})
            return
        counts, streams = not self._is_quick(scope, body), self._is_stream(scope)
        if (counts and self._requests >= _REQUESTS_AT_ONCE) or (streams and self._streams >= _STREAMS_AT_ONCE):
            what = "streams of events" if streams else "requests"
            error = ApiError("busy", f"too many {what} are open at once; try again", {"retry-after": "5"})
            await _refuse(answer, error, scope["path"])
            return
        self._requests += counts
        self._streams += streams
        try:
            whole = [(name, value) for name, value in scope["headers"] if name.lower() != b"range"]  # no parts
            await self._app({**scope, "headers": whole, _BODY: body}, body.receive, answer)
        finally:
            self._requests -= counts
            self._streams -= streams
            body.leave()

    def _check(self, scope: Message, headers: _Headers) -> None:
        hosts = headers.all("host")
        authority = _AUTHORITY.fullmatch(hosts[0]) if len(hosts) == 1 else None
        if authority is None:
            raise ApiError("malformed", "one Host header is needed, with the name that the server is reached by")
        if not self._is_own_host(authority[1].lower()):
            name = f"{authority[1]:.100}"
            raise ApiError("misdirected", f"{name} is not a name of this server; --allow-host {name} would let it")
        origins = headers.all("origin")
        if len(origins) > 1:
            raise ApiError("malformed", "at most one Origin header is taken")
        own = [f"{scheme}://{hosts[0].lower()}" for scheme in ("http", "https")]
        if origins and origins[0] not in self._origins and origins[0].lower() not in own:
            raise ApiError("forbidden", "this web origin may not use the server; --allow-origin would let it")
        length = headers.get("content-length")
        if length and (not re.fullmatch(r"\d{1,18}", length) or int(length) > self._max_body_bytes):
            raise self._too_large()
        if self._token is not None and not self._is_open(scope) and not self._is_preflight(scope, headers):
            scheme, _, given = headers.get("authorization").partition(" ")
            fits = hmac.compare_digest(given.strip().encode("utf-8", "replace"), self._token)
            if scheme.lower() != "bearer" or not fits:
                raise ApiError(
                    "unauthorized", "a valid token is needed: Authorization: Bearer TOKEN",
                    {"www-authenticate": "Bearer"},
                )  # fmt: skip

    def _is_preflight(self, scope: Message, headers: _Headers) -> bool:
        asks = scope["method"] == "OPTIONS" and headers.get("access-control-request-method")
        return bool(asks) and headers.get("origin") in self._origins

    @staticmethod
    def _is_open(scope: Message) -> bool:
        path = scope["path"]
        return scope["method"] in ("GET", "HEAD") and (path in ("/", "/health") or path.startswith("/static/"))

    @staticmethod
    def _is_stream(scope: Message) -> bool:
        return scope["path"].startswith("/jobs/") and scope["path"].endswith("/events")

    @staticmethod
    def _is_quick(scope: Message, body: _Body) -> bool:
        """Whether it is answered at once, however much there is to do: health, and cancelling."""
        return body.arrived and (scope["path"] == "/health" or scope["method"] == "DELETE")

    def _cors(self, headers: _Headers) -> dict[str, str]:
        origin = headers.get("origin")
        if origin not in self._origins:
            return {}
        return {
            "access-control-allow-origin": origin,
            "access-control-allow-methods": "GET, POST, DELETE",
            "access-control-allow-headers": "authorization, content-type, idempotency-key, last-event-id",
            "access-control-expose-headers": "retry-after",
            "access-control-max-age": "600",
            "vary": "Origin",
        }

    def take(self, nbytes: int, taken: int) -> int:
        """Makes room for a piece of a body of which `taken` bytes are here; how many count; raises ApiError."""
        if taken > self._max_body_bytes:
            raise self._too_large()
        counted = min(nbytes, max(0, taken - _SMALL))
        if counted > self._room:
            raise ApiError("busy", "too many large requests arrive at once; try again", {"retry-after": "5"})
        self._room -= counted
        return counted

    def give_back(self, nbytes: int) -> None:
        """Makes room for others' bodies."""
        self._room += nbytes

    async def timely(self, receive: Receive, begun: float, last: float) -> Message:
        """A piece of a body that began then, and of which enough came last then; raises ApiError if it is late."""
        due = min(begun + self._body_seconds, last + _LEAST_SECONDS)
        try:
            return await asyncio.wait_for(receive(), max(0.0, due - time.monotonic()))
        except asyncio.TimeoutError:
            raise ApiError("slow", "the body arrives too slowly") from None

    def _too_large(self) -> ApiError:
        return ApiError("too_large", f"the body has more than the {self._max_body_bytes:,} bytes that are taken")


class _Body:
    """A request's body, counted as it comes; what is too long or too slow raises ApiError where it is read."""

    def __init__(self, guard: Guard, receive: Receive, headers: _Headers):
        self._taken = self._counted = 0
        self._guard, self._receive = guard, receive
        self._begun = self._last = time.monotonic()
        self._enough = _LEAST_BYTES  # that must have come, for others to be waited for
        has_one = headers.get("transfer-encoding") or headers.get("content-length") not in ("", "0")
        self.arrived = not has_one
        self._waits = bool(headers.get("expect"))  # nothing is sent before it is asked for

    async def receive(self) -> Message:
        if self.arrived:
            return await self._receive()
        message = await self._guard.timely(self._receive, self._begun, self._last)
        self._waits = False
        nbytes = len(message.get("body", b""))
        self._taken += nbytes
        self._counted += self._guard.take(nbytes, self._taken)
        if self._taken >= self._enough:
            self._enough, self._last = self._taken + _LEAST_BYTES, time.monotonic()
        self.arrived = not message.get("more_body", False)
        return message

    def leave(self) -> None:
        """Counts it no longer."""
        self._guard.give_back(self._counted)
        self._counted = 0

    async def drain(self) -> None:
        """Reads on for a moment: a connection closed upon unread data tells its sender nothing."""
        left = _DRAINED_BYTES

        async def read() -> None:
            nonlocal left
            while not self.arrived and left > 0:
                message = await self._receive()
                left -= len(message.get("body", b""))
                self.arrived = not message.get("more_body", False)

        if not self._waits:
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(read(), _DRAINED_SECONDS)


def hand_over(scope: MutableMapping[str, Any]) -> None:
    """Says that what a request's body held is counted by another from now on."""
    scope[_BODY].leave()


class _Headers:
    """A request's headers as text."""

    def __init__(self, scope: Message):
        self._pairs = [(name.lower().decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"]]

    def all(self, name: str) -> list[str]:
        return [value for other, value in self._pairs if other == name]

    def get(self, name: str) -> str:
        """The first, or an empty text."""
        return next(iter(self.all(name)), "")


def _decorated(send: Send, path: str, more: dict[str, str], body: _Body) -> Send:
    """Adds what every answer carries, once the body is here; what is not a file of the page is kept by nobody."""
    kept = "no-cache" if path == "/" or path.startswith("/static/") else "no-store"
    added = {**_HEADERS, "cache-control": kept, **more}
    if not more:
        added["cross-origin-resource-policy"] = "same-origin"

    async def decorated(message: Message) -> None:
        if message["type"] == "http.response.start":
            await body.drain()
            own = [(name, value) for name, value in message.get("headers", ()) if name.lower().decode() not in added]
            headers = [(name.encode(), value.encode("latin-1")) for name, value in added.items()]
            message = {**message, "headers": own + headers}
        await send(message)

    return decorated


async def _refuse(send: Send, error: ApiError, path: str) -> None:
    body = error.body(path)
    headers = {"content-type": "application/json", "content-length": str(len(body)), **error.headers}
    encoded = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status(path), "headers": encoded})
    await send({"type": "http.response.body", "body": body})
