"""The dual-stream diffusion transformer (MMDiT) of the Qwen-Image family.

Takes packed latents, projected text, one step's modulation and rotary tables; knows nothing of timesteps, schedules
or guidance. A third of the checkpoint's weights only turn the timestep into modulation: they are not part of this
module, see `Modulation` and `weights/modulation.py`.

Formulas: diffusers' transformer_qwenimage.py. Shapes: B batch, N image tokens, L text tokens, D width.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

from ..config import TransformerConfig
from .layers import Linear
from .rope import Rotary, rotate

EPS = 1e-6
TIME_CHANNELS = 256


class Modulation(NamedTuple):
    """What the timestep contributes to one forward pass.

    Attributes:
        blocks: for each block, the rows of the image and of the text stream; each is (6, D): shift, 1 + scale and
            gate of the attention half, then of the MLP half.
        out: (2, D): 1 + scale and shift of the final norm.
    """

    blocks: list[tuple[mx.array, mx.array]]
    out: mx.array


class Transformer(nn.Module):
    """Predicts the velocity of every target token."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.img_in = Linear(config.in_channels, config.dim)
        self.txt_norm = nn.RMSNorm(config.joint_attention_dim, eps=EPS)
        self.txt_in = Linear(config.joint_attention_dim, config.dim)
        self.transformer_blocks = [TransformerBlock(config, row["last"]) for row in config.blocks]
        self.proj_out = Linear(config.dim, config.patch_channels)

    def project_text(self, embeddings: mx.array) -> mx.array:
        """Encoder states (B, L, joint_attention_dim) to text tokens (B, L, D); the same in every step."""
        return self.txt_in(self.txt_norm(embeddings))

    def __call__(self, latents: mx.array, text: mx.array, modulation: Modulation, rotary: Rotary) -> mx.array:
        """Velocity (B, N, patch channels) of the packed latents (B, N, in_channels).

        Args:
            latents: packed latents, target first.
            text: `project_text`'s result (B, L, D), without padding.
            modulation: this step's rows.
            rotary: tables for L + N tokens.
        """
        img, txt = self.img_in(latents), text
        for block, rows in zip(self.transformer_blocks, modulation.blocks, strict=True):
            img, txt = block(img, txt, rows, rotary)
        scale, shift = modulation.out
        return self.proj_out(mx.fast.layer_norm(img, scale, shift, EPS))


class TransformerBlock(nn.Module):
    """Joint attention, then one MLP per stream; the last block leaves the text stream alone, nobody reads it."""

    def __init__(self, config: TransformerConfig, last: bool):
        super().__init__()
        self.attn = JointAttention(config, last)
        self.img_mlp = FeedForward(config.dim)
        if not last:
            self.txt_mlp = FeedForward(config.dim)
        self._last = last

    def __call__(
        self, img: mx.array, txt: mx.array, rows: tuple[mx.array, mx.array], rotary: Rotary
    ) -> tuple[mx.array, mx.array]:
        (shift1, scale1, gate1, shift2, scale2, gate2), txt_rows = rows
        img_attn, txt_attn = self.attn(
            mx.fast.layer_norm(img, scale1, shift1, EPS),
            mx.fast.layer_norm(txt, txt_rows[1], txt_rows[0], EPS),
            rotary,
        )
        img = gated_add(img, gate1, img_attn)
        img = gated_add(img, gate2, self.img_mlp(mx.fast.layer_norm(img, scale2, shift2, EPS)))
        if self._last:
            return img, txt
        _, _, gate1, shift2, scale2, gate2 = txt_rows
        txt = gated_add(txt, gate1, txt_attn)
        txt = gated_add(txt, gate2, self.txt_mlp(mx.fast.layer_norm(txt, scale2, shift2, EPS)))
        return img, txt


class JointAttention(nn.Module):
    """Attention over text and image tokens together, with weights of their own for each stream."""

    def __init__(self, config: TransformerConfig, last: bool):
        super().__init__()
        dim, head_dim = config.dim, config.attention_head_dim
        self.to_q = Linear(dim, dim)
        self.to_k = Linear(dim, dim)
        self.to_v = Linear(dim, dim)
        self.to_out = [Linear(dim, dim)]
        self.norm_q = nn.RMSNorm(head_dim, eps=EPS)
        self.norm_k = nn.RMSNorm(head_dim, eps=EPS)
        self.add_k_proj = Linear(dim, dim)
        self.add_v_proj = Linear(dim, dim)
        self.norm_added_k = nn.RMSNorm(head_dim, eps=EPS)
        if not last:
            self.add_q_proj = Linear(dim, dim)
            self.to_add_out = Linear(dim, dim)
            self.norm_added_q = nn.RMSNorm(head_dim, eps=EPS)
        self._last = last
        self._heads = (config.num_attention_heads, head_dim)

    def __call__(self, img: mx.array, txt: mx.array, rotary: Rotary) -> tuple[mx.array, mx.array | None]:
        """(B, N, D) and (B, L, D) to the same; the last block returns None for the text."""
        length = txt.shape[1]
        cos, sin = rotary
        keys = [self.norm_added_k(self._split(self.add_k_proj(txt))), self.norm_k(self._split(self.to_k(img)))]
        values = [self._split(self.add_v_proj(txt)), self._split(self.to_v(img))]
        queries = [self.norm_q(self._split(self.to_q(img)))]
        query_tables = cos[length:], sin[length:]
        if not self._last:
            queries.insert(0, self.norm_added_q(self._split(self.add_q_proj(txt))))
            query_tables = cos, sin
        q = rotate(mx.concatenate(queries, axis=1), *query_tables)
        k = rotate(mx.concatenate(keys, axis=1), cos, sin)
        v = mx.concatenate(values, axis=1)
        out = mx.fast.scaled_dot_product_attention(
            *(x.transpose(0, 2, 1, 3) for x in (q, k, v)), scale=self._heads[1] ** -0.5
        )
        out = out.transpose(0, 2, 1, 3).flatten(2)
        if self._last:
            return self.to_out[0](out), None
        return self.to_out[0](out[:, length:]), self.to_add_out(out[:, :length])

    def _split(self, x: mx.array) -> mx.array:
        return x.reshape(*x.shape[:-1], *self._heads)


class FeedForward(nn.Module):
    """Linear, tanh-GELU, Linear; the list gives the checkpoint's names `net.0.proj` and `net.2`."""

    def __init__(self, dim: int):
        super().__init__()
        self.net = [_GELUProjection(dim, 4 * dim), nn.Identity(), Linear(4 * dim, dim)]

    def __call__(self, x: mx.array) -> mx.array:
        return self.net[2](self.net[0](x))


class _GELUProjection(nn.Module):
    def __init__(self, dim: int, inner: int):
        super().__init__()
        self.proj = Linear(dim, inner)

    def __call__(self, x: mx.array) -> mx.array:
        return nn.gelu_approx(self.proj(x))


@mx.compile
def gated_add(x: mx.array, gate: mx.array, y: mx.array) -> mx.array:
    """x + gate * y; in float16 held inside its range, as the reference does after each block."""
    out = x + gate * y
    return mx.clip(out, -65504, 65504) if x.dtype == mx.float16 else out


def timestep_features(timesteps: mx.array) -> mx.array:
    """Sinusoids (S, 256), cosines first, of timesteps in [0, 1] (S,); in fp32 whatever the model's dtype.

    The reference multiplies by 1000 after the frequencies and in fp32 (`Timesteps` with scale 1000).
    """
    half = TIME_CHANNELS // 2
    frequencies = mx.exp(-math.log(10000) * mx.arange(half, dtype=mx.float32) / half)
    angles = 1000 * (timesteps.astype(mx.float32)[:, None] * frequencies)
    return mx.concatenate([mx.cos(angles), mx.sin(angles)], axis=-1)
