"""Solvers: how the velocities of a schedule's steps move the latents from noise to an image.

A solver declares the noise levels at which it wants a velocity before the first step, because models make tables for
them. It knows neither model nor guidance: `evaluate` gives the velocity that counts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from .schedule import Schedule

# (latents, index among the solver's evaluations) -> velocity.
Evaluate = Callable[[mx.array, int], mx.array]


class Step(NamedTuple):
    """What a step comes to.

    Attributes:
        latents: (B, N, C), as noisy as the schedule is after the step.
        denoised: the clean latents (B, N, C) that it points to, fp32.
    """

    latents: mx.array
    denoised: mx.array


class Solver(NamedTuple):
    """One way to solve the flow.

    Attributes:
        evaluations: of a schedule, the noise levels at which a velocity is asked for: float32, in their order.
        step: (evaluate, latents, schedule, number of the step) -> `Step`.
        count: of so many steps, how many evaluations there are.
    """

    evaluations: Callable[[Schedule], np.ndarray]
    step: Callable[[Evaluate, mx.array, Schedule, int], Step]
    count: Callable[[int], int]


def euler_step(latents: mx.array, velocity: mx.array, dt: float) -> mx.array:
    """latents + dt * velocity: the product in the velocity's dtype, the sum in fp32, the result in the former."""
    change = mx.array(dt, dtype=velocity.dtype) * velocity
    return (latents.astype(mx.float32) + change).astype(velocity.dtype)


def _euler(evaluate: Evaluate, latents: mx.array, schedule: Schedule, step: int) -> Step:
    velocity = evaluate(latents, step)
    # Never computed unless somebody reads it.
    denoised = latents.astype(mx.float32) - float(schedule.sigmas[step]) * velocity.astype(mx.float32)
    return Step(euler_step(latents, velocity, schedule.dt(step)), denoised)


# One velocity a step, at its beginning. Source: FlowMatchEulerDiscreteScheduler.step.
EULER = Solver(lambda schedule: schedule.timesteps, _euler, lambda steps: steps)
