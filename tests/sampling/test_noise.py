"""Noise from seeds: PyTorch's on the CPU without PyTorch, and MLX's own."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_image_mlx.sampling.noise import MLXGenerator, TorchGenerator, generator


def torch_normal(seed, *shapes):
    stream = torch.Generator("cpu").manual_seed(seed)
    return [torch.randn(shape, generator=stream).numpy() for shape in shapes]


@pytest.mark.parametrize("shape", [(16,), (17,), (31,), (32,), (1000,), (3, 5, 7), (1, 1, 16, 12, 10)], ids=str)
@pytest.mark.parametrize("seed", [0, 42, 2**32 - 1, 2**32 + 5, 2**63])
def test_values_are_torch_s(shape, seed):
    (expected,) = torch_normal(seed, shape)
    np.testing.assert_allclose(np.array(TorchGenerator(seed).normal(shape)), expected, atol=1e-6)


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 2**64 - 1), counts=st.lists(st.integers(16, 200), min_size=1, max_size=4))
def test_draws_continue_the_stream(seed, counts):
    stream = TorchGenerator(seed)
    for count, expected in zip(counts, torch_normal(seed, *[(n,) for n in counts]), strict=True):
        np.testing.assert_allclose(np.array(stream.normal((count,))), expected, atol=1e-6)


def test_single_draws_are_the_pieces_of_a_batch():
    (batch,) = torch_normal(7, (3, 1, 16, 8, 6))
    stream = TorchGenerator(7)
    for n in range(3):
        np.testing.assert_allclose(np.array(stream.normal((1, 16, 8, 6))), batch[n], atol=1e-6)


def test_mlx_noise_depends_on_seed_and_draw_alone():
    mx.random.seed(5)
    expected = mx.random.normal((3,))
    mx.random.seed(5)
    stream, again = MLXGenerator(1), generator("mlx", 1)
    first, second = stream.normal((4, 4)), stream.normal((4, 4))
    assert mx.array_equal(first, again.normal((4, 4)))
    assert not mx.array_equal(first, second)
    assert not mx.array_equal(first, MLXGenerator(2).normal((4, 4)))
    assert mx.array_equal(mx.random.normal((3,)), expected), "the application's stream is left alone"
