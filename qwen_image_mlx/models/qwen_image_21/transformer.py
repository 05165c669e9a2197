"""The single-stream diffusion transformer of Qwen-Image-2.1.

Text, reference images and the target share one sequence and one set of weights. Text and references come first, are
modulated as at timestep 0 and never see the target: this prefix is the same in every step. A block hands out its keys
and values, and with these at hand a step runs the target alone; computed again they are the same numbers.

Knows nothing of schedules, guidance or prompts. Formulas: diffusers' transformer_qwenimage21.py. Shapes: B batch,
N target tokens, P prefix tokens, L text tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import mlx.core as mx

from .. import nn
from ..causal import causal_attention
from ..layers import Linear, OnLayer, Relay, attention, gated_add, gelu_tanh, here
from ..rotary import Rotary, rotate
from .config import TransformerConfig
from .rope import Run


class Rows(NamedTuple):
    """What a timestep contributes, the same to every block; each (D,), or (B, 1, D) with a timestep for each sample.

    Attributes:
        scale1, gate1: of the attention half: 1 + scale, and the gate after its tanh.
        scale2, gate2: of the MLP half.
        out: 1 + scale of the final norm.
    """

    scale1: mx.array
    gate1: mx.array
    scale2: mx.array
    gate2: mx.array
    out: mx.array


class KeysValues(NamedTuple):
    """A block's keys, turned by their positions, and values of some tokens: (B, tokens, heads, head_dim) each."""

    keys: mx.array
    values: mx.array


class Prefix(NamedTuple):
    """Text and references, as they enter the first block.

    Attributes:
        hidden: (B, P, D).
        runs: what its tokens are, in order.
        rotary: their tables.
    """

    hidden: mx.array
    runs: Sequence[Run]
    rotary: Rotary


class Branch(NamedTuple):
    """What the target is generated from, once with the prompt and, under guidance, once with the negative prompt.

    Attributes:
        prefix: what is computed before the target; or, one for each block, what was kept of it.
        rotary: tables of the target's tokens, which come after it.
    """

    prefix: Prefix | Sequence[KeysValues]
    rotary: Rotary


class Hidden(NamedTuple):
    """The streams of each branch between two blocks.

    Attributes:
        targets: (B, N, D) of each branch.
        prefixes: (B, P, D) by the number of the branch, where the prefix is computed in this pass.
        kept: the keys and values of each branch's prefix, one for each block that has run; empty unless kept.
    """

    targets: Sequence[mx.array]
    prefixes: Mapping[int, mx.array]
    kept: Sequence[Sequence[KeysValues]]

    def with_targets(self, targets: Sequence[mx.array]) -> Hidden:
        """The same with other targets."""
        return self._replace(targets=targets)


# (number of the block, number of the branch) -> what a control adds after it to prefix and target, or None.
Hint = Callable[[int, int], tuple[mx.array, mx.array] | None]


class Transformer(nn.Module):
    """Predicts the velocity of every target token.

    Attributes:
        relay: what connects the blocks here with those that run elsewhere; None runs all of them here.
    """

    relay: Relay | None = None

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.img_in: Linear = Linear(config.in_channels, config.dim, bias=False)
        self.txt_in: TextProjection = TextProjection(config)
        self.transformer_blocks: list[TransformerBlock] = [TransformerBlock(config) for _ in config.blocks]
        self.proj_out: Linear = Linear(config.dim, config.out_channels, bias=False)
        self._depth, self._eps = config.num_layers, config.eps

    @property
    def blocks_here(self) -> range:
        """The numbers of the blocks that run here."""
        return here(range(self._depth), self.relay)

    def project_text(self, states: mx.array) -> mx.array:
        """Encoder states (B, L, context_in_dim) to text tokens (B, L, D); the same in every step."""
        return self.txt_in(states)

    def project_references(self, latents: mx.array) -> mx.array:
        """Packed reference latents (B, R, in_channels) to image tokens (B, R, D); the same in every step."""
        return self.img_in(latents)

    # The three parts of a pass.

    def enter(self, latents: mx.array, branches: Sequence[Branch]) -> Hidden:
        """What enters the first block, for each branch."""
        target = self.img_in(latents)
        prefixes = {n: b.prefix.hidden for n, b in enumerate(branches) if isinstance(b.prefix, Prefix)}
        return Hidden([target for _ in branches], prefixes, [[] for _ in branches])

    def run(
        self,
        entered: Hidden,
        branches: Sequence[Branch],
        rows: Rows,
        still: Rows,
        blocks: slice = slice(None),
        on_layer: OnLayer | None = None,
        keep: bool = True,
        hints: Sequence[Hint] = (),
    ) -> Hidden:
        """The streams after some consecutive blocks; every block serves all branches before the next one.

        With a relay one branch goes through all blocks here before the next one, so that ranks work at the same time.

        Args:
            entered: of `enter`, or of an earlier call for the blocks before.
            branches: what is generated.
            rows: this step's rows.
            still: the rows of timestep 0, for prefixes.
            blocks: which run; of these, where a rank has a part of the transformer, those that are in it.
            on_layer: called after each block with what it made.
            keep: hand out the prefixes' keys and values, which takes the memory of all blocks' at once: given as
                `Branch.prefix` to later steps, they leave out all work on the prefix.
            hints: added after each block to targets and prefixes, none of which may be a kept one.
        """
        relay, numbers = self.relay, here(range(self._depth)[blocks], self.relay)
        if not numbers:
            return entered
        targets, hidden = list(entered.targets), dict(entered.prefixes)
        kept = [list(seen) for seen in entered.kept]

        def through(some: range) -> None:
            """Takes some of the branches through the blocks."""
            for number, block in zip(numbers, self.transformer_blocks[numbers.start : numbers.stop], strict=True):
                made: list[mx.array] = []
                for n in some:
                    prefix, rotary = branches[n]
                    if isinstance(prefix, Prefix):
                        seen, hidden[n] = block.prefix(hidden[n], prefix.runs, still, prefix.rotary)
                        made += seen
                        if number + 1 < self._depth:  # after the last block nobody reads it
                            made.append(hidden[n])
                    else:
                        seen = prefix[number - self.blocks_here.start]
                    if keep:
                        kept[n].append(seen)
                    targets[n] = block(targets[n], rows, rotary, seen)
                for added, n in ((hint(number, n), n) for hint in hints for n in some):
                    if added is not None:
                        hidden[n], targets[n] = hidden[n] + added[0], targets[n] + added[1]
                if on_layer is not None:
                    on_layer([*made, *(targets[n] for n in some)])

        if relay is None:
            through(range(len(targets)))
        else:
            for n in range(len(targets)):
                targets[n], *before = relay.receive(numbers.start, [targets[n], *([hidden[n]] if n in hidden else [])])
                if before:
                    hidden[n] = before.pop()
                through(range(n, n + 1))
                relay.send(numbers.stop, [targets[n], *([hidden[n]] if n in hidden else [])])
        return Hidden(targets, hidden, kept)

    def leave(self, hidden: Hidden, rows: Rows) -> list[mx.array]:
        """The velocities (B, N, out_channels) of what leaves the last block."""
        return [self.read_out(target, rows) for target in hidden.targets]

    def read_out(self, target: mx.array, rows: Rows) -> mx.array:
        """Velocities (B, N, out_channels) of the target (B, N, D) after the last block."""
        return self.proj_out(_scaled_norm(target, rows.out, self._eps))

    def signal(self, hidden: Hidden, rows: Rows) -> mx.array:
        """The target (B, N, D) of the first branch as the first block's attention takes it: normed and scaled."""
        return _scaled_norm(hidden.targets[0], rows.scale1, self._eps)


class TransformerBlock(nn.Module):
    """Attention, then a gated MLP, each scaled before it and gated after it."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.attn: Attention = Attention(config)
        self.img_mlp: FeedForward = FeedForward(config.dim, config.inner_dim)
        self._eps = config.eps

    def __call__(self, x: mx.array, rows: Rows, rotary: Rotary, before: KeysValues) -> mx.array:
        """The target (B, N, D) after the block; `before` is what it sees besides itself."""
        q, own = self.attn.project(_scaled_norm(x, rows.scale1, self._eps), rotary)
        return self._finish(x, attention(q, *(_join(*pair) for pair in zip(before, own, strict=True))), rows)

    def prefix(self, x: mx.array, runs: Sequence[Run], rows: Rows, rotary: Rotary) -> tuple[KeysValues, mx.array]:
        """The keys and values of a prefix (B, P, D), and the prefix after the block."""
        q, own = self.attn.project(_scaled_norm(x, rows.scale1, self._eps), rotary)
        gathered, start = [], 0
        for run in runs:
            end = start + run.length
            attend = attention if run.grid else causal_attention
            gathered.append(attend(q[:, start:end], own.keys[:, :end], own.values[:, :end]))
            start = end
        return own, self._finish(x, mx.concatenate(gathered, axis=1), rows)

    def _finish(self, x: mx.array, gathered: mx.array, rows: Rows) -> mx.array:
        x = gated_add(x, rows.gate1, *self.attn.to_out[0].terms(gathered))
        return gated_add(x, rows.gate2, *self.img_mlp.terms(_scaled_norm(x, rows.scale2, self._eps)))


class Attention(nn.Module):
    """The projections around attention; queries and keys are normalised by head and turned by their positions."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        dim, head_dim = config.dim, config.attention_head_dim
        self.to_q: Linear = Linear(dim, dim, bias=False)
        self.to_k: Linear = Linear(dim, dim, bias=False)
        self.to_v: Linear = Linear(dim, dim, bias=False)
        self.to_out: list[Linear] = [Linear(dim, dim, bias=False)]
        self.norm_q: nn.RMSNorm = nn.RMSNorm(head_dim, eps=config.eps)
        self.norm_k: nn.RMSNorm = nn.RMSNorm(head_dim, eps=config.eps)
        self._heads = (config.num_attention_heads, head_dim)

    def project(self, x: mx.array, rotary: Rotary) -> tuple[mx.array, KeysValues]:
        """Queries (B, tokens, heads, head_dim) of x (B, tokens, D), and its keys and values."""
        q, k, v = (y.reshape(*y.shape[:-1], *self._heads) for y in (self.to_q(x), self.to_k(x), self.to_v(x)))
        return rotate(self.norm_q(q), *rotary), KeysValues(rotate(self.norm_k(k), *rotary), v)


class FeedForward(nn.Module):
    """out(silu(gate_layer(x)) * proj(x))."""

    def __init__(self, dim: int, inner: int):
        super().__init__()
        self.proj: Linear = Linear(dim, inner, bias=False)
        self.gate_layer: Linear = Linear(dim, inner, bias=False)
        self.out: Linear = Linear(inner, dim, bias=False)

    def terms(self, x: mx.array) -> tuple[mx.array, ...]:
        """What adds up to the output (…, D)."""
        return self.out.terms(_silu_gate(self.gate_layer(x), self.proj(x)))


class TextProjection(nn.Module):
    """Encoder states to text tokens: norm, linear, tanh-GELU, linear."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.text_norm: ZeroCentredNorm = ZeroCentredNorm(config.context_in_dim, config.eps)
        self.in_layer: Linear = Linear(config.context_in_dim, config.dim, bias=False)
        self.out_layer: Linear = Linear(config.dim, config.dim, bias=False)

    def __call__(self, states: mx.array) -> mx.array:
        """(B, L, context_in_dim) to (B, L, D)."""
        return self.out_layer(gelu_tanh(*self.in_layer.terms(self.text_norm(states))))


class ZeroCentredNorm(nn.Module):
    """RMS norm times 1 + weight, in fp32 whatever the model's dtype."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight: mx.array = mx.zeros((dim,))
        self._eps = eps

    def __call__(self, x: mx.array) -> mx.array:
        scale = 1 + self.weight.astype(mx.float32)
        return mx.fast.rms_norm(x.astype(mx.float32), scale, self._eps).astype(x.dtype)


def _join(before: mx.array, own: mx.array) -> mx.array:
    """Keys or values (B, tokens, heads, head_dim) of all tokens, with each head's next to each other in memory.

    So attention reads them: copied in any other order, a CPU's would copy them again.
    """
    return mx.concatenate([before.swapaxes(1, 2), own.swapaxes(1, 2)], axis=2).swapaxes(1, 2)


def _scaled_norm(x: mx.array, scale: mx.array, eps: float) -> mx.array:
    """Layer norm of x (B, tokens, D) times scale; a scale (D,) that all samples share makes it one kernel."""
    if scale.ndim == 1:
        return mx.fast.layer_norm(x, scale, None, eps)
    return mx.fast.layer_norm(x, None, None, eps) * scale


@mx.compile
def _silu_gate(gate: mx.array, x: mx.array) -> mx.array:
    """silu(gate) * x; silu in fp32, rounded once, as torch computes it.

    Written as gate / (1 + exp(-gate)), torch's own form, which takes half the time of `mx.sigmoid`'s on a CPU. The
    exponent ends at 80, where the result is 0 to 33 digits: past 88 the gradient is not a number.
    """
    wide = gate.astype(mx.float32)
    return (wide / (1 + mx.exp(mx.minimum(-wide, 80)))).astype(gate.dtype) * x
