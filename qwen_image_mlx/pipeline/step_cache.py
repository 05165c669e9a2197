"""A denoiser that leaves blocks out where a step cache allows it; one decision serves the prompt and the negative one.

It wraps any `DividedDenoiser` for one image and is dropped with it, so nothing passes from one image to the next.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import mlx.core as mx

from ..errors import RequestError
from ..models.layers import OnLayer
from ..sampling.choices import check_cache, parse_cache
from ..sampling.step_caches import METHODS, CacheFacts, StepCache
from .calibrated import facts_of
from .components import Components
from .seams import Conditions, DividedDenoiser


class CachedDenoiser:
    """The `Denoiser` of an image with a step cache.

    Args:
        denoiser: computes the passes.
        cache: decides; of this image alone.
        always: the evaluations that are computed whatever the cache decides.
        branches: how many there are.

    Attributes:
        skipped: passes left out so far; with guidance a step has two.
    """

    def __init__(self, denoiser: DividedDenoiser, cache: StepCache, always: Collection[int], branches: int):
        self._denoiser, self._cache, self._always = denoiser, cache, always
        self._branches, self._computed = branches, 0
        self.skipped: int = 0

    def velocities(
        self, latents: mx.array, evaluation: int, on_layer: OnLayer | None = None, branches: int | None = None
    ) -> Sequence[mx.array]:
        """As `Denoiser.velocities`."""
        denoiser, cache = self._denoiser, self._cache
        branches = branches or self._branches
        if cache.reuses == "velocity":
            return self._whole(latents, evaluation, on_layer, branches)
        hidden = denoiser.enter(latents, evaluation, branches)
        entered = hidden.targets
        if cache.first:
            hidden = denoiser.run(hidden, evaluation, slice(cache.first), on_layer)
        seen: mx.array | None = None
        if cache.sees == "input":
            seen = denoiser.signal(hidden, evaluation)
        elif cache.sees == "block":
            seen = hidden.targets[0] - entered[0]
        if self._skips(evaluation, seen, branches):
            added = cache.reused(evaluation)
            hidden = hidden.with_targets([_sum(x, r) for x, r in zip(entered, added, strict=False)])
            return denoiser.leave(hidden, evaluation)
        hidden = denoiser.run(hidden, evaluation, slice(cache.first, None), on_layer)
        residuals = [after - before for after, before in zip(hidden.targets, entered, strict=True)]
        found = denoiser.leave(hidden, evaluation)
        self._keep(evaluation, residuals, found[0], branches)
        return found

    def _whole(self, latents: mx.array, evaluation: int, on_layer: OnLayer | None, branches: int) -> Sequence[mx.array]:
        """`velocities` of a cache that leaves out everything."""
        if self._skips(evaluation, latents, branches):
            return [_sum(latents, r) for r in self._cache.reused(evaluation)[:branches]]
        found = self._denoiser.velocities(latents, evaluation, on_layer, branches)
        self._keep(evaluation, [velocity - latents for velocity in found], found[0], branches)
        return found

    def _keep(self, evaluation: int, residuals: list[mx.array], output: mx.array, branches: int) -> None:
        """Keeps what a computed pass added; `output` is the first branch's velocity."""
        # Queued now: later they would keep the pass's streams alive.
        mx.async_eval(residuals)  # type: ignore[no-untyped-call]  # MLX's stub gives it no types
        if branches != self._computed:
            self._cache.forget()
        self._cache.computed(evaluation, residuals, output)
        self._computed = branches

    def _skips(self, evaluation: int, seen: mx.array | None, branches: int) -> bool:
        """Whether a pass is left out; a branch that was not computed last time, as outside the guidance's interval,
        has nothing to reuse."""
        skips = self._cache.skips(evaluation, seen) and evaluation not in self._always
        skips = self._denoiser.agreed(skips and self._cache.threshold > 0 and branches <= self._computed)
        self.skipped += branches * skips
        return skips


def _sum(x: mx.array, added: mx.array) -> mx.array:
    return (x.astype(mx.float32) + added.astype(mx.float32)).astype(x.dtype)


def with_cache(
    denoiser: Any, components: Components, text: str, conditions: Conditions, *, steps: int, all_steps: int
) -> CachedDenoiser:
    """Wraps an image's denoiser in a step cache. The first and the last evaluation are always computed, and those in
    which a control begins or has ended: what was kept before holds other hints.

    Args:
        denoiser: a `DividedDenoiser`.
        components: the checkpoint's, for the facts of its model.
        text: METHOD[:THRESHOLD].
        conditions: what the image depends on.
        steps, all_steps: of the image, and of a whole schedule, of which an image to image has the last.

    Raises:
        RequestError: as `cache_of`.
    """
    method, threshold, facts = cache_of(components, text, steps)
    begin = 1 - steps / all_steps
    last = len(conditions.sigmas) - 1
    places = [begin + (1 - begin) * n / max(last, 1) for n in range(last + 1)]
    return CachedDenoiser(
        denoiser, method(threshold, facts, places), {0, last, *conditions.turns}, len(conditions.branches)
    )


def cache_of(components: Components, text: str, steps: int) -> tuple[type[StepCache], float, CacheFacts]:
    """The method, its threshold and the model's facts.

    Raises:
        RequestError: the cache is useless for so few steps, or needs facts of a model for which there are none.
    """
    name, threshold = parse_cache(text)
    check_cache(text, steps)
    method, facts = METHODS[name], facts_of(components)
    if method.needs and getattr(facts, method.needs) is None:
        raise RequestError(
            f"{name} needs numbers of the model, and none of {components.snapshot.model} are known", cause="calibrate"
        )
    if threshold is None:
        threshold = method.usual if method.usual is not None else facts.tea.threshold if facts.tea else 0.0
    return method, threshold, facts
