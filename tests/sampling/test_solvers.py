"""Solvers on a flow whose solution is known: their order, their evaluations, and what they remember."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from qwen_image_mlx.sampling.denoise import denoise
from qwen_image_mlx.sampling.schedule import Schedule
from qwen_image_mlx.sampling.solvers import SOLVERS

MEAN, SPREAD = 0.7, 0.4  # of images drawn from a normal distribution, whose flow has a closed form
NOISE = mx.array(np.linspace(-2, 2, 16, dtype=np.float32).reshape(1, 4, 4))
BEGIN, END = 0.95, 0.1


def spread_at(sigma: float) -> float:
    return float(np.sqrt(((1 - sigma) * SPREAD) ** 2 + sigma**2))


def exact(noise: mx.array, sigma: float) -> np.ndarray:
    """Where a point is at a noise level: it keeps its place in the distribution."""
    return (1 - sigma) * MEAN + spread_at(sigma) * np.array(noise)


def velocity(latents: mx.array, sigma: float) -> mx.array:
    """E[noise - image] at a point."""
    alpha = 1 - sigma
    image = MEAN + SPREAD**2 * alpha / spread_at(sigma) ** 2 * (latents - alpha * MEAN)
    return (latents - image) / sigma


def error(name: str, steps: int) -> float:
    """The largest distance from the solution at the end of a schedule that stops before the image."""
    solver = SOLVERS[name]
    schedule = Schedule(np.linspace(BEGIN, END, steps + 1, dtype=np.float32))
    levels = schedule.sigmas.repeat(2)[1:-1] if name == "heun" else schedule.sigmas  # it ends before the image
    result = denoise(
        lambda x, n, _: [velocity(x, float(levels[n]))], mx.array(exact(NOISE, BEGIN)), schedule, None, solver=solver
    )
    return float(np.abs(np.array(result) - exact(NOISE, END)).max())


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("heun", 2), ("unipc", 2), ("dpmpp-2m", 2), ("res-2m", 2)])
def test_the_order_of_convergence(name, order):
    """Twice the steps, a 2**order-th of the error; UniPC's corrector makes it more than its order."""
    measured = np.log2(error(name, 20) / error(name, 40))
    assert order - 0.25 < measured < order + (1.3 if name == "unipc" else 0.35)


@pytest.mark.parametrize("name", ["heun", "unipc", "dpmpp-2m", "res-2m"])
def test_each_is_nearer_than_euler(name):
    assert error(name, 20) < error("euler", 20) / 3


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("steps", [1, 2, 3, 14, 15, 16])
def test_they_evaluate_where_they_say(name, steps):
    schedule, asked = Schedule(np.linspace(1, 0, steps + 1, dtype=np.float32)), []

    def velocities(latents, evaluation, _):
        asked.append(evaluation)
        return [0.1 * latents]

    result = denoise(velocities, NOISE, schedule, None, solver=SOLVERS[name])
    assert asked == [*range(SOLVERS[name].count(steps))]
    assert SOLVERS[name].evaluations(schedule).shape == (len(asked),)
    assert SOLVERS[name].evaluations(schedule).dtype == np.float32
    assert np.isfinite(np.array(result)).all()


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_an_image_leaves_nothing_to_the_next(name, dtype):
    """One solver makes two images, and each is what it is alone; they stay in their dtype."""
    schedule = Schedule(np.linspace(1, 0, 6, dtype=np.float32))

    def run(noise):
        return denoise(lambda x, n, _: [(x * (0.5 + 0.1 * n)).astype(dtype)], noise, schedule, None,
                       solver=SOLVERS[name], noise=lambda: 0.3 * NOISE)  # fmt: skip

    first = run(NOISE.astype(dtype))
    run((5 * NOISE).astype(dtype))
    again = run(NOISE.astype(dtype))
    assert first.dtype == dtype
    assert mx.array_equal(first, again)


@pytest.mark.parametrize("name", ["euler", "heun", "unipc", "dpmpp-2m", "res-2m"])
def test_a_straight_path_arrives(name):
    image = 0.3 - 0.5 * NOISE
    schedule = Schedule(np.array([1, 0.8, 0.4, 0.1, 0], np.float32))
    result = denoise(lambda *_: [NOISE - image], NOISE, schedule, None, solver=SOLVERS[name])
    np.testing.assert_allclose(np.array(result), np.array(image), atol=2e-5)


def test_whole_timesteps_are_rounded_down():
    exact_levels = np.array([1.0, 0.5037, 0.0199999, 0])
    schedule = Schedule(exact_levels.astype(np.float32), exact_levels)
    np.testing.assert_array_equal(SOLVERS["unipc"].evaluations(schedule), np.array([0.999, 0.503, 0.019], np.float32))
