"""From a timestep to the shifts, scales and gates of every block: the formula, and the network that learns it.

To generate, the rows of all steps are computed once, one weight in memory at a time (`pipeline/qwen_image/table.py`);
this network never exists; to train all weights it does. Source: diffusers' transformer_qwenimage.py.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable

import mlx.core as mx

from .. import nn
from ..layers import Embedding, Linear
from .config import TransformerConfig
from .transformer import BlockRows, Modulation

# (name of a linear layer below "time_text_embed", its input) -> its output.
Apply = Callable[[str, mx.array], mx.array]

BLOCK_SCALES = (1, 4)  # which of a block's six rows scale
OUT_SCALES = (0,)  # which of the final norm's two
TIME_CHANNELS = 256


def time_embedding(timesteps: mx.array, dtype: mx.Dtype, apply: Apply, addition: mx.array | None) -> mx.array:
    """The input of the modulation's matrices.

    Args:
        timesteps: (S,) in [0, 1], fp32.
        dtype: the model's; the reference casts 1000 sigma to it and divides there, which in bf16 moves a timestep by
            up to 0.4%.
        apply: runs `timestep_embedder.linear_1` or `linear_2`, by name.
        addition: (2, D): its rows are for images with and without a layer to decompose; pipelines always use row 0.

    Returns:
        (S, D) in `dtype`, after the activation.
    """
    rounded = (1000 * timesteps).astype(dtype) / mx.array(1000, dtype=dtype)
    hidden = nn.silu(apply("timestep_embedder.linear_1", timestep_features(rounded).astype(dtype)))
    embedding = apply("timestep_embedder.linear_2", hidden)
    return nn.silu(embedding if addition is None else embedding + addition[0])


def timestep_features(timesteps: mx.array) -> mx.array:
    """Sinusoids (S, 256), cosines first, of timesteps in [0, 1] (S,); in fp32 whatever the model's dtype.

    The reference multiplies by 1000 after the frequencies and in fp32 (`Timesteps` with scale 1000).
    """
    half = TIME_CHANNELS // 2
    exponents = array("f", (-math.log(10000) * n / half for n in range(half)))
    angles = 1000 * (timesteps.astype(mx.float32)[:, None] * mx.array([math.exp(n) for n in exponents]))
    return mx.concatenate([mx.cos(angles), mx.sin(angles)], axis=-1)


def split_rows(out: mx.array, dim: int, scales: tuple[int, ...]) -> mx.array:
    """A modulation matrix's output (S, R * D) as rows (S, R, D), with 1 added to those that scale."""
    out = out.reshape(out.shape[0], -1, dim)
    return out + mx.array([float(i in scales) for i in range(out.shape[1])], dtype=out.dtype)[:, None]


class TimeModulation(nn.Module):
    """The rows of a batch whose samples have timesteps of their own; parameters have the checkpoint's names."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.time_text_embed: _TimeEmbedding = _TimeEmbedding(config.dim, config.use_additional_t_cond)
        self.transformer_blocks: list[_BlockModulation] = [_BlockModulation(config.dim) for _ in config.blocks]
        self.norm_out: _NormOut = _NormOut(config.dim)
        self._dim, self._zero_cond_t = config.dim, config.zero_cond_t

    def __call__(self, timesteps: mx.array, dtype: mx.Dtype) -> Modulation:
        """Rows (B, 1, D) of timesteps (B,) in [0, 1].

        With `zero_cond_t` references have the rows of timestep 0, (D,), whatever the sample.
        """
        count = timesteps.shape[0]
        timesteps = mx.concatenate([timesteps, mx.zeros(1)]) if self._zero_cond_t else timesteps
        embedding = self.time_text_embed(timesteps.astype(mx.float32), dtype)

        def rows(layer: nn.Module, scales: tuple[int, ...]) -> mx.array:
            return split_rows(layer(embedding), self._dim, scales)

        def of_samples(found: mx.array) -> list[mx.array]:
            return [found[:count, row, None] for row in range(found.shape[1])]

        blocks = []
        for block in self.transformer_blocks:
            text, image = (rows(mod[1], BLOCK_SCALES) for mod in (block.txt_mod, block.img_mod))
            target = of_samples(image)
            references = [*image[count]] if self._zero_cond_t else target
            blocks.append(BlockRows(of_samples(text), target, references))
        return Modulation(blocks, of_samples(rows(self.norm_out.linear, OUT_SCALES)))


class _TimeEmbedding(nn.Module):
    def __init__(self, dim: int, addition: bool):
        super().__init__()
        self.timestep_embedder: _TimestepEmbedder = _TimestepEmbedder(dim)
        if addition:
            self.addition_t_embedding: Embedding = Embedding(2, dim)

    def __call__(self, timesteps: mx.array, dtype: mx.Dtype) -> mx.array:
        addition = self.addition_t_embedding.weight if "addition_t_embedding" in self else None
        layers = {f"timestep_embedder.{name}": self.timestep_embedder[name] for name in ("linear_1", "linear_2")}
        return time_embedding(timesteps, dtype, lambda name, x: layers[name](x), addition)


class _TimestepEmbedder(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.linear_1: Linear = Linear(TIME_CHANNELS, dim)
        self.linear_2: Linear = Linear(dim, dim)


class _BlockModulation(nn.Module):
    """The lists give the checkpoint's names `img_mod.1` and `txt_mod.1`."""

    def __init__(self, dim: int):
        super().__init__()
        self.img_mod = [nn.Identity(), Linear(dim, 6 * dim)]
        self.txt_mod = [nn.Identity(), Linear(dim, 6 * dim)]


class _NormOut(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.linear: Linear = Linear(dim, 2 * dim)
