"""The parser of the command line; it answers an unknown flag with the probable one, in one sentence."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from typing import Any, NoReturn

from ..errors import RequestError
from .foreign import answer

_FEW_FLAGS = 12  # that fit in a usage line
_INTEGERS = r"-?\d+(,-?\d+)*"
_NUMBER = r"-?(\d+\.?\d*|\.\d+)"
_DASHED = "a prompt that begins with a dash comes last, after two dashes, as in -- -portrait"
_PROFILE = "--profile takes the name of a profile in config.toml; --timings prints what each stage takes"
_JOINED = "a value that begins with a dash is joined to its flag with =, as in {}=-blurry"


class Help(argparse.HelpFormatter):
    """Help with a short usage, however many flags there are, and texts of several lines as they are written."""

    def _format_usage(self, usage: Any, actions: Any, groups: Any, prefix: Any) -> str:
        flags = [action for action in actions if action.option_strings]
        if usage is None and len(flags) > _FEW_FLAGS:
            places = [action.metavar or action.dest for action in actions if not action.option_strings]
            usage = " ".join(["%(prog)s", *(place.replace("%", "%%") for place in places), "[flags]"])
        return super()._format_usage(usage, actions, groups, prefix)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if "\n" in text else super()._fill_text(text, width, indent)


class Parser(argparse.ArgumentParser):
    """Raises instead of printing its usage: one sentence is enough. Flags are written out."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **{"allow_abbrev": False, "formatter_class": Help, **kwargs})

    def error(self, message: str) -> NoReturn:
        """Raises RequestError with the cure, where one is known."""
        raise RequestError(f"{message}{self._cure(message)} (see {self.prog} --help)")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parses flags whose text begins with a dash; an unknown flag is reported by the command itself."""
        args = None if args is None else list(self._join(args))
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}{self._answer(unknown)}")
        return namespace, unknown

    def _join(self, words: Sequence[str]) -> Iterator[str]:
        """The words in a form that argparse reads: it takes no value that begins with a dash, and no pairs.

        `-n -blurry` is `-n=-blurry`; `--lora FILE 0.7` is `--lora FILE@0.7`; `--seed 1,2` is `--seed 1 2`.
        """
        rest = list(words)
        while rest:
            word = rest.pop(0)
            flag, equals, value = word.partition("=")
            action = self._option_string_actions.get(flag)
            if word == "--":
                yield from (word, *rest)
                return
            glued = self._option_string_actions.get(word[:2]) if action is None and word[1:2] != "-" else None
            if glued is not None and glued.dest == "prompt":  # -portrait is not the prompt "ortrait"
                self.error(f"unrecognized arguments: {word}; {_DASHED}")
            if action is not None and action.nargs == "+" and action.type is int:
                yield flag
                rest[:0] = [value] if equals else []
                while rest and re.fullmatch(_INTEGERS, rest[0]):
                    yield from rest.pop(0).split(",")
            elif self._takes_text(word) and rest:
                value = rest.pop(0)
                if action is not None and action.dest == "loras" and rest and re.fullmatch(_NUMBER, rest[0]):
                    value = f"{value}@{rest.pop(0)}"
                if value.startswith("-") and not self._is_flag(value):
                    yield f"{word}={value}"
                else:
                    yield from (word, value)
                    if value == "--":
                        yield from rest
                        return
            else:
                yield word

    def _takes_text(self, word: str) -> bool:
        action = self._option_string_actions.get(word)
        return isinstance(action, argparse._StoreAction | argparse._AppendAction) and not (
            action.nargs or action.type or action.choices
        )

    def _is_flag(self, word: str) -> bool:
        """Whether a word with a dash is more likely a flag than a text: it is one, or looks like -s7 or --one."""
        if word.partition("=")[0] in self._option_string_actions or word.startswith("--"):
            return True
        return word[:2] in self._option_string_actions and word[2:].isdecimal()

    def _answer(self, unknown: Sequence[str]) -> str:
        """A hint for words that no flag or argument takes."""
        known = [name for name in self._option_string_actions if name.startswith("--")]
        asks = any(action.dest == "prompt" and not action.option_strings for action in self._actions)
        for word in unknown:
            name = word.partition("=")[0]
            ours = answer(name)
            if ours and (
                {*re.findall(r"^give (--[\w-]+)", ours)} <= {*known}
            ):  # a flag of other commands only does not help
                return f"; {ours}"
            if owners := _owners(name):
                return f"; it has no meaning here: {name} is a flag of {', '.join(owners)}"
            if name.startswith("--") and (near := get_close_matches(name, known, 1)):
                return f"; did you mean {near[0]}?"
            if asks and re.match("-[^-]", word):
                return f"; {_DASHED}"
        return "; put a prompt of several words in quotes" if asks and not unknown[0].startswith("-") else ""

    def _cure(self, message: str) -> str:
        if re.fullmatch(r"argument --profile: expected one argument", message):
            return f"; {_PROFILE}"
        if match := re.fullmatch(r"argument (?:.*/)?(--?[\w-]+).*: expected one argument", message):
            return f"; {_JOINED.format(match[1])}"
        if re.search(r"--seed.*: invalid int value", message):
            return f"; put the prompt before --seed; {_DASHED}"
        if match := re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message):
            if ours := answer(match[1]):
                return f"; {ours}"
            near = get_close_matches(match[1], re.findall(r"[\w:.-]+", match[2]), 1)
            return f"; did you mean {near[0]}?" if near else ""
        return ""


def _owners(flag: str) -> list[str]:
    """The commands that have a flag."""
    from .flags import rows  # here, because it is slow to import and typing errors are rare

    found = [command for row in rows().values() for command in row.commands if flag in row.of(command).flags]
    return list(dict.fromkeys(found))
