"""One image being denoised: what is the same in all its steps, and the velocities of each.

The first step computes the prefix, text and reference images, and keeps its keys and values; later steps run the target
alone. Evaluates nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx

from ..layers import OnLayer
from ..rotary import Rotary
from .config import TransformerConfig
from .rope import MAX_HALF_SIDE, MAX_POSITION, Run, last_position, lay_out, rotary_tables
from .transformer import Branch, Hidden, Hint, Prefix, Rows, Transformer


class Condition(NamedTuple):
    """An encoded prompt.

    Attributes:
        states: of the text encoder (1, L, context_in_dim).
        starts: the first state of each reference image's places; a place stands for 2x2 latents.
    """

    states: mx.array
    starts: tuple[int, ...] = ()


class Reference(NamedTuple):
    """A reference image.

    Attributes:
        latents: packed and normalised (1, height * width, in_channels).
        height, width: of its latents.
    """

    latents: mx.array
    height: int
    width: int


class Denoiser:
    """Velocities of one image.

    Args:
        transformer: the network.
        config: its config.
        table: the rows of each step's timestep.
        still: the rows of timestep 0.
        conditions: the prompt and, under guidance, the negative prompt.
        references: the images that both show, in order.
        grid: rows and columns of the target's latents.
        dtype: of the model.
        keep_prefix: keep the prefix's keys and values between steps; without, every step computes them again, the same
            numbers in less memory and much more time.

    Raises:
        ValueError: the sequence is longer, or an image larger, than the model has positions for.
    """

    def __init__(
        self,
        transformer: Transformer,
        config: TransformerConfig,
        *,
        table: Sequence[Rows],
        still: Rows,
        conditions: Sequence[Condition],
        references: Sequence[Reference] = (),
        grid: tuple[int, int],
        dtype: mx.Dtype,
        keep_prefix: bool = True,
    ):
        self._transformer, self._table, self._still, self._keep = transformer, table, still, keep_prefix
        shown = [transformer.project_references(reference.latents.astype(dtype)) for reference in references]
        grids = [(reference.height, reference.width) for reference in references]
        self._branches: list[Branch] = []
        for condition in conditions:
            runs = prefix_runs(condition, grids)
            check_positions(runs, grid)
            text = transformer.project_text(condition.states.astype(dtype))
            tables = rotary_tables([*runs, Run.image(*grid)], config.axes_dims_rope)
            length = sum(run.length for run in runs)
            hidden = interleave(text, shown, runs)
            before, after = (Rotary(*(t[part] for t in tables)) for part in (slice(length), slice(length, None)))
            self._branches.append(Branch(Prefix(hidden, runs, before), after))

    @property
    def prepared(self) -> list[mx.array]:
        """What the steps need, to be evaluated before the first."""
        found: list[mx.array] = []
        for prefix, rotary in self._branches:
            parts = [prefix.hidden, *prefix.rotary] if isinstance(prefix, Prefix) else [a for kv in prefix for a in kv]
            found += [*parts, *rotary]
        return found

    @property
    def prefixes(self) -> list[tuple[Prefix, Rotary]]:
        """For each condition what comes before the target, and the target's tables, where prefixes are not kept."""
        return [(b.prefix, b.rotary) for b in self._branches if isinstance(b.prefix, Prefix)]

    @property
    def still(self) -> Rows:
        """The rows of timestep 0."""
        return self._still

    def rows(self, step: int) -> Rows:
        """The rows of a step."""
        return self._table[step]

    def project(self, latents: mx.array) -> mx.array:
        """Packed latents of the target (1, N, in_channels) to its tokens (1, N, D) before the first block."""
        return self._transformer.project_references(latents)

    def velocities(
        self, latents: mx.array, step: int, on_layer: OnLayer | None = None, branches: int | None = None
    ) -> list[mx.array]:
        """What the transformer predicts in a step, for each condition: (1, N, out_channels) in the latents' dtype.

        Args:
            latents: packed (1, N, in_channels), N the rows times the columns of the grid.
            step: number of the step, from 0.
            on_layer: called after each block with what it made.
            branches: how many of the conditions, from the first on; None is all.
        """
        hidden = self.run(self.enter(latents, branches), step, on_layer=on_layer)
        return self.leave(hidden, step)

    # The three parts of a step, for callers that leave some of its blocks out.

    def enter(self, latents: mx.array, branches: int | None = None) -> Hidden:
        """What enters the first block, for each condition."""
        return self._transformer.enter(latents, self._branches[:branches])

    def run(
        self,
        hidden: Hidden,
        step: int,
        blocks: slice = slice(None),
        on_layer: OnLayer | None = None,
        hints: Sequence[Hint] = (),
    ) -> Hidden:
        """The streams after some consecutive blocks, with hints added, which need prefixes that are not kept."""
        branches = self._branches[: len(hidden.targets)]
        return self._transformer.run(
            hidden, branches, self._table[step], self._still, blocks, on_layer, self._keep, hints
        )

    def leave(self, hidden: Hidden, step: int) -> list[mx.array]:
        """The velocities of what leaves the last block; prefixes that went through all blocks here are kept."""
        for n, seen in enumerate(hidden.kept):
            if len(seen) == len(self._transformer.blocks_here):
                self._branches[n] = Branch(seen, self._branches[n].rotary)
        return self._transformer.leave(hidden, self._table[step])

    def signal(self, hidden: Hidden, step: int) -> mx.array:
        """As `Transformer.signal`."""
        return self._transformer.signal(hidden, self._table[step])


def prefix_runs(condition: Condition, grids: Sequence[tuple[int, int]]) -> list[Run]:
    """The runs of a prompt and its references, `grids` their rows and columns of latents."""
    return lay_out(condition.states.shape[1], condition.starts, grids)


def check_positions(runs: Sequence[Run], grid: tuple[int, int]) -> None:
    """Raises ValueError if a prefix and a target of a grid need positions that the model does not have."""
    whole = [*runs, Run.image(*grid)]
    side = max(max(run.grid) for run in whole if run.grid)
    if (side + 1) // 2 > MAX_HALF_SIDE:
        raise ValueError(f"an image of {side} latents on a side is larger than {2 * MAX_HALF_SIDE}")
    if last_position(whole) >= MAX_POSITION:
        raise ValueError(f"the prompt and its images take {last_position(whole) + 1} positions of {MAX_POSITION}")


def kept_values(config: TransformerConfig, prefix_tokens: int, branches: int) -> int:
    """How many numbers, of the model's dtype, are kept from step to step: the keys and values of prefixes.

    Args:
        config: of the transformer.
        prefix_tokens: tokens of prompt and references.
        branches: 1, or 2 with guidance.
    """
    return 2 * config.num_layers * config.dim * prefix_tokens * branches


def interleave(text: mx.array, shown: Sequence[mx.array], runs: Sequence[Run], per_slot: int = 4) -> mx.array:
    """Text tokens (B, L, D) with each image's own tokens, (B, rows * columns, D), in its places."""
    parts, place, images = [], 0, iter(shown)
    for run in runs:
        parts.append(next(images) if run.grid else text[:, place : place + run.length])
        place += run.length // per_slot if run.grid else run.length
    return mx.concatenate(parts, axis=1)
