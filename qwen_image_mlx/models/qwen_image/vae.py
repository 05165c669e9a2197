"""The autoencoder between pixels and latents, in the 2-D form that a single image needs.

For one frame every causal 3-D convolution of the reference sees zeros in front of the frame, so only its last temporal
tap meets data, and the temporal resamplers never run; the loader keeps just those taps. Arrays are (B, H, W, C).
Nothing is evaluated here: `Encoder.stages` and `Decoder.stages` let the caller do it between blocks and bands, and
`Decoder.tail` lets it work on strips of rows. A matrix product's rounding depends on its shape and, on some backends,
on a row's place in it; so the tail computes its convolutions in bands of fixed height counted from the top, and strips
that begin on a band's edge give the very bits of the whole.

Formulas: diffusers' autoencoder_kl_qwenimage.py.
"""

from __future__ import annotations

from itertools import pairwise

import mlx.core as mx

from .. import nn
from ..autoencoder import (
    BAND,
    BandedConv2d,
    ChannelNorm,
    Downsample,
    MidBlock,
    ResidualBlock,
    Stage,
    Upsample,
    without_bands,
)
from ..layers import Conv2d, Linear, OnLayer
from .config import VAEConfig


class Encoder(nn.Module):
    """Pixels (B, H, W, C) in [-1, 1] to latent mean and log-variance (B, H/8, W/8, 2 z), both unnormalised."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.encoder: _EncoderBody = _EncoderBody(config)
        self.quant_conv: Linear = Linear(2 * config.z_dim, 2 * config.z_dim)

    @property
    def stages(self) -> list[Stage]:
        """The network as consecutive functions."""
        body = self.encoder
        layers = [body.conv_in, *body.down_blocks, *body.mid_block.stages, body.head, self.quant_conv]
        return [without_bands(layer) for layer in layers]


class Decoder(nn.Module):
    """Unnormalised latents (B, h, w, z) to pixels (B, 8h, 8w, C), not clamped."""

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
        """Everything that needs the whole image: up to and with all up-blocks but the last two."""
        body = self.decoder
        layers = [self.post_quant_conv, body.conv_in, *body.mid_block.stages]
        return [*map(without_bands, layers), *(stage for block in body.up_blocks[:-2] for stage in block.stages)]

    @property
    def tail(self) -> list[Stage]:
        """The last layers, which take most of the memory; purely local, so they can run on strips of rows."""
        body = self.decoder
        return [*(stage for block in body.up_blocks[-2:] for stage in block.stages), body.head]

    @property
    def tail_halo(self) -> int:
        """Rows above and below a strip that the tail needs, in its input rows: its reach, in whole bands."""
        rows = 1  # conv_out
        for block in reversed(self.decoder.up_blocks[-2:]):
            if "upsamplers" in block:
                rows = -(-(rows + 1) // 2)  # its convolution, then back through the doubling
            rows += 2 * len(block.resnets)
        return -(-rows // BAND) * BAND

    @property
    def tail_scale(self) -> int:
        """Output rows per input row of the tail."""
        return 2 ** sum("upsamplers" in block for block in self.decoder.up_blocks[-2:])


class _EncoderBody(nn.Module):
    def __init__(self, config: VAEConfig):
        super().__init__()
        dims = config.encoder_dims
        self.conv_in: Conv2d = Conv2d(config.input_channels, dims[0])
        self.down_blocks: list[nn.Module] = []
        for level, (cin, cout) in enumerate(pairwise(dims)):
            for _ in range(config.num_res_blocks):
                self.down_blocks.append(ResidualBlock(cin, cout))
                cin = cout
            if level < len(dims) - 2:
                self.down_blocks.append(Downsample(cout))
        self.mid_block: MidBlock = MidBlock(dims[-1])
        self.norm_out: ChannelNorm = ChannelNorm(dims[-1])
        self.conv_out: Conv2d = Conv2d(dims[-1], 2 * config.z_dim)

    def head(self, x: mx.array) -> mx.array:
        return self.conv_out(nn.silu(self.norm_out(x)))


class _DecoderBody(nn.Module):
    def __init__(self, config: VAEConfig):
        super().__init__()
        levels = config.decoder_levels
        bands = [None] * (len(levels) - 2) + [BAND, 2 * BAND]
        self.conv_in: Conv2d = Conv2d(config.z_dim, config.top_dim)
        self.mid_block: MidBlock = MidBlock(config.top_dim)
        self.up_blocks: list[UpBlock] = [
            UpBlock(cin, cout, config.num_res_blocks + 1, level < len(levels) - 1, *bands[level : level + 2])
            for level, (cin, cout) in enumerate(levels)
        ]
        self.norm_out: ChannelNorm = ChannelNorm(levels[-1][1])
        self.conv_out: BandedConv2d = BandedConv2d(levels[-1][1], config.input_channels, bands[-1])

    def head(self, x: mx.array, on_band: OnLayer | None = None) -> mx.array:
        return self.conv_out(nn.silu(self.norm_out(x)), on_band)


class UpBlock(nn.Module):
    """Residual blocks, then a doubling of rows and columns that halves the channels; each in its bands of rows."""

    def __init__(
        self, cin: int, cout: int, num_resnets: int, upsample: bool, band: int | None, doubled: int | None = None
    ):
        super().__init__()
        self.resnets: list[ResidualBlock] = [
            ResidualBlock(cin if n == 0 else cout, cout, band) for n in range(num_resnets)
        ]
        if upsample:
            self.upsamplers: list[Upsample] = [Upsample(cout, cout // 2, doubled)]

    @property
    def stages(self) -> list[Stage]:
        """The block as consecutive functions."""
        return [*self.resnets, *(self.upsamplers if "upsamplers" in self else ())]
