"""No GPU work ever waits for a disk: what comes out of a file is evaluated by itself, whatever is done with it."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import mlx.core as mx
import numpy as np
import pytest
from graphs import READS, evaluations, mixed
from lora_files import MODULATION, TARGETS, write_lora

from qwen_image_mlx import Cancelled, GenerationParameters, GuidanceEncoding, QwenImagePipeline
from qwen_image_mlx.pipeline.quantize_checkpoint import quantize_checkpoint
from qwen_image_mlx.pipeline.qwen_image.table import modulation_table
from qwen_image_mlx.training.table import LevelTable
from qwen_image_mlx.weights.safetensors_files import load_tensors, save_tensors
from qwen_image_mlx.weights.schemes import Quantization
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
    image = np.zeros((64, 64, 3), np.uint8)
    encoding = pipeline.encode_guidance_prompts("a fox", "blurry", images=[image], reference_pixels=64 * 64)
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


def captioned(folder):
    """A layered model writes captions; its own words would take long."""
    pipeline = QwenImagePipeline.from_pretrained(folder, streamed=["text_encoder", "vision"])
    pipeline.caption_image(np.full((64, 64, 3), 90, np.uint8), resolution=64, progress=stop_after(3))


def stop_after(tokens):
    def watch(progress):
        if (progress.stage, progress.step) == ("caption", tokens):
            progress.cancel()

    return watch


@pytest.mark.slow
def test_captions_read_layers_by_themselves(tmp_path, monkeypatch):
    folder = write_checkpoint(tmp_path / "layered", TINY, pipeline="QwenImageLayeredPipeline")
    with evaluations(monkeypatch) as seen, pytest.raises(Cancelled):
        captioned(folder)
    assert sum(bool(names & READS) for names in seen) > 10
    assert not mixed(seen)


@pytest.mark.slow
def test_a_caption_holds_few_streamed_layers(tmp_path):
    """Eight more layers take no more memory than the keys and values that they keep."""
    peaks, layer = [], 0
    for count in (4, 12):
        encoder = replace(TINY["text_encoder"], num_hidden_layers=count, intermediate_size=8192)
        folder = tmp_path / str(count)
        configs = {**TINY, "text_encoder": encoder}
        write_checkpoint(folder, configs, pipeline="QwenImageLayeredPipeline", dtype=mx.float32)
        pipeline = QwenImagePipeline.from_pretrained(folder, dtype="float32", streamed=["text_encoder"])
        parts = pipeline.components
        _ = parts.network("vision"), parts.network("text_encoder"), parts.network("language_head")
        specs = parts.weights("text_encoder").specs("main")
        layer = sum(4 * prod(spec.shape) for spec in specs if ".layers.0." in spec.name)
        mx.reset_peak_memory()
        with pytest.raises(Cancelled):
            pipeline.caption_image(np.full((32, 32, 3), 90, np.uint8), resolution=32, progress=stop_after(2))
        peaks.append(mx.get_peak_memory())
    assert peaks[1] - peaks[0] < 4 * layer


@pytest.mark.reference
@pytest.mark.parametrize("form", ["fp8", "gguf"])
def test_other_forms_are_read_by_themselves(model, tmp_path, monkeypatch, form):
    import foreign

    tensors = foreign.read(model / "transformer")
    file = tmp_path / f"transformer.{'gguf' if form == 'gguf' else 'safetensors'}"
    if form == "gguf":
        foreign.write_gguf(file, tensors, "Q8_0")
    else:
        foreign.save(file, foreign.comfy_fp8(tensors)[0])
    with evaluations(monkeypatch) as seen:
        pipeline = QwenImagePipeline.from_pretrained(model, transformer=file)
        _ = pipeline.components.network("transformer")
    assert seen
    assert not mixed(seen)


def test_training_reads_examples_levels_and_checkpoints_by_themselves(model, tmp_path, monkeypatch):
    weights, sigmas = QwenImagePipeline.from_pretrained(model).components.weights("transformer"), mx.array([1.0, 0.5])
    table = LevelTable(tmp_path / "table", weights, sigmas, [0, 1], mx.float32, False, None, "x")
    save_tensors(tmp_path / "example.safetensors", {"latents": mx.ones((1, 4, 64)), "text": mx.ones((1, 3, 64))}, {})
    with evaluations(monkeypatch) as seen:
        table([0, 1])
        load_tensors(tmp_path / "example.safetensors")
    assert sum(bool(names & READS) for names in seen) == 3
    assert not mixed(seen)


@pytest.mark.slow
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
        modulation_table(pipeline.components.weights("transformer"), [1.0, 0.5], pipeline.dtype)
    assert any(names & READS for names in seen)
    assert not mixed(seen)


def test_encodings_are_read_by_themselves(model, tmp_path, monkeypatch):
    pipeline = QwenImagePipeline.from_pretrained(model)
    image = np.zeros((64, 64, 3), np.uint8)
    encoding = pipeline.encode_guidance_prompts("a fox", images=[image], reference_pixels=64 * 64)
    encoding.save(tmp_path / "fox.safetensors")
    with evaluations(monkeypatch) as seen:
        GuidanceEncoding.load(tmp_path / "fox.safetensors")
    assert seen == [set(READS)]
