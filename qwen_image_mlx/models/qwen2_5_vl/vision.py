"""The vision tower of Qwen2.5-VL: patches of one image in, features for the language model out.

Knows nothing of files or prompts. Patches come in the processor's order: 2x2 blocks in raster order, four patches each.
Most blocks attend inside windows of up to 8x8 patches; tokens stay in their order, and each window gathers its own by
an index that is computed at once for all windows. Formulas: transformers' modeling_qwen2_5_vl.py.
Shapes: N patches, C width.
"""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx

from .. import nn
from ..layers import GatedMLP, Linear, OnLayer, Turns, rotate_half
from ..rotary import patch_tables
from .config import VisionConfig

EPS = 1e-6


class Windows(NamedTuple):
    """Which patches attend to each other.

    Attributes:
        members: (windows, size) index of each window's patches; border windows are padded with patch 0.
        mask: (windows, 1, 1, size) additive: 0 for a member, minus infinity for padding.
        slots: (N,) where in the flattened windows each patch is.
    """

    members: mx.array
    mask: mx.array
    slots: mx.array


class VisionTower(nn.Module):
    """One image's features."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.visual: _Visual = _Visual(config)

    def __call__(self, patches: mx.array, height: int, width: int, on_layer: OnLayer | None = None) -> mx.array:
        """Features (N / 4, out_hidden_size) of the patches (N, 3 * 14 * 14) of a grid of height x width patches.

        The checkpoint's two temporal taps see the same frame, so the loader adds them up.
        """
        return self.visual(patches, height, width, on_layer)


class _Visual(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.patch_embed: _PatchEmbed = _PatchEmbed(config)
        self.blocks: list[VisionBlock] = [VisionBlock(config) for _ in range(config.depth)]
        self.merger: PatchMerger = PatchMerger(config)
        self._config = config

    def __call__(self, patches: mx.array, height: int, width: int, on_layer: OnLayer | None) -> mx.array:
        config = self._config
        hidden = self.patch_embed.proj(patches)
        merge = config.spatial_merge_size
        tables = patch_tables(height, width, merge, config.head_dim)
        windows = window_index(height // merge, width // merge, config.window_cells, merge**2, hidden.dtype)
        for number, block in enumerate(self.blocks):
            hidden = block(hidden, tables, None if number in config.fullatt_block_indexes else windows)
            if on_layer is not None:
                on_layer([hidden])
        return self.merger(hidden)


class _PatchEmbed(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.proj: Linear = Linear(config.patch_pixels, config.hidden_size, bias=False)


class VisionBlock(nn.Module):
    """Pre-norm attention and gated MLP."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.norm1: nn.RMSNorm = nn.RMSNorm(config.hidden_size, eps=EPS)
        self.norm2: nn.RMSNorm = nn.RMSNorm(config.hidden_size, eps=EPS)
        self.attn: VisionAttention = VisionAttention(config)
        self.mlp: GatedMLP = GatedMLP(config.hidden_size, config.intermediate_size, bias=True)

    def __call__(self, hidden: mx.array, tables: Turns, windows: Windows | None) -> mx.array:
        hidden = hidden + self.attn(self.norm1(hidden), tables, windows)
        return hidden + self.mlp(self.norm2(hidden))


class VisionAttention(nn.Module):
    """Bidirectional attention over the whole image, or inside windows."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.qkv: Linear = Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj: Linear = Linear(config.hidden_size, config.hidden_size)
        self._head_dim = config.head_dim

    def __call__(self, x: mx.array, tables: Turns, windows: Windows | None) -> mx.array:
        """(N, C) to (N, C)."""
        q, k, v = mx.split(self.qkv(x).reshape(x.shape[0], -1, self._head_dim), 3, axis=1)
        q, k = (rotate_half(y, *tables) for y in (q, k))
        # (windows, heads, members, head_dim), one window of all patches without windows.
        grouped = [
            (y[None] if windows is None else mx.take(y, windows.members, axis=0)).transpose(0, 2, 1, 3)
            for y in (q, k, v)
        ]
        mask = None if windows is None else windows.mask
        out = mx.fast.scaled_dot_product_attention(*grouped, scale=self._head_dim**-0.5, mask=mask)
        out = out.transpose(0, 2, 1, 3).reshape(-1, x.shape[1])
        return self.proj(out if windows is None else mx.take(out, windows.slots, axis=0))


class PatchMerger(nn.Module):
    """Four patches of a block become one feature."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        merged = config.merged_size
        self.ln_q: nn.RMSNorm = nn.RMSNorm(config.hidden_size, eps=EPS)
        self.mlp: list[nn.Module] = [Linear(merged, merged), nn.GELU(), Linear(merged, config.out_hidden_size)]
        self._merged = merged

    def __call__(self, hidden: mx.array) -> mx.array:
        """(N, C) to (N / 4, out_hidden_size)."""
        hidden = self.ln_q(hidden).reshape(-1, self._merged)
        for layer in self.mlp:
            hidden = layer(hidden)
        return hidden


def window_index(height: int, width: int, side: int, per_cell: int, dtype: mx.Dtype) -> Windows:
    """Windows of side x side cells over a grid of height x width cells, each of `per_cell` consecutive patches.

    All windows at once, from aranges alone: no loop, nothing waits for a result.
    """
    down, across = -(-height // side), -(-width // side)
    rows = mx.arange(down * side).reshape(down, 1, side, 1, 1)
    cols = mx.arange(across * side).reshape(1, across, 1, side, 1)
    inside = mx.logical_and(rows < height, cols < width)
    patches = (rows * width + cols) * per_cell + mx.arange(per_cell)
    shape = (down * across, side * side * per_cell)
    members = mx.where(inside, patches, 0).reshape(shape)
    mask = mx.where(mx.broadcast_to(inside, patches.shape), 0.0, -mx.inf).astype(dtype)

    row, col = (axis.reshape(-1, 1) for axis in mx.meshgrid(mx.arange(height), mx.arange(width), indexing="ij"))
    window = (row // side) * across + col // side
    slot = (row % side) * side + col % side
    slots = (window * side * side + slot) * per_cell + mx.arange(per_cell)
    return Windows(members, mask.reshape(shape[0], 1, 1, shape[1]), slots.reshape(-1))
