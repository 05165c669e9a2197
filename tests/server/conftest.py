"""One server for the tests of a module."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
from served import Server, serving


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """One for all tests of a module; what it may be asked for is cheap."""
    with serving("--max-steps", 60, "--max-pixels", 128 * 128, "--queue", 4, "--grace", "3s") as running:
        yield running


@pytest.fixture
def api(server) -> Iterator[httpx.Client]:
    """A client of it."""
    with server.client() as client:
        yield client
