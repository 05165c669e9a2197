"""The types of options and of their values; names no particular option. Importable without MLX.

An `Option` states once what all front ends need: the command line makes a flag of it, config.toml a setting, the
server a field, a file of prompts a key, and a PNG a line of its record. The table of all is `runtime/options.py`.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from .errors import RequestError

# Kinds of values ------------------------------------------------------------------------------------------------------


class Fault(NamedTuple):
    """What is not allowed: a value, or a part of it.

    Attributes:
        name: the value's, or where the part is in it.
        value: the value, or the part.
        allowed: the allowed values as text, to follow "must be".
    """

    name: str
    value: Any
    allowed: str

    def sentence(self, quoted: str) -> str:
        """In words, with the value as it is quoted."""
        return f"{self.name} is {quoted}, but must be {self.allowed}"


@dataclass(frozen=True)
class Kind(ABC):
    """A kind of value; each subclass is one.

    Attributes:
        allowed: the allowed values as text, to follow "must be".
        read: parses a word of the command line; None keeps the word.
    """

    @property
    @abstractmethod
    def allowed(self) -> str:
        """The allowed values as text, to follow "must be"."""

    @property
    def read(self) -> Callable[[str], Any] | None:
        """The parser of a word on the command line; None keeps the word."""
        return None

    @abstractmethod
    def accepts(self, value: Any) -> bool:
        """Whether a value, as JSON or TOML gives it, is allowed."""

    def store(self, value: Any, /) -> Any:
        """An allowed value in the form in which it is stored."""
        return value

    def has_type(self, value: Any) -> bool:
        """Whether a recorded value is of the right type; its range is checked where it is used."""
        return self.accepts(value)

    def fault(self, name: str, value: Any) -> Fault | None:
        """What is not allowed in a value, which is called `name`; None if all is."""
        return None if self.accepts(value) else Fault(name, value, self.allowed)

    def check(self, name: str, value: Any) -> Any:
        """The stored form of a value; raises RequestError, which calls the value `name`, if it is not allowed."""
        if wrong := self.fault(name, value):
            raise RequestError(wrong.sentence(f"{wrong.value!r:.80}"))
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
        """Its range as text."""
        return (
            f"an integer of at least {self.low}" if self.high is None else f"an integer from {self.low} to {self.high}"
        )

    def accepts(self, value: Any) -> bool:
        """Whether it is an integer in the range; True and False are not integers here."""
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
        """The value as a float."""
        return float(value)

    @property
    def allowed(self) -> str:
        """Its range as text."""
        return f"above {self.low} and at most {self.high}" if self.above else f"a number from {self.low} to {self.high}"

    def accepts(self, value: Any) -> bool:
        """Whether it is a number in the range; NaN is not."""
        return self.has_type(value) and (self.low < value if self.above else self.low <= value) and value <= self.high

    def has_type(self, value: Any) -> bool:
        """Whether it is a number."""
        return isinstance(value, int | float) and not isinstance(value, bool)


@dataclass(frozen=True)
class Choice(Kind):
    """One of a list of words or numbers."""

    values: tuple[Any, ...]

    @property
    def allowed(self) -> str:
        """The list as text."""
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
        """Whether it is a text; its content is not checked."""
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
        return isinstance(value, str) and value != ""


@dataclass(frozen=True)
class Parsed(Kind):
    """A text that a parser of another room reads.

    Attributes:
        words: the allowed values as text.
        parse: the parser; raises RequestError for a text that is not allowed.
        types: the types it may have in JSON or TOML; it is stored as a text.
    """

    words: str
    parse: Callable[[str], Any]
    types: tuple[type, ...] = (str,)

    def store(self, value: Any, /) -> str:
        """The value as a text."""
        return str(value)

    @property
    def allowed(self) -> str:
        """The allowed values as text."""
        return self.words

    def accepts(self, value: Any) -> bool:
        """Whether the parser accepts it."""
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
    """A list of values of one kind."""

    kind: Kind
    words: str = ""

    def store(self, value: Any, /) -> list[Any]:
        """The stored items in a new list."""
        return list(map(self.kind.store, value))

    @property
    def allowed(self) -> str:
        """The allowed values as text."""
        return self.words or f"a list, each item {self.kind.allowed}"

    @property
    def read(self) -> Callable[[str], Any] | None:
        """The parser of each item."""
        return self.kind.read

    def accepts(self, value: Any) -> bool:
        """Whether each item is allowed."""
        return isinstance(value, list) and all(map(self.kind.accepts, value))

    def fault(self, name: str, value: Any) -> Fault | None:
        """The fault of the first wrong item; of the whole list if no single item is wrong."""
        items = enumerate(value, 1) if isinstance(value, list) else ()
        faults = (self.kind.fault(f"item {number} of {name}", one) for number, one in items)
        return next(filter(None, faults), None) or super().fault(name, value)

    def has_type(self, value: Any) -> bool:
        """Whether each item is of the right type."""
        return isinstance(value, list) and all(map(self.kind.has_type, value))


@dataclass(frozen=True)
class Group(Kind):
    """An object whose fields are the options of a dataclass.

    Attributes:
        of: the dataclass; fields without a default must be there.
    """

    of: type

    @property
    def rows(self) -> dict[str, Option]:
        """Its options by name."""
        return {row.name: row for row in options_of(self.of)}

    @property
    def allowed(self) -> str:
        """The names of its fields as text."""
        return f"an object with {', '.join(self.rows)}"

    def accepts(self, value: Any) -> bool:
        """Whether it is an object with allowed values, all that it must have, and no other fields."""
        return self.has_type(value) and all(self.rows[name].kind.accepts(one) for name, one in value.items())

    def fault(self, name: str, value: Any) -> Fault | None:
        """The fault of the first unknown or wrong field; of the whole object if no single field is."""
        if isinstance(value, dict) and (odd := [field for field in value if field not in self.rows]):
            return Fault(f"a field of {name}", odd[0], f"one of {', '.join(self.rows)}")
        fields = value.items() if isinstance(value, dict) else ()
        faults = (self.rows[field].kind.fault(f"{field} of {name}", one) for field, one in fields)
        return next(filter(None, faults), None) or super().fault(name, value)

    def store(self, value: Any, /) -> Any:
        """The object as it is; raises RequestError for fields that contradict each other."""
        self.of(**value)
        return value

    def has_type(self, value: Any) -> bool:
        """Whether it is an object with known fields of the right types, and all that it must have."""
        if not isinstance(value, dict):
            return False
        needed = {field.name for field in dataclasses.fields(self.of) if field.default is dataclasses.MISSING}
        known = needed <= value.keys() <= self.rows.keys()
        return known and all(self.rows[name].kind.has_type(one) for name, one in value.items())


# Options --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Config:
    """An option's setting in config.toml.

    Attributes:
        commands: the commands whose flag it sets; () is all the commands of the option.
        key: its name; "" is the option's name.
        table: the table within `[PROFILE.qwen_image]`; "" is that table itself.
        help: its description; "" is the option's.
        usual: the default, as text; "" is the option's.
        example: a value for the commented example.
        kind: its kind of value; None is the option's.
        of_model: whether it applies only to the models that the config names, or to the default ones.
    """

    commands: tuple[str, ...] = ()
    key: str = ""
    table: str = ""
    help: str = ""
    usual: str = ""
    example: Any = None
    kind: Kind | None = None
    of_model: bool = False


@dataclass(frozen=True, kw_only=True)
class Option:
    """One row of the table: an option, with its name in every front end.

    Attributes:
        kind: the kind of its value.
        help: its description, to follow the flag.
        name: its key in mappings, JSON and records; "" is the dataclass field's name.
        field: the dataclass field that holds it, if there is one.
        usual: the default, as text.
        group: the key of its heading in help.
        commands: the commands that have it as a flag.
        flags: the spellings of the flag, the long form first; () with commands is a positional argument.
        instead: for a positional argument, flags that mean the same.
        metavar: the name of its value in help.
        nargs: argparse's nargs of the flag; "append" collects a repeated flag.
        bare: the value of a flag that is given without one, where nargs is "?".
        tasks: the server's tasks whose bodies have it as a field.
        default: the default of that field; None is "not given", and ... is "required".
        page: whether the page's form has it, for an option of sampling.
        line: whether a line of a .jsonl file of prompts may have it.
        config: its settings in config.toml.
        record: when a PNG's record has it: "always"; "started from" or "layered" for such a request; "set" if it
            differs from the dataclass's default; "given" if the user gave it; "" never.
        needs: names of options without which it has no meaning.
        place: whether it names a file, which may have been moved together with an image or a config.
        of_model: whether it has a meaning only for the model it was recorded with.
        but: the fields that differ, keyed by a command's name, or by "/" and a task's name.
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
    bare: Any = None
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
        """The option with the fields that differ for a command, or for "/" and a task."""
        return replace(self, **self.but.get(command, {}))

    @property
    def flag(self) -> str:
        """Its long flag, such as --steps."""
        return self.flags[0] if self.flags else self.name


def option(default: Any = dataclasses.MISSING, **fields: Any) -> Any:
    """A dataclass field that carries its option; `fields` are those of `Option`."""
    return dataclasses.field(default=default, metadata={"option": Option(**fields)})


def options_of(kind: type) -> Iterator[Option]:
    """The options of a dataclass's fields, in order."""
    for field in dataclasses.fields(kind):
        if found := field.metadata.get("option"):
            yield replace(found, name=found.name or field.name, field=field.name)


def by_name(options: Sequence[Option]) -> dict[str, Option]:
    """Options keyed by name; two options with one name are a bug."""
    found = {row.name: row for row in options}
    assert len(found) == len(options), "two options have one name"
    return found
