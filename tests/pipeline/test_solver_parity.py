"""UniPC and LCM against diffusers' schedulers in diffusers' own pipelines, live: latents after every step."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
import torch
from checkpoints import write_text_to_image
from diffusers import FlowMatchLCMScheduler, UniPCMultistepScheduler
from PIL import Image
from reference import load_reference, run_reference
from reference_edit import load_edit_reference, run_edit_reference

from qwen_image_mlx import GenerationParameters, QwenImagePipeline

pytestmark = pytest.mark.reference

PROMPT, NEGATIVE, SIZE = "A red fox in the snow", "blurry", (96, 64)


class UniPC(UniPCMultistepScheduler):
    """Diffusers' scheduler under the name that the image to image pipeline calls."""

    def scale_noise(self, sample, timestep, noise):
        return self.add_noise(sample, noise, timestep)


def unipc(scheduler, **changes):
    settings = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "solver_order": 2}
    return UniPC.from_config(scheduler.config, **settings, **changes)


def lcm(scheduler, **changes):
    return FlowMatchLCMScheduler.from_config(scheduler.config, **changes)


MAKERS = {"unipc": unipc, "lcm": lcm}


def relative(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_text_to_image(tmp_path_factory.mktemp("checkpoints") / "tiny", tokenizer="qwen")


@pytest.fixture(scope="module")
def pipeline(tiny):
    return QwenImagePipeline.from_pretrained(tiny, dtype="float32")


def ours(pipeline, solver, *, steps, cfg_scale, seed, image=None, **parameters):
    encoding = pipeline.encode_guidance_prompts(PROMPT, NEGATIVE)
    initial = None if image is None else pipeline.encode_initial_image(image, SIZE)
    found = []
    pipeline.denoise_latents(
        GenerationParameters(
            width=SIZE[0], height=SIZE[1], num_inference_steps=steps, cfg_scale=cfg_scale, solver=solver, **parameters
        ),
        encoding, seed=seed, initial=initial,
        progress=lambda p: found.append(np.array(p.latents.astype(mx.float32))) if p.stage == "denoise" else None,
    )  # fmt: skip
    return found[1:]


def with_scheduler(pipe, name, monkeypatch, **changes):
    """The reference's pipeline with a scheduler; LCM's noise goes on where the initial noise ends, which diffusers'
    pipelines cannot ask for."""
    pipe.scheduler = MAKERS[name](pipe.scheduler, **changes)
    if name == "lcm":
        generators = []
        manual_seed = torch.Generator.manual_seed

        def seeded(generator, seed):
            generators.append(manual_seed(generator, seed))
            return generator

        step = pipe.scheduler.step
        pipe.scheduler.step = lambda *args, **keys: step(*args, generator=generators[0], **keys)

        class Seeded(torch.Generator):
            manual_seed = seeded

        monkeypatch.setattr(torch, "Generator", Seeded)
    return pipe


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("steps", [2, 9, 20])
@pytest.mark.parametrize("cfg_scale", [1.0, 4.0])
def test_text_to_image(tiny, pipeline, monkeypatch, name, steps, cfg_scale):
    call = {"steps": steps, "cfg_scale": cfg_scale, "seed": 4}
    pipe = with_scheduler(load_reference(tiny), name, monkeypatch)
    theirs = run_reference(pipe, prompt=PROMPT, negative_prompt=NEGATIVE, width=SIZE[0], height=SIZE[1], **call)
    found = ours(pipeline, name, **call)
    assert len(found) == steps
    assert max(map(relative, found, theirs.latents)) < 1e-4


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("strength", [0.2, 0.85, 1.0])
@pytest.mark.parametrize("cfg_scale", [1.0, 4.0])
def test_image_to_image(tiny, pipeline, monkeypatch, name, strength, cfg_scale):
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 255, (64, 96, 3), np.uint8))
    call = {"steps": 7, "cfg_scale": cfg_scale, "seed": 4, "strength": strength}
    pipe = with_scheduler(load_edit_reference(tiny, "img2img"), name, monkeypatch)
    theirs, _ = run_edit_reference(
        pipe, prompt=PROMPT, negative_prompt=NEGATIVE, image=image, width=SIZE[0], height=SIZE[1], **call
    )
    found = ours(pipeline, name, image=image, **call)
    assert len(found) == len(theirs)
    assert max(map(relative, found, theirs)) < 1e-4


@pytest.mark.parametrize("config", [
    {"shift_terminal": None},
    {"use_dynamic_shifting": False, "shift": 3.0, "shift_terminal": None},
], ids=["no terminal", "static"])  # fmt: skip
def test_unipc_with_other_shifts(tmp_path, monkeypatch, config):
    folder = write_text_to_image(tmp_path / "model", scheduler=config)
    call = {"steps": 9, "cfg_scale": 4.0, "seed": 4}
    pipe = with_scheduler(load_reference(folder), "unipc", monkeypatch, flow_shift=config.get("shift", 1.0))
    theirs = run_reference(pipe, prompt=PROMPT, negative_prompt=NEGATIVE, width=SIZE[0], height=SIZE[1], **call)
    found = ours(QwenImagePipeline.from_pretrained(folder, dtype="float32"), "unipc", **call)
    assert max(map(relative, found, theirs.latents)) < 1e-4


@pytest.mark.parametrize("steps", [*range(2, 60), 100, 333, 1000])
def test_unipc_s_timesteps_are_diffusers_s(pipeline, steps):
    """Whole numbers of float64: one that falls on the other side of a whole number would be another timestep."""
    from qwen_image_mlx.pipeline.generation import schedule_of
    from qwen_image_mlx.sampling.schedule import exponential_mu
    from qwen_image_mlx.sampling.solvers import SOLVERS

    components = pipeline.components
    parameters = GenerationParameters(width=1328, height=1328, num_inference_steps=steps)
    for tokens in (24, 1024, 6889):
        config = components.scheduler_config
        names = ("use_dynamic_shifting", "time_shift_type", "shift_terminal")
        scheduler = UniPC(
            use_flow_sigmas=True, prediction_type="flow_prediction", **{name: getattr(config, name) for name in names}
        )
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=exponential_mu(config, tokens))
        schedule = schedule_of(components, parameters, tokens, ())
        levels = SOLVERS["unipc"].evaluations(schedule)
        np.testing.assert_array_equal(np.round(levels * 1000), scheduler.timesteps.numpy())
