"""Decodes the data of GGUF tensors: rows of quantized blocks to dense numbers, or to MLX's own packed form.

The fields of a block and their formulas are those of ggml's `ggml-common.h` and of `dequantize_row_*` in its
`ggml-quants.c`, https://github.com/ggml-org/ggml/tree/master/src.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import mlx.core as mx
import numpy as np

from ..errors import CheckpointError
from .gguf import GgufTensor
from .packed import Packed

_CHUNK = 1 << 15  # elements decoded at a time: a multiple of every block size, and small enough for a core's cache


def decode(tensor: GgufTensor) -> mx.array:
    """Read one tensor's data as dense floating-point numbers.

    Quantized types give exactly what ggml's formulas give when each operation rounds to float32. Reads the tensor's
    bytes only; at its peak it holds the float32 values twice.

    Args:
        tensor: A tensor `read_gguf` found.

    Returns:
        (*tensor.shape), float16 for F16, bfloat16 for BF16, else float32.

    Raises:
        CheckpointError: The type is not in `DECODED`, or the file can no longer be read as its header said.
    """
    if tensor.dtype not in _DECODERS:
        raise CheckpointError(
            f"{tensor.file} holds the tensor {tensor.name!r} as {tensor.dtype}, which is not decoded: "
            f"use a file made of {', '.join(sorted(DECODED))}"
        )
    elements, layout, values_of = _DECODERS[tensor.dtype]
    out = np.empty((tensor.nbytes // layout.itemsize, elements), np.float32 if layout.names else layout)
    row = 0
    with np.errstate(invalid="ignore"):  # a scale that is not finite makes NaN, as it does in ggml
        for blocks in _blocks(tensor, layout, _CHUNK // elements):
            out[row : row + len(blocks)] = values_of(blocks)
            row += len(blocks)
    values = mx.array(out.reshape(tensor.shape))
    return values.view(mx.bfloat16) if tensor.dtype == "BF16" else values


def packed(tensor: GgufTensor) -> Packed | None:
    """Read a Q4_0, Q4_1 or Q8_0 matrix in MLX's affine form, group 32, without decoding it.

    The form is exact: the integers are the file's, the scales are its float16 ones, and the bias of the types that
    have none, -8 or -128 times the scale, is exact in float16. Where that product overflows (a scale above 8188 or
    511), scales and biases are float32. `dequantize(mx.float32)` equals `decode(tensor)`; computed in
    float16, as `mx.dequantize` does with these scales, products round to 11 bits.

    Args:
        tensor: A tensor `read_gguf` found.

    Returns:
        The matrix with bits 4, 4 or 8 and scales and biases (rows, columns / 32); None if the type is different, the
        tensor is empty or does not have two dimensions, or a scale is infinite or NaN.

    Raises:
        CheckpointError: The file can no longer be read as its header said.
    """
    if tensor.dtype not in _ZEROS or len(tensor.shape) != 2 or not tensor.nbytes:
        return None
    zero = _ZEROS[tensor.dtype]
    elements, layout, _ = _DECODERS[tensor.dtype]
    chunks = [_pack(blocks) for blocks in _blocks(tensor, layout, _CHUNK // elements)]
    words, scales, biases = (np.concatenate(parts) for parts in zip(*chunks, strict=True))
    if not (np.isfinite(scales).all() and np.isfinite(biases).all()):
        return None
    if zero:
        with np.errstate(over="ignore"):
            biases = scales * np.float16(-zero)
        if not np.isfinite(biases).all():
            scales = scales.astype(np.float32)
            biases = scales * np.float32(-zero)
    rows = tensor.shape[0]
    weight, scales, biases = (mx.array(part.reshape(rows, -1)) for part in (words, scales, biases))
    return Packed(weight, scales, biases, group_size=elements, bits=8 if tensor.dtype == "Q8_0" else 4)


# A block is a numpy record whose fields are those of ggml's struct of the same name.


def _blocks(tensor: GgufTensor, layout: np.dtype, maximum: int) -> Iterator[np.ndarray]:
    """The tensor's blocks, at most `maximum` at a time, each time in newly allocated memory."""
    left = tensor.nbytes // layout.itemsize
    try:
        with tensor.file.open("rb") as file:
            file.seek(tensor.offset)
            while left:
                blocks = np.empty(min(left, maximum), layout)
                if file.readinto(blocks.view(np.uint8)) != blocks.nbytes:
                    raise CheckpointError(f"{tensor.file} ends inside the tensor {tensor.name!r}: download it again")
                left -= len(blocks)
                yield blocks
    except OSError as error:
        raise CheckpointError(
            f"{tensor.file} cannot be read ({error.strerror}): check that it exists and is yours"
        ) from error


def _fields(data: np.ndarray, bits: int) -> np.ndarray:
    """(..., n) bytes to (..., 8 / bits, n): first the lowest `bits` bits of every byte, then the next ones, ..."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    return (data[..., None, :] >> shifts) & np.uint8((1 << bits) - 1)


def _half(data: np.ndarray) -> np.ndarray:
    """(n,) float16 to (n, 1) float32."""
    return data.astype(np.float32)[:, None]


def _integers(blocks: np.ndarray, bits: int) -> np.ndarray:
    """The unsigned integers (n, 32) of the types with 32 elements and 4 or 5 bits."""
    low = _fields(blocks["qs"], 4).reshape(-1, 32)
    return low | np.unpackbits(blocks["qh"], axis=1, bitorder="little") << np.uint8(4) if bits == 5 else low


def _plain(blocks: np.ndarray) -> np.ndarray:
    return blocks[:, None]


def _q4_0(blocks: np.ndarray) -> np.ndarray:
    return _half(blocks["d"]) * (_integers(blocks, 4).astype(np.float32) - 8)


def _q4_1(blocks: np.ndarray) -> np.ndarray:
    return _half(blocks["d"]) * _integers(blocks, 4) + _half(blocks["m"])


def _q5_0(blocks: np.ndarray) -> np.ndarray:
    return _half(blocks["d"]) * (_integers(blocks, 5).astype(np.float32) - 16)


def _q5_1(blocks: np.ndarray) -> np.ndarray:
    return _half(blocks["d"]) * _integers(blocks, 5) + _half(blocks["m"])


def _q8_0(blocks: np.ndarray) -> np.ndarray:
    return _half(blocks["d"]) * blocks["qs"]


def _scale(scales: np.ndarray, integers: np.ndarray, lows: np.ndarray | None = None) -> np.ndarray:
    """scale * integer - low for groups of a superblock: (n, groups), (n, 256), (n, groups) to (n, 256), float32."""
    values = integers.reshape(*scales.shape, -1) * scales[..., None]
    if lows is not None:
        values -= lows[..., None]
    return values.reshape(len(values), 256)


def _q2_k(blocks: np.ndarray) -> np.ndarray:
    factors = _fields(blocks["scales"], 4)
    return _scale(_half(blocks["d"]) * factors[:, 0], _fields(blocks["qs"], 2), _half(blocks["dmin"]) * factors[:, 1])


def _q3_k(blocks: np.ndarray) -> np.ndarray:
    low, high = _fields(blocks["scales_low"], 4), _fields(blocks["scales_high"], 2)
    factors = (low.reshape(-1, 16) | high.reshape(-1, 16) << np.uint8(4)).astype(np.float32) - 32
    integers = _fields(blocks["qs"], 2).reshape(-1, 256) | _fields(blocks["hmask"], 1).reshape(-1, 256) << np.uint8(2)
    return _scale(_half(blocks["d"]) * factors, integers.view(np.int8) - np.int8(4))


def _scales_and_lows(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The (n, 8) scales and the (n, 8) lows of Q4_K and Q5_K.

    Of twelve bytes, four have the scales 0 to 3 and four the lows 0 to 3 in six bits each, and above them the two high
    bits of those from 4 to 7, whose low bits are the nibbles of the last four.
    """
    first, rest = blocks["scales"][:, :2], _fields(blocks["scales"][:, 2], 4)
    factors = np.concatenate([first & np.uint8(63), rest | first >> np.uint8(6) << np.uint8(4)], axis=2)
    return _half(blocks["d"]) * factors[:, 0], _half(blocks["dmin"]) * factors[:, 1]


def _q4_k(blocks: np.ndarray) -> np.ndarray:
    scales, lows = _scales_and_lows(blocks)
    return _scale(scales, _fields(blocks["qs"], 4), lows)


def _q5_k(blocks: np.ndarray) -> np.ndarray:
    scales, lows = _scales_and_lows(blocks)
    integers = _fields(blocks["qs"], 4).reshape(-1, 256) | _fields(blocks["qh"], 1).reshape(-1, 256) << np.uint8(4)
    return _scale(scales, integers, lows)


def _q6_k(blocks: np.ndarray) -> np.ndarray:
    integers = _fields(blocks["ql"], 4).reshape(-1, 256) | _fields(blocks["qh"], 2).reshape(-1, 256) << np.uint8(4)
    return _scale(_half(blocks["d"]) * blocks["scales"], integers.view(np.int8) - np.int8(32))


def _pack(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Words (n, bits), scales (n,) and lows (n,), 0 where there are none, of Q4_0, Q4_1 or Q8_0 blocks."""
    if blocks["qs"].dtype == np.int8:
        data = blocks["qs"].view(np.uint8) ^ np.uint8(128)
    else:
        integers = _integers(blocks, 4)
        data = integers[:, ::2] | integers[:, 1::2] << np.uint8(4)
    lows = blocks["m"] if "m" in blocks.dtype.names else np.zeros(len(blocks), np.float16)
    return data.view("<u4"), blocks["d"], lows


_D, _M, _DMIN = ("d", "<f2"), ("m", "<f2"), ("dmin", "<f2")
_SCALES = ("scales", "u1", (3, 4))
# type -> (elements of a block, its layout, blocks (n,) to values (n, elements), float32 or in the dtype of the layout)
_DECODERS: dict[str, tuple[int, np.dtype, Callable[[np.ndarray], np.ndarray]]] = {
    "F32": (1, np.dtype("<f4"), _plain),
    "F16": (1, np.dtype("<f2"), _plain),
    "BF16": (1, np.dtype("<u2"), _plain),
    "Q4_0": (32, np.dtype([_D, ("qs", "u1", 16)]), _q4_0),
    "Q4_1": (32, np.dtype([_D, _M, ("qs", "u1", 16)]), _q4_1),
    "Q5_0": (32, np.dtype([_D, ("qh", "u1", 4), ("qs", "u1", 16)]), _q5_0),
    "Q5_1": (32, np.dtype([_D, _M, ("qh", "u1", 4), ("qs", "u1", 16)]), _q5_1),
    "Q8_0": (32, np.dtype([_D, ("qs", "i1", 32)]), _q8_0),
    "Q2_K": (256, np.dtype([("scales", "u1", 16), ("qs", "u1", (2, 32)), _D, _DMIN]), _q2_k),
    "Q3_K": (
        256,
        np.dtype([("hmask", "u1", 32), ("qs", "u1", (2, 32)), ("scales_low", "u1", 8), ("scales_high", "u1", 4), _D]),
        _q3_k,
    ),
    "Q4_K": (256, np.dtype([_D, _DMIN, _SCALES, ("qs", "u1", (4, 32))]), _q4_k),
    "Q5_K": (256, np.dtype([_D, _DMIN, _SCALES, ("qh", "u1", 32), ("qs", "u1", (4, 32))]), _q5_k),
    "Q6_K": (256, np.dtype([("ql", "u1", (2, 64)), ("qh", "u1", (2, 32)), ("scales", "i1", 16), _D]), _q6_k),
}
# The integer that stands for zero in MLX's form; 0 for blocks that store their own bias.
_ZEROS = {"Q4_0": 8, "Q4_1": 0, "Q8_0": 128}

DECODED = frozenset(_DECODERS)
"""The types `decode` reads."""
