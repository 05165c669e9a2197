"""What is meant to break the server gets a sentence and a 4xx, and the server keeps generating."""

from __future__ import annotations

import asyncio
import base64
import http.client
import io
import json
import socket
import struct
import threading
import time
import zlib

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from PIL import Image
from served import serving
from starlette.requests import Request

from qwen_image_mlx.server import bodies
from qwen_image_mlx.server.api_errors import ApiError
from qwen_image_mlx.server.bodies import read_body
from qwen_image_mlx.server.schema import GenerateBody, parse_object

pytestmark = pytest.mark.process

TOKEN = "a-token-of-some-length"
HEADERS = {"authorization": f"Bearer {TOKEN}"}
GENERATE, EDIT, DECOMPOSE = (f"/api/qwen-image/{task}" for task in ("generate", "edit", "decompose"))
COMPOSE, CAPTION = "/api/qwen-image/compose", "/api/qwen-image/caption"
MAX_BODY = 64 << 20
SETTINGS = settings(max_examples=8, deadline=None, derandomize=True, database=None, phases=[Phase.generate],
                    suppress_health_check=list(HealthCheck))  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    file = tmp_path_factory.mktemp("token") / "token"
    file.write_text(TOKEN)
    file.chmod(0o600)
    flags = ("--max-steps", 2, "--max-pixels", 128 * 128, "--token-file", file, "--allow-origin", "https://app.example")
    with serving(*flags) as running:
        yield running


@pytest.fixture
def api(server):
    with server.client(headers=HEADERS) as client:
        yield client


def encoded(data: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def file_of(size=(64, 64), kind: str = "png", mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    Image.new(mode, size, 90).save(file, kind)
    return file.getvalue()


def png_claiming(width: int, height: int) -> bytes:
    """A PNG whose header promises more than its few bytes hold."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)
    data = zlib.compress(bytes(10_000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def text_bomb() -> bytes:
    image = file_of()
    text = b"a\0\0" + zlib.compress(bytes(200 << 20), 9)
    chunk = struct.pack(">I", len(text)) + b"zTXt" + text + struct.pack(">I", zlib.crc32(b"zTXt" + text))
    return image[:33] + chunk + image[33:]


def transparent() -> bytes:
    file = io.BytesIO()
    Image.new("RGBA", (64, 64), (1, 2, 3, 0)).save(file, "png")
    return file.getvalue()


GOOD = encoded(file_of())
P = {"prompt": "x", "steps": 1}
# (path, body): each is refused for a reason of its own.
JSON_BODIES = [
    (GENERATE, b""),
    (GENERATE, b"{"),
    (GENERATE, b"null"),
    (GENERATE, b"[]"),
    (GENERATE, b'"prompt"'),
    (GENERATE, b"\xff\xfe\x00"),
    (GENERATE, b'{"prompt": "\xff"}'),
    (GENERATE, b"[" * 200_000),
    (GENERATE, b'{"prompt":' * 50_000),
    (GENERATE, b'{"prompt": "\\ud800"}'),
    (GENERATE, b'{"\\ud800": 1, "prompt": "x"}'),
    (GENERATE, b'{"prompt": "x", "cfg_scale": NaN}'),
    (GENERATE, b'{"prompt": "x", "cfg_scale": 1e999}'),
    (GENERATE, b'{"prompt": "x", "seed": 1' + b"0" * 400 + b"}"),
    (GENERATE, b'{"prompt": "x", "seed": 1' + b"0" * 10_000 + b"}"),
    (GENERATE, {}),
    (GENERATE, {"prompt": None}),
    (GENERATE, {"prompt": ["x"]}),
    (GENERATE, {"prompt": {"$ne": ""}}),
    (GENERATE, {"prompt": "x" * 9000}),
    (GENERATE, {"prompt": "a\0b"}),
    (GENERATE, P | {"negative_prompt": "a\0b"}),
    (GENERATE, P | {"steps": "1"}),
    (GENERATE, P | {"steps": 1.5}),
    (GENERATE, P | {"steps": True}),
    (GENERATE, P | {"steps": 0}),
    (GENERATE, P | {"steps": 3}),
    (GENERATE, P | {"steps": 10**9}),
    (GENERATE, P | {"seed": -1}),
    (GENERATE, P | {"seed": 2**64}),
    (GENERATE, P | {"num_images": 5}),
    (GENERATE, P | {"num_images": 0}),
    (GENERATE, P | {"width": 64}),
    (GENERATE, P | {"width": 63, "height": 64}),
    (GENERATE, P | {"width": 4096, "height": 4096}),
    (GENERATE, P | {"width": 64, "height": 64, "aspect": "1:1"}),
    (GENERATE, P | {"aspect": "5:1"}),
    (GENERATE, P | {"rng": "system"}),
    (GENERATE, P | {"mask": GOOD}),
    (GENERATE, P | {"strength": 0.5}),
    (GENERATE, P | {"image": GOOD, "strength": 0}),
    (GENERATE, P | {"model": "/etc"}),
    (GENERATE, P | {"loras": ["/etc/passwd"]}),
    (GENERATE, P | {"output": "/tmp/x.png"}),
    (GENERATE, P | {"image": "/etc/passwd"}),
    (GENERATE, P | {"image": "file:///etc/passwd"}),
    (GENERATE, P | {"image": "http://127.0.0.1:1/x.png"}),
    (GENERATE, P | {"image": "../../x.png"}),
    (GENERATE, P | {"image": "data:image/png;base64,"}),
    (GENERATE, P | {"image": "data:image/png;base64,!!!!"}),
    (GENERATE, P | {"image": "data:image/png;base64,AAA"}),
    (GENERATE, P | {"image": "data:text/html;base64,PGI+"}),
    (GENERATE, P | {"image": encoded(b"<svg xmlns='http://www.w3.org/2000/svg'/>")}),
    (GENERATE, P | {"image": encoded(file_of(kind="gif", mode="L"))}),
    (GENERATE, P | {"image": encoded(file_of(kind="tiff"))}),
    (GENERATE, P | {"image": encoded(file_of(kind="bmp"), "jpeg")}),
    (GENERATE, P | {"image": encoded(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n")}),
    (GENERATE, P | {"image": encoded(file_of()[:-30])}),
    (GENERATE, P | {"image": encoded(file_of((64, 64), "jpeg")[:200])}),
    (GENERATE, P | {"image": encoded(png_claiming(30_000, 30_000))}),
    (GENERATE, P | {"image": encoded(png_claiming(9_000, 9_000))}),
    (GENERATE, P | {"image": encoded(file_of((9_000, 9_000), mode="1"))}),
    (GENERATE, P | {"image": encoded(png_claiming(0, 0))}),
    (GENERATE, P | {"image": encoded(png_claiming(2**31 - 1, 1))}),
    (GENERATE, P | {"image": encoded(text_bomb())}),
    (EDIT, P),
    (EDIT, P | {"images": []}),
    (EDIT, P | {"images": [GOOD] * 11}),
    (EDIT, P | {"images": GOOD}),
    (EDIT, P | {"images": [GOOD], "image": GOOD}),
    (EDIT, P | {"images": [GOOD, 7]}),
    (EDIT, P | {"image": GOOD, "size": "../x"}),
    (EDIT, P | {"image": GOOD, "size": "16384x16384"}),
    (EDIT, P | {"image": GOOD, "size": "63x63"}),
    (EDIT, P | {"image": GOOD, "mask": encoded(file_of((32, 32), mode="L"))}),
    (EDIT, P | {"image": GOOD, "mask": encoded(file_of(mode="1"))}),
    (EDIT, P | {"image": GOOD, "mask_padding": 5}),
    (EDIT, P | {"image": GOOD, "reference_pixels": 1}),
    (DECOMPOSE, {}),
    (DECOMPOSE, {"image": GOOD, "num_layers": 99}),
    (DECOMPOSE, {"image": GOOD, "resolution": 640}),
    (DECOMPOSE, {"image": GOOD, "size": "1mp"}),
    (DECOMPOSE, {"image": GOOD, "steps": 50}),
    (DECOMPOSE, {"image": GOOD, "steps": -1}),
    (DECOMPOSE, {"image": encoded(transparent()), "steps": 1, "prompt": "x"}),
    (CAPTION, {"image": GOOD, "language": "xx"}),
    (CAPTION, {"image": GOOD}),
    (COMPOSE, {"layers": []}),
    (COMPOSE, {"layers": [{"image": GOOD}] * 65}),
    (COMPOSE, {"layers": [{"image": GOOD, "scale": 1000}]}),
    (COMPOSE, {"layers": [{"image": GOOD, "scale": 0}]}),
    (COMPOSE, {"layers": [{"image": GOOD, "x": 10**9}]}),
    (COMPOSE, {"layers": [{"image": GOOD, "name": "a\x07"}]}),
    (COMPOSE, {"layers": [{"image": GOOD, "file": "/etc/passwd"}]}),
    (COMPOSE, {"layers": [{"image": encoded(png_claiming(9_000, 7_000))}] * 2}),
    (COMPOSE, {"layers": [{"image": GOOD}], "format": "exe"}),
    ("/jobs", {}),
    ("/jobs", P),
    ("/jobs", P | {"task": "load"}),
    ("/jobs", P | {"task": ["generate"]}),
    ("/jobs", P | {"task": "generate", "image": GOOD[:-50]}),
    ("/jobs", {"task": "edit", "prompt": "x"}),
    ("/jobs", P | {"task": "generate", "image": encoded(file_of()[:-30])}),
    ("/jobs", {"task": "decompose", "image": encoded(file_of()[:-30])}),
    ("/jobs", {"task": "caption", "image": encoded(file_of()[:-30])}),
    ("/models/load", {"task": "caption"}),
    ("/models/load", {"task": "/etc"}),
    ("/models/unload", {"model": "demo"}),
    (GENERATE, P | {f"key {number}": 1 for number in range(50)}),
    (COMPOSE, {"layers": [{"image": GOOD} | {str(number): 1 for number in range(2000)}]}),
    (COMPOSE, {"layers": [7]}),
    ("/v1/images/generations", {"prompt": "x", "response_format": "url"}),
    ("/v1/images/generations", {"prompt": "x", "stream": True}),
    ("/v1/images/edits", {"prompt": "x", "image": "https://example.org/a.png"}),
]  # fmt: skip


def assert_refused(answer: httpx.Response) -> None:
    assert 400 <= answer.status_code < 500, (answer.status_code, answer.text)
    error = answer.json()["error"]
    assert error["message"] == " ".join(error["message"].split())
    assert error["code"]
    for secret in ("/work", "/tmp", "/home", "site-packages", "Traceback", ".py", TOKEN):
        assert secret not in answer.text


def assert_generates(api: httpx.Client) -> None:
    answer = api.post(GENERATE, json=P)
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(("path", "body"), JSON_BODIES, ids=range(len(JSON_BODIES)))
def test_a_hostile_body_is_refused(api, path, body):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    assert_refused(api.post(path, content=content, headers={"content-type": "application/json"}))


MANY = [
    json.dumps(P | {f"key {number}": number for number in range(500_000)}).encode(),
    json.dumps(P | {"image": [0] * 2_000_000}).encode(),
    json.dumps({"layers": [[[[0]] * 30_000]]}).encode(),
]


@pytest.mark.parametrize("body", MANY, ids=["keys", "list", "deep"])
def test_what_has_very_many_parts_is_refused_before_they_are_looked_at(body):
    begun = time.process_time()
    with pytest.raises(ApiError, match="more fields or entries than any request needs"):
        parse_object(body)
    assert time.process_time() - begun < 0.5


def test_a_body_is_parsed_while_others_are_answered(monkeypatch):
    """The event loop keeps running while a large body is parsed and checked."""
    threads = []

    def slow(data):
        threads.append(threading.current_thread())
        return {"prompt": "x"}

    async def check():
        async def receive():
            return {"type": "http.request", "body": b"{}", "more_body": False}

        scope = {"type": "http", "headers": [(b"content-type", b"application/json")]}
        assert (await read_body(Request(scope, receive), GenerateBody)).prompt == "x"

    monkeypatch.setattr(bodies, "parse_object", slow)
    asyncio.run(check())
    assert threads != [threading.main_thread()]


def test_there_are_enough_of_them():
    assert len({(path, str(body)) for path, body in JSON_BODIES}) == len(JSON_BODIES) >= 60


@pytest.mark.parametrize(("method", "path", "headers", "content", "status"), [
    ("POST", GENERATE, {"content-type": "text/plain"}, b"{}", 415),
    ("POST", GENERATE, {}, b"{}", 415),
    ("POST", GENERATE, {"content-type": "multipart/form-data"}, b"--x", 400),
    ("POST", GENERATE, {"content-type": "multipart/form-data; boundary=x"}, b"--x\r\nnonsense", 422),
    ("POST", GENERATE, {"content-type": "multipart/form-data; boundary=x"}, b"", 422),
    ("GET", GENERATE, {}, b"", 405),
    ("DELETE", "/health", {}, b"", 405),
    ("GET", "/jobs/..%2f..%2fetc%2fpasswd", {}, b"", 404),
    ("GET", "/jobs/x/events", {}, b"", 404),
    ("GET", "/static/..%2f..%2f..%2f..%2fetc/passwd", {}, b"", 404),
    ("GET", "/static/../app.py", {}, b"", 404),
    ("GET", "/static/%00", {}, b"", 404),
    ("GET", "/docs", {}, b"", 404),
    ("GET", "/v1/models/..%2f..%2fetc", {}, b"", 404),
    ("GET", "/jobs/1", {"authorization": ""}, b"", 401),
    ("GET", "/jobs/1", {"authorization": f"Basic {TOKEN}"}, b"", 401),
    ("GET", "/jobs/1", {"authorization": f"Bearer {TOKEN}x"}, b"", 401),
    ("GET", "/jobs/1", {"authorization": f"Bearer {TOKEN[:-1]}"}, b"", 401),
    ("GET", "/jobs/1", {"authorization": b"Bearer \xff\xfe"}, b"", 401),
    ("GET", "/openapi.json", {"authorization": ""}, b"", 401),
    ("GET", "/static/../jobs", {"authorization": ""}, b"", 404),
    ("GET", "/health", {"host": "evil.example"}, b"", 421),
    ("GET", "/health", {"host": "127.0.0.1.evil.example"}, b"", 421),
    ("GET", "/health", {"host": "localhost@evil.example"}, b"", 400),
    ("GET", "/health", {"host": ""}, b"", 400),
    ("GET", "/health", {"origin": "https://evil.example"}, b"", 403),
    ("GET", "/health", {"origin": "evil://localhost"}, b"", 403),
    ("GET", "/health", {"origin": "http://evil://localhost"}, b"", 403),
    ("GET", "/health", {"origin": "localhost"}, b"", 403),
    ("GET", "/health", {"origin": ""}, b"", 403),
    ("GET", "/health", {"origin": "http://localhost", "Origin": "http://localhost"}, b"", 400),
    ("POST", GENERATE, {"origin": "null"}, b"", 403),
    ("OPTIONS", GENERATE, {"origin": "https://evil.example", "access-control-request-method": "POST"}, b"", 403),
    ("POST", GENERATE, {"content-length": str(MAX_BODY + 1), "expect": "100-continue"}, b"", 413),
])  # fmt: skip
def test_a_hostile_request_is_refused(server, method, path, headers, content, status):
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=30)
    connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
    usual = {"host": "localhost", "authorization": f"Bearer {TOKEN}", "content-length": str(len(content))}
    for name, value in (usual | headers).items():
        connection.putheader(name, value)
    connection.endheaders(content)
    answer = connection.getresponse()
    assert_refused(httpx.Response(answer.status, content=answer.read()))
    assert answer.status == status
    connection.close()


def test_a_body_that_is_longer_than_it_may_be_is_cut_off(api):
    def pieces():
        for _ in range(MAX_BODY // (1 << 20) + 2):
            yield bytes(1 << 20)

    answer = api.post(GENERATE, content=pieces(), headers={"content-type": "application/json"})
    assert_refused(answer)
    assert answer.status_code == 413


def test_garbage_and_endless_requests_do_not_block_generation(server, api):
    address = ("127.0.0.1", int(server.url.rpartition(":")[2]))
    head = f"POST {GENERATE} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {TOKEN}\r\n".encode()
    raw = [b"\x16\x03\x01\x02\x00\x01\x00", b"GET / HTTP/9.9\r\n\r\n", b"A" * 100_000, head]
    head += b"Content-Type: application/json\r\n"
    raw += [head + b"Content-Length: 50\r\n\r\n{"] * 3 + [head + b"Transfer-Encoding: chunked\r\n\r\nZZZ\r\n"]
    connections = [socket.create_connection(address) for _ in raw]
    for connection, data in zip(connections, raw, strict=True):
        connection.sendall(data)
    assert_generates(api)
    for connection in connections:
        connection.close()
    assert_generates(api)


def test_answers_carry_what_keeps_a_browser_in_bounds(api):
    for path in ("/", "/health", "/nothing"):
        headers = api.get(path).headers
        assert "default-src 'self'" in headers["content-security-policy"]
        assert (headers["x-content-type-options"], headers["referrer-policy"]) == ("nosniff", "no-referrer")
        assert "access-control-allow-origin" not in headers
        assert headers["cache-control"] == ("no-cache" if path == "/" else "no-store")


def test_an_allowed_origin_and_the_server_s_own_may_ask(api, server):
    app = {"origin": "https://app.example"}
    answer = api.options(GENERATE, headers=app | {"access-control-request-method": "POST"})
    assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (204, "https://app.example")
    assert api.get("/health", headers=app).headers["access-control-allow-origin"] == "https://app.example"
    assert api.get("/health", headers={"origin": server.url}).status_code == 200


@pytest.mark.parametrize("asked", ["bytes=0-3", "bytes=9999999-", "bytes=x", "pages=1-2"])
@pytest.mark.parametrize("path", ["/", "/static/app.js"])
def test_the_page_s_files_are_given_whole(api, path, asked):
    whole, answer = api.get(path), api.get(path, headers={"range": asked})
    assert (answer.status_code, answer.content) == (200, whole.content)
    assert answer.headers["accept-ranges"] == "none"


def test_without_a_token_only_the_page_and_health_answer(server):
    with server.client() as stranger:
        for path in ("/health", "/", "/static/app.js"):
            assert stranger.get(path).status_code == 200
        for path in ("/api/qwen-image/config", "/v1/models", "/jobs/1", "/openapi.json"):
            assert stranger.get(path).status_code == 401


def test_our_own_document_leads_to_no_fault(server, api):
    """Requests made from the OpenAPI document, valid and not: never a 5xx, and no answer without its form."""
    document = api.get("/openapi.json").json()
    schema = schemathesis.openapi.from_dict(document)
    seen = []
    for result in schema.get_all_operations():
        operation = result.ok()
        cases = operation.as_strategy()
        if operation.body:
            cases |= operation.as_strategy(schemathesis.GenerationMode.NEGATIVE)

        @SETTINGS
        @given(case=cases)
        def check(case):
            answer = case.call(base_url=server.url, headers=HEADERS, timeout=60)
            seen.append((case.operation.label, answer.status_code))
            assert answer.status_code < 500, (case.operation.label, case.body, answer.text)
            if answer.status_code >= 400:
                assert answer.json()["error"]["code"]

        check()
    assert len({label for label, _ in seen}) == sum(len(path) for path in document["paths"].values())
    assert len(seen) >= 60
    assert_generates(api)


def test_it_still_generates_and_nothing_is_stuck(api, server):
    assert_generates(api)
    end = time.monotonic() + 20
    while api.get("/health").json()["queue"] != {"running": 0, "waiting": 0}:
        assert time.monotonic() < end
        time.sleep(0.05)
    assert server.process.poll() is None
    log = "".join(server.log)
    assert "Traceback" not in log, log[log.index("Traceback") - 500 :]
    assert TOKEN not in log
