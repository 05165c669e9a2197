"""Writes an image's caption with the checkpoint's own Qwen2.5-VL: image in, text out, token by token.

Source: get_image_caption of diffusers' QwenImageLayeredPipeline and transformers' generate. Caches and filters are
mlx-lm's, imported only here; the random draws have a key of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
from PIL import Image

from ...config import GenerationConfig
from ...gpu import number
from ...names import CaptionLanguage
from ...registry import LANGUAGE_HEAD, TEXT_ENCODER, VISION
from ...text.prompt import replace_vision_tokens, tokenize_prompt
from ...variants import CAPTION_TEMPLATES
from ..components import Components
from ..progress import Progress
from ..reporter import Reporter
from .states import encode_vision, feature_grid

MAX_TOKENS = 512


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
    choose = _chooser(components.generation_config, seed)
    ids = list(map(int, tokens.ids))
    written = []
    for token in _continue(components, embeddings, mx.array(tokens.positions), lambda scores: choose(ids, scores)):
        if token in components.generation_config.eos_token_id:
            break
        ids.append(token)
        written.append(token)
        report(Progress("caption", len(written), MAX_TOKENS))
        if len(written) == MAX_TOKENS:
            break
    return components.tokenizer.decode(written).strip()


def _continue(
    components: Components, embeddings: mx.array, positions: mx.array, choose: Callable[[mx.array], int]
) -> Iterator[int]:
    """Token after token, without end; each runs the model once, over itself alone."""
    from mlx_lm.models.cache import KVCache

    encoder, head = components.network(TEXT_ENCODER), components.network(LANGUAGE_HEAD)
    new_cache: Callable[[], Any] = KVCache  # mlx-lm has no types
    caches = [new_cache() for _ in components.config(TEXT_ENCODER).layers]
    position = int(number(positions.max()))
    while True:
        with components.passing(TEXT_ENCODER) as pace:
            states = encoder(embeddings, positions, caches, pace)
            token = choose(head(states[:, -1]).astype(mx.float32))
        yield token
        position += 1
        embeddings = encoder.embed(mx.array([[token]]))
        positions = mx.full((3, 1), position, dtype=mx.int32)


def _chooser(config: GenerationConfig, seed: int) -> Callable[[list[int], mx.array], int]:
    """A function that picks the next token from the previous ones and its scores (1, vocabulary), fp32."""
    from mlx_lm.sample_utils import apply_top_k, apply_top_p, make_repetition_penalty

    penalize = make_repetition_penalty(config.repetition_penalty, context_size=1 << 20)
    key = mx.random.key(seed)

    def choose(ids: list[int], scores: mx.array) -> int:
        nonlocal key
        if config.repetition_penalty != 1:
            scores = penalize(mx.array(ids), scores)
        if not config.do_sample:
            return int(number(mx.argmax(scores)))
        scores = scores / config.temperature
        if 0 < config.top_k < scores.shape[-1]:
            scores = apply_top_k(scores, config.top_k)
        if config.top_p < 1:
            scores = apply_top_p(scores - mx.logsumexp(scores, axis=-1, keepdims=True), config.top_p)
        key, draw = mx.random.split(key)
        return int(number(mx.random.categorical(scores, key=draw)))

    return choose
