"""Replays a graph on a machine: MLX's order of evaluation, what is donated, and which kernels a primitive takes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from .graph import RESHAPES, VIEWS, Evaluation, Graph, Op
from .machine import Buffer, Device, Machine, Result, View, row_strides

BFS_WIDTH = 20  # MLX_BFS_MAX_WIDTH
ELEMENTWISE = {
    "Abs", "Add", "Subtract", "Multiply", "Divide", "Maximum", "Minimum", "Exp", "Expm1", "Log", "Log1p", "Sigmoid",
    "Tanh", "Negative", "Square", "Sqrt", "Power", "Select", "Cos", "Sin", "Sign", "Floor", "FloorDivide", "Round",
    "Erf", "Less", "LessEqual", "Greater", "GreaterEqual", "Equal", "NotEqual", "LogicalAnd", "LogicalOr",
    "LogicalNot", "Remainder", "BitwiseBinary",
}  # fmt: skip


def replay(graph: Graph, machine: Machine) -> Result:
    """What MLX would do with the graph on the machine."""
    return _Replay(graph, machine).run()


def evaluation_order(makers: dict[str, Op], wanted: Sequence[str], done: Iterable[str] = ()) -> list[Op]:
    """The order in which MLX runs the primitives of one evaluation: `eval_impl` in transforms.cpp.

    A walk counts how often each primitive is read; then they are taken breadth first from the results back, `BFS_WIDTH`
    at most side by side, each when all its readers are; and run in the reverse of that.

    Args:
        makers: the primitive that makes an array.
        wanted: arrays to evaluate.
        done: arrays that are evaluated already.
    """
    known = set(done)

    def before(names: Sequence[str]) -> list[Op]:
        return [makers[name] for name in names if name in makers and name not in known]

    root = Op("Synchronizer", tuple(wanted), ())
    sources = {id(root): before(root.inputs)}
    readers: Counter[int] = Counter()
    stack = [(root, 0)]
    while stack:
        op, n = stack.pop()
        if n == len(sources[id(op)]):
            continue
        stack.append((op, n + 1))
        source = sources[id(op)][n]
        readers[id(source)] += 1
        if id(source) not in sources:
            sources[id(source)] = before(source.inputs)
            stack.append((source, 0))
    tape, taken, later = [root], 0, []
    while taken < len(tape) or later:
        if taken < len(tape):
            op, first = tape[taken], 0
            taken += 1
        else:
            op, first = later.pop()
        for n in range(first, len(sources[id(op)])):
            if len(tape) - taken >= BFS_WIDTH:
                later.append((op, n))
                break
            source = sources[id(op)][n]
            readers[id(source)] -= 1
            if readers[id(source)] == 0:
                tape.append(source)
    return tape[:0:-1]


def reshaped(view: View, shape: Sequence[int]) -> tuple[int, ...] | None:
    """Strides of the view in another shape; None if its elements must be copied for it."""
    runs: list[tuple[int, int]] = []  # sizes and strides of axes, those that follow each other in memory as one
    for size, stride in zip(view.shape, view.strides, strict=True):
        if size == 1:
            continue
        if runs and runs[-1][1] == size * stride:
            runs[-1] = (runs[-1][0] * size, stride)
        else:
            runs.append((size, stride))
    strides, left, step = [], 1, 1
    for size in reversed(shape):
        if size > 1 and left == 1:
            left, step = runs.pop()
        if left % size:
            return None
        strides.append(step)
        left, step = left // size, step * size
    return tuple(reversed(strides))


class _Replay:
    """One replay: where every array lies, and who still needs it."""

    def __init__(self, graph: Graph, machine: Machine):
        self.graph, self.device = graph, Device(machine)
        self.makers = {name: op for op in graph.ops for name in op.outputs}
        self.views: dict[str, View] = {}
        self.readers = Counter(name for op in graph.ops for name in op.inputs)
        self.held: dict[str, None] = {}
        self.commands: dict[str, int] = {}  # of an evaluated array: the command buffer that is the last to make it
        for name, spec in graph.specs.items():
            if name not in self.makers:
                buffer = Buffer(spec.nbytes, permanent=True)
                self.views[name] = View(spec.shape, row_strides(spec.shape), spec.dtype.size, buffer)

    def run(self) -> Result:
        for evaluation in self.graph.evaluations:
            self._evaluate(evaluation)
            self.device.result.fresh_after.append(self.device.result.fresh)
        return self.device.result

    def _evaluate(self, evaluation: Evaluation) -> None:
        for name in [name for name in self.held if name not in evaluation.held]:
            del self.held[name]
            if not self.readers[name]:
                self._forget(name)
        order = evaluation_order(self.makers, evaluation.arrays, self.views)
        asked = [name for name in evaluation.arrays if name in self.makers]
        self.held.update(dict.fromkeys(asked))
        for op in order:
            self._run(op)
            self.device.after_primitive()
        number = self.device.end_evaluation()
        for name in asked:
            self.commands.setdefault(name, number)
        if evaluation.wait:
            self.device.wait_for(max((self.commands[name] for name in asked), default=0))

    def _run(self, op: Op) -> None:
        inputs = [self.views[name] for name in op.inputs]
        made = _rule(op)(self, op, inputs)
        for name, view in zip(op.outputs, made, strict=True):
            self.views[name] = view
            self.device.keep(view.buffer)
        if op.name not in VIEWS:
            for view in inputs:
                self.device.use(view.buffer)
        for name in op.inputs:
            self.readers[name] -= 1
        for name in dict.fromkeys((*op.inputs, *op.outputs)):
            if not self.readers[name] and name not in self.held:
                self._forget(name)

    def _forget(self, name: str) -> None:
        if name in self.makers:
            self.device.drop(self.views[name].buffer)

    # What the rules are made of.

    def new(self, name: str, strides: Sequence[int] | None = None) -> View:
        """A freshly allocated result."""
        spec = self.graph.specs[name]
        return View(
            spec.shape,
            tuple(strides or row_strides(spec.shape)),
            spec.dtype.size,
            self.device.allocate(spec.nbytes),
        )

    def scratch(self, shape: Sequence[int], itemsize: int) -> View:
        """Memory that is given back when the open command buffer is done."""
        buffer = self.device.allocate(math.prod(shape) * itemsize)
        self.device.use(buffer)
        return View(tuple(shape), row_strides(shape), itemsize, buffer)

    def copied(self, view: View) -> View:
        """The view in the order of its axes, in scratch memory."""
        copy = self.scratch(view.shape, view.itemsize)
        self.device.kernel("copy", [view], [copy])
        return copy

    def donated(self, op: Op, candidates: Sequence[int]) -> View | None:
        """The first of these inputs whose memory may become the result's: like it, and nobody else's."""
        spec = self.graph.specs[op.outputs[0]]
        for n in candidates:
            name = op.inputs[n]
            view = self.views[name]
            if (
                (view.shape, view.itemsize) == (spec.shape, spec.dtype.size)
                and view.is_dense
                and not view.buffer.permanent
                and view.buffer.arrays == 1
                and self.readers[name] == 1
                and name not in self.held
            ):
                return View(view.shape, view.strides, view.itemsize, view.buffer)
        return None


Rule = Callable[[_Replay, Op, Sequence[View]], "list[View]"]


def _rule(op: Op) -> Rule:
    """The function that runs a primitive."""
    if op.mark is not None:
        return {"norm": _norm, "attention": _attention, "compiled": _compiled}[op.mark.kind]
    if op.name in ELEMENTWISE:
        return _elementwise
    if op.name in RESHAPES:
        return _reshape
    return _RULES[op.name]


def _view(run: _Replay, op: Op, inputs: Sequence[View]) -> list[View]:
    """Another look at the first input, or for several outputs at as many inputs."""
    if op.name == "Split":
        inputs = [inputs[0]] * len(op.outputs)
    return [
        View(run.graph.specs[name].shape, _view_strides(op, x, run.graph.specs[name].shape), x.itemsize, x.buffer)
        for name, x in zip(op.outputs, inputs, strict=False)
    ]


def _view_strides(op: Op, x: View, shape: Sequence[int]) -> tuple[int, ...]:
    if op.name == "Transpose":
        return tuple(x.strides[axis] for axis in op.arguments[0])
    if op.name in ("Broadcast", "BroadcastAxes"):
        added = len(shape) - len(x.shape)
        kept = zip(x.shape, x.strides, shape[added:], strict=True)
        return (0,) * added + tuple(0 if d == 1 and wide != 1 else stride for d, stride, wide in kept)
    if op.name == "Squeeze":
        return tuple(stride for axis, stride in enumerate(x.strides) if axis not in op.arguments[0])
    if op.name == "ExpandDims":
        strides = iter(x.strides)
        return tuple(1 if axis in op.arguments[0] else next(strides) for axis in range(len(shape)))
    if op.name == "Slice":
        return tuple(stride * step for stride, step in zip(x.strides, op.arguments[2], strict=True))
    return x.strides


def _reshape(run: _Replay, op: Op, inputs: Sequence[View]) -> list[View]:
    (x,), spec = inputs, run.graph.specs[op.outputs[0]]
    strides = reshaped(x, spec.shape)
    if strides is not None:
        return [View(spec.shape, strides, x.itemsize, x.buffer)]
    out = run.new(op.outputs[0])
    run.device.kernel("copy", [x], [out])
    return [out]


def _contiguous(run: _Replay, op: Op, inputs: Sequence[View]) -> list[View]:
    (x,) = inputs
    if x.is_row_contiguous:
        return [x]
    return _single("copy")(run, op, inputs)


def _elementwise(run: _Replay, op: Op, inputs: Sequence[View]) -> list[View]:
    out = run.donated(op, range(len(inputs)))
    if out is None:
        keeps = len(inputs) == 1 and inputs[0].is_dense
        out = run.new(op.outputs[0], inputs[0].strides if keeps else None)
    run.device.kernel("elementwise", inputs, [out])
    return [out]


def _compiled(run: _Replay, op: Op, inputs: Sequence[View]) -> list[View]:
    """One kernel that reads all and writes all; or several, each handing on arrays like the results in fp32."""
    assert op.mark is not None
    kernels = op.mark.kernels
    for kind in kernels[:-1]:
        between = [run.scratch(run.graph.specs[name].shape, 4) for name in op.outputs]
        run.device.kernel(kind, inputs, between)
        inputs = between
    donated = run.donated(op, range(len(inputs))) if len(kernels) == 1 and len(op.outputs) == 1 else None
    outputs = [donated] if donated else [run.new(name) for name in op.outputs]
    if kernels:
        run.device.kernel(kernels[-1], inputs, outputs)
    return outputs


def _single(kind: str) -> Rule:
    """The rule of primitives that are one kernel of a kind, with memory of its own for the result."""

    def rule(run: _Replay, op: Op, inputs: Sequence[View]) -> list[View]:
        out = run.new(op.outputs[0])
        run.device.kernel(kind, inputs, [out])
        return [out]

    return rule


def _concatenate(run: _Replay, op: Op, inputs: Sequence[View]) -> list[View]:
    """A copy for each part."""
    out = run.new(op.outputs[0])
    for x in inputs:
        run.device.kernel("copy", [x], [View(x.shape, row_strides(x.shape), x.itemsize, out.buffer)])
    return [out]


def _pad(run: _Replay, op: Op, inputs: Sequence[View]) -> list[View]:
    """The whole is filled, then the input copied into it."""
    out, x = run.new(op.outputs[0]), inputs[0]
    run.device.kernel("fill", [], [out])
    run.device.kernel("copy", [x], [View(x.shape, row_strides(x.shape), x.itemsize, out.buffer)])
    return [out]


def _gather(run: _Replay, op: Op, inputs: Sequence[View]) -> list[View]:
    out = run.new(op.outputs[0])
    run.device.kernel("gather", inputs, [out], nbytes=2 * out.stored)
    return [out]


def _norm(run: _Replay, op: Op, inputs: Sequence[View]) -> list[View]:
    x = inputs[0]
    out = run.donated(op, [0])
    if x.strides[-1] != 1:
        x = run.copied(x)
    out = out or run.new(op.outputs[0])
    run.device.kernel("norm", [x, *inputs[1:]], [out])
    return [out]


def _softmax(run: _Replay, op: Op, inputs: Sequence[View]) -> list[View]:
    out = run.donated(op, [0]) or run.new(op.outputs[0])
    run.device.kernel("softmax", inputs, [out])
    return [out]


def _product(run: _Replay, op: Op, inputs: Sequence[View]) -> list[View]:
    """A product of matrices, a bias in the same kernel; factors are read as they lie if one of two axes is dense."""
    a, b = (x if 1 in x.strides[-2:] else run.copied(x) for x in inputs[:2])
    out = run.new(op.outputs[0])
    run.device.kernel("product", [a, b, *inputs[2:]], [out], flops=2 * out.elements * a.shape[-1])
    return [out]


def _quantized_product(run: _Replay, op: Op, inputs: Sequence[View]) -> list[View]:
    out = run.new(op.outputs[0])
    run.device.kernel("quantized product", inputs, [out], flops=2 * out.elements * inputs[0].shape[-1])
    return [out]


def _attention(run: _Replay, op: Op, inputs: Sequence[View]) -> list[View]:
    """Metal's fused kernel; the result lies as (batch, tokens, heads, channels)."""
    assert op.mark is not None
    inputs = [x if x.strides[-1] == 1 or x.shape[-1] == 1 else run.copied(x) for x in inputs]
    batch, heads, length, channels = run.graph.specs[op.outputs[0]].shape
    out = run.new(op.outputs[0], (length * heads * channels, channels, heads * channels, 1))
    keys = inputs[1].shape[2]
    flops = 4 * batch * heads * length * keys * channels * op.mark.share
    run.device.kernel("attention", inputs, [out], flops=flops)
    return [out]


def _convolution(run: _Replay, op: Op, inputs: Sequence[View]) -> list[View]:
    """Winograd's F(6, 3) in six kernels where Metal takes it, else an implicit product."""
    x, w = inputs
    if not x.is_row_contiguous:
        x = run.copied(x)
    out, device, size = run.new(op.outputs[0]), run.device, x.itemsize
    stride, padding = op.arguments[0], op.arguments[1]
    _, height, width, cin = x.shape
    _, rows, columns, cout = out.shape
    kernel = w.shape[1]
    winograd = kernel == 3 and stride[0] == 1 and not cin % 32 and not cout % 32 and cin + cout >= 256
    if not (device.machine.winograd and winograd and height * width >= 4096):
        reached = 0.15 if cout <= 16 else 0.3 if cin < 64 else 0.6
        device.kernel("convolution", [x, w], [out], 2 * out.elements * cin * kernel**2, reached)
        return [out]
    tiles = -(-rows // 6) * -(-columns // 6)
    extent = [6 * -(-(d + 2 * p - 2) // 6) + 2 for d, p in zip((height, width), padding, strict=True)]
    padded = run.scratch((*extent, cin), size)
    weights, moved = run.scratch((64, cin, cout), size), run.scratch((64, tiles, cin), size)
    product = run.scratch((64, tiles, cout), size)
    device.kernel("winograd", [w], [weights])
    device.kernel("fill", [], [padded])
    device.kernel("copy", [x], [View(x.shape, x.strides, size, padded.buffer)])
    device.kernel("winograd", [padded], [moved])
    device.kernel("winograd product", [moved, weights], [product], 2 * product.elements * cin)
    device.kernel("winograd", [product], [out])
    return [out]


_RULES: dict[str, Rule] = {
    **dict.fromkeys(VIEWS, _view),
    "AsType": _single("cast"),
    "Contiguous": _contiguous,
    "Concatenate": _concatenate,
    "Pad": _pad,
    "Gather": _gather,
    "GatherAxis": _gather,
    "Matmul": _product,
    "AddMM": _product,
    "QuantizedMatmul": _quantized_product,
    "Convolution": _convolution,
    "Softmax": _softmax,
    "Reduce": _single("reduce"),
    "ArgReduce": _single("reduce"),
    "Full": _single("fill"),
    "Arange": _single("fill"),
}
