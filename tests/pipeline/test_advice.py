"""Warnings about requests that run, but not as the user may expect."""

from __future__ import annotations

import numpy as np
import pytest

from qwen_image_mlx import Control, GenerationParameters
from qwen_image_mlx.pipeline.advice import advise
from qwen_image_mlx.pipeline.request import Request
from qwen_image_mlx.variants import VARIANTS

EDGES = np.zeros((64, 64, 3), np.uint8)


def warned(caplog, *controls: Control) -> list[str]:
    parameters = GenerationParameters(width=64, height=64, num_inference_steps=4)
    request = Request(prompt="x", negative_prompt=None, parameters=parameters, seeds=(0,), controls=controls)
    advise([request, request], VARIANTS["QwenImagePipeline"])
    return [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize(
    ("start", "end", "scale", "why"),
    [
        (0.99, 1.0, 1.0, "none of 4 steps lies between 0.99 and 1"),
        (0.0, 0.05, 1.0, "none of 4 steps lies between 0 and 0.05"),
        (0.5, 0.5, 1.0, "none of 4 steps lies between 0.5 and 0.5"),
        (0.0, 1.0, 0.0, "its scale is 0"),
    ],
)
def test_a_control_that_runs_in_no_step_is_said(caplog, start, end, scale, why):
    (said,) = warned(caplog, Control("edges.safetensors", EDGES, scale=scale, start=start, end=end))
    assert said == f"the control by edges.safetensors has no effect: {why}"


def test_a_control_that_runs_is_not_said(caplog):
    assert warned(caplog, Control("edges.safetensors", EDGES, start=0.25, end=0.5)) == []


def test_an_array_is_not_recorded():
    assert Control("edges.safetensors", EDGES, scale=0.5).recorded() == {
        "controlnet": "edges.safetensors",
        "scale": 0.5,
    }
