"""What a type checker sees of the package, as an app's author has it."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

import qwen_image_mlx
from qwen_image_mlx import names
from qwen_image_mlx.gpu import _FAULTS
from qwen_image_mlx.layers.formats import FORMATS
from qwen_image_mlx.models import nn
from qwen_image_mlx.pipeline.decomposition import SIZES
from qwen_image_mlx.pipeline.parameters import DTYPES, RNGS, TASKS
from qwen_image_mlx.registry import STREAMABLE
from qwen_image_mlx.variants import ASPECT_SIZES, CAPTION_TEMPLATES, LORA_MODES, NAMED_SIZES

ROOT = Path(__file__).parents[2]


def strict(tmp_path: Path, text: str) -> str:
    """What mypy says of a script."""
    script = tmp_path / "app.py"
    script.write_text(text, encoding="utf-8")
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports", "silent", "--config-file", "", str(script)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout


@pytest.mark.process
def test_the_documents_scripts_are_strict(tmp_path):
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))]
    blocks = [block for text in texts for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL)]
    assert len(blocks) == 8
    everything = f"from qwen_image_mlx import {', '.join(qwen_image_mlx.__all__)}\n"
    assert "Success" in strict(tmp_path, "\n".join([everything, *blocks]))


@pytest.mark.process
@pytest.mark.parametrize("name", ["sweep", "worker_thread", "asyncio_app", "layers_to_psd", "train_demo_lora"])
def test_the_examples_are_strict(tmp_path, name):
    text = (ROOT / "examples" / f"{name}.py").read_text(encoding="utf-8")
    assert "Success" in strict(tmp_path, text), strict(tmp_path, text)


@pytest.mark.process
def test_a_wrong_word_is_seen(tmp_path):
    text = "from qwen_image_mlx import QwenImagePipeline\nQwenImagePipeline.from_pretrained('model', dtype='int8')\n"
    assert "incompatible type \"Literal['int8']\"" in strict(tmp_path, text)


def test_the_public_names_are_the_table_s():
    assert sorted(qwen_image_mlx.__all__) == sorted(["__version__", *qwen_image_mlx._PUBLIC])


@pytest.mark.parametrize(("words", "table"), [
    (names.Dtype, DTYPES), (names.Rng, RNGS), (names.Task, TASKS), (names.Aspect, ASPECT_SIZES),
    (names.CaptionLanguage, CAPTION_TEMPLATES), (names.NamedSize, NAMED_SIZES), (names.LayersSize, SIZES),
    (names.LayersFormat, FORMATS), (names.LoRAMode, LORA_MODES), (names.Streamable, STREAMABLE),
    (names.Fault, {row.fault for row in _FAULTS}),
], ids=[
    "dtype", "rng", "task", "aspect", "language", "size", "layers", "format", "lora", "streamable", "fault",
])  # fmt: skip
def test_words_are_those_of_the_tables(words, table):
    assert set(get_args(words)) == set(table)


def test_the_stub_of_mlx_s_networks_has_the_names_there_are():
    stub = ast.parse((ROOT / "qwen_image_mlx" / "models" / "nn.pyi").read_text(encoding="utf-8"))
    parts = {node.name: node for node in stub.body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
    assert parts.keys() == {name for name in vars(nn) if not name.startswith("_")}
    for name, part in parts.items():
        for method in getattr(part, "body", ()):
            if isinstance(part, ast.ClassDef) and isinstance(method, ast.FunctionDef):
                there = inspect.signature(getattr(getattr(nn, name), method.name)).parameters
                assert [a.arg for a in (*method.args.args, *method.args.kwonlyargs)] == [
                    n for n, p in there.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
                ], (name, method.name)


def test_what_is_ignored_says_which_error_and_why():
    ignored = [line for path in (ROOT / "qwen_image_mlx").rglob("*.py") for line in path.read_text().splitlines()]
    assert [
        line for line in ignored if "type: ignore" in line and not re.search(r"type: ignore\[[a-z-]+\]  # \w+", line)
    ] == []
