"""The weights map: which tensors a component has, under which names, in which shapes, and who needs them.

Reads `weights_map/<class>.json` (rules over config fields, see `weights_map/README.md`); never touches a weight.
Canonical names are those of the released checkpoints and of our modules; other spellings are dialects, replacements
that lead to the canonical name and back.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import product
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from ..registry import Component, all_components

if TYPE_CHECKING:
    from .schemes import Scheme

_PACKAGE = Path(__file__).resolve().parent.parent
# Installed, the map is inside the package; in a checkout, next to it.
_FOLDERS = (_PACKAGE / "weights_map", _PACKAGE.parent / "weights_map")
_PARAMETERS = ("weight", "bias", "gamma")

UNUSED = "unused"  # the part of tensors that every checkpoint has and no image needs


def _last_tap_ohwi(w: mx.array) -> mx.array:
    """(O, I[, T], H, W) to MLX's (O, H, W, I), keeping only the last temporal tap."""
    return (w[:, :, -1] if w.ndim == 5 else w).transpose(0, 2, 3, 1)


LAYOUTS: dict[str, Callable[[mx.array], mx.array]] = {
    "same": lambda w: w,
    "conv": _last_tap_ohwi,
    "matrix": lambda w: w.reshape(w.shape[:2]),
    "vector": lambda w: w.reshape(-1),
    "summed_taps": lambda w: w.astype(mx.float32).sum(axis=2).reshape(w.shape[0], -1),
}


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a checkpoint.

    Attributes:
        name: canonical name.
        shape: shape in the file.
        part: which part of the component it belongs to; parts are loaded independently.
        layout: key of `LAYOUTS`: how the file's array becomes the module's.
        quantized: whether a quantization scheme applies to it.
    """

    name: str
    shape: tuple[int, ...]
    part: str
    layout: str
    quantized: bool = False

    def is_packed_by(self, scheme: Scheme | None) -> bool:
        """Whether a scheme applies to this tensor and its shape fits, whatever its form in the file."""
        return scheme is not None and self.quantized and scheme.fits(self.shape)

    def loaded_bytes(self, dtype: mx.Dtype, form: Scheme | None) -> int:
        """Bytes in memory once it is loaded: packed in `form`, or dense in `dtype` and the module's layout."""
        if form is not None:
            return form.nbytes(self.shape, dtype)
        return prod(LAYOUTS[self.layout](mx.zeros(self.shape, mx.uint8)).shape) * dtype.size


@cache
def weights_map(name: str) -> Mapping[str, Any]:
    """A parsed file of the map, by its name without the ending, such as `Component.map`."""
    for folder in _FOLDERS:
        path = folder / f"{name}.json"
        if path.is_file():
            return json.loads(path.read_text(encoding="utf-8"))
    raise FileNotFoundError(f"weights_map/{name}.json is missing from the installation")


def expected_tensors(component: Component, config: Any) -> dict[str, TensorSpec]:
    """Every tensor a checkpoint of this config has, by canonical name."""
    rules = weights_map(component.map)
    specs = {}
    for rule in rules["tensors"]:
        for row in getattr(config, rule["for"]) if "for" in rule else [{}]:
            if "if" in rule and not _field(rule["if"], row, config):
                continue
            unused = "unused_if" in rule and _field(rule["unused_if"], row, config)
            part = UNUSED if unused else rule.get("part", rules.get("part", "main")).format_map(row)
            for path, parameter in product(_spell(rule["name"], row), _PARAMETERS):
                if parameter in rule:
                    shape = tuple(_size(s, row, config) for s in rule[parameter])
                    layout = "same" if parameter == "bias" else rule.get("layout", "same")
                    name = f"{path}.{parameter}"
                    quantized = parameter == "weight" and rule.get("quantized", False)
                    specs[name] = TensorSpec(name, shape, part, layout, quantized)
    return specs


def matrix_shapes(component: Component, config: Any) -> dict[str, tuple[int, ...]]:
    """The modules of a component that have a weight, by canonical name, with its shape."""
    specs = expected_tensors(component, config)
    return {name.removesuffix(".weight"): spec.shape for name, spec in specs.items() if name.endswith(".weight")}


def canonical_names(component: Component, names: Iterable[str]) -> dict[str, str]:
    """Stored name -> canonical name, by `dialect_of`."""
    names = list(names)
    dialect = weights_map(component.map)["dialects"][dialect_of(component, names)]
    return {name: _canonical(name, dialect) for name in names}


def known_share(component: Component, names: Iterable[str]) -> float:
    """The share of a file's parameters that belongs to a component of any config, in its best dialect; 0 to 1."""
    known, canonical = _known_names(component), canonical_names(component, names)
    parameters = [name for name in canonical.values() if name.endswith(_PARAMETERS)]
    return sum(known.fullmatch(name) is not None for name in parameters) / max(len(parameters), 1)


def is_ignored(component: Component, name: str) -> bool:
    """Whether a canonical name is that of a tensor some tools write which has no effect."""
    return name.endswith(tuple(weights_map(component.map).get("ignored", ())))


def dialect_of(component: Component, names: Iterable[str]) -> str:
    """The dialect that leaves the fewest of the stored names unknown to the map."""
    names, known, dialects = list(names), _known_names(component), weights_map(component.map)["dialects"]
    return max(
        dialects, key=lambda key: sum(known.fullmatch(_canonical(name, dialects[key])) is not None for name in names)
    )


def dialect_name(component: Component | str, dialect: str, name: str) -> str:
    """How a dialect spells a canonical name; the inverse of `canonical_names`.

    Args:
        component: a component, or its role: "vae" is that of Qwen-Image.
        dialect: a key of the map's `dialects`.
        name: a canonical name.
    """
    row = next(all_components(component)) if isinstance(component, str) else component
    rules = weights_map(row.map)["dialects"][dialect]
    for stored, canonical in rules.get("segments", ()):
        name = _replace_segment(name, canonical, stored)
    return _replace_prefix(name, [(new, old) for old, new in rules["prefixes"]])


def needs_tensor(component: Component, stored_name: str, parts: Collection[str]) -> bool:
    """Whether a stored tensor may belong to one of the parts, judged by its name alone, before any header is read."""
    rules = weights_map(component.map)
    names = {_canonical(stored_name, dialect) for dialect in rules["dialects"].values()}
    if any(_own_paths(component).match(name) for name in names):
        return True  # though another dialect may read it as another part's
    found = {other_part(component, name) for name in names} - {None}
    return not found or not found.isdisjoint(parts)


def specs_of_layers(component: Component, specs: Iterable[TensorSpec], layers: Collection[int]) -> Iterator[TensorSpec]:
    """A component's tensors without those of its other layers, by number."""
    prefix = f"{component.layers}."
    for spec in specs:
        if not spec.name.startswith(prefix) or int(spec.name.removeprefix(prefix).partition(".")[0]) in layers:
            yield spec


def settings_of_names(component: Component, stored_names: Iterable[str]) -> dict[str, Any]:
    """The config fields that a checkpoint's tensor names determine, by the map's markers."""
    markers = weights_map(component.map).get("markers", {})
    found = set(canonical_names(component, stored_names).values())
    return {field: value for name in markers if name in found for field, value in markers[name].items()}


def other_part(component: Component, name: str) -> str | None:
    """The part of a tensor the map names only by its prefix (`lm_head.`, `visual.`), or None."""
    parts = weights_map(component.map).get("other_parts", {})
    return next((part for part, prefixes in parts.items() if name.startswith(tuple(prefixes))), None)


@cache
def _known_names(component: Component) -> re.Pattern[str]:
    """Matches every canonical name of any config: fields of rows are numbers, or as the map defines them."""
    rules = weights_map(component.map)
    names = [
        path + rf"\.(?:{'|'.join(parameter for parameter in _PARAMETERS if parameter in rule)})"
        for path, rule in _paths(component)
    ]
    fused = [rf".*\.{re.escape(rule['of'])}" for rule in rules.get("split", ())]
    prefixes = [re.escape(prefix) + ".*" for part in rules.get("other_parts", {}).values() for prefix in part]
    return re.compile("|".join([*names, *fused, *prefixes]))


@cache
def _own_paths(component: Component) -> re.Pattern[str]:
    """Matches the beginning of the component's own canonical names, to the dot before the parameter."""
    return re.compile(rf"(?:{'|'.join(path for path, _ in _paths(component))})\.")


def _paths(component: Component) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The pattern of each module's canonical name, whatever its fields, with its rule."""
    rules = weights_map(component.map)
    fields = rules.get("fields", {})
    for rule in rules["tensors"]:
        for spelling in _alternatives(rule["name"]):
            escaped = re.escape(spelling)
            yield re.sub(r"\\\{(\w+)\\\}", lambda field: rf"(?:{fields.get(field[1], '[0-9]+')})", escaped), rule


def _alternatives(pattern: str) -> list[str]:
    """`a.{b,c}.{n}` -> [`a.b.{n}`, `a.c.{n}`]."""
    found = re.search(r"\{([^{}]*,[^{}]*)\}", pattern)
    if not found:
        return [pattern]
    head, tail = pattern[: found.start()], pattern[found.end() :]
    return [spelling for choice in found[1].split(",") for spelling in _alternatives(head + choice + tail)]


def _spell(pattern: str, row: Mapping[str, Any]) -> list[str]:
    return [spelling.format_map(row) for spelling in _alternatives(pattern)]


def _field(name: str, row: Mapping[str, Any], config: Any) -> Any:
    return row[name] if name in row else getattr(config, name)


def _size(size: int | str, row: Mapping[str, Any], config: Any) -> int:
    """A dimension: a number, or a product of numbers and config or row fields such as `6*dim`."""
    if isinstance(size, int):
        return size
    return prod(int(term) if term.isdigit() else _field(term, row, config) for term in size.split("*"))


def _canonical(name: str, dialect: Mapping[str, Any]) -> str:
    name = _replace_prefix(name, dialect["prefixes"])
    for stored, canonical in dialect.get("segments", ()):
        name = _replace_segment(name, stored, canonical)
    return name


def _replace_segment(name: str, old: str, new: str) -> str:
    """Replaces whole dotted parts inside a name."""
    return f".{name}.".replace(f".{old}.", f".{new}.")[1:-1]


def _replace_prefix(name: str, replacements: Iterable[tuple[str, str]]) -> str:
    for old, new in replacements:
        if name.startswith(old):
            return new + name[len(old) :]
    return name
