"""From timesteps to the scales and gates that all blocks share; source: diffusers' transformer_qwenimage21.py.

To generate an image, the rows of all its steps are computed at once and this network is dropped.
"""

from __future__ import annotations

import math
from array import array

import mlx.core as mx

from .. import nn
from ..layers import Linear
from .config import TransformerConfig
from .transformer import Rows

TIME_CHANNELS = 256


class TimeModulation(nn.Module):
    """The rows of timesteps; parameters have the checkpoint's names, the lists for `modulation.1`."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.time_text_embed: _TimeEmbedding = _TimeEmbedding(config.dim)
        self.modulation: list[nn.Module] = [nn.Identity(), Linear(config.dim, 4 * config.dim, bias=False)]
        self.norm_out: _NormOut = _NormOut(config.dim)

    def __call__(self, timesteps: mx.array, dtype: mx.Dtype) -> Rows:
        """Rows (B, 1, D) of a batch whose samples have the timesteps (B,) in [0, 1]."""
        # The pipeline rounds 1000 sigma to the model's dtype and divides there.
        rounded = (1000 * timesteps.astype(mx.float32)).astype(dtype) / mx.array(1000, dtype=dtype)
        embedding = nn.silu(self.time_text_embed(_features(rounded).astype(dtype)))
        scale1, gate1, scale2, gate2 = mx.split(self.modulation[1](embedding)[:, None], 4, axis=-1)
        out = self.norm_out.linear(embedding)[:, None]
        return Rows(1 + scale1, mx.tanh(gate1), 1 + scale2, mx.tanh(gate2), 1 + out)

    def table(self, timesteps: mx.array, dtype: mx.Dtype) -> list[Rows]:
        """Rows (D,) of each timestep of (S,) in [0, 1]; the prefix takes those of timestep 0."""
        rows = self(timesteps, dtype)
        return [Rows(*(values[step, 0] for values in rows)) for step in range(timesteps.shape[0])]


class _TimeEmbedding(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.timestep_embedder: _TimestepEmbedder = _TimestepEmbedder(dim)

    def __call__(self, features: mx.array) -> mx.array:
        layers = self.timestep_embedder
        return layers.linear_2(nn.silu(layers.linear_1(features)))


class _TimestepEmbedder(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.linear_1: Linear = Linear(TIME_CHANNELS, dim, bias=False)
        self.linear_2: Linear = Linear(dim, dim, bias=False)


class _NormOut(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.linear: Linear = Linear(dim, dim, bias=False)


def _features(timesteps: mx.array) -> mx.array:
    """Sinusoids (S, 256), cosines first, of timesteps (S,) in [0, 1]; in fp32, and times 1000 before the frequencies.

    The first generation multiplies after them, which rounds differently.
    """
    half = TIME_CHANNELS // 2
    exponents = array("f", (-math.log(10000) * n / half for n in range(half)))
    angles = (1000 * timesteps.astype(mx.float32))[:, None] * mx.array([math.exp(n) for n in exponents])
    return mx.concatenate([mx.cos(angles), mx.sin(angles)], axis=-1)
