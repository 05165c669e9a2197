"""Entry point: finds the command, and turns an error into one line and an exit code.

0 done; 1 a fault of this program, with its traceback, or `serve` gave up, in one line; 2 the user's input, or a
fault of the GPU; 129 SIGHUP; 130 Ctrl-C; 141 nobody reads stdout any more; 143 SIGTERM. stdout is for results, stderr
for people. `doctor` has its own: 1 for odd, 2 for wrong numbers. Nothing heavy is imported before a command runs.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from importlib import import_module

from .._version import __version__
from ..errors import QwenImageError
from ..outside import one_line
from ..runtime.ranks import PATIENCE, alone, current, ending, environment_rank, joined, launched, leave, lost
from .hints import sentence
from .parser import Parser
from .results import Unread, messages_kept, results
from .signals import GaveUp, HungUp, Terminated, terminable

# Modules next to this one, each imported after the handlers for Ctrl-C are in place.
COMMANDS = (
    "generate", "edit", "decompose", "compose", "caption", "train", "quantize", "lora", "plan", "info", "config",
    "calibrate-cache", "serve", "doctor", "completion",
)  # fmt: skip


_MODULES = {"calibrate-cache": "calibrate"}  # where they are not called as the command


def build_parser(names: Sequence[str] = COMMANDS) -> argparse.ArgumentParser:
    """The parser with some of its commands; only what these need is imported."""
    parser = Parser(
        prog="qwen-image-mlx",
        description="Run the Qwen-Image family on a Mac.",
        epilog="Run 'qwen-image-mlx COMMAND --help' for a command's flags.",
    )
    parser.add_argument("--version", action="version", version=f"qwen-image-mlx {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name in names:
        module = import_module(f".{_MODULES.get(name, name)}", __package__)
        module.add_parser(commands).set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit code."""
    try:
        with messages_kept():
            code = _main(argv)
    except Exception:
        if not (launched() and joined()):
            raise
        traceback.print_exc()
        code = 1
    if code and launched() and joined():
        sys.stdout.flush()
        sys.stderr.flush()
        leave(code)
    return code


def _main(argv: Sequence[str] | None) -> int:
    arguments = argparse.Namespace()
    try:
        with terminable(), results():
            words = sys.argv[1:] if argv is None else list(argv)
            named = [name for name in words[:1] if name in COMMANDS]
            arguments = build_parser(named or COMMANDS).parse_args(words)
            code = _run(arguments)
    except QwenImageError as error:
        print(f"{_who()}error: {sentence(error)}", file=sys.stderr)
        if getattr(arguments, "json", None) and "quiet" in arguments and not _who():
            _say_error(sentence(error))
        return 2
    except GaveUp as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 1
    except Unread:
        return 141
    except HungUp:  # nobody is left to read a message
        return 129
    except Terminated:
        print(f"{_who()}terminated", file=sys.stderr)
        return 143
    except KeyboardInterrupt:
        print(f"{_who()}interrupted", file=sys.stderr)
        return 130
    return code or 0


def _say_error(message: str) -> None:
    """Prints an error event for an app that reads stdout, if it still does."""
    from .console import event

    with suppress(OSError):
        event("error", message=message)


def _run(arguments: argparse.Namespace) -> int | None:
    """Runs the command and returns its exit code, if it has its own; faults of the GPU become GPUErrors."""
    try:
        with _colours(arguments):
            return _run_ranks(arguments) if launched() else arguments.run(arguments)
    except RuntimeError as error:
        from ..gpu import gpu_error  # here, because it loads MLX

        if (fault := gpu_error(error) or lost(error)) is None:
            raise
        raise fault from error


def _run_ranks(arguments: argparse.Namespace) -> int | None:
    """Runs the command as one of several ranks. All end together: one that fails is missed by the others."""
    module = import_module(arguments.run.__module__)
    shares = getattr(module, "SHARES", False)
    if not shares and environment_rank():
        print(f"rank {environment_rank()}: nothing to do, this command runs on rank 0", file=sys.stderr)
        return None
    if not shares:
        alone()
    with ending(getattr(module, "PATIENCE", PATIENCE)):
        code: int | None = arguments.run(arguments)
        if shares and joined():
            current().wait()
        return code


def _who() -> str:
    """How a message begins: with the rank, on all but the first."""
    rank = environment_rank()
    return f"rank {rank}: " if rank else ""


def _colours(arguments: argparse.Namespace) -> AbstractContextManager[None]:
    """How the command reads colours; commands without the flag read no images."""
    if "ignore_profile" not in arguments:
        return nullcontext()
    from ..images.colour import ignore_profiles

    return ignore_profiles(bool(arguments.ignore_profile))
