"""Writes a quantized component as self-describing safetensors files, with one layer in memory at a time.

The layers of each file are decided beforehand, so an interrupted run continues with the first missing file. A file is
written under a temporary name and renamed: a file with its final name is complete.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from ..errors import CheckpointError
from .loader import ComponentWeights, repack
from .mapping import TensorSpec, weights_map
from .packed import Packed
from .quantize import relative_error
from .safetensors_files import read_header, save_tensors
from .schemes import Scheme
from .tensor_formats import FLOATS, Reader

_PLAN, _ERRORS = "qwen_image_mlx.plan", "qwen_image_mlx.errors"


@dataclass(frozen=True)
class Part:
    """Some weights and the scheme that packs their matrices (None: left as they are)."""

    weights: ComponentWeights
    scheme: Scheme | None

    def nbytes(self, spec: TensorSpec) -> int:
        """Bytes of a tensor as it will be written."""
        stored = self.weights.stored(spec.name)
        return self.scheme.nbytes(spec.shape) if spec.is_packed_by(self.scheme) else stored.nbytes


def write_component(
    folder: Path,
    parts: Sequence[Part],
    *,
    shard_bytes: int,
    progress: Callable[[int, int], None],
) -> dict[str, float]:
    """Writes a component's weights into a folder, with an index if there are several files.

    Args:
        folder: of the component; complete files of the same plan in it are kept.
        parts: what to write, in this order; the files are named as the first one's are.
        shard_bytes: maximum bytes of a file's tensors, unless one layer takes more.
        progress: called with the bytes written so far and the total.

    Returns:
        The relative error of each packed matrix, by the name of its layer.

    Raises:
        CheckpointError: the source could not be read.
        OutputError: a file could not be written; those written before stay for the next run.
    """
    stem = weights_map(parts[0].weights.component.map)["stem"]
    shards = list(_shards(parts, shard_bytes))
    total = sum(nbytes for _, nbytes in shards)
    readers = [Reader(part.weights.component.role) for part in parts]
    names, errors, done, index = [], {}, 0, {}
    for number, (layers, nbytes) in enumerate(shards, start=1):
        suffix = f"-{number:05}-of-{len(shards):05}" if len(shards) > 1 else ""
        path = folder / f"{stem}{suffix}.safetensors"
        plan = _plan(parts, layers)
        found = _whole(path, plan)
        if found is None:
            arrays, found = {}, {}
            for which, specs in layers:
                for spec in specs:
                    _write_tensor(parts[which], spec, readers[which], arrays, found)
            save_tensors(path, arrays, {"format": "mlx", _PLAN: plan, _ERRORS: json.dumps(found)})
            del arrays
            mx.clear_cache()
        errors |= found
        index |= dict.fromkeys(read_header(path)[0], path.name)
        names.append(path)
        done += nbytes
        progress(done, total)
    if len(shards) > 1:
        size = sum(path.stat().st_size for path in names)
        text = json.dumps({"metadata": {"total_size": size}, "weight_map": dict(sorted(index.items()))}, indent=2)
        (folder / f"{stem}.safetensors.index.json").write_text(text)
    return errors


def quantization_config(parts: Sequence[Part]) -> dict[str, object] | None:
    """The quantization entry of config.json in mlx-lm's form; None where nothing is packed."""
    layers: dict[str, object] = {}
    for part in parts:
        for specs in part.weights.layers():
            for spec in specs:
                if spec.name.endswith(".weight") and len(spec.shape) == 2:
                    scheme = part.scheme if spec.is_packed_by(part.scheme) else part.weights.stored(spec.name).scheme
                    layers[spec.name.removesuffix(".weight")] = scheme and vars(scheme)
    used = [scheme for scheme in layers.values() if scheme]
    if not used:
        return None
    usual = max(used, key=used.count)
    return {**usual, **{name: scheme or False for name, scheme in layers.items() if scheme != usual}}


Layers = list[tuple[int, list[TensorSpec]]]


def _shards(parts: Sequence[Part], limit: int) -> Iterable[tuple[Layers, int]]:
    """(layers as (part, tensors), bytes) of every file."""
    layers: Layers = []
    size = 0
    for which, part in enumerate(parts):
        for specs in part.weights.layers():
            nbytes = sum(part.nbytes(spec) for spec in specs)
            if layers and size + nbytes > limit:
                yield layers, size
                layers, size = [], 0
            layers.append((which, specs))
            size += nbytes
    yield layers, size


def _write_tensor(
    part: Part, spec: TensorSpec, reader: Reader, arrays: dict[str, mx.array], errors: dict[str, float]
) -> None:
    """Adds a tensor to a file's arrays, evaluated, and its error to the errors if it is packed here."""
    value, path = part.weights.open(spec, reader), spec.name.removesuffix(".weight")
    if spec.is_packed_by(part.scheme):
        packed = repack(value, part.scheme)
        source = value.dequantize() if isinstance(value, Packed) else value
        errors[path] = relative_error(source, packed)
        value = packed
    if isinstance(value, Packed):
        names = (spec.name, f"{path}.scales", f"{path}.biases")
        arrays |= {name: array for name, array in zip(names, value.arrays, strict=True) if array is not None}
    else:
        is_float = part.weights.stored(spec.name).tensor.dtype in FLOATS
        arrays[spec.name] = value if is_float else value.astype(mx.bfloat16)


def _plan(parts: Sequence[Part], layers: Layers) -> str:
    """A hash of everything a file's bytes depend on."""
    facts = []
    for which, specs in layers:
        part = parts[which]
        for spec in specs:
            tensor = part.weights.stored(spec.name).tensor
            status = tensor.file.stat()
            scheme = str(part.scheme) if spec.is_packed_by(part.scheme) else None
            facts.append((spec.name, scheme, tensor.dtype, tensor.file.name, status.st_size, status.st_mtime_ns))
    return hashlib.sha256(repr(facts).encode()).hexdigest()


def _whole(path: Path, plan: str) -> dict[str, float] | None:
    """The errors recorded in a file that an earlier run finished by the same plan; None without such a file."""
    if not path.is_file():
        return None
    try:
        metadata: Mapping[str, str] = read_header(path)[1]
        return json.loads(metadata[_ERRORS]) if metadata.get(_PLAN) == plan else None
    except (CheckpointError, KeyError, ValueError):
        return None
