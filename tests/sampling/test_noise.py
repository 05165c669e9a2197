"""Initial noise: torch's own from the same seed, without torch; MLX's from a key, never from global state."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_image_mlx.pipeline.parameters import RNGS
from qwen_image_mlx.sampling.noise import generator

SEEDS = [0, 42, 2**32 - 1, 2**32 + 5, 2**63, 2**64 - 1]
SHAPES = [(16,), (17,), (31,), (33,), (100,), (3, 5, 7), (1, 16, 2, 2), (1, 16, 10, 14), (1, 16, 128, 166)]
TOLERANCE = 1e-6


def torch_generator(seed: int):
    import torch

    return torch.Generator("cpu").manual_seed(seed)


def assert_near(ours: mx.array, theirs) -> None:
    assert ours.dtype == mx.float32
    assert ours.shape == tuple(theirs.shape)
    assert np.abs(np.array(ours) - theirs.numpy()).max() <= TOLERANCE


@pytest.mark.reference
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_noise_is_torch_s(seed, shape):
    import torch

    assert_near(generator("torch", seed).normal(shape), torch.randn(shape, generator=torch_generator(seed)))


@pytest.mark.reference
@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 2**64 - 1), counts=st.lists(st.integers(16, 300), min_size=1, max_size=5))
def test_consecutive_draws_continue_torch_s_stream(seed, counts):
    import torch

    ours, theirs = generator("torch", seed), torch_generator(seed)
    for count in counts:
        assert_near(ours.normal((count,)), torch.randn(count, generator=theirs))


@pytest.mark.reference
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("count", [1, 2, 5])
def test_images_drawn_one_by_one_are_those_of_a_batch(seed, count):
    import torch

    batch = torch.randn((count, 1, 16, 10, 14), generator=torch_generator(seed))
    ours = generator("torch", seed)
    for index in range(count):
        assert_near(ours.normal((1, 16, 10, 14)), batch[index])


@pytest.mark.reference
def test_noise_in_bfloat16_is_the_rounded_noise_of_float32():
    import torch

    theirs = torch.randn((1, 16, 64, 64), generator=torch_generator(7), dtype=torch.bfloat16).float().numpy()
    ours = np.array(generator("torch", 7).normal((1, 16, 64, 64)).astype(mx.bfloat16).astype(mx.float32))
    # An error below 1e-6 may turn one rounding in thousands; its size is then one unit of bfloat16.
    assert (ours != theirs).mean() < 1e-3
    np.testing.assert_allclose(ours, theirs, rtol=2**-7)


@pytest.mark.parametrize("rng", RNGS)
@pytest.mark.parametrize("shape", [(1, 16, 32, 32), (5, 7)])
def test_the_same_seed_gives_the_same_draws(rng, shape):
    first, second = (generator(rng, 3) for _ in range(2))
    for _ in range(3):
        assert mx.array_equal(first.normal(shape), second.normal(shape))


@pytest.mark.parametrize("rng", RNGS)
def test_seeds_and_draws_differ(rng):
    # All below 2**32: torch's generator looks at no more bits.
    noises = {f"seed {seed}": generator(rng, seed).normal((256,)) for seed in (0, 1, 2, 42, 2**32 - 1)}
    stream = generator(rng, 5)
    noises |= {f"draw {n}": stream.normal((256,)) for n in range(4)}
    flat = np.stack([np.array(noise) for noise in noises.values()])
    assert np.abs(np.corrcoef(flat) - np.eye(len(flat))).max() < 0.3


def test_mlx_noise_tells_high_bits_of_a_seed_apart():
    assert not mx.array_equal(generator("mlx", 5).normal((64,)), generator("mlx", 2**32 + 5).normal((64,)))


@pytest.mark.parametrize("rng", RNGS)
@pytest.mark.parametrize("seed", [0, 2**64 - 1])
def test_noise_is_standard_normal(rng, seed):
    noise = np.array(generator(rng, seed).normal((1, 16, 128, 128)))
    assert noise.dtype == np.float32
    assert abs(noise.mean()) < 0.01
    assert abs(noise.std() - 1) < 0.01
    assert abs((np.abs(noise) < 1).mean() - math.erf(1 / math.sqrt(2))) < 0.01


@pytest.mark.parametrize("rng", RNGS)
def test_global_random_state_is_neither_read_nor_changed(rng):
    def draw(seed: int) -> mx.array:
        mx.random.seed(seed)
        np.random.seed(seed)
        before = mx.random.state[0].tolist(), np.random.get_state()[1].tolist()
        noise = generator(rng, 1).normal((64,))
        mx.eval(noise)
        assert (mx.random.state[0].tolist(), np.random.get_state()[1].tolist()) == before
        return noise

    assert mx.array_equal(draw(1), draw(2))


def test_too_few_values_are_an_assertion_not_other_noise():
    """Below 16 values torch draws in another way, which no image ever needs."""
    with pytest.raises(AssertionError):
        generator("torch", 0).normal((15,))
