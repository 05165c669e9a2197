"""Flow matching: the noise level of a training sample, its target, and the loss.

Arrays in, arrays out; independent of networks and files. Randomness is an explicit key. Source: diffusers'
training_utils.py and examples/dreambooth/train_dreambooth_lora_qwen_image.py.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import mlx.core as mx

from ..config import SchedulerConfig
from ..errors import RequestError
from .settings import TIMESTEPS, WEIGHTINGS


def key_of(seed: int, *words: object) -> mx.array:
    """An independent random key for each purpose of a run, from the seed and words such as a step or a name."""
    digest = hashlib.blake2b(repr((seed, *words)).encode(), digest_size=8).digest()
    return mx.random.key(int.from_bytes(digest, "little"))


@dataclass(frozen=True)
class FlowMatching:
    """The objective: x_t = (1 - sigma) x_0 + sigma noise, and the target is noise - x_0.

    Attributes:
        timesteps: density of the noise levels: "uniform", "logit_normal" or "mode".
        logit_mean, logit_std: of "logit_normal", which draws sigmoid(normal(mean, std)) for 1 - sigma.
        mode_scale: of "mode".
        shift: moves all levels towards noise: sigma becomes shift sigma / (1 + (shift - 1) sigma).
        weighting: of the squared error by noise level: "none", "sigma_sqrt" (1 / sigma^2) or "cosmap".
        levels: number of noise levels.

    Raises:
        RequestError: a value is unknown or not positive.
    """

    timesteps: str = "uniform"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    mode_scale: float = 1.29
    shift: float = 1.0
    weighting: str = "none"
    levels: int = 1000

    def __post_init__(self) -> None:
        for name, allowed in (("timesteps", TIMESTEPS), ("weighting", WEIGHTINGS)):
            if getattr(self, name) not in allowed:
                raise RequestError(f"{name} is {getattr(self, name)!r}, but must be one of {', '.join(allowed)}")
        for name in ("logit_std", "shift"):
            if not 0 < getattr(self, name) < math.inf:
                raise RequestError(f"{name} is {getattr(self, name)}, but must be a positive number")

    def levels_drawn(self, key: mx.array, count: int) -> mx.array:
        """Indices (count,) into `sigmas`, uint32. Source: compute_density_for_timestep_sampling."""
        if self.timesteps == "logit_normal":
            u = mx.sigmoid(self.logit_mean + self.logit_std * mx.random.normal((count,), key=key))
        else:
            u = mx.random.uniform(shape=(count,), key=key)
        if self.timesteps == "mode":
            u = 1 - u - self.mode_scale * (mx.square(mx.cos(math.pi * u / 2)) - 1 + u)
        return mx.clip(mx.floor(u * self.levels), 0, self.levels - 1).astype(mx.uint32)

    @property
    def sigmas(self) -> mx.array:
        """Every noise level, falling from 1; fp32 (levels,). Source: FlowMatchEulerDiscreteScheduler.__init__."""
        sigmas = mx.arange(self.levels, 0, -1, dtype=mx.float32) / self.levels
        return self.shift * sigmas / (1 + (self.shift - 1) * sigmas)

    def noisy(self, latents: mx.array, noise: mx.array, sigmas: mx.array) -> mx.array:
        """x_t (B, N, C) of clean latents and noise (B, N, C), at sigmas (B,); fp32."""
        sigmas = sigmas[:, None, None]
        return (1 - sigmas) * latents.astype(mx.float32) + sigmas * noise

    def loss(self, velocity: mx.array, latents: mx.array, noise: mx.array, sigmas: mx.array) -> mx.array:
        """The weighted mean squared error of each sample: fp32 (B,), from (B, N, C) arrays and sigmas (B,)."""
        target = noise - latents.astype(mx.float32)
        error = mx.square(velocity.astype(mx.float32) - target).mean(axis=(1, 2))
        return self.weight(sigmas) * error

    def weight(self, sigmas: mx.array) -> mx.array:
        """The weights (B,) of samples' errors at sigmas (B,). Source: compute_loss_weighting_for_sd3."""
        if self.weighting == "sigma_sqrt":
            return sigmas**-2.0
        if self.weighting == "cosmap":
            return 2 / (math.pi * (1 - 2 * sigmas + 2 * mx.square(sigmas)))
        return mx.ones_like(sigmas)


def training_shift(config: SchedulerConfig) -> float:
    """The shift a checkpoint's scheduler has before a size is known: 1 where it depends on the size."""
    return 1.0 if config.use_dynamic_shifting else config.shift
