"""The linear maps that show the demo models' latents: those in the package are fitted, and fit what was never seen."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from demo.autoencoder import held_out_images
from demo.preview import fit_preview, small, spread
from demo.samples import Frame

from qwen_image_mlx.pipeline.components import Components
from qwen_image_mlx.weights.snapshot import HubSnapshot

pytestmark = pytest.mark.demo


@pytest.mark.parametrize(("model", "channels", "likeness"), [("demo", 3, 0.98), ("demo-layered", 4, 0.75)])
def test_the_package_s_map_is_the_fit(model, channels, likeness, monkeypatch):
    frame, said = Frame(model), np.array(Components(HubSnapshot(model), mx.float32).variant.preview)
    monkeypatch.setattr("demo.preview.IMAGES", 300)
    images = held_out_images(100, channels)
    latents, again = spread(frame.latents(images)), np.array(fit_preview(frame, channels))
    shown, fitted = (latents @ rows[:-1] + rows[-1] for rows in (said, again))
    assert np.corrcoef(shown.ravel(), small(images).ravel())[0, 1] > likeness
    assert np.corrcoef(shown.ravel(), fitted.ravel())[0, 1] > 0.97
