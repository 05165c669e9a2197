"""qwen-image-mlx doctor: checks whether this machine computes correctly, how fast, and in how much memory."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..doctor.groups import GOLDEN, GROUPS, NAMES, Group, group_named
from ..doctor.outcome import CRASH, FALSIFY, HANG, SELF_TESTS
from ..errors import OutputError, RequestError
from ..runtime.ranks import leads

SHARES = True  # all ranks run the group that measures their connection
_WIDTH = max(len(name) for name in NAMES)
DESCRIPTION = """\
Check whether this machine computes correctly, how fast, and in how much memory. Nothing is downloaded, no model is
needed. On a Mac it should take less than three minutes and 2.5 GB of memory (modelled for an M1 with 8 GPU cores). Each
group of checks runs in its own process.

""" + "\n".join(f"  {group.name:{_WIDTH}}  {group.what}" for group in GROUPS)
EPILOG = """\
The output ends with text for a GitHub issue: it has every figure and names no user, host or path. Speed and memory are
judged on Apple's GPU only. Exit codes: 0 sound; 1 slow, odd, or a group was lost; 2 wrong numbers or a bad argument.

Self-tests: --env QWEN_IMAGE_DOCTOR_FALSIFY=CHECK puts one check's results 1 % off, QWEN_IMAGE_DOCTOR_CRASH=GROUP and
QWEN_IMAGE_DOCTOR_HANG=GROUP end or hold up a group's process."""


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Adds the command's flags."""
    parser = commands.add_parser(
        "doctor",
        help="check whether this machine computes correctly, and how fast",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--only", metavar="GROUPS", help="some groups, separated by commas")
    add("--json", metavar="FILE", help="write the report as JSON; under a new name if the file exists")
    add("--compare", metavar="FILE", help="print what changed since an earlier report")
    add("--golden", metavar="FILE", help="compare a model with what diffusers computed, a file of "
        "scripts/make_golden.py; other groups run only with --only")  # fmt: skip
    add("--model", "-m", help="for --golden: a directory or a Hugging Face id")
    add("--env", metavar="NAME=VALUE", action="append", default=[], help="set a variable for the checks; repeatable")
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Runs the groups, prints what they found, and returns the exit code."""
    from ..doctor.examine import examine
    from ..doctor.report import differences, other_findings, read_report, verdict_line

    groups, env, options = _groups(arguments), _variables(arguments.env), {}
    if arguments.golden is not None:
        options = {"golden": str(Path(arguments.golden).absolute()), "model": arguments.model}
    if not leads():  # other ranks only take part in the measurement
        examine([group for group in groups if group.name == "network"], env, options, lambda name, outcome: None)
        return 0
    earlier = read_report(Path(arguments.compare)) if arguments.compare is not None else None
    if arguments.json is not None:
        _check_json(arguments.json)

    def say(name: str, outcome: Mapping[str, Any]) -> None:
        print(verdict_line(name, outcome), flush=True)

    report = examine(groups, env, options, say)
    for line in other_findings(report):
        print(line)
    print(f"\n{report['verdict']}")
    if earlier:
        _print_section("Changes since the earlier report", differences(earlier, report) or ["none"])
    _print_section("Body of a GitHub issue", [report["issue"]])
    if arguments.json:
        from ..files import new_file

        text = json.dumps(report, ensure_ascii=False, indent=2, allow_nan=False) + "\n"
        print(f"\n{new_file(Path(arguments.json), text.encode())}")
    return report["exit"]


def _check_json(path: str) -> None:
    """Raises OutputError, before any group runs, if the report could not be written."""
    if path in ("", "-") or Path(path).is_dir():
        raise OutputError(f"--json is {path!r}, but must be a file, such as doctor.json")
    if not Path(path).absolute().parent.is_dir():
        raise OutputError(f"{path} cannot be written: its folder does not exist")
    from ..files import check_writable

    check_writable(Path(path).absolute(), nbytes=1 << 20)


def _print_section(title: str, lines: Sequence[str]) -> None:
    print(f"\n--- {title} ---")
    for line in lines:
        print(line)


def _groups(arguments: argparse.Namespace) -> list[Group]:
    if (arguments.golden is None) != (arguments.model is None):
        raise RequestError("--golden FILE and --model MODEL belong together: give both, or neither")
    for flag in ("golden", "model", "compare"):
        if getattr(arguments, flag) == "":
            raise RequestError(f"--{flag} is '', but must name something")
    names = [name.strip() for name in arguments.only.split(",")] if arguments.only is not None else []
    for name in names:
        if name not in NAMES:
            raise RequestError(f"--only has {name!r}, but the groups are {', '.join(NAMES)}")
    if arguments.only is None:
        return [GOLDEN] if arguments.golden is not None else list(GROUPS)
    chosen = [group_named(name) for name in NAMES if name in names]
    return [GOLDEN, *chosen] if arguments.golden is not None else chosen  # first, as it may refuse its input


def _variables(given: Sequence[str]) -> dict[str, str]:
    variables = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise RequestError(f"--env is {text!r}, but must be NAME=VALUE, such as MLX_ENABLE_TF32=0")
        if name.startswith(SELF_TESTS) and name not in (FALSIFY, CRASH, HANG):
            raise RequestError(f"--env has {name}, but the self-tests are {FALSIFY}, {CRASH} and {HANG}")
        if name in (CRASH, HANG) and value not in NAMES:
            raise RequestError(f"--env has {name}={value}, but the groups are {', '.join(NAMES)}")
        variables[name] = value
    return variables
