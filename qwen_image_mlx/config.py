"""A checkpoint's JSON configs as frozen dataclasses; here those that all models share.

The configs of the networks are with them, in `models/<family>/config.py`.

Independent of files, arrays and pipelines. A key this package does not know is reported, never silently dropped: a
flag such as `zero_cond_t` changes the image. Field names are the checkpoint's, even where misspelt.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, TypeVar

from .errors import CheckpointError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

logger: logging.Logger = logging.getLogger(__name__)

# Keys that quantizers write into a config.json; the weights files determine how each tensor is stored.
PACKS = ("quantization", "quantization_config", "mlx_format")

T = TypeVar("T", bound="DataclassInstance")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**63  # nor is it NaN


def _is_integer(value: Any) -> bool:
    return type(value) is int and abs(value) < 2**63


def _is_list(value: Any, accepts: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and len(value) <= _MAX_ENTRIES and all(map(accepts, value))


# Far above any model's, but small enough to finish.
_MAXIMA = {"num_layers": 1000, "num_hidden_layers": 1000, "depth": 1000, "num_res_blocks": 100,
            "num_train_timesteps": 1_000_000}  # fmt: skip
_MAX_ENTRIES = 1000  # entries of a list

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


def read_config(cls: type[T], data: Mapping[str, Any], where: str, ignored: frozenset[str] | None) -> T:
    """Builds the dataclass `cls` from JSON; `ignored` names unknown keys to skip without a warning (None: all)."""
    known = {field.name: field for field in fields(cls)}
    values = {}
    for key, value in data.items():
        if key in known:
            accepts, convert, expected = _READERS[str(known[key].type)]
            if not accepts(value):
                raise CheckpointError(f"{where}: {key} is {value!r:.80}, but must be {expected}")
            if key in _MAXIMA and value > _MAXIMA[key]:
                raise CheckpointError(f"{where}: {key} is {value}, but at most {_MAXIMA[key]:,} work")
            values[key] = convert(value)
        elif ignored is not None and key not in ignored and not key.startswith("_"):
            logger.warning("%s: the key %r (%r) is not known to this version and has no effect", where, key, value)
    missing = [name for name, f in known.items() if f.default is MISSING and name not in values]
    if missing:
        raise CheckpointError(f"{where} lacks {', '.join(missing)}; the file is not that of a Qwen-Image model")
    return cls(**values)


def config_json(config: DataclassInstance) -> dict[str, Any]:
    """The contents of its config.json: its fields, or the result of its own `to_dict`."""
    laid_out: Callable[[], dict[str, Any]] | None = getattr(config, "to_dict", None)
    return laid_out() if laid_out else asdict(config)


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
        return read_config(cls, {k: v for k, v in data.items() if v is not None}, where, ignored=None)


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
        """Reads the JSON object; `eos_token_id` may be a single number, and a `top_k` of 0 keeps all."""
        end = data.get("eos_token_id")
        data = {**data, "eos_token_id": end if isinstance(end, list) else [end]}
        if data.get("top_k") == 0:
            data["top_k"] = sys.maxsize
        return read_config(cls, {k: v for k, v in data.items() if v not in (None, [None])}, where, ignored=None)


@dataclass(frozen=True)
class SchedulerConfig:
    """`scheduler/scheduler_config.json` of a FlowMatchEulerDiscreteScheduler.

    Defaults are the pipelines' fall-backs for absent keys, which differ from the released files.
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
        """Reads and checks the JSON object; raises CheckpointError for an unsupported kind of sampling."""
        on = [key for key in cls._UNSUPPORTED if data.get(key)]
        if on:
            raise CheckpointError(f"{where}: {on[0]} is on; Qwen-Image models are not sampled that way")
        # diffusers writes `false` or `null` for "no terminal stretch".
        data = {**data, "shift_terminal": data.get("shift_terminal") or 0.0}
        config = read_config(cls, data, where, ignored=frozenset(cls._UNSUPPORTED))
        if config.time_shift_type not in ("exponential", "linear"):
            raise CheckpointError(
                f"{where}: time_shift_type {config.time_shift_type!r} is neither exponential nor linear"
            )
        return config
