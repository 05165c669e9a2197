"""The dual-stream diffusion transformer (MMDiT) of the Qwen-Image family.

Takes packed latents, projected text, one step's modulation and rotary tables; knows nothing of timesteps, schedules
or guidance. A third of the checkpoint's weights only turn the timestep into modulation: they are not part of this
module, see `Modulation`, `modulation.py` and `pipeline/qwen_image/table.py`.

Formulas: diffusers' transformer_qwenimage.py. Shapes: B batch, N image tokens, L text tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import mlx.core as mx

from .. import nn
from ..layers import Linear, OnLayer, Relay, attention, gated_add, gelu_tanh, here
from ..rotary import Rotary, rotate
from .config import TransformerConfig

EPS = 1e-6

Rows = Sequence[mx.array]


class BlockRows(NamedTuple):
    """One block's modulation in one step.

    Each is six arrays (D,): shift, 1 + scale and gate of the attention half, then of the MLP half; or (B, 1, D), where
    every sample has a timestep of its own, as in training. Reference tokens have rows of their own where the model sees
    them at timestep 0 (`zero_cond_t`), else they share the target's.
    """

    text: Rows
    target: Rows
    references: Rows


class Modulation(NamedTuple):
    """The timestep's contribution to one forward pass.

    Attributes:
        blocks: the rows of each block.
        out: two arrays (D,) or (B, 1, D): 1 + scale and shift of the final norm.
    """

    blocks: list[BlockRows]
    out: Rows


class Hidden(NamedTuple):
    """The streams of each branch between two blocks.

    Attributes:
        images: the target (B, N, D) and, if any, the references (B, R, D), for each branch.
        texts: (B, L, D) for each branch.
    """

    images: Sequence[list[mx.array]]
    texts: Sequence[mx.array]

    @property
    def targets(self) -> list[mx.array]:
        """The target (B, N, D) of each branch."""
        return [images[0] for images in self.images]

    def with_targets(self, targets: Sequence[mx.array]) -> Hidden:
        """The same with other targets."""
        moved = [[target, *images[1:]] for target, images in zip(targets, self.images, strict=True)]
        return Hidden(moved, self.texts)


# (block, images, text, rows, rotary tables) -> the streams after the block.
RunBlock = Callable[..., tuple[list[mx.array], mx.array]]
# (number of the block, number of the text, target tokens (B, N, D) after the block) -> what a control adds to them.
Hint = Callable[[int, int, mx.array], mx.array | None]


class Transformer(nn.Module):
    """Predicts the velocity of every target token.

    Attributes:
        relay: what connects the blocks here with those that run elsewhere; None runs all of them here.
    """

    relay: Relay | None = None

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.img_in: Linear = Linear(config.in_channels, config.dim)
        self.txt_norm: nn.RMSNorm = nn.RMSNorm(config.joint_attention_dim, eps=EPS)
        self.txt_in: Linear = Linear(config.joint_attention_dim, config.dim)
        self.transformer_blocks: list[TransformerBlock] = [
            TransformerBlock(config, row["last"]) for row in config.blocks
        ]
        self.proj_out: Linear = Linear(config.dim, config.patch_channels)
        self._depth = config.num_layers

    @property
    def blocks_here(self) -> range:
        """The numbers of the blocks that run here."""
        return here(range(self._depth), self.relay)

    def project_text(self, embeddings: mx.array) -> mx.array:
        """Encoder states (B, L, joint_attention_dim) to text tokens (B, L, D); the same in every step."""
        return self.txt_in(self.txt_norm(embeddings))

    def project_references(self, latents: mx.array) -> mx.array:
        """Packed reference latents (B, R, in_channels) to image tokens (B, R, D); the same in every step."""
        return self.img_in(latents)

    def __call__(
        self,
        latents: mx.array,
        text: mx.array,
        modulation: Modulation,
        rotary: Rotary,
        references: mx.array | None = None,
        run_block: RunBlock | None = None,
    ) -> mx.array:
        """Velocity (B, N, patch channels) of the packed target latents (B, N, in_channels).

        Args:
            latents: packed latents of the target.
            text: `project_text`'s result (B, L, D), without padding.
            modulation: this step's rows.
            rotary: tables for L + N (+ R) tokens: text, target, references.
            references: `project_references`' result (B, R, D), or None.
            run_block: replaces the call of a block; training saves memory with it.
        """
        (velocity,) = self.velocities(latents, [text], modulation, [rotary], references, run_block)
        return velocity

    def velocities(
        self,
        latents: mx.array,
        texts: Sequence[mx.array],
        modulation: Modulation,
        rotary: Sequence[Rotary],
        references: mx.array | None = None,
        run_block: RunBlock | None = None,
        on_layer: OnLayer | None = None,
    ) -> list[mx.array]:
        """Velocities (B, N, patch channels) of several texts; see `run`."""
        hidden = self.enter(latents, texts, references)
        hidden = self.run(hidden, modulation, rotary, run_block=run_block, on_layer=on_layer)
        return self.leave(hidden, modulation)

    # The three parts of a pass, for callers that leave some of its blocks out.

    def enter(self, latents: mx.array, texts: Sequence[mx.array], references: mx.array | None = None) -> Hidden:
        """What enters the first block, for each of several texts."""
        images = [self.img_in(latents)]
        if references is not None:
            images.append(references)
        return Hidden([images for _ in texts], texts)

    def run(
        self,
        hidden: Hidden,
        modulation: Modulation,
        rotary: Sequence[Rotary],
        blocks: slice = slice(None),
        run_block: RunBlock | None = None,
        on_layer: OnLayer | None = None,
        hints: Sequence[Hint] = (),
    ) -> Hidden:
        """The streams after some consecutive blocks; every block serves all texts before the next one.

        With a relay one text goes through all blocks here before the next one, so that ranks work at the same time.

        Args:
            hidden: of `enter`, or of an earlier call for the blocks before.
            modulation: this step's rows, of the blocks here.
            rotary: tables of each text's sequence.
            blocks: which run; of these, where a rank has a part of the transformer, those that are in it.
            run_block: replaces the call of a block; training saves memory with it.
            on_layer: called after each block with what it made.
            hints: added to the target's tokens after each block.
        """
        relay, run_block = self.relay, run_block or TransformerBlock.__call__
        numbers, first = here(range(self._depth)[blocks], relay), self.blocks_here.start
        if not numbers:
            return hidden
        streams = list(zip(hidden.images, hidden.texts, strict=True))

        def through(texts: range) -> None:
            """Takes some of the texts through the blocks."""
            run = self.transformer_blocks[numbers.start : numbers.stop]
            rows = modulation.blocks[numbers.start - first : numbers.stop - first]
            for number, block, of_block in zip(numbers, run, rows, strict=True):
                made: list[mx.array] = []
                for text in texts:
                    images, before = streams[text]
                    images, after = run_block(block, images, before, of_block, rotary[text])
                    images = [_add_hints(hints, number, text, images[0]), *images[1:]]
                    streams[text] = images, after
                    made += images if after is before else [*images, after]  # the last block returns its text unchanged
                if on_layer is not None:
                    on_layer(made)

        if relay is None:
            through(range(len(streams)))
        else:
            for text, (images, txt) in enumerate(streams):
                *images, txt = relay.receive(numbers.start, [*images, txt])
                streams[text] = images, txt
                del images, txt  # they live on in `streams` as long as they are needed
                through(range(text, text + 1))
                relay.send(numbers.stop, [*streams[text][0], streams[text][1]])
        return Hidden([images for images, _ in streams], [txt for _, txt in streams])

    def leave(self, hidden: Hidden, modulation: Modulation) -> list[mx.array]:
        """The velocities (B, N, patch channels) of what leaves the last block."""
        return [self.proj_out(modulate(target, *modulation.out)) for target in hidden.targets]

    def signal(self, hidden: Hidden, modulation: Modulation) -> mx.array:
        """The target (B, N, D) of the first branch as the first block's attention takes it: normed and modulated."""
        shift, scale, *_ = modulation.blocks[0].target
        return modulate(hidden.targets[0], scale, shift)


def _add_hints(hints: Sequence[Hint], block: int, text: int, target: mx.array) -> mx.array:
    """The target's tokens and the sum of all hints, each of which sees the tokens without the others."""
    added = [value for hint in hints if (value := hint(block, text, target)) is not None]
    for value in added:
        target = target + value
    return target


class TransformerBlock(nn.Module):
    """Joint attention, then an MLP on every stream; target and references share the image weights.

    The last block yields the target alone: its text and its references are not used.
    """

    def __init__(self, config: TransformerConfig, last: bool):
        super().__init__()
        self.attn: JointAttention = JointAttention(config, last)
        self.img_mlp: FeedForward = FeedForward(config.dim)
        if not last:
            self.txt_mlp: FeedForward = FeedForward(config.dim)
        self._last = last

    def __call__(
        self, images: list[mx.array], txt: mx.array, rows: BlockRows, rotary: Rotary
    ) -> tuple[list[mx.array], mx.array]:
        """The streams after the block; images are the target (B, N, D) and, if any, the references (B, R, D)."""
        streams = [(txt, rows.text), *zip(images, rows[1:], strict=False)]
        normed = [modulate(x, scale, shift) for x, (shift, scale, *_) in streams]
        attended = self.attn(normed[0], normed[1:], rotary)
        if self._last:
            return [_add_mlp(self.img_mlp, images[0], rows.target, attended[0])], txt
        txt = _add_mlp(self.txt_mlp, txt, rows.text, attended[0])
        return [
            _add_mlp(self.img_mlp, x, row, out) for (x, row), out in zip(streams[1:], attended[1:], strict=True)
        ], txt


def _add_mlp(mlp: FeedForward, x: mx.array, rows: Rows, attended: Sequence[mx.array]) -> mx.array:
    """Adds a stream's attention, given as terms, and then its MLP, each through its gate."""
    _, _, gate1, shift2, scale2, gate2 = rows
    x = gated_add(x, gate1, *attended)
    return gated_add(x, gate2, *mlp.terms(modulate(x, scale2, shift2)))


class JointAttention(nn.Module):
    """Attention over text and image tokens together, with weights of their own for each kind."""

    def __init__(self, config: TransformerConfig, last: bool):
        super().__init__()
        dim, head_dim = config.dim, config.attention_head_dim
        self.to_q: Linear = Linear(dim, dim)
        self.to_k: Linear = Linear(dim, dim)
        self.to_v: Linear = Linear(dim, dim)
        self.to_out: list[Linear] = [Linear(dim, dim)]
        self.norm_q: nn.RMSNorm = nn.RMSNorm(head_dim, eps=EPS)
        self.norm_k: nn.RMSNorm = nn.RMSNorm(head_dim, eps=EPS)
        self.add_k_proj: Linear = Linear(dim, dim)
        self.add_v_proj: Linear = Linear(dim, dim)
        self.norm_added_k: nn.RMSNorm = nn.RMSNorm(head_dim, eps=EPS)
        if not last:
            self.add_q_proj: Linear = Linear(dim, dim)
            self.to_add_out: Linear = Linear(dim, dim)
            self.norm_added_q: nn.RMSNorm = nn.RMSNorm(head_dim, eps=EPS)
        self._last = last
        self._heads = (config.num_attention_heads, head_dim)

    def __call__(self, txt: mx.array, images: list[mx.array], rotary: Rotary) -> list[tuple[mx.array, ...]]:
        """The attention output of each stream, as terms, text first; in the last block only the target's."""
        lengths = [x.shape[1] for x in (txt, *images)]
        keys = [self.norm_added_k(self._split(self.add_k_proj(txt)))]
        keys += [self.norm_k(self._split(self.to_k(x))) for x in images]
        values = [self._split(self.add_v_proj(txt)), *(self._split(self.to_v(x)) for x in images)]
        if self._last:
            asking = slice(lengths[0], lengths[0] + lengths[1])
            queries = [self.norm_q(self._split(self.to_q(images[0])))]
        else:
            asking = slice(None)
            queries = [self.norm_added_q(self._split(self.add_q_proj(txt)))]
            queries += [self.norm_q(self._split(self.to_q(x))) for x in images]
        q = rotate(mx.concatenate(queries, axis=1), *(table[asking] for table in rotary))
        k = rotate(mx.concatenate(keys, axis=1), *rotary)
        out = attention(q, k, mx.concatenate(values, axis=1))
        if self._last:
            return [self.to_out[0].terms(out)]
        bounds = [sum(lengths[: n + 1]) for n in range(len(lengths) - 1)]
        text_out, *image_outs = mx.split(out, bounds, axis=1)
        return [self.to_add_out.terms(text_out), *map(self.to_out[0].terms, image_outs)]

    def _split(self, x: mx.array) -> mx.array:
        return x.reshape(*x.shape[:-1], *self._heads)


class FeedForward(nn.Module):
    """Linear, tanh-GELU, Linear; the list gives the checkpoint's names `net.0.proj` and `net.2`."""

    def __init__(self, dim: int):
        super().__init__()
        self.net: list[nn.Module] = [_GELUProjection(dim, 4 * dim), nn.Identity(), Linear(4 * dim, dim)]

    def terms(self, x: mx.array) -> tuple[mx.array, ...]:
        """The terms (…, D) whose sum is the output."""
        return self.net[2].terms(self.net[0](x))


class _GELUProjection(nn.Module):
    def __init__(self, dim: int, inner: int):
        super().__init__()
        self.proj = Linear(dim, inner)

    def __call__(self, x: mx.array) -> mx.array:
        return gelu_tanh(*self.proj.terms(x))


def modulate(x: mx.array, scale: mx.array, shift: mx.array) -> mx.array:
    """Layer norm of x (B, N, D), times scale (which holds its 1 already), plus shift.

    Rows (D,) that all samples share make it one kernel; rows (B, 1, D) of each sample do not fit in it.
    """
    if scale.ndim == 1:
        return mx.fast.layer_norm(x, scale, shift, EPS)
    return mx.fast.layer_norm(x, None, None, EPS) * scale + shift
