"""Writes an image's caption with the checkpoint's own Qwen2.5-VL: image in, text out.

Source: get_image_caption of diffusers' QwenImageLayeredPipeline.
"""

from __future__ import annotations

import mlx.core as mx
from PIL import Image

from ...names import CaptionLanguage
from ...registry import LANGUAGE_HEAD, TEXT_ENCODER, VISION
from ...text.prompt import replace_vision_tokens, tokenize_prompt
from ...variants import CAPTION_TEMPLATES
from ..caption import write_text
from ..components import Components
from ..reporter import Reporter
from .states import encode_vision, feature_grid


def write_caption(
    components: Components,
    image: Image.Image,
    area: int,
    language: CaptionLanguage,
    seed: int,
    report: Reporter,
) -> str:
    """The caption of an image, shown at about `area` pixels.

    Args:
        components: the checkpoint's components; loads the text encoder, its head and the vision tower.
        image: RGB, or RGBA, which is shown on white.
        area: in pixels.
        language: a key of `CAPTION_TEMPLATES`.
        seed: the sampling seed, used if generation_config.json turns sampling on.
        report: receives every token.
    """
    components.load(VISION, TEXT_ENCODER, LANGUAGE_HEAD)
    grid = feature_grid(components, image, area)
    tokens = tokenize_prompt(components.tokenizer, CAPTION_TEMPLATES[language], "", [grid])
    features = encode_vision(components, [image], area)
    encoder = components.network(TEXT_ENCODER)
    embeddings = replace_vision_tokens(encoder.embed(mx.array(tokens.ids)[None]), tokens.is_image, features)
    positions = mx.array(tokens.positions)
    return write_text(
        components, list(map(int, tokens.ids)), int(tokens.positions.max()),
        lambda caches, pace: encoder(embeddings, positions, caches, pace), encoder, seed, report,
    )  # fmt: skip
