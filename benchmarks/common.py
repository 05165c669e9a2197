"""What the benchmarks share: taking turns, worker processes, memory, tables. Needs the standard library alone.

Candidates take turns, and a ratio is the median of the ratios of each round, so that a busy machine slows both alike:
read the ratios, not the seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import glob
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

MIB = 2**20
_BLAS = "/usr/lib/*/openblas-pthread/libopenblas.so.0"  # Debian's libopenblas0-pthread
_CALL = "call"


@dataclass
class Table:
    """One table of results; cells are text or numbers."""

    title: str
    columns: Sequence[str]
    rows: list[Sequence[Any]] = field(default_factory=list)

    def print(self) -> None:
        """As Markdown, on stdout."""
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        print(f"\n{self.title}\n")
        for line in lines:
            print(f"| {' | '.join(map(_cell, line))} |", flush=True)


def _cell(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


class Targets(Table):
    """What was measured against what was aimed at."""

    def __init__(self) -> None:
        super().__init__("Targets", ["", "measured", "at most", ""])

    def check(self, name: str, measured: float, limit: float) -> None:
        """Adds a row that says PASS or MISS."""
        self.rows.append((name, measured, limit, "PASS" if measured <= limit else "MISS"))


# The command ----------------------------------------------------------------------------------------------------------


def parser(doc: str | None) -> argparse.ArgumentParser:
    """The options that all scripts have."""
    options = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--json", type=Path, metavar="FILE", help="also write the tables to FILE")
    return options


def finish(tables: Sequence[Table], file: Path | None) -> None:
    """Prints the last table and the machine, and writes all tables to `file`."""
    tables[-1].print()
    machine = describe_machine()
    print("\n" + ", ".join(f"{key} {value}" for key, value in machine.items()))
    if file is not None:
        results = {"machine": machine, "tables": [asdict(table) for table in tables]}
        file.write_text(json.dumps(results, indent=2) + "\n")


def describe_machine() -> dict[str, str]:
    """Date, processor, and versions of what was measured."""
    versions = {}
    for package in ("mlx", "torch", "diffusers"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "none"
    return {
        "date": date.today().isoformat(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": str(os.cpu_count()),
        "BLAS": "OpenBLAS preloaded" if _is_preloaded() else "MLX's own",
        "python": platform.python_version(),
        **versions,
    }


def preload_blas() -> None:
    """Starts the script again with OpenBLAS if it is installed: MLX's CPU wheel for Linux has a slow reference BLAS."""
    found = sorted(glob.glob(_BLAS))
    if found and not _is_preloaded():
        libraries = [os.environ["LD_PRELOAD"]] if os.environ.get("LD_PRELOAD") else []
        os.environ["LD_PRELOAD"] = ":".join([*libraries, found[0]])
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _is_preloaded() -> bool:
    return "openblas" in os.environ.get("LD_PRELOAD", "")


# Time -----------------------------------------------------------------------------------------------------------------


def stopwatch(run: Callable[[], Any], processor: bool = False) -> float:
    """Seconds one call takes: by the clock, or those of all threads of this process on a processor."""
    clock = time.process_time if processor else time.perf_counter
    start = clock()
    run()
    return clock() - start


@contextlib.contextmanager
def count_host_syncs() -> Iterator[Callable[[], int]]:
    """Counts how often Python asks an MLX array for a value, which waits for the device; yields the count so far.

    Sees `item`, `tolist`, conversions to int, float, bool and index, and numpy's array and asarray; not `mx.eval`.
    """
    import mlx.core as mx
    import numpy as np

    count = 0

    def counting(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal count
            count += isinstance(arguments[0], mx.array)
            return original(*arguments, **options)

        return call

    places = [(np, "array"), (np, "asarray")]
    methods = ("item", "tolist", "__int__", "__float__", "__bool__", "__index__")
    places += [(mx.array, name) for name in methods if hasattr(mx.array, name)]
    originals = [getattr(owner, name) for owner, name in places]
    for (owner, name), original in zip(places, originals, strict=True):
        setattr(owner, name, counting(original))
    try:
        yield lambda: count
    finally:
        for (owner, name), original in zip(places, originals, strict=True):
            setattr(owner, name, original)


Seconds = Mapping[str, Sequence[float]]


def take_turns(candidates: Mapping[str, Callable[[], float]], rounds: int, warm_up: int = 1) -> Seconds:
    """The seconds that each candidate says its work took in each round; in a round they run one after another."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(-warm_up, rounds):
        for name, run in candidates.items():
            taken = run()
            if turn >= 0:
                seconds[name].append(taken)
    return seconds


def median_ratio(seconds: Seconds, name: str, base: str) -> float:
    """Median over the rounds of one candidate's time divided by another's in the same round."""
    return statistics.median(a / b for a, b in zip(seconds[name], seconds[base], strict=True))


# Memory ---------------------------------------------------------------------------------------------------------------


def resident() -> int:
    """Bytes of this process in memory; its peak where the system does not tell."""
    return _status("VmRSS") or _max_resident()


def peak_resident() -> int:
    """Most bytes of this process in memory, since `reset_peak_resident` where the system can (Linux)."""
    return _status("VmHWM") or _max_resident()


def reset_peak_resident() -> None:
    """Forgets the peak so far, where the system can."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _status(key: str) -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{key}:")), 0)


def _max_resident() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


# Workers --------------------------------------------------------------------------------------------------------------


class Worker:
    """A script that runs in a process of its own and answers calls, one at a time, in JSON lines.

    Args:
        python: the interpreter.
        script: a script beside this one, which calls `serve`.
        arguments: its command line.
    """

    def __init__(self, python: str | Path, script: str, *arguments: str):
        command = [str(python), str(Path(__file__).with_name(script)), *arguments]
        self._name = " ".join([script, *arguments])
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def call(self, name: str, **arguments: Any) -> Any:
        """What the worker's handler of this name returns."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({_CALL: name, **arguments}) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"{self._name} ended during {name}, with exit code {self._process.wait()}")
        return json.loads(answer)

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()


def serve(handlers: Mapping[str, Callable[..., Any]]) -> None:
    """Answers calls on stdin until it closes; whatever else is printed goes to stderr."""
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        arguments = json.loads(line)
        print(json.dumps(handlers[arguments.pop(_CALL)](**arguments)), file=answers, flush=True)


@contextlib.contextmanager
def serving(*flags: str) -> Iterator[tuple[str, subprocess.Popen]]:
    """A server's address and process, on a free port; it is ended afterwards, unless it is already."""
    command = [sys.executable, "-m", "qwen_image_mlx", "serve", "--port", "0", *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout is not None
        yield process.stdout.readline().strip(), process
    finally:
        process.terminate()
        process.wait()
