"""Measures a model for step caches: how much each step's input and residual change, over some whole runs.

Sources: TeaCache's fit of a polynomial from the change of the first block's input to that of the output, and MagCache's
ratios of the residuals' lengths (mean over tokens of |r_i| / |r_(i-1)|, fp32).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import mlx.core as mx
import numpy as np

from ..errors import RequestError
from ..models.layers import OnLayer
from ..registry import TRANSFORMER
from ..sampling.step_caches import CacheFacts, TeaFacts, relative_change
from . import calibrated
from .components import Components
from .parameters import GenerationParameters
from .pipeline import QwenImagePipeline
from .reporter import Reporter
from .seams import Conditions, DenoiserClass, DividedDenoiser

STEPS = 50
_DEGREE = 4
_MIN_STEPS = 12
_THRESHOLD = 0.2
_SHARE = 0.02  # of the changes that may lie outside the range which is trusted, at each end


class Change(NamedTuple):
    """What one step changed, on the prompt's branch.

    Attributes:
        signal: relative change of the first block's input.
        residual: relative change of the residual of all blocks.
        ratio: of the residuals' lengths.
    """

    signal: float
    residual: float
    ratio: float


class MeasuredDenoiser:
    """A denoiser that notes what each step changes.

    Args:
        denoiser: computes the passes.
        note: called from the second step on.
    """

    def __init__(self, denoiser: DividedDenoiser, note: Callable[[Change], None]):
        self._denoiser, self._note = denoiser, note
        self._before: tuple[mx.array, mx.array] | None = None

    def velocities(
        self, latents: mx.array, evaluation: int, on_layer: OnLayer | None = None, branches: int | None = None
    ) -> Sequence[mx.array]:
        """As `Denoiser.velocities`."""
        denoiser = self._denoiser
        hidden = denoiser.enter(latents, evaluation, branches)
        signal, entered = denoiser.signal(hidden, evaluation), hidden.targets[0]
        hidden = denoiser.run(hidden, evaluation, slice(None), on_layer)
        residual = hidden.targets[0].astype(mx.float32) - entered.astype(mx.float32)
        found = denoiser.leave(hidden, evaluation)
        mx.eval(residual, signal, found)
        if self._before is not None:
            signal_before, before = self._before
            length, length_before = (mx.linalg.norm(r, axis=-1) for r in (residual, before))
            ratio = float((length / mx.maximum(length_before, 1e-12)).mean())
            self._note(Change(relative_change(signal, signal_before), relative_change(residual, before), ratio))
        self._before = signal, residual
        return found


class _Measured:
    """Makes denoisers that note what each step changes, in a list for each image."""

    def __init__(self, pipeline: QwenImagePipeline, runs: list[list[Change]]):
        self._make: DenoiserClass = pipeline.components.use_of(TRANSFORMER)
        self._runs = runs

    def __call__(self, components: Components, conditions: Conditions, report: Reporter) -> MeasuredDenoiser:
        self._runs.append([])
        denoiser = cast(DividedDenoiser, self._make(components, conditions, report))
        return MeasuredDenoiser(denoiser, self._runs[-1].append)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._make, name)


def calibrate(
    pipeline: QwenImagePipeline, prompts: Sequence[str], *, width: int, height: int, steps: int = STEPS,
    cfg_scale: float | None = None,
) -> CacheFacts:  # fmt: skip
    """Runs every prompt with a seed of its own, computing every pass, and fits what step caches need.

    Args:
        pipeline: of a model that generates from text.
        prompts: at least one; several differ more, and fit better.
        width, height: in pixels.
        steps: of each run.
        cfg_scale: guidance; None is the model's own.

    Raises:
        RequestError: there are too few steps to fit anything, or the model needs images.
    """
    if steps < _MIN_STEPS:
        raise RequestError(f"steps is {steps}, but a calibration needs at least {_MIN_STEPS}")
    pipeline.check_task("generate")
    runs: list[list[Change]] = []
    watched = QwenImagePipeline(pipeline.components, pipeline._report, _Measured(pipeline, runs))
    scale = pipeline.recommended.cfg_scale if cfg_scale is None else cfg_scale
    parameters = GenerationParameters(width=width, height=height, num_inference_steps=steps, cfg_scale=scale)
    encodings = [watched.encode_guidance_prompts(prompt, " ") for prompt in prompts]
    watched.release_encoders()
    for seed, encoding in enumerate(encodings):
        watched.denoise_latents(parameters, encoding, seed=seed)
    return fit(runs)


def fit(runs: Sequence[Sequence[Change]]) -> CacheFacts:
    """The facts of runs of equally many steps.

    Args:
        runs: what each step after the first changed, in order.
    """
    signals = np.array([[step.signal for step in run] for run in runs])
    residuals = np.array([[step.residual for step in run] for run in runs])
    ratios = np.array([[step.ratio for step in run] for run in runs]).mean(axis=0)
    low, high = (float(np.quantile(signals, part)) for part in (_SHARE, 1 - _SHARE))
    inside = (signals >= low) & (signals <= high)
    x, y = signals[inside], residuals[inside]
    powers = np.stack([x**n for n in range(_DEGREE, 0, -1)], axis=1)  # through 0: no change of the input, none at all
    scale = np.abs(powers).max(axis=0)
    polynomial = np.linalg.lstsq(powers / scale, y, rcond=None)[0] / scale
    return CacheFacts(
        TeaFacts((*map(float, polynomial), 0.0), low, high, _THRESHOLD), (1.0, *(round(float(r), 5) for r in ratios))
    )


def write_facts(pipeline: QwenImagePipeline, facts: CacheFacts) -> Path:
    """Writes a calibration where a later run with the same model and LoRAs finds it; returns its path.

    Raises:
        OutputError: it cannot be written.
    """
    return calibrated.write_facts(facts, pipeline.model, calibrated.loras_of(pipeline.components))
