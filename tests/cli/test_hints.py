"""What is wrong is said in plain words; the command line alone speaks of flags."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path
from typing import get_args

import pytest

import qwen_image_mlx
from qwen_image_mlx.cli.hints import HINTS
from qwen_image_mlx.cli.main import main
from qwen_image_mlx.errors import RequestError
from qwen_image_mlx.names import Fault
from qwen_image_mlx.pipeline import request
from qwen_image_mlx.runtime import session

PACKAGE = Path(qwen_image_mlx.__file__).parent


@pytest.mark.parametrize(("cause", "flags"), [
    ("residency", ["generate", "a fox", "--model", "demo", "--quantize", "8"]),
    ("budget", ["generate", "a fox", "--model", "demo", "--memory", "auto"]),
    ("prompt", ["generate", "--model", "demo"]),
    ("group size", ["generate", "a fox", "--model", "demo", "--group-size", "32"]),
    ("lightning", ["generate", "a fox", "--model", "demo", "--lightning", "8"]),
])  # fmt: skip
def test_a_fault_has_its_cure_in_flags(cause, flags, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("qwen_image_mlx.runtime.memory.usable_memory", lambda: 1000)
    assert main(flags) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert line.endswith(f"; {HINTS[cause]}")


def test_a_size_is_called_by_its_flag(capsys):
    assert main(["edit", "x", "--image", "x.png", "--size", "big"]) == 2
    assert "--size is 'big'" in capsys.readouterr().err
    with pytest.raises(RequestError, match=r"^size is 'big'"):
        request.parse_size("big")


def test_every_cause_has_its_hint():
    """The causes that the package's errors name, read from their calls."""
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.keyword) and node.arg == "cause":
                found |= {part.value for part in ast.walk(node.value) if isinstance(part, ast.Constant)}
    assert len(found) > 8
    assert {cause for cause in found if not cause.startswith("fault: ")} == {
        cause for cause in HINTS if not cause.startswith("fault: ")
    }
    assert {f"fault: {fault}" for fault in get_args(Fault)} >= {c for c in HINTS if c.startswith("fault: ")}


@pytest.mark.parametrize("module", [session, request])
def test_the_rooms_that_all_front_ends_share_speak_of_no_flag(module):
    texts = [node.value for node in ast.walk(ast.parse(inspect.getsource(module)))
             if isinstance(node, ast.Constant) and isinstance(node.value, str)]  # fmt: skip
    assert len(texts) > 10
    assert not [text for text in texts if "--" in text]
