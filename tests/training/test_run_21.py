"""Runs that train Qwen-Image-2.1: the loss falls, the folder is whole, and the result is used."""

from __future__ import annotations

import json

import mlx.core as mx
import numpy as np
import pytest
from checkpoints_21 import TINY_TRANSFORMER, write_network_21
from PIL import Image

from qwen_image_mlx import GenerationParameters, QwenImagePipeline
from qwen_image_mlx.cli.main import main
from qwen_image_mlx.errors import RequestError
from qwen_image_mlx.models.qwen_image_21.config import TransformerConfig
from qwen_image_mlx.models.qwen_image_21.transformer import Transformer
from qwen_image_mlx.registry import component_of
from qwen_image_mlx.training import samples
from qwen_image_mlx.training.examples import Example
from qwen_image_mlx.training.loop import LoopSettings, Trainer
from qwen_image_mlx.training.lora import add_lora, matrices
from qwen_image_mlx.training.loss import FlowMatching
from qwen_image_mlx.training.network import Batch
from qwen_image_mlx.training.optimizers import Optimizer, Rate
from qwen_image_mlx.training.qwen_image_21.seam import QwenImage21Training
from qwen_image_mlx.training.run import train
from qwen_image_mlx.training.settings import TrainingSettings
from qwen_image_mlx.weights.loader import ComponentWeights, load_module
from qwen_image_mlx.weights.safetensors_files import read_header


def test_steps_lower_the_loss_and_keep_the_base(tmp_path):
    """One example at one noise level; a reference stands in the midst of its prompt."""
    file = write_network_21(tmp_path, "transformer")
    config = TransformerConfig.from_dict(TINY_TRANSFORMER)
    row = component_of("QwenImage21Transformer2DModel")
    weights = ComponentWeights(row, config, read_header(file)[0], ["main", "modulation"])
    transformer = load_module(Transformer(config), weights, "main", mx.float32)
    before = np.array(transformer.transformer_blocks[0].img_mlp.out.weight)
    seam, flow, rng = QwenImage21Training(), FlowMatching(), np.random.default_rng(0)
    network = seam.network(transformer, config, None, checkpointing=True)
    add_lora(transformer, matrices(config), "all", rank=4)
    latents, references, text = (mx.array(rng.standard_normal((1, *shape), np.float32)) for shape in
                                 ((8, 64), (16, 64), (11, 64)))  # fmt: skip
    batch = Batch(latents, text, ((0, 2, 4), (3, 4, 4)), references)
    table = seam.table(tmp_path, weights, flow.sigmas, range(1000), mx.float32, None, "")
    trainer = Trainer(network, lambda step: [batch], Optimizer(Rate(0.01)), flow, LoopSettings(), table)
    same = trainer.draws(0, 0, batch)
    trainer.draws = lambda *_: same
    losses: list[float] = []
    trainer.run(6, lambda result: losses.append(result.loss))
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.9 * losses[0], losses
    layer = transformer.transformer_blocks[0].img_mlp.out
    np.testing.assert_array_equal(np.array(layer.layer.weight), before)
    assert float(mx.abs(layer.lora_B).max()) > 0


@pytest.fixture
def data(tmp_path):
    files = []
    for n, size in enumerate([(96, 96), (160, 96)]):
        pixels = np.random.default_rng(n).integers(0, 256, (5, 5, 4), np.uint8)
        files.append(tmp_path / f"{n}.png")
        Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(files[-1])
    return files


def settings(**options):
    defaults = {"steps": 3, "rank": 4, "resolution": 64, "learning_rate": 0.03, "save_every": 3, "sample_every": 3}
    return TrainingSettings(**defaults | options)


def test_a_resolution_that_it_does_not_have_is_refused(tiny_21, data, tmp_path):
    pipeline = QwenImagePipeline.from_pretrained(tiny_21, dtype="float32")
    with pytest.raises(RequestError, match="resolution is 80, but must be a multiple of 32"):
        train(pipeline, [Example("x", data[0])], settings(resolution=80), tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["t2i", "edit", "all weights"])
def test_a_run_makes_a_result_that_changes_images(tiny_21, data, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(samples, "STEPS", 2)
    example = Example("turn it", data[0], (data[1],)) if kind == "edit" else Example("a fox", data[1])
    pipeline = QwenImagePipeline.from_pretrained(tiny_21, dtype="float32")
    full = kind == "all weights"
    outcome = train(
        pipeline, [example], settings(full=full, caption_dropout=0.3, learning_rate=1e-3 if full else 0.03),
        tmp_path / "run",
    )  # fmt: skip
    assert outcome.steps == 3
    sample = Image.open(tmp_path / "run" / "samples" / "step-000003.png")
    assert sample.size == ((64, 64) if kind != "edit" else (96, 64))
    options = {"loras": [outcome.result]} if not full else {}
    made = []
    for folder, more in ((tiny_21, {}), (outcome.result if full else tiny_21, options)):
        again = QwenImagePipeline.from_pretrained(folder, dtype="float32", **more)
        parameters = GenerationParameters(width=64, height=64, num_inference_steps=2, cfg_scale=1.0)
        encoding = again.encode_guidance_prompts("a fox")
        made.append(np.array(again.denoise_latents(parameters, encoding, seed=1)))
    assert np.abs(made[0] - made[1]).max() > 1e-3


@pytest.mark.slow
def test_the_command_trains_an_edit_where_it_is_told_to(tiny_21, data, tmp_path, capsys):
    line = {"source": data[1].name, "target": data[0].name, "instruction": "turn it"}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(line))
    usual = ["train", "--model", str(tiny_21), "--data", str(tmp_path / "metadata.jsonl"), "--steps", "1",
             "--resolution", "64", "--dtype", "float32"]  # fmt: skip
    assert main([*usual, "--task", "edit", "--output", str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out.strip().endswith("lora.safetensors")
    assert main([*usual, "--task", "layered", "--output", str(tmp_path / "other")]) == 2
