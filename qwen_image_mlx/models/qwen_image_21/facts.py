"""What the pipeline class of Qwen-Image-2.1 implies, as data for its rows of the variants' table.

Sources: diffusers' pipeline_qwenimage21.py (P), the model_index.json of the released Turbo (T), the size table and the
prompts of the official demo (D). The scheduler's shift, and the latents' mean and deviation, stand in the checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping

# Of the released weights: its section 1 defines non-commercial, its section 2 grants no more and says whom to ask else.
LICENCE = (
    "Qwen Research License: for non-commercial purposes only, that is research or evaluation; commercial use needs a "
    "license from Alibaba Cloud"
)

# Sampling (P): guided and, with guidance above 1, without renormalisation.
STEPS = 40
CFG_SCALE = 1.0
RENORMALIZE = False
NEGATIVE_PROMPT = " "
EMPTY_PROMPT = " "  # what is encoded in place of "": the tokenizer adds no token of its own

# Turbo's noise levels (T), used as they stand; their number is that of the steps. Made for 1024x1024 and more:
# below, fine detail becomes a pixel grid, in diffusers too (mflux's notes). Sizes of that area are rounded to 32.
TURBO_SIGMAS = (1.0, 0.978453, 0.95418, 0.926626, 0.89508, 0.845148, 0.704534, 0.414568)
TURBO_AREA = 992 * 992

# Sizes: pixels a latent stands for, latents a place in the prompt stands for, what both sides are multiples of (P).
LATENT_PIXELS = 16
PLACE_SIDE = 2
SIZE_MULTIPLE = LATENT_PIXELS * PLACE_SIDE
REFERENCE_AREA = 1024**2  # of each reference image, for the text encoder and the transformer alike (P)
TARGET_AREA = 1024**2  # of an edit; its aspect is the last reference's (P)
SIZE_FROM = -1
MAX_REFERENCES = 10  # advertised; the pipeline takes any number
# Pixels of an image that the text encoder's processor leaves at its size. Outside, places and latents do not match.
VISION_PIXELS = (256**2, 4096**2)
NOISY_EDIT_SIDE = 1024  # edits of exactly this size come out noisy, 992 and 1056 do not (Comfy-Org/ComfyUI#16435)

# The official sizes (width, height) by aspect ratio (D); the first is the default.
ASPECT_SIZES: Mapping[str, tuple[int, int]] = {
    "1:1": (2048, 2048),
    "16:9": (2752, 1536),
    "9:16": (1536, 2752),
    "4:3": (2400, 1792),
    "3:4": (1792, 2400),
    "3:2": (2528, 1696),
    "2:3": (1696, 2528),
}

# The chat template (P). The system turn is encoded and dropped: as many tokens.
TEMPLATE = (
    "<|im_start|>system\nComprehend and analyze the provided prompt.<|im_end|>\n"
    "<|im_start|>user\n{prompt}<|im_end|>\n"
    "<|im_start|>assistant\n"
)
DROP = 14
# What stands before the prompt for each reference image, and between two of them; the prompt names them alike.
IMAGE = "<image{n}><|vision_start|><|image_pad|><|vision_end|>"
BETWEEN_IMAGES = " "

_TRANSPARENT = "This is an RGBA image with transparency. "
_BACKGROUND = ". The image has alpha channel and the background is transparent."


def transparent_prompt(prompt: str) -> str:
    """A prompt worded as the model wants it for an image with a transparent background (D); worded once only."""
    if prompt.startswith(_TRANSPARENT) and prompt.endswith(_BACKGROUND):
        return prompt
    return f"{_TRANSPARENT}{prompt.rstrip('. ')}{_BACKGROUND}"
