"""A group's process: `python -m qwen_image_mlx.doctor GROUP FILE OPTIONS`; the outcome goes to FILE as JSON.

Where something unforeseen happens the process dies as any program would, and its parent tells that from the missing
file.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

from ..errors import GPUError, QwenImageError
from ..runtime.ranks import alone
from .groups import group_named
from .outcome import CRASH, HANG, Outcome


def peak_bytes() -> int:
    """The peak of this process's resident memory or of MLX's arrays: a GPU's buffers may not count as resident."""
    from .measure import highest_peak

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return max(peak if sys.platform == "darwin" else peak << 10, highest_peak())


def outcome_of(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Runs a group; a refusal with a sentence is a result too."""
    from ..gpu import gpu_faults

    start, group = time.perf_counter(), group_named(name)
    if name != "network":
        alone()  # the other ranks run that group only
    try:
        with gpu_faults():
            outcome = import_module(f".{group.module or name}", __package__).run(options).as_dict()
    except GPUError as error:
        outcome = Outcome(findings=[]).as_dict() | {"verdict": "lost", "sentence": str(error)}
    except QwenImageError as error:
        return {"refused": str(error)}
    return outcome | {"seconds": round(time.perf_counter() - start, 3), "peak_bytes": peak_bytes()}


def main(name: str, path: str, options: str) -> None:
    """Runs one group and writes its outcome."""
    if os.environ.get(CRASH) == name:
        os.kill(os.getpid(), signal.SIGKILL)
    while os.environ.get(HANG) == name:
        time.sleep(1)
    found = json.dumps(outcome_of(name, json.loads(options)))
    Path(path).write_text(found, encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
