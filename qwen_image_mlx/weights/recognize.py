"""Identifies a weights file by names and types alone: the components in it, and how it is quantized.

The one place that decides it, for `info`, for every flag that takes a file, and for the message when one is refused.
The spellings are data, `weights_map/files.json`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from ..errors import CheckpointError, some
from ..registry import CONTROLS, FOLDERS, LABELS, TRANSFORMER, Component, all_components
from . import int8
from .mapping import canonical_names, known_share, other_part, weights_map
from .safetensors_files import Tensor

_KNOWN = 0.5  # the share of known names above which a file is a component's
_LORA = re.compile(r"lora|hada|lokr")
_SHARD = re.compile(r"-0*(\d+)-of-0*(\d+)\.safetensors$")


def parts_of(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The components of an all-in-one file, by kind, each with the names it has in a separate file.

    Args:
        tensors: the file's tensors, by stored name.

    Returns:
        One of `FOLDERS` -> its tensors; {} where no name has a component's prefix.
    """
    names, found = _unwrap(tensors), {}
    for kind, patterns in weights_map("files")["parts"].items():
        for pattern in map(re.compile, patterns):
            own = {name[match.end() :]: tensor for name, tensor in names.items() if (match := pattern.match(name))}
            if own and not looks_like_a_lora(own):
                found[kind] = own
                break
    return found


def part_of(folder: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file that belong to one folder: all of them, or those of one component of several.

    Raises:
        CheckpointError: the file holds several parts, and none of that kind.
    """
    parts = parts_of(tensors)
    if folder in parts and len(parts) == 1:  # tensors without a prefix belong to it, too
        own = {id(tensor) for tensor in parts[folder].values()}
        rest = _unwrap({name: tensor for name, tensor in tensors.items() if id(tensor) not in own})
        if twice := parts[folder].keys() & rest.keys():
            raise _twice(tensors, min(twice))
        return parts[folder] | rest
    if folder in parts:
        return parts[folder]
    if len(parts) > 1:
        held = " and ".join(LABELS[kind] for kind in parts)
        raise CheckpointError(
            f"{_file(tensors)} is an all-in-one checkpoint with {held}, not with {LABELS[folder]}: give a file "
            "that has one"
        )
    return _unwrap(tensors)


def kinds_of(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The components in a file with their tensors, however they are quantized; {} if it is something else."""
    parts = parts_of(tensors)
    if len(parts) > 1:
        return {kind: own for kind, own in parts.items() if kind_of(own) == kind}
    kind = next(iter(parts), None) or kind_of(_unwrap(tensors))
    if kind is None:
        return {}
    own = part_of(kind, tensors)
    return {kind: own} if kind_of(own) == kind else {}


def kind_of(names: Iterable[str]) -> str | None:
    """The folder that more than half of some names belong to; None without one."""
    found = component_of_names(names)
    return found and found.role


def component_of_names(names: Iterable[str]) -> Component | None:
    """The component, of any class, that more than half of some names belong to; None without one."""
    plain = {re.sub(r"\.qweight$", ".weight", name) for name in names}
    shares = {component: known_share(component, plain) for component in all_components(*FOLDERS)}
    best = max(shares, key=shares.get)
    return best if shares[best] > _KNOWN else None


def holds(component: Component, names: Iterable[str]) -> bool:
    """Whether some names belong to the component itself, not only to others stored in the same files."""
    canonical = canonical_names(component, names).values()
    return any(known_share(component, [name]) and other_part(component, name) is None for name in canonical)


def foreign_format(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of an unsupported quantization; None if all of it is supported."""
    if found := int8.foreign(tensors):
        return found
    for rule in weights_map("files")["formats"]:
        if any(re.search(pattern, name) for pattern in rule.get("without", ()) for name in tensors):
            continue
        dtypes = rule.get("dtypes")
        names = [name for name, tensor in tensors.items() if not dtypes or tensor.dtype in dtypes]
        found = (map(re.compile(pattern).search, names) for pattern in rule["names"])
        matches = [next(filter(None, hits), None) for hits in found]
        if all(matches):
            return rule["format"].format(*matches[0].groups())
    if packed := {tensor.dtype for tensor in tensors.values() if tensor.container == "gguf"}:
        from .gguf_blocks import DECODED  # here: most checkpoints have no GGUF file

        if odd := packed - DECODED:
            return f"GGUF's {some(sorted(odd))}"
    return None


def unreadable(tensors: Mapping[str, Tensor]) -> str | None:
    """Why a quantized file cannot be used, and what to use instead, as a sentence; None if it can."""
    form = foreign_format(tensors)
    if form is None:
        return None
    from .gguf_blocks import DECODED  # for this sentence alone

    return (
        f"{_file(tensors)} is quantized as {form}, which is not read here: use a bf16, an fp8 (e4m3 or e5m2), an int8 "
        f"(int8_tensorwise, int8_convrot) or a GGUF file ({', '.join(sorted(DECODED))}) of the same model; a bf16 one "
        "can be quantized as small"
    )


def family_of(tensors: Mapping[str, Tensor]) -> str | None:
    """The class of a file's ControlNet, a key of `CONTROLS`; None if it is not one."""
    for name, entry in CONTROLS.items():
        (row,) = entry.components
        marks = weights_map(row.map)["control"]
        found = set(canonical_names(row, tensors).values())
        if {marks["marker"], marks["layer"]} <= found and known_share(row, tensors) > _KNOWN:
            return name
    return None


def looks_like_a_lora(names: Iterable[str]) -> bool:
    """Whether some names are those of a LoRA's factors."""
    return any(_LORA.search(name) for name in names)


def check_kind(component: Component, tensors: Mapping[str, Tensor]) -> None:
    """Raises CheckpointError if a component's tensors cannot be read, or are something else."""
    if not tensors:
        return
    kind, share, what = component.home, known_share(component, tensors), None
    own, cure = weights_map(component.map).get("model"), "give the file of one"
    if share < _KNOWN and (other := kind_of(tensors)) not in (None, kind):
        what = f"{LABELS[other]} of Qwen-Image's kind"
    elif kind == TRANSFORMER and share < 1 and (found := other_model(own, tensors)):
        what = found[0]
    elif kind == TRANSFORMER and family_of(tensors):
        what, cure = "a ControlNet", "give it as one"
    elif share < 1 and (model := _other_generation(component, tensors)):
        what = f"{LABELS[kind]} of {model}"
    elif sentence := unreadable(tensors):
        raise CheckpointError(sentence)
    elif share < _KNOWN and looks_like_a_lora(tensors):
        what, cure = "a LoRA", "give it as a LoRA"
    elif share < _KNOWN:
        what = f"something else ({some(list(tensors))})"
    elif component.label and not holds(component, tensors):
        others = (row for row in all_components() if row.label)
        there = next((row.label for row in others if holds(row, tensors)), "nothing")
        raise CheckpointError(
            f"{_file(tensors)} holds {there} and not {component.label}: give a file that has it; an mmproj file "
            "of llama.cpp only has to be in its text encoder's folder"
        )
    if what is not None:
        raise CheckpointError(f"{_file(tensors)} holds {what}, not {LABELS[kind]} of {own}: {cure}")


def shard_of(tensors: Mapping[str, Tensor]) -> str | None:
    """ "shard 1 of 9", where a single file's name marks it as one of several."""
    files = {tensor.file for tensor in tensors.values()}
    match = _SHARD.search(next(iter(files)).name) if len(files) == 1 else None
    return f"shard {match[1]} of {match[2]}" if match and match[2] != "1" else None


def transformers() -> list[Mapping[str, Any]]:
    """The weights maps of all transformers; `model` names their generation, and `marks` tells it from the others."""
    return [weights_map(row.map) for row in all_components(TRANSFORMER)]


def model_of(names: Iterable[str]) -> str | None:
    """The generation that a transformer's tensors, or changes of them, are of; None if all have these names."""
    names = list(names)
    marks = ((rules["model"], rules["marks"]["names"]) for rules in transformers())
    return next((model for model, pattern in marks if any(re.search(pattern, name) for name in names)), None)


def other_model(own: str | None, names: Iterable[str]) -> tuple[str, str] | None:
    """A model other than `own` that a file seems to be of, and the name that shows it; None without one."""
    names = list(names)
    marks = [(rules["marks"]["names"], rules["model"]) for rules in transformers()]
    marks += weights_map("lora")["other_models"]
    found = ((model, name) for pattern, model in marks if model != own for name in names if re.search(pattern, name))
    return next(found, None)


def _other_generation(component: Component, tensors: Mapping[str, Tensor]) -> str | None:
    """The generation that all names of a file belong to, if it is not the component's."""
    found = component_of_names(tensors)
    if found is None or found.home != component.home or known_share(found, tensors) < 1:
        return None
    model: str = weights_map(found.map)["model"]
    return model if model != weights_map(component.map).get("model") else None


def _file(tensors: Mapping[str, Tensor]) -> Any:
    return next(iter(tensors.values())).file


def _unwrap(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by their names, without the wrapper names that torch.compile and similar tools insert."""
    wrappers, found = weights_map("files")["wrappers"], {}
    for name, tensor in tensors.items():
        plain = f".{name}"
        for wrapper in wrappers:
            plain = plain.replace(f".{wrapper}.", ".")
        plain = plain[1:].removeprefix("module.")
        if plain in found:
            raise _twice(tensors, plain)
        found[plain] = tensor
    return found


def _twice(tensors: Mapping[str, Tensor], name: str) -> CheckpointError:
    return CheckpointError(f"{_file(tensors)} has {name} twice, under two spellings: use another file")
