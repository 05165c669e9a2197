"""From a component's files to the parameters of a module, strictly and without a peak.

`mx.load` is lazy: a tensor's bytes are read when it is first evaluated, and given back when the last reference goes.
So a component is checked by its headers alone, and evaluated one layer at a time: the peak is the result plus one
layer. Nothing here knows a model; the weights map does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx
import mlx.nn as nn

from ..errors import CheckpointError
from .mapping import LAYOUTS, TensorSpec, canonical_names, expected_tensors, other_part
from .shards import Tensor

FLOAT_DTYPES = ("F32", "F16", "BF16")
_NAMES_SHOWN = 5

M = TypeVar("M", bound=nn.Module)


class ComponentWeights:
    """The tensors of one component, checked against the weights map, read on demand.

    Args:
        component: "transformer", "text_encoder" or "vae".
        config: its config dataclass.
        tensors: what the files' headers say, by stored name.
        parts: the parts that must be complete.

    Raises:
        CheckpointError: names every missing, unexpected and mis-shaped tensor of those parts.
    """

    def __init__(self, component: str, config: Any, tensors: Mapping[str, Tensor], parts: Iterable[str]):
        self.component = component
        self._specs = expected_tensors(component, config)
        stored = {canonical: name for name, canonical in canonical_names(component, tensors).items()}
        self._tensors = {canonical: tensors[name] for canonical, name in stored.items()}
        self._check(frozenset(parts))

    def _check(self, parts: frozenset[str]) -> None:
        wanted = {name: spec for name, spec in self._specs.items() if spec.part in parts}
        problems = [
            ("lacks", [name for name in wanted if name not in self._tensors]),
            (
                "has unexpected",
                [n for n in self._tensors if n not in self._specs and other_part(self.component, n) is None],
            ),
            (
                "has mis-shaped",
                [
                    f"{name} {list(found.shape)} instead of {list(spec.shape)}"
                    for name, spec in self._specs.items()
                    if (found := self._tensors.get(name)) and found.shape != spec.shape
                ],
            ),
            (
                f"has tensors that are not {', '.join(FLOAT_DTYPES)}:",
                [f"{n} ({t.dtype})" for n in wanted if (t := self._tensors.get(n)) and t.dtype not in FLOAT_DTYPES],
            ),
        ]
        said = [f"{what} {_some(names)}" for what, names in problems if names]
        if said:
            raise CheckpointError(
                f"the {self.component} does not fit its config.json: it {'; it '.join(said)}; "
                "check that the files belong together, or download them again"
            )

    def specs(self, part: str) -> list[TensorSpec]:
        """The tensors of a part, in the map's order."""
        return [spec for spec in self._specs.values() if spec.part == part]

    @property
    def files(self) -> set[Path]:
        """The files the tensors are in."""
        return {tensor.file for tensor in self._tensors.values()}

    @property
    def nbytes(self) -> int:
        """Bytes of all the component's tensors as stored, those nobody reads included."""
        return sum(tensor.nbytes for tensor in self._tensors.values())

    def read(self, part: str) -> dict[str, mx.array]:
        """Lazy arrays of a part, in the module's layout and the file's dtype, by canonical name.

        The caller owns the only references: what it drops is given back.
        """
        shards: dict[Path, dict[str, mx.array]] = {}
        arrays = {}
        for spec in self.specs(part):
            tensor = self._tensors[spec.name]
            if tensor.file not in shards:
                shards[tensor.file] = _opened(self.component, tensor.file)
            array = shards[tensor.file][tensor.name]
            if spec.layout != "same":
                # A copy: as a view, one temporal tap would keep all of them in memory.
                array = mx.contiguous(LAYOUTS[spec.layout](array))
            arrays[spec.name] = array
        return arrays


def _opened(component: str, file: Path) -> dict[str, mx.array]:
    try:
        return mx.load(str(file))
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(f"the {component}'s file {file} could not be opened: {error}") from error


def load_module(module: M, weights: ComponentWeights, part: str, dtype: mx.Dtype) -> M:
    """Gives every parameter of a new module its weight in `dtype`, evaluated layer by layer; returns the module.

    Raises:
        CheckpointError: a file could not be read to its end.
    """
    arrays = [(name, array.astype(dtype)) for name, array in weights.read(part).items()]
    module.load_weights(arrays, strict=True)
    del arrays
    module.eval()
    for layer in _layers(module):
        evaluate(weights.component, layer.parameters())
    return module


def evaluate(component: str, arrays: Any) -> None:
    """`mx.eval` for arrays that come out of a checkpoint's files.

    Raises:
        CheckpointError: the file could not be read, for instance because it was changed or removed meanwhile.
    """
    try:
        mx.eval(arrays)
    except RuntimeError as error:
        raise CheckpointError(f"the {component}'s files could not be read while loading: {error}") from error


def _layers(module: nn.Module) -> Iterator[nn.Module]:
    """The module's pieces, small enough to be evaluated at once: list entries one by one, then the whole."""
    for child in module.children().values():
        if isinstance(child, nn.Module):
            yield from _layers(child)
        elif isinstance(child, list):
            yield from (item for item in child if isinstance(item, nn.Module))
    yield module


def _some(names: list[str]) -> str:
    more = len(names) - _NAMES_SHOWN
    return ", ".join(names[:_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")
