"""Sigmas of the flow-matching Euler sampler; independent of models and images.

Source: diffusers' FlowMatchEulerDiscreteScheduler.set_timesteps and the pipelines' calculate_shift. All arithmetic is
numpy float32 in the reference's order, so that the values are the reference's to the last bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..config import SchedulerConfig
from .choices import skipped_steps


@dataclass(frozen=True)
class Schedule:
    """The steps of one image.

    Attributes:
        sigmas: float32 (steps + 1,): noise level before each step and, last, 0.
        exact: the same in float64, for solvers whose reference rounds a level to a whole timestep; None is `sigmas`.
    """

    sigmas: np.ndarray
    exact: np.ndarray | None = None

    @property
    def num_steps(self) -> int:
        """Number of denoising steps."""
        return len(self.sigmas) - 1

    @property
    def timesteps(self) -> np.ndarray:
        """float32 (steps,): the transformer's timesteps, in [0, 1]."""
        return self.sigmas[:-1]

    def last(self, strength: float) -> Schedule:
        """The steps that are taken for an image that is only partly regenerated; see `skipped_steps`."""
        skipped = skipped_steps(self.num_steps, strength)
        return Schedule(self.sigmas[skipped:], None if self.exact is None else self.exact[skipped:])

    def dt(self, step: int) -> float:
        """Change of sigma in a step; negative."""
        return float(self.sigmas[step + 1] - self.sigmas[step])


def uniform_sigmas(num_steps: int) -> list[float]:
    """The unshifted grid 1 … 1/n."""
    return [float(sigma) for sigma in np.linspace(1.0, 1 / num_steps, num_steps)]


def exponential_mu(config: SchedulerConfig, image_tokens: int) -> float:
    """mu of the resolution-dependent shift: a line through (base_image_seq_len, base_shift) and the maxima."""
    slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
    return image_tokens * slope + (config.base_shift - slope * config.base_image_seq_len)


def root_mu(condition_tokens: int) -> float:
    """mu of the layered pipeline: the root of the condition's tokens in units of a 256x256 image's."""
    return math.sqrt(condition_tokens / 256)


def make_schedule(config: SchedulerConfig, sigmas: Sequence[float], mu: float) -> Schedule:
    """Shifts an unshifted grid by the checkpoint's scheduler.

    Args:
        config: the checkpoint's scheduler.
        sigmas: unshifted noise levels in (0, 1], falling.
        mu: strength of the dynamic shift; unused by a static one.
    """
    levels = (np.append(_shift(config, np.array(sigmas, dtype), mu), 0) for dtype in (np.float32, np.float64))
    rounded, exact = levels
    return Schedule(rounded.astype(np.float32), exact)


def _shift(config: SchedulerConfig, grid: np.ndarray, mu: float) -> np.ndarray:
    """The grid's levels, shifted and stretched in its own dtype."""
    if not config.use_dynamic_shifting:
        shifted = config.shift * grid / (1 + (config.shift - 1) * grid)
    else:
        strength = math.exp(mu) if config.time_shift_type == "exponential" else mu
        shifted = strength / (strength + (1 / grid - 1))
    noiseless = 1 - shifted
    # A single step starts and ends at sigma 1, which cannot be stretched: the reference divides 0 by 0 there.
    if config.shift_terminal and noiseless[-1] > 0:
        shifted = 1 - noiseless / (noiseless[-1] / (1 - config.shift_terminal))
    return shifted


def static_shift(config: SchedulerConfig, shift: float) -> SchedulerConfig:
    """The same scheduler with one shift for all sizes and no terminal stretch, for distilled models."""
    return replace(config, use_dynamic_shifting=False, shift=shift, shift_terminal=0.0)
