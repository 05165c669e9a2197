"""Middleware that checks hosts, origins and tokens, and limits the number of requests and the size and time of bodies.

Pure ASGI, so that streams are not buffered. The bytes of a body count until its request is answered, or until another
owner takes them over (`hand_over`). Every response has headers that keep a browser from running or framing anything but
the page's own files, and from guessing content types.
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
_DRAINED_BYTES, _DRAINED_SECONDS = 8 << 20, 2.0  # read of a refused body, so that the client can read the error
_BODIES_AT_ONCE = 4  # bodies of the maximum size that memory may hold
_SMALL = 1 << 20  # bytes of a body that do not count: _REQUESTS_AT_ONCE bounds these
_MIN_BYTES, _MIN_BYTES_SECONDS = 1 << 18, 10.0  # a body must bring at least these bytes in these seconds
_REQUESTS_AT_ONCE = 96
_STREAMS_AT_ONCE = 48  # event streams among them
_BODY = "qwen_image_mlx.body"  # key in a request's scope


class Guard:
    """Middleware around an ASGI application.

    Args:
        app: the application behind it.
        is_own_host: whether this server accepts the name in a Host header, in lower case and without the port.
        token: required as `Authorization: Bearer TOKEN`; None requires no token.
        origins: web origins that may use the server, in addition to its own.
        max_body_bytes: maximum size of a body, with or without a Content-Length.
        body_seconds: time for a whole body to arrive; one that stalls is refused earlier.
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
        """Passes a request to the application, or refuses it."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        headers = _Headers(scope)
        body = _Body(self, receive, headers)
        answer = _with_headers(send, scope["path"], self._cors(headers), body)
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
            what = "event streams" if streams else "requests"
            error = ApiError("busy", f"too many {what} are open at once; try again", {"retry-after": "5"})
            await _refuse(answer, error, scope["path"])
            return
        self._requests += counts
        self._streams += streams
        try:
            whole = [
                (name, value) for name, value in scope["headers"] if name.lower() != b"range"
            ]  # no partial responses
            await self._app({**scope, "headers": whole, _BODY: body}, body.receive, answer)
        finally:
            self._requests -= counts
            self._streams -= streams
            body.leave()

    def _check(self, scope: Message, headers: _Headers) -> None:
        hosts = headers.all("host")
        authority = _AUTHORITY.fullmatch(hosts[0]) if len(hosts) == 1 else None
        if authority is None:
            raise ApiError("malformed", "the request needs exactly one Host header, with a valid name")
        if not self._is_own_host(authority[1].lower()):
            name = f"{authority[1]:.100}"
            raise ApiError(
                "misdirected", f"{name} is not a name of this server; start it with --allow-host {name} to allow it"
            )
        origins = headers.all("origin")
        if len(origins) > 1:
            raise ApiError("malformed", "the request has more than one Origin header; send at most one")
        own = [f"{scheme}://{hosts[0].lower()}" for scheme in ("http", "https")]
        if origins and origins[0] not in self._origins and origins[0].lower() not in own:
            raise ApiError(
                "forbidden", "this web origin may not use the server; start it with --allow-origin to allow it"
            )
        length = headers.get("content-length")
        if length and (not re.fullmatch(r"\d{1,18}", length) or int(length) > self._max_body_bytes):
            raise self._too_large()
        if self._token is not None and not self._is_open(scope) and not self._is_preflight(scope, headers):
            scheme, _, token = headers.get("authorization").partition(" ")
            fits = hmac.compare_digest(token.strip().encode("utf-8", "replace"), self._token)
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
        """Whether the request is answered at once even under load: health and cancelling."""
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
        """Counts the next `nbytes` of a body.

        Args:
            nbytes: size of the piece.
            taken: bytes of the body so far, with this piece.

        Returns:
            The bytes that count, for `give_back`.

        Raises:
            ApiError: the body is too large, or too many bodies are in memory.
        """
        if taken > self._max_body_bytes:
            raise self._too_large()
        counted = min(nbytes, max(0, taken - _SMALL))
        if counted > self._room:
            raise ApiError("busy", "too many large requests arrive at once; try again", {"retry-after": "5"})
        self._room -= counted
        return counted

    def give_back(self, nbytes: int) -> None:
        """Frees bytes counted by `take`."""
        self._room += nbytes

    async def timely(self, receive: Receive, begun: float, last: float) -> Message:
        """The next message of a body; raises ApiError if it is late.

        Args:
            receive: ASGI's receive.
            begun: when the body began, by `time.monotonic`.
            last: when the body last met the minimum rate.
        """
        due = min(begun + self._body_seconds, last + _MIN_BYTES_SECONDS)
        try:
            return await asyncio.wait_for(receive(), max(0.0, due - time.monotonic()))
        except asyncio.TimeoutError:
            raise ApiError("slow", "the body arrives too slowly") from None

    def _too_large(self) -> ApiError:
        return ApiError("too_large", f"the body is larger than {self._max_body_bytes:,} bytes; send a smaller one")


class _Body:
    """A request's body, counted as it arrives. Reading one that is too large or too slow raises ApiError."""

    def __init__(self, guard: Guard, receive: Receive, headers: _Headers):
        self._taken = self._counted = 0
        self._guard, self._receive = guard, receive
        self._begun = self._last = time.monotonic()
        self._enough = _MIN_BYTES  # bytes that must have arrived before the time limit restarts
        has_one = headers.get("transfer-encoding") or headers.get("content-length") not in ("", "0")
        self.arrived = not has_one
        self._waits = bool(headers.get("expect"))  # the client waits for 100 Continue

    async def receive(self) -> Message:
        if self.arrived:
            return await self._receive()
        message = await self._guard.timely(self._receive, self._begun, self._last)
        self._waits = False
        nbytes = len(message.get("body", b""))
        self._taken += nbytes
        self._counted += self._guard.take(nbytes, self._taken)
        if self._taken >= self._enough:
            self._enough, self._last = self._taken + _MIN_BYTES, time.monotonic()
        self.arrived = not message.get("more_body", False)
        return message

    def leave(self) -> None:
        """Stops counting the body."""
        self._guard.give_back(self._counted)
        self._counted = 0

    async def drain(self) -> None:
        """Reads the rest for a moment: after a close with unread data the client would not see the response."""
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
    """Stops counting a request's body, because the caller counts it from now on."""
    scope[_BODY].leave()


class _Headers:
    """A request's headers as text."""

    def __init__(self, scope: Message):
        self._pairs = [(name.lower().decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"]]

    def all(self, name: str) -> list[str]:
        return [value for other, value in self._pairs if other == name]

    def get(self, name: str) -> str:
        """The first value, or an empty text."""
        return next(iter(self.all(name)), "")


def _with_headers(send: Send, path: str, more: dict[str, str], body: _Body) -> Send:
    """Wraps `send`: drains the body and adds the common headers. Only the page's files may be cached."""
    caching = "no-cache" if path == "/" or path.startswith("/static/") else "no-store"
    added = {**_HEADERS, "cache-control": caching, **more}
    if not more:
        added["cross-origin-resource-policy"] = "same-origin"

    async def send_with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            await body.drain()
            own = [(name, value) for name, value in message.get("headers", ()) if name.lower().decode() not in added]
            headers = [(name.encode(), value.encode("latin-1")) for name, value in added.items()]
            message = {**message, "headers": own + headers}
        await send(message)

    return send_with_headers


async def _refuse(send: Send, error: ApiError, path: str) -> None:
    body = error.body(path)
    headers = {"content-type": "application/json", "content-length": str(len(body)), **error.headers}
    encoded = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status(path), "headers": encoded})
    await send({"type": "http.response.body", "body": body})
