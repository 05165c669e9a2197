"""What a single file of weights is: a component of which kind, or a LoRA; told from its header alone."""

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
from ..registry import TEXT_ENCODER, TRANSFORMER, VISION, all_components
from ..weights.gguf import read_gguf
from ..weights.loader import ComponentWeights
from ..weights.mapping import canonical_names, matrix_shapes, shown_settings, weights_map
from ..weights.recognize import component_of_names, foreign_format, holds, kinds_of, shard_of, unreadable
from ..weights.safetensors_files import Tensor, is_gguf
from ..weights.snapshot import DEMO_ROOT, weight_file


@dataclass(frozen=True)
class FileReport:
    """A file of weights.

    Attributes:
        path: where it is.
        kind: one of `FOLDERS`, several of these, or "LoRA".
        tensors: how many it holds.
        file_bytes: of their data.
        forms: how they lie in it, and how many bytes so.
        facts: what else is to be said, by label.
        resident_bytes: what it takes in memory once it is loaded, in bf16 (an autoencoder in fp32); None for a LoRA,
            and for a component that is not of the released models' size.
    """

    path: str
    kind: str
    tensors: int
    file_bytes: int
    forms: dict[str, int]
    facts: dict[str, str]
    resident_bytes: int | None = None


def identify(path: Path) -> FileReport:
    """Says what a safetensors or GGUF file is.

    Raises:
        RequestError: there is no such file.
        CheckpointError: it is damaged, a pickle, or holds nothing this package knows.
    """
    tensors = weight_file(path).tensors
    forms: dict[str, int] = {}
    for tensor in tensors.values():
        forms[tensor.dtype] = forms.get(tensor.dtype, 0) + tensor.nbytes
    forms = dict(sorted(forms.items(), key=lambda form: -form[1]))
    total, flags = sum(forms.values()), weights_map("files")["flags"]
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
    """A LoRA for one of the sizes of model that are known, and which that is.

    Raises:
        RequestError, CheckpointError: as `read_lora`, for the released models.
    """
    transformer = next(all_components(TRANSFORMER))
    try:
        return read_lora(path, matrix_shapes(transformer, transformer.released), strength), "the released models"
    except CheckpointError:
        config = json.loads((DEMO_ROOT / "shared/transformer/config.json").read_bytes())
        try:
            demo = transformer.config.from_dict(config)
            return read_lora(path, matrix_shapes(transformer, demo), strength), "the demo models"
        except CheckpointError:
            pass
        raise


def _facts(path: Path, parts: Mapping[str, Mapping[str, Tensor]]) -> dict[str, str]:
    """What is to be said of a file with components in it."""
    flags = weights_map("files")["flags"]
    facts: dict[str, str] = {}
    for kind, tensors in parts.items():
        component = component_of_names(tensors)
        assert component is not None  # `kinds_of` found its kind
        names = set(canonical_names(component, tensors).values())
        facts |= dict(said for name, said in weights_map(component.map).get("facts", {}).items() if name in names)
        if kind == TEXT_ENCODER:
            facts["vision tower"] = "yes" if any(holds(row, tensors) for row in all_components(VISION)) else "no"
            if not holds(component, tensors):
                facts["language model"] = "no: this file only has to lie beside the text encoder's"
        if form := foreign_format(tensors):
            facts |= {"format": form, "cannot be used": unreadable(tensors) or ""}
    if is_gguf(path):
        facts["architecture"] = _architecture(path).removeprefix(" of ") or "not said"
    if len(parts) == 1 and (shard := shard_of(next(iter(parts.values())))):
        facts["part"] = f"{shard}: give the folder that has all of them"
    elif "cannot be used" not in facts:
        facts["taken by"] = ", ".join(flags[kind] for kind in parts)
    return facts


def _architecture(path: Path) -> str:
    """What a GGUF file says its model is, as " of qwen2vl"; "" if nothing."""
    said = read_gguf(path)[1].get("general.architecture")
    return f" of {one_line(said, 80)}" if isinstance(said, str) else ""


def _resident_bytes(tensors: Mapping[str, Tensor]) -> int | None:
    component = component_of_names(tensors)
    assert component is not None
    try:
        config = replace(component.released, **shown_settings(component, tensors))
        weights = ComponentWeights(component, config, tensors, component.resident)
    except CheckpointError:
        return None
    dtype = mx.float32 if component.full_precision else mx.bfloat16
    return sum(weights.resident_bytes(part, dtype) for part in component.resident)
