"""Qwen-Image-2.1 against diffusers' QwenImage21Pipeline, live, in fp32: its parts put together by hand."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import REAL_CONFIGS
from checkpoints_21 import TINY_PROCESSOR, TINY_TEXT_ENCODER, TINY_TRANSFORMER, TINY_VAE
from goldens import image
from reference_21 import (
    make_pipeline_21,
    make_text_encoder_21,
    make_transformer_21,
    make_vae_21,
    run_pipeline_21,
)

from qwen_image_mlx.config import SchedulerConfig
from qwen_image_mlx.images.geometry import size_of_area
from qwen_image_mlx.images.pixels import on_white, to_images, to_patches, to_pixels
from qwen_image_mlx.models.qwen3_vl.config import TextEncoderConfig, VisionConfig
from qwen_image_mlx.models.qwen3_vl.text import Prompt, TextEncoder
from qwen_image_mlx.models.qwen3_vl.vision import VisionTower
from qwen_image_mlx.models.qwen_image_21 import facts
from qwen_image_mlx.models.qwen_image_21.config import TransformerConfig, VAEConfig
from qwen_image_mlx.models.qwen_image_21.denoiser import Condition, Denoiser, Reference
from qwen_image_mlx.models.qwen_image_21.modulation import TimeModulation
from qwen_image_mlx.models.qwen_image_21.transformer import Transformer
from qwen_image_mlx.models.qwen_image_21.vae import Decoder, Encoder
from qwen_image_mlx.pipeline.autoencode import decode, encode_mode
from qwen_image_mlx.registry import component_of
from qwen_image_mlx.sampling.denoise import Guidance, denoise
from qwen_image_mlx.sampling.noise import generator
from qwen_image_mlx.sampling.schedule import exponential_mu, make_schedule, uniform_sigmas
from qwen_image_mlx.text.places import image_starts
from qwen_image_mlx.text.prompt import replace_vision_tokens, tokenize_prompt
from qwen_image_mlx.text.tokenizer import QwenTokenizer
from qwen_image_mlx.variants import Template
from qwen_image_mlx.weights.loader import ComponentWeights, load_module
from qwen_image_mlx.weights.safetensors_files import component_tensors

pytestmark = pytest.mark.reference

TEMPLATE = Template(text=facts.TEMPLATE, drop=facts.DROP, image=facts.IMAGE, between=facts.BETWEEN_IMAGES)
PROMPT = "make <image1> blue, 让它变蓝 🦊 {like} <this>"
AREA = 96**2
SCHEDULER = SchedulerConfig.from_dict({k: v for k, v in REAL_CONFIGS["scheduler"].items() if k[0] != "_"})


class Ours:
    """This package's parts of a checkpoint, and what a pipeline makes of them."""

    def __init__(self, folder):
        def weights(component, config, parts=("main",), home=None):
            files = list((folder / (home or component)).glob("*.safetensors"))
            return ComponentWeights(component_of(component), config, component_tensors(files, None), parts)

        self.transformer_config = TransformerConfig.from_dict(TINY_TRANSFORMER)
        self.vae_config = VAEConfig.from_dict(TINY_VAE)
        text, self.vision_config = (c.from_dict(TINY_TEXT_ENCODER) for c in (TextEncoderConfig, VisionConfig))
        found = weights("QwenImage21Transformer2DModel", self.transformer_config, ["main", "modulation"])
        self.transformer = load_module(Transformer(self.transformer_config), found, "main", mx.float32)
        self.modulation = load_module(TimeModulation(self.transformer_config), found, "modulation", mx.float32)
        found = weights("AutoencoderKLQwenImage21", self.vae_config, ["encoder", "decoder"])
        self.encoder = load_module(Encoder(self.vae_config), found, "encoder", mx.float32)
        self.decoder = load_module(Decoder(self.vae_config), found, "decoder", mx.float32)
        name = "Qwen3VLForConditionalGeneration"
        self.text_encoder = load_module(TextEncoder(text), weights(name, text), "main", mx.float32)
        found = weights(f"{name}.vision", self.vision_config, home=name)
        self.tower = load_module(VisionTower(self.vision_config), found, "main", mx.float32)
        self.tokenizer = QwenTokenizer.from_files({path.name: path for path in (folder / "tokenizer").iterdir()})

    def features(self, image, size):
        patches = to_patches(
            on_white(image), size, patch=16, merge=2, mean=TINY_PROCESSOR["image_mean"],
            std=TINY_PROCESSOR["image_std"],
        )  # fmt: skip
        return self.tower(patches, size[1] // 16, size[0] // 16)

    def condition(self, prompt, images):
        grids = [(image.height // 32, image.width // 32) for image in images]
        tokens = tokenize_prompt(self.tokenizer, TEMPLATE, prompt or facts.EMPTY_PROMPT, grids)
        embeddings, additions = self.text_encoder.embed(mx.array(tokens.ids)[None]), []
        if images:
            seen = [self.features(image, image.size) for image in images]
            merged, *taps = (mx.concatenate(parts) for parts in zip(*([f.merged, *f.taps] for f in seen), strict=True))
            embeddings = replace_vision_tokens(embeddings, tokens.is_image, merged)
            nothing = mx.zeros_like(embeddings)
            additions = [replace_vision_tokens(nothing, tokens.is_image, tap) for tap in taps]
        (states,) = self.text_encoder.together([Prompt(embeddings, mx.array(tokens.positions), additions)])
        return Condition(states[:, tokens.first :], image_starts(tokens, grids))

    def generate(self, prompts, size, *, seed, images=(), cfg_scale=1.0, steps=3, sigmas=None, keep=True):
        images = [image.convert("RGBA") for image in images]
        images = [p.resize(size_of_area(AREA, p.size), 1) for p in images]
        references = []
        for opened in images:
            latents = encode_mode(self.encoder, self.vae_config, to_pixels(opened, opened.size))
            references.append(Reference(latents.flatten(1, 2), *latents.shape[1:3]))
        height, width = size[1] // 16, size[0] // 16
        noise = generator("torch", seed).normal((1, 1, 64, height, width))
        noise = mx.array(noise).reshape(1, 64, -1).transpose(0, 2, 1)
        if sigmas is None:
            schedule = make_schedule(SCHEDULER, uniform_sigmas(steps), exponential_mu(SCHEDULER, height * width))
        else:
            schedule = make_schedule(SchedulerConfig(), sigmas, 0.0)
        *table, still = self.modulation.table(mx.array([*schedule.timesteps.tolist(), 0.0]), mx.float32)
        denoiser = Denoiser(
            self.transformer, self.transformer_config, table=table, still=still,
            conditions=[self.condition(prompt, images) for prompt in prompts], references=references,
            grid=(height, width), dtype=mx.float32, keep_prefix=keep,
        )  # fmt: skip
        mx.eval(denoiser.prepared)
        latents = []
        guidance = Guidance(cfg_scale, facts.RENORMALIZE) if len(prompts) > 1 else None
        clean = denoise(
            denoiser.velocities, noise, schedule, guidance, lambda _n, x: latents.append(np.array(x.latents))
        )
        pixels = decode(self.decoder, self.vae_config, clean.reshape(1, height, width, 64))
        return latents, to_images(pixels)[0]


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    models = {
        "transformer": make_transformer_21(TINY_TRANSFORMER),
        "vae": make_vae_21(TINY_VAE),
        "text_encoder": make_text_encoder_21(TINY_TEXT_ENCODER),
    }
    for model in models.values():
        model.save_pretrained(folder / type(model).__name__)

    def pipeline(**changes):
        return make_pipeline_21(folder / "tokenizer", **models, **changes)

    return pipeline, pipeline(), Ours(folder)


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
    latents, made = ours.generate(prompts, run["size"], **request)
    assert len(latents) == len(expected) == (len(sigmas) if sigmas else 3)
    errors = [float(np.abs(a - b).max()) for a, b in zip(latents, expected, strict=True)]
    assert max(errors) <= 1e-4, errors
    assert (made.mode, made.size) == (image.mode, image.size) == ("RGBA", run["size"])
    assert np.abs(np.asarray(made, int) - np.asarray(image, int)).max() <= 1
    without, _ = ours.generate(prompts, run["size"], keep=False, **request)
    assert max(np.abs(a - b).max() for a, b in zip(latents, without, strict=True)) <= 1e-6


def test_the_template_drops_the_system_turn(both):
    _, pipe, ours = both
    tokens = tokenize_prompt(ours.tokenizer, TEMPLATE, "a fox")
    assert tokens.first == pipe._drop_idx == facts.DROP
    assert pipe.prompt_template_t2i == facts.TEMPLATE.replace("{prompt}", "{}")
