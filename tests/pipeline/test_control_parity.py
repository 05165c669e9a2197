"""ControlNets against diffusers, live: the same seed gives the same latents after every step, and pixels.

The reference draws the control image's latents from the autoencoder's distribution; it is made to take their mean.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
import torch
from checkpoints import write_text_to_image
from control_files import INSTANTX, half_mask, picture, write_control
from diffusers import (
    QwenImageControlNetInpaintPipeline,
    QwenImageControlNetModel,
    QwenImageControlNetPipeline,
    QwenImageMultiControlNetModel,
)
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from reference import load_reference, to_numpy
from safetensors.torch import load_file

from qwen_image_mlx import Control, GenerationParameters, QwenImagePipeline
from qwen_image_mlx.images.pixels import to_images

pytestmark = pytest.mark.reference

WIDTH, HEIGHT, STEPS = 64, 48, 5
PROMPT, AVOID = "a red fox", "blurry"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Five blocks, so that two residuals serve three and two of them."""
    return write_text_to_image(tmp_path_factory.mktemp("control") / "tiny", transformer={"num_layers": 5})


@pytest.fixture(scope="module")
def files(tiny):
    return {
        extra: write_control(tiny.parent / f"control{extra}.safetensors", tiny, INSTANTX, layers=2, extra=extra)
        for extra in (0, 1)
    }


@pytest.fixture(scope="module")
def reference(tiny):
    return load_reference(tiny)


@pytest.fixture(scope="module")
def pipeline(tiny):
    return QwenImagePipeline.from_pretrained(tiny, dtype="float32")


def theirs(reference, file, extra, **asked):
    """(latents after every step, 8-bit image) of the reference."""
    config = reference.transformer.config
    network = QwenImageControlNetModel(
        num_layers=2,
        attention_head_dim=config.attention_head_dim,
        num_attention_heads=config.num_attention_heads,
        joint_attention_dim=config.joint_attention_dim,
        axes_dims_rope=config.axes_dims_rope,
        extra_condition_channels=4 * extra,
    )
    network.load_state_dict(load_file(file))
    several = isinstance(asked["control_image"], list)
    parts = {
        name: getattr(reference, name) for name in ("scheduler", "vae", "text_encoder", "tokenizer", "transformer")
    }
    cls = QwenImageControlNetInpaintPipeline if extra else QwenImageControlNetPipeline
    pipe = cls(**parts, controlnet=QwenImageMultiControlNetModel([network]) if several else network)
    pipe.set_progress_bar_config(disable=True)
    latents = []
    with torch.no_grad():
        image = pipe(
            PROMPT, height=HEIGHT, width=WIDTH, num_inference_steps=STEPS,
            generator=torch.Generator("cpu").manual_seed(3),
            callback_on_step_end=lambda _p, _s, _t, state: latents.append(to_numpy(state["latents"])) or {}, **asked,
        ).images[0]  # fmt: skip
    return latents, np.asarray(image).astype(int)


def ours(pipeline, controls, cfg_scale):
    encoding = pipeline.encode_guidance_prompts(PROMPT, AVOID if cfg_scale > 1 else None)
    latents = []
    pixels = pipeline.generate_pixels(
        GenerationParameters(width=WIDTH, height=HEIGHT, num_inference_steps=STEPS, cfg_scale=cfg_scale), encoding,
        seed=3, controls=pipeline.encode_controls(controls, (WIDTH, HEIGHT)),
        progress=lambda p: latents.append(np.array(p.latents.astype(mx.float32))) if p.stage == "denoise" else None,
    )  # fmt: skip
    return latents[1:], np.asarray(to_images(pixels)[0]).astype(int)


CASES = {
    "plain": ([{}], 1.0),
    "scale and guidance": ([{"scale": 0.6}], 4.0),
    "window": ([{"start": 0.2, "end": 0.8}], 1.0),
    "several with guidance": ([{"scale": 0.7, "end": 0.6}, {"scale": 1.3, "start": 0.4}], 3.0),
    "inpainting": ([{"mask": True}], 1.0),
    "inpainting with guidance": ([{"mask": True, "scale": 0.8, "start": 0.2}], 4.0),
}


@pytest.mark.parametrize(("controls", "cfg_scale"), CASES.values(), ids=CASES)
def test_the_same_as_diffusers(pipeline, reference, files, controls, cfg_scale, monkeypatch):
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())
    extra = int("mask" in controls[0])
    images = [picture(80, 70, seed) for seed, _ in enumerate(controls)]
    mask = half_mask(80, 70)
    made = [
        Control(files[extra], image, **said | ({"mask": mask} if extra else {}))
        for image, said in zip(images, controls, strict=True)
    ]
    asked = {
        "true_cfg_scale": cfg_scale,
        "negative_prompt": AVOID if cfg_scale > 1 else None,
        "control_image": images if len(images) > 1 else images[0],
        "controlnet_conditioning_scale": [c.scale for c in made] if len(made) > 1 else made[0].scale,
        "control_guidance_start": [c.start for c in made] if len(made) > 1 else made[0].start,
        "control_guidance_end": [c.end for c in made] if len(made) > 1 else made[0].end,
    } | ({"control_mask": mask} if extra else {})
    expected, image = theirs(reference, files[extra], extra, **asked)
    latents, drawn = ours(pipeline, made, cfg_scale)
    assert len(latents) == len(expected) == STEPS
    worst = max(np.abs(a - b).max() / np.abs(b).max() for a, b in zip(latents, expected, strict=True))
    print("relative error", worst)
    assert worst < 1e-4
    assert np.abs(drawn - image).max() <= 1
    without, _ = ours(pipeline, (), cfg_scale)
    assert np.abs(without[-1] - expected[-1]).max() / np.abs(expected[-1]).max() > 0.01, "the control has an effect"
