"""int8 weights as ComfyUI writes them: a scale for the tensor or for each row, and optionally a rotation (ConvRot).

`int8_convrot` multiplied groups of a row's columns by an orthonormal, symmetric matrix before rounding, so that no
column sticks out; multiplying again undoes it. Source: comfy-kitchen's `int8_tensorwise`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import cache
from math import isqrt
from typing import Any, NamedTuple

import mlx.core as mx

from ..errors import CheckpointError
from .safetensors_files import Tensor

DTYPE = "I8"
NOTE = "comfy_quant"  # the last part of the name of a tensor whose bytes are JSON
SCALES = ("weight_scale", "scale_weight")
TENSORWISE, CONVROT = "int8_tensorwise", "int8_convrot"
_READ = (TENSORWISE, "float8_e4m3fn", "float8_e5m2")  # formats of notes
_MAX_NOTE = 4096
_QUARTER = ((1, 1, 1, -1), (1, 1, -1, 1), (1, -1, 1, 1), (-1, 1, 1, 1))


class Form(NamedTuple):
    """How one weight is stored.

    Attributes:
        group: columns that were rotated together; 0 for none.
        problem: why it cannot be read, or None.
    """

    group: int = 0
    problem: str | None = None


def form_of(tensor: Tensor, companions: Mapping[str, Tensor]) -> Form:
    """The form of an int8 weight, from its header and its note.

    Args:
        tensor: the weight's entry.
        companions: the tensors that belong to it, by the last part of their names.
    """
    scale = next((companions[word] for word in SCALES if word in companions), None)
    rows = tensor.shape[:1]
    if scale is None:
        return Form(problem="int8 without a scale")
    if scale.shape not in ((), (1,), (1, 1), rows, (*rows, 1)):
        return Form(problem=f"int8 with a scale of shape {scale.shape}")
    declared = note(companions[NOTE]) if NOTE in companions else {}
    if declared.get("format", TENSORWISE) != TENSORWISE:
        return Form(problem=f"{declared['format']}")
    if not declared.get("convrot"):
        return Form()
    group = declared.get("convrot_groupsize", 256)
    fits = type(group) is int and group >= 4 and 4 ** (group.bit_length() // 2) == group
    if len(tensor.shape) != 2 or not fits or tensor.shape[1] % group:
        return Form(problem=f"{CONVROT} with groups of {group!r:.20}")
    return Form(group)


def dense(integers: mx.array, scale: mx.array, group: int) -> mx.array:
    """The weight (rows, …) of int8 integers, fp32; without a rotation (group 0) of any shape.

    The rotation's sums are of integers below 2**24, so they are exact; all else is one product.
    """
    values = integers.astype(mx.float32)
    if group:
        values = (values.reshape(-1, group) @ signs(group)).reshape(integers.shape)
    factor = scale.astype(mx.float32).reshape(-1, *(1,) * (integers.ndim - 1))
    return values * (factor / isqrt(group) if group else factor)


@cache
def signs(group: int) -> mx.array:
    """The rotation (group, group) times the root of the group, a power of 4: 1 and -1, fp32."""
    quarter, matrix = mx.array(_QUARTER, dtype=mx.float32), mx.ones((1, 1))
    while matrix.shape[0] < group:
        matrix = mx.kron(matrix, quarter)
    return matrix


def note(tensor: Tensor) -> dict[str, Any]:
    """The JSON object in a note's bytes.

    Raises:
        CheckpointError: the file cannot be read, or the bytes are not one.
    """
    try:
        with tensor.file.open("rb") as file:
            file.seek(tensor.offset)
            declared = json.loads(file.read(min(tensor.nbytes, _MAX_NOTE)))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{tensor.file} says in {tensor.name} nothing readable ({error})") from error
    if not isinstance(declared, dict):
        raise CheckpointError(f"{tensor.file} says in {tensor.name} nothing readable ({declared!r:.40})")
    return declared


def formats(tensors: Mapping[str, Tensor]) -> Iterator[str]:
    """The formats that the readable notes among a file's tensors name; a rotated one is `int8_convrot`."""
    for name, tensor in tensors.items():
        if name.endswith(f".{NOTE}") and tensor.dtype == "U8":
            try:
                declared = note(tensor)
            except CheckpointError:
                continue  # told when the weight is read
            rotated = declared.get("format") == TENSORWISE and declared.get("convrot")
            yield CONVROT if rotated else str(declared.get("format"))


def foreign(tensors: Mapping[str, Tensor]) -> str | None:
    """The first format that a note names and nothing here reads."""
    return next((name for name in formats(tensors) if name not in (*_READ, CONVROT)), None)
