"""From a prompt, its images and a template to the text encoder's input, and the rows of its output that are used.

Sources: the pipelines' _get_qwen_prompt_embeds and encode_prompt; Qwen2VLProcessor; get_rope_index of Qwen2.5-VL.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ..errors import CheckpointError, RequestError
from ..variants import Template
from .tokenizer import QwenTokenizer

logger: logging.Logger = logging.getLogger(__name__)

IMAGE_PAD = "<|image_pad|>"
_QUOTED = 60  # characters of a cut prompt's end that a warning quotes


@dataclass(frozen=True)
class TokenizedPrompt:
    """The text encoder's input.

    Attributes:
        ids: int32 (L,): token ids of template, images and prompt.
        is_image: bool (L,): which tokens stand for an image's features.
        positions: int32 (3, L): time, row and column of each token.
        first: the encoder's output rows from this one on go to the transformer.
    """

    ids: np.ndarray
    is_image: np.ndarray
    positions: np.ndarray
    first: int


def tokenize_prompt(
    tokenizer: QwenTokenizer,
    template: Template,
    prompt: str,
    grids: Sequence[tuple[int, int]] = (),
    sequential_positions: bool = False,
) -> TokenizedPrompt:
    """Fills the template, tokenizes the whole (template and prompt together, as tokens may merge), and cuts.

    A prompt over the limit is cut where the reference cuts it, with a warning that quotes the last words kept.

    Args:
        tokenizer: the checkpoint's.
        template: the text around the prompt, and the limits.
        prompt: the user's text.
        grids: for each image, the rows and columns of its features.
        sequential_positions: number the tokens 0, 1, 2, … even with images, as libraries without the three
            position axes do.

    Raises:
        RequestError: the prompt is not a string of whole characters, or contains an image's placeholder.
    """
    if not isinstance(prompt, str):
        raise RequestError(f"a prompt is {prompt!r}, but must be a string")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"the prompt is not valid text at character {error.start}; write it in UTF-8") from error
    images = template.between.join(template.image.format(n=n + 1) for n in range(len(grids)))
    head = template.text.split("{prompt}")[0] + images
    text = template.text.format(prompt=images + prompt)
    ids, offsets = tokenizer.encode(text)
    if max(ids, default=0) >= 2**31:
        raise CheckpointError(f"the tokenizer gives the token {max(ids)}, which no vocabulary has: download it again")
    last = min(
        len(ids),
        template.max_tokens or len(ids),
        template.drop + template.max_embeddings if template.max_embeddings else len(ids),
    )
    cut = offsets[last - 1][1] - len(head)
    if cut < len(prompt):
        logger.warning(
            "the prompt is cut after %d of its %d characters (limit: %d tokens); the last words kept: “…%s”",
            cut, len(prompt), last - template.drop, prompt[max(0, cut - _QUOTED) : cut],
        )  # fmt: skip
    # Later rows cannot influence the kept ones: the encoder is causal.
    short = np.array(ids[:last], dtype=np.int32)
    slots = np.flatnonzero(short == tokenizer.token_id(IMAGE_PAD)) if grids else np.array([], dtype=np.int64)
    if len(slots) != len(grids):
        raise RequestError(f"the prompt contains the token {IMAGE_PAD}, which stands for an image; remove it")
    counts = np.ones(len(short), dtype=np.int64)
    counts[slots] = [rows * cols for rows, cols in grids]
    long = np.repeat(short, counts)
    is_image = np.repeat(np.isin(np.arange(len(short)), slots), counts)
    positions = _positions(len(short), dict(zip(slots.tolist(), grids, strict=True)))
    if sequential_positions:
        positions = np.broadcast_to(np.arange(len(long), dtype=np.int32), positions.shape)
    return TokenizedPrompt(long, is_image, positions, template.drop)


def _positions(length: int, images: dict[int, tuple[int, int]]) -> np.ndarray:
    """int32 (3, L): text counts up on all axes; an image spreads over rows and columns, and takes its longer side."""
    runs, start, begin = [], 0, 0
    for slot in (*sorted(images), length):
        text = np.arange(slot - begin) + start
        runs.append(np.stack([text] * 3))
        start += slot - begin
        if slot < length:
            rows, cols = images[slot]
            grid = np.stack([np.zeros((rows, cols), np.int64), *np.indices((rows, cols))])
            runs.append(grid.reshape(3, -1) + start)
            start += max(rows, cols)
        begin = slot + 1
    return np.concatenate(runs, axis=1).astype(np.int32)


def replace_vision_tokens(embeddings: mx.array, is_image: np.ndarray, features: mx.array) -> mx.array:
    """Replaces the placeholders' embeddings with the images' features, in order.

    Args:
        embeddings: (1, L, C) of all tokens.
        is_image: bool (L,): which of them are placeholders.
        features: (n, C), in the embeddings' dtype.

    Returns:
        (1, L, C).

    Raises:
        RequestError: the numbers of placeholders and features differ.
    """
    count = int(is_image.sum())
    if count != features.shape[0]:
        raise RequestError(f"{count} placeholders for image features, but {features.shape[0]} features")
    source = np.where(is_image, np.cumsum(is_image) - 1, 0)
    placed = mx.take(features.astype(embeddings.dtype), mx.array(source), axis=0)
    return mx.where(mx.array(is_image)[None, :, None], placed[None], embeddings)
