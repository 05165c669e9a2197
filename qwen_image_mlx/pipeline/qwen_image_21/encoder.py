"""The condition encoder of Qwen-Image-2.1: template, the vision tower with its taps, Qwen3-VL.

The text encoder is shown an image at the very size at which the transformer is shown it: a place in the prompt stands
for 2x2 latents.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
from PIL import Image

from ...errors import CheckpointError, QwenImageError, RequestError
from ...gpu import all_finite, finish
from ...images.geometry import Size, size_of_area
from ...images.pixels import on_white, to_patches
from ...models.qwen3_vl.text import Prompt
from ...models.qwen3_vl.vision import Features
from ...models.qwen_image_21 import facts
from ...models.qwen_image_21.rope import MAX_POSITION
from ...names import CaptionLanguage
from ...registry import LANGUAGE_HEAD, TEXT_ENCODER, VISION
from ...text.places import image_starts
from ...text.prompt import TokenizedPrompt, replace_vision_tokens, tokenize_prompt
from ...variants import CAPTION_TEMPLATES
from ..components import Components
from ..reporter import Reporter
from ..seams import Encoded


class QwenImage21Encoder:
    """The `ConditionEncoder` of Qwen-Image-2.1.

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
        reference_pixels: int | None = None,
        only: Sequence[int] | None = None,
    ) -> Encoded:
        """As `ConditionEncoder.encode`."""
        parts, template = self._components, self._components.variant.template
        area = parts.variant.encoder_area if reference_pixels is None else reference_pixels
        sizes = [self._size(image, min(area, parts.variant.encoder_area)) for image in images]
        grids = [(height // facts.SIZE_MULTIPLE, width // facts.SIZE_MULTIPLE) for width, height in sizes]
        tokens = [
            tokenize_prompt(parts.tokenizer, template, text or facts.EMPTY_PROMPT, grids, sequential_positions)
            for text in prompts
        ]
        self._check(tokens)
        starts = image_starts(tokens[0], grids)
        chosen = tokens if only is None else [tokens[number] for number in only]
        if not chosen:
            return Encoded([], starts)
        features: list[Features] = []
        if images:
            parts.load(VISION)
            with report.stage("encode", "images"):
                features = [self._features(image, size) for image, size in zip(images, sizes, strict=True)]
        parts.load(TEXT_ENCODER)
        with report.stage("encode", "prompts"):
            return Encoded(self._states(chosen, features), starts)

    def caption(self, image: Image.Image, area: int, language: CaptionLanguage, seed: int, report: Reporter) -> str:
        """As `ConditionEncoder.caption`, by the prompts that Qwen-Image-Layered writes its captions with."""
        from ..caption import write_text  # here: most runs write no caption

        parts = self._components
        parts.prepare_captions()
        size = self._size(image, area)
        parts.load(VISION, TEXT_ENCODER, LANGUAGE_HEAD)
        grid = size[1] // facts.SIZE_MULTIPLE, size[0] // facts.SIZE_MULTIPLE
        tokens = tokenize_prompt(parts.tokenizer, CAPTION_TEMPLATES[language], "", [grid])
        prompt, encoder = self._prompt(tokens, [self._features(image, size)]), parts.network(TEXT_ENCODER)
        return write_text(
            parts, list(map(int, tokens.ids)), int(tokens.positions.max()),
            lambda caches, pace: encoder(prompt, caches, pace),
            lambda embedding, here, caches, pace: encoder(Prompt(embedding, here), caches, pace), seed, report,
        )  # fmt: skip

    def _size(self, image: Image.Image, area: int) -> Size:
        """(width, height) at which an image is shown.

        Raises:
            RequestError: the processor would change it.
        """
        processor = self._components.image_processor
        size = size_of_area(area, image.size)
        if not processor.min_pixels <= size[0] * size[1] <= processor.max_pixels:
            raise RequestError(
                f"an image would be shown at {size[0]}x{size[1]}; the text encoder takes {processor.min_pixels:,} to "
                f"{processor.max_pixels:,} pixels: change reference_pixels"
            )
        return size

    def _check(self, tokens: Sequence[TokenizedPrompt]) -> None:
        """Raises RequestError for a prompt that is too long, CheckpointError for another model's tokenizer."""
        vocabulary = self._components.config(TEXT_ENCODER).vocab_size
        for prompt in tokens:
            words = int((~prompt.is_image).sum()) - prompt.first
            if words > MAX_POSITION:
                raise RequestError(f"the prompt has {words} tokens; at most {MAX_POSITION} have a position: shorten it")
            if (largest := int(max(prompt.ids, default=0))) >= vocabulary:  # MLX does not look before it reads
                raise CheckpointError(
                    f"the tokenizer gives the token {largest}, but the text encoder has {vocabulary}: they do not "
                    "belong together"
                )

    def _features(self, image: Image.Image, size: Size) -> Features:
        """What the vision tower makes of an image, evaluated."""
        parts, processor = self._components, self._components.image_processor
        config = parts.config(VISION)
        patches = to_patches(
            on_white(image.resize(size, Image.Resampling.LANCZOS)), size, patch=config.patch_size,
            merge=config.spatial_merge_size, mean=processor.image_mean, std=processor.image_std,
        )  # fmt: skip
        rows, columns = size[1] // config.patch_size, size[0] // config.patch_size
        with parts.passing(VISION) as pace:
            features: Features = parts.network(VISION)(patches.astype(parts.dtype), rows, columns, pace)
            finish(features.merged, *features.taps)
        return features

    def _prompt(self, prompt: TokenizedPrompt, features: Sequence[Features]) -> Prompt:
        """What the language model is given: images' features in their places, and their taps."""
        embeddings = self._components.network(TEXT_ENCODER).embed(mx.array(prompt.ids)[None])
        additions: list[mx.array] = []
        if features:
            seen = zip(*([image.merged, *image.taps] for image in features), strict=True)
            merged, *taps = (mx.concatenate(list(images)) for images in seen)
            nothing = mx.zeros_like(embeddings)
            additions = [replace_vision_tokens(nothing, prompt.is_image, tap) for tap in taps]
            embeddings = replace_vision_tokens(embeddings, prompt.is_image, merged)
        return Prompt(embeddings, mx.array(prompt.positions), additions)

    def _states(self, tokens: Sequence[TokenizedPrompt], features: Sequence[Features]) -> list[mx.array]:
        """States (1, L, C) of each prompt's rows that count, evaluated."""
        parts = self._components
        encoder, prompts = parts.network(TEXT_ENCODER), [self._prompt(prompt, features) for prompt in tokens]
        with parts.passing(TEXT_ENCODER) as pace:
            whole = encoder.together(prompts, pace)
            states = [rows[:, prompt.first :] for rows, prompt in zip(whole, tokens, strict=True)]
            finish(*states)
        if not all_finite(*states):
            raise QwenImageError("the encoded prompt is not finite: try the dtype bfloat16, or check the weights")
        return states
