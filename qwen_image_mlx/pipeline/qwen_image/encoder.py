"""The condition encoder of Qwen-Image 1.x: template, Qwen2.5-VL, and captions if the checkpoint can write them."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from ...names import CaptionLanguage
from ...registry import TEXT_ENCODER, VISION
from ...text.prompt import tokenize_prompt
from ..components import Components
from ..reporter import Reporter
from ..seams import Encoded
from .states import check_length, encode_prompts, encode_vision, feature_grid


class QwenImageEncoder:
    """The `ConditionEncoder` of Qwen-Image 1.x.

    Args:
        components: the checkpoint's components; loads the text encoder and, for images, the vision tower.
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
        """States (1, L, C) of each prompt, in the model's dtype, evaluated; see `ConditionEncoder.encode`."""
        parts, area = self._components, self._components.variant.encoder_area
        grids = [feature_grid(parts, image, area) for image in images]
        template = parts.variant.template
        tokens = [tokenize_prompt(parts.tokenizer, template, text, grids, sequential_positions) for text in prompts]
        check_length(max(len(prompt.ids) - prompt.first for prompt in tokens))
        chosen = tokens if only is None else [tokens[number] for number in only]
        if not chosen:
            return Encoded([])
        features = None
        if images:
            parts.load(VISION)
            with report.stage("encode", "images"):
                features = encode_vision(parts, images, area)
        parts.load(TEXT_ENCODER)
        with report.stage("encode", "prompts"):
            return Encoded(encode_prompts(parts, chosen, features))

    def caption(self, image: Image.Image, area: int, language: CaptionLanguage, seed: int, report: Reporter) -> str:
        """The caption of an image, shown at about `area` pixels; see `ConditionEncoder.caption`."""
        from .caption import write_caption  # here: most runs write no caption

        self._components.prepare_captions()
        return write_caption(self._components, image, area, language, seed, report)
