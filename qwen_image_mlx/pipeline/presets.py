"""Presets: what solver, steps and step cache give together for the model at hand. Importable without MLX.

A preset is a row of values for options; other options that are given override them. A model that was distilled for
a few steps has one right way to be sampled, so that its presets are all the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, get_args

from ..names import PresetName

PRESETS: tuple[PresetName, ...] = get_args(PresetName)
# The options that a preset decides about; it overrides earlier choices of these.
GOVERNED = frozenset(
    {"steps", "solver", "step_cache", "guidance_interval", "cfg_zero_star", "apg", "sigmas", "shift", "stretch"}
)
_DRAFT_SHARE, _DRAFT_STEPS = 4, 8  # a draft takes a quarter of the steps, and at least eight
_ENOUGH = 20  # steps, from which on a cache is worth its memory
# Step caches of "balanced": the one for models with TeaCache's numbers, and the one for all others; with the share of
# passes that others measured it to leave out at 50 steps (docs/faster.md has their sources).
_CACHE, _CACHE_SHARE = "teacache:0.15", 24 / 50
_PLAIN_CACHE, _PLAIN_SHARE = "first-block:0.08", 0.36


class Preset(NamedTuple):
    """What a preset means for a model.

    Attributes:
        name: of the preset.
        values: options by name; the model's own sampling fills the others.
        steps: denoising steps.
        skipped: the share of passes that its step cache should leave out, as measured by others; 0 without one.
    """

    name: PresetName
    values: Mapping[str, Any]
    steps: int
    skipped: float

    def passes(self, guided: bool) -> int:
        """Passes through the transformer, about."""
        return round((2 if guided else 1) * self.steps * (1 - self.skipped))

    def sentence(self, sampling: Mapping[str, Any]) -> str:
        """The preset in a few words, as it is run.

        Args:
            sampling: fields of `GenerationParameters`, in which other options may have changed what the preset gives.
        """
        words = [f"{sampling['num_inference_steps']} steps", sampling.get("solver") or "euler"]
        return f"preset {self.name}: " + ", ".join([*words, *filter(None, [sampling.get("step_cache")])])


def preset_of(name: PresetName, steps: int, *, distilled: bool, measured: bool) -> Preset:
    """What a preset means for a model.

    Args:
        name: of the preset.
        steps: the model's own.
        distilled: whether it was trained for them.
        measured: whether TeaCache's numbers of it are known.
    """
    if name == "draft" and not distilled:
        fewer = min(steps, max(_DRAFT_STEPS, steps // _DRAFT_SHARE))
        return Preset(name, {"steps": fewer}, fewer, 0.0)
    if name == "balanced" and not distilled and steps >= _ENOUGH:
        cache, share = (_CACHE, _CACHE_SHARE) if measured else (_PLAIN_CACHE, _PLAIN_SHARE)
        return Preset(name, {"step_cache": cache}, steps, share)
    return Preset(name, {}, steps, 0.0)


def yielding(options: Mapping[str, Any], later: Mapping[str, Any]) -> dict[str, Any]:
    """Options without those that a preset among later, stronger ones decides about."""
    return {name: value for name, value in options.items() if name not in GOVERNED or not later.get("preset")}
