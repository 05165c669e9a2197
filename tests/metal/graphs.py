"""Graphs that MLX is asked to evaluate, as it draws them: what a test can see of Metal without Metal."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

# Primitives that move no bytes: views of what is there.
VIEWS = frozenset({
    "Transpose", "Broadcast", "BroadcastAxes", "Squeeze", "ExpandDims", "Slice", "Split", "Reshape", "Flatten",
    "Unflatten", "StopGradient",
})  # fmt: skip
# What a file's bytes may pass through while they are read: their order, if it is not the machine's.
READS = frozenset({"Load"})


def primitives(*outputs: Any) -> list[str]:
    """The names of all operations that evaluating arrays would run, after compilation."""
    arrays = [array for _, array in tree_flatten(list(outputs)) if isinstance(array, mx.array)]
    if not arrays:
        return []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "graph.dot")
        mx.export_to_dot(str(path), *arrays)
        return re.findall(r'label ?="([^"]*)", shape=rectangle', path.read_text())


def kernels(*outputs: Any) -> list[str]:
    """Those of them that are more than a view."""
    return [name for name in primitives(*outputs) if name not in VIEWS]


@contextmanager
def evaluations(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[set[str]]]:
    """The operations of every evaluation that Python asks for meanwhile, one set each.

    `array.item`, NumPy's conversions and `mx.save_safetensors` evaluate inside MLX and are not seen.
    """
    seen: list[set[str]] = []

    def watched(evaluate: Callable[..., None]) -> Callable[..., None]:
        def call(*arrays: Any) -> None:
            seen.append(set(primitives(*arrays)))
            evaluate(*arrays)

        return call

    with monkeypatch.context() as patch:
        for name in ("eval", "async_eval"):
            patch.setattr(mx, name, watched(getattr(mx, name)))
        yield seen


def mixed(seen: list[set[str]]) -> list[set[str]]:
    """Evaluations in which an operation would wait for a file."""
    return [names for names in seen if names & READS and names - READS]
