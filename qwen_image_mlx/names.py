"""The words that parameters take, and the kinds of paths, as types; stated once, and pure.

They tell an editor or a type checker what may be given. What is given is checked where it is used, against that room's
own tables; a test keeps the two equal.
"""

from __future__ import annotations

import os
from typing import Literal

StrPath = str | os.PathLike[str]

Dtype = Literal["bfloat16", "float16", "float32"]
Rng = Literal["torch", "mlx"]
Task = Literal["generate", "edit", "decompose"]
Stage = Literal["download", "load", "caption", "encode", "denoise", "decode", "quantize", "check", "layer"]
Aspect = Literal["1:1", "16:9", "9:16", "4:3", "3:4", "3:2", "2:3"]
NamedSize = Literal["1mp", "source"]
LayersSize = Literal["source", "bucket"]
LayersFormat = Literal["png", "psd", "ora", "zip", "pptx"]
CaptionLanguage = Literal["en", "zh"]
LoRAMode = Literal["auto", "merge", "side"]
ControlKind = Literal["image", "canny", "gray", "blur", "lineart", "tile"]
Streamable = Literal["transformer", "text_encoder", "vision"]
Parallel = Literal["auto", "guidance", "images", "layers", "none"]
Fault = Literal["memory", "timeout", "busy display", "refused", "unknown"]
SolverName = Literal["euler", "heun", "unipc", "dpmpp-2m", "res-2m", "lcm"]
PresetName = Literal["draft", "balanced", "best"]
