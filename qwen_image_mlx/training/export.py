"""Saves a fully trained model as a checkpoint folder that this package and diffusers load."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path

import mlx.core as mx

from ..errors import OutputError
from ..files import atomic_folder, reason
from ..pipeline.components import Components
from ..pipeline.quantize_checkpoint import copy_unwritten
from ..registry import TRANSFORMER
from ..weights.mapping import TensorSpec, weights_map
from ..weights.packed import Packed
from ..weights.safetensors_files import save_tensors
from ..weights.tensor_formats import Reader

SHARD_BYTES = 5_000_000_000


def save_model(
    folder: Path, components: Components, parameters: Mapping[str, mx.array], *, shard_bytes: int = SHARD_BYTES
) -> Path:
    """Writes a checkpoint with a trained transformer, whole or not at all; replaces an earlier one.

    Weights that no image needs (the last block's text) are copied from the original checkpoint.

    Args:
        folder: where to write.
        components: of the original checkpoint.
        parameters: of a `Network`, by name.
        shard_bytes: maximum bytes of a file.

    Raises:
        OutputError: it could not be written.
    """
    trained = {name.partition(".")[2]: array.astype(components.dtype) for name, array in parameters.items()}
    try:
        with atomic_folder(folder, replacing=True) as partial:
            copy_unwritten(components, partial, {TRANSFORMER})
            _write_transformer(partial / TRANSFORMER, components, trained, shard_bytes)
    except OSError as error:
        message = error if isinstance(error, OutputError) else f"{folder} could not be written: {reason(error)}"
        raise OutputError(str(message)) from error
    return folder


def _write_transformer(folder: Path, components: Components, trained: Mapping[str, mx.array], shard_bytes: int) -> None:
    weights, reader = components.weights(TRANSFORMER), Reader(TRANSFORMER)
    stem, index = weights_map(weights.component.map)["stem"], {}
    folder.mkdir(exist_ok=True)
    shards = list(_shards(weights.layers(), components.dtype, shard_bytes))
    for number, specs in enumerate(shards, start=1):
        suffix = f"-{number:05}-of-{len(shards):05}" if len(shards) > 1 else ""
        arrays = {}
        for spec in specs:
            value = trained.get(spec.name)
            if value is None:
                value = weights.open(spec, reader)
                value = (value.dequantize() if isinstance(value, Packed) else value).astype(components.dtype)
            arrays[spec.name] = value
        save_tensors(folder / f"{stem}{suffix}.safetensors", arrays, {"format": "pt"})
        index |= dict.fromkeys(arrays, f"{stem}{suffix}.safetensors")
    if len(shards) > 1:
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        text = json.dumps({"metadata": {"total_size": size}, "weight_map": dict(sorted(index.items()))}, indent=2)
        (folder / f"{stem}.safetensors.index.json").write_text(text)


def _shards(layers: list[list[TensorSpec]], dtype: mx.Dtype, limit: int) -> Iterator[list[TensorSpec]]:
    shard: list[TensorSpec] = []
    size = 0
    for specs in layers:
        nbytes = sum(prod(spec.shape) * dtype.size for spec in specs)
        if shard and size + nbytes > limit:
            yield shard
            shard, size = [], 0
        shard.extend(specs)
        size += nbytes
    yield shard
