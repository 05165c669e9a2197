"""The language model of Qwen2.5-VL: token ids in, final hidden states out; the head for the next token is separate.

Knows nothing of tokenizers or templates. Conditioning runs it once; to write text it is given caches of the keys and
values before. Formulas: transformers' modeling_qwen2_5_vl.py. Shapes: B batch, L tokens, C hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from .. import nn
from ..causal import Caches, KeyValueCache
from ..layers import Embedding, GatedMLP, Linear, OnLayer, Turns, periods, rotate_half, turns
from .config import TextEncoderConfig


class TextEncoder(nn.Module):
    """Decoder-only transformer; the output is the state after the final norm."""

    def __init__(self, config: TextEncoderConfig):
        super().__init__()
        self.model: LanguageModel = LanguageModel(config)

    def embed(self, ids: mx.array) -> mx.array:
        """Embeddings (B, L, C) of token ids (B, L)."""
        return self.model.embed_tokens(ids)

    def __call__(
        self, embeddings: mx.array, positions: mx.array, caches: Caches | None = None, on_layer: OnLayer | None = None
    ) -> mx.array:
        """Final states (B, L, C) of the tokens.

        Args:
            embeddings: (B, L, C), unpadded.
            positions: (3, L): time, row, column.
            caches: one per layer, with the preceding tokens; these tokens are added.
            on_layer: called after each layer.

        Returns:
            (B, L, C).
        """
        return self.model(embeddings, positions, caches, on_layer)

    def together(self, prompts: Sequence[tuple[mx.array, mx.array]], on_layer: OnLayer | None = None) -> list[mx.array]:
        """Final states of several prompts, (embeddings, positions) each; every layer serves all before the next one."""
        return self.model.together(prompts, on_layer)


class LanguageHead(nn.Module):
    """Final states to scores of the next token."""

    def __init__(self, config: TextEncoderConfig):
        super().__init__()
        self.lm_head: Linear = Linear(config.hidden_size, config.vocab_size, bias=False)

    def __call__(self, states: mx.array) -> mx.array:
        """(…, C) to (…, vocab_size)."""
        return self.lm_head(states)


class LanguageModel(nn.Module):
    """Embeddings to final states."""

    def __init__(self, config: TextEncoderConfig):
        super().__init__()
        self.embed_tokens: Embedding = Embedding(config.vocab_size, config.hidden_size)
        self.layers: list[DecoderLayer] = [DecoderLayer(config) for _ in config.layers]
        self.norm: nn.RMSNorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self._rope = (config.mrope_section, config.head_dim, config.rope_theta)

    def __call__(
        self, hidden: mx.array, positions: mx.array, caches: Caches | None, on_layer: OnLayer | None
    ) -> mx.array:
        """(B, L, C) to (B, L, C), causally."""
        tables = mrope_tables(positions, *self._rope, hidden.dtype)
        for layer, cache in zip(self.layers, caches or [None] * len(self.layers), strict=True):
            hidden = layer(hidden, tables, cache)
            if on_layer is not None:
                on_layer([hidden])
        return self.norm(hidden)

    def together(self, prompts: Sequence[tuple[mx.array, mx.array]], on_layer: OnLayer | None) -> list[mx.array]:
        """(B, L, C) to (B, L, C) for each, causally."""
        tables = [mrope_tables(positions, *self._rope, hidden.dtype) for hidden, positions in prompts]
        states = [hidden for hidden, _ in prompts]
        for layer in self.layers:
            states = [layer(hidden, turns, None) for hidden, turns in zip(states, tables, strict=True)]
            if on_layer is not None:
                on_layer(states)
        return [self.norm(hidden) for hidden in states]


class DecoderLayer(nn.Module):
    """Pre-norm attention and gated MLP."""

    def __init__(self, config: TextEncoderConfig):
        super().__init__()
        self.input_layernorm: nn.RMSNorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn: Attention = Attention(config)
        self.post_attention_layernorm: nn.RMSNorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp: GatedMLP = GatedMLP(config.hidden_size, config.intermediate_size)

    def __call__(self, hidden: mx.array, tables: Turns, cache: KeyValueCache | None) -> mx.array:
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), tables, cache)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class Attention(nn.Module):
    """Causal attention; several query heads share a key and value head."""

    def __init__(self, config: TextEncoderConfig):
        super().__init__()
        self.q_proj: Linear = Linear(config.hidden_size, config.hidden_size)
        self.k_proj: Linear = Linear(config.hidden_size, config.kv_dim)
        self.v_proj: Linear = Linear(config.hidden_size, config.kv_dim)
        self.o_proj: Linear = Linear(config.hidden_size, config.hidden_size, bias=False)
        self._head_dim = config.head_dim

    def __call__(self, x: mx.array, tables: Turns, cache: KeyValueCache | None) -> mx.array:
        q, k, v = (
            y.reshape(*y.shape[:-1], -1, self._head_dim).transpose(0, 2, 1, 3)
            for y in (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        )
        q, k = rotate_half(q, *tables), rotate_half(k, *tables)
        if cache is not None:
            k, v = cache.update_and_fetch(k, v)
        out = mx.fast.scaled_dot_product_attention(q, k, v, scale=self._head_dim**-0.5, mask="causal")
        return self.o_proj(out.transpose(0, 2, 1, 3).flatten(2))


def mrope_tables(positions: mx.array, sections: Sequence[int], head_dim: int, theta: float, dtype: mx.Dtype) -> Turns:
    """Tables (L, 2, head_dim / 2) of multi-axis positions (3, L): each run of frequencies follows its own axis.

    The tables are made in fp32 and rounded to `dtype`, as the reference does. Source: apply_multimodal_rotary_pos_emb.
    """
    frequencies = 1 / periods(theta, head_dim)
    bounds = [sum(sections[: i + 1]) for i in range(len(sections) - 1)]
    angles = mx.concatenate(
        [
            position[:, None] * chunk
            for position, chunk in zip(positions.astype(mx.float32), mx.split(frequencies, bounds), strict=True)
        ],
        axis=-1,
    )
    return turns(angles, axis=-2, dtype=dtype)
