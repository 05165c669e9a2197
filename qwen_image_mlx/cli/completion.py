"""qwen-image-mlx completion: a script that completes commands and flags in a shell."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

SHELLS = ("bash", "zsh", "fish")
DESCRIPTION = """\
Print a script for a shell, made from this version's own commands and flags:

  bash   qwen-image-mlx completion bash > ~/.local/share/bash-completion/completions/qwen-image-mlx
  zsh    qwen-image-mlx completion zsh > ~/.zsh/qwen-image-mlx.zsh, and `source` it in ~/.zshrc after compinit
  fish   qwen-image-mlx completion fish > ~/.config/fish/completions/qwen-image-mlx.fish"""
_BASH = """\
_qwen_image_mlx() {
  local command="${COMP_WORDS[1]}" word="${COMP_WORDS[COMP_CWORD]}" before="${COMP_WORDS[COMP_CWORD-1]}" words=""
  if [ "$COMP_CWORD" -eq 1 ]; then
    words="{commands}"
  else
    case "$command $before" in
{values}
    esac
    if [ -z "$words" ] && [ "${word#-}" != "$word" ]; then
      case "$command" in
{flags}
      esac
    fi
  fi
  COMPREPLY=($(compgen -W "$words" -- "$word"))
  [ ${#COMPREPLY[@]} -gt 0 ] || COMPREPLY=($(compgen -f -- "$word"))
}
complete -o filenames -F _qwen_image_mlx qwen-image-mlx
"""


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Adds the command's flags."""
    parser = commands.add_parser(
        "completion", help="print a script that completes commands and flags in a shell", description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("shell", choices=SHELLS, metavar="SHELL", help=", ".join(SHELLS))
    return parser


def run(arguments: argparse.Namespace) -> None:
    """Prints the script."""
    from .main import build_parser

    (commands,) = build_parser()._subparsers._group_actions  # type: ignore[union-attr]  # there are commands
    parsers = dict(commands.choices)  # type: ignore[arg-type]  # a mapping, of commands
    print(_fish(parsers) if arguments.shell == "fish" else _bash(parsers, zsh=arguments.shell == "zsh"), end="")


def _flags(parser: argparse.ArgumentParser) -> Iterator[tuple[argparse.Action, tuple[str, ...]]]:
    """The flags of a command: (action, its spellings); of one with actions of its own, none."""
    for action in parser._actions:
        if action.option_strings:
            yield action, tuple(action.option_strings)


def _words(parser: argparse.ArgumentParser) -> list[str]:
    """The words that may follow a command: its actions and its flags."""
    return [*_inner(parser), *chain(*(names for _, names in _flags(parser)))]


def _inner(parser: argparse.ArgumentParser) -> Iterator[str]:
    """The actions of a command, such as `show`, `init` and `path` of `config`."""
    return chain(*(action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction)))


def _case(indent: int, patterns: Iterable[str], words: Iterable[Any]) -> str:
    """One case of bash: the words offered after any of some patterns."""
    quoted = "|".join('"' + pattern + '"' for pattern in patterns)
    return " " * indent + quoted + ') words="' + " ".join(map(str, words)) + '";;'


def _bash(parsers: dict[str, argparse.ArgumentParser], *, zsh: bool) -> str:
    inner = {command: list(_inner(parser)) for command, parser in parsers.items()}
    values = [_case(6, [f"{command} {command}"], names) for command, names in inner.items() if names]
    values += [
        _case(6, [f"{command} {name}" for name in names], action.choices)
        for command, parser in parsers.items()
        for action, names in _flags(parser)
        if action.choices
    ]
    flags = [_case(8, [command], _words(parser)) for command, parser in parsers.items()]
    script = _BASH.replace("{commands}", " ".join(parsers))
    script = script.replace("{values}", "\n".join(values)).replace("{flags}", "\n".join(flags))
    return "autoload -U +X bashcompinit && bashcompinit\n" * zsh + script


def _fish(parsers: dict[str, argparse.ArgumentParser]) -> str:
    lines = []
    for command, parser in parsers.items():
        lines.append(f"complete -c qwen-image-mlx -n __fish_use_subcommand -a {command}")
        seen = f"complete -c qwen-image-mlx -n '__fish_seen_subcommand_from {command}'"
        for action, names in _flags(parser):
            spelt = " ".join(f"-l {name[2:]}" if name.startswith("--") else f"-s {name[1:]}" for name in names)
            takes = "" if action.nargs == 0 else " -r"
            values = f" -f -a '{' '.join(map(str, action.choices))}'" if action.choices else ""
            lines.append(f"{seen} {spelt}{takes}{values}")
    return "\n".join(lines) + "\n"
