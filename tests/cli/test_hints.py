"""What is wrong is said in plain words; the command line alone speaks of flags."""

from __future__ import annotations

import ast
import inspect

import pytest

from qwen_image_mlx.cli.hints import HINTS
from qwen_image_mlx.cli.main import main
from qwen_image_mlx.errors import RequestError
from qwen_image_mlx.pipeline import request
from qwen_image_mlx.runtime import session


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
        request.parsed_size("big")


@pytest.mark.parametrize("module", [session, request])
def test_the_rooms_that_all_front_ends_share_speak_of_no_flag(module):
    texts = [node.value for node in ast.walk(ast.parse(inspect.getsource(module)))
             if isinstance(node, ast.Constant) and isinstance(node.value, str)]  # fmt: skip
    assert len(texts) > 10
    assert not [text for text in texts if "--" in text]
