"""Connections that ask for nothing, and requests that are too many, keep nobody else out."""

from __future__ import annotations

import asyncio
import json
import socket

import pytest
import uvicorn
from served import serving
from uvicorn.server import ServerState

from qwen_image_mlx.server import connections, guard
from qwen_image_mlx.server.api_errors import ApiError
from qwen_image_mlx.server.connections import Connection
from qwen_image_mlx.server.guard import Guard

pytestmark = pytest.mark.process

HEAD = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"


def request(method: str, path: str, *headers: tuple[bytes, bytes]) -> dict:
    return {
        "type": "http", "method": method, "path": path, "query_string": b"", "headers": [(b"host", b"here"), *headers],
    }  # fmt: skip


class App:
    """Answers what is quick and holds the rest until it is let go."""

    def __init__(self):
        self.held, self.let_go = 0, asyncio.Event()

    async def __call__(self, scope, receive, send):
        if scope["path"] != "/health" and scope["method"] != "DELETE":
            self.held += 1
            await self.let_go.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})


async def asked(app, scope) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of an answer."""
    sent = []

    async def send(message):
        sent.append(message)

    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}

    await app(scope, receive, send)
    headers = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], headers, sent[1]["body"]


def guarded(app, **more) -> Guard:
    return Guard(app, is_own_host="here".__eq__, max_body_bytes=1 << 20, **more)


@pytest.mark.parametrize(("path", "most"), [
    ("/jobs/1/events", guard._STREAMS_AT_ONCE), ("/jobs/1", guard._REQUESTS_AT_ONCE),
])  # fmt: skip
def test_requests_and_streams_are_bounded_and_health_and_cancelling_are_not(path, most):
    async def check():
        inner = App()
        app = guarded(inner)
        tasks = [asyncio.create_task(asked(app, request("GET", path))) for _ in range(most)]
        while inner.held < most:
            await asyncio.sleep(0)
        status, headers, body = await asyncio.wait_for(asked(app, request("GET", path)), 5)
        assert (status, json.loads(body)["error"]["code"], headers["retry-after"]) == (503, "busy", "5")
        for method, quick in (("GET", "/health"), ("DELETE", "/jobs/1")):
            assert (await asyncio.wait_for(asked(app, request(method, quick)), 5))[0] == 200
        inner.let_go.set()
        assert {status for status, _, _ in await asyncio.gather(*tasks)} == {200}
        assert (await asked(app, request("GET", path)))[0] == 200

    asyncio.run(check())


class Reader:
    """Reads a body whole, and answers when it is let go."""

    def __init__(self):
        self.let_go = asyncio.Event()

    async def __call__(self, scope, receive, send):
        try:
            while (await receive()).get("more_body"):
                pass
        except ApiError as error:
            await send({"type": "http.response.start", "status": error.status("/"), "headers": []})
        else:
            await self.let_go.wait()
            await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})


async def posted(app, *pieces: bytes, ends: bool = True) -> int:
    """The status that a body in pieces gets; one that does not end goes on with nothing."""
    left, sent = list(pieces), []

    async def receive():
        if not left:
            await asyncio.Event().wait()
        piece = left.pop(0)
        return {"type": "http.request", "body": piece, "more_body": bool(left) or not ends}

    async def send(message):
        sent.append(message)

    await app(request("POST", "/x", (b"transfer-encoding", b"chunked")), receive, send)
    return sent[0]["status"]


def test_unfinished_large_bodies_keep_no_small_one_out_and_are_not_waited_for(monkeypatch):
    monkeypatch.setattr(guard, "_DRAINED_SECONDS", 0.01)
    monkeypatch.setattr(guard, "_MIN_BYTES_SECONDS", 0.4)
    monkeypatch.setattr(guard, "_SMALL", 1000)

    async def check():
        inner = Reader()
        app = guarded(inner)
        large = [asyncio.create_task(posted(app, bytes(1 << 20), ends=False)) for _ in range(4)]
        await asyncio.sleep(0.1)
        inner.let_go.set()
        assert await posted(app, bytes(500), bytes(500)) == 200
        assert await posted(app, bytes(100_000)) == 503
        assert await asyncio.wait_for(asyncio.gather(*large), 5) == [408] * 4
        assert await posted(app, bytes(1 << 20)) == 200

    asyncio.run(check())


def test_a_body_that_comes_steadily_is_waited_for(monkeypatch):
    monkeypatch.setattr(guard, "_MIN_BYTES_SECONDS", 0.4)
    monkeypatch.setattr(guard, "_MIN_BYTES", 100)
    monkeypatch.setattr(guard, "_DRAINED_SECONDS", 0.01)

    async def status_of(size: int) -> int:
        left = 8

        async def receive():
            nonlocal left
            await asyncio.sleep(0.1)
            left -= 1
            return {"type": "http.request", "body": bytes(size), "more_body": left > 0}

        sent, inner = [], Reader()
        inner.let_go.set()

        async def send(message):
            sent.append(message)

        await guarded(inner)(request("POST", "/x", (b"transfer-encoding", b"chunked")), receive, send)
        return sent[0]["status"]

    assert asyncio.run(status_of(50)) == 200
    assert asyncio.run(status_of(5)) == 408


def test_silent_connections_leave_room_to_others():
    with serving() as server, server.client() as api:
        address = ("127.0.0.1", int(server.url.rpartition(":")[2]))
        silent = [socket.create_connection(address) for _ in range(300)]
        try:
            assert api.get("/health").status_code == 200
            assert api.post("/api/qwen-image/generate", json={"prompt": "x", "steps": 1}).status_code == 200
        finally:
            for connection in silent:
                connection.close()


@pytest.mark.parametrize("begun", [b"", HEAD, HEAD + b"\r\n" + HEAD], ids=["silent", "half", "second"])
def test_a_header_that_does_not_come_is_not_waited_for(monkeypatch, begun):
    monkeypatch.setattr(connections, "_HEADER_SECONDS", 0.3)

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})

    async def check():
        config, state = uvicorn.Config(app, http=Connection, lifespan="off", log_config=None), ServerState()
        config.load()
        made = await asyncio.get_running_loop().create_server(
            lambda: Connection(config=config, server_state=state, app_state={}), "127.0.0.1", 0
        )
        async with made:
            reader, writer = await asyncio.open_connection(*made.sockets[0].getsockname())
            for part in begun.split(b"\r\n\r\n"):
                writer.write(part + b"\r\n\r\n" * (part != begun.split(b"\r\n\r\n")[-1]))
                await asyncio.sleep(0.1)
            try:
                answer = await asyncio.wait_for(reader.read(), 3)
            except ConnectionResetError:
                answer = b""
            assert answer.count(b"200 OK") == begun.count(b"\r\n\r\n")
            assert not state.connections
            writer.close()

    asyncio.run(check())


def test_data_that_is_not_http_is_answered_in_the_api_s_form(server):
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) as connection:
        connection.sendall(b"GET / HTTP/9.9\r\n\r\n")
        head, _, body = connection.makefile("rb").read().partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400")
    assert json.loads(body)["error"]["code"] == "malformed"
