"""The configs of Qwen-Image 1.x: transformer and autoencoder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from ...config import PACKS, read_config
from ...errors import CheckpointError


@dataclass(frozen=True)
class TransformerConfig:
    """`transformer/config.json` of a QwenImageTransformer2DModel; defaults are diffusers' own."""

    num_layers: int = 60
    num_attention_heads: int = 24
    attention_head_dim: int = 128
    joint_attention_dim: int = 3584
    in_channels: int = 64
    out_channels: int = 16
    patch_size: int = 2
    axes_dims_rope: tuple[int, ...] = (16, 56, 56)
    guidance_embeds: bool = False
    zero_cond_t: bool = False
    use_additional_t_cond: bool = False
    use_layer3d_rope: bool = False

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str = "transformer/config.json") -> TransformerConfig:
        """Reads and checks the JSON object; raises CheckpointError on ill-typed or impossible values."""
        # pooled_projection_dim is in older files and was never used.
        config = read_config(cls, data, where, ignored=frozenset({"pooled_projection_dim", *PACKS}))
        if sum(config.axes_dims_rope) != config.attention_head_dim or any(d % 2 for d in config.axes_dims_rope):
            raise CheckpointError(
                f"{where}: axes_dims_rope {list(config.axes_dims_rope)} must be even numbers that add up to "
                f"attention_head_dim, {config.attention_head_dim}"
            )
        if config.guidance_embeds:
            raise CheckpointError(f"{where}: guidance_embeds is true; no released Qwen-Image model has such weights")
        return config

    @property
    def dim(self) -> int:
        """Width of both streams."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def modulation_size(self) -> int:
        """Values of one timestep's modulation: shift, scale and gate, twice, of both streams, and the output's two."""
        return (12 * self.num_layers + 2) * self.dim

    @property
    def patch_channels(self) -> int:
        """Channels of one output token: `out_channels` for each pixel of a patch."""
        return self.patch_size**2 * self.out_channels

    @property
    def blocks(self) -> Iterator[dict[str, Any]]:
        """One row per block for the weights map; the last block's text output is not used."""
        return ({"n": n, "last": n == self.num_layers - 1} for n in range(self.num_layers))


@dataclass(frozen=True)
class VAEConfig:
    """`vae/config.json` of an AutoencoderKLQwenImage; defaults are diffusers' own."""

    base_dim: int = 96
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    attn_scales: tuple[float, ...] = ()
    temperal_downsample: tuple[bool, ...] = (False, True, True)
    dropout: float = 0.0
    input_channels: int = 3
    latents_mean: tuple[float, ...] = (
        *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
        *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
    )
    latents_std: tuple[float, ...] = (
        *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
        *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
    )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str = "vae/config.json") -> VAEConfig:
        """Reads and checks the JSON object; raises CheckpointError on ill-typed or impossible values."""
        config = read_config(cls, data, where, ignored=frozenset(PACKS))
        if config.attn_scales:
            raise CheckpointError(f"{where}: attn_scales is {list(config.attn_scales)}; only [] is supported")
        if len(config.temperal_downsample) != len(config.dim_mult) - 1:
            raise CheckpointError(f"{where}: temperal_downsample must have one entry less than dim_mult")
        for name in ("latents_mean", "latents_std"):
            if len(getattr(config, name)) != config.z_dim:
                raise CheckpointError(
                    f"{where}: {name} has {len(getattr(config, name))} values, not z_dim {config.z_dim}"
                )
        return config

    @property
    def decoder_width(self) -> int:
        """Channels of the decoder at the size of the image."""
        return self.base_dim

    @property
    def spatial_factor(self) -> int:
        """Pixels per latent, along one side."""
        factor: int = 2 ** (len(self.dim_mult) - 1)
        return factor

    @property
    def top_dim(self) -> int:
        """Channels of the mid blocks."""
        return self.base_dim * self.dim_mult[-1]

    @property
    def encoder_dims(self) -> tuple[int, ...]:
        """Channels before the first encoder level and after each."""
        return tuple(self.base_dim * m for m in (1, *self.dim_mult))

    @property
    def decoder_levels(self) -> tuple[tuple[int, int], ...]:
        """(channels in, channels out) of each `up_blocks` entry; every upsampler in between halves the channels."""
        dims = [self.base_dim * m for m in (self.dim_mult[-1], *reversed(self.dim_mult))]
        return tuple((dims[i] // (2 if i else 1), dims[i + 1]) for i in range(len(self.dim_mult)))

    @property
    def resnets(self) -> Iterator[dict[str, Any]]:
        """One row per residual block: its place and channels."""
        for side in ("encoder", "decoder"):
            for n in range(2):
                path = f"{side}.mid_block.resnets.{n}"
                yield {"path": path, "side": side, "cin": self.top_dim, "cout": self.top_dim, "shortcut": False}
        for level, (cin, cout) in enumerate(pairwise(self.encoder_dims)):
            first = level * (self.num_res_blocks + 1)
            for n in range(self.num_res_blocks):
                path = f"encoder.down_blocks.{first + n}"
                yield {"path": path, "side": "encoder", "cin": cin, "cout": cout, "shortcut": cin != cout}
                cin = cout
        for level, (cin, cout) in enumerate(self.decoder_levels):
            for n in range(self.num_res_blocks + 1):
                path = f"decoder.up_blocks.{level}.resnets.{n}"
                yield {"path": path, "side": "decoder", "cin": cin, "cout": cout, "shortcut": cin != cout}
                cin = cout

    @property
    def resamplers(self) -> Iterator[dict[str, Any]]:
        """One row per resampler; those that also resample time carry a `time_conv` no single image ever uses."""
        levels = len(self.dim_mult)
        for level in range(levels - 1):
            path = f"encoder.down_blocks.{level * (self.num_res_blocks + 1) + self.num_res_blocks}"
            dim, temporal = self.encoder_dims[level + 1], self.temperal_downsample[level]
            yield {"path": path, "side": "encoder", "cin": dim, "cout": dim, "time_out": dim, "temporal": temporal}
        for level in range(levels - 1):
            dim, temporal = self.decoder_levels[level][1], self.temperal_downsample[::-1][level]
            yield {
                "path": f"decoder.up_blocks.{level}.upsamplers.0",
                "side": "decoder",
                "cin": dim,
                "cout": dim // 2,
                "time_out": 2 * dim,
                "temporal": temporal,
            }

    @property
    def sides(self) -> Iterator[dict[str, Any]]:
        """One row for the encoder and one for the decoder, for the layers that each has once."""
        yield {"side": "encoder", "cin": self.input_channels, "first": self.base_dim, "last": self.top_dim,
               "cout": 2 * self.z_dim, "quant": "quant_conv", "code": 2 * self.z_dim}  # fmt: skip
        yield {"side": "decoder", "cin": self.z_dim, "first": self.top_dim, "last": self.base_dim * self.dim_mult[0],
               "cout": self.input_channels, "quant": "post_quant_conv", "code": self.z_dim}  # fmt: skip
