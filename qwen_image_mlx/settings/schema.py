"""The table of settings: their names, what each may be, what it feeds. Pure data, and the example made from it.

The limits are those of the rooms that obey them, which stand above this one; tests/settings compares the two.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

TABLE = "qwen_image"  # of a profile
GENERATION = "generation"  # within it
DEFAULT_PROFILE = "default"

ASPECTS = ("1:1", "16:9", "9:16", "4:3", "3:4", "3:2", "2:3")
_SCHEMES = {**dict.fromkeys(("3", "4", "5", "6", "8"), ("64", "32", "128")),
            "mxfp4": ("32",), "mxfp8": ("32",), "nvfp4": ("16",)}  # fmt: skip
_QUANTIZED = ("transformer", "text_encoder", "vision")
_RESIDENCIES = ("auto", "resident", "staged", "staged, encoders streamed", "streamed")
_UNITS = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "ki": 2**10, "mi": 2**20, "gi": 2**30}
LEAST_MEMORY = 1 << 28  # bytes that anything runs in
MOST_MEMORY = 10**15  # more than any machine has


@dataclass(frozen=True)
class Kind:
    """What a value may be.

    Attributes:
        allowed: in words, to stand after "must be".
        accepts: tells whether a value that TOML gave is one.
        store: what is kept of it.
    """

    allowed: str
    accepts: Callable[[Any], bool]
    store: Callable[[Any], Any] = lambda value: value


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One row.

    Attributes:
        key: its name in the file.
        kind: what it may be.
        help: what it decides, in a sentence.
        usual: what holds where it is not set.
        example: a value for the commented example.
        feeds: by the name of a command, the name of the flag whose place it takes; "edit" is `compose --harmonize` too.
        table: the table within `[PROFILE.qwen_image]` that it stands in; "" for that one itself.
        place: whether it names files, which may lie beside the config.
    """

    key: str
    kind: Kind
    help: str
    usual: str
    example: Any
    feeds: Mapping[str, str]
    table: str = ""
    place: bool = False


def _integer(low: int, high: int) -> Kind:
    return Kind(f"an integer from {low} to {high}", lambda value: type(value) is int and low <= value <= high)


def _is_quantization(value: Any) -> bool:
    if type(value) not in (int, str):
        return False
    parts = [part.partition("=") for part in str(value).split(",")]
    names = [name.strip() for name, _, _ in parts]
    if "=" not in str(value):
        return value == "none" or _is_scheme(str(value))
    unique = set(names) <= set(_QUANTIZED) and len(set(names)) == len(names)
    return unique and all(scheme.strip() == "none" or _is_scheme(scheme.strip()) for _, _, scheme in parts)


def _is_scheme(text: str) -> bool:
    name, slash, group = text.partition("/")
    return name in _SCHEMES and (not slash or group in _SCHEMES[name])


def _is_memory(value: Any) -> bool:
    if type(value) not in (int, str):
        return False
    if type(value) is int:
        return LEAST_MEMORY <= value <= MOST_MEMORY
    return value.strip().lower() in _RESIDENCIES or LEAST_MEMORY <= (memory_figure(value) or 0) <= MOST_MEMORY


def memory_figure(text: str) -> int | None:
    """Bytes of 16GB, 12.5 GiB, 16000000000; None of what is no figure, of whatever size."""
    match = re.fullmatch(r"(\d{1,18}(?:\.\d{1,18})?)\s*([kmg]i?)?b?", text.strip().lower(), re.ASCII)
    return int(float(match[1]) * _UNITS[match[2] or ""]) if match else None


def _is_references(value: Any) -> bool:
    return type(value) is list and all(type(item) is str and item.strip() for item in value)


_MODEL = Kind("a directory or a Hugging Face id, in quotes", lambda value: type(value) is str and value.strip() != "")
_QUANTIZATION = Kind(
    f"one of {', '.join(_SCHEMES)}, none, or in quotes as transformer=4,text_encoder=8", _is_quantization, str
)
_MEMORY = Kind('like "16GB" (256MiB to 1 PB), "auto", "resident", "staged" or "streamed"', _is_memory, str)
_LORAS = Kind('a list of strings such as ["style.safetensors@0.8"]', _is_references)
_GUIDANCE = Kind("a number from 1 to 100", lambda value: type(value) in (int, float) and 1 <= value <= 100, float)
_WORDS = Kind("a string", lambda value: type(value) is str)
_ASPECT = Kind(f"one of {', '.join(ASPECTS)}", lambda value: type(value) is str and value in ASPECTS)


def _painters(flag: str, **others: str) -> dict[str, str]:
    return {"generate": flag, "edit": flag, "decompose": flag, **others}


SCHEMA = (
    Setting(key="model_path", kind=_MODEL, place=True, help="what paints a prompt: a directory or a Hugging Face id",
            usual="Qwen/Qwen-Image-2512", example="Qwen/Qwen-Image-2512",
            feeds={"generate": "model", "plan": "model", "train --task t2i": "model"}),
    Setting(key="edit_model_path", kind=_MODEL, place=True, help="the same, of the model that edits",
            usual="Qwen/Qwen-Image-Edit-2511", example="Qwen/Qwen-Image-Edit-2511",
            feeds={"edit": "model", "train --task edit": "model"}),
    Setting(key="layered_model_path", kind=_MODEL, place=True, help="the same, of the model that takes pictures apart",
            usual="Qwen/Qwen-Image-Layered", example="Qwen/Qwen-Image-Layered",
            feeds={"decompose": "model", "caption": "model", "train --task layered": "model"}),
    Setting(key="num_layers", kind=_integer(1, 8), help="how many layers a picture is taken apart into",
            usual="4", example=4, feeds={"decompose": "layers", "plan": "layers"}),
    Setting(key="cfg_scale", kind=_GUIDANCE, help="guidance; 1 turns it off",
            usual="the model's own", example=4.0, feeds=_painters("cfg_scale")),
    Setting(key="resolution", kind=_integer(32, 4096),
            help="pictures are taken apart at so many pixels squared, at their aspect",
            usual="the model's own", example=640, feeds={"decompose": "resolution"}),
    Setting(key="quantize", kind=_QUANTIZATION, help="pack weights while they are loaded",
            usual="as they are stored", example=4, feeds=_painters("quantize", caption="quantize", plan="quantize")),
    Setting(key="memory", kind=_MEMORY, help="keep to it, or say how weights are kept",
            usual="staged", example="16GB", feeds=_painters("memory", plan="memory")),
    Setting(key="loras", kind=_LORAS, place=True, help="LoRAs of the models named here, with their strengths; another "
            "--model goes without", usual="none", example=["fox-style.safetensors@0.8"], feeds=_painters("loras")),
    Setting(key="steps", table=GENERATION, kind=_integer(1, 1000), help="denoising steps",
            usual="the model's own", example=30, feeds=_painters("steps", plan="steps")),
    Setting(key="seed", table=GENERATION, kind=_integer(0, 2**64 - 1), help="of the noise",
            usual="random", example=42, feeds=_painters("seed")),
    Setting(key="negative_prompt", table=GENERATION, kind=_WORDS, help="what to avoid",
            usual="as the model's card says", example="blurry", feeds=_painters("negative_prompt")),
    Setting(key="aspect", table=GENERATION, kind=_ASPECT, help="of a picture painted from a prompt alone",
            usual="1:1", example="16:9", feeds={"generate": "aspect"}),
)  # fmt: skip


def table_name(profile: str, table: str) -> str:
    """A table's header without its brackets: `default.qwen_image.generation`."""
    return ".".join([profile, TABLE, *([table] if table else [])])


def example_config() -> str:
    """A config.toml that names every setting and sets none."""
    lines = ["# Settings of qwen-image-mlx. Take the # from a line to set it; flags of the command line win.", ""]
    for table in ("", GENERATION):
        lines += [f"[{table_name(DEFAULT_PROFILE, table)}]"]
        for row in SCHEMA:
            if row.table == table:
                lines += [f"# {row.help} (where it is not set: {row.usual})"]
                lines += [f"#{row.key} = {json.dumps(row.example, ensure_ascii=False)}"]
        lines += [""]
    lines += ["# Another profile, chosen by --profile fast; what it does not say is as in default."]
    lines += [f"#[{table_name('fast', '')}]", "#quantize = 4", f"#[{table_name('fast', GENERATION)}]", "#steps = 20"]
    return "\n".join(lines) + "\n"
