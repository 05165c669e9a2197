"""Loads a component's files into the parameters of a module, strictly and with little extra memory.

A component is checked by its headers alone, and then read, packed and evaluated one tensor at a time: peak memory is
the result plus one tensor. Nothing here is specific to a model; that is the weights map's task.
"""

from __future__ import annotations

import copy
import logging
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx
from mlx.utils import tree_flatten

from ..errors import CheckpointError, some
from ..models import nn
from ..models.layers import QuantizedEmbedding, QuantizedLinear
from ..registry import Component
from .changes import Placement
from .mapping import (
    LAYOUTS,
    TensorSpec,
    canonical_names,
    expected_tensors,
    is_ignored,
    other_part,
    specs_of_layers,
    weights_map,
)
from .packed import Packed
from .quantize import quantize_matrix
from .recognize import check_kind, shard_of
from .safetensors_files import Tensor
from .schemes import Scheme
from .tensor_formats import FLOATS, FP8, Reader, Stored, join, stored_weights

logger: logging.Logger = logging.getLogger(__name__)

_LAYER = re.compile(r".*?\.\d+(?=\.)|.*")  # a name up to its first number

M = TypeVar("M", bound=nn.Module)


class ComponentWeights:
    """The weights of one component, checked against the weights map, read on demand.

    Args:
        component: whose weights they are.
        config: its config dataclass.
        tensors: the tensors of the files' headers, by stored name.
        parts: the parts that must be complete.

    Raises:
        CheckpointError: names every missing, unexpected, mis-shaped and unreadable tensor of those parts.
    """

    def __init__(self, component: Component, config: Any, tensors: Mapping[str, Tensor], parts: Iterable[str]):
        self.component = component
        self.config = config
        self._specs = expected_tensors(component, config)
        canonical = canonical_names(component, tensors)
        _check_twins(component.role, canonical)
        check_kind(component, tensors)
        shapes = {name: spec.shape for name, spec in self._specs.items()}
        whole = join({canonical[name]: tensor for name, tensor in tensors.items()}, weights_map(component.map))
        self._stored, self._cure = stored_weights(whole, shapes, weights_map(component.map)), _cure(tensors)
        # Other tools lay convolutions out as MLX does. Small ones fit both layouts, so all are judged together.
        moved = {name: _channels_last(spec.shape) for name, spec in self._specs.items() if len(spec.shape) > 2}
        fits = {name: self._stored[name].shape == shape for name, shape in moved.items() if name in self._stored}
        self._channels_last = any(fits[name] and moved[name] != self._specs[name].shape for name in fits)
        self._check(frozenset(parts))
        self._states = {path: _state_of(path) for path in self.files}

    def _check(self, parts: frozenset[str]) -> None:
        needed = {name: spec for name, spec in self._specs.items() if spec.part in parts}
        known = {*self._specs, *weights_map(self.component.map).get("markers", ())}
        problems = [
            ("lacks", [name for name in needed if name not in self._stored]),
            (
                "has unexpected",
                [
                    name
                    for name in self._stored
                    if name not in known
                    and other_part(self.component, name) is None
                    and not is_ignored(self.component, name)
                ],
            ),
            (
                "has mis-shaped",
                [
                    f"{name} {list(found.shape)} instead of {list(self._file_shape(spec))}"
                    for name, spec in self._specs.items()
                    if (found := self._stored.get(name)) and not found.problem and not self._fits(spec, found.shape)
                ],
            ),
            (
                f"has tensors that are not {', '.join((*FLOATS, *FP8))} or packed by MLX:",
                [f"{n} ({found.problem})" for n in needed if (found := self._stored.get(n)) and found.problem],
            ),
        ]
        listed = [f"{what} {some(names)}" for what, names in problems if names]
        if listed:
            raise CheckpointError(
                f"the {self.component.role} does not fit its config.json: it {'; it '.join(listed)}; {self._cure}"
            )

    def _file_shape(self, spec: TensorSpec) -> tuple[int, ...]:
        return _channels_last(spec.shape) if self._channels_last and len(spec.shape) > 2 else spec.shape

    def _fits(self, spec: TensorSpec, shape: tuple[int, ...]) -> bool:
        return shape == self._file_shape(spec) or (spec.layout == "vector" and shape == spec.shape[:1])

    def of_layers(self, layers: Collection[int]) -> ComponentWeights:
        """The same weights without those of its other layers, by number."""
        some = copy.copy(self)
        some._specs = {spec.name: spec for spec in specs_of_layers(self.component, self._specs.values(), layers)}
        return some

    def specs(self, part: str) -> list[TensorSpec]:
        """The tensors of a part, in the map's order."""
        return [spec for spec in self._specs.values() if spec.part == part]

    def layers(self, specs: Iterable[TensorSpec] | None = None) -> list[list[TensorSpec]]:
        """Tensors grouped by layer, in the map's order; None means all stored tensors of all parts."""
        layers: dict[str, list[TensorSpec]] = {}
        for spec in (s for s in self._specs.values() if s.name in self._stored) if specs is None else specs:
            layers.setdefault(_LAYER.match(spec.name)[0], []).append(spec)
        return list(layers.values())

    def is_packed(self, name: str) -> bool:
        """Whether a weight is packed in its file."""
        return self._stored[name].scheme is not None

    def stored(self, name: str) -> Stored:
        """How a tensor is stored in its file, by canonical name."""
        return self._stored[name]

    def check_unchanged(self) -> None:
        """Raises CheckpointError if a file changed since its header was read."""
        for path, state in self._states.items():
            if _state_of(path) != state:
                raise CheckpointError(
                    f"{path} was changed or removed while the {self.component.role} was read from it: start again"
                )

    @property
    def files(self) -> set[Path]:
        """The files the weights are in."""
        return {file for stored in self._stored.values() for file in stored.files}

    @property
    def tensors(self) -> list[Tensor]:
        """The files' tensors that make up its weights."""
        found = [tensor for stored in self._stored.values() for tensor in (stored.tensor, *stored.companions.values())]
        return [piece for tensor in found for piece in getattr(tensor, "pieces", (tensor,))]

    @property
    def nbytes(self) -> int:
        """Bytes of its weights as stored; other contents of the files are not counted."""
        return sum(self.forms.values())

    @property
    def forms(self) -> dict[str, int]:
        """Bytes of its weights by stored form: "BF16", "F8_E4M3", "Q4_K", "4 bit" or "mxfp8"."""
        forms: dict[str, int] = {}
        for stored in (self._stored[name] for name in self._specs if name in self._stored):
            form = stored.form
            forms[form] = forms.get(form, 0) + stored.nbytes
        return dict(sorted(forms.items(), key=lambda item: -item[1]))

    def resident_bytes(self, part: str, dtype: mx.Dtype, scheme: Scheme | None = None) -> int:
        """Bytes in memory once a part is loaded, as `load_module` does with the same arguments."""
        return self.bytes_of(self.specs(part), dtype, scheme)

    def bytes_of(self, specs: Iterable[TensorSpec], dtype: mx.Dtype, scheme: Scheme | None = None) -> int:
        """Bytes in memory of some of its tensors, once loaded in `dtype` or packed by `scheme`."""
        return sum(
            spec.loaded_bytes(dtype, scheme if spec.is_packed_by(scheme) else self._stored[spec.name].scheme)
            for spec in specs
        )

    def read(self, specs: Iterable[TensorSpec], reader: Reader) -> None:
        """Reads several weights at once, for `open` to hand out; raises CheckpointError if a file cannot be read."""
        reader.read(self._stored[spec.name] for spec in specs)

    def open(self, spec: TensorSpec, reader: Reader) -> mx.array | Packed:
        """One weight, read: its map's shape, its file's dtype; raises CheckpointError if its file cannot be read."""
        value = reader.open(self._stored[spec.name])
        if self._channels_last and isinstance(value, mx.array) and value.ndim > 2:
            value = mx.moveaxis(value, -1, 1)
        return value.reshape(spec.shape) if isinstance(value, mx.array) and spec.layout == "vector" else value


def _check_twins(component: str, canonical: Mapping[str, str]) -> None:
    """Refuses two spellings of the same name."""
    if len(set(canonical.values())) < len(canonical):
        twice = next(name for name, count in Counter(canonical.values()).items() if count > 1)
        raise CheckpointError(f"the {component} has {twice} twice, under two spellings: use another file")


def _cure(tensors: Mapping[str, Tensor]) -> str:
    if shard := shard_of(tensors):
        return f"its file is {shard}, so give the folder that has all of them"
    return "check that the files and the config are those of one model, all of them and no others"


def _state_of(path: Path) -> tuple[int, int, int] | None:
    """Identifies a file's version: inode, size, modification time; None if it does not exist."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def _channels_last(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (shape[0], *shape[2:], shape[1])


def load_module(
    module: M,
    weights: ComponentWeights,
    part: str,
    dtype: mx.Dtype,
    scheme: Scheme | None = None,
    placement: Placement | None = None,
) -> M:
    """Gives every parameter of a new module its weight, evaluated one by one; returns the module.

    Args:
        module: its parameters have the weights map's names.
        weights: what to fill it with.
        part: which part of them.
        dtype: of all floating parameters.
        scheme: packs the matrices that the map calls quantized; those already packed in a different scheme are
            repacked, all others stay as they are stored.
        placement: LoRAs to be merged or run unmerged; it logs the result.

    Raises:
        CheckpointError: a file could not be read to its end, or a LoRA cannot be combined with packed weights.
    """
    specs = specs_of(module, weights, part, scheme)
    fill(module, weights, specs, Reader(weights.component.role), dtype, scheme, placement)
    if placement:
        placement.log_placement()
    module.eval()
    return module


def specs_of(module: nn.Module, weights: ComponentWeights, part: str, scheme: Scheme | None) -> list[TensorSpec]:
    """A part's tensors; raises ValueError unless they are exactly the module's parameters."""
    specs = weights.specs(part)
    names = {name for name, _ in tree_flatten(module.parameters())}
    if names != {spec.name for spec in specs}:
        raise ValueError(f"module and weights map differ in {some(sorted(names ^ {spec.name for spec in specs}))}")
    if scheme is not None:
        say_what_does_not_fit(weights.component.role, specs, scheme)
    return specs


def fill(
    module: nn.Module,
    weights: ComponentWeights,
    specs: Iterable[TensorSpec],
    reader: Reader,
    dtype: mx.Dtype,
    scheme: Scheme | None = None,
    placement: Placement | None = None,
    *,
    prefix: str = "",
    lazily: bool = False,
) -> None:
    """Gives some parameters of a module their weights.

    Args:
        module: its parameters have the weights map's names, less `prefix`.
        weights: the component's weights.
        specs: the tensors to fill in.
        reader: reads the files' tensors.
        dtype: of all floating parameters.
        scheme: packs the matrices that the map calls quantized; None keeps them as they are stored.
        placement: LoRAs to be merged or run unmerged.
        prefix: what the module's own names lack.
        lazily: does not evaluate conversions to a different dtype or layout.
    """
    branches = []
    for spec in specs:
        value, branch, name = weights.open(spec, reader), None, spec.name.removeprefix(prefix)
        packs = spec.is_packed_by(scheme)
        if placement and placement.changes(spec.name):
            if len(spec.shape) == 2:
                value, branch = placement.matrix(spec.name, value, scheme if packs else None, dtype)
            else:
                value = placement.vector(spec.name, value)
        elif packs:
            value = repack(value, scheme)
        if isinstance(value, Packed):
            value = value.astype(dtype)
            if not lazily:
                mx.eval(value.arrays)
            _quantize_layer(module, name.removesuffix(".weight"), value, dtype)
        else:
            value = LAYOUTS[spec.layout](value)
            # A copy: as a view, one temporal tap would keep all of them in memory.
            value = (value if spec.layout == "same" else mx.contiguous(value)).astype(dtype)
            if not lazily:
                mx.eval(value)
            module.load_weights([(name, value)], strict=False)
        if branch is not None:
            assert placement is not None
            branches.append((placement, name.removesuffix(".weight"), branch))
    for owner, path, branch in branches:  # after all layers are filled: a branch replaces one
        owner.attach(module, path, branch)


def say_what_does_not_fit(component: str, specs: Collection[TensorSpec], scheme: Scheme) -> None:
    """Warns about matrices that a scheme should pack but cannot."""
    meant = [spec for spec in specs if spec.quantized]
    left = [spec for spec in meant if not scheme.fits(spec.shape)]
    if left:
        logger.warning(
            "%d of the %s's %d matrices stay as they are, because their rows are not multiples of %d: %s",
            len(left), component, len(meant), scheme.group_size, some([spec.name for spec in left]),
        )  # fmt: skip


def repack(value: mx.array | Packed, scheme: Scheme) -> Packed:
    """A (rows, columns) weight packed by a scheme, evaluated."""
    if isinstance(value, Packed):
        if Scheme(value.mode, value.bits, value.group_size) == scheme:
            return value
        value = value.dequantize()
    return quantize_matrix(value, scheme)


def _quantize_layer(module: nn.Module, path: str, packed: Packed, dtype: mx.Dtype) -> None:
    """Replaces a layer with a quantized one; its bias stays."""
    parent, place = place_of(module, path)
    form = (*packed.arrays, packed.group_size, packed.bits, packed.mode)
    if isinstance(parent[place], nn.Embedding):
        parent[place] = QuantizedEmbedding(*form, dtype)
    else:
        parent[place] = QuantizedLinear(*form, parent[place].get("bias"))


def place_of(module: nn.Module, path: str) -> tuple[Any, str | int]:
    """The module or list that holds a layer, and the layer's name or index in it."""
    *parents, last = path.split(".")
    for name in parents:
        module = module[int(name)] if isinstance(module, list) else module[name]
    return module, int(last) if isinstance(module, list) else last
