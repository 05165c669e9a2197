"""What tests of the command line share."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from functools import partial


def heeding(number: int) -> Callable[[], object]:
    """What a child process calls first, so that it does not ignore a signal that this one ignores, as under `nohup`."""
    return partial(signal.signal, number, signal.SIG_DFL)


def error_line(result: tuple[int, list[str], str]) -> str:
    """The one line of a refusal; asserts that it is one, and that nothing went to stdout.

    Args:
        result: exit code, lines of stdout, stderr.
    """
    code, out, err = result
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert (code, out, len(lines)) == (2, [], 1), (code, out, err)
    assert "Traceback" not in err
    return lines[0]


def stages(result: tuple[int, list[str], str]) -> set[str]:
    """What a command with `--json` reports that it does: "load text_encoder", "encode prompts", "denoise"."""
    events = [json.loads(line) for line in result[1]]
    return {f"{e['stage']} {e['detail']}".rstrip() for e in events if e["event"] == "progress"}
