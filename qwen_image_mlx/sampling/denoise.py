"""The one denoising loop: a solver's steps with optional guidance.

Works on plain arrays and a function that predicts velocities; independent of models and pipelines. Source: the loop
shared by diffusers' QwenImage pipelines, dtype by dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx

from ..gpu import finish
from .guidance import Guidance, guide
from .schedule import Schedule
from .solvers import EULER, Noise, Solver, Step

# (latents (B, N, C), evaluation, number of velocities) -> that many velocities (B, N, C): the prompt's and, of two,
# the negative prompt's.
Velocities = Callable[[mx.array, int, int], Sequence[mx.array]]
# (steps done, the last step).
OnStep = Callable[[int, Step], None]
# (steps done, latents) -> latents (B, N, C) in which the kept parts are restored.
Blend = Callable[[int, mx.array], mx.array]


def denoise(
    velocities: Velocities,
    latents: mx.array,
    schedule: Schedule,
    guidance: Guidance | None,
    on_step: OnStep | None = None,
    blend: Blend | None = None,
    solver: Solver = EULER,
    noise: Noise | None = None,
) -> mx.array:
    """Runs every step of the schedule.

    Args:
        velocities: the model, called once for each of the solver's evaluations.
        latents: noise (B, N, C) in the model's dtype; latents stay in it between steps, as in the reference.
        schedule: the sigmas.
        guidance: None for a single pass.
        on_step: called after each step with the number of steps done and the step; reading its arrays waits for them,
            while the GPU goes on with the next step.
        blend: replaces the latents after each step, given the number of steps done, and the clean latents that the
            step points to, as after the last one.
        solver: how velocities become steps.
        noise: fresh noise of the latents' shape, for a solver that adds some; None draws from a key of its own.

    Returns:
        The clean latents (B, N, C), evaluated.
    """
    steps = schedule.num_steps
    take_step = solver.begin(schedule, noise or (lambda: mx.random.normal(latents.shape, key=mx.random.key(0))))
    for number in range(steps):

        def evaluate(latents: mx.array, index: int, number: int = number) -> mx.array:
            if guidance is None:
                return velocities(latents, index, 1)[0]
            if guidance.rests(number):
                return mx.zeros_like(latents)
            if not guidance.guides(number, steps):
                return velocities(latents, index, 1)[0]
            positive, negative = velocities(latents, index, 2)
            return guide(positive, negative, guidance)

        step = take_step(evaluate, latents, number)
        if blend is not None:
            step = Step(blend(number + 1, step.latents), blend(steps, step.denoised))
        latents = step.latents
        if number + 1 == steps:
            finish(latents)
        else:
            mx.async_eval(latents)  # type: ignore[no-untyped-call]  # MLX's stub gives it no types
        if on_step is not None:
            on_step(number + 1, step)
    return latents
