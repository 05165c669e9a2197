"""The demo's ControlNet in training: without an effect at first, trained alone, written as the pipeline reads it."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from demo import control, painter
from demo.checkpoint import WEIGHTS, transformer_config
from demo.samples import Frame
from demo.scenes import coverage
from PIL import Image

from qwen_image_mlx import Control, GenerationParameters, QwenImagePipeline
from qwen_image_mlx.pipeline.identify import identify
from qwen_image_mlx.weights.snapshot import DEMO_ROOT

pytestmark = pytest.mark.demo


@pytest.fixture(scope="module")
def samples():
    return control.steered(Frame("demo"), control.draw_anywhere(8, 0), seed=0)


def loaded() -> control.SteeredNetwork:
    network = control.SteeredNetwork(transformer_config("demo"))
    network.load(DEMO_ROOT / "shared" / "transformer" / WEIGHTS)
    return network


def test_outlines_are_drawn_around_the_shapes():
    scenes = control.draw_anywhere(30, 0, held_out=True)
    assert all(scene.is_held_out for scene in scenes)
    assert len({round(scene.things[0].x, 1) for scene in scenes}) > 4
    assert not any(scene.things[0].size or scene.things[0].place for scene in scenes)
    rng = np.random.default_rng(0)
    for scene in scenes:
        for drawn in (control.outlines(scene), control.outlines(scene, rng)):
            lines, inside = drawn[..., 0] > 127, coverage(scene.things[0]) > 0.5
            border = inside ^ (inside & np.roll(inside, 1, 0) & np.roll(inside, -1, 0) & np.roll(inside, 1, 1))
            assert lines.sum() > 0.6 * border.sum()
            assert not lines[coverage(scene.things[0]) == 1].sum() > lines.sum() / 2


def test_it_begins_without_an_effect_and_trains_alone(samples, monkeypatch):
    monkeypatch.setattr(control, "WARM_UP", 1)
    network = loaded()
    batch = samples.batch(np.random.default_rng(0), 4, drop=0)
    inputs = (batch.latents, batch.text, mx.array([0.2, 0.4, 0.6, 0.8]), network.rotary(batch))
    plain = network(*inputs)
    assert mx.array_equal(network(*inputs, batch.references), plain)
    trainer = control.new_trainer(network, lambda step: [batch], 1000, seed=0)
    assert all(name.startswith("control.") for name in trainer.parameters)
    losses = [trainer.take_step().loss for _ in range(12)]
    assert np.mean(losses[-3:]) < np.mean(losses[:3])
    assert mx.array_equal(network(*inputs), plain), "the transformer is as it was"
    assert not mx.array_equal(network(*inputs, batch.references), plain)


def test_the_file_is_a_controlnet_that_computes_the_same(samples, tmp_path, monkeypatch):
    monkeypatch.setattr(control, "WARM_UP", 1)
    network = loaded()
    batch = samples.batch(np.random.default_rng(0), 2, drop=0)
    trainer = control.new_trainer(network, lambda step: [batch], 1000, seed=0)
    trainer.run(2)
    control.write_control(tmp_path / "made", trainer)
    assert identify(tmp_path / "made" / control.FILE).kind == "ControlNet"

    (scene,) = control.draw_anywhere(1, 5)
    one = control.steered(Frame("demo"), [scene])
    pipeline = QwenImagePipeline.from_pretrained("demo", dtype="float32")
    parameters = GenerationParameters(width=64, height=64, num_inference_steps=12, cfg_scale=3.0)
    encoding = pipeline.encode_guidance_prompts(scene.caption, " ")
    noise = mx.random.normal(one.latents.shape, key=control.key_of(0, "generate", 0))
    image = Control(tmp_path / "made", Image.fromarray(control.outlines(scene)))
    steering = pipeline.encode_controls([image], (64, 64))
    expected = pipeline.denoise_latents(parameters, encoding, latents=noise, controls=steering)
    free = pipeline.denoise_latents(parameters, encoding, latents=noise)
    with trainer.weights() as steered:
        found = painter.generate(steered, one, 12, 3.0)
    assert mx.abs(expected - free).max().item() > 0.1
    assert mx.abs(found - expected).max().item() < 0.05 * mx.abs(expected).max().item()
