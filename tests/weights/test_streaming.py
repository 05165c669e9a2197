"""Streamed layers: the same numbers as layers that stay, in the memory of a few, from files that must not change."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from lora_files import MODULATION, TARGETS, write_lora
from mlx.utils import tree_flatten

from qwen_image_mlx import CheckpointError, GenerationParameters, QwenImagePipeline, RequestError
from qwen_image_mlx.pipeline.quantize_checkpoint import quantize_checkpoint
from qwen_image_mlx.weights.schemes import Quantization
from qwen_image_mlx.weights.synthetic import TINY, write_checkpoint

ALL = ("transformer", "text_encoder", "vision")
PARAMETERS = GenerationParameters(width=64, height=48, num_inference_steps=2, cfg_scale=3.0)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("streaming") / "model", TINY, dtype=mx.float32)


def opened(folder, streamed=(), dtype="float32", **options):
    return QwenImagePipeline.from_pretrained(folder, dtype=dtype, streamed=streamed, **options)


def generated(pipeline, cfg_scale=3.0):
    """The prompts' states and the image."""
    encoding = pipeline.encode_guidance_prompts("a fox", "blurry")
    pixels = pipeline.generate_pixels(replace(PARAMETERS, cfg_scale=cfg_scale), encoding, seed=1)
    return [np.array(array.astype(mx.float32)) for array in (encoding.positive, encoding.negative, pixels)]


def assert_same(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("cfg_scale", [1.0, 3.0])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_pixels_do_not_depend_on_streaming(model, dtype, cfg_scale):
    one, other = (opened(model, streamed, dtype) for streamed in ((), ALL))
    assert_same(generated(one, cfg_scale), generated(other, cfg_scale))
    assert_same(generated(other, cfg_scale), generated(other, cfg_scale))


@pytest.mark.slow
def test_packs_are_streamed(model, tmp_path):
    pack = quantize_checkpoint(model, tmp_path / "pack", Quantization.parse("4/32"))
    assert_same(generated(opened(pack)), generated(opened(pack, ALL)))
    assert_same(generated(opened(pack)), generated(opened(pack, ALL, quantize="4/32")))


@pytest.mark.parametrize("component", ["text_encoder", "transformer"])
def test_nothing_is_quantized_while_it_streams(model, component, monkeypatch):
    monkeypatch.setattr("qwen_image_mlx.weights.loader.quantize_matrix", lambda *_: pytest.fail("quantized"))
    pipeline = opened(model, [component], quantize=f"{component}=8/32")
    with pytest.raises(RequestError, match=f"the {component} is read .* quantized to 8/32 each time"):
        generated(pipeline)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["auto", "merge", "side"])
def test_loras_are_streamed(model, tmp_path, mode):
    shapes = opened(model).components.lora_targets()
    file = write_lora(tmp_path / "lora.safetensors", shapes, targets=[*TARGETS, *MODULATION])
    plain = generated(opened(model))[-1]
    one, other = (opened(model, streamed, loras=[file], lora_mode=mode) for streamed in ((), ALL))
    assert_same(generated(one), generated(other))
    assert np.abs(generated(other)[-1] - plain).max() > 0.01
    other.set_loras([])
    np.testing.assert_array_equal(generated(other)[-1], plain)


@pytest.mark.slow
def test_images_are_shown_through_streamed_towers(tmp_path):
    folder = write_checkpoint(tmp_path / "edit", TINY, dtype=mx.float32, pipeline="QwenImageEditPlusPipeline")
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    states = [
        np.array(
            opened(folder, streamed).encode_guidance_prompts("redder", images=[image], reference_pixels=4096).positive
        )
        for streamed in ((), ALL)
    ]
    np.testing.assert_array_equal(*states)


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """Many layers beside a small rest."""
    configs = {
        **TINY,
        "transformer": replace(TINY["transformer"], num_layers=16, num_attention_heads=12),
        "text_encoder": replace(TINY["text_encoder"], num_hidden_layers=12, vocab_size=4000),
    }
    return write_checkpoint(tmp_path_factory.mktemp("deep") / "model", configs, dtype=mx.float32)


@pytest.mark.slow
def test_a_pass_takes_the_memory_of_a_few_layers(deep):
    pipeline = opened(deep, ALL)
    weights = pipeline.components.weights("transformer")
    layer = sum(4 * int(np.prod(spec.shape)) for spec in weights.specs("main") if ".5." in spec.name)
    encoding = pipeline.encode_guidance_prompts("a fox", "blurry")
    pipeline.release_encoders()
    transformer = pipeline.components.network("transformer")
    assert sum(array.nbytes for _, array in tree_flatten(transformer.parameters())) < 2 * layer
    pipeline.denoise_latents(PARAMETERS, encoding)
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    pipeline.denoise_latents(PARAMETERS, encoding)
    assert mx.get_peak_memory() - before < 8 * layer
    assert mx.get_active_memory() - before < layer


@pytest.mark.slow
def test_the_embedding_is_read_by_the_row(deep):
    streamed, held = (
        opened(deep, ALL).components.network("text_encoder"),
        opened(deep).components.network("text_encoder"),
    )
    ids = mx.array([[3, 0, 3999, 3]])
    np.testing.assert_array_equal(np.array(streamed.embed(ids)), np.array(held.embed(ids)))
    assert "embed_tokens.weight" not in dict(tree_flatten(streamed.model.parameters()))


@pytest.mark.parametrize("accident", ["removed", "rewritten", "cut"])
def test_a_file_that_changes_meanwhile_is_an_error_and_no_image(model, tmp_path, accident):
    folder = shutil.copytree(model, tmp_path / "model")
    (file,) = (folder / "transformer").glob("*.safetensors")
    pipeline = opened(folder, ALL)
    encoding = pipeline.encode_guidance_prompts("a fox", "blurry")

    def meddle(progress):
        if (progress.stage, progress.step) == ("denoise", 1):
            if accident == "removed":
                file.unlink()
            elif accident == "rewritten":
                status = file.stat()
                os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
            else:
                os.truncate(file, file.stat().st_size // 2)

    with pytest.raises(CheckpointError, match=r"changed or removed|could not be read"):
        pipeline.generate_pixels(PARAMETERS, encoding, progress=meddle)


def test_a_change_after_the_last_pass_is_noticed_too(model, tmp_path):
    folder = shutil.copytree(model, tmp_path / "model")
    (file,) = (folder / "transformer").glob("*.safetensors")
    pipeline = opened(folder, ALL)
    encoding = pipeline.encode_guidance_prompts("a fox", "blurry")
    with pytest.raises(CheckpointError, match="changed or removed"):
        pipeline.generate_pixels(
            PARAMETERS, encoding, progress=lambda p: file.touch() if (p.stage, p.step) == ("denoise", 2) else None
        )
