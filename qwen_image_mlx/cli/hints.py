"""The cure of an error in terms of flags, which the lower rooms do not know."""

from __future__ import annotations

import re

from ..errors import QwenImageError
from ..outside import one_line

# By `QwenImageError.cause`.
HINTS = {
    "budget": "try a smaller image or --quantize 4, or generate anyway with --force",
    "prefix cache": "make the references smaller, as with --reference-pixels 262144, or give --no-prefix-cache, which "
    "takes much more time",
    "residency": "try --memory auto or --quantize 4, or generate anyway with --force",
    "streamed quantization": "save the model quantized once (qwen-image-mlx quantize MODEL FOLDER --bits 4) and give "
    "--model FOLDER without --quantize, allow more memory, or leave --quantize out",
    "caption": "describe the image with --prompt, allow more memory, or continue with --force",
    "prompt": "give one in quotes, or --from-image; a prompt that begins with a dash comes last, as in -- -portrait",
    "group size": "--group-size needs --quantize",
    "lightning": "give one with --lora",
    "fault: memory": "--memory auto and --quantize 4 take less",
    "transparent": "leave --transparent out, or use Qwen/Qwen-Image-2.1",
    "control image": "--control-image gives it",
    "in-context": "give it with --lora",
    "control mask": "--control-mask gives it",
    "calibrate": "measure it once with qwen-image-mlx calibrate-cache, or choose first-block, easycache or taylorseer",
    "few steps": "leave --step-cache out, or give --step-cache off",
    "ports": "give mlx.launch another --starting-port",
    "pick": "give --pick with its number",
    "ema": "give --full with it",
    "cut run": "--resume continues it",
    "no run": "leave --resume out",
    "earlier run": "--resume continues it",
}


def sentence(error: QwenImageError) -> str:
    """An error's message on one line, with its cure where there is one."""
    cure = HINTS.get(error.cause)
    return _as_typed(one_line(error)) + (f"; {cure}" if cure else "")


def _as_typed(text: str) -> str:
    """A message about a field of Python, such as num_inference_steps, with the name of the flag or of the key."""
    from ..runtime.options import OPTIONS  # here: most runs have no error

    match = re.match(r"(.*, line \d+: )?(\w+) is ", text)
    if match is None or match[2] in OPTIONS:
        return text
    row = next((row for row in OPTIONS.values() if row.field == match[2]), None)
    subject = match[2] if row is None else row.name if match[1] else row.flag
    return f"{match[1] or ''}{subject}{text[match.end(2) :]}"
