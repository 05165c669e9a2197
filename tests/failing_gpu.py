"""`python tests/failing_gpu.py FILE ARGUMENTS` is `python -m qwen_image_mlx ARGUMENTS` on a GPU that fails.

When FILE appears, the next evaluation takes it away and fails with the text in it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx

from qwen_image_mlx.cli.main import main


def failing(evaluate: Callable[..., Any], file: Path) -> Callable[..., Any]:
    """`mx.eval`, which fails with the text that a file has."""

    def evaluated(*arrays: Any) -> Any:
        if file.exists():
            text = file.read_text()
            file.unlink()
            raise RuntimeError(text)
        return evaluate(*arrays)

    return evaluated


if __name__ == "__main__":
    mx.eval = failing(mx.eval, Path(sys.argv[1]))
    sys.exit(main(sys.argv[2:]))
