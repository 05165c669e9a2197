"""Finds the module and the factor that a LoRA file's tensor is, by its name. Reads no weights.

The spellings are data, `weights_map/lora.json`: prefixes, suffixes by dialect, what is refused, and how other models'
files are known. A new dialect is a line there. Sources of the dialects: diffusers' loaders and its
`_convert_non_diffusers_qwen_lora_to_diffusers`, PEFT's state dicts, LyCORIS' modules, ComfyUI's key maps.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, some
from ..weights.mapping import weights_map
from ..weights.recognize import model_of, other_model, transformers
from ..weights.safetensors_files import Tensor
from .kinds import Shapes

_DTYPES = ("F32", "F16", "BF16", "F64", "F8_E4M3", "F8_E5M2")
_ALPHA_DTYPES = (*_DTYPES, "I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64")


@dataclass(frozen=True)
class Binding:
    """A file's tensors by target and role.

    Attributes:
        tensors: target -> role -> tensor.
        dialects: the dialects of the names that were bound, most frequent first.
        unmatched: names that belong to no target.
    """

    tensors: Mapping[str, Mapping[str, Tensor]]
    dialects: tuple[str, ...]
    unmatched: tuple[str, ...]


_BIAS_ROLES = ("up_bias", "bias_difference")


def bind(path: Path, tensors: Mapping[str, Tensor], targets: Shapes) -> Binding:
    """Finds the target and the role of every tensor of a file.

    Raises:
        CheckpointError: nothing binds, the file was made for a different model, it has something twice, or it uses an
            unsupported method.
    """
    pieces = _pieces(targets)
    flat = {place.replace(".", "_"): place for place in pieces}
    bound: dict[str, dict[str, Tensor]] = {}
    counts: dict[str, int] = {}
    unmatched = []
    for name, tensor in tensors.items():
        for place, suffix in _readings(name, pieces, flat):
            _refuse(path, name, suffix)
            if meaning := _meaning(suffix):
                dialect, role = meaning
                if role in _BIAS_ROLES and len(targets[pieces[place][0]]) == 1:
                    continue  # norms have no bias
                for target, part in _parts(path, place, pieces[place], role, tensor, targets):
                    twin = bound.setdefault(target, {}).setdefault(role, part)
                    if twin is not part:
                        raise CheckpointError(
                            f"{path} gives {target} twice, as {twin.name} and {name}: "
                            "split its adapters into separate files"
                        )
                if role != "alpha":  # all dialects have the same name for it
                    counts[dialect] = counts.get(dialect, 0) + 1
                break
        else:
            unmatched.append(name)
    for target in [target for target, roles in bound.items() if roles.keys() == {"alpha"}]:
        unmatched.append(bound.pop(target)["alpha"].name)  # harmless: nothing to scale
    _check_model(path, list(tensors), unmatched, targets)
    _check_width(path, bound, targets)
    _check_whole(path, unmatched, pieces)
    return Binding(bound, tuple(sorted(counts, key=lambda dialect: -counts[dialect])), tuple(unmatched))


def _pieces(targets: Shapes) -> dict[str, tuple[str, ...]]:
    """A module a file may name -> the targets its rows belong to: itself, or those that some tools fuse into one."""
    pieces = {target: (target,) for target in targets}
    for fused, parts in weights_map("lora")["fused"].items():
        for target in targets:
            if target.endswith(f".{parts[0]}"):
                stem = target.removesuffix(parts[0])
                if all(f"{stem}{part}" in targets for part in parts):
                    pieces.setdefault(f"{stem}{fused}", tuple(f"{stem}{part}" for part in parts))
    return pieces


@dataclass(frozen=True)
class Rows(Tensor):
    """Some rows of a tensor.

    Attributes:
        first: index of the first row; `shape` has their number.
    """

    first: int = 0


# Roles whose rows are the module's outputs; all others are the same for each part of a fused module.
_BY_ROW = ("up", "up_bias", "hada_w1_a", "hada_w2_a", "magnitude", "difference", "bias_difference", "replacement")


def _parts(
    path: Path, place: str, pieces: tuple[str, ...], role: str, tensor: Tensor, targets: Shapes
) -> Iterator[tuple[str, Tensor]]:
    """(target, its share of the tensor), 1x1 convolutions as matrices."""
    if len(tensor.shape) > 2 and set(tensor.shape[2:]) == {1} and role != "alpha":
        tensor = replace(tensor, shape=tensor.shape[:2])
    if len(pieces) == 1:
        yield pieces[0], tensor
        return
    if role.startswith("lokr"):
        raise CheckpointError(
            f"{path} has a LoKr for {place}, {len(pieces)} matrices in one ({tensor.name}): save it for each of them"
        )
    total, first = sum(targets[target][0] for target in pieces), 0
    for target in pieces:
        rows = targets[target][0]
        part = tensor
        if role in _BY_ROW and tensor.shape[:1] == (total,):
            own = {field.name: getattr(tensor, field.name) for field in fields(Tensor)}
            part = Rows(**own | {"shape": (rows, *tensor.shape[1:])}, first=first)
        yield target, part
        first += rows


def _readings(name: str, places: Mapping[str, Any], flat: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Every (module, suffix) that a name can be read as."""
    spellings = weights_map("lora")
    for wrapper in spellings["wrappers"]:
        name = f".{name}".replace(f".{wrapper}.", ".").replace(f"{wrapper}_", "")[1:]
    bare = _without(name, spellings["prefixes"])
    parts = bare.split(".")
    for end in range(len(parts) - 1, 0, -1):
        if (place := ".".join(parts[:end])) in places:
            yield place, ".".join(parts[end:])
    if name.startswith(tuple(spellings["flattened_prefixes"])):
        module, _, suffix = _without(name, spellings["flattened_prefixes"]).partition(".")
        if module in flat:
            yield flat[module], suffix


def _without(name: str, prefixes: Iterable[str]) -> str:
    """A name without any of these prefixes, in any order."""
    while prefix := next((prefix for prefix in prefixes if name.startswith(prefix)), None):
        name = name[len(prefix) :]
    return name


@cache
def _meaning(suffix: str) -> tuple[str, str] | None:
    """(dialect, role) of the suffix after a module's name; None if unknown."""
    for dialect, roles in weights_map("lora")["dialects"].items():
        for pattern, role in roles.items():
            if _wildcard(pattern).fullmatch(suffix):
                return dialect, role
    return None


@cache
def _wildcard(pattern: str) -> re.Pattern[str]:
    return re.compile(re.escape(pattern).replace(r"\*", ".+"))


def _refuse(path: Path, name: str, suffix: str) -> None:
    for method, patterns in weights_map("lora")["refused"].items():
        if any(_wildcard(pattern).fullmatch(suffix) for pattern in patterns):
            raise CheckpointError(
                f"{path} uses {method} ({name}): LoRA, LoHa, LoKr, DoRA and full differences are read, "
                "so convert it to one of them"
            )


def _own_model(targets: Shapes) -> str:
    """The generation that the targets are a transformer's of."""
    return model_of(f"{target}." for target in targets) or "this model"


def _check_model(path: Path, names: list[str], unmatched: list[str], targets: Shapes) -> None:
    """Refuses a file that does not fit the model, saying which model it seems to be for."""
    own, encoders = _own_model(targets), re.compile(weights_map("lora")["text_encoders"])
    foreign = [name for name in unmatched if not encoders.search(name)]
    model, sample = other_model(own, foreign) or (None, None)
    if len(unmatched) < len(names):
        if model:  # blocks of another model are often named, and sometimes shaped, like ours
            raise CheckpointError(
                f"{path} was made for {model}, although some of its names fit: it also has {sample}; "
                f"use a LoRA made for {own}"
            )
        return
    if not names:
        raise CheckpointError(f"{path} holds no tensors: give a LoRA that was saved with some")
    summary = f"none of its {len(names)} tensors belongs to one of the {len(targets)} modules ({some(names)})"
    if model:
        raise CheckpointError(f"{path} was made for {model}: {summary}; use a LoRA made for {own}")
    if not foreign:
        raise CheckpointError(
            f"{path} changes only a text encoder: {summary}; Qwen-Image takes LoRAs of its transformer alone"
        )
    if not any(re.search(r"lora|lokr|hada|\.diff|\.alpha$|dora_scale", name) for name in names):
        raise CheckpointError(f"{path} is not a LoRA: {summary}; a whole model is given as the model")
    raise CheckpointError(f"{path} was made for a different model: {summary}; use a LoRA made for {own}")


def _check_width(path: Path, bound: Mapping[str, Mapping[str, Tensor]], targets: Shapes) -> None:
    """Refuses a file whose names are those of every generation, and whose width is another's."""
    own = _own_model(targets)
    widths = {rules["marks"]["width"]: rules["model"] for rules in transformers() if rules["model"] != own}
    for target, roles in bound.items():
        down = roles.get("down")
        if down is None or len(down.shape) != 2 or ".attn." not in target:
            continue
        width, expected = down.shape[1], targets[target][-1]
        if width != expected and width in widths:
            raise CheckpointError(
                f"{path} was made for {widths[width]}: {down.name} has {width} columns, and {target} has {expected}; "
                f"use a LoRA made for {own}"
            )


def _check_whole(path: Path, unmatched: Iterable[str], places: Mapping[str, Any]) -> None:
    """Refuses a file that replaces weights under their own names, and would be half applied without them."""
    for name in unmatched:
        if any(suffix == "weight" for _, suffix in _readings(name, places, {})):
            raise CheckpointError(
                f"{path} holds whole weights in addition to its changes ({name}), as distillations with an output "
                "layer for each step do, which are not run here: use a LoRA of changes alone"
            )


def check_dtypes(path: Path, tensors: Mapping[str, Tensor], binding: Binding) -> None:
    """Raises CheckpointError for a tensor stored in an unsupported dtype."""
    roles = {tensor.name: role for found in binding.tensors.values() for role, tensor in found.items()}
    for name, tensor in tensors.items():
        role = roles.get(name)  # tensors without a module are never read
        if role is not None and tensor.dtype not in (_ALPHA_DTYPES if role == "alpha" else _DTYPES):
            raise CheckpointError(
                f"{path} stores {name} as {tensor.dtype}: {', '.join(_DTYPES)} are read, so save it as one of them"
            )
