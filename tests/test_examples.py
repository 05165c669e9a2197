"""Each program in examples/ runs on a model inside the package, ends well, and leaves what it names."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

pytestmark = pytest.mark.process

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(folder: Path, name: str, *arguments: str) -> list[str]:
    """Runs an example in a folder; its lines on stdout."""
    environment = os.environ | {"PYTHONPATH": str(EXAMPLES.parent)}
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_every_example_is_listed_and_tested():
    programs = {path.name for path in EXAMPLES.glob("*.py")}
    assert set(re.findall(r"\]\((\w+\.py)\)", (EXAMPLES / "README.md").read_text(encoding="utf-8"))) == programs
    assert programs <= set(re.findall(r'"(\w+\.py)"', Path(__file__).read_text(encoding="utf-8")))


def test_a_sweep_is_one_sheet(tmp_path):
    assert run(tmp_path, "sweep.py", "--seeds", "1", "2", "3", "--steps", "4")[-1] == "sheet.png"
    sheet = Image.open(tmp_path / "sheet.png")
    assert sheet.size == (3 * 64, 2 * 64)
    cells = {sheet.crop((x, y, x + 64, y + 64)).tobytes() for x in (0, 64, 128) for y in (0, 64)}
    assert len(cells) == 6


def test_a_worker_thread_generates_and_cancels(tmp_path):
    lines = run(tmp_path, "worker_thread.py")
    assert lines[0].startswith("a red circle on a blue background: circle.png after 12 of 12")
    assert lines[1].startswith("a green square on a white background: ")
    red, _, blue = Image.open(tmp_path / "circle.png").getpixel((32, 32))
    assert red > blue


def test_asyncio_awaits_and_times_out(tmp_path):
    lines = run(tmp_path, "asyncio_app.py")
    assert lines[:2] == ["async-0.png", "async-1.png"]
    assert lines[2:] == ["stopped: a blue star on a black background", "the third image took longer than 0.5 s"]
    assert (tmp_path / "async-0.png").read_bytes() != (tmp_path / "async-1.png").read_bytes()


def test_a_service_answers_with_a_png(tmp_path):
    pytest.importorskip("fastapi")
    pytest.importorskip("httpx")
    code = (
        "import io\nfrom PIL import Image\nfrom fastapi.testclient import TestClient\n"
        "from fastapi_app import create_app\n"
        "with TestClient(create_app('demo')) as client:\n"
        "    good = client.post('/image', json={'prompt': 'a red circle', 'seed': 1, 'steps': 2})\n"
        "    bad = client.post('/image', json={'prompt': 'a red circle', 'steps': 0})\n"
        "print(good.status_code, Image.open(io.BytesIO(good.content)).size, bad.status_code)\n"
    )
    (tmp_path / "client.py").write_text(code)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(EXAMPLES), str(EXAMPLES.parent)])}
    done = subprocess.run([sys.executable, "client.py"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "200 (64, 64) 422"), done.stderr


def test_a_service_without_fastapi_says_what_it_needs(tmp_path):
    (tmp_path / "fastapi.py").write_text("raise ImportError('not here')\n")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(EXAMPLES.parent)])}
    command = [sys.executable, str(EXAMPLES / "fastapi_app.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.strip() == 'fastapi_app.py needs FastAPI and uvicorn: pip install ".[server]" in the checkout'


def test_layers_are_saved_and_moved(tmp_path):
    lines = run(tmp_path, "layers_to_psd.py")
    assert re.fullmatch(r"layers: 2 layers, \d+\.\d dB PSNR against the image", lines[-2])
    saved = {path.name for path in (tmp_path / "layers").iterdir()}
    assert {"layer_0.png", "layer_1.png", "layers.ora", "manifest.json", "moved.png"} <= saved
    assert ("layers.psd" in saved) == ("no PSD" not in lines[0])


def test_the_lesson_teaches_a_colour(tmp_path):
    lines = run(tmp_path, "train_demo_lora.py", "--steps", "20")
    before, after = map(int, re.findall(r"\d+", lines[-2]))
    assert after < before / 2
    assert Image.open(tmp_path / "pink" / "without-and-with.png").size == (128, 64)


def test_the_lesson_keeps_what_is_there(tmp_path):
    (tmp_path / "pink").mkdir()
    command = [sys.executable, str(EXAMPLES / "train_demo_lora.py")]
    environment = os.environ | {"PYTHONPATH": str(EXAMPLES.parent)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.endswith("pink exists already: give a new folder with --output\n")
    assert list((tmp_path / "pink").iterdir()) == []
