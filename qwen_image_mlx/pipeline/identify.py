"""Identifies a single weights file from its header: which component it is, or whether it is a LoRA."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx

from ..errors import CheckpointError
from ..lora.description import describe
from ..lora.file import LoRA, read_lora
from ..outside import one_line
from ..registry import CONTROLS, TEXT_ENCODER, TRANSFORMER, VISION, all_components
from ..weights import int8
from ..weights.gguf import read_gguf
from ..weights.loader import ComponentWeights
from ..weights.mapping import canonical_names, matrix_shapes, settings_of_names, weights_map
from ..weights.recognize import (
    component_of_names,
    family_of,
    foreign_format,
    holds,
    kinds_of,
    model_of,
    shard_of,
    unreadable,
)
from ..weights.safetensors_files import Tensor, is_gguf, read_header
from ..weights.snapshot import DEMO_ROOT, weight_file


@dataclass(frozen=True)
class FileReport:
    """A description of a weights file.

    Attributes:
        path: the file.
        kind: one of `FOLDERS`, several of these, "ControlNet" or "LoRA".
        tensors: the number of tensors.
        file_bytes: bytes of their data.
        forms: bytes by storage format.
        facts: further facts, by label.
        resident_bytes: bytes in memory after loading in bf16 (an autoencoder in fp32); None for the last two, and for a
            component of a size that no released model has.
    """

    path: str
    kind: str
    tensors: int
    file_bytes: int
    forms: dict[str, int]
    facts: dict[str, str]
    resident_bytes: int | None = None


def identify(path: Path) -> FileReport:
    """Identifies a safetensors or GGUF file.

    Raises:
        RequestError: the file does not exist.
        CheckpointError: it is damaged, a pickle, or holds nothing this package knows.
    """
    tensors = weight_file(path).tensors
    forms: dict[str, int] = {}
    for tensor in tensors.values():
        forms[tensor.dtype] = forms.get(tensor.dtype, 0) + tensor.nbytes
    forms = dict(sorted(forms.items(), key=lambda form: -form[1]))
    total, flags = sum(forms.values()), weights_map("files")["flags"]
    if family := family_of(tensors):
        facts = {"made for": CONTROLS[family].title, "taken by": flags["ControlNet"]}
        if form := foreign_format(tensors):
            facts |= {"format": form, "cannot be used": unreadable(tensors) or ""}
        return FileReport(str(path), "ControlNet", len(tensors), total, forms, facts)
    if parts := kinds_of(tensors):
        facts, kind = _facts(path, parts), ", ".join(parts)
        sizes = [_resident_bytes(own) for own in parts.values()]
        known = [size for size in sizes if size is not None]
        resident = sum(known) if len(known) == len(sizes) and "cannot be used" not in facts else None
        return FileReport(str(path), kind, len(tensors), total, forms, facts, resident)
    if sentence := unreadable(tensors):
        raise CheckpointError(sentence)
    if is_gguf(path):
        raise CheckpointError(
            f"{path} is a whole GGUF file{_architecture(path)}, but not a part of a Qwen-Image model: "
            "give one that holds its transformer or its text encoder"
        )
    try:
        lora, model = read_known_lora(path)
    except CheckpointError as error:
        raise CheckpointError(f"{path} is neither a part of a Qwen-Image model nor a LoRA for one: {error}") from error
    facts = dict(describe(lora)) | {"made for": model, "taken by": flags["LoRA"]}
    return FileReport(str(path), "LoRA", len(tensors), total, forms, facts)


def read_known_lora(path: Path, strength: float = 1.0) -> tuple[LoRA, str]:
    """A LoRA for the released models of some generation or for the demo models, and which of them.

    Raises:
        RequestError: the file does not exist.
        CheckpointError: it is damaged, or not a LoRA for the released models.
    """
    first, *others = all_components(TRANSFORMER)
    demo = first.config.from_dict(json.loads((DEMO_ROOT / "shared/transformer/config.json").read_bytes()))
    known = [(row, row.released, f"the released models of {weights_map(row.map)['model']}") for row in (first, *others)]
    faults: dict[str, CheckpointError] = {}
    for row, config, models in [*known, (first, demo, "the demo models")]:
        try:
            return read_lora(path, matrix_shapes(row, config), strength), models
        except CheckpointError as error:
            faults.setdefault(weights_map(row.map)["model"], error)
    own = model_of(read_header(path)[0]) if path.is_file() else None
    raise faults.get(own or "", next(iter(faults.values())))


def _facts(path: Path, parts: Mapping[str, Mapping[str, Tensor]]) -> dict[str, str]:
    """Further facts on a file that holds components."""
    flags = weights_map("files")["flags"]
    facts: dict[str, str] = {}
    for kind, tensors in parts.items():
        component = component_of_names(tensors)
        assert component is not None  # `kinds_of` found its kind
        names = set(canonical_names(component, tensors).values())
        facts["generation"] = weights_map(component.map)["model"]
        facts |= dict(
            declared for name, declared in weights_map(component.map).get("facts", {}).items() if name in names
        )
        if kind == TEXT_ENCODER:
            facts["vision tower"] = "yes" if any(holds(row, tensors) for row in all_components(VISION)) else "no"
            if not holds(component, tensors):
                facts["language model"] = "no: put this file next to the text encoder's"
        if held := sorted({name for name in int8.formats(tensors) if name.startswith("int8")}):
            facts["stored as"] = ", ".join(held)
        if form := foreign_format(tensors):
            facts |= {"format": form, "cannot be used": unreadable(tensors) or ""}
    if is_gguf(path):
        facts["architecture"] = _architecture(path).removeprefix(" of ") or "not stated"
    if len(parts) == 1 and (shard := shard_of(next(iter(parts.values())))):
        facts["part"] = f"{shard}: give the folder that has all of them"
    elif "cannot be used" not in facts:
        facts["taken by"] = ", ".join(flags[kind] for kind in parts)
    return facts


def _architecture(path: Path) -> str:
    """The architecture that a GGUF file states, such as " of qwen2vl"; "" if it states none."""
    declared = read_gguf(path)[1].get("general.architecture")
    return f" of {one_line(declared, 80)}" if isinstance(declared, str) else ""


def _resident_bytes(tensors: Mapping[str, Tensor]) -> int | None:
    component = component_of_names(tensors)
    assert component is not None
    try:
        config = replace(component.released, **settings_of_names(component, tensors))
        weights = ComponentWeights(component, config, tensors, component.resident)
    except CheckpointError:
        return None
    dtype = mx.float32 if component.full_precision else mx.bfloat16
    return sum(weights.resident_bytes(part, dtype) for part in component.resident)
