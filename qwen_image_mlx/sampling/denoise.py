"""The one denoising loop: Euler steps with optional guidance.

Sees a function that predicts velocities and plain arrays; no model, no pipeline. Source: the loop shared by diffusers'
QwenImage pipelines and FlowMatchEulerDiscreteScheduler.step, dtype by dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import mlx.core as mx

from ..gpu import finish
from .schedule import Schedule

# (latents, step) -> the velocity that follows the prompt, and with guidance that of the negative prompt.
Velocities = Callable[[mx.array, int], Sequence[mx.array]]
OnStep = Callable[[int, mx.array], None]
Blend = Callable[[int, mx.array], mx.array]


class Guidance(NamedTuple):
    """How two branches become one velocity."""

    scale: float
    renormalize: bool


def denoise(
    velocities: Velocities,
    latents: mx.array,
    schedule: Schedule,
    guidance: Guidance | None,
    on_step: OnStep | None = None,
    blend: Blend | None = None,
) -> mx.array:
    """Runs every step of the schedule.

    Args:
        velocities: the model, called once per step.
        latents: noise (B, N, C) in the model's dtype; latents stay in it between steps, as in the reference.
        schedule: the sigmas.
        guidance: None for a single pass.
        on_step: called after each step with the number of steps done and the latents; who reads them waits for them,
            while the GPU goes on with the next step.
        blend: replaces the latents after each step, given the number of steps done.

    Returns:
        The clean latents (B, N, C), evaluated.
    """
    for step in range(schedule.num_steps):
        predictions = velocities(latents, step)
        prediction = predictions[0] if guidance is None else guide(predictions[0], predictions[1], guidance)
        latents = euler_step(latents, prediction, schedule.dt(step))
        if blend is not None:
            latents = blend(step + 1, latents)
        if step + 1 == schedule.num_steps:
            finish(latents)
        else:
            mx.async_eval(latents)  # type: ignore[no-untyped-call]  # MLX's stub gives it no types
        if on_step is not None:
            on_step(step + 1, latents)
    return latents


def guide(positive: mx.array, negative: mx.array, guidance: Guidance) -> mx.array:
    """Classifier-free guidance; renormalised, each token keeps the length of its positive velocity."""
    # The scale in fp32, as in torch: rounded to bf16, 3.7 would be 3.703.
    difference = mx.array(guidance.scale, dtype=mx.float32) * (positive - negative).astype(mx.float32)
    combined = negative + difference.astype(positive.dtype)
    if not guidance.renormalize:
        return combined
    return combined * (_token_norm(positive) / _token_norm(combined))


def euler_step(latents: mx.array, velocity: mx.array, dt: float) -> mx.array:
    """latents + dt * velocity: the product in the velocity's dtype, the sum in fp32, the result in the former."""
    change = mx.array(dt, dtype=velocity.dtype) * velocity
    return (latents.astype(mx.float32) + change).astype(velocity.dtype)


def _token_norm(x: mx.array) -> mx.array:
    return mx.linalg.norm(x.astype(mx.float32), axis=-1, keepdims=True).astype(x.dtype)
