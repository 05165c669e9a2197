"""This package's numbers against the reference's, which `tests/goldens` keeps: no torch is needed."""

from __future__ import annotations

from dataclasses import replace

import goldens
import mlx.core as mx
import numpy as np
import pytest
from checkpoints import write_tokenizer

from qwen_image_mlx import GenerationParameters, QwenImagePipeline, variants
from qwen_image_mlx.config import SchedulerConfig
from qwen_image_mlx.images.pixels import to_images
from qwen_image_mlx.models.qwen_image.config import TransformerConfig
from qwen_image_mlx.models.qwen_image.modulation import TimeModulation
from qwen_image_mlx.models.qwen_image.rope import place_images
from qwen_image_mlx.models.qwen_image.transformer import Transformer
from qwen_image_mlx.sampling.noise import generator
from qwen_image_mlx.sampling.schedule import exponential_mu, make_schedule, uniform_sigmas
from qwen_image_mlx.text.tokenizer import QwenTokenizer
from qwen_image_mlx.training.loop import LoopSettings, Trainer
from qwen_image_mlx.training.loss import FlowMatching
from qwen_image_mlx.training.network import Batch
from qwen_image_mlx.training.optimizers import Optimizer, Rate
from qwen_image_mlx.training.qwen_image.network import Network
from qwen_image_mlx.weights.loader import ComponentWeights, load_module
from qwen_image_mlx.weights.safetensors_files import component_tensors
from qwen_image_mlx.weights.synthetic import ROWS


def test_noise():
    drawn = {
        f"{seed} {shape}": np.array(generator("torch", seed).normal(shape))
        for seed in goldens.SEEDS
        for shape in goldens.NOISE_SHAPES
    }
    goldens.assert_agree("noise", drawn, 1e-6)


def test_sigmas():
    made = {}
    for name, (config, steps, tokens) in goldens.SCHEDULES.items():
        typed = SchedulerConfig.from_dict({key: value for key, value in config.items() if not key.startswith("_")})
        made[name] = make_schedule(typed, uniform_sigmas(steps), exponential_mu(typed, tokens)).sigmas
    goldens.assert_agree("sigmas", made, 0)


@pytest.mark.parametrize("tokenizer_json", [True, False])
def test_tokens(tmp_path, tokenizer_json):
    folder = write_tokenizer(tmp_path / "tokenizer", tokenizer_json=tokenizer_json)
    tokenizer = QwenTokenizer.from_files({path.name: path for path in folder.iterdir()})
    ids = {str(number): np.array(tokenizer.encode(text).ids) for number, text in enumerate(goldens.TEXTS)}
    goldens.assert_agree("tokens", ids, 0)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tiny):
    made = {"text to image": tiny}

    def get(name):
        if name not in made:
            made[name] = goldens.CHECKPOINTS[name](tmp_path_factory.mktemp("goldens") / "model")
        return made[name]

    return get


@pytest.mark.parametrize("name", goldens.GENERATIONS)
def test_generations(checkpoint, monkeypatch, name):
    """Latents after every step, and pixels."""
    for pipeline, row in variants.VARIANTS.items():
        if row.encoder_area:
            changed = replace(row, encoder_area=goldens.AREA, reference_area=goldens.AREA)
            monkeypatch.setitem(variants.VARIANTS, pipeline, changed)
    model, request = goldens.GENERATIONS[name]
    pipeline = QwenImagePipeline.from_pretrained(checkpoint(model), dtype="float32")
    shown, layers = request.get("images", ()), request.get("layers")
    area = {"reference_pixels": goldens.AREA} if layers else {}
    encoding = pipeline.encode_guidance_prompts(goldens.PROMPT, goldens.NEGATIVE, images=shown, **area)
    width, height = request["size"]
    parameters = GenerationParameters(
        width=width, height=height, num_inference_steps=goldens.STEPS, cfg_scale=request["cfg_scale"],
        strength=request.get("strength", 1.0), **({"num_layers": layers} if layers else {}),
    )  # fmt: skip
    initial = request.get("initial")
    start = initial and pipeline.encode_initial_image(initial, (width, height), request.get("mask"))
    latents = []
    pixels = pipeline.generate_pixels(
        parameters,
        encoding,
        seed=request["seed"],
        initial=start,
        progress=lambda p: latents.append(np.array(p.latents)) if p.stage == "denoise" else None,
    )
    made = {f"latents {step}": value for step, value in enumerate(latents[1:], 1)}
    made |= {f"image {number}": np.asarray(image) for number, image in enumerate(to_images(pixels))}
    goldens.assert_agree(name, made, 1e-4)


def test_training(tiny, monkeypatch):
    """A loss and its gradients."""
    folder = tiny / "transformer"
    config = TransformerConfig.from_dict(goldens.read_json(folder / "config.json"))
    weights = ComponentWeights(
        ROWS["transformer"], config, component_tensors(list(folder.glob("*.safetensors")), None), ["main", "modulation"]
    )
    transformer = load_module(Transformer(config), weights, "main", mx.float32)
    network = Network(transformer, config, load_module(TimeModulation(config), weights, "modulation", mx.float32))
    drawn = {key: mx.array(value) for key, value in goldens.training_batch().items()}
    batch = Batch(drawn["latents"], drawn["text"], tuple(place_images([goldens.GRID], False)))
    trainer = Trainer(network, lambda step: [batch], Optimizer(Rate(1e-3)), FlowMatching(), LoopSettings())
    levels = mx.array(goldens.LEVELS)
    monkeypatch.setattr(trainer, "draws", lambda *_: (levels, drawn["noise"]))
    loss, gradients = trainer.gradients(0)
    ours = {key.partition(".")[2]: np.array(value) for key, value in gradients.items()}
    made = {"loss": np.array(loss, np.float32), "sigmas": np.array(trainer.flow.sigmas[levels])}
    goldens.assert_agree("training", made | {name: ours[name] for name in goldens.TRAINED}, 1e-4)
