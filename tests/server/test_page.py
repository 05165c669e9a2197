"""The page in a real browser, on a real server with the demo models: all three tabs, at desk and phone width.

`PAGE_PICTURES=docs/page python -m pytest tests/server/test_page.py` keeps an image of every tab in that folder.
"""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from control_files import BLOCKWISE, write_control
from PIL import Image, ImageDraw

from qwen_image_mlx import QwenImagePipeline

playwright = pytest.importorskip("playwright.sync_api", reason="needs the extra [browser]")
Browser, Page, expect = playwright.Browser, playwright.Page, playwright.expect

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on PATH"),
]

DESK, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 844}
PATIENCE = 60_000  # milliseconds that a machine under load may take
PROMPT = "a red circle on a blue background"
TASKS = ("generate", "edit", "decompose")


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server with the demo models and a ControlNet of random values."""
    layers = QwenImagePipeline.from_pretrained("demo").transformer_config.num_layers
    edges = write_control(tmp_path_factory.mktemp("page") / "edges.safetensors", "demo", BLOCKWISE, layers=layers)
    command = [sys.executable, "-m", "qwen_image_mlx", "serve", "--port", "0", "--model", "demo"]
    command += ["--edit-model", "demo-edit", "--layered-model", "demo-layered"]
    command += ["--controlnet", str(edges)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        try:
            assert server.stdout is not None
            yield server.stdout.readline().strip()
        finally:
            server.terminate()
            server.wait(60)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Headless Chromium. Without a preloaded BLAS, which Playwright's own program does not survive."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("LD_PRELOAD", raising=False)
        with playwright.sync_playwright() as driver:
            chromium = driver.chromium.launch(
                executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"], timeout=PATIENCE
            )
            yield chromium
            chromium.close()


@pytest.fixture
def page(browser: Browser, address: str) -> Iterator[Page]:
    """The page, just opened. Whatever it logs or throws fails the test, but for what `page.forgiven` matches."""
    context = browser.new_context(viewport=DESK, color_scheme="light", locale="en-GB", reduced_motion="reduce")
    context.set_default_timeout(PATIENCE)
    expect.set_options(timeout=PATIENCE)
    page = context.new_page()
    page.forgiven = "$^"
    faults: list[str] = []
    page.on("console", lambda message: faults.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.goto(address)
    page.wait_for_selector("html[data-ready]")
    yield page
    context.close()
    assert [fault for fault in faults if not re.search(page.forgiven, fault)] == []


def panel(page: Page, task: str):
    """A task's panel, opened."""
    page.click(f"#tab-{task}")
    return page.locator(f"#panel-{task}")


def fill(panel, **fields: object) -> None:
    """Fills in a form, opened wide enough."""
    panel.locator("details[data-common]").evaluate("node => { node.open = true; }")
    for name, value in fields.items():
        panel.locator(f"[name={name}]").fill(str(value))
    panel.locator("details[data-common]").evaluate("node => { node.open = false; }")


def png(image: Image.Image) -> dict[str, object]:
    """An image as a file that is chosen."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return {"name": "scene.png", "mimeType": "image/png", "buffer": file.getvalue()}


def scene() -> Image.Image:
    """A red circle on blue, as the demo models know them."""
    image = Image.new("RGB", (64, 64), (40, 90, 210))
    ImageDraw.Draw(image).ellipse((16, 14, 46, 44), (220, 40, 40))
    return image


def pixels(page: Page, selector: str) -> np.ndarray:
    """What an image or canvas shows: (height, width, 4), 8 bits."""
    width, height, values = page.locator(selector).evaluate(
        """node => {
          const width = node.naturalWidth ?? node.width, height = node.naturalHeight ?? node.height;
          const canvas = Object.assign(document.createElement("canvas"), { width, height });
          canvas.getContext("2d").drawImage(node, 0, 0);
          return [width, height, [...canvas.getContext("2d").getImageData(0, 0, width, height).data]];
        }"""
    )
    return np.array(values, np.uint8).reshape(height, width, 4)


def drag(page: Page, selector: str, start: tuple[float, float], end: tuple[float, float]) -> None:
    """Drags from one point of an element to another, both as parts of its width and height."""
    page.locator(selector).scroll_into_view_if_needed()
    box = page.locator(selector).bounding_box()
    (x0, y0), (x1, y1) = ((box["x"] + box["width"] * x, box["y"] + box["height"] * y) for x, y in (start, end))
    page.mouse.move(x0, y0)
    page.mouse.down()
    page.mouse.move(x1, y1, steps=8)
    page.mouse.up()


def check_phone_width(page: Page, name: str = "") -> None:
    """Nothing sticks out at the width of a phone; keeps images at both widths if asked to and given a name."""
    folder = os.environ.get("PAGE_PICTURES") if name else None
    for width, viewport in (("desktop", DESK), ("phone", PHONE)):
        page.set_viewport_size(viewport)
        if folder:
            page.evaluate("document.activeElement.blur(), window.scrollTo(0, 0)")
            page.screenshot(path=Path(folder) / f"{name}-{width}.png", full_page=width == "phone")
    wide = page.evaluate(
        """() => [...document.querySelectorAll("body *")].filter((node) => {
          const { right, left, width } = node.getBoundingClientRect();
          return width > 1 && (right > innerWidth + 1 || left < -1) && !node.closest(".frame, .visually-hidden");
        }).map((node) => node.outerHTML.slice(0, 120))"""
    )
    assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
    assert wide == []
    page.set_viewport_size(DESK)


def test_generate_tells_how_far_it_is_and_remembers(page: Page):
    generate = panel(page, "generate")
    fill(generate, prompt=PROMPT, steps=60, seed=11)
    generate.locator("[name=prompt]").press("Control+Enter")
    expect(generate.locator(".progress")).to_contain_text(re.compile(r"Generating, step [1-9]\d* of 60"))
    expect(generate.locator(".progress")).to_contain_text(re.compile(r"\d s left|second left"))
    expect(generate.locator(".progress img")).to_be_visible()
    expect(generate.locator(".result")).to_contain_text("64 × 64 · seed 11")
    first = pixels(page, "#panel-generate .result img")
    assert first[..., 2].mean() > 100  # blue

    fill(generate, prompt="a green square on a white background", steps=4, seed=3)
    generate.locator("[data-go]").click()
    expect(generate.locator(".result")).to_contain_text("seed 3")
    assert not np.array_equal(pixels(page, "#panel-generate .result img"), first)
    page.reload()
    entries = page.locator(".history li")
    expect(entries).to_have_count(2)
    entries.nth(1).get_by_text("Use these settings again").click()
    for name, value in (("prompt", PROMPT), ("steps", "60"), ("seed", "11")):
        expect(generate.locator(f"[name={name}]")).to_have_value(value)
    expect(generate.locator(".result")).to_contain_text("seed 11")
    assert np.array_equal(pixels(page, "#panel-generate .result img"), first)
    with page.expect_download() as download:
        generate.locator("[data-do=download]").click()
    assert download.value.suggested_filename == "a-red-circle-on-a-blue-background-11.png"
    with Image.open(download.value.path()) as saved:
        assert np.array_equal(saved.convert("RGBA"), first)
        assert '"seed": 11' in saved.text["qwen_image_mlx"]
    page.get_by_text("Delete all").click()
    expect(entries).to_have_count(0)
    check_phone_width(page)


def test_a_control_is_shown_as_the_network_sees_it_and_steers(page: Page):
    generate = panel(page, "generate")
    part = generate.locator("[data-control-part]")
    part.evaluate("node => { node.open = true; }")
    part.locator("input[type=file]").set_input_files(png(scene()))
    seen = part.locator("[data-control-view] img")
    expect(seen).to_be_visible()
    plain = seen.get_attribute("src")
    part.locator("[name=control_kind]").select_option("canny")
    expect(seen).not_to_have_attribute("src", plain)
    expect(seen).to_be_visible()
    page.wait_for_function("() => document.querySelector('#panel-generate [data-control-view] img').naturalWidth > 0")
    drawn = pixels(page, "#panel-generate [data-control-view] img")
    assert set(np.unique(drawn[..., :3])) <= {0, 255}
    part.locator("[name=control_scale]").fill("0.5")
    fill(generate, prompt=PROMPT, steps=2, seed=5)
    with page.expect_request("**/jobs") as sent:
        generate.locator("[data-go]").click()
    (control,) = sent.value.post_data_json["controls"]
    assert {name: control[name] for name in ("controlnet", "kind", "scale")} == {
        "controlnet": "edges", "kind": "canny", "scale": 0.5,
    }  # fmt: skip
    assert control["image"].startswith("data:image/png")
    assert {"image", "controlnet", "control_scale"}.isdisjoint(sent.value.post_data_json)
    expect(generate.locator(".result")).to_contain_text("seed 5")
    check_phone_width(page)


def test_an_edit_is_steered_too(page: Page):
    edit = panel(page, "edit")
    part = edit.locator("[data-control-part]")
    part.evaluate("node => { node.open = true; }")
    edit.locator("[data-well=images] input[type=file]").set_input_files(png(scene()))
    part.locator("input[type=file]").set_input_files(png(scene()))
    expect(part.locator("[data-control-view] img")).to_be_visible()
    fill(edit, prompt="make the circle green", steps=2, seed=5)
    with page.expect_request("**/jobs") as sent:
        edit.locator("[data-go]").click()
    body = sent.value.post_data_json
    assert (body["task"], len(body["images"]), body["controls"][0]["controlnet"]) == ("edit", 1, "edges")
    expect(edit.locator(".result")).to_contain_text("seed 5")
    steered = pixels(page, "#panel-edit .result .frame > img:first-child")
    edit.get_by_label("Remove image 1").last.click()
    edit.locator("[data-go]").click()
    expect(edit.locator(".progress")).to_have_count(0)
    page.wait_for_function("() => document.querySelectorAll('.history li').length === 2")
    assert not np.array_equal(pixels(page, "#panel-edit .result .frame > img:first-child"), steered)
    check_phone_width(page)


def test_escape_and_button_cancel(page: Page):
    generate = panel(page, "generate")
    for cancel in (lambda: page.keyboard.press("Escape"), lambda: generate.locator("[data-cancel]").click()):
        fill(generate, prompt=PROMPT, steps=100, num_images=4)
        generate.locator("[data-go]").click()
        expect(generate.locator(".progress")).to_contain_text("Generating, step")
        check_phone_width(page)
        cancel()
        expect(generate.locator("[data-go]")).to_be_visible()
        expect(generate.locator(".progress")).to_have_count(0)
    assert page.locator("#announcement").inner_text() == "Cancelled."
    expect(page.locator(".history")).to_be_hidden()


def test_edit_with_a_mask(page: Page):
    edit = panel(page, "edit")
    edit.locator("[data-go]").click()
    expect(edit.get_by_role("alert")).to_have_text("Choose an image first.")
    other = Image.new("RGB", (48, 64), (240, 240, 240))
    edit.locator("[data-well=images] input[type=file]").set_input_files(
        [png(scene()), {**png(other), "name": "other.png"}]
    )
    names = edit.locator(".images .name")
    expect(names).to_have_text(["scene.png", "other.png"])
    edit.get_by_label("Move image 1 later").click()
    expect(names).to_have_text(["other.png", "scene.png"])
    box = edit.locator(".images li").first.bounding_box()
    drag(page, "#panel-edit .images li:nth-child(2) .shown", (0.5, 0.5), (0.5, -box["height"] / 96))
    expect(names).to_have_text(["scene.png", "other.png"])
    edit.get_by_label("Remove image 2").click()

    edit.get_by_text("Draw a mask").click()
    page.locator("#mask [name=brush]").fill("60")
    drag(page, "#mask canvas", (0.1, 0.9), (0.9, 0.9))
    page.keyboard.press("Control+z")
    drag(page, "#mask canvas", (0.1, 0.2), (0.9, 0.2))
    check_phone_width(page)
    page.get_by_text("Use mask").click()
    fill(edit, prompt="make the circle green", steps=12, seed=2)
    edit.locator("[data-go]").click()
    expect(edit.locator(".result")).to_contain_text("64 × 64 · seed 2")
    before, after = np.array(scene()), pixels(page, "#panel-edit .result .frame > img:first-child")[..., :3]
    changed = (before != after).any(axis=-1)
    assert changed[:20].any()
    assert not changed[32:].any()  # what is not masked comes back bit for bit
    edit.get_by_label("Compare with the original").fill("100")
    expect(edit.locator(".before")).to_be_visible()
    edit.get_by_label("Compare with the original").fill("35")
    assert edit.locator(".compare span").all_inner_texts() == ["Original", "Result"]
    check_phone_width(page, "edit")


def test_layers_are_moved_ordered_edited_and_saved(page: Page):
    layers = panel(page, "decompose")
    layers.locator("input[type=file]").set_input_files(png(scene()))
    fill(layers, prompt=PROMPT, num_layers=2, seed=1)
    layers.locator("[data-go]").click()
    canvas = "#panel-decompose .stack canvas"
    page.locator(canvas).wait_for()
    whole = pixels(page, canvas)
    assert np.abs(whole[..., :3].astype(int) - np.array(scene())).mean() < 25

    drag(page, canvas, (0.48, 0.45), (0.73, 0.7))
    front = layers.locator(".layers li").first
    place = re.fullmatch(r"moved by (\d+), (\d+)", front.locator(".inside .faint").first.inner_text())
    assert place
    assert all(abs(int(part) - 16) <= 1 for part in place.groups())
    moved = pixels(page, canvas)
    assert moved[29, 31, 2] > moved[29, 31, 0]  # where the circle was is blue
    assert moved[45, 47, 0] > moved[45, 47, 2]  # and it is red where it went
    page.locator(canvas).press("Shift+ArrowLeft")
    expect(front).to_contain_text(f"moved by {int(place[1]) - 10}, {place[2]}")
    layers.get_by_label("Show Background").click()
    check_phone_width(page, "layers")
    layers.get_by_label("Show Background").click()

    with page.expect_download() as download:
        layers.get_by_label("Download as PNG").click()
    with Image.open(download.value.path()) as saved:
        assert np.abs(np.array(saved.convert("RGBA")).astype(int) - pixels(page, canvas)).max() <= 2
    with page.expect_download() as download:
        layers.get_by_label("Download as ORA").click()
    with zipfile.ZipFile(download.value.path()) as ora:
        assert ora.read("mimetype") == b"image/openraster"
        assert f'x="{int(place[1]) - 10}"' in ora.read("stack.xml").decode()
    with page.expect_download() as download:
        layers.get_by_label("Download as PSD").click()
    psd = pytest.importorskip("psd_tools").PSDImage.open(download.value.path())
    assert [layer.name for layer in psd] == ["Background", "Layer 1"]

    front.locator("input[type=range]").fill("0")
    faded = pixels(page, canvas)
    front.locator("input[type=range]").fill("100")
    front.get_by_label("Show Layer 1").click()
    assert np.array_equal(pixels(page, canvas), faded)
    front.get_by_label("Show Layer 1").click()
    front.get_by_label("Move Layer 1 to the back").click()
    assert layers.locator(".layers .name").all_inner_texts() == ["Background", "Layer 1"]
    grip = "#panel-decompose .layers li:nth-child(2) .grip"
    top, bottom = (layers.locator(".layers li").nth(place).bounding_box()["y"] for place in (0, 1))
    drag(page, grip, (0.5, 0.5), (0.5, 0.5 + (top - bottom) / page.locator(grip).bounding_box()["height"]))
    assert layers.locator(".layers .name").all_inner_texts() == ["Layer 1", "Background"]

    front.get_by_label("What to change in Layer 1").fill("make the circle green")
    front.get_by_role("button", name="Edit").click()
    front.get_by_text("Undo edit").wait_for()
    edited = pixels(page, canvas)[45, 37]
    assert edited[1] > edited[0]
    front.get_by_text("Undo edit").click()
    assert np.array_equal(pixels(page, canvas)[45, 37], moved[45, 47])


def test_one_layer_is_named_and_marked_and_another_is_laid_in_front(page: Page):
    layers = panel(page, "decompose")
    layers.locator("input[type=file]").set_input_files(png(scene()))
    layers.get_by_text("Draw a mask").click()
    expect(page.locator("#mask-title")).to_have_text("Mark what the layer shows")
    drag(page, "#mask canvas", (0.3, 0.3), (0.6, 0.6))
    page.get_by_text("Use mask").click()
    expect(layers.locator("[name=num_layers]")).to_be_hidden()
    layers.locator("[name=layer_prompt]").fill("the circle")
    fill(layers, steps=2, seed=1)
    with page.expect_request("**/jobs") as sent:
        layers.locator("[data-go]").click()
    body = sent.value.post_data_json
    assert {"prompt", "num_layers", "mask"}.isdisjoint(body)
    assert body["layer_prompt"] == "the circle"
    assert body["layer_mask"].startswith("data:image/png")
    names = layers.locator(".layers .name")
    expect(names).to_have_text(["the circle"])

    adding = layers.locator("[data-add]")
    adding.get_by_role("button", name="Add layer").click()
    expect(layers.locator(".stack .notice")).to_have_text("Name what the layer shows, or mark it.")
    adding.get_by_label("What a new layer shows").fill("the sky")
    adding.get_by_role("button", name="Mark it").click()
    drag(page, "#mask canvas", (0.1, 0.9), (0.9, 0.9))
    page.get_by_text("Use mask").click()
    with page.expect_request("**/jobs") as sent:
        adding.get_by_role("button", name="Add layer").click()
    body = sent.value.post_data_json
    assert (body["layer_prompt"], body["steps"], body["size"]) == ("the sky", 2, "source")
    expect(names).to_have_text(["the sky", "the circle"])
    layers.get_by_label("Show the circle").click()
    whole = pixels(page, "#panel-decompose .stack canvas")
    page.wait_for_timeout(400)  # it is kept shortly after the last change
    page.reload()
    expect(names).to_have_text(["the sky", "the circle"])
    assert np.array_equal(pixels(page, "#panel-decompose .stack canvas"), whole)
    check_phone_width(page, "one-layer")


def test_results_go_on_and_themes_and_tabs_follow_the_keyboard(page: Page):
    generate = panel(page, "generate")
    fill(generate, prompt=PROMPT, seed=4)
    generate.locator("[data-go]").click()
    generate.locator(".result").wait_for()
    check_phone_width(page, "generate")
    for task in ("edit", "decompose"):
        panel(page, "generate").locator(f"[data-do={task}]").click()
        expect(page.locator(f"#panel-{task} .images .name")).to_have_text("a-red-circle-on-a-blue-background-4.png")
    panel(page, "generate").get_by_text("Start from an image").click()
    generate.locator("[data-well=image] input[type=file]").set_input_files(png(scene().crop((0, 0, 64, 48))))
    expect(generate.locator("[data-aspects]")).to_be_hidden()  # the image says which shape
    fill(generate, steps=4)
    with page.expect_request("**/jobs") as sent:
        generate.locator("[data-go]").click()
    fields = sent.value.post_data_json
    assert "aspect" not in fields
    assert fields["strength"] == 0.6
    generate.locator("[data-go]").wait_for()
    page.locator("#tab-decompose").focus()
    for key, task in (("ArrowRight", "generate"), ("ArrowRight", "edit"), ("End", "decompose"), ("Home", "generate")):
        page.keyboard.press(key)
        assert page.evaluate("document.activeElement.id") == f"tab-{task}"
        assert [page.locator(f"#panel-{other}").is_visible() for other in TASKS] == [other == task for other in TASKS]

    def paper() -> int:
        return int(re.search(r"\d+", page.evaluate("getComputedStyle(document.body).backgroundColor"))[0])

    assert paper() > 200
    page.get_by_label("Dark theme").click()
    assert paper() < 60
    page.reload()
    assert paper() < 60
    expect(page.get_by_label("Dark theme")).to_have_attribute("aria-pressed", "true")


def test_a_full_queue_a_token_and_a_lost_server_are_told(page: Page):
    page.forgiven = "Failed to load resource"
    generate = panel(page, "generate")
    fill(generate, prompt=PROMPT, steps=2)
    said = '{"error": {"message": "the queue is full (16 jobs)", "code": "queue_full"}}'
    page.route("**/jobs", lambda route: route.fulfill(status=429, headers={"Retry-After": "2"}, body=said), times=1)
    generate.locator("[data-go]").click()
    expect(generate.get_by_role("alert")).to_contain_text(re.compile(r"The queue is full \(16 jobs\)\. \([12] s\)"))
    generate.get_by_text("Try again").click()  # once it is enabled
    generate.locator(".result").wait_for()

    tokens: list[str | None] = []

    def guarded(route):
        tokens.append(route.request.headers.get("authorization"))
        if tokens[-1] == "Bearer open sesame":
            route.continue_()
        else:
            route.fulfill(status=401, body='{"error": {"message": "a token is needed", "code": "unauthorized"}}')

    page.route("**/jobs**", guarded)
    for token in ("wrong", "open sesame"):
        if token == "wrong":
            generate.locator("[data-go]").click()
        page.locator("#token input").fill(token)
        page.get_by_text("Continue").click()
    generate.locator(".result").wait_for()
    assert tokens[:3] == [None, "Bearer wrong", "Bearer open sesame"]
    page.unroute("**/jobs**")

    page.route("**/jobs", lambda route: route.abort())
    generate.locator("[data-go]").click()
    expect(generate.get_by_role("alert")).to_have_text("The server does not answer. Is it still running?")
    page.route("**/api/qwen-image/config", lambda route: route.abort(), times=1)
    page.reload()
    expect(page.locator("#offline")).to_be_visible()
    check_phone_width(page)
    page.get_by_text("Try again").click()
    expect(page.locator("#offline")).to_be_hidden()


def test_a_lost_stream_is_taken_up_again(page: Page):
    page.forgiven = "Failed to load resource"
    page.route("**/events", lambda route: route.abort(), times=1)
    generate = panel(page, "generate")
    fill(generate, prompt=PROMPT, steps=12)
    generate.locator("[data-go]").click()
    expect(generate.locator(".result")).to_be_visible()


def test_what_is_not_offered_is_said(page: Page, address: str):
    page.route(
        "**/api/qwen-image/config",
        lambda route: route.fulfill(json={"tasks": {"generate": {"model": "demo", "loaded": False}}}),
    )
    page.reload()
    edit = panel(page, "edit")
    message = "This server has no model for this task. Add one to its config.toml."
    expect(edit.get_by_role("alert")).to_have_text(message)
    expect(edit.locator("[data-go]")).to_be_disabled()
    expect(panel(page, "generate").locator("[data-go]")).to_be_enabled()
