"""The table of what a pipeline class implies, and of the released models' recommended settings.

Pure data, importable in a millisecond. Code reads the fields and never compares names: an `if` on a variant's name
means this table lacks a field.
"""

from __future__ import annotations

from dataclasses import dataclass

from .errors import CheckpointError

DEFAULT_MODEL = "Qwen/Qwen-Image-2512"

# The officially recommended sizes (width, height), by aspect ratio; the first is the default.
ASPECT_SIZES: dict[str, tuple[int, int]] = {
    "1:1": (1328, 1328),
    "16:9": (1664, 928),
    "9:16": (928, 1664),
    "4:3": (1472, 1104),
    "3:4": (1104, 1472),
    "3:2": (1584, 1056),
    "2:3": (1056, 1584),
}

TEXT_TEMPLATE = (
    "<|im_start|>system\n"
    "Describe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships of the "
    "objects and background:<|im_end|>\n"
    "<|im_start|>user\n{prompt}<|im_end|>\n"
    "<|im_start|>assistant\n"
)

NEGATIVE_2512 = (
    "低分辨率，低画质，肢体畸形，手指畸形，画面过饱和，蜡像感，人脸无细节，过度光滑，画面具有AI感。"
    "构图混乱。文字模糊，扭曲。"
)


@dataclass(frozen=True)
class Variant:
    """What `_class_name` in model_index.json implies.

    Attributes:
        template: the chat template around the prompt, with `{prompt}`.
        template_drop: tokens of the template's start that are encoded but not handed to the transformer.
        max_tokens: tokens kept of a tokenized prompt, the template's own included (None: all).
        max_embeddings: rows kept of an encoded prompt after the drop (None: all).
        steps: default number of denoising steps.
        cfg_scale: default guidance scale.
        negative_prompt: recommended negative prompt.
    """

    template: str
    template_drop: int
    max_tokens: int | None
    max_embeddings: int | None
    steps: int
    cfg_scale: float
    negative_prompt: str


VARIANTS: dict[str, Variant] = {
    "QwenImagePipeline": Variant(
        template=TEXT_TEMPLATE,
        template_drop=34,
        max_tokens=1024 + 34,
        max_embeddings=512,
        steps=50,
        cfg_scale=4.0,
        negative_prompt=NEGATIVE_2512,
    ),
}

# Recommendations of model cards that differ from their pipeline class's.
RECOMMENDED_NEGATIVE_PROMPTS = {"Qwen/Qwen-Image": " "}


def variant_of(class_name: object, model: str) -> Variant:
    """The row for a checkpoint's `_class_name`; raises CheckpointError for one this package does not run."""
    if class_name not in VARIANTS:
        raise CheckpointError(
            f"{model} is a {class_name or 'folder without a pipeline class'} in its model_index.json; "
            f"this version runs {', '.join(VARIANTS)}"
        )
    return VARIANTS[class_name]


def recommended_negative_prompt(variant: Variant, model: str) -> str:
    """The negative prompt the model's card recommends."""
    return RECOMMENDED_NEGATIVE_PROMPTS.get(model, variant.negative_prompt)
