"""Modules whose layers do not stay in memory: each pass reads them from the file again, one after another.

A whole layer is read while the layer before it runs (`gpu.Pace`), and released when its result is
queued. A pass over streamed layers therefore takes the memory of two of them, however many there are, and runs the same
operations on the same numbers as layers that stay. They are used as stored in their files: nothing is repacked.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import mlx.core as mx
import numpy as np

from ..errors import CheckpointError, RequestError
from ..models import nn
from ..registry import Component
from .changes import WeightChanges
from .loader import ComponentWeights, fill, place_of, specs_of
from .mapping import TensorSpec
from .safetensors_files import Tensor
from .schemes import Scheme
from .tensor_formats import Reader

M = TypeVar("M", bound=nn.Module)

# How rows may be stored in a file, by the format's name: the dtype NumPy reads, and the dtype it stands for in MLX.
_ROWS = {"F32": (np.uint32, mx.float32), "BF16": (np.uint16, mx.bfloat16), "F16": (np.uint16, mx.float16)}


def layer_specs(component: Component, specs: Iterable[TensorSpec]) -> list[list[TensorSpec]]:
    """A streamed component's tensors by layer."""
    layers: dict[str, list[TensorSpec]] = {}
    prefix = f"{component.layers}."
    for spec in specs:
        if spec.name.startswith(prefix):
            layers.setdefault(spec.name.removeprefix(prefix).partition(".")[0], []).append(spec)
    return list(layers.values())


def held_specs(component: Component, specs: Iterable[TensorSpec], stored: Callable[[str], str]) -> list[TensorSpec]:
    """The tensors of a streamed component that stay in memory.

    Args:
        component: one with layers.
        specs: its tensors.
        stored: given a tensor's name, its dtype in the file; an embedding of plain rows is read by the row.
    """
    layers = f"{component.layers}."
    return [
        spec
        for spec in specs
        if not spec.name.startswith(layers) and (spec.name != component.rows or stored(spec.name) not in _ROWS)
    ]


def stream_module(
    module: M,
    weights: ComponentWeights,
    part: str,
    dtype: mx.Dtype,
    scheme: Scheme | None = None,
    adapters: WeightChanges | None = None,
) -> M:
    """Fills a new module's other parameters and makes its layers be read at each pass.

    With LoRAs every pass merges again, with the same result as loading once.

    Args:
        module: its parameters have the weights map's names.
        weights: the component's weights.
        part: the part of them to load.
        dtype: of all floating parameters.
        scheme: what the part's matrices must already be packed in; None allows any form.
        adapters: LoRAs, merged into each layer or run unmerged.

    Returns:
        The module; its list of layers can only be sliced and iterated over.

    Raises:
        RequestError: a matrix is not packed in the scheme in its file, so each pass would have to pack it.
    """
    check_streamable(weights, part, scheme)
    component = weights.component
    path = component.layers
    specs = specs_of(module, weights, part, None)
    parent, place = place_of(module, path)
    parent[place] = StreamedLayers(parent[place], path, weights, part, dtype, adapters)
    held = held_specs(component, specs, lambda name: weights.stored(name).tensor.dtype)
    if component.rows and component.rows not in {spec.name for spec in held}:
        parent, place = place_of(module, component.rows.rpartition(".")[0])
        parent[place] = StreamedRows(weights.stored(component.rows).tensor, dtype)
    placement = adapters.placement() if adapters else None
    fill(module, weights, held, Reader(component.role), dtype, placement=placement)
    module.eval()
    return module


def check_streamable(weights: ComponentWeights, part: str, scheme: Scheme | None) -> None:
    """Raises RequestError unless a part's matrices are already packed in the scheme; None always passes."""
    component = weights.component
    unpacked = [
        spec for spec in weights.specs(part) if spec.is_packed_by(scheme) and weights.stored(spec.name).scheme != scheme
    ]
    if unpacked:
        raise RequestError(
            f"the {component.role} is read from its files at each pass and would have to be quantized to {scheme} "
            "each time",
            cause="streamed quantization",
        )


class StreamedLayers:
    """A list of layers, each of which is in memory only while it runs.

    Args:
        layers: without weights, to be copied.
        path: the list's prefix in the weights' names.
        weights, part, dtype, adapters: as in `stream_module`.

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
        adapters: WeightChanges | None,
    ):
        self._layers = layers
        self._prefixes = [f"{path}.{n}." for n in range(len(layers))]
        self._specs = [[s for s in weights.specs(part) if s.name.startswith(p)] for p in self._prefixes]
        self._weights, self._dtype, self._adapters = weights, dtype, adapters

    def __len__(self) -> int:
        return len(self._layers)

    def __getitem__(self, some: slice) -> StreamedLayers:
        """Some of the layers, streamed too."""
        part = copy.copy(self)
        part._layers, part._prefixes, part._specs = self._layers[some], self._prefixes[some], self._specs[some]
        return part

    def __iter__(self) -> Iterator[nn.Module]:
        self._weights.check_unchanged()
        reader = Reader(self._weights.component.role)
        for layer, prefix, specs in zip(self._layers, self._prefixes, self._specs, strict=True):
            self._weights.read(specs, reader)  # at once, while the layer before runs
            layer, placement = _copy(layer), self._adapters.placement() if self._adapters else None
            fill(
                layer, self._weights, specs, reader, self._dtype, None, placement,
                prefix=prefix, lazily=self._adapters is None,
            )  # fmt: skip
            layer.eval()
            yield layer


class StreamedRows:
    """An embedding whose rows are read from the file when they are looked up.

    Args:
        tensor: the matrix, of a dtype of `_ROWS`.
        dtype: of the rows it returns.
    """

    def __init__(self, tensor: Tensor, dtype: mx.Dtype):
        self._tensor, self._dtype = tensor, dtype

    def __call__(self, ids: mx.array) -> mx.array:
        """Rows (…, columns) in `dtype` for integer ids (…)."""
        (kind, dtype), columns = _ROWS[self._tensor.dtype], self._tensor.shape[1]
        width = columns * np.dtype(kind).itemsize
        rows = np.empty((ids.size, columns), kind)
        try:
            with self._tensor.file.open("rb") as file:
                for n, row in enumerate(np.array(ids).ravel()):
                    file.seek(self._tensor.offset + int(row) * width)
                    data = file.read(width)
                    if len(data) < width:
                        raise OSError("it ends too early")
                    rows[n] = np.frombuffer(data, kind)
        except OSError as error:
            raise CheckpointError(
                f"{self._tensor.file} cannot be read ({error.strerror or error}): start again"
            ) from error
        return mx.array(rows).view(dtype).astype(self._dtype).reshape(*ids.shape, columns)


def _copy(value: Any) -> Any:
    """A copy of a module and its submodules that shares the arrays."""
    if isinstance(value, nn.Module):
        twin = copy.copy(value)
        for name, child in value.items():
            twin[name] = _copy(child)
        return twin
    return [_copy(item) for item in value] if isinstance(value, list) else value
