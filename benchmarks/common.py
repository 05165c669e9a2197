"""What the benchmarks share: fair timing, peak memory of fresh processes, tables, and mflux beside us.

Every figure is a ratio or a median of one run, in which the candidates take turns.
"""

from __future__ import annotations

import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

MFLUX = "mflux==0.24.0"
# What its modules import on the way to the Qwen classes; its own requirements would pull CUDA on Linux.
MFLUX_NEEDS = ("platformdirs", "piexif", "toml", "filelock")
_BLAS = Path("/usr/lib/x86_64-linux-gnu/openblas-pthread/libopenblas.so.0")


def preload_blas() -> None:
    """Starts the script again with OpenBLAS, if it is installed: MLX's CPU wheel carries a reference BLAS."""
    if _BLAS.exists() and "openblas" not in os.environ.get("LD_PRELOAD", ""):
        environment = {**os.environ, "LD_PRELOAD": str(_BLAS), "OMP_WAIT_POLICY": "passive"}
        os.execve(sys.executable, [sys.executable, *sys.argv], environment)


def add_mflux() -> bool:
    """Makes mflux importable, from a folder of its own outside the repository; says so where it cannot be had."""
    folder = Path(tempfile.gettempdir()) / "qwen-image-mlx-benchmarks" / MFLUX
    if not (folder / "mflux").is_dir():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
        if subprocess.run([*pip, MFLUX, *MFLUX_NEEDS], check=False).returncode:
            print("mflux cannot be installed here; its column is missing")
            return False
    sys.path.append(str(folder))  # behind everything: only mflux itself comes from there
    importlib.invalidate_caches()
    return True


def take_turns(candidates: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of each candidate over rounds in which they run one after another; the first round warms up."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(rounds + 1):
        for name, run in candidates.items():
            start = time.perf_counter()
            run()
            if turn:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def in_fresh_process(script: str, *arguments: str) -> dict[str, Any]:
    """What a script, run anew with arguments, prints as JSON on its last line."""
    done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A Markdown table."""
    print(f"\n{title}\n")
    print("| " + " | ".join(columns) + " |")
    print("|" + "---|" * len(columns))
    for row in rows:
        print("| " + " | ".join(f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row) + " |")


def verdict(name: str, value: float, limit: float) -> tuple[str, float, float, str]:
    """A row for a table of targets."""
    return name, value, limit, "met" if value <= limit else "MISSED"
