"""PEFT's settings of a LoRA, which determine its scale: in the file's header, or in adapter_config.json."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..outside import why_not_read

_PEFT_METADATA = "lora_adapter_metadata"
_PEFT_WEIGHTS, _PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
_MAX_SETTINGS = 4_000_000  # bytes


@dataclass(frozen=True)
class PeftConfig:
    """The settings of PEFT that determine a scale.

    Source: `update_layer` of PEFT's LoraLayer, LoHaLayer and LoKrLayer, `get_pattern_key` of peft.utils.
    """

    rank: int
    alpha: float
    ranks: tuple[tuple[re.Pattern[str], Any], ...] = ()
    alphas: tuple[tuple[re.Pattern[str], Any], ...] = ()
    rank_stabilized: bool = False
    decomposed: bool = False

    def rank_of(self, target: str) -> int:
        """The rank of a target: the first pattern that fits the end of its name, else the common one."""
        return next((rank for pattern, rank in self.ranks if pattern.match(target)), self.rank)

    def scale_of(self, target: str) -> float:
        """alpha / rank, or alpha / sqrt(rank) for rank-stabilized LoRA."""
        alpha = next((alpha for pattern, alpha in self.alphas if pattern.match(target)), self.alpha)
        rank = self.rank_of(target)
        return alpha / (math.sqrt(rank) if self.rank_stabilized else rank)


# --- PEFT's settings -------------------------------------------------------------------------------------------------


def peft_config(path: Path, metadata: Mapping[str, str]) -> PeftConfig | None:
    """PEFT's settings: those diffusers writes into the file's header, else PEFT's adapter_config.json next to it.

    Raises:
        CheckpointError: they cannot be read, or lack the rank or alpha.
    """
    if _PEFT_METADATA in metadata:
        settings = _json_object(f"the {_PEFT_METADATA} of {path}", metadata[_PEFT_METADATA])
        own = {key.removeprefix("transformer."): value for key, value in settings.items() if _is_transformer(key)}
        # `save_lora_adapter` writes the settings of one model, `save_lora_weights` those of each by its name.
        settings = own or {key: value for key, value in settings.items() if "." not in key}
        where = f"the {_PEFT_METADATA} of {path}"
    elif path.name == _PEFT_WEIGHTS and (config := path.with_name(_PEFT_CONFIG)).is_file():
        try:
            if why := why_not_read(config, _MAX_SETTINGS):
                raise CheckpointError(f"{config} cannot be read, {why}: remove it, or save the LoRA again")
            settings = _json_object(str(config), config.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{config} cannot be read ({error}): download it again") from error
        where = str(config)
    else:
        return None
    return _config(where, settings) if settings else None


def _is_transformer(key: str) -> bool:
    return key.startswith("transformer.")


def _json_object(where: str, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is not JSON ({error}): save the LoRA again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{where} is not a JSON object: save the LoRA again")
    return value


def _config(where: str, settings: Mapping[str, Any]) -> PeftConfig:
    rank = settings.get("r")
    alpha = settings.get("lora_alpha", settings.get("alpha"))  # LoHa and LoKr call it alpha
    if not _is_positive_int(rank):
        raise CheckpointError(f"{where} gives the rank r as {rank!r:.80}, not a whole number above 0: correct it")
    if not _is_number(alpha):
        raise CheckpointError(f"{where} gives lora_alpha as {alpha!r:.80}, not a number: correct it")
    return PeftConfig(
        rank,
        alpha,
        _patterns(where, "rank_pattern", settings, _is_positive_int),
        _patterns(where, "alpha_pattern", settings, _is_number),
        bool(settings.get("use_rslora")),
        bool(settings.get("use_dora")),
    )


# What a file's pattern may contain, so that matching is fast: repetitions are never nested.
_PATTERN = re.compile(r"\^?(?:(?:\\[.d_-]|[\w.-]|\[[\w.-]+\])[*+?]?|\((?:\?:)?[\w.|-]+\))*\$?")
_PATTERN_LENGTH, _REPEATING = 200, 16
_REPEATS = re.compile(r"(?<!\()[*+?]")


def _patterns(
    where: str, field: str, settings: Mapping[str, Any], fits: Callable[[Any], bool]
) -> tuple[tuple[re.Pattern[str], Any], ...]:
    patterns = settings.get(field) or {}
    if not isinstance(patterns, dict) or not all(fits(value) for value in patterns.values()):
        raise CheckpointError(f"{where} has a {field} that does not map names to numbers: correct it")
    for pattern in patterns:
        if len(pattern) > _PATTERN_LENGTH or not _PATTERN.fullmatch(pattern) or len(_REPEATS.findall(pattern)) > 2:
            raise CheckpointError(
                f"{where} has an impossible pattern in {field}, {pattern!r:.80}: names may have '.', '\\.', '\\d', "
                "[a-z], (a|b) and at most two of * + ?"
            )
    if sum(bool(_REPEATS.search(pattern)) for pattern in patterns) > _REPEATING:
        raise CheckpointError(f"{where} has more than {_REPEATING} patterns with * + ? in {field}: write names instead")
    try:
        return tuple((re.compile(rf"(.*\.)?({pattern})$"), value) for pattern, value in patterns.items())
    except re.error as error:
        raise CheckpointError(f"{where} has an impossible pattern in {field} ({error}): correct it") from error


def _is_positive_int(value: Any) -> bool:
    return type(value) is int and value > 0


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)
