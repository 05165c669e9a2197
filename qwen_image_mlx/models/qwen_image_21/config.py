"""What a checkpoint of Qwen-Image-2.1 says of its transformer and of its autoencoder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from ...config import PACKS, read_config
from ...errors import CheckpointError


@dataclass(frozen=True)
class TransformerConfig:
    """`transformer/config.json` of a QwenImage21Transformer2DModel; defaults are diffusers' own."""

    num_layers: int = 32
    num_attention_heads: int = 32
    attention_head_dim: int = 128
    context_in_dim: int = 4096
    in_channels: int = 64
    out_channels: int = 64
    patch_size: int = 1
    mlp_ratio: int = 3
    axes_dims_rope: tuple[int, ...] = (16, 56, 56)
    eps: float = 1e-6
    causal_condition: bool = True

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str = "transformer/config.json") -> TransformerConfig:
        """Reads and checks the JSON object; raises CheckpointError on ill-typed or impossible values."""
        if data.get("out_channels", 0) is None:  # as many as come in
            data = {**data, "out_channels": data.get("in_channels", cls.in_channels)}
        config = read_config(cls, data, where, ignored=frozenset(PACKS))
        dims = config.axes_dims_rope
        if len(dims) != 3 or sum(dims) != config.attention_head_dim or any(d % 2 or d < 0 for d in dims):
            raise CheckpointError(
                f"{where}: axes_dims_rope {list(dims)} must be three even numbers that add up to attention_head_dim, "
                f"{config.attention_head_dim}"
            )
        if config.patch_size != 1:
            raise CheckpointError(f"{where}: patch_size is {config.patch_size}; only 1 is supported")
        if not config.causal_condition:
            raise CheckpointError(
                f"{where}: causal_condition is false; every released Qwen-Image-2.1 model has it true"
            )
        return config

    @property
    def dim(self) -> int:
        """Width of the stream."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def inner_dim(self) -> int:
        """Width inside the MLPs."""
        return self.mlp_ratio * self.dim

    @property
    def blocks(self) -> Iterator[dict[str, Any]]:
        """One row per block for the weights map."""
        return ({"n": n} for n in range(self.num_layers))


@dataclass(frozen=True)
class VAEConfig:
    """`vae/config.json` of an AutoencoderKLQwenImage21; defaults are diffusers' own."""

    base_dim: int = 96
    decoder_base_dim: int = 144
    z_dim: int = 64
    dim_mult: tuple[int, ...] = (1, 2, 4, 8, 8)
    num_res_blocks: int = 2
    attn_scales: tuple[float, ...] = ()
    temperal_downsample: tuple[bool, ...] = (False, True, True, True)
    dropout: float = 0.0
    is_residual: bool = True
    in_channels: int = 4
    out_channels: int = 4
    patch_size: int = 1
    latents_mean: tuple[float, ...] = (
        *(0.5126, 0.7721, -0.0631, 1.3506, -0.7855, -2.1025, -0.3458, 1.3722),
        *(1.8873, -1.7177, -0.6510, 0.2732, 0.7562, -0.6163, -1.0277, 3.8363),
        *(2.0210, 0.0472, 0.9320, 2.0087, 2.4954, -0.1391, -1.4249, 1.8464),
        *(-0.5236, 1.2826, 3.7046, -1.3035, 2.7286, -1.4518, -1.9036, -1.9955),
        *(-0.0342, -1.0265, -0.7636, 3.0555, 0.0746, -3.0751, -0.1076, 1.7376),
        *(-1.0914, -1.9435, -0.2784, -1.3680, 0.4809, -0.4433, 0.3764, 0.5729),
        *(-2.0595, 1.0960, -1.3260, -2.0211, -5.0179, 0.5275, 4.0162, 1.8505),
        *(0.3026, 1.9373, 1.4937, 0.2632, 0.5547, -1.7121, -0.1562, 0.0304),
    )
    latents_std: tuple[float, ...] = (
        *(3.2001, 3.2936, 3.4321, 3.0091, 3.1061, 4.0379, 4.0705, 3.7910),
        *(3.0785, 3.6500, 3.9308, 3.0904, 2.8778, 3.7675, 3.7320, 5.0756),
        *(3.2864, 4.0397, 3.1317, 4.0443, 2.9249, 3.9454, 3.0988, 4.2489),
        *(3.4896, 3.8513, 3.9323, 3.4719, 3.7498, 4.2830, 3.5694, 4.2467),
        *(3.9037, 3.2947, 5.0770, 3.5075, 3.2700, 3.4767, 2.8063, 5.1125),
        *(3.5327, 4.7833, 3.1286, 4.1819, 3.8527, 3.8312, 3.5605, 4.3875),
        *(3.9624, 4.0168, 3.5643, 4.0550, 5.5614, 4.2963, 4.4080, 3.4959),
        *(3.8747, 3.7608, 3.5735, 3.1490, 3.7662, 3.6746, 3.4563, 3.8161),
    )

    # What tiling and video need; neither is done here.
    _UNUSED = frozenset({"scale_factor_temporal", "scale_factor_spatial"})

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str = "vae/config.json") -> VAEConfig:
        """Reads and checks the JSON object; raises CheckpointError on ill-typed or impossible values."""
        fields = dict(data)
        if fields.get("patch_size", 1) is None:
            del fields["patch_size"]
        if fields.get("decoder_base_dim", 0) is None:  # as wide as the encoder
            fields["decoder_base_dim"] = fields.get("base_dim", cls.base_dim)
        config = read_config(cls, fields, where, ignored=cls._UNUSED | {*PACKS})
        for name, only in (("attn_scales", ()), ("is_residual", True), ("patch_size", 1)):
            if getattr(config, name) != only:
                raise CheckpointError(f"{where}: {name} is {fields[name]!r:.80}; only {only!r} is supported")
        if len(config.temperal_downsample) != len(config.dim_mult) - 1:
            raise CheckpointError(f"{where}: temperal_downsample must have one entry less than dim_mult")
        for name in ("latents_mean", "latents_std"):
            if len(getattr(config, name)) != config.z_dim:
                raise CheckpointError(
                    f"{where}: {name} has {len(getattr(config, name))} values, not z_dim {config.z_dim}"
                )
        if config.in_channels != config.out_channels:
            raise CheckpointError(f"{where}: in_channels and out_channels differ; only equal ones are supported")
        bad = [row["path"] for row in config.levels if row["has_shortcut"] and row["wide"] % row["narrow"]]
        if bad:
            raise CheckpointError(f"{where}: the channels of {bad[0]} do not come out even: check dim_mult")
        return config

    @property
    def input_channels(self) -> int:
        """Channels of pixels, on either side."""
        return self.in_channels

    @property
    def decoder_width(self) -> int:
        """Channels of the decoder at the size of the image."""
        return self.decoder_base_dim

    @property
    def spatial_factor(self) -> int:
        """Pixels per latent, along one side."""
        factor: int = 2 ** (len(self.dim_mult) - 1)
        return factor

    @property
    def encoder_dims(self) -> tuple[int, ...]:
        """Channels before the first encoder level and after each."""
        return tuple(self.base_dim * m for m in (1, *self.dim_mult))

    @property
    def decoder_dims(self) -> tuple[int, ...]:
        """Channels before the first decoder level and after each."""
        return tuple(self.decoder_base_dim * m for m in (self.dim_mult[-1], *reversed(self.dim_mult)))

    @property
    def levels(self) -> Iterator[dict[str, Any]]:
        """One row per level of either side.

        `frames` is how many frames its shortcut folds into one, or makes of one; `resampled` whether it changes rows
        and columns. The shortcut has `wide` values for each position on its coarser grid, in equal groups for the
        `narrow` channels of the other end.
        """
        last = len(self.dim_mult) - 1
        sides = (
            ("encoder", "down_blocks", self.encoder_dims, self.temperal_downsample),
            ("decoder", "up_blocks", self.decoder_dims, self.temperal_downsample[::-1]),
        )
        for side, blocks, dims, temporal in sides:
            for level, (cin, cout) in enumerate(pairwise(dims)):
                resampled = level < last
                frames = 2 if resampled and temporal[level] else 1
                wide, narrow = (cin, cout) if side == "encoder" else (cout, cin)
                yield {
                    "path": f"{side}.{blocks}.{level}", "side": side, "cin": cin, "cout": cout, "frames": frames,
                    "resampled": resampled, "temporal": frames > 1,
                    "has_shortcut": side == "encoder" or resampled,
                    "wide": wide * frames * (4 if resampled else 1), "narrow": narrow,
                }  # fmt: skip

    @property
    def resnets(self) -> Iterator[dict[str, Any]]:
        """One row per residual block for the weights map: where it stands and its channels."""
        for side, dim in (("encoder", self.encoder_dims[-1]), ("decoder", self.decoder_dims[0])):
            for n in range(2):
                path = f"{side}.mid_block.resnets.{n}"
                yield {"path": path, "side": side, "cin": dim, "cout": dim, "shortcut": False}
        for level in self.levels:
            cin, cout = level["cin"], level["cout"]
            for n in range(self.num_res_blocks + (level["side"] == "decoder")):
                path = f"{level['path']}.resnets.{n}"
                yield {"path": path, "side": level["side"], "cin": cin, "cout": cout, "shortcut": cin != cout}
                cin = cout

    @property
    def resamplers(self) -> Iterator[dict[str, Any]]:
        """One row per resampler for the weights map; a `time_conv` is never used for a single image."""
        names = {"encoder": ("downsampler", 1), "decoder": ("upsampler", 2)}
        for level in (level for level in self.levels if level["resampled"]):
            name, frames = names[level["side"]]
            dim = level["cout"]
            yield {"path": f"{level['path']}.{name}", "side": level["side"], "dim": dim, "time_out": frames * dim,
                   "temporal": level["temporal"]}  # fmt: skip

    @property
    def sides(self) -> Iterator[dict[str, Any]]:
        """One row for the encoder and one for the decoder, for what both have once."""
        yield {"side": "encoder", "cin": self.in_channels, "first": self.encoder_dims[0],
               "middle": self.encoder_dims[-1], "last": self.encoder_dims[-1], "cout": 2 * self.z_dim,
               "quant": "quant_conv", "code": 2 * self.z_dim}  # fmt: skip
        yield {"side": "decoder", "cin": self.z_dim, "first": self.decoder_dims[0], "middle": self.decoder_dims[0],
               "last": self.decoder_dims[-1], "cout": self.out_channels, "quant": "post_quant_conv",
               "code": self.z_dim}  # fmt: skip
