"""Modules whose layers are never held: each pass reads them from the file again, one after another.

A lazily loaded array belongs to nobody but the operation that uses it, so its memory returns as soon as it was used. A
pass over streamed layers therefore takes the memory of a few of them, however many there are, and builds the same
operations on the same numbers as layers that stay.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..errors import CheckpointError
from .adapters import Adapters, Placement
from .loader import ComponentWeights, fill, specs_of
from .mapping import TensorSpec
from .quantize import Scheme
from .stored import Reader

M = TypeVar("M", bound=nn.Module)

# The list of layers in each component's module; all its other parameters stay in memory, but for the embedding.
_LAYERS = {"transformer": "transformer_blocks", "text_encoder": "model.layers", "vision": "visual.blocks"}
STREAMABLE = frozenset(_LAYERS)
_EMBEDDING = "model.embed_tokens"


def layer_specs(component: str, specs: Iterable[TensorSpec]) -> list[list[TensorSpec]]:
    """A streamed component's tensors by layer."""
    layers: dict[str, list[TensorSpec]] = {}
    prefix = f"{_LAYERS[component]}."
    for spec in specs:
        if spec.name.startswith(prefix):
            layers.setdefault(spec.name.removeprefix(prefix).partition(".")[0], []).append(spec)
    return list(layers.values())


def held_specs(component: str, specs: Iterable[TensorSpec]) -> list[TensorSpec]:
    """What of a streamed component stays in memory; the embedding of a text encoder is read by the row."""
    passing = (f"{_LAYERS[component]}.", f"{_EMBEDDING}.")
    return [spec for spec in specs if not spec.name.startswith(passing)]


def stream_module(
    module: M,
    weights: ComponentWeights,
    part: str,
    dtype: mx.Dtype,
    scheme: Scheme | None = None,
    adapters: Adapters | None = None,
) -> M:
    """Fills a new module's other parameters and makes its layers be read at each pass.

    The arguments are those of `weights.loader.load_module`. With a scheme or LoRAs every pass packs or merges anew, in
    the same way as loading once does.

    Returns:
        The module; its list of layers can only be iterated over.
    """
    path = _LAYERS[weights.component]
    specs = specs_of(module, weights, part, scheme)
    *parents, name = path.split(".")
    home = module
    for parent in parents:
        home = home[parent]
    layers = StreamedLayers(home[name], path, weights, part, dtype, scheme, adapters)
    setattr(home, name, layers)
    others = held_specs(weights.component, specs)
    embedding = [spec for spec in specs if spec.name.startswith(f"{_EMBEDDING}.")]
    if embedding and (rows := StreamedRows.of(weights, embedding[0].name, dtype)) and scheme is None:
        module.model.embed_tokens = rows
    else:
        others += embedding
    fill(module, weights, others, Reader(weights.component), dtype, scheme, adapters and Placement(adapters))
    module.eval()
    return module


class StreamedLayers:
    """Layers that exist while they are used.

    Args:
        layers: empty ones, to be copied.
        path: of the list, in the weights' names.
        weights, part, dtype, scheme, adapters: as in `stream_module`.

    Raises:
        CheckpointError: while iterating: a file was changed since it was opened, or cannot be read.
    """

    def __init__(
        self,
        layers: list[nn.Module],
        path: str,
        weights: ComponentWeights,
        part: str,
        dtype: mx.Dtype,
        scheme: Scheme | None,
        adapters: Adapters | None,
    ):
        self._layers = layers
        self._prefixes = [f"{path}.{n}." for n in range(len(layers))]
        self._specs = [[s for s in weights.specs(part) if s.name.startswith(p)] for p in self._prefixes]
        self._weights, self._dtype, self._scheme, self._adapters = weights, dtype, scheme, adapters

    def __len__(self) -> int:
        return len(self._layers)

    def __iter__(self) -> Iterator[nn.Module]:
        self._weights.check_unchanged()
        reader = Reader(self._weights.component)
        for layer, prefix, specs in zip(self._layers, self._prefixes, self._specs, strict=True):
            layer, placement = _copied(layer), self._adapters and Placement(self._adapters)
            fill(
                layer, self._weights, specs, reader, self._dtype, self._scheme, placement,
                prefix=prefix, lazily=self._scheme is None and self._adapters is None,
            )  # fmt: skip
            layer.eval()
            yield layer


class StreamedRows:
    """An embedding whose rows are read from the file when they are asked for."""

    def __init__(self, file: Path, offset: int, columns: int, stored: Any, dtype: mx.Dtype):
        self._file, self._offset, self._columns, self._stored, self._dtype = file, offset, columns, stored, dtype

    @classmethod
    def of(cls, weights: ComponentWeights, name: str, dtype: mx.Dtype) -> StreamedRows | None:
        """Those of a tensor; None where it does not lie in its file as plain rows."""
        tensor = weights.stored(name).tensor
        kinds = {"F32": (np.uint32, mx.float32), "BF16": (np.uint16, mx.bfloat16), "F16": (np.uint16, mx.float16)}
        if tensor.dtype not in kinds or len(tensor.shape) != 2:
            return None
        return cls(tensor.file, tensor.offset, tensor.shape[1], kinds[tensor.dtype], dtype)

    def __call__(self, ids: mx.array) -> mx.array:
        """(…, columns) of ids (…)."""
        kind, dtype = self._stored
        width = self._columns * np.dtype(kind).itemsize
        rows = np.empty((ids.size, self._columns), kind)
        try:
            with self._file.open("rb") as file:
                for n, row in enumerate(np.array(ids).ravel()):
                    file.seek(self._offset + int(row) * width)
                    data = file.read(width)
                    if len(data) < width:
                        raise OSError("it ends too early")
                    rows[n] = np.frombuffer(data, kind)
        except OSError as error:
            raise CheckpointError(f"{self._file} cannot be read ({error.strerror or error}): start again") from error
        return mx.array(rows).view(dtype).astype(self._dtype).reshape(*ids.shape, self._columns)


def _copied(value: Any) -> Any:
    """A module with modules of its own, around the same arrays."""
    if isinstance(value, nn.Module):
        twin = copy.copy(value)
        for name, child in value.items():
            twin[name] = _copied(child)
        return twin
    return [_copied(item) for item in value] if isinstance(value, list) else value
