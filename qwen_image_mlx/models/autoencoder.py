"""Layers that autoencoders share: convolutions in bands of rows, blocks of them, and attention in pieces.

Arrays are (B, H, W, C). Nothing is evaluated here: stages let the caller do it between layers and bands. A matrix
product's rounding depends on its shape and, on some backends, on a row's place in it; so convolutions work in bands of
fixed height counted from the top, and strips that begin on a band's edge give the very bits of the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import mlx.core as mx

from . import nn
from .layers import Conv2d, Linear, OnLayer

# (rows (B, H, W, C), on_band) -> rows. Most stages return an array; those that would need much memory at once yield it
# in pieces, to be joined as rows. `on_band` is optional and called for each band.
Stage = Callable[..., "mx.array | Iterator[mx.array]"]
ATTENTION_CHUNK = 1024  # queries at a time, in whole rows
BAND = 12  # rows of the tail's input; more than its halo, and whole tiles of Metal's Winograd (6 rows)


class MidBlock(nn.Module):
    """Residual block, attention, residual block."""

    def __init__(self, dim: int):
        super().__init__()
        self.resnets: list[ResidualBlock] = [ResidualBlock(dim, dim), ResidualBlock(dim, dim)]
        self.attentions: list[SelfAttention] = [SelfAttention(dim)]

    @property
    def stages(self) -> list[Stage]:
        """The block as consecutive functions."""
        return [self.resnets[0], self.attentions[0], self.resnets[1]]


class ResidualBlock(nn.Module):
    """shortcut(x) + conv2(silu(norm2(conv1(silu(norm1(x))))))."""

    def __init__(self, cin: int, cout: int, band: int | None = None):
        super().__init__()
        self.norm1: ChannelNorm = ChannelNorm(cin)
        self.conv1: BandedConv2d = BandedConv2d(cin, cout, band)
        self.norm2: ChannelNorm = ChannelNorm(cout)
        self.conv2: BandedConv2d = BandedConv2d(cout, cout, band)
        self._band = band
        if cin != cout:
            self.conv_shortcut: Linear = Linear(cin, cout)

    def __call__(self, x: mx.array, on_band: OnLayer | None = None) -> mx.array:
        shortcut = in_bands(self.conv_shortcut, x, self._band) if "conv_shortcut" in self else x
        x = self.conv1(nn.silu(self.norm1(x)), on_band)
        return shortcut + self.conv2(nn.silu(self.norm2(x)), on_band)


class SelfAttention(nn.Module):
    """Single-head attention over all positions."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm: ChannelNorm = ChannelNorm(dim)
        self.to_qkv: Linear = Linear(dim, 3 * dim)
        self.proj: Linear = Linear(dim, dim)

    def __call__(self, x: mx.array) -> Iterator[mx.array]:
        """Yields (B, rows, W, C), some rows at a time; evaluated one by one, they never need all scores at once."""
        b, h, w, c = x.shape
        q, k, v = mx.split(self.to_qkv(self.norm(x)).reshape(b, 1, h * w, 3 * c), 3, axis=-1)
        rows = max(1, ATTENTION_CHUNK // w)
        for top in range(0, h, rows):
            queries = q[:, :, top * w : (top + rows) * w]
            out = mx.fast.scaled_dot_product_attention(queries, k, v, scale=c**-0.5)
            yield x[:, top : top + rows] + self.proj(out.reshape(b, -1, w, c))


class Downsample(nn.Module):
    """Halves rows and columns; zeros are added on the right and at the bottom only."""

    def __init__(self, dim: int):
        super().__init__()
        self.resample: list[nn.Module] = [nn.Identity(), Conv2d(dim, dim, stride=2, padding=0)]

    def __call__(self, x: mx.array) -> mx.array:
        return self.resample[1](mx.pad(x, [(0, 0), (0, 1), (0, 1), (0, 0)]))


class Upsample(nn.Module):
    """Doubles rows and columns by repetition, then a 3x3 convolution."""

    def __init__(self, cin: int, cout: int, band: int | None):
        super().__init__()
        self.resample: list[nn.Module] = [nn.Identity(), BandedConv2d(cin, cout, band)]

    def __call__(self, x: mx.array, on_band: OnLayer | None = None) -> mx.array:
        b, h, w, c = x.shape
        doubled = mx.broadcast_to(x[:, :, None, :, None, :], (b, h, 2, w, 2, c)).reshape(b, 2 * h, 2 * w, c)
        return self.resample[1](doubled, on_band)


class BandedConv2d(Conv2d):
    """3x3 convolution computed in bands of rows; None computes the whole at once."""

    def __init__(self, cin: int, cout: int, band: int | None):
        super().__init__(cin, cout)
        self._band = band

    def __call__(self, x: mx.array, on_band: OnLayer | None = None) -> mx.array:
        if self._band is None:
            return super().__call__(x)
        # The rows around a band come with it, zeros at the edges, so that all bands are the same computation.
        padded = mx.pad(x, [(0, 0), (1, 1), (0, 0), (0, 0)])

        def convolve(rows: mx.array) -> mx.array:
            return mx.conv2d(rows, self.weight, padding=(0, 1)) + self.bias

        return in_bands(convolve, padded, self._band, 2, on_band)


def in_bands(
    fn: Callable[[mx.array], mx.array],
    x: mx.array,
    band: int | None,
    overlap: int = 0,
    on_band: OnLayer | None = None,
) -> mx.array:
    """Applies a function to `band` + `overlap` rows of x (B, H, W, C) at a time, and joins what it returns.

    Args:
        fn: the function of the rows.
        x: all rows.
        band: rows that `fn` returns at a time; None passes all at once.
        overlap: additional rows passed to it.
        on_band: called with each band, to evaluate it; otherwise the scratch memory of all bands exists at once.
    """
    if band is None:
        return fn(x)
    bands = []
    for top in range(0, x.shape[1] - overlap, band):
        bands.append(fn(x[:, top : top + band + overlap]))
        if on_band is not None:
            on_band(bands[-1:])
    return mx.concatenate(bands, axis=1)


def without_bands(layer: Callable[[mx.array], mx.array | Iterator[mx.array]]) -> Stage:
    """A layer that works on whole images, as a stage."""
    return lambda x, on_band=None: layer(x)


class ChannelNorm(nn.Module):
    """x / max(|x|, 1e-12) * sqrt(C) * gamma, the length taken over the channels."""

    def __init__(self, dim: int):
        super().__init__()
        self.gamma: mx.array = mx.ones((dim,))

    def __call__(self, x: mx.array) -> mx.array:
        return channel_norm(x, self.gamma)


def channel_norm(x: mx.array, gamma: mx.array) -> mx.array:
    """`ChannelNorm`'s formula; rms_norm with this epsilon differs from the reference's guard only for |x| < 1e-10."""
    return mx.fast.rms_norm(x, gamma, 1e-24)
