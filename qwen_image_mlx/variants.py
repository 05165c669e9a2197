"""The table of what a pipeline class implies, and of the released models' recommended settings.

Pure data, importable in a millisecond. Code reads the fields and never compares names: an `if` on a variant's name
means this table lacks a field.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, cast

from .errors import CheckpointError
from .licences import APACHE, Licence
from .models.qwen_image_21 import facts as qwen_image_21
from .names import Aspect, CaptionLanguage, LoRAMode, NamedSize, Task

DEFAULT_MODEL = "Qwen/Qwen-Image-2512"
DEFAULT_EDIT_MODEL = "Qwen/Qwen-Image-Edit-2511"
DEFAULT_LAYERED_MODEL = "Qwen/Qwen-Image-Layered"
DEMOS = ("demo", "demo-edit", "demo-layered")  # the models inside this package; these names are never folders
DEMO_CONTROL = "demo-control"  # the ControlNet inside this package, for the first of them; never a folder, either

# Short names of released models, as people and other programs write them.
MODEL_ALIASES = {
    "qwen": "Qwen/Qwen-Image",
    "qwen-image": "Qwen/Qwen-Image",
    "2512": "Qwen/Qwen-Image-2512",
    "qwen-2512": "Qwen/Qwen-Image-2512",
    "qwen-image-2512": "Qwen/Qwen-Image-2512",
    "edit": "Qwen/Qwen-Image-Edit",
    "qwen-edit": "Qwen/Qwen-Image-Edit",
    "qwen-image-edit": "Qwen/Qwen-Image-Edit",
    "edit-2509": "Qwen/Qwen-Image-Edit-2509",
    "edit-plus": "Qwen/Qwen-Image-Edit-2509",
    "qwen-edit-2509": "Qwen/Qwen-Image-Edit-2509",
    "qwen-image-edit-2509": "Qwen/Qwen-Image-Edit-2509",
    "qwen-image-edit-plus": "Qwen/Qwen-Image-Edit-2509",
    "edit-2511": "Qwen/Qwen-Image-Edit-2511",
    "qwen-edit-2511": "Qwen/Qwen-Image-Edit-2511",
    "qwen-image-edit-2511": "Qwen/Qwen-Image-Edit-2511",
    "2.1": "Qwen/Qwen-Image-2.1",
    "qwen-2.1": "Qwen/Qwen-Image-2.1",
    "qwen-image-2.1": "Qwen/Qwen-Image-2.1",
    "2.1-turbo": "Qwen/Qwen-Image-2.1-Turbo",
    "qwen-2.1-turbo": "Qwen/Qwen-Image-2.1-Turbo",
    "qwen-image-2.1-turbo": "Qwen/Qwen-Image-2.1-Turbo",
    "layered": "Qwen/Qwen-Image-Layered",
    "qwen-layered": "Qwen/Qwen-Image-Layered",
    "qwen-image-layered": "Qwen/Qwen-Image-Layered",
}


def full_name(model: str) -> str:
    """The hub id that a short name means; whatever else is said, and a name that is also a file here, stays."""
    return model if os.path.exists(model) else MODEL_ALIASES.get(model.lower(), model)


# The officially recommended sizes (width, height), by aspect ratio; the first is the default.
ASPECT_SIZES: dict[Aspect, tuple[int, int]] = {
    "1:1": (1328, 1328),
    "16:9": (1664, 928),
    "9:16": (928, 1664),
    "4:3": (1472, 1104),
    "3:4": (1104, 1472),
    "3:2": (1584, 1056),
    "2:3": (1056, 1584),
}

LORA_MODES: tuple[LoRAMode, ...] = ("auto", "merge", "side")

# The sides of the squares whose areas an image can be decomposed at.
LAYERED_RESOLUTIONS = (640, 1024)

# Sizes of a result that follow from its image: the model's own, or the image's.
NAMED_SIZES: tuple[NamedSize, ...] = ("1mp", "source")


@dataclass(frozen=True, kw_only=True)
class Template:
    """What stands around a prompt, and how much of the two counts.

    Attributes:
        text: the chat template, with `{prompt}`.
        drop: tokens of its start that are encoded but not handed on.
        max_tokens: tokens kept of the whole, the template's own included (None: all).
        max_embeddings: rows kept of the encoded whole after the drop (None: all).
        image: what stands before the prompt for each image, with its number `{n}` from 1.
        between: what stands between two of these.
    """

    text: str
    drop: int = 0
    max_tokens: int | None = None
    max_embeddings: int | None = None
    image: str = ""
    between: str = ""


_DESCRIBE = (
    "<|im_start|>system\n"
    "Describe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships of the "
    "objects and background:<|im_end|>\n"
    "<|im_start|>user\n{prompt}<|im_end|>\n"
    "<|im_start|>assistant\n"
)

_INSTRUCT = (
    "<|im_start|>system\n"
    "Describe the key features of the input image (color, shape, size, texture, objects, background), then explain how "
    "the user's text instruction should alter or modify the image. Generate a new image that meets the user's "
    "requirements while maintaining consistency with the original input where appropriate.<|im_end|>\n"
    "<|im_start|>user\n{prompt}<|im_end|>\n"
    "<|im_start|>assistant\n"
)

IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"

# What asks the text encoder's own model for a caption, by language; the accidental line breaks are the reference's.
_CAPTION: dict[CaptionLanguage, str] = {
    "en": (
        "<|im_start|>system\n"
        "You are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n"
        "# Image Annotator\n"
        "You are a professional\n"
        "image annotator. Please write an image caption based on the input image:\n"
        "1. Write the caption using natural,\n"
        "descriptive language without structured formats or rich text.\n"
        "2. Enrich caption details by including: \n"
        " - Object\n"
        "attributes, such as quantity, color, shape, size, material, state, position, actions, and so on\n"
        " - Vision Relations\n"
        "between objects, such as spatial relations, functional relations, possessive relations, attachment "
        "relations, action\n"
        "relations, comparative relations, causal relations, and so on\n"
        " - Environmental details, such as weather, lighting,\n"
        "colors, textures, atmosphere, and so on\n"
        " - Identify the text clearly visible in the image, without translation or\n"
        "explanation, and highlight it in the caption with quotation marks\n"
        "3. Maintain authenticity and accuracy:\n"
        " - Avoid\n"
        "generalizations\n"
        " - Describe all visible information in the image, while do not add information not explicitly shown in\n"
        "the image\n"
        "{prompt}<|im_end|>\n"
        "<|im_start|>assistant\n"
    ),
    "zh": (
        "<|im_start|>system\n"
        "You are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n"
        "# 图像标注器\n"
        "你是一个专业的图像标注器。请基于输入图像，撰写图注:\n"
        "1.\n"
        "使用自然、描述性的语言撰写图注，不要使用结构化形式或富文本形式。\n"
        "2. 通过加入以下内容，丰富图注细节：\n"
        " - 对象的属性：如数量、颜色、形状、大小、位置、材质、状态、动作等\n"
        " -\n"
        "对象间的视觉关系：如空间关系、功能关系、动作关系、从属关系、比较关系、因果关系等\n"
        " - 环境细节：例如天气、光照、颜色、纹理、气氛等\n"
        " - 文字内容：识别图像中清晰可见的文字，不做翻译和解释，用引号在图注中强调\n"
        "3.\n"
        "保持真实性与准确性：\n"
        " - 不要使用笼统的描述\n"
        " -\n"
        "描述图像中所有可见的信息，但不要加入没有在图像中出现的内容\n"
        "{prompt}<|im_end|>\n"
        "<|im_start|>assistant\n"
    ),
}

NEGATIVE_2512 = (
    "低分辨率，低画质，肢体畸形，手指畸形，画面过饱和，蜡像感，人脸无细节，过度光滑，画面具有AI感。"
    "构图混乱。文字模糊，扭曲。"
)

CAPTION_TEMPLATES = {language: Template(text=text, image=IMAGE) for language, text in _CAPTION.items()}

# From 16 normalised latent channels, at an eighth of the size, to RGB in [-1, 1]: a row a channel, and a last row that
# is added. A fit by others: ComfyUI's comfy/latent_formats.py, Wan21.latent_rgb_factors and latent_rgb_factors_bias,
# there as here for latents less their mean, over their deviation. Qwen-Image's autoencoder shares Wan 2.1's latent
# space, means and deviations included.
WAN_PREVIEW: tuple[tuple[float, ...], ...] = (
    (-0.1299, -0.1692, 0.2932),
    (0.0671, 0.0406, 0.0442),
    (0.3568, 0.2548, 0.1747),
    (0.0372, 0.2344, 0.1420),
    (0.0313, 0.0189, -0.0328),
    (0.0296, -0.0956, -0.0665),
    (-0.3477, -0.4059, -0.2925),
    (0.0166, 0.1902, 0.1975),
    (-0.0412, 0.0267, -0.1364),
    (-0.1293, 0.0740, 0.1636),
    (0.0680, 0.3019, 0.1128),
    (0.0032, 0.0581, 0.0639),
    (-0.1251, 0.0927, 0.1699),
    (0.0060, -0.0633, 0.0005),
    (0.3477, 0.2275, 0.2950),
    (0.1984, 0.0913, 0.1861),
    (-0.1835, -0.0868, -0.3360),
)

_USUAL_AREA = 1024**2

# The classes of Qwen-Image 1.x by folder, as its model_index.json has them.
QWEN_IMAGE = {
    "scheduler": "FlowMatchEulerDiscreteScheduler",
    "text_encoder": "Qwen2_5_VLForConditionalGeneration",
    "tokenizer": "Qwen2Tokenizer",
    "transformer": "QwenImageTransformer2DModel",
    "vae": "AutoencoderKLQwenImage",
}


# … and those of Qwen-Image-2.1, which has its tokenizer's files in its processor's folder.
QWEN_IMAGE_21 = {
    "processor": "Qwen3VLProcessor",
    "scheduler": "FlowMatchEulerDiscreteScheduler",
    "text_encoder": "Qwen3VLForConditionalGeneration",
    "transformer": "QwenImage21Transformer2DModel",
    "vae": "AutoencoderKLQwenImage21",
}


@dataclass(frozen=True, kw_only=True)
class Variant:
    """What `_class_name` in model_index.json implies.

    Attributes:
        task: what it is for, and the command that does it: "generate", "edit" or "decompose".
        template: what stands around the prompt.
        also_edits: whether it generates from text and, shown images, edits.
        max_images: how many images it works on at once (0: it generates from text; None: any number).
        encoder_area: area in pixels that images are resized to for the text encoder (0: it is shown none).
        reference_area: area in pixels that images are resized to, at most, for the transformer.
        target_area: area in pixels of a result whose size follows from an image.
        size_from: index of the image whose aspect the result takes.
        keeps_references: images are computed once, not in every step.
        interleaved: the transformer reads images in the midst of the prompt, where their places are.
        samples_references: with a mask, the transformer is shown the sampled latents that the loop blends with,
            rather than the most likely ones.
        layered: it generates a frame with everything, which is dropped, and one for each layer.
        captions: given no prompt it describes its image itself.
        resolutions: sides of the squares whose areas an image can be decomposed at, the default first.
        shift_by_root: mu of the schedule is the root of the image's tokens / 256, not the config's line.
        renormalize: with guidance, each token keeps the length of its positive velocity.
        steps: default number of denoising steps.
        cfg_scale: default guidance scale.
        negative_prompt: recommended negative prompt.
        preview: from normalised latents to RGB in [-1, 1], a row a channel, and in the last row what is added.
        sigmas: the noise levels that it was distilled for, unshifted; () is a uniform grid of any number.
        transparent: what words a prompt for a transparent background; None where the model knows none.
        distilled_area: pixels below which a distilled model's images have faults.
        noisy_edit_side: an edit of exactly this width and height comes out noisy; 0 where none does.
        sizes: the official (width, height) by aspect ratio.
        licence: of the released weights.
        size_multiple: what both sides of a result are multiples of.
        classes: those of its parts, by folder; rows of `registry.CLASSES`.
    """

    task: Task
    also_edits: bool = False
    template: Template
    max_images: int | None = 0
    encoder_area: int = 0
    reference_area: int = 0
    target_area: int = _USUAL_AREA
    size_from: int = 0
    keeps_references: bool = False
    interleaved: bool = False
    samples_references: bool = False
    layered: bool = False
    captions: bool = False
    resolutions: tuple[int, ...] = ()
    shift_by_root: bool = False
    renormalize: bool = True
    steps: int
    cfg_scale: float = 4.0
    negative_prompt: str
    preview: tuple[tuple[float, ...], ...] = WAN_PREVIEW
    sigmas: tuple[float, ...] = ()
    transparent: Callable[[str], str] | None = field(default=None, repr=False)  # caches are keyed by the repr
    distilled_area: int = 0
    noisy_edit_side: int = 0
    sizes: Mapping[Aspect, tuple[int, int]] = field(default_factory=lambda: ASPECT_SIZES, hash=False)
    licence: Licence = APACHE
    size_multiple: int = 16
    classes: Mapping[str, str] = field(default_factory=lambda: QWEN_IMAGE, hash=False)

    @property
    def takes_images(self) -> bool:
        """Whether it can be shown images to work on."""
        return self.max_images != 0

    @property
    def needs_images(self) -> bool:
        """Whether it does nothing without images."""
        return self.takes_images and not self.also_edits

    @property
    def tasks(self) -> tuple[Task, ...]:
        """All that it is for."""
        return (self.task, "edit") if self.also_edits else (self.task,)

    def size_of(self, aspect: Aspect) -> tuple[int, int]:
        """(width, height) of an image from text: the official one, or one of the model's own area."""
        width, height = self.sizes[aspect]
        if self.target_area == _USUAL_AREA:
            return width, height
        step = self.size_multiple
        scale = math.sqrt(self.target_area / (width * height)) / step
        return step * max(1, round(width * scale)), step * max(1, round(height * scale))


VARIANTS: dict[str, Variant] = {
    "QwenImagePipeline": Variant(
        task="generate",
        template=Template(text=_DESCRIBE, drop=34, max_tokens=1024 + 34, max_embeddings=512),
        steps=50,
        negative_prompt=NEGATIVE_2512,
    ),
    "QwenImageEditPipeline": Variant(
        task="edit",
        template=Template(text=_INSTRUCT, drop=64, image=IMAGE),
        max_images=1,
        encoder_area=1024**2,
        reference_area=1024**2,
        samples_references=True,
        steps=50,
        negative_prompt=" ",
    ),
    "QwenImageEditPlusPipeline": Variant(
        task="edit",
        template=Template(text=_INSTRUCT, drop=64, image="Picture {n}: " + IMAGE),
        max_images=None,
        encoder_area=384**2,
        reference_area=1024**2,
        size_from=-1,
        steps=40,
        negative_prompt=" ",
    ),
    "QwenImageLayeredPipeline": Variant(
        task="decompose",
        template=Template(text=_DESCRIBE, drop=34, max_embeddings=512),
        max_images=2,  # with a layer's mask
        reference_area=1024**2,
        layered=True,
        captions=True,
        resolutions=LAYERED_RESOLUTIONS,
        shift_by_root=True,
        renormalize=False,
        steps=50,
        negative_prompt=" ",
    ),
    "QwenImage21Pipeline": Variant(
        task="generate",
        also_edits=True,
        template=Template(
            text=qwen_image_21.TEMPLATE,
            drop=qwen_image_21.DROP,
            image=qwen_image_21.IMAGE,
            between=qwen_image_21.BETWEEN_IMAGES,
        ),
        max_images=qwen_image_21.MAX_REFERENCES,
        encoder_area=qwen_image_21.REFERENCE_AREA,
        reference_area=qwen_image_21.REFERENCE_AREA,
        target_area=qwen_image_21.TARGET_AREA,
        size_from=qwen_image_21.SIZE_FROM,
        keeps_references=True,
        interleaved=True,
        renormalize=qwen_image_21.RENORMALIZE,
        steps=qwen_image_21.STEPS,
        cfg_scale=qwen_image_21.CFG_SCALE,
        negative_prompt=qwen_image_21.NEGATIVE_PROMPT,
        preview=qwen_image_21.PREVIEW,
        transparent=qwen_image_21.transparent_prompt,
        distilled_area=qwen_image_21.TURBO_AREA,
        noisy_edit_side=qwen_image_21.NOISY_EDIT_SIDE,
        sizes=cast(Mapping[Aspect, tuple[int, int]], qwen_image_21.ASPECT_SIZES),  # facts know no names
        licence=Licence(qwen_image_21.LICENCE, qwen_image_21.LICENCE_LINK, qwen_image_21.LICENCE_KEY),
        size_multiple=qwen_image_21.SIZE_MULTIPLE,
        classes=QWEN_IMAGE_21,
    ),
}

# Recommendations of model cards that differ from their pipeline class's.
RECOMMENDED_NEGATIVE_PROMPTS = {"Qwen/Qwen-Image": " "}


# Where a distilled model's model_index.json has its noise levels.
SIGMAS = "sample_sigmas"

# What a checkpoint of unusual size may say of itself in model_index.json, under `OWN`.
OWN = "_qwen_image_mlx"
_OWN_FIELDS = ("encoder_area", "reference_area", "target_area", "resolutions", "captions", "steps", "cfg_scale",
               "negative_prompt", "preview")  # fmt: skip
# What numbers among them may be, ends included; areas other than 0 are at least a token's.
_OWN_RANGES = {
    "encoder_area": (28**2, 4096**2), "reference_area": (16**2, 4096**2), "target_area": (16**2, 4096**2),
    "resolutions": (16, 4096), "steps": (1, 1000), "cfg_scale": (0.0, 1000.0),
}  # fmt: skip


def variant_of(index: Mapping[str, Any], model: str) -> Variant:
    """The row for a checkpoint's model_index.json, with what it says of itself.

    Raises:
        CheckpointError: this package does not run its class, or knows nothing of what it says.
    """
    class_name = index.get("_class_name")
    if not isinstance(class_name, str) or class_name not in VARIANTS:
        raise CheckpointError(
            f"{model} is a {class_name or 'folder without a pipeline class'} in its model_index.json; "
            f"this version runs {', '.join(VARIANTS)}"
        )
    usual = VARIANTS[class_name]
    stored = _distilled_settings(index.get(SIGMAS), model) | _own_settings(index.get(OWN, {}), usual, model)
    return replace(usual, **stored)


def _distilled_settings(sigmas: Any, model: str) -> dict[str, Any]:
    """The noise levels that a distilled model was saved with, and their number; {} without any."""
    if sigmas is None:
        return {}
    numbers = isinstance(sigmas, list) and 0 < len(sigmas) <= 1000 and all(type(s) in (int, float) for s in sigmas)
    if not numbers or not all(a > b for a, b in pairwise([*sigmas, 0.0])) or sigmas[0] > 1:
        raise CheckpointError(
            f"model_index.json of {model} gives {SIGMAS} as {sigmas!r:.80}, but they must be falling numbers above 0 "
            "and at most 1: download it again"
        )
    return {"sigmas": tuple(map(float, sigmas)), "steps": len(sigmas)}


def _own_settings(stored: object, usual: Variant, model: str) -> dict[str, Any]:
    """What a checkpoint says of itself, checked against the kinds of the usual values."""
    if not isinstance(stored, dict) or stored.keys() - set(_OWN_FIELDS):
        raise CheckpointError(
            f"model_index.json of {model} says {stored!r:.80} under {OWN}, but may only say {', '.join(_OWN_FIELDS)}"
        )
    own = {name: tuple(value) if isinstance(value, list) else value for name, value in stored.items()}
    for name, value in own.items():
        if type(value) is not type(getattr(usual, name)):
            raise CheckpointError(f"model_index.json of {model} gives {name} as {value!r:.80} under {OWN}")
        if name in _OWN_RANGES and not _in_range(value, getattr(usual, name), *_OWN_RANGES[name]):
            low, high = _OWN_RANGES[name]
            raise CheckpointError(
                f"model_index.json of {model} gives {name} as {value!r:.80} under {OWN}, "
                f"but it must be from {low} to {high}: correct it"
            )
    if "preview" in own:
        own["preview"] = _check_map(own["preview"], usual.preview, model)
    return own


def _in_range(value: Any, usual: object, low: float, high: float) -> bool:
    """Whether a number, or each of several, lies within its ends; what is usual always does."""
    if isinstance(usual, tuple):
        return bool(value) == bool(usual) and all(type(item) is int and low <= item <= high for item in value)
    return bool(value == usual or low <= value <= high)


def _check_map(
    rows: tuple[Any, ...], usual: tuple[tuple[float, ...], ...], model: str
) -> tuple[tuple[float, ...], ...]:
    """A map to RGB as the usual one is shaped; raises CheckpointError."""
    count, width = len(usual), len(usual[0])
    fits = len(rows) == count and all(isinstance(row, list) and len(row) == width for row in rows)
    if not fits or not all(type(value) in (int, float) and abs(value) < 1e6 for row in rows for value in row):
        raise CheckpointError(
            f"model_index.json of {model} gives preview under {OWN}, but not as {count} rows of {width}"
        )
    return tuple(tuple(map(float, row)) for row in rows)


def recommended_negative_prompt(variant: Variant, model: str) -> str:
    """The negative prompt the model's card recommends."""
    return RECOMMENDED_NEGATIVE_PROMPTS.get(model, variant.negative_prompt)
