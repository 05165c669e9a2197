"""Writes text with a checkpoint's own language model, token by token.

Source: transformers' generate. Caches and filters are mlx-lm's, imported only here; the random draws have a key of
their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from ..config import GenerationConfig
from ..gpu import number
from ..models.causal import Caches
from ..models.layers import OnLayer
from ..registry import LANGUAGE_HEAD, TEXT_ENCODER
from .components import Components
from .progress import Progress
from .reporter import Reporter

MAX_TOKENS = 512

# A token's embedding (1, 1, C) and positions (3, 1), the caches, what is called after each layer -> its final states.
Continue = Callable[[mx.array, mx.array, Caches, OnLayer], mx.array]


def write_text(
    components: Components,
    ids: Sequence[int],
    position: int,
    begin: Callable[[Caches, OnLayer], mx.array],
    go_on: Continue,
    seed: int,
    report: Reporter,
) -> str:
    """What the language model writes after a prompt, up to `MAX_TOKENS`.

    Args:
        components: the checkpoint's components; the text encoder and its head are loaded.
        ids: of the prompt.
        position: its last one.
        begin: runs the prompt, and returns its final states (1, L, C).
        go_on: runs one more token.
        seed: the sampling seed, used if generation_config.json turns sampling on.
        report: receives every token.
    """
    from mlx_lm.models.cache import KVCache

    encoder, head = components.network(TEXT_ENCODER), components.network(LANGUAGE_HEAD)
    config, choose = components.generation_config, _chooser(components.generation_config, seed)
    new_cache: Callable[[], Any] = KVCache  # mlx-lm has no types
    caches = [new_cache() for _ in components.config(TEXT_ENCODER).layers]
    seen, written = [*ids], list[int]()
    while len(written) < MAX_TOKENS:
        with components.passing(TEXT_ENCODER) as pace:
            if written:
                here = mx.full((3, 1), position + len(written), dtype=mx.int32)
                states = go_on(encoder.embed(mx.array([[written[-1]]])), here, caches, pace)
            else:
                states = begin(caches, pace)
            token = choose(seen, head(states[:, -1]).astype(mx.float32))
        if token in config.eos_token_id:
            break
        seen.append(token)
        written.append(token)
        report(Progress("caption", len(written), MAX_TOKENS))
    return components.tokenizer.decode(written).strip()


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
