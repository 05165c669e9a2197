"""Prompts and images to states with Qwen2.5-VL: template, image features in their places, the language model once.

Each function evaluates what it returns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx
from PIL import Image

from ...errors import CheckpointError, QwenImageError, RequestError
from ...gpu import all_finite, finish
from ...images.geometry import Size, size_of_area, vision_size
from ...images.pixels import on_white, to_patches
from ...models.qwen_image.rope import MAX_POSITION
from ...names import CaptionLanguage
from ...registry import TEXT_ENCODER, VISION
from ...text.prompt import TokenizedPrompt, replace_vision_tokens, tokenize_prompt
from ..components import Components
from ..progress import Reporter


class QwenImageEncoder:
    """The `ConditionEncoder` of Qwen-Image 1.x.

    Args:
        components: the checkpoint's parts; loads the text encoder and, for images, the vision tower.
    """

    def __init__(self, components: Components):
        self._components = components

    def encode(
        self,
        prompts: Sequence[str],
        images: Sequence[Image.Image],
        report: Reporter,
        sequential_positions: bool = False,
    ) -> list[mx.array]:
        """As `ConditionEncoder.encode`."""
        parts, area = self._components, self._components.variant.encoder_area
        grids = [feature_grid(parts, image, area) for image in images]
        template = parts.variant.template
        tokens = [tokenize_prompt(parts.tokenizer, template, text, grids, sequential_positions) for text in prompts]
        check_length(max(len(prompt.ids) - prompt.first for prompt in tokens))
        features = None
        if images:
            parts.load(VISION)
            with report.stage("encode", "pictures"):
                features = encode_vision(parts, images, area)
        parts.load(TEXT_ENCODER)
        with report.stage("encode", "prompts"):
            return encode_prompts(parts, tokens, features)

    def caption(
        self, image: Image.Image, area: int, language: CaptionLanguage, seed: int, on_token: Callable[[int], None]
    ) -> str:
        """As `ConditionEncoder.caption`."""
        from .caption import write_caption  # mlx-lm, which nothing else needs

        self._components.prepare_captions()
        return write_caption(self._components, image, area, language, seed, on_token)


def check_length(tokens: int, start: int = 0) -> None:
    """Raises RequestError where prompt tokens after `start` positions of images reach past the rotary tables."""
    if start + tokens > MAX_POSITION:
        raise RequestError(
            f"{tokens} prompt tokens after the {start} positions of pictures reach past {MAX_POSITION}; shorten "
            "the prompt or make the pictures smaller"
        )


def feature_grid(components: Components, image: Image.Image, area: int) -> tuple[int, int]:
    """Rows and columns of the features that a picture, shown at about `area` pixels, turns into."""
    config = components.config(VISION)
    cell = config.patch_size * config.spatial_merge_size
    width, height = _vision_size(components, image, area)
    return height // cell, width // cell


def encode_vision(components: Components, images: Sequence[Image.Image], area: int) -> mx.array:
    """Features (tokens, C) of all pictures, in order, each shown at about `area` pixels."""
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
        raise QwenImageError("the encoded prompt is not finite: try --dtype bfloat16, or check the weights")
    return states


def _vision_size(components: Components, image: Image.Image, area: int) -> Size:
    config, processor = components.config(VISION), components.image_processor
    return vision_size(
        size_of_area(area, image.size),
        config.patch_size * config.spatial_merge_size,
        processor.min_pixels,
        processor.max_pixels,
    )
