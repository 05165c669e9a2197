"""The model of MLX's Metal backend: its rules on graphs with known answers, and our own work bounded by it."""

from __future__ import annotations

import mlx.core as mx
import pytest
from metal_backend import work
from metal_backend.graph import VIEWS, Evaluation, Graph, Op, Spec, blank, kernels_of, trace
from metal_backend.machine import GIB, PAGE, Buffer, Machine, View, row_strides
from metal_backend.replay import evaluation_order, replay, reshaped

from qwen_image_mlx.models.qwen_image import transformer

MI = 1 << 20


def chain(names, size, wanted, dtype=mx.float32, evaluations=None):
    """A graph of primitives of one input each, x -> 1 -> 2 …, all of `size` elements."""
    arrays = ["x", *(str(n + 1) for n in range(len(names)))]
    ops = [Op(name, (arrays[n],), (arrays[n + 1],)) for n, name in enumerate(names)]
    return Graph(dict.fromkeys(arrays, Spec((size,), dtype)), ops, evaluations or [Evaluation(tuple(wanted))])


# The rules ------------------------------------------------------------------------------------------------------------


def test_an_input_nobody_else_needs_gives_its_memory_to_the_result():
    size = 4 * PAGE
    result = replay(chain(["Exp", "Exp"], size, ["2"]), Machine())
    assert result.kernels == {"elementwise": 2}
    assert result.bytes == {"elementwise": 4 * 4 * size}
    assert result.peak == 4 * size
    assert replay(chain(["Exp", "Exp"], size, ["1", "2"]), Machine()).peak == 2 * 4 * size


def test_what_python_holds_is_not_given_away():
    size = 4 * PAGE
    for held, arrays in ((frozenset(), 1), (frozenset(["1"]), 2)):
        evaluations = [Evaluation(("1",)), Evaluation(("2",), held=held)]
        assert replay(chain(["Exp", "Exp"], size, [], evaluations=evaluations), Machine()).peak == arrays * 4 * size


def test_a_cast_reads_one_dtype_and_writes_the_other():
    graph = Graph(
        {"x": Spec((PAGE,), mx.bfloat16), "y": Spec((PAGE,), mx.float32)},
        [Op("AsType", ("x",), ("y",))],
        [Evaluation(("y",))],
    )
    result = replay(graph, Machine(bandwidth=1e9))
    assert result.bytes == {"cast": 6 * PAGE}
    assert result.peak == result.fresh == 4 * PAGE
    assert result.seconds == pytest.approx(6 * PAGE / 0.8e9 + 4e-6)


def test_two_arrays_are_joined_by_two_copies():
    specs = {"x": Spec((3, 8), mx.float32), "y": Spec((5, 8), mx.float32), "z": Spec((8, 8), mx.float32)}
    result = replay(Graph(specs, [Op("Concatenate", ("x", "y"), ("z",))], [Evaluation(("z",))]), Machine())
    assert result.kernels == {"copy": 2}
    assert result.bytes == {"copy": 2 * 8 * 8 * 4}


def test_a_broadcast_counts_the_bytes_that_are_there():
    specs = {"x": Spec((8, 512), mx.float32), "b": Spec((512,), mx.float32)} | dict.fromkeys(
        "wy", Spec((8, 512), mx.float32)
    )
    ops = [Op("Broadcast", ("b",), ("w",)), Op("Add", ("x", "w"), ("y",))]
    assert replay(Graph(specs, ops, [Evaluation(("y",))]), Machine()).bytes == {"elementwise": 4 * (8 + 1 + 8) * 512}


@pytest.mark.parametrize(
    ("limit", "held", "fresh", "peak"), [(64 * GIB, "", 1, 1), (0, "", 2, 1), (64 * GIB, "y", 2, 2)]
)
def test_a_buffer_comes_out_of_the_cache_if_it_is_free_and_was_kept(limit, held, fresh, peak):
    size = 4 * PAGE
    specs = dict.fromkeys("xyz", Spec((size,), mx.float32))
    ops = [Op("Exp", ("x",), ("y",)), Op("Sin", ("x",), ("z",))]
    graph = Graph(specs, ops, [Evaluation(("y",)), Evaluation(("z",), held=frozenset(held))])
    result = replay(graph, Machine(cache_limit=limit))
    assert result.fresh_after == [4 * size, fresh * 4 * size]
    assert result.peak == peak * 4 * size


def test_memory_that_another_view_shows_is_not_given_away():
    size = 4 * PAGE
    specs = dict.fromkeys("xyvwz", Spec((size,), mx.float32)) | {"v": Spec((4, PAGE), mx.float32)}
    specs["w"] = specs["v"]
    ops = [
        Op("Exp", ("x",), ("y",)),
        Op("Reshape", ("y",), ("v",)),
        Op("Exp", ("v",), ("w",)),
        Op("Exp", ("y",), ("z",)),
    ]
    assert replay(Graph(specs, ops, [Evaluation(("w", "z"))]), Machine()).peak == 2 * 4 * size


def test_eleven_command_buffers_keep_what_they_touch():
    """Each of these casts is a command buffer, which keeps its input and its result: twelve in a row of eleven."""
    size = 41 * MI
    graph = chain(["AsType"] * 30, size, ["30"], mx.bfloat16)
    result = replay(graph, Machine())
    assert result.commands == 30
    assert result.peak == 12 * 2 * size


def test_beyond_the_memory_limit_mlx_waits():
    size = 41 * MI
    graph = chain(["AsType"] * 30, size, ["30"], mx.bfloat16)
    assert replay(graph, Machine(memory_limit=5 * 2 * size)).peak == 6 * 2 * size


def test_a_command_buffer_ends_after_more_than_forty_kernels():
    assert replay(chain(["AsType"] * 82, 8, ["82"]), Machine()).commands == 2
    assert replay(chain(["AsType"] * 83, 8, ["83"]), Machine()).commands == 3


def test_nothing_runs_twice_and_only_what_is_asked_for():
    makers = {
        name: Op("Add", tuple(inputs), (name,)) for name, inputs in [("a", "x"), ("b", "a"), ("c", "ab"), ("d", "c")]
    }
    assert [op.outputs[0] for op in evaluation_order(makers, ["c"])] == ["a", "b", "c"]
    assert [op.outputs[0] for op in evaluation_order(makers, ["c", "b"], ["a"])] == ["b", "c"]


def test_a_reshape_copies_only_what_does_not_lie_so():
    def lying(shape, strides=None):
        return View(shape, strides or row_strides(shape), 4, Buffer(0))

    assert reshaped(lying((2, 3, 4)), (6, 4)) == (4, 1)
    assert reshaped(lying((2, 3, 4)), (2, 3, 2, 2)) == (12, 4, 2, 1)
    assert reshaped(lying((4, 3), (1, 4)), (12,)) is None
    assert reshaped(lying((2, 6, 4), (48, 4, 1)), (2, 24)) == (48, 1)
    assert reshaped(lying((4, 6, 4), (48, 4, 1)), (24, 4)) is None
    assert reshaped(lying((3, 5), (0, 0)), (15,)) == (0,)


# Tracing --------------------------------------------------------------------------------------------------------------


def test_a_trace_tells_when_what_is_evaluated_and_held():
    before = mx.eval, mx.fast.rms_norm

    def steps(x):
        a = x + 1
        mx.eval(a)
        b = mx.fast.rms_norm(a, None, 1e-6)
        mx.async_eval(b)
        del a
        c = b * 2
        mx.eval(c)
        return c

    graph = trace(steps, blank((8, 64), mx.float32))
    first, second, third, last = graph.evaluations
    assert [e.wait for e in graph.evaluations] == [True, False, True, True]
    assert (second.held, third.held) == ({*first.arrays}, {*second.arrays})
    assert last.arrays == third.arrays
    assert [op.mark.name for op in graph.ops if op.mark] == ["rms_norm"]
    assert (mx.eval, mx.fast.rms_norm) == before


def test_mlx_says_how_many_kernels_a_compiled_function_is():
    """The transformer's GELU was three, because of an option that forbids none."""

    def formula(x):
        wide = x.astype(mx.float32)
        z = 0.8 * (wide + 0.045 * wide * wide * wide)
        return (wide / (1 + mx.exp(mx.minimum(-2 * z, 80)))).astype(x.dtype)

    x = blank((1, 64, 128), mx.bfloat16)
    assert kernels_of(mx.compile(formula), x) == ("elementwise",)
    assert kernels_of(mx.compile(formula, shapeless=True), x) == ("cast", "elementwise", "elementwise")
    assert kernels_of(mx.compile(lambda x: mx.concatenate([x, x, x])), x) == ("copy",) * 3
    assert kernels_of(mx.compile(lambda x: x.reshape(64, -1).T), x) == ()


def test_an_unfused_function_of_ours_shows_in_the_model(monkeypatch):
    counted = sum(replay(work.block(64, 16), Machine()).kernels.values())
    slow = mx.compile(lambda *terms: mx.softmax(terms[0], axis=-1) * 2 + 1)
    monkeypatch.setattr(transformer, "gelu_tanh", slow)
    assert sum(replay(work.block(64, 16), Machine()).kernels.values()) > counted


# Our own work, at real size, without an evaluation --------------------------------------------------------------------


def others(amounts):
    """What products and attention are beside."""
    return sum(amount for kind, amount in amounts.items() if kind not in ("product", "attention"))


def test_a_block_runs_few_kernels_beside_its_products_and_attention():
    result = replay(work.block(4096, 200), Machine())
    assert (result.kernels["product"], result.kernels["attention"]) == (12, 1)
    assert others(result.kernels) <= 22
    assert others(result.bytes) <= 0.86e9


def test_an_edit_s_block_runs_few_kernels_beside_its_products_and_attention():
    """Attention is three kernels, as one would hold the GPU too long; their parts are joined."""
    result = replay(work.block(4096, 1400, 4096), Machine())
    assert (result.kernels["product"], result.kernels["attention"]) == (18, 3)
    assert others(result.kernels) <= 35
    assert others(result.bytes) <= 2.03e9


@pytest.mark.parametrize("references", [0, 4096])
def test_no_array_of_a_block_is_wider_than_the_model(references):
    graph = work.block(4096, 200, references)
    made = [name for op in graph.ops if op.name not in VIEWS for name in op.outputs]  # tables of angles are fp32
    assert {graph.specs[name].dtype for name in made} == {mx.bfloat16}


def test_a_resident_pass_has_no_dependencies_of_its_own():
    assert "Depends" not in {op.name for op in work.forward(1024, [200, 20]).ops}


def test_layers_of_the_encoders_run_few_kernels():
    text = replay(work.language_layer(300), Machine())
    assert (text.kernels["product"], text.kernels["attention"], others(text.kernels)) == (7, 1, 8)
    for windowed, kernels in ((False, 8), (True, 12)):
        seen = replay(work.vision_block(74, 74, windowed), Machine())
        assert (seen.kernels["product"], seen.kernels["attention"]) == (5, 1)
        assert others(seen.kernels) <= kernels


@pytest.mark.parametrize(
    ("image", "texts", "references", "peak", "cache"),
    [(1024, (200, 20), 0, 0.32, 0.5), (4096, (200, 20), 0, 0.78, 0.5), (4096, (1400, 1340), 4096, 1.19, 1.25)],
)
def test_a_step_takes_little_memory_and_reuses_it(image, texts, references, peak, cache):
    result = replay(work.forward(image, texts, references, blocks=8), Machine(cache_limit=cache * GIB))
    assert result.peak <= peak * 1e9
    assert result.fresh_after[11] == result.fresh_after[5]  # blocks 5 to 7: each an evaluation and a wait


@pytest.mark.parametrize(("image", "text", "references"), [(6889, 200, 0), (4096, 820, 12288), (16384, 200, 0)])
def test_no_kernel_holds_the_gpu_for_seconds(image, text, references):
    """On the slowest chip; attention of all queries at once would take 0.34, 1.9 and 1.9 s, and 29 at 4096x4096."""
    seconds, kind = replay(work.block(image, text, references), Machine("M1, 8 cores", 68e9, 2.6e12)).longest
    assert kind in ("attention", "product")
    assert seconds <= 0.7


@pytest.mark.slow
def test_the_autoencoder_takes_what_it_took():
    """1.41 GB to decode 1024x1024, because few bands are under way at once: 2.6 if all were."""
    for limit in (None, 1.5e9):
        assert replay(work.decode(1024, 1024), Machine(memory_limit=limit)).peak <= 1.5e9
    assert replay(work.encode(1024, 1024), Machine()).peak <= 2.7e9
