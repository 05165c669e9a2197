"""No GPU work ever waits for a disk: what comes out of a file is evaluated by itself, whatever is done with it."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from graphs import READS, evaluations, mixed
from lora_files import MODULATION, TARGETS, write_lora

from qwen_image_mlx import GenerationParameters, GuidanceEncoding, QwenImagePipeline
from qwen_image_mlx.pipeline.packing import quantize_checkpoint
from qwen_image_mlx.weights.quantize import Quantization
from qwen_image_mlx.weights.synthetic import TINY, write_checkpoint

STREAMED = ("transformer", "text_encoder", "vision")
PARAMETERS = GenerationParameters(width=64, height=48, num_inference_steps=2, cfg_scale=3.0)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """In another dtype than the run's, so that every tensor has to be cast."""
    folder = tmp_path_factory.mktemp("reading") / "model"
    return write_checkpoint(folder, TINY, dtype=mx.float32, pipeline="QwenImageEditPlusPipeline")


def run(folder, **options):
    pipeline = QwenImagePipeline.from_pretrained(folder, **options)
    picture = np.zeros((64, 64, 3), np.uint8)
    encoding = pipeline.encode_guidance_prompts("a fox", "blurry", images=[picture], reference_pixels=64 * 64)
    pipeline.generate_pixels(PARAMETERS, encoding, seed=1)


def loras(folder, model):
    shapes = QwenImagePipeline.from_pretrained(model).components.lora_targets()
    return [write_lora(folder / "lora.safetensors", shapes, targets=[*TARGETS, *MODULATION])]


CASES = {
    "loading": lambda model, tmp: run(model),
    "quantizing": lambda model, tmp: run(model, quantize="transformer=4/32,text_encoder=8/32,vision=8/32"),
    "merging LoRAs": lambda model, tmp: run(model, loras=loras(tmp, model), lora_mode="merge"),
    "LoRAs beside": lambda model, tmp: run(model, loras=loras(tmp, model), lora_mode="side"),
    "streaming": lambda model, tmp: run(model, streamed=STREAMED),
    "streaming with LoRAs": lambda model, tmp: run(model, streamed=STREAMED, loras=loras(tmp, model)),
    "saving a pack": lambda model, tmp: quantize_checkpoint(model, tmp / "pack", Quantization.parse("4/32")),
    "a pack": lambda model, tmp: run(quantize_checkpoint(model, tmp / "pack", Quantization.parse("4/32"))),
}


@pytest.mark.parametrize("case", CASES)
def test_no_evaluation_mixes_a_file_with_other_work(model, tmp_path, monkeypatch, case):
    with evaluations(monkeypatch) as seen:
        CASES[case](model, tmp_path)
    assert sum(bool(names & READS) for names in seen) > 10, "files were read"
    assert sum(not names & READS for names in seen) > 10, "and computed with"
    assert not mixed(seen)


def test_the_modulation_is_made_of_weights_that_are_there(model, monkeypatch):
    pipeline = QwenImagePipeline.from_pretrained(model)
    with evaluations(monkeypatch) as seen:
        pipeline._modulation(pipeline._schedule(PARAMETERS, 12, ()))
    assert any(names & READS for names in seen)
    assert not mixed(seen)


def test_encodings_are_read_by_themselves(model, tmp_path, monkeypatch):
    pipeline = QwenImagePipeline.from_pretrained(model)
    picture = np.zeros((64, 64, 3), np.uint8)
    encoding = pipeline.encode_guidance_prompts("a fox", images=[picture], reference_pixels=64 * 64)
    encoding.save(tmp_path / "fox.safetensors")
    with evaluations(monkeypatch) as seen:
        GuidanceEncoding.load(tmp_path / "fox.safetensors")
    assert seen == [set(READS)]
