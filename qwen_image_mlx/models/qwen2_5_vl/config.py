"""The configs of Qwen2.5-VL: the language model and the vision tower."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ...config import read_config
from ...errors import CheckpointError


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
        # The rotary settings moved twice: rope_scaling (transformers 4), rope_parameters (5), both with rope_theta.
        for key in ("rope_scaling", "rope_parameters"):
            text.update(text.get(key) or {})
        config = read_config(cls, text, where, ignored=None)
        if 2 * sum(config.mrope_section) != config.head_dim:
            raise CheckpointError(
                f"{where}: mrope_section {list(config.mrope_section)} must add up to half of the head dimension, "
                f"{config.head_dim // 2}"
            )
        return config

    def to_dict(self) -> dict[str, Any]:
        """The flat layout of the released files, which `from_dict` reads."""
        values = asdict(self)
        section = values.pop("mrope_section")
        return {"model_type": "qwen2_5_vl", **values, "rope_scaling": {"type": "mrope", "mrope_section": section}}

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
        """Reads the `vision_config` of a text encoder's JSON object; raises CheckpointError without one."""
        if not isinstance(data.get("vision_config"), dict):
            raise CheckpointError(f"{where} has no vision_config; an editing model needs one")
        config = read_config(cls, data["vision_config"], f"{where} (vision_config)", ignored=None)
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
