"""What an option is and what its value may be; knows no option by name. Importable without MLX.

An `Option` says once all that the front ends need: the command line makes a flag of it, config.toml a setting, the
server a field, a file of prompts a key, and a PNG a line of its record. The table of all is `runtime/options.py`.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .errors import RequestError

# What a value may be --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind(ABC):
    """What a value may be; the children say which.

    Attributes:
        allowed: in words, to stand after "must be".
        read: what reads a word of the command line; None keeps the word.
    """

    @property
    @abstractmethod
    def allowed(self) -> str:
        """What is allowed, in words."""

    @property
    def read(self) -> Callable[[str], Any] | None:
        """What reads a word of the command line; None keeps the word."""
        return None

    @abstractmethod
    def accepts(self, value: Any) -> bool:
        """Whether a value, as JSON or TOML gives it, is allowed."""

    def store(self, value: Any, /) -> Any:
        """What is kept of an allowed value."""
        return value

    def has_type(self, value: Any) -> bool:
        """Whether a recorded value is of the right type; its range is checked where it is used."""
        return self.accepts(value)

    def check(self, name: str, value: Any) -> Any:
        """What is kept of a value; raises RequestError, which calls it `name`, if it is not allowed."""
        if not self.accepts(value):
            raise RequestError(f"{name} is {value!r:.80}, but must be {self.allowed}")
        return self.store(value)


@dataclass(frozen=True)
class Integer(Kind):
    """An integer from `low` to `high` (None: no end), a multiple of `step`."""

    low: int
    high: int | None = None
    step: int = 1

    read = int

    @property
    def allowed(self) -> str:
        """Its range, in words."""
        return (
            f"an integer of at least {self.low}" if self.high is None else f"an integer from {self.low} to {self.high}"
        )

    def accepts(self, value: Any) -> bool:
        """Whether it is one in the range; True and False are not."""
        return self.has_type(value) and self.low <= value and (self.high is None or value <= self.high)

    def has_type(self, value: Any) -> bool:
        """Whether it is an integer."""
        return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True)
class Number(Kind):
    """A number from `low`, or above it, to `high`; kept as a float."""

    low: float
    high: float
    above: bool = False

    read = float

    def store(self, value: Any, /) -> float:
        """It as a float."""
        return float(value)

    @property
    def allowed(self) -> str:
        """Its range, in words."""
        return f"above {self.low} and at most {self.high}" if self.above else f"a number from {self.low} to {self.high}"

    def accepts(self, value: Any) -> bool:
        """Whether it is one in the range; NaN is not."""
        return self.has_type(value) and (self.low < value if self.above else self.low <= value) and value <= self.high

    def has_type(self, value: Any) -> bool:
        """Whether it is a number."""
        return isinstance(value, int | float) and not isinstance(value, bool)


@dataclass(frozen=True)
class Choice(Kind):
    """One of some words."""

    values: tuple[Any, ...]

    @property
    def allowed(self) -> str:
        """The words."""
        return f"one of {', '.join(map(str, self.values))}"

    def accepts(self, value: Any) -> bool:
        """Whether it is one of them."""
        return any(type(value) is type(one) and value == one for one in self.values)


@dataclass(frozen=True)
class Text(Kind):
    """A text; with `pattern` its form in JSON, a regular expression."""

    pattern: str = ""

    allowed = "a string"

    def accepts(self, value: Any) -> bool:
        """Whether it is a text, whatever it says."""
        return isinstance(value, str)


@dataclass(frozen=True)
class Switch(Kind):
    """On or off."""

    allowed = "true or false"

    def accepts(self, value: Any) -> bool:
        """Whether it is True or False."""
        return isinstance(value, bool)


@dataclass(frozen=True)
class ImageFile(Kind):
    """An image: a file's name on the command line and in a record, the image itself in a request."""

    allowed = "the name of an image"

    def accepts(self, value: Any) -> bool:
        """Whether it is a text, as a name is."""
        return isinstance(value, str)


@dataclass(frozen=True)
class Parsed(Kind):
    """A text that another room reads.

    Attributes:
        words: what is allowed.
        parse: raises RequestError for what is not.
        types: that JSON or TOML may give it in; it is kept as a text.
    """

    words: str
    parse: Callable[[str], Any]
    types: tuple[type, ...] = (str,)

    def store(self, value: Any, /) -> str:
        """It as a text."""
        return str(value)

    @property
    def allowed(self) -> str:
        """In words."""
        return self.words

    def accepts(self, value: Any) -> bool:
        """Whether the other room can read it."""
        if type(value) not in self.types:
            return False
        try:
            self.parse(str(value))
        except RequestError:
            return False
        return True

    def has_type(self, value: Any) -> bool:
        """Whether it is a text."""
        return isinstance(value, str)


@dataclass(frozen=True)
class Several(Kind):
    """A list of what is of one kind."""

    kind: Kind
    words: str = ""

    def store(self, value: Any, /) -> list[Any]:
        """A list of its own."""
        return list(value)

    @property
    def allowed(self) -> str:
        """In words."""
        return self.words or f"a list, each item {self.kind.allowed}"

    @property
    def read(self) -> Callable[[str], Any] | None:
        """How each item is read."""
        return self.kind.read

    def accepts(self, value: Any) -> bool:
        """Whether each item is allowed."""
        return isinstance(value, list) and all(map(self.kind.accepts, value))

    def has_type(self, value: Any) -> bool:
        """Whether each item is of the right type."""
        return isinstance(value, list) and all(map(self.kind.has_type, value))


# What is said of an option --------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Config:
    """An option's setting in config.toml.

    Attributes:
        commands: whose flag's place it takes; () is all the option's commands that generate.
        key: its name; "" is the option's.
        table: within `[PROFILE.qwen_image]`; "" is that one itself.
        help: what it decides; "" is the option's.
        usual: what holds where it is not set; "" is the option's.
        example: a value for the commented example.
        kind: what it may be; None is as the option.
    """

    commands: tuple[str, ...] = ()
    key: str = ""
    table: str = ""
    help: str = ""
    usual: str = ""
    example: Any = None
    kind: Kind | None = None


@dataclass(frozen=True, kw_only=True)
class Option:
    """One row: an option, and where it is found under which name.

    Attributes:
        kind: what its value may be.
        help: what it decides, to follow the flag.
        name: in mappings, JSON and records; "" is the dataclass field's.
        field: the dataclass field that holds it, if it is one.
        usual: what holds where it is not given, in words.
        group: the heading of its flag in help.
        commands: whose flag it is.
        flags: how the flag is written, the long form first; () with commands is a place on the line.
        instead: of a place on the line, flags that say the same.
        metavar: what stands for its value in help.
        nargs: of its flag, as argparse has it; "append" collects a flag that is repeated.
        tasks: of the server, whose bodies have it as a field.
        default: of that field; None is "not said", and ... is "must be said".
        page: whether the page's form has it, if it is of sampling.
        line: whether a line of a .jsonl file of prompts may have it.
        config: its settings.
        record: when a PNG's record has it: "always"; "started from", "layered" (with such a request); "set", where it
            is not the dataclass's default; "asked", where the front end was asked for it; "" never.
        needs: names of options without which it means nothing.
        place: whether it names a file, which may have moved together with an image or a config.
        of_model: whether it means nothing for another model than the one it was recorded with.
        but: what differs for a command, by its name, or for a task, by "/" and its name.
    """

    kind: Kind
    help: str = ""
    name: str = ""
    field: str = ""
    usual: str = ""
    group: str = ""
    commands: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    instead: tuple[str, ...] = ()
    metavar: str | None = None
    nargs: str | None = None
    tasks: tuple[str, ...] = ()
    default: Any = None
    page: bool = True
    line: bool = False
    config: tuple[Config, ...] = ()
    record: str = ""
    needs: tuple[str, ...] = ()
    place: bool = False
    of_model: bool = False
    but: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)

    def of(self, command: str) -> Option:
        """The option as a command, or "/" and a task, has it."""
        return replace(self, **self.but.get(command, {}))

    @property
    def flag(self) -> str:
        """How it is called on the command line: --steps."""
        return self.flags[0] if self.flags else self.name


def option(default: Any = dataclasses.MISSING, **said: Any) -> Any:
    """A dataclass field that carries its option; `said` are the fields of `Option`."""
    return dataclasses.field(default=default, metadata={"option": Option(**said)})


def options_of(kind: type) -> Iterator[Option]:
    """The options of a dataclass's fields, in their order."""
    for field in dataclasses.fields(kind):
        if found := field.metadata.get("option"):
            yield replace(found, name=found.name or field.name, field=field.name)


def by_name(options: Sequence[Option]) -> dict[str, Option]:
    """Options by their names; two of one name are a fault of this program."""
    found = {row.name: row for row in options}
    assert len(found) == len(options), "two options have one name"
    return found
