"""Traces a function: what MLX would run for it on Metal, when it evaluates, and what Python holds meanwhile.

Nothing of the traced function is evaluated. Its arrays are `blank`: any shape, no memory. `mx.export_function` yields
the primitives with their shapes, but writes the CPU's form of `mx.fast` and refuses compiled functions. So while
tracing, both are replaced by markers: an `mx.depends` whose last input is a number that stands for what it marks. How
many kernels a compiled function is, MLX itself says: its fused graph is written by `mx.export_to_dot` and read back.
So a compiled function that stops fusing shows up here without a change.
"""

from __future__ import annotations

import math
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map

# Primitives that only look at their input in another way. `Reshape` and its kin do so if strides allow it.
VIEWS = {
    "Transpose", "Broadcast", "BroadcastAxes", "Squeeze", "ExpandDims", "Slice", "Split", "Depends", "StopGradient",
    "Copy", "CustomTransforms", "View", "AsStrided", "NumberOfElements",
}  # fmt: skip
RESHAPES = {"Reshape", "Flatten", "Unflatten"}
# Heads for which Metal has the fused attention kernel: `ScaledDotProductAttention::use_fallback` of MLX 0.32.4.
FUSED_HEADS = {64, 72, 80, 96, 128, 192, 256}
_COMPILED = type(mx.compile(lambda x: x))
_FIRST_MARK = 1 << 40
_eval = mx.eval


@dataclass(frozen=True)
class Mark:
    """What stands in the graph for a function that must not be decomposed.

    Attributes:
        name: the function's.
        kind: "norm", "attention" or "compiled".
        kernels: kinds of the kernels it runs, in their order.
        share: part of the nominal FLOP that is computed: one half for causal attention.
    """

    name: str
    kind: str
    kernels: tuple[str, ...]
    share: float = 1.0


@dataclass(frozen=True)
class Spec:
    """Shape and dtype of an array."""

    shape: tuple[int, ...]
    dtype: mx.Dtype

    @property
    def nbytes(self) -> int:
        """Bytes, packed."""
        return math.prod(self.shape) * self.dtype.size


@dataclass(frozen=True)
class Op:
    """One primitive: names of what it reads and makes, and its arguments as MLX exports them."""

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    arguments: tuple[Any, ...] = ()
    mark: Mark | None = None


@dataclass(frozen=True)
class Evaluation:
    """One call of `mx.eval` or `mx.async_eval`.

    Attributes:
        arrays: what it is asked for.
        wait: whether it returns when they are computed.
        held: results of evaluations before that Python still holds.
    """

    arrays: tuple[str, ...]
    wait: bool = True
    held: frozenset[str] = frozenset()


@dataclass
class Graph:
    """A traced function.

    Attributes:
        specs: shape and dtype of every array by its name.
        ops: the primitives, each after those it reads from; arrays that no primitive makes are there from the start.
        evaluations: in their order.
    """

    specs: dict[str, Spec]
    ops: list[Op]
    evaluations: list[Evaluation] = field(default_factory=list)


def blank(shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    """An evaluated array of zeros that takes no memory: one value, broadcast."""
    array = mx.broadcast_to(mx.zeros((), dtype), shape)
    _eval(array)
    return array


def blank_module(module: nn.Module, dtype: mx.Dtype) -> nn.Module:
    """The module with `blank` weights of a dtype."""
    return module.update(tree_map(lambda weight: blank(weight.shape, dtype), module.parameters()))


def trace(fn: Callable[..., Any], *arguments: Any) -> Graph:
    """Runs a function on `blank` arrays, as it would run on Metal, and records what it would do.

    Args:
        fn: may evaluate; what it returns (arrays, or trees of them) is evaluated at its end.
        arguments: its arguments; arrays among them, and weights that it uses, count as there from the start.

    Raises:
        ValueError: fn uses a compiled function that is not an attribute of a module, so that it cannot be marked.
    """
    records: list[dict[str, Any]] = []
    recorder = _Recorder()
    with recorder.recording():
        recorder.evaluate(fn(*arguments), wait=True)
    # The graph is built already: inside `export_function` compiled functions would fuse otherwise, and be kept so.
    mx.export_function(records.append, lambda: tuple(recorder.arrays))
    return recorder.graph(records)


def kernels_of(fn: Callable[..., Any], *arguments: Any) -> tuple[str, ...]:
    """Kinds of the kernels that a compiled function runs, as MLX fuses it, for arguments of these shapes and dtypes."""
    inputs = [blank(x.shape, x.dtype) if isinstance(x, mx.array) else x for x in arguments]
    with tempfile.NamedTemporaryFile(suffix=".dot") as file:
        mx.export_to_dot(file.name, fn(*inputs))
        text = Path(file.name).read_text()
    kinds = []
    for node, label in re.findall(r'\{ (\d+) \[label ?="([^"]*)", shape=rectangle\]; \}', text):
        if label not in VIEWS | RESHAPES | {"Full"}:
            copies = len(re.findall(rf'" -> {node}\n', text)) if label == "Concatenate" else 1
            kinds += [{"AsType": "cast", "Concatenate": "copy"}.get(label, "elementwise")] * copies
    return tuple(kinds)


class _Recorder:
    """Marks and evaluations of one trace."""

    def __init__(self) -> None:
        self.arrays: list[mx.array] = []  # what was evaluated, once each, in its order
        self._alone = [mx.zeros(())]  # an array that nobody else holds
        self._places: dict[int, int] = {}  # id of such an array -> its place
        self._evaluations: list[tuple[list[int], bool, list[int]]] = []
        self._marks: list[Mark] = []
        self._fused: dict[Any, tuple[str, ...]] = {}

    @contextmanager
    def recording(self) -> Iterator[None]:
        """While it lasts, `mx.fast`, compiled functions and evaluations are recorded instead of run."""
        norms = [(mx.fast, name, self._norm(name)) for name in ("layer_norm", "rms_norm")]
        evaluations = [
            (mx, "eval", lambda *trees: self.evaluate(trees, wait=True)),
            (mx, "async_eval", lambda *trees: self.evaluate(trees, wait=False)),
            (mx, "synchronize", lambda *_: None),
        ]
        attention = (mx.fast, "scaled_dot_product_attention", self._attention(mx.fast.scaled_dot_product_attention))
        compiled = [
            (module, name, self._compiled(value))
            for module in list(sys.modules.values())
            if getattr(module, "__name__", "").startswith(("qwen_image_mlx.", "mlx.nn"))
            for name, value in vars(module).items()
            if type(value) is _COMPILED
        ]
        patches = [*norms, *evaluations, attention, *compiled]
        before = [(owner, name, getattr(owner, name)) for owner, name, _ in patches]
        try:
            for owner, name, value in patches:
                setattr(owner, name, value)
            yield
        finally:
            for owner, name, value in before:
                setattr(owner, name, value)

    def evaluate(self, trees: Any, wait: bool) -> None:
        """Records an evaluation of the arrays in trees, and which earlier ones somebody else holds."""
        alone = _holders(self._alone, 0)
        held = [place for place in range(len(self.arrays)) if _holders(self.arrays, place) > alone]
        asked = [array for _, array in tree_flatten(trees) if isinstance(array, mx.array)]
        for array in asked:
            if id(array) not in self._places:
                self._places[id(array)] = len(self.arrays)
                self.arrays.append(array)
        self._evaluations.append(([self._places[id(array)] for array in asked], wait, held))

    def graph(self, records: list[dict[str, Any]]) -> Graph:
        """What `mx.export_function` said, with marks in their places."""
        specs: dict[str, Spec] = {}
        ops: list[Op] = []
        marks: dict[str, Mark] = {}
        names: list[str] = []
        for record in records:
            if record["type"] == "outputs":
                names = [name for name, *_ in record["outputs"]]
            elif record["type"] == "constants":
                for name, array in record["constants"]:
                    specs[name] = Spec(tuple(array.shape), array.dtype)
                    if array.dtype == mx.int64 and array.size == 1 and array.item() >= _FIRST_MARK:
                        marks[name] = self._marks[array.item() - _FIRST_MARK]
            elif record["type"] == "primitive":
                outputs = tuple(name for name, *_ in record["outputs"])
                specs.update((name, Spec(tuple(shape), dtype)) for name, shape, dtype in record["outputs"])
                inputs = tuple(name for name, *_ in record["inputs"])
                if inputs and inputs[-1] in marks:
                    ops.append(Op("Mark", inputs[len(outputs) : -1], outputs, (), marks[inputs[-1]]))
                else:
                    ops.append(Op(record["name"], inputs, outputs, tuple(record["arguments"])))
        evaluations = [
            Evaluation(tuple(names[n] for n in asked), wait, frozenset(names[n] for n in held))
            for asked, wait, held in self._evaluations
        ]
        return Graph(specs, ops, evaluations)

    def _mark(self, mark: Mark, outputs: list[mx.array], inputs: list[Any]) -> list[mx.array]:
        """Arrays like `outputs` that depend on `inputs` through the mark."""
        number = mx.array(_FIRST_MARK + len(self._marks), mx.int64)
        self._marks.append(mark)
        arrays = [x for x in inputs if isinstance(x, mx.array)]
        return mx.depends([blank(x.shape, x.dtype) for x in outputs], [*arrays, number])

    def _norm(self, name: str) -> Callable[..., mx.array]:
        def norm(x: mx.array, *parameters: Any, **_: Any) -> mx.array:
            return self._mark(Mark(name, "norm", ("norm",)), [x], [x, *parameters])[0]

        return norm

    def _attention(self, composed: Callable[..., mx.array]) -> Callable[..., mx.array]:
        def attention(q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: Any = None) -> mx.array:
            if q.shape[-1] not in FUSED_HEADS:
                return composed(q, k, v, scale=scale, mask=mask)
            mark = Mark("attention", "attention", ("attention",), 0.5 if mask == "causal" else 1.0)
            return self._mark(mark, [blank((*q.shape[:-1], v.shape[-1]), q.dtype)], [q, k, v, mask])[0]

        return attention

    def _compiled(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        def compiled(*arguments: Any) -> Any:
            key = (id(fn), *((tuple(x.shape), x.dtype) if isinstance(x, mx.array) else x for x in arguments))
            result = fn(*(blank(x.shape, x.dtype) if isinstance(x, mx.array) else x for x in arguments))
            if key not in self._fused:
                self._fused[key] = kernels_of(fn, *arguments)
            single = isinstance(result, mx.array)
            mark = Mark(getattr(fn, "__name__", "compiled"), "compiled", self._fused[key])
            marked = self._mark(mark, [result] if single else list(result), list(arguments))
            return marked[0] if single else type(result)(marked)

        return compiled


def _holders(arrays: list[mx.array], place: int) -> int:
    """References to an array of a list, those of the list and of this call included."""
    return sys.getrefcount(arrays[place])
