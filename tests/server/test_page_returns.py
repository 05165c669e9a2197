"""The page after a cut, a reload, a closed tab and a restart of its server: nothing that was begun or made is lost."""

from __future__ import annotations

import random
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import numpy as np
import pytest

pytest.importorskip("playwright.sync_api", reason="needs the extra [browser]")

from test_page import CHROMIUM, DESK, PROMPT, browser, expect, fill, panel, pixels, png, scene  # noqa: F401

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on PATH"),
]

PATIENCE = 150_000  # milliseconds that a machine under load may take
LONG = 120  # steps: more seconds than a reload


class Line:
    """Forwards connections to a server, until it is cut; it can be mended, and lead to another server."""

    def __init__(self) -> None:
        self.port = 0  # of the server
        self.is_cut = False
        self._open: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Breaks every connection, and lets none through."""
        self.is_cut = True
        for end in list(self._open):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def mend(self) -> None:
        """Lets connections through again."""
        self.is_cut = False

    def close(self) -> None:
        """Ends it."""
        self.cut()
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                try:
                    if self.is_cut:
                        raise ConnectionError
                    far = socket.create_connection(("127.0.0.1", self.port))
                except OSError:
                    near.close()
                    continue
                self._open |= {near, far}
                for ends in ((near, far), (far, near)):
                    threading.Thread(target=self._carry, args=ends, daemon=True).start()

    def _carry(self, one: socket.socket, other: socket.socket) -> None:
        with suppress(OSError):
            while data := one.recv(1 << 16):
                other.sendall(data)
        for end in (one, other):
            self._open.discard(end)
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()


@contextmanager
def served() -> Iterator[int]:
    """The port of a server that takes many steps."""
    command = [sys.executable, "-m", "qwen_image_mlx", "serve", "--port", "0", "--model", "demo", "--max-steps", "1000"]
    command += ["--edit-model", "demo-edit", "--layered-model", "demo-layered"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        try:
            yield int(server.stdout.readline().strip().rpartition(":")[2])
        finally:
            server.terminate()
            server.wait(60)


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with served() as found:
        yield found


@pytest.fixture
def line(port) -> Iterator[Line]:
    line = Line()
    line.port = int(port)
    yield line
    line.close()


@pytest.fixture
def context(browser, line):  # noqa: F811
    context = browser.new_context(viewport=DESK, color_scheme="light", locale="en-GB", reduced_motion="reduce")
    context.set_default_timeout(PATIENCE)
    expect.set_options(timeout=PATIENCE)
    yield context
    context.close()


def opened(context, line, task: str = "generate"):
    """The page in a new tab, and a task's panel."""
    page = context.new_page()
    page.goto(line.url)
    page.wait_for_selector("html[data-ready]")
    return page, panel(page, task)


def begin(shown, steps: int = LONG, **fields: object) -> None:
    """Begins to generate, and waits until it is under way."""
    fill(shown, **{"prompt": PROMPT, "steps": steps, "seed": 7} | fields)
    shown.locator("[data-go]").click()
    expect(shown.locator(".progress")).to_contain_text(re.compile(r"step \d+ of"))


def step_of(shown) -> int:
    return int(re.search(r"step (\d+) of", shown.locator(".progress").inner_text())[1])


def reload(page) -> None:
    page.reload()
    page.wait_for_selector("html[data-ready]")


@pytest.mark.parametrize("seconds", [8, pytest.param(60, marks=pytest.mark.nightly)])
def test_a_cut_costs_nothing(context, line, seconds):
    page, generate = opened(context, line)
    begin(generate, steps=300 if seconds < 10 else 1000)  # more seconds than the cut
    line.cut()
    expect(generate.locator(".progress")).to_contain_text("Connection lost, trying again. The job is still running.")
    time.sleep(seconds)
    line.mend()
    expect(generate.locator(".result")).to_be_visible()
    expect(page.locator(".history li")).to_have_count(1)
    expect(generate.get_by_role("alert")).to_be_hidden()


def test_a_reload_at_any_step_finds_job_and_form(context, line):
    page, generate = opened(context, line)
    begin(generate, negative_prompt="blurry")
    for _ in range(2):
        time.sleep(random.random())
        reached = step_of(generate)
        reload(page)
        assert generate.locator("[name=prompt]").input_value() == PROMPT
        assert generate.locator("[name=negative_prompt]").input_value() == "blurry"
        expect(generate.locator("[data-cancel]")).to_be_visible()
        expect(generate.locator(".progress")).to_contain_text(re.compile(r"step \d+ of"))
        assert step_of(generate) >= reached
    expect(generate.locator(".result")).to_contain_text("seed 7")
    expect(page.locator(".history li")).to_have_count(1)
    reload(page)
    expect(generate.locator(".result")).to_contain_text("seed 7")
    expect(page.locator(".history li")).to_have_count(1)


def test_a_job_that_is_cancelled_after_a_reload_is_cancelled(context, line):
    page, generate = opened(context, line)
    begin(generate)
    reload(page)
    expect(generate.locator("[data-cancel]")).to_be_enabled()
    generate.locator("[data-cancel]").click()
    expect(generate.locator("[data-go]")).to_be_visible()
    expect(page.locator("#announcement")).to_have_text("Cancelled.")
    reload(page)
    expect(generate.locator("[data-cancel]")).to_be_hidden()


def test_two_tabs_keep_their_own_jobs_and_a_closed_one_s_is_taken_up(context, line):
    first, one = opened(context, line)
    begin(one, prompt="a red circle")
    second, other = opened(context, line)
    expect(other.locator("[data-cancel]")).to_be_hidden()  # the first tab's job is its own
    fill(other, prompt="a blue square", steps=20)
    other.locator("[data-go]").click()
    expect(other.locator(".progress")).to_contain_text("Waiting")
    reload(first)
    reload(second)
    assert (one.locator("[name=prompt]").input_value(), other.locator("[name=prompt]").input_value()) == (
        "a red circle", "a blue square",
    )  # fmt: skip
    first.close()
    third, again = opened(context, line)
    assert again.locator("[name=prompt]").input_value() == "a red circle"
    expect(again.locator(".result")).to_contain_text("seed 7")
    expect(other.locator(".result")).to_be_visible()
    expect(second.locator(".history li")).to_have_count(2)
    expect(third.locator(".history li")).to_have_count(2)


@pytest.mark.parametrize("reloads", [False, True])
def test_a_restarted_server_is_said_and_the_settings_are_there(context, line, reloads):
    with served() as first:
        line.port = first
        page, generate = opened(context, line)
        begin(generate)
        line.cut()
    with served() as second:
        line.port = second
        if reloads:  # else the page may hear of it, and say it, before it is reloaded
            page.goto("about:blank")
        line.mend()
        if reloads:
            page.goto(line.url)
            page.wait_for_selector("html[data-ready]")
        expect(generate.get_by_role("alert")).to_contain_text("The server was restarted")
        assert generate.locator("[name=prompt]").input_value() == PROMPT
        fill(generate, steps=2)
        generate.get_by_text("Try again").click()
        expect(generate.locator(".result")).to_contain_text("seed 7")


def test_a_job_that_something_else_cancels_is_said_aloud(context, line):
    page, generate = opened(context, line)
    with page.expect_request("**/jobs/*/events") as asked:
        begin(generate)
    page.evaluate("path => fetch(path, {method: 'DELETE'})", asked.value.url.removesuffix("/events"))
    expect(generate.get_by_role("alert")).to_contain_text("The job was cancelled from outside this page.")
    expect(generate.get_by_text("Try again")).to_be_enabled()


CANVAS = "#panel-decompose canvas"


def decomposed(context, line, steps=4):
    """A page on which an image was just decomposed, and its panel."""
    page, layers = opened(context, line, "decompose")
    layers.locator("input[type=file]").set_input_files(png(scene()))
    fill(layers, prompt=PROMPT, steps=steps)
    layers.locator("[data-go]").click()
    layers.locator(".layers li").first.wait_for()
    return page, layers


def test_layers_and_what_was_done_to_them_outlive_a_reload(context, line):
    page, layers = decomposed(context, line)
    untouched = pixels(page, CANVAS)
    layers.locator(CANVAS.split()[1]).focus()
    for _ in range(3):
        page.keyboard.press("Shift+ArrowRight")
    layers.locator("[data-down]").first.click()
    moved = pixels(page, CANVAS)
    page.wait_for_timeout(1000)
    reload(page)
    layers.locator(".layers li").first.wait_for()
    assert not np.array_equal(untouched, moved)
    assert np.array_equal(pixels(page, CANVAS), moved)

    layers.locator(".layers .name").nth(1).click()
    layers.get_by_text("Reset position").locator("visible=true").click()
    layers.locator("[data-back]").click()
    assert np.array_equal(pixels(page, CANVAS), moved)

    words = layers.locator(".layers .words input").locator("visible=true")
    words.fill("make it blue")
    words.press("Enter")
    layers.get_by_text("Undo edit").locator("visible=true").wait_for()
    edited = pixels(page, CANVAS)
    page.wait_for_timeout(1000)
    page.get_by_role("tab").first.click()
    page.get_by_text("Use these settings again").click()
    layers.locator(".layers li").first.wait_for()
    assert np.array_equal(pixels(page, CANVAS), edited)
    layers.locator(".layers .name").nth(1).click()
    layers.get_by_text("Undo edit").locator("visible=true").click()
    assert np.array_equal(pixels(page, CANVAS), moved)


@pytest.mark.parametrize("way", ["reload", "close"])
def test_layer_work_is_there_when_the_page_goes_while_a_layer_is_edited(context, line, way):
    page, layers = decomposed(context, line)
    layers.locator(CANVAS.split()[1]).focus()
    for _ in range(3):
        page.keyboard.press("Shift+ArrowRight")
    moved = pixels(page, CANVAS)
    page.wait_for_timeout(1000)
    layers.locator(".layers .name").nth(1).click()
    words = layers.locator(".layers .words input").locator("visible=true")
    words.fill("make it blue")
    with page.expect_request("**/jobs/*/events"):
        words.press("Enter")
    if way == "reload":
        reload(page)
    else:
        page.close()
        page, layers = opened(context, line, "decompose")
        if not layers.locator(".layers li").count():
            page.get_by_text("Use these settings again").click()
    layers.locator(".layers li").first.wait_for()
    assert layers.locator(".layers li").count() > 1
    page.wait_for_timeout(3000)  # in which an edit that went on comes back
    undo = layers.get_by_text("Undo edit").locator("visible=true")
    layers.locator(".layers .name").nth(1).click()
    if undo.count():
        undo.click()
    assert np.array_equal(pixels(page, CANVAS), moved)


def test_a_layer_that_is_being_made_arrives_after_a_reload(context, line):
    page, layers = decomposed(context, line, steps=60)
    names = layers.locator(".layers .name")
    count = names.count()
    page.wait_for_timeout(1000)
    adding = layers.locator("[data-add]")
    adding.get_by_label("What a new layer shows").fill("the sky")
    with page.expect_request("**/jobs/*/events"):
        adding.get_by_role("button", name="Add layer").click()
    reload(page)
    expect(names).to_have_count(count + 1)
    expect(names.first).to_have_text("the sky")


def test_what_is_forgotten_can_be_brought_back(context, line):
    page, generate = opened(context, line)
    for number in (1, 2):
        fill(generate, prompt=PROMPT, steps=2, seed=number)
        generate.locator("[data-go]").click()
        expect(page.locator(".history li")).to_have_count(number)
    page.locator("#delete").click()
    expect(page.locator(".history li")).to_have_count(0)
    expect(page.locator("#deleted")).to_contain_text("2 entries deleted.")
    page.get_by_text("Undo", exact=True).locator("visible=true").click()
    expect(page.locator(".history li")).to_have_count(2)
    page.get_by_text("Delete", exact=True).last.click()
    expect(page.locator(".history li")).to_have_count(1)
    page.get_by_text("Undo", exact=True).locator("visible=true").click()
    expect(page.locator(".history li")).to_have_count(2)
    page.get_by_text("Use these settings again").last.click()
    expect(generate.locator(".result")).to_contain_text("seed 1")
