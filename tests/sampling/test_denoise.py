"""The loop: the reference's arithmetic in the reference's dtypes, and its promises to who drives it."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
import torch
from checkpoints import REAL_CONFIGS
from diffusers import FlowMatchEulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import to_numpy

from qwen_image_mlx.sampling.denoise import denoise
from qwen_image_mlx.sampling.guidance import Guidance, guide
from qwen_image_mlx.sampling.schedule import Schedule
from qwen_image_mlx.sampling.solvers import EULER, Solver, Step, euler_step

pytestmark = pytest.mark.reference

DTYPES = {"bfloat16": mx.bfloat16, "float16": mx.float16, "float32": mx.float32}
SHAPE = (2, 40, 64)
SIGMAS = np.array([1, 0.7667093, 0.4556137, 0.02, 0], np.float32)


def random_pair(seed: int, dtype: str, shape: tuple[int, ...] = SHAPE) -> tuple[mx.array, torch.Tensor]:
    """The same values in both libraries."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(getattr(torch, dtype))
    return mx.array(to_numpy(values)).astype(DTYPES[dtype]), values


def assert_same(ours: mx.array, theirs: torch.Tensor, tolerance: float) -> None:
    """Equal dtype; equal bits unless a tolerance, relative to the largest value, is given."""
    assert str(ours.dtype).rpartition(".")[2] == str(theirs.dtype).rpartition(".")[2]
    ours, theirs = np.array(ours.astype(mx.float32)), to_numpy(theirs)
    assert np.isfinite(theirs).all()
    assert np.abs(ours - theirs).max() <= tolerance * np.abs(theirs).max()


def reference_guide(positive: torch.Tensor, negative: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(combined, renormalised), line by line from the loop of QwenImagePipeline.__call__."""
    comb_pred = negative + scale * (positive - negative)
    cond_norm = torch.norm(positive, dim=-1, keepdim=True)
    noise_norm = torch.norm(comb_pred, dim=-1, keepdim=True)
    return comb_pred, comb_pred * (cond_norm / noise_norm)


# --- arithmetic ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.3, 3.7, 2.5, 4.0, 30.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_guidance_is_the_reference_s(dtype, scale):
    (positive, theirs_p), (negative, theirs_n) = random_pair(0, dtype), random_pair(1, dtype)
    combined, renormalised = reference_guide(theirs_p, theirs_n, scale)
    assert_same(guide(positive, negative, Guidance(scale, renormalize=False)), combined, tolerance=0)
    # In fp32 the two libraries add up the 64 squares of a norm in another order.
    tolerance = 1e-6 if dtype == "float32" else 0
    assert_same(guide(positive, negative, Guidance(scale, renormalize=True)), renormalised, tolerance)


def test_renormalised_tokens_keep_the_length_of_the_positive_velocity():
    (positive, _), (negative, _) = random_pair(2, "float32"), random_pair(3, "float32")
    out = guide(positive, negative, Guidance(6.0, renormalize=True))
    lengths = [np.linalg.norm(np.array(x), axis=-1) for x in (out, positive)]
    np.testing.assert_allclose(*lengths, rtol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_euler_step_is_the_scheduler_s(dtype):
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(REAL_CONFIGS["scheduler"])
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 7, 7), mu=0.69)
    schedule = Schedule(scheduler.sigmas.numpy())
    ours, theirs = random_pair(0, dtype)
    for step, time in enumerate(scheduler.timesteps):
        velocity, their_velocity = random_pair(step + 1, dtype)
        ours = euler_step(ours, velocity, schedule.dt(step))
        theirs = scheduler.step(their_velocity, time, theirs, return_dict=False)[0]
        assert_same(ours, theirs, tolerance=0)


# --- the loop ------------------------------------------------------------------------------------------------------


class Model:
    """Velocities that depend on everything they are given; counts how often."""

    def __init__(self) -> None:
        self.calls: list[int] = []
        self.dtypes: set[mx.Dtype] = set()

    def __call__(self, latents: mx.array, step: int, branches: int) -> list[mx.array]:
        self.calls.append(step)
        self.dtypes.add(latents.dtype)
        return [(latents * (0.3 - 0.2 * n) + 0.1 * step).astype(latents.dtype) for n in range(branches)]


def run(guidance: Guidance | None = None, dtype: str = "float32", **options) -> tuple[Model, mx.array]:
    model = Model()
    latents, _ = random_pair(0, dtype)
    return model, denoise(model, latents, Schedule(SIGMAS), guidance, **options)


@pytest.mark.parametrize("guidance", [None, Guidance(3.0, True)])
def test_one_call_per_step(guidance):
    assert run(guidance)[0].calls == [0, 1, 2, 3]


@pytest.mark.parametrize("guidance", [None, Guidance(3.0, True), Guidance(3.0, False)])
def test_the_loop_is_the_reference_s(guidance):
    _, theirs = random_pair(0, "float32")
    for step in range(4):
        branches = [theirs * (0.3 - 0.2 * branch) + 0.1 * step for branch in (0, 1)]
        velocity = branches[0]
        if guidance is not None:
            velocity = reference_guide(*branches, guidance.scale)[guidance.renormalize]
        theirs = theirs + (SIGMAS[step + 1] - SIGMAS[step]).item() * velocity
    assert_same(run(guidance)[1], theirs, tolerance=2e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("guidance", [None, Guidance(4.0, True), Guidance(4.0, False)])
def test_latents_stay_in_their_dtype(dtype, guidance):
    seen = set()
    model, result = run(guidance, dtype, on_step=lambda _, step: seen.add(step.latents.dtype))
    assert model.dtypes | seen | {result.dtype} == {DTYPES[dtype]}


def test_the_callback_is_told_of_every_step_and_may_read_its_latents():
    done = []
    model, result = run(None, on_step=lambda count, step: done.append((count, np.array(step.latents))))
    assert [step for step, _ in done] == [1, 2, 3, 4]
    assert len(model.calls) == 4
    np.testing.assert_array_equal(done[-1][1], np.array(result))


def test_the_next_step_is_built_while_the_last_one_runs(monkeypatch):
    """Nothing waits between two steps; the result is waited for, with its errors, before anybody is told of it."""
    order = []
    monkeypatch.setattr(mx, "async_eval", lambda latents: order.append("queue"))
    monkeypatch.setattr(mx, "eval", lambda *arrays: order.append("eval"))
    monkeypatch.setattr(mx, "synchronize", lambda: order.append("synchronize"))
    model = Model()

    def velocities(latents, step, branches):
        order.append(f"build {step}")
        return model(latents, step, branches)

    latents, _ = random_pair(0, "float32")
    denoise(velocities, latents, Schedule(SIGMAS), None, on_step=lambda step, _: order.append(f"told {step}"))
    steps = [word for n in range(3) for word in (f"build {n}", "queue", f"told {n + 1}")]
    assert order == [*steps, "build 3", "eval", "synchronize", "told 4"]


def test_each_step_is_the_model_then_the_blend_then_the_callback():
    events = []

    def velocity(latents: mx.array, step: int, _branches: int) -> list[mx.array]:
        events.append(("model", step))
        return [latents]

    denoise(
        velocity,
        mx.ones(SHAPE),
        Schedule(SIGMAS),
        None,
        lambda step, _: events.append(("callback", step)),
        lambda step, latents: events.append(("blend", step)) or latents,
    )
    expected = [[("model", n), ("blend", n + 1), ("blend", 4), ("callback", n + 1)] for n in range(4)]
    assert events == [event for step in expected for event in step]


def test_an_exception_of_the_callback_stops_the_loop():
    class Stop(Exception):
        pass

    model = Model()

    def stop(count: int, _step: Step) -> None:
        if count == 2:
            raise Stop

    with pytest.raises(Stop):
        denoise(model, mx.ones(SHAPE), Schedule(SIGMAS), None, stop)
    assert len(model.calls) == 2


def test_blending_replaces_the_latents_of_every_step():
    seen = []
    model, result = run(
        None,
        on_step=lambda count, step: seen.append((count, step.latents)),
        blend=lambda step, latents: mx.full(latents.shape, float(step)),
    )
    assert [np.unique(np.array(latents)).tolist() for _, latents in seen] == [[1.0], [2.0], [3.0], [4.0]]
    assert mx.array_equal(result, mx.full(SHAPE, 4.0))
    assert len(model.calls) == 4


def test_a_step_says_where_it_points():
    """On a straight path that is the image, from the first step on; in fp32 whatever the latents are."""
    (noise, _), (image, _) = random_pair(0, "float32"), random_pair(1, "float32")
    found = []
    denoise(
        lambda *_: [(noise - image).astype(mx.bfloat16)], noise.astype(mx.bfloat16), Schedule(SIGMAS), None,
        lambda _, step: found.append(step.denoised),
    )  # fmt: skip
    assert {array.dtype for array in found} == {mx.float32}
    assert max(float(mx.abs(array - image).max()) for array in found) < 0.05


def test_another_solver_says_first_where_it_evaluates():
    """Heun's method, as a solver of two evaluations a step: it meets the loop's promises and no more of its names."""

    def evaluations(schedule):
        return np.repeat(schedule.sigmas, 2)[1:-1]

    def heun(schedule, noise):
        def take_step(evaluate, latents, step):
            first = evaluate(latents, 2 * step)
            there = euler_step(latents, first, schedule.dt(step))
            mean = (first + evaluate(there, 2 * step + 1)) / 2
            return Step(euler_step(latents, mean, schedule.dt(step)), latents - float(schedule.sigmas[step]) * mean)

        return take_step

    schedule, solver = Schedule(SIGMAS), Solver(evaluations, heun, lambda steps: 2 * steps)
    asked = []

    def velocities(latents, evaluation, branches):
        asked.append(evaluation)
        return [latents * float(solver.evaluations(schedule)[evaluation])]

    latents, exact = mx.ones(SHAPE), np.exp(-0.5)  # dx/ds = s x, from s = 1 to 0
    result = denoise(velocities, latents, schedule, None, solver=solver)
    assert asked == [*range(8)] == [*range(solver.count(4))]
    euler = denoise(lambda x, n, _: [x * float(SIGMAS[n])], latents, schedule, None)
    assert abs(float(result[0, 0, 0]) - exact) < 0.2 * abs(float(euler[0, 0, 0]) - exact)
    assert EULER.evaluations(schedule).tolist() == SIGMAS[:-1].tolist()


@settings(deadline=None)
@given(levels=st.sets(st.integers(1, 999), max_size=8))
def test_a_straight_path_arrives_whatever_the_steps(levels):
    """Where the velocity is noise minus image, any number of Euler steps from sigma 1 ends at the image."""
    sigmas = np.array([1, *(level / 1000 for level in sorted(levels, reverse=True)), 0], np.float32)
    (noise, _), (image, _) = random_pair(0, "float32", (1, 4, 64)), random_pair(1, "float32", (1, 4, 64))
    result = denoise(lambda *_: [noise - image], noise, Schedule(sigmas), None)
    np.testing.assert_allclose(np.array(result), np.array(image), atol=1e-5)
