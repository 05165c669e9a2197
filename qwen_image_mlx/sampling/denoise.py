"""The one denoising loop: a solver's steps with optional guidance.

Works on plain arrays and a function that predicts velocities; independent of models and pipelines. Source: the loop
shared by diffusers' QwenImage pipelines, dtype by dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import mlx.core as mx

from ..gpu import finish
from .schedule import Schedule
from .solvers import EULER, Solver, Step

# (latents (B, N, C), evaluation) -> velocities (B, N, C): the prompt's and, with guidance, the negative prompt's.
Velocities = Callable[[mx.array, int], Sequence[mx.array]]
# (steps done, the last step).
OnStep = Callable[[int, Step], None]
# (steps done, latents) -> latents (B, N, C) in which the kept parts are restored.
Blend = Callable[[int, mx.array], mx.array]


class Guidance(NamedTuple):
    """How the positive and the negative velocity are combined.

    Attributes:
        scale: `cfg_scale`.
        renormalize: whether each token keeps the length of its positive velocity.
    """

    scale: float
    renormalize: bool


def denoise(
    velocities: Velocities,
    latents: mx.array,
    schedule: Schedule,
    guidance: Guidance | None,
    on_step: OnStep | None = None,
    blend: Blend | None = None,
    solver: Solver = EULER,
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

    Returns:
        The clean latents (B, N, C), evaluated.
    """

    def evaluate(latents: mx.array, index: int) -> mx.array:
        found = velocities(latents, index)
        return found[0] if guidance is None else guide(found[0], found[1], guidance)

    for number in range(schedule.num_steps):
        step = solver.step(evaluate, latents, schedule, number)
        if blend is not None:
            step = Step(blend(number + 1, step.latents), blend(schedule.num_steps, step.denoised))
        latents = step.latents
        if number + 1 == schedule.num_steps:
            finish(latents)
        else:
            mx.async_eval(latents)  # type: ignore[no-untyped-call]  # MLX's stub gives it no types
        if on_step is not None:
            on_step(number + 1, step)
    return latents


def guide(positive: mx.array, negative: mx.array, guidance: Guidance) -> mx.array:
    """Classifier-free guidance: negative + scale * (positive - negative), optionally renormalised.

    Args:
        positive, negative: velocities (B, N, C), of one dtype.
        guidance: scale and renormalization.

    Returns:
        (B, N, C) in that dtype; renormalised, each token keeps the length of its positive velocity.
    """
    # The scale in fp32, as in torch: rounded to bf16, 3.7 would be 3.703.
    difference = mx.array(guidance.scale, dtype=mx.float32) * (positive - negative).astype(mx.float32)
    combined = negative + difference.astype(positive.dtype)
    if not guidance.renormalize:
        return combined
    return combined * (_token_norm(positive) / _token_norm(combined))


def _token_norm(x: mx.array) -> mx.array:
    return mx.linalg.norm(x.astype(mx.float32), axis=-1, keepdims=True).astype(x.dtype)
