"""What a checkpoint of Qwen3-VL says of its language model and of its vision tower."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ...config import read_config
from ...errors import CheckpointError


@dataclass(frozen=True)
class TextEncoderConfig:
    """`text_config` of `text_encoder/config.json`; defaults are the 8B model's."""

    hidden_size: int = 4096
    intermediate_size: int = 12288
    num_hidden_layers: int = 36
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int = 128
    vocab_size: int = 151936
    rms_norm_eps: float = 1e-6
    rope_theta: float = 5e6
    mrope_section: tuple[int, ...] = (24, 20, 20)
    attention_bias: bool = False

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str = "text_encoder/config.json") -> TextEncoderConfig:
        """Reads the JSON object; raises CheckpointError on ill-typed or impossible values."""
        _check_type(data, where)
        text = dict(data.get("text_config") or {})
        # The rotary settings stand under rope_scaling (transformers 4) or under rope_parameters (5).
        for key in ("rope_scaling", "rope_parameters"):
            text.update(text.get(key) or {})
        config = read_config(cls, text, f"{where} (text_config)", ignored=None)
        sections = config.mrope_section
        if len(sections) != 3 or 2 * sum(sections) != config.head_dim or 3 * max(sections[1:]) > sum(sections):
            raise CheckpointError(
                f"{where}: mrope_section {list(sections)} must be three numbers that add up to half of head_dim, "
                f"{config.head_dim // 2}, the last two at most a third of it each"
            )
        if config.num_attention_heads % config.num_key_value_heads:
            raise CheckpointError(f"{where}: num_attention_heads must be a multiple of num_key_value_heads")
        if config.attention_bias:
            raise CheckpointError(f"{where}: attention_bias is true; no released Qwen3-VL model has such weights")
        return config

    def to_dict(self) -> dict[str, Any]:
        """The layout of the released files, which `from_dict` reads."""
        text = asdict(self)
        rotary = {"mrope_interleaved": True, "mrope_section": text.pop("mrope_section"), "rope_type": "default"}
        return {"model_type": "qwen3_vl", "text_config": text | {"rope_scaling": rotary}}

    @property
    def query_dim(self) -> int:
        """Channels of all query heads together."""
        return self.num_attention_heads * self.head_dim

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
    """`vision_config` of `text_encoder/config.json`; defaults are the 8B model's."""

    depth: int = 27
    hidden_size: int = 1152
    intermediate_size: int = 4304
    num_heads: int = 16
    out_hidden_size: int = 4096
    in_channels: int = 3
    patch_size: int = 16
    temporal_patch_size: int = 2
    spatial_merge_size: int = 2
    num_position_embeddings: int = 2304
    deepstack_visual_indexes: tuple[int, ...] = (8, 16, 24)
    hidden_act: str = "gelu_pytorch_tanh"

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str = "text_encoder/config.json") -> VisionConfig:
        """Reads the `vision_config` of a text encoder's JSON object; raises CheckpointError where there is none."""
        _check_type(data, where)
        if not isinstance(data.get("vision_config"), dict):
            raise CheckpointError(f"{where} has no vision_config; an editing model needs one")
        config = read_config(cls, data["vision_config"], f"{where} (vision_config)", ignored=None)
        if config.head_dim % 4 or math.isqrt(config.num_position_embeddings) ** 2 != config.num_position_embeddings:
            raise CheckpointError(f"{where}: the vision_config's heads or position embeddings do not come out even")
        taps = config.deepstack_visual_indexes
        if list(taps) != sorted(set(taps)) or any(not 0 <= tap < config.depth for tap in taps):
            raise CheckpointError(
                f"{where}: deepstack_visual_indexes {list(taps)} must rise and lie below depth, {config.depth}"
            )
        if config.hidden_act != cls.hidden_act:
            raise CheckpointError(f"{where}: hidden_act is {config.hidden_act!r}; only {cls.hidden_act!r} is supported")
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
    def merged_size(self) -> int:
        """Width of the patches of one cell together."""
        return self.hidden_size * self.spatial_merge_size**2

    @property
    def position_side(self) -> int:
        """Rows, and columns, of the grid of learned positions."""
        return math.isqrt(self.num_position_embeddings)

    @property
    def blocks(self) -> Iterator[dict[str, Any]]:
        """One row per block for the weights map."""
        return ({"n": n} for n in range(self.depth))

    @property
    def taps(self) -> Iterator[dict[str, Any]]:
        """One row per block whose output also goes to the language model, for the weights map."""
        return ({"n": n} for n in range(len(self.deepstack_visual_indexes)))


def _check_type(data: Mapping[str, Any], where: str) -> None:
    if data.get("model_type", "qwen3_vl") != "qwen3_vl":
        raise CheckpointError(f"{where}: model_type is {data['model_type']!r}, but must be 'qwen3_vl'")
