"""An image that is generated again: the options that its PNG recorded, checked, and its files where they are now."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import RequestError
from ..options import Choice, Several
from ..runtime.options import OPTIONS, recorded

# What --from-image reads; other keys are for people.
_RECORDED = recorded("always", "started from", "set", "asked")


def replayed(path: str, metadata: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The options that an image recorded, by their names; the flags that are given decide which of them still hold.

    Args:
        path: the image, beside which files are looked for that are not at their recorded places.
        metadata: its record.
        given: options that the command line gives.

    Raises:
        RequestError: a value is of the wrong type.
    """
    found = _beside(Path(path).parent, _checked(metadata))
    if "model" in given:  # what was recorded for one model means nothing for another
        found = {name: value for name, value in found.items() if not OPTIONS[name].of_model}
    return found


def _checked(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The recorded values that are set; raises RequestError for one of the wrong type."""
    found = {row.name: (row, metadata[row.name]) for row in _RECORDED if metadata.get(row.name) is not None}
    for name, (row, value) in found.items():
        fits = row.kind.accepts(value) if isinstance(row.kind, Choice) else row.kind.has_type(value)
        if not fits:
            raise RequestError(f"the image's metadata is damaged: its {name} is {value!r:.80}")
    return {name: value for name, (_, value) in found.items()}


def _beside(folder: Path, found: dict[str, Any]) -> dict[str, Any]:
    """Looks for what an image was made from beside it, where it is not at its recorded place."""

    def find(place: str) -> str:
        beside = folder / place
        return str(beside) if beside.exists() and not Path(place).exists() else place

    def moved(name: str, value: str) -> str:
        head, mark, tail = value.rpartition(_SUFFIXES[name]) if name in _SUFFIXES else (value, "", "")
        return f"{find(head)}{mark}{tail}"

    places = {row.name: row.kind for row in _RECORDED if row.place and row.name in found}
    return found | {
        name: [moved(name, one) for one in found[name]] if isinstance(kind, Several) else moved(name, found[name])
        for name, kind in places.items()
    }


_SUFFIXES = {"loras": "@", "layer": ":"}  # what stands between a file's name and what else is said of it
