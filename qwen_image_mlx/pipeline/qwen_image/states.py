"""Encodes prompts and images with Qwen2.5-VL: image features are put in their places, then the language model runs.

Each function evaluates what it returns.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
from PIL import Image

from ...errors import CheckpointError, QwenImageError, RequestError
from ...gpu import all_finite, finish
from ...images.geometry import Size, size_of_area, vision_size
from ...images.pixels import on_white, to_patches
from ...models.qwen_image.rope import MAX_POSITION
from ...registry import TEXT_ENCODER, VISION
from ...text.prompt import TokenizedPrompt, replace_vision_tokens
from ..components import Components


def check_length(tokens: int, start: int = 0) -> None:
    """Raises RequestError if prompt tokens after `start` positions of images reach past the rotary tables."""
    if start + tokens > MAX_POSITION:
        raise RequestError(
            f"{tokens} prompt tokens after the {start} positions of images reach past {MAX_POSITION}; shorten "
            "the prompt or make the images smaller"
        )


def feature_grid(components: Components, image: Image.Image, area: int) -> tuple[int, int]:
    """Rows and columns of the features that an image, shown at about `area` pixels, turns into."""
    config = components.config(VISION)
    cell = config.patch_size * config.spatial_merge_size
    width, height = _vision_size(components, image, area)
    return height // cell, width // cell


def encode_vision(components: Components, images: Sequence[Image.Image], area: int) -> mx.array:
    """Features (tokens, C) of all images, in order, each shown at about `area` pixels."""
    config, processor, tower = components.config(VISION), components.image_processor, components.network(VISION)
    features = []
    for image in images:
        size = _vision_size(components, image, area)
        # Resized twice, as in the reference: to the pipeline's area, then to what the tower's patches fit.
        resized = on_white(image.resize(size_of_area(area, image.size), Image.Resampling.LANCZOS))
        patches = to_patches(
            resized, size, patch=config.patch_size, merge=config.spatial_merge_size,
            mean=processor.image_mean, std=processor.image_std,
        )  # fmt: skip
        rows, columns = size[1] // config.patch_size, size[0] // config.patch_size
        with components.passing(VISION) as pace:
            features.append(tower(patches.astype(components.dtype), rows, columns, pace))
            finish(features[-1])
    return mx.concatenate(features)


def encode_prompts(
    components: Components, prompts: Sequence[TokenizedPrompt], features: mx.array | None
) -> list[mx.array]:
    """States (1, L, C) of each prompt's rows that count.

    Raises:
        QwenImageError: they are not finite, which float16 can cause.
    """
    encoder, embedded = components.network(TEXT_ENCODER), []
    size = components.config(TEXT_ENCODER).vocab_size
    for tokens in prompts:
        if (largest := int(max(tokens.ids, default=0))) >= size:  # MLX does not look before it reads
            raise CheckpointError(
                f"the tokenizer gives the token {largest}, but the text encoder has {size}: they do not belong together"
            )
        embeddings = encoder.embed(mx.array(tokens.ids)[None])
        if features is not None:
            embeddings = replace_vision_tokens(embeddings, tokens.is_image, features)
        embedded.append((embeddings, mx.array(tokens.positions)))
    with components.passing(TEXT_ENCODER) as pace:
        whole = encoder.together(embedded, pace)
        states = [rows[:, tokens.first :] for rows, tokens in zip(whole, prompts, strict=True)]
        finish(states)
    if not all_finite(*states):
        raise QwenImageError("the encoded prompt is not finite: try the dtype bfloat16, or check the weights")
    return states


def _vision_size(components: Components, image: Image.Image, area: int) -> Size:
    config, processor = components.config(VISION), components.image_processor
    return vision_size(
        size_of_area(area, image.size),
        config.patch_size * config.spatial_merge_size,
        processor.min_pixels,
        processor.max_pixels,
    )
