"""The language model of Qwen3-VL: token ids in, hidden states out.

Knows nothing of tokenizers or templates. Images come in twice: their features stand in the places of their tokens, and
what the vision tower saw on the way is added after the first layers. Formulas: transformers' modeling_qwen3_vl.py.
Shapes: B batch, L tokens, C hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx

from .. import nn
from ..causal import Caches, KeyValueCache, causal_attention
from ..layers import Embedding, GatedMLP, Linear, OnLayer, Turns, periods, rotate_half, turns
from .config import TextEncoderConfig


class Prompt(NamedTuple):
    """What the language model is given.

    Attributes:
        embeddings: (B, L, C), unpadded, images' features in their places.
        positions: (3, L): time, row, column.
        additions: (B, L, C) each, added to the states after the first layer, the second, …; zeros for text.
    """

    embeddings: mx.array
    positions: mx.array
    additions: Sequence[mx.array] = ()


class TextEncoder(nn.Module):
    """Decoder-only transformer; the output is the state before the final norm, which Qwen-Image-2.1 was trained on."""

    def __init__(self, config: TextEncoderConfig):
        super().__init__()
        self.model: _Model = _Model(config)

    def embed(self, ids: mx.array) -> mx.array:
        """Embeddings (B, L, C) of token ids (B, L)."""
        return self.model.language_model.embed_tokens(ids)

    def together(self, prompts: Sequence[Prompt], on_layer: OnLayer | None = None) -> list[mx.array]:
        """States (B, L, C) of several prompts; every layer serves all of them before the next one."""
        return self.model.language_model(prompts, on_layer)

    def normed(self, states: mx.array) -> mx.array:
        """States after the final norm, as the language head takes them."""
        return self.model.language_model.norm(states)

    def __call__(self, prompt: Prompt, caches: Caches, on_layer: OnLayer | None = None) -> mx.array:
        """States (B, L, C) after the final norm of tokens that follow others; `caches`, one a layer, take them up."""
        (states,) = self.model.language_model([prompt], on_layer, caches)
        return self.normed(states)


class LanguageHead(nn.Module):
    """States after the final norm to scores of the next token."""

    def __init__(self, config: TextEncoderConfig):
        super().__init__()
        self.lm_head: Linear = Linear(config.hidden_size, config.vocab_size, bias=False)

    def __call__(self, states: mx.array) -> mx.array:
        """(…, C) to (…, vocab_size)."""
        return self.lm_head(states)


class _Model(nn.Module):
    """For the checkpoint's names."""

    def __init__(self, config: TextEncoderConfig):
        super().__init__()
        self.language_model: LanguageModel = LanguageModel(config)


class LanguageModel(nn.Module):
    """Embeddings to states."""

    def __init__(self, config: TextEncoderConfig):
        super().__init__()
        self.embed_tokens: Embedding = Embedding(config.vocab_size, config.hidden_size)
        self.layers: list[DecoderLayer] = [DecoderLayer(config) for _ in config.layers]
        self.norm: nn.RMSNorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self._rope = (config.mrope_section, config.head_dim, config.rope_theta)

    def __call__(
        self, prompts: Sequence[Prompt], on_layer: OnLayer | None, caches: Caches | None = None
    ) -> list[mx.array]:
        """(B, L, C) of each prompt, causally; not yet normalised. With caches one prompt goes on."""
        tables = [mrope_tables(prompt.positions, *self._rope, prompt.embeddings.dtype) for prompt in prompts]
        states = [prompt.embeddings for prompt in prompts]
        for number, (layer, cache) in enumerate(zip(self.layers, caches or [None] * len(self.layers), strict=True)):
            states = [layer(hidden, turns, cache) for hidden, turns in zip(states, tables, strict=True)]
            states = [
                hidden + prompt.additions[number] if number < len(prompt.additions) else hidden
                for hidden, prompt in zip(states, prompts, strict=True)
            ]
            if on_layer is not None:
                on_layer(states)
        return states


class DecoderLayer(nn.Module):
    """Pre-norm attention and gated MLP."""

    def __init__(self, config: TextEncoderConfig):
        super().__init__()
        self.input_layernorm: nn.RMSNorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn: Attention = Attention(config)
        self.post_attention_layernorm: nn.RMSNorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp: GatedMLP = GatedMLP(config.hidden_size, config.intermediate_size)

    def __call__(self, hidden: mx.array, tables: Turns, cache: KeyValueCache | None = None) -> mx.array:
        """(B, L, C) to (B, L, C)."""
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), tables, cache)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class Attention(nn.Module):
    """Causal attention; queries and keys are normalised by head, and several query heads share a key and value head."""

    def __init__(self, config: TextEncoderConfig):
        super().__init__()
        self.q_proj: Linear = Linear(config.hidden_size, config.query_dim, bias=False)
        self.k_proj: Linear = Linear(config.hidden_size, config.kv_dim, bias=False)
        self.v_proj: Linear = Linear(config.hidden_size, config.kv_dim, bias=False)
        self.o_proj: Linear = Linear(config.query_dim, config.hidden_size, bias=False)
        self.q_norm: nn.RMSNorm = nn.RMSNorm(config.head_dim, eps=config.rms_norm_eps)
        self.k_norm: nn.RMSNorm = nn.RMSNorm(config.head_dim, eps=config.rms_norm_eps)
        self._head_dim = config.head_dim

    def __call__(self, x: mx.array, tables: Turns, cache: KeyValueCache | None = None) -> mx.array:
        """(B, L, C) to (B, L, C)."""
        q, k, v = (
            y.reshape(*y.shape[:-1], -1, self._head_dim) for y in (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        )
        q, k = rotate_half(self.q_norm(q), *tables), rotate_half(self.k_norm(k), *tables)
        if cache is not None:
            kept = cache.update_and_fetch(k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3))
            k, v = (x.transpose(0, 2, 1, 3) for x in kept)
        return self.o_proj(causal_attention(q, k, v))


def mrope_tables(positions: mx.array, sections: Sequence[int], head_dim: int, theta: float, dtype: mx.Dtype) -> Turns:
    """Tables (L, 1, 2, head_dim / 2) of multi-axis positions (3, L): frequencies take turns between the axes.

    Of the frequencies 0, 1, 2, … every third from 1 on follows the row and every third from 2 on the column, as many as
    their sections say; all others follow time. Made in fp32 and rounded to `dtype`, as the reference does.
    """
    axes = [0] * (head_dim // 2)
    for axis in (1, 2):
        for place in range(axis, 3 * sections[axis], 3):
            axes[place] = axis
    chosen = mx.take(positions.astype(mx.float32), mx.array(axes), axis=0)
    angles = chosen.T * (1 / periods(theta, head_dim))
    return turns(angles[:, None], axis=-2, dtype=dtype)
