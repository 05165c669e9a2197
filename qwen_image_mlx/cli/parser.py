"""The parser of the command line: what it does not know it answers with what is meant, in one sentence."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from typing import Any, NoReturn

from ..errors import RequestError

_PROMPT = "the prompt itself, in quotes, before the flags"
_LORA = "--lora FILE@STRENGTH, once for each"
# Flags of other programs, and what is given here instead.
FOREIGN = {
    "-p": _PROMPT,
    "--prompt": _PROMPT,
    "-q": "--quantize",
    "--bits": "--quantize",
    "--cfg": "--cfg-scale",
    "--guidance": "--cfg-scale",
    "--guidance-scale": "--cfg-scale",
    "--true-cfg-scale": "--cfg-scale",
    "--num-inference-steps": "--steps",
    "--lora-path": _LORA,
    "--lora-paths": _LORA,
    "--lora-scale": _LORA,
    "--lora-scales": _LORA,
    "--image-path": "--image",
    "--image-paths": "--image, once for each",
    "--init-image": "--image",
    "--image-strength": "--strength",
    "--mask-path": "--mask",
    "--num-images-per-prompt": "--num-images",
    "--auto-seeds": "--seeds 1-4, or --num-images",
    "--low-ram": "--memory auto",
    "--mlx-cache-limit-gb": "--memory 16GB",
    "--config-from-metadata": "--from-image",
    "-C": "--from-image",
    "--metadata": "nothing, as every PNG carries its parameters; `info` prints them",
    "--stepwise-image-output-dir": "--preview",
    "--base-model": "--model",
}
_DASHED = "a prompt that begins with a dash comes last, after two dashes, as in -- -portrait"
_PROFILE = "--profile takes the name of a profile in config.toml; --timings prints what each stage takes"
_JOINED = "a value that begins with a dash is joined to its flag with =, as in {}=-blurry"


class Parser(argparse.ArgumentParser):
    """Raises instead of printing its usage: one sentence is enough. Flags are written out."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def error(self, message: str) -> NoReturn:
        """Raises RequestError with the cure, where one is known."""
        raise RequestError(f"{message}{self._cure(message)} (see {self.prog} --help)")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Reads a text that begins with a dash where a flag wants one; what is unknown is this command's own fault."""
        args = None if args is None else list(self._joined(args))
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}{self._answer(unknown)}")
        return namespace, unknown

    def _joined(self, words: Sequence[str]) -> Iterator[str]:
        """The words, with `-n -blurry` as `-n=-blurry`: argparse takes no word with a dash for a value."""
        rest = iter(words)
        for word in rest:
            if word == "--":
                yield from (word, *rest)
                return
            if self._takes_text(word) and (value := next(rest, None)) is not None:
                if value.startswith("-") and not self._is_flag(value):
                    yield f"{word}={value}"
                else:
                    yield from (word, value)
                    if value == "--":
                        yield from rest
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
        """What is meant by words that no flag or place takes."""
        known = [name for name in self._option_string_actions if name.startswith("--")]
        asks = any(action.dest == "prompt" and not action.option_strings for action in self._actions)
        for word in unknown:
            name = word.partition("=")[0]
            if name in FOREIGN and (asks or FOREIGN[name] != _PROMPT):
                return f"; give {FOREIGN[name]}"
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
            near = get_close_matches(match[1], re.findall(r"[\w:.-]+", match[2]), 1)
            return f"; did you mean {near[0]}?" if near else ""
        return ""
