"""Runs groups of checks, each in a process of its own, and gathers their results. Importable without MLX."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .._version import __version__
from ..errors import CheckpointError
from ..files import temporary_folder
from .groups import Group
from .outcome import Outcome
from .report import VERSION, scrub, summarize

OnGroup = Callable[[str, Mapping[str, Any]], None]


def examine(
    groups: Sequence[Group], env: Mapping[str, str], options: Mapping[str, Any], on_group: OnGroup
) -> dict[str, Any]:
    """Runs the groups one after another.

    Args:
        groups: the groups, in order.
        env: environment variables of the groups' processes, in addition to this process's.
        options: passed to the groups.
        on_group: called with a group's name and outcome as soon as it has ended.

    Returns:
        The report, described in `report.py`.

    Raises:
        CheckpointError: a group refused its input, such as a golden file, with this sentence.
    """
    found: dict[str, Any] = {}
    for group in groups:
        outcome = run_group(group, env, options)
        if "refused" in outcome:
            raise CheckpointError(outcome["refused"])
        found[group.name] = scrub(outcome)
        on_group(group.name, found[group.name])
    report = {
        "version": VERSION,
        "program": __version__,
        "created": time.strftime("%Y-%m-%d", time.gmtime()),
        "variables": scrub(dict(env)),
        "groups": found,
    }
    return summarize(report)


def run_group(group: Group, env: Mapping[str, str], options: Mapping[str, Any]) -> dict[str, Any]:
    """One group's outcome; a process that dies or hangs is an outcome with the verdict "lost".

    The process's files are in a folder that is removed when it ends, in any case.
    """
    with temporary_folder(_place(group)) as folder:
        out, errors = folder / "outcome.json", folder / "stderr.txt"
        arguments = json.dumps({**options, "folder": str(folder)})
        command = [sys.executable, "-m", __package__, group.name, str(out), arguments]
        with errors.open("wb") as stderr:
            process = subprocess.Popen(
                command, env={**os.environ, **env}, stdin=subprocess.DEVNULL, stdout=stderr, stderr=stderr
            )
            try:
                code = process.wait(group.limit)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                process.kill()
                process.wait()
        if code == 0 and out.is_file():
            return json.loads(out.read_text(encoding="utf-8"))
        return _lost(group, code, errors.read_text(encoding="utf-8", errors="replace"))


def _place(group: Group) -> Path | None:
    """The place of a group's folder: the disk is measured in the hub's cache, if that exists."""
    home = os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface"
    cache = Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub")
    return cache if group.name == "disk" and os.access(cache, os.W_OK) else None


def _lost(group: Group, code: int | None, stderr: str) -> dict[str, Any]:
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    if code is None:
        how = f"it did not end within {group.limit:.0f} seconds"
    elif code < 0:
        how = f"its process was ended by {signal.Signals(-code).name}"
    else:
        how = f"its process ended with {code}"
    why = f" ({lines[-1][:300]})" if lines else ""
    outcome = Outcome()
    outcome.find("lost", f"no result, {how}{why}; run `doctor --only {group.name}` again with other programs closed")
    return outcome.as_dict() | {"stderr": lines[-20:]}
