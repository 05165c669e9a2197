"""Reads safetensors headers, never tensor data; writes whole files or none.

The format, https://github.com/huggingface/safetensors#format: eight bytes of header length (little-endian), a JSON
header that gives each tensor's dtype, shape and byte range, then the tensors' bytes, one after another without holes.
A header that passes here describes exactly the file it came from, so whoever maps the data needs no check of its own.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import mlx.core as mx
import numpy as np

from ..errors import CheckpointError, OutputError
from ..files import atomic_file
from ..gpu import finish, gpu_faults
from ..names import StrPath
from ..outside import why_not_read

_BITS = {
    "F4": 4,
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}
# Types for which MLX's own reader refuses the whole file: how numpy reads their bytes,
# and how they are converted. e5m2 is the upper byte of a float16; of the 4-bit and 6-bit types the bytes are kept.
_OWN_TYPES: dict[str, tuple[str, Callable[[np.ndarray], np.ndarray]]] = {
    "F64": ("<f8", lambda values: values.astype(np.float32)),
    "F8_E5M2": ("u1", lambda values: (values.astype("<u2") << 8).view("<f2")),
    **dict.fromkeys(("F4", "F6_E2M3", "F6_E3M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), ("u1", lambda values: values)),
}
_MLX_TYPES = {
    "F32": "<f4", "F16": "<f2", "BF16": "<u2", "F8_E4M3": "u1", "F8_E8M0": "u1", "BOOL": "?", "U8": "u1", "I8": "i1",
    "U16": "<u2", "I16": "<i2", "U32": "<u4", "I32": "<i4", "U64": "<u8", "I64": "<i8", "C64": "<c8",
}  # fmt: skip
_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 25_000_000  # the largest known, with trainers' notes in LoRAs, are a few megabytes
_MAX_TENSORS = 1 << 17
_MAX_FILE_BYTES = 1 << 44
_MAX_RANK = 16  # far above any model's; bounds the product of a made-up shape
_MAX_DIM = 2**63
GGUF_MAGIC = b"GGUF"
PICKLES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")  # endings of files that run code when they are read
_LFS_POINTER = b"version https://git-lfs"


@dataclass(frozen=True)
class Tensor:
    """One tensor as a header describes it.

    Attributes:
        name: Its key in the checkpoint.
        dtype: The format's own name: "BF16", "F32", "U32", ...
        shape: Its dimensions; () for a scalar.
        file: The file that holds it.
        nbytes: Bytes of its data.
        offset: Where its data begins in the file, in bytes.
        container: The format of that file: "safetensors", or "gguf" in a GgufTensor.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    nbytes: int
    offset: int
    container: ClassVar[str] = "safetensors"


def read_header(path: StrPath) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the header of one safetensors file, and check it against the file.

    Args:
        path: The file.

    Returns:
        The tensors by name, in the header's order, and the header's metadata ({} where it has none).

    Raises:
        CheckpointError: The file cannot be read, is a Git LFS pointer, or its header is damaged or does not describe
            the bytes that follow it.
    """
    path = Path(path)
    try:
        if why := why_not_read(path, _MAX_FILE_BYTES):
            raise CheckpointError(f"{path} cannot be read, {why}: give a safetensors file")
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(len(_LFS_POINTER))
            if start == _LFS_POINTER:
                raise CheckpointError(
                    f"{path} is a Git LFS pointer, not the weights: run 'git lfs pull' in its folder, "
                    "or download the file again"
                )
            length = _header_length(start[:_LENGTH_BYTES], size)
            file.seek(_LENGTH_BYTES)
            header = _parse(file.read(length))
        metadata = _metadata(header.pop("__metadata__", None) or {})  # MLX writes null for none
        entries = {name: _entry(name, value) for name, value in header.items()}
        ranges = {name: (begin, end) for name, (_, _, begin, end) in entries.items()}
        _check_layout(ranges, size - _LENGTH_BYTES - length)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}): check that it exists and is yours") from error
    except ValueError as error:
        if kind := _other_kind(path):
            raise CheckpointError(f"{path} is {kind}") from error
        cure = (
            "the program that wrote it must write it again"
            if isinstance(error, _Contradiction)
            else "download it again"
        )
        raise CheckpointError(f"{path} is not a whole safetensors file, {error}: {cure}") from error
    tensors = {
        name: Tensor(name, dtype, shape, path, end - begin, _LENGTH_BYTES + length + begin)
        for name, (dtype, shape, begin, end) in entries.items()
    }
    return tensors, metadata


def component_tensors(files: Sequence[Path], index: Mapping[str, str] | None) -> dict[str, Tensor]:
    """Read the headers of a component's files as one.

    Tensors that the index does not name are kept: repacked checkpoints have them. Entries whose shard is not among
    `files` are not looked for, so a component can be read in part.

    Args:
        files: The component's files.
        index: Tensor name to file name, from `*.safetensors.index.json`; None without an index.

    Returns:
        All tensors by name.

    Raises:
        CheckpointError: A file is damaged, a name is in two files, or a file lacks a tensor the index promises in it.
    """
    tensors: dict[str, Tensor] = {}
    for file in files:
        for name, tensor in read_header(file)[0].items():
            if name in tensors:
                raise CheckpointError(
                    f"the tensor {name!r} is in both {tensors[name].file} and {file}: "
                    "remove the file that does not belong to this checkpoint"
                )
            tensors[name] = tensor
    shards = {file.name: file for file in files}
    for name, shard in (index or {}).items():
        if shard in shards and (name not in tensors or tensors[name].file != shards[shard]):
            raise CheckpointError(
                f"{shards[shard]} lacks the tensor {name!r} that its index promises: "
                "download the file and its index again"
            )
    return tensors


def save_tensors(path: Path, arrays: Mapping[str, mx.array], metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file under a temporary name and renames it, so that it is complete or absent.

    Raises:
        OutputError: it could not be written; a file already there stays.
    """
    try:
        with gpu_faults():
            finish(arrays)
        with atomic_file(path) as partial:  # it ends in .safetensors too, as MLX wishes
            mx.save_safetensors(str(partial), dict(arrays), dict(metadata))
    except (OSError, RuntimeError) as error:
        raise OutputError(f"{path} could not be written: {error}") from error


class LazyTensors:
    """The arrays of one safetensors file, each read when it is evaluated and handed out once per opening.

    MLX reads them; a file with a type that MLX does not support is read by its header and numpy, one tensor at a time.

    Args:
        path: the file; `read_header` must have accepted its header.
    """

    def __init__(self, path: Path):
        self._path = path
        self._lazy: dict[str, mx.array] = {}
        self._by_numpy = any(tensor.dtype in _OWN_TYPES for tensor in read_header(path)[0].values())

    def take(self, tensor: Tensor) -> mx.array:
        """One tensor as stored in the file: lazy, or read; F64 as float32, F8_E5M2 as float16, F8_E4M3 as its bytes.

        Raises:
            OSError, RuntimeError, ValueError, KeyError: it cannot be read.
        """
        if self._by_numpy:
            return self._read(tensor)
        if tensor.name not in self._lazy:
            self._lazy = mx.load(str(self._path))
        return self._lazy.pop(tensor.name)

    def _read(self, tensor: Tensor) -> mx.array:
        kind, convert = _OWN_TYPES.get(tensor.dtype) or (_MLX_TYPES[tensor.dtype], lambda values: values)
        with self._path.open("rb") as file:
            file.seek(tensor.offset)
            data = file.read(tensor.nbytes)
        if len(data) != tensor.nbytes:
            raise ValueError(f"it ends inside {tensor.name}")
        values = np.frombuffer(data, kind)
        array = mx.array(convert(values))
        if array.size == math.prod(tensor.shape):  # several 4-bit or 6-bit values share a byte
            array = array.reshape(tensor.shape)
        return array.view(mx.bfloat16) if tensor.dtype == "BF16" else array


def load_tensors(path: Path) -> tuple[dict[str, mx.array], dict[str, str]]:
    """All arrays of a safetensors file, read, and its metadata.

    Raises:
        OSError, RuntimeError, ValueError: it cannot be read.
        GPUError: there is too little memory for them.
    """
    if why := why_not_read(path, _MAX_FILE_BYTES):
        raise ValueError(why)
    arrays, metadata = mx.load(str(path), format="safetensors", return_metadata=True)
    with gpu_faults():
        mx.eval(arrays)
    return arrays, metadata


def is_gguf(path: Path) -> bool:
    """Whether a file is GGUF, by its first bytes, or by its name where these cannot be read."""
    try:
        if why_not_read(path, _MAX_FILE_BYTES) is None:
            with path.open("rb") as file:
                return file.read(len(GGUF_MAGIC)) == GGUF_MAGIC or path.suffix.lower() == ".gguf"
    except OSError:
        pass
    return path.suffix.lower() == ".gguf"


# The first bytes of other kinds of files, and the message about each.
_OTHER_KINDS = {
    GGUF_MAGIC: "a GGUF file: let its name end in .gguf",
    b"PK\x03\x04": "a zip file, as PyTorch's pickles are, not a safetensors file: use its .safetensors version",
    b"\x80": "a pickle, not a safetensors file: use its .safetensors version",
    b"\x89HDF": "an HDF5 file, not a safetensors file: use its .safetensors version",
    b"\x1f\x8b": "a gzip archive, not a safetensors file: unpack it",
    b"\x93NUMPY": "a NumPy array, not a safetensors file: use the model's .safetensors version",
    **dict.fromkeys(
        (b"<!", b"<h", b"<H", b"<?"),
        "a web page, not a safetensors file: download the file itself, with 'hf download' or its download button",
    ),
    b"{": "a JSON file, not a safetensors file: give the weights next to it",
}


def _other_kind(path: Path) -> str | None:
    """What a file is that is not safetensors, by its first bytes; None if it may be a damaged one."""
    with path.open("rb") as file:
        start = file.read(16)
    length = int.from_bytes(start[:_LENGTH_BYTES], "little")
    if start[_LENGTH_BYTES:9] == b"{" and length <= _MAX_HEADER_BYTES:
        return None
    return next((kind for magic, kind in _OTHER_KINDS.items() if start.lstrip().startswith(magic)), None)


# The helpers below raise ValueError with the fault; read_header makes it a sentence with the path and the cure.


class _Contradiction(ValueError):
    """A header that contradicts itself: downloading the file again will not help."""


def _header_length(prefix: bytes, size: int) -> int:
    if len(prefix) < _LENGTH_BYTES:
        raise ValueError(f"it has only {size} bytes")
    length = int.from_bytes(prefix, "little")
    if length > _MAX_HEADER_BYTES:
        raise ValueError(f"it announces a header of {length} bytes, more than any checkpoint has")
    if length > size - _LENGTH_BYTES:
        raise ValueError(f"it announces a header of {length} bytes but ends after {size - _LENGTH_BYTES}")
    return length


def _parse(header: bytes) -> dict[str, Any]:
    try:
        value = json.loads(header.decode("utf-8"), object_pairs_hook=_unique)
    except UnicodeDecodeError as error:
        raise ValueError("its header is not UTF-8 text") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"its header is not JSON ({error})") from error
    except RecursionError as error:
        raise ValueError("its header is nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError("its header is not a JSON object")
    if len(value) > _MAX_TENSORS:
        raise _Contradiction(f"its header has {len(value):,} tensors, more than any checkpoint")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for name, item in pairs:
        if name in value:
            raise _Contradiction(f"its header has {name!r:.80} twice")
        value[name] = item
    return value


def _metadata(value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise _Contradiction("its __metadata__ does not map strings to strings")
    return value


def _entry(name: str, value: Any) -> tuple[str, tuple[int, ...], int, int]:
    """Check one tensor by itself: (dtype, shape, first byte, byte after the last), counted from the header's end."""
    if not isinstance(value, dict):
        raise _Contradiction(f"its header describes the tensor {name!r:.80} by something other than an object")
    dtype, shape, offsets = (value.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise _Contradiction(f"the tensor {name!r:.80} has the unknown dtype {dtype!r:.80}")
    if not _are_sizes(shape) or len(shape) > _MAX_RANK:
        raise _Contradiction(f"the tensor {name!r:.80} has the impossible shape {str(shape)[:80]}")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _Contradiction(f"the tensor {name!r:.80} has the impossible data_offsets {str(offsets)[:80]}")
    begin, end = offsets
    if (end - begin) * 8 != math.prod(shape) * _BITS[dtype]:
        raise _Contradiction(
            f"the tensor {name!r:.80} has {end - begin} bytes, which is not what {dtype} {shape} takes"
        )
    return dtype, tuple(shape), begin, end


def _are_sizes(value: Any) -> bool:
    # `type is int`, since JSON's true would pass as the integer 1
    return isinstance(value, list) and all(type(item) is int and 0 <= item < _MAX_DIM for item in value)


def _check_layout(ranges: Mapping[str, tuple[int, int]], present: int) -> None:
    end, last = 0, None
    for name, (begin, after) in sorted(ranges.items(), key=lambda item: item[1]):
        if begin < end:
            raise _Contradiction(f"the tensors {last!r:.80} and {name!r:.80} overlap")
        if begin > end:
            raise _Contradiction(f"{begin - end} bytes before the tensor {name!r:.80} belong to no tensor")
        end, last = after, name
    if present < end:
        raise ValueError(f"{end - present} bytes are missing at its end")
    if present > end:
        raise ValueError(f"{present - end} bytes follow its last tensor")
