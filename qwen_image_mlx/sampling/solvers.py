"""Solvers: how the velocities of a schedule's steps move the latents from noise to an image.

A solver declares the noise levels at which it evaluates the velocity before the first step, because models make tables
for them. It is independent of model and guidance: `evaluate` returns the guided velocity.

Levels: sigma is the noise's share and alpha = 1 - sigma the image's; the image that a velocity v points to is
m = x - sigma v; and the logarithmic ratio is lam = log(alpha / sigma). All sums are in fp32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from ..names import SolverName
from .schedule import Schedule

# (latents (B, N, C), index of the evaluation) -> velocity (B, N, C).
Evaluate = Callable[[mx.array, int], mx.array]
# Fresh noise (B, N, C), fp32, of the image's own generator.
Noise = Callable[[], mx.array]

_NEARLY_ONE = 1e-6  # off a level of 1, where alpha's logarithm would be infinite; as the reference's UniPC
_TRAINED_STEPS = 1000  # timesteps between sigma 0 and 1
_FEW = 15  # below this number of steps DPM++ ends with a step of first order


class Step(NamedTuple):
    """The result of a step.

    Attributes:
        latents: (B, N, C) at the schedule's noise level after the step.
        denoised: the clean latents (B, N, C) that it points to, fp32.
    """

    latents: mx.array
    denoised: mx.array


# (evaluate, latents (B, N, C), number of the step) -> `Step`; called for each step in order.
TakeStep = Callable[[Evaluate, mx.array, int], Step]


class Solver(NamedTuple):
    """One way to solve the flow.

    Attributes:
        evaluations: a schedule -> the noise levels of the velocity's evaluations, float32 (evaluations,), in order.
        begin: (schedule, noise) -> the steps of one image; what a step remembers of earlier ones is kept there alone.
        count: number of steps -> number of evaluations.
    """

    evaluations: Callable[[Schedule], np.ndarray]
    begin: Callable[[Schedule, Noise], TakeStep]
    count: Callable[[int], int] = lambda steps: steps


def euler_step(latents: mx.array, velocity: mx.array, dt: float) -> mx.array:
    """latents + dt * velocity (B, N, C): product and result in the velocity's dtype, the sum in fp32."""
    change = mx.array(dt, dtype=velocity.dtype) * velocity
    return (latents.astype(mx.float32) + change).astype(velocity.dtype)


def _predict_clean(latents: mx.array, velocity: mx.array, sigma: float) -> mx.array:
    """The clean latents that a velocity points to, fp32."""
    return latents.astype(mx.float32) - sigma * velocity.astype(mx.float32)


# One evaluation a step --------------------------------------------------------------------------------------------


def _euler(schedule: Schedule, noise: Noise) -> TakeStep:
    """Source: FlowMatchEulerDiscreteScheduler.step."""

    def step(evaluate: Evaluate, latents: mx.array, number: int) -> Step:
        velocity = evaluate(latents, number)
        # The denoised latents are never computed unless somebody reads them.
        denoised = _predict_clean(latents, velocity, float(schedule.sigmas[number]))
        return Step(euler_step(latents, velocity, schedule.dt(number)), denoised)

    return step


def _lcm(schedule: Schedule, noise: Noise) -> TakeStep:
    """Source: FlowMatchLCMScheduler.step: to the image that the velocity points to, and back with fresh noise."""

    def step(evaluate: Evaluate, latents: mx.array, number: int) -> Step:
        velocity = evaluate(latents, number)
        denoised = _predict_clean(latents, velocity, float(schedule.sigmas[number]))
        after = float(schedule.sigmas[number + 1])
        return Step(((1 - after) * denoised + after * noise()).astype(velocity.dtype), denoised)

    return step


# Two evaluations a step -------------------------------------------------------------------------------------------


def _heun(schedule: Schedule, noise: Noise) -> TakeStep:
    """Euler's step, and again with the mean of the velocities at both ends; the last is Euler's alone.

    Source: FlowMatchHeunDiscreteScheduler.
    """

    def step(evaluate: Evaluate, latents: mx.array, number: int) -> Step:
        sigma, dt = float(schedule.sigmas[number]), schedule.dt(number)
        velocity = evaluate(latents, 2 * number)
        if schedule.sigmas[number + 1] > 0:
            ahead = evaluate(euler_step(latents, velocity, dt), 2 * number + 1)
            mean = (velocity.astype(mx.float32) + ahead.astype(mx.float32)) / 2
            velocity = mean.astype(velocity.dtype)
        return Step(euler_step(latents, velocity, dt), _predict_clean(latents, velocity, sigma))

    return step


# Several steps' images --------------------------------------------------------------------------------------------

# (levels, number of the step, latents fp32, the images of this step and the one before) -> latents fp32.
_Multistep = Callable[[Sequence[float], int, mx.array, mx.array, mx.array], mx.array]


def _multistep(formula: _Multistep, first_order: Callable[[int, int], bool] = lambda number, steps: False) -> Solver:
    """A solver of second order that remembers the last step's image; Euler's formula without one, and to sigma 0.

    Args:
        formula: the step of second order.
        first_order: (number of the step, number of steps) -> whether Euler's formula is used there too.
    """

    def begin(schedule: Schedule, noise: Noise) -> TakeStep:
        levels, past = _below_one(schedule.sigmas), list[mx.array]()

        def step(evaluate: Evaluate, latents: mx.array, number: int) -> Step:
            velocity = evaluate(latents, number)
            x, sigma, after = latents.astype(mx.float32), levels[number], levels[number + 1]
            image = _predict_clean(latents, velocity, sigma)
            if not past or after == 0 or first_order(number, schedule.num_steps):
                x = after / sigma * x + (1 - after / sigma) * image
            else:
                x = formula(levels, number, x, image, past[-1])
            past[:] = [image]
            return Step(x.astype(velocity.dtype), image)

        return step

    return Solver(lambda schedule: schedule.timesteps, begin)


def _dpmpp_2m(levels: Sequence[float], n: int, x: mx.array, image: mx.array, before: mx.array) -> mx.array:
    """DPM-Solver++(2M), midpoint. Source: DPMSolverMultistepScheduler.multistep_dpm_solver_second_order_update."""
    sigma, after = levels[n], levels[n + 1]
    h = _lam(after) - _lam(sigma)
    ratio = (_lam(sigma) - _lam(levels[n - 1])) / h
    ahead = image + (image - before) / (2 * ratio)
    return after / sigma * x - (1 - after) * math.expm1(-h) * ahead


def _res_2m(levels: Sequence[float], n: int, x: mx.array, image: mx.array, before: mx.array) -> mx.array:
    """The exponential integrator of second order in t = -log sigma. Source: ComfyUI's `res_multistep`."""
    sigma, after = levels[n], levels[n + 1]
    h = math.log(sigma / after)
    c2 = math.log(sigma / levels[n - 1]) / h  # (t of the step before - t) / h, negative
    phi1 = math.expm1(-h) / -h
    phi2 = (phi1 - 1) / -h
    return math.exp(-h) * x + h * ((phi1 - phi2 / c2) * image + phi2 / c2 * before)


def _unipc(schedule: Schedule, noise: Noise) -> TakeStep:
    """UniPC of order 2, "bh2". Source: UniPCMultistepScheduler with use_flow_sigmas and flow_prediction.

    Each step first corrects the latents of the step before by the image that is now seen, from where that step began,
    and then predicts. The correction starts from unblended latents, as the reference's does.
    """
    levels = _below_one(_exact(schedule).astype(np.float32))
    images: list[mx.array] = []  # of the last two steps
    begun: list[mx.array] = []  # where the last step began
    orders: list[int] = []  # of the last step

    def move(number: int, x: mx.array, order: int, now: mx.array | None) -> mx.array:
        """From level `number` to the next: predicted, or with the image `now` that is seen there, corrected."""
        sigma, after = levels[number], levels[number + 1]
        if after == 0:
            return images[-1]
        h = _lam(after) - _lam(sigma)
        b = math.expm1(-h)
        moved = after / sigma * x - (1 - after) * b * images[-1]
        change: mx.array | None = None
        ratio, slope = 1.0, None
        if order == 2:
            ratio = (_lam(levels[number - 1]) - _lam(sigma)) / h
            slope = (images[-2] - images[-1]) / ratio
        if now is None:
            change = None if slope is None else 0.5 * slope
        elif slope is None:
            change = 0.5 * (now - images[-1])
        else:
            first = b / -h - 1
            second = first / -h - 0.5
            weights = np.linalg.solve([[1.0, 1.0], [ratio, 1.0]], [first / b, 2 * second / b])
            change = float(weights[0]) * slope + float(weights[1]) * (now - images[-1])
        return moved if change is None else moved - (1 - after) * b * change

    def step(evaluate: Evaluate, latents: mx.array, number: int) -> Step:
        velocity = evaluate(latents, number)
        image = _predict_clean(latents, velocity, levels[number])
        x = latents.astype(mx.float32)
        if begun:
            x = move(number - 1, begun[-1], orders[-1], image)
        order = min(2, schedule.num_steps - number, len(images) + 1)
        images[:] = [*images[-1:], image]
        begun[:], orders[:] = [x], [order]
        return Step(move(number, x, order, None).astype(velocity.dtype), image)

    return step


def _whole_timesteps(schedule: Schedule) -> np.ndarray:
    """The levels of UniPC's evaluations: its timesteps are whole, rounded down."""
    levels = _exact(schedule)[:-1]
    whole: np.ndarray = np.floor(levels * _TRAINED_STEPS) / _TRAINED_STEPS
    return whole.astype(np.float32)


def _exact(schedule: Schedule) -> np.ndarray:
    """The levels in float64; a first one of 1 is a little less."""
    levels = np.array(schedule.sigmas if schedule.exact is None else schedule.exact, np.float64)
    if abs(levels[0] - 1) < _NEARLY_ONE:
        levels[0] -= _NEARLY_ONE
    return levels


def _below_one(sigmas: np.ndarray) -> list[float]:
    return [min(float(sigma), float(np.float32(1 - _NEARLY_ONE))) for sigma in sigmas]


def _lam(sigma: float) -> float:
    return math.log((1 - sigma) / sigma)


def _ends_low(number: int, steps: int) -> bool:
    return steps < _FEW and number + 1 == steps


EULER = Solver(lambda schedule: schedule.timesteps, _euler)

SOLVERS: dict[SolverName, Solver] = {
    "euler": EULER,
    "heun": Solver(lambda schedule: np.repeat(schedule.sigmas, 2)[1:-2], _heun, lambda steps: 2 * steps - 1),
    "unipc": Solver(_whole_timesteps, _unipc),
    "dpmpp-2m": _multistep(_dpmpp_2m, _ends_low),
    "res-2m": _multistep(_res_2m),
    "lcm": Solver(lambda schedule: schedule.timesteps, _lcm),
}
