"""The autoencoder of Qwen-Image-2.1 between RGBA pixels and latents of a sixteenth of their size.

Made of the first generation's blocks; what is new is a shortcut around each level, which folds 2x2 pixels into channels
or spreads channels over 2x2 pixels. For a single frame, one of two frames that a level folds is empty. Arrays are
(B, H, W, C). `Encoder` and `Decoder` have the first generation's stages, tail and bands, with the same promise: strips
that begin on a band's edge give the very bits of the whole.

Formulas: diffusers' autoencoder_kl_qwenimage21.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx

from .. import nn
from ..autoencoder import BAND, BandedConv2d, ChannelNorm, Downsample, MidBlock, ResidualBlock, Stage, Upsample
from ..layers import Conv2d, Linear, OnLayer
from .config import VAEConfig

Layer = Callable[[mx.array], Any]
TAIL = 3  # levels of the decoder that work on strips; what they are given is a quarter of the largest they make


class Encoder(nn.Module):
    """Pixels (B, H, W, C) in [-1, 1] to latent mean and log-variance (B, H/16, W/16, 2 z), both unnormalised."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.encoder: _EncoderBody = _EncoderBody(config)
        self.quant_conv: Linear = Linear(2 * config.z_dim, 2 * config.z_dim)

    @property
    def stages(self) -> list[Stage]:
        """The network as consecutive functions."""
        body = self.encoder
        last: list[Layer] = [*body.mid_block.stages, body.head, self.quant_conv]
        return [_unbanded(body.conv_in), *body.down_blocks, *map(_unbanded, last)]


class Decoder(nn.Module):
    """Unnormalised latents (B, h, w, z) to pixels (B, 16h, 16w, C), not clamped."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.post_quant_conv: Linear = Linear(config.z_dim, config.z_dim)
        self.decoder: _DecoderBody = _DecoderBody(config)

    @property
    def band(self) -> int:
        """Rows of the tail's input on whose multiples strips begin."""
        return BAND

    @property
    def stages(self) -> list[Stage]:
        """Everything that needs the whole image: up to and with all up-blocks but the tail's."""
        body = self.decoder
        layers: list[Layer] = [self.post_quant_conv, body.conv_in, *body.mid_block.stages]
        return [*map(_unbanded, layers), *body.up_blocks[:-TAIL]]

    @property
    def tail(self) -> list[Stage]:
        """The rest, where most of the memory goes; purely local, so it may be given strips of rows."""
        return [*self.decoder.up_blocks[-TAIL:], self.decoder.head]

    @property
    def tail_halo(self) -> int:
        """Rows above and below a strip that the tail must be given, in its input rows: its reach, in whole bands."""
        rows = 1  # conv_out
        for block in reversed(self.decoder.up_blocks[-TAIL:]):
            if "upsampler" in block:
                rows = -(-(rows + 1) // 2)  # its convolution, then back through the doubling
            rows += 2 * len(block.resnets)
        return -(-rows // BAND) * BAND

    @property
    def tail_scale(self) -> int:
        """Output rows per input row of the tail."""
        scale: int = 2 ** sum("upsampler" in block for block in self.decoder.up_blocks[-TAIL:])
        return scale


class _EncoderBody(nn.Module):
    def __init__(self, config: VAEConfig):
        super().__init__()
        dims = config.encoder_dims
        self.conv_in: Conv2d = Conv2d(config.in_channels, dims[0])
        levels = [level for level in config.levels if level["side"] == "encoder"]
        self.down_blocks: list[DownBlock] = [
            DownBlock(level, config.num_res_blocks, BAND << max(0, TAIL - 1 - n)) for n, level in enumerate(levels)
        ]
        self.mid_block: MidBlock = MidBlock(dims[-1])
        self.norm_out: ChannelNorm = ChannelNorm(dims[-1])
        self.conv_out: Conv2d = Conv2d(dims[-1], 2 * config.z_dim)

    def head(self, x: mx.array) -> mx.array:
        return self.conv_out(nn.silu(self.norm_out(x)))


class _DecoderBody(nn.Module):
    def __init__(self, config: VAEConfig):
        super().__init__()
        dims = config.decoder_dims
        levels = [level for level in config.levels if level["side"] == "decoder"]
        self.conv_in: Conv2d = Conv2d(config.z_dim, dims[0])
        self.mid_block: MidBlock = MidBlock(dims[0])
        first = max(0, len(levels) - TAIL)  # before the tail, bands only save memory
        bands = [BAND << max(0, n - first) for n in range(len(levels))]
        self.up_blocks: list[UpBlock] = [
            UpBlock(level, config.num_res_blocks + 1, band) for level, band in zip(levels, bands, strict=True)
        ]
        self.norm_out: ChannelNorm = ChannelNorm(dims[-1])
        self.conv_out: BandedConv2d = BandedConv2d(dims[-1], config.out_channels, bands[-1])

    def head(self, x: mx.array, on_band: OnLayer | None = None) -> mx.array:
        return self.conv_out(nn.silu(self.norm_out(x)), on_band)


class DownBlock(nn.Module):
    """Residual blocks and a halving of rows and columns, with the folded input added.

    Args:
        level: a row of `VAEConfig.levels`.
        num_resnets: how many residual blocks.
        band: rows that are computed at a time, before the halving, which saves memory.
    """

    def __init__(self, level: dict[str, Any], num_resnets: int, band: int):
        super().__init__()
        cin, cout = level["cin"], level["cout"]
        self.resnets: list[ResidualBlock] = [
            ResidualBlock(cin if n == 0 else cout, cout, band) for n in range(num_resnets)
        ]
        if level["resampled"]:
            self.downsampler: Downsample = Downsample(cout)
        self._shortcut = (cout, level["frames"], 2 if level["resampled"] else 1)

    def __call__(self, x: mx.array, on_band: OnLayer | None = None) -> mx.array:
        """(B, H, W, cin) to (B, H/2, W/2, cout), or (B, H, W, cout) in the last block."""
        out = _run([*self.resnets, *([self.downsampler] if "downsampler" in self else ())], x, on_band)
        return out + fold(x, *self._shortcut)


class UpBlock(nn.Module):
    """Residual blocks and a doubling of rows and columns, with the spread input added.

    Args:
        level: a row of `VAEConfig.levels`.
        num_resnets: how many residual blocks.
        band: rows that are computed at a time, before the doubling; None computes all at once.
    """

    def __init__(self, level: dict[str, Any], num_resnets: int, band: int | None):
        super().__init__()
        cin, cout = level["cin"], level["cout"]
        self.resnets: list[ResidualBlock] = [
            ResidualBlock(cin if n == 0 else cout, cout, band) for n in range(num_resnets)
        ]
        if level["resampled"]:
            self.upsampler: Upsample = Upsample(cout, cout, None if band is None else 2 * band)
        self._shortcut = (cout, level["frames"])

    def __call__(self, x: mx.array, on_band: OnLayer | None = None) -> mx.array:
        """(B, H, W, cin) to (B, 2H, 2W, cout), or (B, H, W, cout) in the last block."""
        if "upsampler" not in self:
            return _run(self.resnets, x, on_band)
        return _run([*self.resnets, self.upsampler], x, on_band) + spread(x, *self._shortcut)


def fold(x: mx.array, channels: int, frames: int, factor: int) -> mx.array:
    """Means of groups of what a cell of pixels holds; the shortcut around a level of the encoder.

    A cell's values are ordered (C, frame, row, column) and fall into `channels` equal groups. Of the frames only the
    last is not empty. Source: QwenImage21AvgDown3D.

    Args:
        x: (B, H, W, C).
        channels: of the result.
        frames: frames of a cell.
        factor: rows, and columns, of a cell.

    Returns:
        (B, H / factor, W / factor, channels).
    """
    b, h, w, c = x.shape
    cells = x.reshape(b, h // factor, factor, w // factor, factor, c).transpose(0, 1, 3, 5, 2, 4).flatten(4)
    cells = mx.pad(cells[:, :, :, :, None], [(0, 0)] * 4 + [(frames - 1, 0), (0, 0)])
    return cells.reshape(b, h // factor, w // factor, channels, -1).mean(axis=-1)


def spread(x: mx.array, channels: int, frames: int) -> mx.array:
    """Channels spread over 2x2 pixels and over frames, of which the last is kept; the decoder's shortcut.

    The values of the result's cells, ordered (channel, frame, row, column), take the input's channels in order, as many
    each. Source: QwenImage21DupUp3D with its first chunk.

    Args:
        x: (B, H, W, C).
        channels: of the result.
        frames: frames of a cell.

    Returns:
        (B, 2 H, 2 W, channels).
    """
    b, h, w, c = x.shape
    repeats = channels * frames * 4 // c
    first = (mx.arange(channels) * frames + frames - 1) * 4
    index = (first + mx.arange(4)[:, None]) // repeats  # (row and column of the cell, channel)
    cells = mx.take(x, index.flatten(), axis=-1).reshape(b, h, w, 2, 2, channels)
    return cells.transpose(0, 1, 3, 2, 4, 5).reshape(b, 2 * h, 2 * w, channels)


def _run(layers: list[Any], x: mx.array, on_band: OnLayer | None) -> mx.array:
    """Layers one after another, each told of as one band where it has none."""
    for layer in layers:
        x = layer(x) if isinstance(layer, Downsample) else layer(x, on_band)
        if on_band is not None:
            on_band([x])
    return x


def _unbanded(layer: Layer) -> Stage:
    """A layer that works on whole images, as a stage."""
    return lambda x, on_band=None: layer(x)
