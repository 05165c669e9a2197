"""Reads GGUF headers: the tensors and metadata of a file, checked against its size; `gguf_blocks` decodes the data.

The format, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md: "GGUF", the version, the counts of tensors and
of metadata entries, the metadata, a description of each tensor, then the tensors' bytes, each padded to the file's
alignment.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

from ..errors import CheckpointError
from ..names import StrPath
from ..outside import why_not_read
from .safetensors_files import GGUF_MAGIC, Tensor

# ggml's number of a type -> (its name, elements of a block, bytes of a block); the gaps are types ggml has removed.
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
_MIN_BYTES = {**{kind: struct.calcsize(code) for kind, code in _SCALARS.items()}, _BOOL: 1, _STRING: 8, _ARRAY: 12}


@dataclass(frozen=True)
class GgufTensor(Tensor):
    """One tensor as a GGUF header describes it.

    `dtype` is ggml's name ("F32", "Q4_K", ...), `shape` is in PyTorch's order, the reverse of the file's: the last
    dimension is the one whose elements are neighbours.
    """

    container: ClassVar[str] = "gguf"


def read_gguf(path: StrPath) -> tuple[dict[str, GgufTensor], dict[str, Any]]:
    """Read the header of one GGUF file (version 2 or 3, little-endian), and check it against the file.

    Args:
        path: The file.

    Returns:
        The tensors by name and the metadata by key, both in the file's order. A metadata value is an int, float, bool,
        str or a list of such.

    Raises:
        CheckpointError: The file cannot be read, is not a GGUF file, has an unsupported version or byte order, or
            its header is damaged or does not describe the bytes that follow it.
    """
    path = Path(path)
    try:
        if why := why_not_read(path, _MAX_FILE_BYTES):
            raise CheckpointError(f"{path} cannot be read, {why}: give a GGUF file")
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            _check_kind(path, file.read(len(_LFS_POINTER)))
            file.seek(len(GGUF_MAGIC))
            header = _Cursor(file, size, len(GGUF_MAGIC))
            _check_version(path, header.number("I"))
            count = header.count("tensors", 24, _MAX_TENSORS)
            metadata = _metadata(header)
            entries = _entries(header, count)
        alignment = _alignment(metadata)
        start = _pad(header.position, alignment)
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


# The helpers below raise ValueError with the fault; read_gguf makes it a sentence with the path and the cure.


class _Cursor:
    """Reads a header's fields one after another. A field that cannot fit is refused before anything is allocated."""

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

    def count(self, what: str, item_bytes: int, maximum: int) -> int:
        """A count of items that take at least `item_bytes` bytes each."""
        count = self.number("Q")
        if count > maximum:
            raise ValueError(f"it announces {count} {what}, more than any checkpoint has")
        if count * item_bytes > self._size - self.position:
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
        count = self.count("values in one array", _MIN_BYTES.get(kind, 1), _MAX_VALUES)
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
    if start[: len(GGUF_MAGIC)] != GGUF_MAGIC:
        raise CheckpointError(
            f"{path} is not a GGUF file, it begins with {start[: len(GGUF_MAGIC)]!r}: "
            "give a .gguf file, or download it again"
        )


def _check_version(path: Path, version: int) -> None:
    if version in _VERSIONS:
        return
    if int.from_bytes(version.to_bytes(4, "little"), "big") in (1, *_VERSIONS):
        raise CheckpointError(f"{path} is a big-endian GGUF file: use the little-endian file of the same weights")
    raise CheckpointError(f"{path} has GGUF version {version}; only 2 and 3 are supported: use a file of one of these")


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


def _pad(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment


def _check_layout(ranges: Mapping[str, tuple[int, int]], alignment: int, present: int) -> None:
    end, last = 0, None
    for name, (begin, after) in sorted(ranges.items(), key=lambda item: item[1]):
        if begin % alignment:
            raise ValueError(f"the tensor {name[:80]!r} does not begin at a multiple of {alignment} bytes")
        if begin < end:
            raise ValueError(f"the tensors {last!r} and {name[:80]!r} overlap")
        if begin > _pad(end, alignment):
            raise ValueError(f"{begin - end} bytes before the tensor {name[:80]!r} belong to no tensor")
        end, last = after, name[:80]
    if present < end:
        raise ValueError(f"{end - present} bytes are missing at its end")
    if present > _pad(end, alignment):
        raise ValueError(f"{present - end} bytes follow its last tensor")
