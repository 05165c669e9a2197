"""From a prompt and a template to the token ids the text encoder runs, and the rows of its output that count.

Knows nothing of arrays or models. Source: the pipelines' _get_qwen_prompt_embeds and encode_prompt.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from ..errors import RequestError
from ..variants import Variant
from .tokenizer import QwenTokenizer

logger = logging.getLogger(__name__)

_SHOWN = 60  # characters of a cut prompt's end that a warning quotes


@dataclass(frozen=True)
class TokenizedPrompt:
    """What the text encoder is given.

    Attributes:
        ids: token ids of template and prompt.
        first, last: the half-open range of the encoder's output rows that go to the transformer.
    """

    ids: tuple[int, ...]
    first: int
    last: int


def tokenize_prompt(tokenizer: QwenTokenizer, variant: Variant, prompt: str) -> TokenizedPrompt:
    """Fills the template, tokenizes the whole (never template and prompt apart: they may merge), and cuts.

    A prompt over the limit is cut where the reference cuts it, with a warning that quotes the last words that count.

    Raises:
        RequestError: the prompt is not a string of whole characters.
    """
    if not isinstance(prompt, str):
        raise RequestError(f"a prompt is {prompt!r}, but must be a string")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"the prompt is not valid text at character {error.start}; write it in UTF-8") from error
    text = variant.template.format(prompt=prompt)
    ids, offsets = tokenizer.encode(text)
    limits = [len(ids)]
    if variant.max_tokens is not None:
        limits.append(variant.max_tokens)
    if variant.max_embeddings is not None:
        limits.append(variant.template_drop + variant.max_embeddings)
    last = min(limits)
    prompt_start = variant.template.index("{prompt}")
    cut = offsets[last - 1][1] - prompt_start if last else 0
    if cut < len(prompt):
        logger.warning(
            "the prompt is cut after %d of its %d characters (limit: %d tokens); the last words that count: “…%s”",
            cut, len(prompt), last - variant.template_drop, prompt[max(0, cut - _SHOWN) : cut],
        )  # fmt: skip
    # Rows past the last one that counts cannot influence it: the encoder is causal.
    return TokenizedPrompt(tuple(ids[:last]), min(variant.template_drop, last), last)
