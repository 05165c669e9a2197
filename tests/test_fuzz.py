"""scripts/fuzz.py: a small run of it without a fault, and that it finds one."""

from __future__ import annotations

import importlib.util
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.fuzz

SCRIPT = Path(__file__).parents[1] / "scripts" / "fuzz.py"


@pytest.fixture(scope="module")
def fuzz():
    spec = importlib.util.spec_from_file_location("fuzz", SCRIPT)
    module = sys.modules["fuzz"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def sound(fuzz, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    fuzz.prepare(folder)
    return folder


def test_damaged_files_are_refused_in_one_sentence():
    done = subprocess.run(
        [sys.executable, SCRIPT, "--count", "64", "--seed", "0"], capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": str(SCRIPT.parents[1])},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert "64 inputs, 0 faults" in done.stdout


def test_sound_files_are_read(fuzz, sound, monkeypatch, capsys):
    monkeypatch.chdir(sound)
    monkeypatch.setattr("qwen_image_mlx.runtime.batch.generate_all", lambda *_, **__: iter(()))
    for name, kind in fuzz.KINDS.items():
        for file in kind.files:
            assert kind.read(sound, Path(file)) not in (1, 2), (name, file)


class Pipe(list):
    """Both ends of a pipe."""

    def __init__(self, *messages):
        super().__init__()
        self.messages = [*messages, None]

    def recv(self):
        return self.messages.pop(0)

    def send(self, message):
        self.append(message)


def test_what_is_not_refused_in_one_sentence_is_a_fault(fuzz, tmp_path, monkeypatch):
    def broken(folder, file):
        raise ZeroDivisionError

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fuzz.os, "dup2", lambda *_: None)
    monkeypatch.setattr(fuzz.tempfile, "tempdir", None)
    monkeypatch.setitem(fuzz.KINDS, "broken", fuzz.Kind(("a",), broken))
    monkeypatch.setitem(fuzz.KINDS, "sound", fuzz.Kind(("a",), lambda folder, file: 0))
    monkeypatch.setitem(fuzz.KINDS, "refused", fuzz.Kind(("a",), lambda folder, file: 2))
    pipe = Pipe(("broken", "a"), ("sound", "a"), ("refused", "a"))
    fuzz.serve(str(tmp_path), pipe)
    ready, found, fine, refused = pipe
    assert ready is None
    assert "ZeroDivisionError" in found[0]
    assert (fine[:2], refused[:2]) == (("", True), ("", False))


def test_a_seed_gives_the_same_inputs(fuzz, sound):
    for kind in fuzz.KINDS.values():
        for file in kind.files:
            data = (sound / file).read_bytes()
            once, again = (fuzz.damaged(data, file, random.Random("1")) for _ in range(2))
            assert once == again, file
