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

# From 64 normalised latent channels, at a sixteenth of the size, to RGB in [-1, 1]: a row a channel, and a last row
# that is added. A fit by others: ComfyUI's comfy/latent_formats.py, QwenImage21.latent_rgb_factors and
# latent_rgb_factors_bias, there as here for latents less their mean, over their deviation.
PREVIEW: tuple[tuple[float, ...], ...] = (
    (-0.0158, -0.0115, -0.0174),
    (0.0030, 0.0120, 0.0027),
    (0.0637, 0.0470, -0.0127),
    (0.0360, 0.0661, -0.0030),
    (0.0159, 0.0181, 0.0082),
    (0.0132, 0.0326, 0.0169),
    (0.0191, 0.0261, 0.0136),
    (-0.0146, -0.0276, -0.0361),
    (0.0187, -0.0024, -0.0072),
    (-0.1059, -0.0090, 0.0350),
    (-0.0195, -0.0226, -0.0138),
    (-0.0295, 0.0024, -0.0215),
    (0.0191, -0.0393, -0.0001),
    (-0.0144, -0.0166, -0.0272),
    (0.0389, 0.0430, 0.0445),
    (-0.0153, -0.0336, 0.0031),
    (0.0339, 0.0122, 0.0220),
    (-0.0136, -0.0078, -0.0120),
    (-0.0340, -0.0282, -0.0245),
    (-0.0133, -0.0176, -0.0133),
    (0.0109, -0.0087, 0.0096),
    (-0.0010, 0.0044, 0.0016),
    (0.0301, 0.0053, 0.0361),
    (-0.0281, -0.0205, -0.0032),
    (-0.0725, 0.0002, 0.0160),
    (-0.0036, 0.0158, 0.0807),
    (0.0087, 0.0040, -0.0053),
    (-0.0260, 0.0183, -0.0077),
    (-0.0039, -0.0035, -0.0107),
    (-0.0026, 0.0172, 0.0237),
    (0.0088, 0.0078, 0.0078),
    (-0.0087, -0.0310, -0.0122),
    (-0.0027, 0.0018, 0.0094),
    (-0.0064, 0.0292, -0.0256),
    (0.0594, 0.1049, 0.1180),
    (0.0103, -0.0103, -0.0026),
    (-0.0091, 0.0025, -0.0015),
    (0.0178, 0.0243, 0.0292),
    (-0.0063, -0.0012, 0.0202),
    (0.0452, 0.0246, 0.0143),
    (0.0149, 0.0270, 0.0052),
    (0.1484, 0.0801, 0.0804),
    (-0.0120, 0.0040, 0.0010),
    (0.0181, 0.0051, -0.0021),
    (0.0132, 0.0050, 0.0019),
    (0.0291, 0.0020, 0.0092),
    (0.0066, -0.0410, -0.1314),
    (-0.1153, -0.0629, -0.0802),
    (0.0258, 0.0378, 0.0298),
    (0.0375, 0.1139, 0.0468),
    (-0.0142, -0.0126, -0.0276),
    (0.0339, 0.0153, 0.0138),
    (0.0346, 0.0211, 0.0267),
    (0.0369, -0.0431, -0.0993),
    (-0.0052, -0.0092, 0.0056),
    (-0.0279, 0.0410, -0.0357),
    (0.0036, 0.0017, -0.0083),
    (-0.0441, -0.0367, -0.0454),
    (-0.0001, -0.0092, -0.0001),
    (-0.0222, -0.0183, -0.0051),
    (0.0039, 0.0053, -0.0184),
    (-0.0094, -0.0075, -0.0143),
    (-0.0066, -0.0088, -0.0063),
    (0.0220, 0.0074, 0.0100),
    (-0.1228, -0.1869, -0.3083),
)

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
