"""Generates an image again: the options in its record, checked, with its files at their present places."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import RequestError
from ..options import Choice, Several, options_of
from ..pipeline.control import Control
from ..runtime.options import OPTIONS, recorded
from ..runtime.presets import yielding

# The keys that --from-image reads; the others are for people.
_RECORDED = recorded("always", "started from", "set", "given")


def replay_options(path: str, metadata: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The options in an image's record, keyed by name, except those that a flag makes meaningless.

    Args:
        path: the image; files that are not at their recorded places are searched for in its folder.
        metadata: its record.
        given: the options on the command line.

    Raises:
        RequestError: a value is of the wrong type.
    """
    found = _found_nearby(Path(path).parent, _check(metadata))
    if "model" in given:  # values recorded for one model are wrong for another
        found = {name: value for name, value in found.items() if not OPTIONS[name].of_model}
    if "steps" in given:  # recorded noise levels are those of the recorded number
        found.pop("sigmas", None)
    return yielding(found, given)


def _check(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The recorded values that are set; raises RequestError for one of the wrong type."""
    found = {row.name: (row, metadata[row.name]) for row in _RECORDED if metadata.get(row.name) is not None}
    for name, (row, value) in found.items():
        fits = row.kind.accepts(value) if isinstance(row.kind, Choice) else row.kind.has_type(value)
        if not fits:
            raise RequestError(f"the image's metadata is damaged: its {name} is {value!r:.80}")
    return {name: value for name, (_, value) in found.items()}


def _found_nearby(folder: Path, found: dict[str, Any]) -> dict[str, Any]:
    """Searches the image's folder for source files that are not at their recorded places."""

    def find(place: str) -> str:
        nearby = folder / place
        return str(nearby) if nearby.exists() and not Path(place).exists() else place

    def moved(name: str, value: Any) -> Any:
        if isinstance(value, Mapping):
            files = {row.name for row in options_of(Control) if row.place}
            return {field: find(one) if field in files else one for field, one in value.items()}
        head, mark, tail = value.rpartition(_SUFFIXES[name]) if name in _SUFFIXES else (value, "", "")
        return f"{find(head)}{mark}{tail}"

    places = {row.name: row.kind for row in _RECORDED if row.place and row.name in found}
    return found | {
        name: [moved(name, one) for one in found[name]] if isinstance(kind, Several) else moved(name, found[name])
        for name, kind in places.items()
    }


_SUFFIXES = {"loras": "@", "layer": ":"}  # the mark after a file's name: REF@STRENGTH, FILE:LAYER
