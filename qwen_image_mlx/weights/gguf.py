"""Reads GGUF weight files: the header at once, a tensor's data when it is asked for.

The format, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md: "GGUF", the version, the counts of tensors and
of metadata entries, the metadata, a description of each tensor, then the tensors' bytes, each padded to the file's
alignment. Quantized tensors are rows of blocks; the fields of a block and their formulas are those of ggml's
`ggml-common.h` and `dequantize_row_*` in `ggml-quants.c`, https://github.com/ggml-org/ggml/tree/master/src.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import mlx.core as mx
import numpy as np

from ..errors import CheckpointError
from ..names import StrPath
from ..outside import why_not_read
from .packed import Packed
from .safetensors_files import Tensor

# ggml's number of a type -> (its word, elements of a block, bytes of a block); the gaps are types ggml has removed.
_TYPES = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 30: ("BF16", 1, 2), 28: ("F64", 1, 8),
    24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8),
    2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 40),
    10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136),
    29: ("IQ1_M", 256, 56), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36), 41: ("Q1_0", 128, 18),
}  # fmt: skip

_MAGIC = b"GGUF"
_LFS_POINTER = b"version https://git-lfs"
_VERSIONS = (2, 3)
_ALIGNMENT = 32  # where the metadata has no general.alignment
# The largest headers hold a vocabulary of 260,000 tokens, their scores and types, and 520,000 merges.
_MAX_HEADER_BYTES = 100_000_000
_MAX_FILE_BYTES = 1 << 44
_MAX_VALUES = 1 << 22
_MAX_TENSORS = 1 << 17
_MAX_RANK = 16  # ggml has 4
_MAX_DIM = 2**31 - 1  # what MLX can count
_MAX_ELEMENTS = 2**40
_MAX_NESTING = 8
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 10: "Q", 11: "q", 12: "d"}
_BOOL, _STRING, _ARRAY = 7, 8, 9
_LEAST_BYTES = {**{kind: struct.calcsize(code) for kind, code in _SCALARS.items()}, _BOOL: 1, _STRING: 8, _ARRAY: 12}

_CHUNK = 1 << 15  # elements decoded at a time: a multiple of every block, and little enough for a core's cache


@dataclass(frozen=True)
class GgufTensor(Tensor):
    """One tensor as a GGUF header describes it.

    `dtype` is ggml's word ("F32", "Q4_K", ...), `shape` is in PyTorch's order, the reverse of the file's: the last
    dimension is the one whose elements are neighbours.
    """


def is_gguf(path: Path) -> bool:
    """Whether a file is GGUF, by its first bytes, or by its name where these cannot be read."""
    try:
        if why_not_read(path, _MAX_FILE_BYTES) is None:
            with path.open("rb") as file:
                return file.read(len(_MAGIC)) == _MAGIC or path.suffix.lower() == ".gguf"
    except OSError:
        pass
    return path.suffix.lower() == ".gguf"


def read_gguf(path: StrPath) -> tuple[dict[str, GgufTensor], dict[str, Any]]:
    """Read what one GGUF file (version 2 or 3, little-endian) says it holds, and check that it can be true.

    Args:
        path: The file.

    Returns:
        The tensors by name and the metadata by key, both in the file's order. A metadata value is an int, float, bool,
        str or a list of such.

    Raises:
        CheckpointError: The file cannot be read, is no GGUF file, is of a version or byte order that is not read, or
            its header is damaged or does not describe the bytes that follow it.
    """
    path = Path(path)
    try:
        if why := why_not_read(path, _MAX_FILE_BYTES):
            raise CheckpointError(f"{path} cannot be read, {why}: give a GGUF file")
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            _check_kind(path, file.read(len(_LFS_POINTER)))
            file.seek(len(_MAGIC))
            header = _Cursor(file, size, len(_MAGIC))
            _check_version(path, header.number("I"))
            count = header.count("tensors", 24, _MAX_TENSORS)
            metadata = _metadata(header)
            entries = _entries(header, count)
        alignment = _alignment(metadata)
        start = _padded(header.position, alignment)
        ranges = {name: (offset, offset + nbytes) for name, (_, _, nbytes, offset) in entries.items()}
        _check_layout(ranges, alignment, max(size - start, 0))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}): check that it exists and is yours") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not a whole GGUF file, {error}: download it again") from error
    tensors = {
        name: GgufTensor(name, dtype, shape, path, nbytes, start + offset)
        for name, (dtype, shape, nbytes, offset) in entries.items()
    }
    return tensors, metadata


def decode(tensor: GgufTensor) -> mx.array:
    """Read one tensor's data as dense floating numbers.

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
        The matrix with bits 4, 4 or 8 and scales and biases (rows, columns / 32); None if the type is another one, the
        tensor is empty or has not two dimensions, or a scale is infinite or NaN.

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


# The helpers below say what is wrong by ValueError; read_gguf makes it a sentence with the path and the cure.


class _Cursor:
    """Reads a header's fields one after another, and refuses each that cannot fit before it allocates anything."""

    def __init__(self, file: BinaryIO, size: int, position: int) -> None:
        self._file, self._size, self.position, self._values = file, size, position, 0

    def take(self, count: int, what: str) -> bytes:
        if self.position + count > self._size:
            raise ValueError(
                f"{what} of {count} bytes does not fit into the {self._size - self.position} that are left"
            )
        if self.position + count > _MAX_HEADER_BYTES:
            raise ValueError(f"its header takes over {_MAX_HEADER_BYTES} bytes, more than any checkpoint's")
        data = self._file.read(count)
        if len(data) != count:
            raise ValueError("it has become shorter while it was read")
        self.position += count
        return data

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code), "a number"))[0]

    def text(self) -> str:
        try:
            return self.take(self.number("Q"), "a text").decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError("a text in its header is not UTF-8") from error

    def count(self, what: str, least: int, most: int) -> int:
        """A number of things that take at least `least` bytes each."""
        count = self.number("Q")
        if count > most:
            raise ValueError(f"it announces {count} {what}, more than any checkpoint has")
        if count * least > self._size - self.position:
            raise ValueError(f"it announces {count} {what} but ends after {self._size} bytes")
        return count

    def value(self, kind: int, nesting: int = 0) -> Any:
        """One metadata value."""
        if kind == _ARRAY:
            if nesting == _MAX_NESTING:
                raise ValueError("its metadata is nested too deeply")
            return self._array(nesting + 1)
        return self._items(kind, 1)[0]

    def _array(self, nesting: int) -> list[Any]:
        kind = self.number("I")
        count = self.count("values in one array", _LEAST_BYTES.get(kind, 1), _MAX_VALUES)
        self._values += count
        if self._values > _MAX_VALUES:
            raise ValueError(f"its metadata has over {_MAX_VALUES} values, more than any checkpoint's")
        return [self.value(kind, nesting) for _ in range(count)] if kind == _ARRAY else self._items(kind, count)

    def _items(self, kind: int, count: int) -> list[Any]:
        if kind == _STRING:
            return [self.text() for _ in range(count)]
        if kind == _BOOL:
            data = self.take(count, "a list")
            if data.strip(b"\0\1"):
                raise ValueError("a true-or-false value in its metadata is neither")
            return [bool(item) for item in data]
        if kind not in _SCALARS:
            raise ValueError(f"its metadata has a value of the unknown kind {kind}")
        code = f"<{count}{_SCALARS[kind]}"
        return list(struct.unpack(code, self.take(struct.calcsize(code), "a list")))


def _check_kind(path: Path, start: bytes) -> None:
    if start == _LFS_POINTER:
        raise CheckpointError(
            f"{path} is a Git LFS pointer, not the weights: "
            "run 'git lfs pull' in its folder, or download the file again"
        )
    if start[: len(_MAGIC)] != _MAGIC:
        raise CheckpointError(
            f"{path} is not a GGUF file, it begins with {start[: len(_MAGIC)]!r}: "
            "give a .gguf file, or download it again"
        )


def _check_version(path: Path, version: int) -> None:
    if version in _VERSIONS:
        return
    if int.from_bytes(version.to_bytes(4, "little"), "big") in (1, *_VERSIONS):
        raise CheckpointError(f"{path} is a big-endian GGUF file: use the little-endian file of the same weights")
    raise CheckpointError(
        f"{path} is of GGUF version {version}, of which only 2 and 3 are read: use a file of one of these"
    )


def _metadata(header: _Cursor) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for _ in range(header.count("metadata entries", 13, _MAX_VALUES)):
        key = header.text()
        if key in metadata:
            raise ValueError(f"its metadata has {key[:80]!r} twice")
        metadata[key] = header.value(header.number("I"))
    return metadata


def _alignment(metadata: Mapping[str, Any]) -> int:
    alignment = metadata.get("general.alignment", _ALIGNMENT)
    # `type is int`, since true would pass as the integer 1
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"its general.alignment is {str(alignment)[:80]} and not a power of two")
    return alignment


def _entries(header: _Cursor, count: int) -> dict[str, tuple[str, tuple[int, ...], int, int]]:
    """The tensors' (type, shape, bytes, offset from the start of the data)."""
    entries: dict[str, tuple[str, tuple[int, ...], int, int]] = {}
    for _ in range(count):
        name = header.text()
        if name in entries:
            raise ValueError(f"its header has the tensor {name[:80]!r} twice")
        entries[name] = _entry(header, repr(name[:80]))
    return entries


def _entry(header: _Cursor, name: str) -> tuple[str, tuple[int, ...], int, int]:
    rank = header.number("I")
    if rank > _MAX_RANK:
        raise ValueError(f"the tensor {name} has {rank} dimensions")
    shape = tuple(header.number("Q") for _ in range(rank))[::-1]
    kind, offset = header.number("I"), header.number("Q")
    if kind not in _TYPES:
        raise ValueError(f"the tensor {name} has the unknown type {kind}")
    dtype, elements, size = _TYPES[kind]
    if max(shape, default=0) > _MAX_DIM or math.prod(size or 1 for size in shape) > _MAX_ELEMENTS:
        raise ValueError(f"the tensor {name} has the impossible shape {shape}")
    if (shape[-1] if shape else 1) % elements:
        raise ValueError(f"the tensor {name} has the shape {shape}, whose rows are not whole {dtype} blocks")
    return dtype, shape, math.prod(shape) // elements * size, offset


def _padded(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment


def _check_layout(ranges: Mapping[str, tuple[int, int]], alignment: int, present: int) -> None:
    end, last = 0, None
    for name, (begin, after) in sorted(ranges.items(), key=lambda item: item[1]):
        if begin % alignment:
            raise ValueError(f"the tensor {name[:80]!r} begins at no multiple of {alignment} bytes")
        if begin < end:
            raise ValueError(f"the tensors {last!r} and {name[:80]!r} overlap")
        if begin > _padded(end, alignment):
            raise ValueError(f"{begin - end} bytes before the tensor {name[:80]!r} belong to no tensor")
        end, last = after, name[:80]
    if present < end:
        raise ValueError(f"{end - present} bytes are missing at its end")
    if present > _padded(end, alignment):
        raise ValueError(f"{present - end} bytes follow its last tensor")


# The data. A block is a numpy record whose fields are those of ggml's struct of the same name.


def _blocks(tensor: GgufTensor, layout: np.dtype, most: int) -> Iterator[np.ndarray]:
    """The tensor's blocks, at most `most` at a time, each time in memory of their own."""
    left = tensor.nbytes // layout.itemsize
    try:
        with tensor.file.open("rb") as file:
            file.seek(tensor.offset)
            while left:
                blocks = np.empty(min(left, most), layout)
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


def _scaled(scales: np.ndarray, integers: np.ndarray, lows: np.ndarray | None = None) -> np.ndarray:
    """scale * integer - low for groups of a superblock: (n, groups), (n, 256), (n, groups) to (n, 256), float32."""
    values = integers.reshape(*scales.shape, -1) * scales[..., None]
    if lows is not None:
        values -= lows[..., None]
    return values.reshape(len(values), 256)


def _q2_k(blocks: np.ndarray) -> np.ndarray:
    factors = _fields(blocks["scales"], 4)
    return _scaled(_half(blocks["d"]) * factors[:, 0], _fields(blocks["qs"], 2), _half(blocks["dmin"]) * factors[:, 1])


def _q3_k(blocks: np.ndarray) -> np.ndarray:
    low, high = _fields(blocks["scales_low"], 4), _fields(blocks["scales_high"], 2)
    factors = (low.reshape(-1, 16) | high.reshape(-1, 16) << np.uint8(4)).astype(np.float32) - 32
    integers = _fields(blocks["qs"], 2).reshape(-1, 256) | _fields(blocks["hmask"], 1).reshape(-1, 256) << np.uint8(2)
    return _scaled(_half(blocks["d"]) * factors, integers.view(np.int8) - np.int8(4))


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
    return _scaled(scales, _fields(blocks["qs"], 4), lows)


def _q5_k(blocks: np.ndarray) -> np.ndarray:
    scales, lows = _scales_and_lows(blocks)
    integers = _fields(blocks["qs"], 4).reshape(-1, 256) | _fields(blocks["qh"], 1).reshape(-1, 256) << np.uint8(4)
    return _scaled(scales, integers, lows)


def _q6_k(blocks: np.ndarray) -> np.ndarray:
    integers = _fields(blocks["ql"], 4).reshape(-1, 256) | _fields(blocks["qh"], 2).reshape(-1, 256) << np.uint8(4)
    return _scaled(_half(blocks["d"]) * blocks["scales"], integers.view(np.int8) - np.int8(32))


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
# type -> (elements of a block, its layout, blocks (n,) to values (n, elements)); values are float32, or numbers as read
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
# The integer that stands for nought in MLX's form; 0 for blocks with a low of their own.
_ZEROS = {"Q4_0": 8, "Q4_1": 0, "Q8_0": 128}

DECODED = frozenset(_DECODERS)
"""The types `decode` reads."""
