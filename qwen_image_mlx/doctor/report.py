"""A report: its contents, its text for people, and the difference of two. Importable without MLX.

A report is JSON: `version`, `program` (of this package), `created` (a date), `variables` (those that were set for the
groups), `groups` (for each `verdict`, `sentence`, `findings`, `figures`, `seconds`, `peak_bytes`), `verdict` and `exit`
of the whole, and `issue`, the body of a GitHub issue. It names no user, no host and no path.
"""

from __future__ import annotations

import getpass
import json
import re
import socket
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .outcome import VERDICTS, amount

VERSION = 1
EXITS = {"ok": 0, "odd": 1, "slow": 1, "lost": 1, "wrong": 2}
_WORDS = {"ok": "ok", "odd": "odd", "slow": "slow", "lost": "LOST", "wrong": "WRONG"}
_CONCLUSIONS = {0: "sound", 1: "slow or odd", 2: "wrong numbers"}
_PATH = re.compile(r"""(?<![\w<.:/])(?:~|[A-Za-z]:)?(?:[/\\][^\s'"`,;:()<>/\\]+){2,}[/\\]?""")
_MIN_CHANGE = 0.1  # share of a figure that is worth a line
_MIN_ERROR = 1e-5  # change of a relative error; less is rounding


def scrub(value: Any) -> Any:
    """A JSON value without absolute paths, the user's name and the host's."""
    if isinstance(value, Mapping):
        return {key: scrub(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [scrub(part) for part in value]
    if not isinstance(value, str):
        return value
    value = _PATH.sub("<path>", value)
    for name, stand_in in _names().items():
        value = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", stand_in, value)
    return value


@cache
def _names() -> dict[str, str]:
    """Words that identify the user and the host, except for very short ones."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # no entry for this user
        user = ""
    found = {user: "<user>", Path.home().name: "<user>", socket.gethostname(): "<host>"}
    return {name: stand_in for name, stand_in in found.items() if len(name) > 2 and name not in ("root", "localhost")}


def summarize(report: dict[str, Any]) -> dict[str, Any]:
    """The report with its overall verdict and the issue's body."""
    worst = max((group["verdict"] for group in report["groups"].values()), key=VERDICTS.index, default="ok")
    code = EXITS[worst]
    report = report | {"verdict": _CONCLUSIONS[code], "exit": code}
    return report | {"issue": issue(report)}


def verdict_line(name: str, group: Mapping[str, Any]) -> str:
    """One group's verdict for people: its name, a word, a sentence."""
    return f"{name:8} {_WORDS[group['verdict']]:5} {group['sentence']}"


def other_findings(report: Mapping[str, Any]) -> list[str]:
    """The findings that are not in the groups' verdicts, a line each."""
    return [
        f"{name:8} {_WORDS[found['verdict']]:5} {found['sentence']}"
        for name, group in report["groups"].items()
        for found in group["findings"]
        if found["sentence"] != group["sentence"]
    ]


def figures(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """All figures below a JSON value, by dotted names."""
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from figures(part, f"{name}.{key}" if name else key)
    else:
        yield name, value


def figure_text(name: str, value: Any) -> str:
    """A figure for people, in the unit its name ends with."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    if name.endswith("_bytes"):
        return amount(value)
    for unit, form in _UNITS.items():
        if name.endswith(unit):
            return form.format(value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


_UNITS = {
    "_bytes": "{}", "_gbs": "{:.3g} GB/s", "_gflops": "{:.4g} GFLOP/s", "_s": "{:.3g} s", "_error": "{:.1e}",
    "_ratio": "{:.2f}",
}  # fmt: skip


def figure_lines(report: Mapping[str, Any]) -> list[str]:
    """All figures as lines for people, group by group."""
    lines = []
    for name, group in report["groups"].items():
        took = f"{group['seconds']:.1f} s, at most {amount(group['peak_bytes'])}" if "seconds" in group else ""
        lines += ["", f"{name} {took}".rstrip()]
        lines += [f"  {key:44} {figure_text(key, value)}" for key, value in figures(group["figures"])]
    return lines


def issue(report: Mapping[str, Any]) -> str:
    """The body of a GitHub issue, in Markdown: verdicts first, then every figure."""
    verdicts = [f"| {n} | {_WORDS[g['verdict']]} | {_cell(g['sentence'])} |" for n, g in report["groups"].items()]
    stderr = [line for group in report["groups"].values() for line in group.get("stderr", [])]
    return "\n".join(
        [
            f"`qwen-image-mlx doctor` of version {report['program']}, {report['created']}: **{report['verdict']}**",
            "",
            "| group | verdict | |",
            "|---|---|---|",
            *verdicts,
            *(f"| | | {_cell(line)} |" for line in other_findings(report)),
            "",
            "<details><summary>Figures</summary>",
            "",
            "```",
            *(["variables " + json.dumps(report["variables"])] if report["variables"] else []),
            *figure_lines(report),
            *(["", "Last output of lost groups", *stderr] if stderr else []),
            "```",
            "",
            "</details>",
            "",
        ]
    )


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def read_report(path: Path) -> dict[str, Any]:
    """A report that `--json` wrote.

    Raises:
        CheckpointError: the file cannot be read, is not a report, or has a different version.
    """
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a readable report ({error}); write one with doctor --json") from error
    if not isinstance(report, dict) or not isinstance(report.get("groups"), dict):
        raise CheckpointError(f"{path} is not a report; write one with doctor --json")
    if report.get("version") != VERSION:
        raise CheckpointError(f"{path} has version {report.get('version')!r}, but this program compares {VERSION}")
    if not all(isinstance(g, dict) and g.get("verdict") in VERDICTS and isinstance(g.get("figures"), dict)
               for g in report["groups"].values()):  # fmt: skip
        raise CheckpointError(f"{path} is a damaged report; write one with doctor --json")
    return report


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The changes between two reports, a line each: verdicts, and figures that changed by at least a tenth."""
    lines = []
    for name in [name for name in old["groups"] if name in new["groups"]]:
        before, after = old["groups"][name], new["groups"][name]
        if before["verdict"] != after["verdict"]:
            lines.append(f"{name}: {_WORDS[before['verdict']]} -> {_WORDS[after['verdict']]}: {after['sentence']}")
        past = dict(figures(before["figures"]))
        for key, value in figures(after["figures"]):
            was = past.get(key)
            if key not in past or not key.endswith(tuple(_UNITS)) or not _are_numbers(was, value):
                continue
            threshold = max(_MIN_CHANGE * abs(was), _MIN_ERROR if key.endswith("_error") else 0)
            if value != was and abs(value - was) >= threshold:
                ratio = f" ({value / was:.2f}x)" if was else ""
                lines.append(f"{name}.{key}: {figure_text(key, was)} -> {figure_text(key, value)}{ratio}")
    return lines


def _are_numbers(*values: Any) -> bool:
    return all(
        isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < sys.float_info.max
        for value in values
    )
