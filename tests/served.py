"""A real server in a process of its own, on a free port of 127.0.0.1, with the demo models."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import httpx

DEMOS = ("--model", "demo", "--edit-model", "demo-edit", "--layered-model", "demo-layered")


class Server(NamedTuple):
    """A server that answers."""

    url: str
    process: subprocess.Popen
    log: list[str]  # what it said on stderr so far

    def client(self, **more) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=120, trust_env=False, **more)


@contextmanager
def serving(
    *flags: object, models: tuple[str, ...] = DEMOS, program: tuple[object, ...] = ("-m", "qwen_image_mlx")
) -> Iterator[Server]:
    """Starts `qwen-image-mlx serve` and ends it."""
    command = [sys.executable, *map(str, program), "serve", "--port", "0", *models, *map(str, flags)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log: list[str] = []
    reader = threading.Thread(target=lambda: log.extend(process.stderr), daemon=True)
    reader.start()
    try:
        url = process.stdout.readline().strip()
        assert url.startswith("http://"), (url, process.wait(10), log)
        yield Server(url, process, log)
    finally:
        process.terminate()
        try:
            process.wait(60)
        finally:
            process.kill()
            reader.join(10)
            process.stdout.close()


def events_of(client: httpx.Client, job: str) -> Iterator[tuple[str, dict]]:
    """(event, data) of a job's stream, to its end."""
    with client.stream("GET", f"/jobs/{job}/events") as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        name = ""
        for line in stream.iter_lines():
            if line.startswith("event: "):
                name = line.removeprefix("event: ")
            elif line.startswith("data: "):
                yield name, json.loads(line.removeprefix("data: "))
