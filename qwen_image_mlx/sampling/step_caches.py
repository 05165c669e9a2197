"""Step caches: when a pass may reuse what the blocks did in an earlier step, and what it reuses.

A cache is made for one image. It sees one number series or array a step, decides, and is told what a computed pass
did. It knows no model: `pipeline/step_cache.py` leaves the blocks out.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Literal, NamedTuple

import mlx.core as mx
import numpy as np

from .choices import parse_cache


class TeaFacts(NamedTuple):
    """TeaCache's numbers of a model.

    Attributes:
        polynomial: from the relative change of the first block's input to that of the velocity, highest power first.
        low, high: the changes that it was fitted on; below, `low` counts, and above, the step is computed.
        threshold: a good one.
    """

    polynomial: tuple[float, ...]
    low: float
    high: float
    threshold: float


class CacheFacts(NamedTuple):
    """What caches need to know of a model; None where it is not known.

    Attributes:
        tea: TeaCache's numbers.
        ratios: MagCache's: how much longer each step's residual is than that of the step before, the first one 1.
    """

    tea: TeaFacts | None = None
    ratios: tuple[float, ...] | None = None


class StepCache(ABC):
    """Decides from step to step; each method is a subclass.

    Args:
        threshold: the method's own; 0 computes every pass.
        facts: of the model.
        places: where each evaluation lies in the whole schedule, from 0 to 1.

    Attributes:
        sees: what `skips` is shown: "nothing", the "input" of the first block, the residual of the first "block", or
            the "latents".
        reuses: what is added again: the "residual" of all blocks, or the "velocity" less the latents.
        first: blocks that run before it decides.
        arrays: how many arrays of what it reuses are kept for each branch.
        others: how many more arrays of that size are there when a pass has been computed, of all that it has seen.
        usual: the threshold if none is given; None asks the facts.
        needs: what of the facts it cannot do without.
    """

    sees: ClassVar[Literal["nothing", "input", "block", "latents"]] = "nothing"
    reuses: ClassVar[Literal["residual", "velocity"]] = "residual"
    first: ClassVar[int] = 0
    arrays: ClassVar[int] = 1
    others: ClassVar[int] = 0
    usual: ClassVar[float | None] = None
    needs: ClassVar[Literal["", "tea", "ratios"]] = ""

    def __init__(self, threshold: float, facts: CacheFacts, places: Sequence[float]):
        self.threshold, self.facts, self.places = threshold, facts, places
        self._residuals: list[mx.array] = []

    @abstractmethod
    def skips(self, number: int, seen: mx.array | None) -> bool:
        """Whether a pass may be left out; called once for each evaluation, in order."""

    def computed(self, number: int, residuals: Sequence[mx.array], output: mx.array) -> None:
        """Keeps what a computed pass added, by branch, and starts to count again."""
        self._residuals = list(residuals)

    def forget(self) -> None:
        """Drops what is reused: a pass has been computed with other branches."""
        self._residuals = []

    def reused(self, number: int) -> list[mx.array]:
        """What a pass that is left out adds, by branch."""
        return self._residuals

    @classmethod
    def kept(cls, branches: int) -> int:
        """Number of arrays (1, N, D), or (1, N, C) of latents if it reuses the velocity, at the moment when there are
        most: new ones have been made, and the old ones are still there."""
        return (cls.arrays + 1) * branches + cls.others


class TeaCache(StepCache):
    """Adds up how much the first block's input changes. Source: TeaCache (arXiv 2411.19108), as in mlx-teacache."""

    sees, needs, others = "input", "tea", 1
    _in_a_row = 8  # passes left out at most

    def __init__(self, threshold: float, facts: CacheFacts, places: Sequence[float]):
        super().__init__(threshold, facts, places)
        assert facts.tea is not None
        self._tea, self._sum, self._run = facts.tea, 0.0, 0
        self._before: mx.array | None = None

    def skips(self, number: int, seen: mx.array | None) -> bool:
        """While the sum of estimated changes is below the threshold."""
        assert seen is not None
        before, self._before = self._before, seen
        mx.async_eval(seen)  # type: ignore[no-untyped-call]  # MLX's stub gives it no types
        if before is None:
            return False
        change = relative_change(seen, before)
        self._sum += max(0.0, float(np.polyval(self._tea.polynomial, max(change, self._tea.low))))
        skipped = change <= self._tea.high and self._sum < self.threshold and self._run < self._in_a_row
        self._run = self._run + 1 if skipped else 0
        return skipped

    def computed(self, number: int, residuals: Sequence[mx.array], output: mx.array) -> None:
        """As `StepCache.computed`."""
        super().computed(number, residuals, output)
        self._sum, self._run = 0.0, 0


class FirstBlock(StepCache):
    """Compares the first block's residual with that of the last computed step. Source: diffusers' FirstBlockCache."""

    sees, first, usual, others = "block", 1, 0.1, 2

    def __init__(self, threshold: float, facts: CacheFacts, places: Sequence[float]):
        super().__init__(threshold, facts, places)
        self._before: mx.array | None = None
        self._seen: mx.array | None = None

    def skips(self, number: int, seen: mx.array | None) -> bool:
        """While the residual is nearer than the threshold."""
        assert seen is not None
        self._seen = seen
        return self._before is not None and relative_change(seen, self._before) < self.threshold

    def computed(self, number: int, residuals: Sequence[mx.array], output: mx.array) -> None:
        """As `StepCache.computed`."""
        super().computed(number, residuals, output)
        self._before = self._seen
        mx.async_eval(self._before)  # type: ignore[no-untyped-call]  # MLX's stub gives it no types


class MagCache(StepCache):
    """Adds up how far known ratios of the residuals' lengths lead away from 1. Source: MagCache (arXiv 2506.09045)."""

    needs, usual = "ratios", 0.06
    _begin, _in_a_row = 0.2, 2  # the part of the steps that is computed, and the passes left out at most

    def __init__(self, threshold: float, facts: CacheFacts, places: Sequence[float]):
        super().__init__(threshold, facts, places)
        ratios = facts.ratios
        assert ratios is not None
        self._ratios = [ratios[round(place * (len(ratios) - 1))] for place in places]
        self._reset()

    def _reset(self) -> None:
        self._product, self._error, self._run = 1.0, 0.0, 0

    def skips(self, number: int, seen: mx.array | None) -> bool:
        """While the error is at most the threshold."""
        if self.places[number] < self._begin:
            return False
        self._product *= self._ratios[number]
        self._error += abs(1 - self._product)
        self._run += 1
        return self._error <= self.threshold and self._run <= self._in_a_row

    def computed(self, number: int, residuals: Sequence[mx.array], output: mx.array) -> None:
        """As `StepCache.computed`."""
        super().computed(number, residuals, output)
        self._reset()


class EasyCache(StepCache):
    """Adds up how much the velocity should change, by the last computed change. Source: ComfyUI's EasyCache."""

    sees, reuses, usual, others = "latents", "velocity", 0.2, 4  # two latents, two velocities
    _begin, _end = 0.15, 0.95

    def __init__(self, threshold: float, facts: CacheFacts, places: Sequence[float]):
        super().__init__(threshold, facts, places)
        self._sum = 0.0
        self._gain: float | None = None
        self._latents: list[mx.array] = []  # of the last step, and of the last computed one
        self._output: mx.array | None = None

    def skips(self, number: int, seen: mx.array | None) -> bool:
        """While the sum of estimated changes is below the threshold."""
        assert seen is not None
        before, self._latents = self._latents, [seen, *self._latents[1:]]
        if not before or self._gain is None or not self._begin <= self.places[number] <= self._end:
            return False
        assert self._output is not None
        self._sum += self._gain * mean_size(seen - before[0]) / max(mean_size(self._output), 1e-12)
        return self._sum < self.threshold

    def computed(self, number: int, residuals: Sequence[mx.array], output: mx.array) -> None:
        """As `StepCache.computed`; from the second computed pass on the gain is known."""
        super().computed(number, residuals, output)
        here = self._latents[0]
        if self._output is not None:
            moved = mean_size(here - self._latents[1])
            self._gain = mean_size(output - self._output) / moved if moved else None
        self._latents, self._output, self._sum = [here, here], output, 0.0


class TaylorSeer(StepCache):
    """Computes every few steps and continues the residual in a line in between.

    Source: TaylorSeer (arXiv 2503.06923), order 1, here for the sum of all blocks rather than each module: it keeps
    two residuals and not a model's worth of activations. The threshold is the number of steps from one computed pass
    to the next.
    """

    arrays, usual = 2, 3
    _warm = 3  # passes computed at the beginning

    def __init__(self, threshold: float, facts: CacheFacts, places: Sequence[float]):
        super().__init__(threshold, facts, places)
        self._every = int(threshold)
        self._numbers: list[int] = []
        self._earlier: list[mx.array] = []

    def skips(self, number: int, seen: mx.array | None) -> bool:
        """Between the computed steps."""
        return number >= self._warm and bool(self._numbers) and number - self._numbers[-1] < self._every

    def computed(self, number: int, residuals: Sequence[mx.array], output: mx.array) -> None:
        """As `StepCache.computed`; keeps the residuals before these too."""
        self._earlier = self._residuals
        super().computed(number, residuals, output)
        self._numbers = [*self._numbers[-1:], number]

    def reused(self, number: int) -> list[mx.array]:
        """The residuals on the line through the last two computed ones."""
        if not self._earlier:
            return self._residuals
        before, last = self._numbers
        along = (number - last) / (last - before)
        return [now + along * (now - then) for now, then in zip(self._residuals, self._earlier, strict=True)]


METHODS: dict[str, type[StepCache]] = {
    "teacache": TeaCache,
    "first-block": FirstBlock,
    "easycache": EasyCache,
    "magcache": MagCache,
    "taylorseer": TaylorSeer,
}


def method_of(text: str) -> type[StepCache]:
    """The method of METHOD[:THRESHOLD]; raises RequestError as `parse_cache`."""
    return METHODS[parse_cache(text)[0]]


def relative_change(now: mx.array, before: mx.array) -> float:
    """mean |now - before| / mean |before|, in fp32; waits for both."""
    return mean_size(now.astype(mx.float32) - before.astype(mx.float32)) / max(mean_size(before), 1e-12)


def mean_size(x: mx.array) -> float:
    """mean |x|, in fp32; waits for it."""
    return float(mx.abs(x.astype(mx.float32)).mean())


# Facts of the released models ------------------------------------------------------------------------------------

_RATIOS = (
    1, 1.64062, 1.45312, 1.1875, 1.17188, 1.05469, 1.21094, 1.10938, 1.11719, 1.13281, 1.11719, 1.07812, 1.07031,
    1.08594, 1.08594, 1.07812, 1.03906, 1.04688, 1.07812, 1.07031, 1.03125, 1.07812, 1.04688, 1.04688, 1.04688, 1.03906,
    1.01562, 1.03125, 1.02344, 1.02344, 1.02344, 1.03906, 1, 1.01562, 1, .99219, 1.00781, .98047, .95703, .96875,
    .99219, .92578, .92578, .90625, .85938, .80469, .87891, .75, .60938, .55078,
)  # fmt: skip
_EDIT_RATIOS = (
    1, 1.41406, 1.09375, 1.3125, 1.20312, 1.0625, 1.125, 1.14062, 1.17969, 1.09375, 1.10938, 1.10938, 1.07031, 1.04688,
    1.09375, 1.03906, 1.0625, 1.04688, 1.0625, 1.04688, 1.07031, 1.03125, 1.03906, 1.03906, 1.02344, 1.01562, 1.03125,
    1.00781, 1.01562, 1.00781, 1.01562, 1, 1, .98828, .98047, .98047, .97266, .92578, .94922, .98438, .89844, .91797,
    .92188, .84375, .82812, .78516, .87891, .71094, .56641, .50781,
)  # fmt: skip

# By model. Sources: mlx-teacache 0.14.1 (fitted at 768x768, 4 bits, 50 steps, guidance 4), and MagCache's repository,
# whose ratios of Qwen-Image stand in for those of 2512, the same network.
RELEASED: dict[str, CacheFacts] = {
    "Qwen/Qwen-Image": CacheFacts(
        TeaFacts(
            (-12.954226906135869, 8.883805167578382, -0.9363839862290331, 1.4538816050570036, 0), 0.0468, 0.5878, 0.2
        ),
        _RATIOS,
    ),
    "Qwen/Qwen-Image-2512": CacheFacts(
        TeaFacts(
            (-13.200421839759947, 4.851407025105924, 2.4891133197469846, 0.2453630032662089, 0), 0.0809, 0.4706, 0.2
        ),
        _RATIOS,
    ),
    "Qwen/Qwen-Image-Edit": CacheFacts(None, _EDIT_RATIOS),
}
