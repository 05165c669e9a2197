"""The table of operations: every row is right, and every row sees when it is not."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from qwen_image_mlx.doctor import kinds, measure, probe
from qwen_image_mlx.doctor.kinds import OPERATIONS
from qwen_image_mlx.doctor.outcome import FALSIFY
from qwen_image_mlx.doctor.probe import error_of
from qwen_image_mlx.doctor.values import array, uniform
from qwen_image_mlx.weights import quantize

every_operation = pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)


def test_names_are_unique():
    assert len({operation.name for operation in OPERATIONS}) == len(OPERATIONS)


@every_operation
def test_operations_are_right_and_one_percent_is_seen(operation, monkeypatch):
    assert error_of(operation, large=False) <= operation.allowed
    monkeypatch.setenv(FALSIFY, operation.name)
    assert error_of(operation, large=False) > operation.allowed


def test_a_quantizer_that_compiling_changes_is_odd(monkeypatch):
    """Of a rounding's size: one element that another level is nearest to."""
    monkeypatch.setattr(probe, "OPERATIONS", OPERATIONS[:1])
    outcome = probe.run({})
    assert (outcome.figures["quantizer_changed_ratio"], outcome.findings) == (0, [])

    def fused(function):
        def other(*inputs):
            made = function(*inputs)
            return made.at[3, 1].add(1) if function is quantize._pack else made

        return other

    monkeypatch.setattr(quantize, "fused", fused)
    outcome = probe.run({})
    assert [found.verdict for found in outcome.findings] == ["odd"]
    assert 0 < outcome.figures["quantizer_changed_ratio"] < 1e-3
    assert quantize.fused is fused


def test_compiling_does_not_change_the_quantizer(monkeypatch):
    monkeypatch.setattr(quantize, "fused", quantize._compile)
    assert probe.changed_by_compiling((64, 768)) == 0


@pytest.mark.metal
@every_operation
def test_operations_are_right_at_real_shapes_on_the_gpu(operation):
    assert measure.on_metal()
    assert error_of(operation, large=True) <= operation.allowed


def test_garbage_in_a_row_that_is_not_picked_is_seen():
    """One wrong row of 4096 is in the sum of all rows."""
    x, w = (array(name, (512, 64), mx.float32) for name in "xw")
    y = measure.numbers(x @ w.T)
    assert 1 not in kinds.spread(512, 64)
    y[1] = 1e3
    rows, total = kinds.product(x, w, mx.array(y))
    assert measure.relative_error(*rows) < 1e-6
    assert measure.relative_error(*total) > 1e-1


def test_what_is_not_a_number_is_garbage():
    assert measure.relative_error(np.array([np.nan, 1]), np.ones(2)) == measure.GARBAGE
    assert measure.relative_error(np.array([np.inf, 1]), np.ones(2)) == measure.GARBAGE


@pytest.mark.parametrize(("size", "scale"), [(1, 1.0), (100_000, 0.25)])
def test_hashed_values(size, scale):
    values = uniform("a name", (size,), scale)
    assert np.array_equal(values[:1], uniform("a name", (1,), scale))
    assert not np.array_equal(values, uniform("another", (size,), scale))
    assert np.abs(values).max() <= scale * 3**0.5
    if size > 1:
        assert np.isclose(values.std(), scale, rtol=0.01)
        assert abs(values.mean()) < 0.01 * scale
        assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.01


def test_hashed_values_are_these():
    """The same on every machine: the stored values depend on it."""
    bits = uniform("x", (70_000,)).view(np.uint32)[[0, 1, 2, 65_536, 69_999]]
    assert bits.tolist() == [1060059853, 1057810789, 1070835503, 1059891311, 3187955364]
