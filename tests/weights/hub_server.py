"""A real HTTP server on 127.0.0.1 that answers as the hub does for models; serves folders the test gives it.

It knows the model API (with file sizes), `resolve` with the hub's headers, the redirect of large files to another host,
and Range. Every request is recorded. Faults are set by the test and matched by a part of the path.
"""

from __future__ import annotations

import hashlib
import json
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


@dataclass(frozen=True)
class Request:
    """What came in: `range` is the Range header, `authorization` the Authorization header, None where absent."""

    method: str
    path: str
    range: str | None
    authorization: str | None


@dataclass
class Fault:
    """What goes wrong where the path contains `match`: an error status, a body cut short, or no answer at all."""

    match: str
    status: int = 0
    code: str = ""
    cut_after: int | None = None
    stall: bool = False
    times: int | None = None


@dataclass(frozen=True)
class _File:
    content: bytes
    is_large: bool

    @property
    def etag(self) -> str:
        git = b"blob %d\0" % len(self.content)
        return (
            hashlib.sha256(self.content).hexdigest() if self.is_large else hashlib.sha1(git + self.content).hexdigest()
        )


class HubServer:
    """The server, running while its `with` block does.

    Attributes:
        url: What HF_ENDPOINT is to be.
        requests: All requests so far, oldest first; clear it to look at a part of a test.
        faults: Faults now in force.
        lies: File name to the size that the API lists for it instead of the true one.
    """

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.lies: dict[str, int] = {}
        self._models: dict[str, dict[str, str]] = {}
        self._commits: dict[str, dict[str, _File]] = {}
        self._closing = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    def __enter__(self) -> HubServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop listening: new connections are refused and open ones dropped at their next request."""
        if not self._closing.is_set():
            self._closing.set()
            self._server.shutdown()
            self._server.server_close()

    def add(self, repo: str, folder: Path, revision: str = "main") -> str:
        """Publish a folder's present content as a branch or tag; returns the commit."""
        files = {
            path.relative_to(folder).as_posix(): _File(path.read_bytes(), path.suffix == ".safetensors")
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        commit = hashlib.sha1(repr([(name, file.etag) for name, file in files.items()]).encode()).hexdigest()
        self._commits[commit] = files
        self._models.setdefault(repo, {})[revision] = commit
        return commit

    def fail(self, match: str, status: int, code: str = "") -> None:
        """Answer with an error status, and the hub's X-Error-Code if given."""
        self.faults.append(Fault(match, status=status, code=code))

    def cut(self, match: str, after: int, times: int | None = 1) -> None:
        """Drop the connection after so many bytes of the body, as many times as said (None: always)."""
        self.faults.append(Fault(match, cut_after=after, times=times))

    def stall(self, match: str) -> None:
        """Take the request and never answer."""
        self.faults.append(Fault(match, stall=True))

    def paths(self, method: str | None = None) -> list[str]:
        """Paths of the requests so far, of one method or all."""
        return [request.path for request in self.requests if method in (None, request.method)]

    def fault(self, path: str, has_body: bool) -> Fault | None:
        for fault in self.faults:
            if fault.match in path and fault.times != 0 and (has_body or fault.cut_after is None):
                if fault.times is not None:
                    fault.times -= 1
                return fault
        return None

    def find(self, repo: str, revision: str) -> tuple[str, dict[str, _File]] | str:
        """The commit and its files, or the hub's code for why not."""
        if repo not in self._models:
            return "RepoNotFound"
        commit = self._models[repo].get(revision, revision)
        return (commit, self._commits[commit]) if commit in self._commits else "RevisionNotFound"

    @property
    def is_closed(self) -> bool:
        return self._closing.is_set()

    def wait_for_close(self) -> None:
        self._closing.wait()


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self) -> None:
        if self.hub.is_closed:
            self.close_connection = True
            return
        path = unquote(urlsplit(self.path).path)
        headers = self.headers
        self.hub.requests.append(Request(self.command, path, headers.get("Range"), headers.get("Authorization")))
        parts = path.strip("/").split("/")
        fault = self.hub.fault(path, self.command == "GET")
        if fault and fault.stall:
            self.hub.wait_for_close()
            self.close_connection = True
        elif fault and fault.status:
            self._send(fault.status, b"{}", {"X-Error-Code": fault.code} if fault.code else {})
        elif path.startswith("/api/models/"):
            self._answer_model(parts[2:])
        elif "resolve" in parts:
            at = parts.index("resolve")
            self._answer_file("/".join(parts[:at]), parts[at + 1], "/".join(parts[at + 2 :]), fault, redirect=True)
        elif parts[0] == "cdn":
            self._answer_file("/".join(parts[1:3]), parts[3], "/".join(parts[4:]), fault, redirect=False)
        else:
            self._send(404, b"")

    def _answer_model(self, parts: list[str]) -> None:
        repo, _, revision = "/".join(parts).partition("/revision/")
        found = self.hub.find(repo, revision or "main")
        if isinstance(found, str):
            self._send(404, b"{}", {"X-Error-Code": found})
            return
        commit, files = found
        siblings = [
            {
                "rfilename": name,
                "size": (size := self.hub.lies.get(name, len(file.content))),
                "blobId": "0" * 40 if file.is_large else file.etag,
                **({"lfs": {"sha256": file.etag, "size": size, "pointerSize": 134}} if file.is_large else {}),
            }
            for name, file in files.items()
        ]
        self._send(200, json.dumps({"id": repo, "modelId": repo, "sha": commit, "siblings": siblings}).encode())

    def _answer_file(self, repo: str, revision: str, name: str, fault: Fault | None, *, redirect: bool) -> None:
        found = self.hub.find(repo, revision)
        if isinstance(found, str) or name not in found[1]:
            self._send(404, b"", {"X-Error-Code": found if isinstance(found, str) else "EntryNotFound"})
            return
        commit, file = found[0], found[1][name]
        headers = {"ETag": f'"{file.etag}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if file.is_large and redirect:
            # another host name, as the hub's CDN is
            headers |= {"X-Linked-Etag": f'"{file.etag}"', "X-Linked-Size": str(len(file.content))}
            headers["Location"] = f"http://localhost:{self.hub.port}/cdn/{repo}/{commit}/{name}"
            self._send(302, b"", headers)
            return
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(file.content) - 1}/{len(file.content)}"
        self._send(206 if start else 200, file.content[start:], headers, fault.cut_after if fault else None)

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None, cut: int | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:cut])
            self.close_connection = cut is not None
