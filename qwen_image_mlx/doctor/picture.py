"""Images of the demo models, end to end in fp32, against stored ones (`scripts/doctor_values.py`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from PIL import Image

from ..pipeline.pipeline import QwenImagePipeline
from .chip import coarse_fp32
from .measure import falsified
from .outcome import Outcome

STORED = Path(__file__).parent / "stored"
_PROMPT = "a red circle on a blue background"
_LEVELS = 1  # of 255, by which an image may differ
_COARSE_LEVELS = 4  # the same where fp32 is TF32


def run(options: Mapping[str, Any]) -> Outcome:
    """Makes the images and compares them."""
    outcome, allowed = Outcome(), _COARSE_LEVELS if coarse_fp32() else _LEVELS
    made = images(stored_image("demo"))
    for name, image in made.items():
        got = falsified(name, np.asarray(image).astype(np.float32))
        steps = np.abs(got - np.asarray(stored_image(name)).astype(np.float32))
        outcome.figures[name] = {"most_levels": float(steps.max()), "changed_ratio": float((steps > 0).mean())}
        if steps.max() > allowed:
            outcome.find(
                "wrong",
                f"the image {name} differs from the stored one by {steps.max():.0f} of 255 levels, where {allowed} "
                "is allowed; run `doctor --only probe,parity` to see which operation is wrong",
            )
    worst = max(figures["most_levels"] for figures in outcome.figures.values())
    outcome.summary = f"{len(made)} images of the demo models match the stored ones, within {worst:.0f} of 255 levels"
    return outcome


def stored_image(name: str) -> Image.Image:
    """A stored image."""
    with Image.open(STORED / f"{name}.png") as image:
        return image.copy()


def images(source: Image.Image | None = None) -> dict[str, Image.Image]:
    """The images of the demo models, by name.

    Args:
        source: the image to edit and decompose; None is the generated image.
    """
    made = _with("demo", lambda demo: demo.generate(_PROMPT, negative_prompt=" ", seed=1))
    source = source or made[0]
    made += _with("demo-edit", lambda demo: demo.edit("make the circle green", images=[source], seed=1))
    made += _with("demo-layered", lambda demo: demo.decompose(source, _PROMPT, num_layers=2, seed=1).layers)
    return dict(zip(("demo", "demo-edit", "demo-layer-1", "demo-layer-2"), made, strict=True))


def _with(model: str, use: Callable[[QwenImagePipeline], Any]) -> list[Image.Image]:
    made = list(use(QwenImagePipeline.from_pretrained(model, dtype="float32")))
    mx.clear_cache()
    return made
