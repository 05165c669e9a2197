"""The vision tower of Qwen3-VL: patches of one image in, features for the language model out.

Knows nothing of files or prompts. Patches come in the processor's order: 2x2 blocks in raster order, four patches each.
All attend to all. Formulas: transformers' modeling_qwen3_vl.py and vision_utils.py. Shapes: N patches, C width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx

from .. import nn
from ..layers import Embedding, Linear, OnLayer, Turns, attention, gelu_tanh, rotate_half
from ..rotary import patch_tables as rotary_tables
from .config import VisionConfig

EPS = 1e-6
# Head sizes that MLX's fused attention has; others are filled up with zeros, or the scores of all patches would lie in
# memory at once (16 GB at 2048x2048).
_HEADS = (64, 80, 128)


class Features(NamedTuple):
    """What the tower makes of an image.

    Attributes:
        merged: (N / 4, out_hidden_size), which stand in the places of the image's tokens.
        taps: the same shape each, for after the first layers of the language model, in order.
    """

    merged: mx.array
    taps: Sequence[mx.array]


class VisionTower(nn.Module):
    """One image's features."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.model: _Model = _Model(config)

    def __call__(self, patches: mx.array, height: int, width: int, on_layer: OnLayer | None = None) -> Features:
        """Features of the patches (N, 3 * 16 * 16) of a grid of height x width patches, both even.

        The checkpoint's two temporal taps see the same frame, so the loader adds them up.
        """
        return self.model.visual(patches, height, width, on_layer)


class _Model(nn.Module):
    """For the checkpoint's names."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.visual: Visual = Visual(config)


class Visual(nn.Module):
    """Patches to features."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.patch_embed: _PatchEmbed = _PatchEmbed(config)
        self.pos_embed: Embedding = Embedding(config.num_position_embeddings, config.hidden_size)
        self.blocks: list[VisionBlock] = [VisionBlock(config) for _ in range(config.depth)]
        self.merger: PatchMerger = PatchMerger(config, config.hidden_size)
        self.deepstack_merger_list: list[PatchMerger] = [
            PatchMerger(config, config.merged_size) for _ in config.deepstack_visual_indexes
        ]
        self._config = config

    def __call__(self, patches: mx.array, height: int, width: int, on_layer: OnLayer | None) -> Features:
        """The features of a grid of height x width patches (N, patch_pixels)."""
        config = self._config
        merge = config.spatial_merge_size
        hidden = self.patch_embed.proj(patches)
        index, weights = position_weights(height, width, merge, config.position_side)
        learned = (self.pos_embed(index).astype(mx.float32) * weights[..., None]).sum(axis=1)
        hidden = hidden + learned.astype(hidden.dtype)
        tables = rotary_tables(height, width, merge, config.head_dim)
        mergers = dict(zip(config.deepstack_visual_indexes, self.deepstack_merger_list, strict=True))
        taps = []
        for number, block in enumerate(self.blocks):
            hidden = block(hidden, tables)
            made = [hidden]
            if number in mergers:
                taps.append(mergers[number](hidden))
                made.append(taps[-1])
            if on_layer is not None:
                on_layer(made)
        return Features(self.merger(hidden), taps)


class _PatchEmbed(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.proj: Linear = Linear(config.patch_pixels, config.hidden_size)


class LayerNorm(nn.Module):
    """Layer norm with a weight and a bias."""

    def __init__(self, dim: int):
        super().__init__()
        self.weight: mx.array = mx.ones((dim,))
        self.bias: mx.array = mx.zeros((dim,))

    def __call__(self, x: mx.array) -> mx.array:
        """(…, dim) to (…, dim)."""
        return mx.fast.layer_norm(x, self.weight, self.bias, EPS)


class VisionBlock(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.norm1: LayerNorm = LayerNorm(config.hidden_size)
        self.norm2: LayerNorm = LayerNorm(config.hidden_size)
        self.attn: VisionAttention = VisionAttention(config)
        self.mlp: VisionMLP = VisionMLP(config)

    def __call__(self, hidden: mx.array, tables: Turns) -> mx.array:
        """(N, C) to (N, C)."""
        hidden = hidden + self.attn(self.norm1(hidden), tables)
        return hidden + self.mlp(self.norm2(hidden))


class VisionAttention(nn.Module):
    """Attention of all patches to all."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.qkv: Linear = Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj: Linear = Linear(config.hidden_size, config.hidden_size)
        self._head_dim = config.head_dim
        self._filling = min((size for size in _HEADS if size >= self._head_dim), default=self._head_dim)

    def __call__(self, x: mx.array, tables: Turns) -> mx.array:
        """(N, C) to (N, C)."""
        size, filled = self._head_dim, self._filling
        q, k, v = mx.split(self.qkv(x).reshape(x.shape[0], -1, size), 3, axis=1)
        # Attention divides by the root of the filled size; the queries' tables make up for it.
        q = rotate_half(q, *((filled / size) ** 0.5 * table for table in tables))
        q, k, v = (mx.pad(y, [(0, 0), (0, 0), (0, filled - size)])[None] for y in (q, rotate_half(k, *tables), v))
        out = attention(q, k, v)[0].reshape(x.shape[0], -1, filled)[..., :size]
        return self.proj(out.reshape(x.shape))


class VisionMLP(nn.Module):
    """Linear, tanh-GELU, linear."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.linear_fc1: Linear = Linear(config.hidden_size, config.intermediate_size)
        self.linear_fc2: Linear = Linear(config.intermediate_size, config.hidden_size)

    def __call__(self, x: mx.array) -> mx.array:
        """(N, C) to (N, C)."""
        return self.linear_fc2(gelu_tanh(*self.linear_fc1.terms(x)))


class PatchMerger(nn.Module):
    """Four patches of a block become one feature; `dim` says whether they are normalised singly or together."""

    def __init__(self, config: VisionConfig, dim: int):
        super().__init__()
        merged = config.merged_size
        self.norm: LayerNorm = LayerNorm(dim)
        self.linear_fc1: Linear = Linear(merged, merged)
        self.linear_fc2: Linear = Linear(merged, config.out_hidden_size)
        self._sizes = (dim, merged)
        self._gelu = nn.GELU()

    def __call__(self, hidden: mx.array) -> mx.array:
        """(N, C) to (N / 4, out_hidden_size)."""
        dim, merged = self._sizes
        hidden = self.norm(hidden.reshape(-1, dim)).reshape(-1, merged)
        return self.linear_fc2(self._gelu(self.linear_fc1(hidden)))


def position_weights(height: int, width: int, merge: int, side: int) -> tuple[mx.array, mx.array]:
    """Which learned positions of a grid of side x side make a patch's, and their shares.

    The grid is stretched over the image, corner on corner, and read between its points.

    Returns:
        Index and fp32 weights (N, 4), patches in the processor's order.
    """
    row, column = (_axis(length, side) for length in (height, width))
    index = row[0][:, None, :, None] * side + column[0][None, :, None, :]
    weights = row[1][:, None, :, None] * column[1][None, :, None, :]
    shape = (height // merge, merge, width // merge, merge, 4)
    index, weights = (values.reshape(shape).transpose(0, 2, 1, 3, 4).reshape(-1, 4) for values in (index, weights))
    return index, weights


def _axis(length: int, side: int) -> tuple[mx.array, mx.array]:
    """The two of `side` points that each of `length` positions lies between, and their shares: (length, 2) each."""
    place = mx.arange(length, dtype=mx.float32) * (side - 1) / max(length - 1, 1)
    below = mx.floor(place)
    share = place - below
    points = mx.stack([below, mx.minimum(below + 1, side - 1)], axis=-1).astype(mx.int32)
    return points, mx.stack([1 - share, share], axis=-1)
