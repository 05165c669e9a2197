"""Solvers: how the velocities of a schedule's steps move the latents from noise to an image.

A solver declares the noise levels at which it evaluates the velocity before the first step, because models make tables
for them. It is independent of model and guidance: `evaluate` returns the guided velocity.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from .schedule import Schedule

# (latents (B, N, C), index of the evaluation) -> velocity (B, N, C).
Evaluate = Callable[[mx.array, int], mx.array]


class Step(NamedTuple):
    """The result of a step.

    Attributes:
        latents: (B, N, C) at the schedule's noise level after the step.
        denoised: the clean latents (B, N, C) that it points to, fp32.
    """

    latents: mx.array
    denoised: mx.array


class Solver(NamedTuple):
    """One way to solve the flow.

    Attributes:
        evaluations: a schedule -> the noise levels of the velocity's evaluations, float32 (evaluations,), in order.
        step: (evaluate, latents, schedule, number of the step) -> `Step`.
        count: number of steps -> number of evaluations.
    """

    evaluations: Callable[[Schedule], np.ndarray]
    step: Callable[[Evaluate, mx.array, Schedule, int], Step]
    count: Callable[[int], int]


def euler_step(latents: mx.array, velocity: mx.array, dt: float) -> mx.array:
    """latents + dt * velocity (B, N, C): product and result in the velocity's dtype, the sum in fp32."""
    change = mx.array(dt, dtype=velocity.dtype) * velocity
    return (latents.astype(mx.float32) + change).astype(velocity.dtype)


def _euler(evaluate: Evaluate, latents: mx.array, schedule: Schedule, step: int) -> Step:
    velocity = evaluate(latents, step)
    # Never computed unless somebody reads it.
    denoised = latents.astype(mx.float32) - float(schedule.sigmas[step]) * velocity.astype(mx.float32)
    return Step(euler_step(latents, velocity, schedule.dt(step)), denoised)


# One velocity a step, at its beginning. Source: FlowMatchEulerDiscreteScheduler.step.
EULER = Solver(lambda schedule: schedule.timesteps, _euler, lambda steps: steps)
