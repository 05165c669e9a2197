"""Qwen-Image-2.1 against diffusers' QwenImage21Pipeline, live, in fp32, by `QwenImagePipeline`."""

from __future__ import annotations

import numpy as np
import pytest
from checkpoints_21 import TINY_TEXT_ENCODER, TINY_TRANSFORMER, TINY_VAE, write_rest_21
from goldens import image
from reference_21 import (
    make_pipeline_21,
    make_text_encoder_21,
    make_transformer_21,
    make_vae_21,
    run_pipeline_21,
)

from qwen_image_mlx import QwenImagePipeline
from qwen_image_mlx.models.qwen_image_21 import facts
from qwen_image_mlx.text.prompt import tokenize_prompt

pytestmark = pytest.mark.reference

PROMPT = "make <image1> blue, 让它变蓝 🦊 {like} <this>"


class Ours:
    """This package's pipeline of a checkpoint, and the latents of its steps."""

    def __init__(self, folder, **changes):
        self.pipeline = QwenImagePipeline.from_pretrained(folder, dtype="float32", **changes)

    def generate(self, prompts, size, *, seed, images=(), cfg_scale=1.0, steps=3, sigmas=None, keep=True):
        latents = []

        def told(progress):
            if progress.stage == "denoise" and progress.step:
                latents.append(np.array(progress.latents))

        pipeline = self.pipeline
        asked = {
            "prefix_cache": keep, "negative_prompt": prompts[1] if len(prompts) > 1 else None,
            "cfg_scale": cfg_scale, "seed": seed,
            "num_inference_steps": None if sigmas else steps, "progress": told,
        }  # fmt: skip
        if images:
            (made,) = pipeline.edit(prompts[0], images=images, size=size, **asked)
        else:
            (made,) = pipeline.generate(prompts[0], width=size[0], height=size[1], **asked)
        return latents, made


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    models = {
        "transformer": make_transformer_21(TINY_TRANSFORMER),
        "vae": make_vae_21(TINY_VAE),
        "text_encoder": make_text_encoder_21(TINY_TEXT_ENCODER),
    }
    for name, model in models.items():
        model.save_pretrained(folder / name)

    def pipeline(**changes):
        return make_pipeline_21(folder / "processor", **models, **changes)

    usual = pipeline()
    return pipeline, usual, {sigmas: Ours(write_rest_21(folder, sigmas)) for sigmas in (None, facts.TURBO_SIGMAS)}


IMAGES = [image(90, 90), image(200, 120, 1, mode="RGBA"), image(75, 300, 2)]
RUNS = {
    "text": {"size": (96, 64)},
    "guided": {"size": (64, 96), "negative": "blurry", "cfg_scale": 3.7},
    "an empty negative prompt": {"size": (64, 64), "negative": "", "cfg_scale": 4.0},
    "one reference": {"size": (96, 96), "images": IMAGES[1:2]},
    "three references": {"size": (96, 64), "images": IMAGES},
    "three references, guided": {"size": (64, 64), "images": IMAGES, "negative": "blurry", "cfg_scale": 4.0},
    "ten references": {"size": (32, 64), "images": [image(50 + 9 * n, 120 - 8 * n, n) for n in range(10)]},
    "Turbo": {"size": (96, 64), "sigmas": facts.TURBO_SIGMAS},
}


@pytest.mark.parametrize("name", RUNS)
def test_latents_of_every_step_and_the_image_equal_the_reference(both, name):
    pipeline, usual, ours = both
    run = {"images": [], "negative": None, "cfg_scale": 1.0, "sigmas": None} | RUNS[name]
    sigmas = run["sigmas"] and [*run["sigmas"]]
    pipe = pipeline(sample_sigmas=sigmas) if sigmas else usual
    expected, (image,) = run_pipeline_21(
        pipe, prompt=PROMPT, negative_prompt=run["negative"], true_cfg_scale=run["cfg_scale"],
        image=run["images"] or None, width=run["size"][0], height=run["size"][1], num_inference_steps=3,
        output_resolution=96, seed=7,
    )  # fmt: skip
    prompts = [PROMPT, *([] if run["negative"] is None else [run["negative"]])]
    request = {"seed": 7, "images": run["images"], "cfg_scale": run["cfg_scale"], "sigmas": sigmas}
    latents, made = ours[run["sigmas"]].generate(prompts, run["size"], **request)
    assert len(latents) == len(expected) == (len(sigmas) if sigmas else 3)
    errors = [float(np.abs(a - b).max()) for a, b in zip(latents, expected, strict=True)]
    assert max(errors) <= 1e-4, errors
    assert (made.mode, made.size) == (image.mode, image.size) == ("RGBA", run["size"])
    assert np.abs(np.asarray(made, int) - np.asarray(image, int)).max() <= 1
    without, _ = ours[run["sigmas"]].generate(prompts, run["size"], keep=False, **request)
    assert max(np.abs(a - b).max() for a, b in zip(latents, without, strict=True)) <= 1e-6


def test_the_template_drops_the_system_turn(both):
    _, pipe, ours = both
    components = ours[None].pipeline.components
    tokens = tokenize_prompt(components.tokenizer, components.variant.template, "a fox")
    assert tokens.first == pipe._drop_idx == facts.DROP
    assert pipe.prompt_template_t2i == facts.TEMPLATE.replace("{prompt}", "{}")
