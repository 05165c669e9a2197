"""What a checkpoint says of itself: one frozen dataclass per component, read from the checkpoint's own JSON.

Knows nothing of files, arrays or pipelines. A key this package does not know is reported, never dropped in silence: a
flag such as `zero_cond_t` changes the picture. Field names are the checkpoint's, even where misspelt.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, dataclass, fields
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeVar

from .errors import CheckpointError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

logger: logging.Logger = logging.getLogger(__name__)

# What quantizers write into a config.json; the files themselves say how each tensor lies.
_PACKS = ("quantization", "quantization_config", "mlx_format")

T = TypeVar("T", bound="DataclassInstance")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**63  # nor is it NaN


def _is_integer(value: Any) -> bool:
    return type(value) is int and abs(value) < 2**63


def _is_list(value: Any, accepts: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and len(value) <= _LONGEST and all(map(accepts, value))


# Far above any model's, far below what would never be finished.
_HIGHEST = {"num_layers": 1000, "num_hidden_layers": 1000, "depth": 1000, "num_res_blocks": 100,
            "num_train_timesteps": 1_000_000}  # fmt: skip
_LONGEST = 1000  # entries of a list

# What each annotation used below accepts from JSON, and how it is stored.
_READERS: dict[str, tuple[Callable[[Any], bool], Callable[[Any], Any], str]] = {
    "int": (lambda v: _is_integer(v) and v > 0, int, "a positive integer"),
    "float": (_is_number, float, "a number"),
    "bool": (lambda v: isinstance(v, bool), bool, "true or false"),
    "str": (lambda v: isinstance(v, str), str, "a string"),
    "tuple[int, ...]": (lambda v: _is_list(v, _is_integer), tuple, "a list of integers"),
    "tuple[bool, ...]": (lambda v: _is_list(v, lambda i: type(i) is bool), tuple, "a list of booleans"),
    "tuple[float, ...]": (lambda v: _is_list(v, _is_number), tuple, "a list of numbers"),
}


def _read(cls: type[T], data: Mapping[str, Any], where: str, ignored: frozenset[str] | None) -> T:
    """Builds the dataclass `cls` from JSON; `ignored` names keys that may be passed over (None: any key may)."""
    known = {field.name: field for field in fields(cls)}
    values = {}
    for key, value in data.items():
        if key in known:
            accepts, convert, expected = _READERS[str(known[key].type)]
            if not accepts(value):
                raise CheckpointError(f"{where}: {key} is {value!r:.80}, but must be {expected}")
            if key in _HIGHEST and value > _HIGHEST[key]:
                raise CheckpointError(f"{where}: {key} is {value}, but at most {_HIGHEST[key]:,} work")
            values[key] = convert(value)
        elif ignored is not None and key not in ignored and not key.startswith("_"):
            logger.warning("%s: the key %r (%r) is not known to this version and has no effect", where, key, value)
    missing = [name for name, f in known.items() if f.default is MISSING and name not in values]
    if missing:
        raise CheckpointError(f"{where} lacks {', '.join(missing)}; the file is not that of a Qwen-Image model")
    return cls(**values)


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
        # pooled_projection_dim stands in older files and was never used.
        config = _read(cls, data, where, ignored=frozenset({"pooled_projection_dim", *_PACKS}))
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
        """One row per block for the weights map; the last block's text output is read by nobody."""
        return ({"n": n, "last": n == self.num_layers - 1} for n in range(self.num_layers))


@dataclass(frozen=True)
class TextEncoderConfig:
    """The language model of `text_encoder/config.json` (Qwen2.5-VL); defaults are the 7B model's."""

    hidden_size: int = 3584
    intermediate_size: int = 18944
    num_hidden_layers: int = 28
    num_attention_heads: int = 28
    num_key_value_heads: int = 4
    vocab_size: int = 152064
    rms_norm_eps: float = 1e-5  # the class default; the released file says 1e-6
    rope_theta: float = 1e6
    mrope_section: tuple[int, ...] = (16, 24, 24)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str = "text_encoder/config.json") -> TextEncoderConfig:
        """Reads the flat layout of the released files or the nested one (`text_config`) newer libraries write."""
        if data.get("model_type", "qwen2_5_vl") != "qwen2_5_vl":
            raise CheckpointError(f"{where}: model_type is {data['model_type']!r}, but must be 'qwen2_5_vl'")
        text = {**data, **data.get("text_config", {})}
        # The rotary settings moved twice: rope_scaling (transformers 4), rope_parameters (5), each beside rope_theta.
        for key in ("rope_scaling", "rope_parameters"):
            text.update(text.get(key) or {})
        config = _read(cls, text, where, ignored=None)
        if 2 * sum(config.mrope_section) != config.head_dim:
            raise CheckpointError(
                f"{where}: mrope_section {list(config.mrope_section)} must add up to half of the head dimension, "
                f"{config.head_dim // 2}"
            )
        return config

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def kv_dim(self) -> int:
        """Channels of all key (or value) heads together."""
        return self.num_key_value_heads * self.head_dim

    @property
    def layers(self) -> Iterator[dict[str, Any]]:
        """One row per decoder layer for the weights map."""
        return ({"n": n} for n in range(self.num_hidden_layers))


@dataclass(frozen=True)
class VisionConfig:
    """`vision_config` of `text_encoder/config.json` (Qwen2.5-VL); defaults are the 7B model's."""

    depth: int = 32
    hidden_size: int = 1280
    intermediate_size: int = 3420
    num_heads: int = 16
    out_hidden_size: int = 3584
    in_channels: int = 3
    patch_size: int = 14
    temporal_patch_size: int = 2
    spatial_merge_size: int = 2
    window_size: int = 112
    fullatt_block_indexes: tuple[int, ...] = (7, 15, 23, 31)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str = "text_encoder/config.json") -> VisionConfig:
        """Reads the `vision_config` of a text encoder's JSON object; raises CheckpointError where there is none."""
        if not isinstance(data.get("vision_config"), dict):
            raise CheckpointError(f"{where} has no vision_config; an editing model needs one")
        config = _read(cls, data["vision_config"], f"{where} (vision_config)", ignored=None)
        if config.head_dim % 4 or config.window_size % (config.patch_size * config.spatial_merge_size):
            raise CheckpointError(f"{where}: the vision_config's head or window size does not come out even")
        return config

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def patch_pixels(self) -> int:
        """Values of one patch of one frame."""
        return self.in_channels * self.patch_size**2

    @property
    def window_cells(self) -> int:
        """Side of an attention window in merged cells."""
        return self.window_size // self.patch_size // self.spatial_merge_size

    @property
    def merged_size(self) -> int:
        """Width of the patches of one cell together."""
        return self.hidden_size * self.spatial_merge_size**2

    @property
    def blocks(self) -> Iterator[dict[str, Any]]:
        """One row per block for the weights map."""
        return ({"n": n} for n in range(self.depth))


@dataclass(frozen=True)
class ImageProcessorConfig:
    """`processor/preprocessor_config.json` (Qwen2VLImageProcessor); defaults are its class's."""

    min_pixels: int = 56 * 56
    max_pixels: int = 28 * 28 * 1280
    image_mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)

    @classmethod
    def from_dict(
        cls, data: Mapping[str, Any], where: str = "processor/preprocessor_config.json"
    ) -> ImageProcessorConfig:
        """Reads the pixel limits under their old names or under `size`, as `shortest_edge` and `longest_edge`."""
        size = data.get("size") or {}
        limits = {
            "min_pixels": data.get("min_pixels") or size.get("shortest_edge") or size.get("min_pixels"),
            "max_pixels": data.get("max_pixels") or size.get("longest_edge") or size.get("max_pixels"),
        }
        data = {**data, **limits}
        return _read(cls, {k: v for k, v in data.items() if v is not None}, where, ignored=None)


@dataclass(frozen=True)
class GenerationConfig:
    """`text_encoder/generation_config.json`: how the language model writes; defaults are transformers' own."""

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    eos_token_id: tuple[int, ...] = (151645, 151643)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str = "text_encoder/generation_config.json") -> GenerationConfig:
        """Reads the JSON object; a single `eos_token_id` may stand without its list, and a `top_k` of 0 keeps all."""
        end = data.get("eos_token_id")
        data = {**data, "eos_token_id": end if isinstance(end, list) else [end]}
        if data.get("top_k") == 0:
            data["top_k"] = sys.maxsize
        return _read(cls, {k: v for k, v in data.items() if v not in (None, [None])}, where, ignored=None)


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
        config = _read(cls, data, where, ignored=frozenset(_PACKS))
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
        """One row per residual block: where it stands and its channels."""
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
        """One row for the encoder and one for the decoder, for what both have once."""
        yield {"side": "encoder", "cin": self.input_channels, "first": self.base_dim, "last": self.top_dim,
               "cout": 2 * self.z_dim, "quant": "quant_conv", "code": 2 * self.z_dim}  # fmt: skip
        yield {"side": "decoder", "cin": self.z_dim, "first": self.top_dim, "last": self.base_dim * self.dim_mult[0],
               "cout": self.input_channels, "quant": "post_quant_conv", "code": self.z_dim}  # fmt: skip


@dataclass(frozen=True)
class SchedulerConfig:
    """`scheduler/scheduler_config.json` of a FlowMatchEulerDiscreteScheduler.

    Defaults are the pipelines' fall-backs for absent keys, which differ from what the released files say.
    """

    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096
    base_shift: float = 0.5
    max_shift: float = 1.15
    shift: float = 1.0
    shift_terminal: float = 0.0  # 0: no terminal stretch
    use_dynamic_shifting: bool = False
    time_shift_type: str = "exponential"
    num_train_timesteps: int = 1000

    # Sampling variants the family does not use; a file that turns one on would be sampled wrongly.
    _UNSUPPORTED = ("invert_sigmas", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas",
                    "stochastic_sampling")  # fmt: skip

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str = "scheduler/scheduler_config.json") -> SchedulerConfig:
        """Reads and checks the JSON object; raises CheckpointError on what this package does not sample."""
        on = [key for key in cls._UNSUPPORTED if data.get(key)]
        if on:
            raise CheckpointError(f"{where}: {on[0]} is on; Qwen-Image models are not sampled that way")
        # diffusers writes `false` or `null` for "no terminal stretch".
        data = {**data, "shift_terminal": data.get("shift_terminal") or 0.0}
        config = _read(cls, data, where, ignored=frozenset(cls._UNSUPPORTED))
        if config.time_shift_type not in ("exponential", "linear"):
            raise CheckpointError(
                f"{where}: time_shift_type {config.time_shift_type!r} is neither exponential nor linear"
            )
        return config
