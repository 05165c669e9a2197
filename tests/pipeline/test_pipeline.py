"""The pipeline's promises beyond pixels: separate calls, explicit memory, progress and cancelling, clear errors."""

from __future__ import annotations

import gc
import shutil
import subprocess
import sys
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_map
from PIL import Image

from qwen_image_mlx import (
    Cancelled,
    CheckpointError,
    GenerationParameters,
    GuidanceEncoding,
    OutputError,
    QwenImageError,
    QwenImagePipeline,
    RequestError,
)
from qwen_image_mlx.pipeline.conditioning import Reference

PARAMETERS = GenerationParameters(width=64, height=48, num_inference_steps=3)
PHOTO = Image.linear_gradient("L").resize((90, 70)).convert("RGB")
DISC = Image.radial_gradient("L").resize((90, 70)).point(lambda grey: 255 * (grey < 90))


@pytest.fixture
def pipeline(tiny):
    return QwenImagePipeline.from_pretrained(tiny, dtype="float32")


@pytest.fixture(scope="module")
def encoding(tiny):
    return QwenImagePipeline.from_pretrained(tiny, dtype="float32").encode_guidance_prompts("a fox", "blurry")


def test_opening_loads_nothing(pipeline):
    assert not any(
        (pipeline.is_text_encoder_loaded, pipeline.is_tokenizer_loaded, pipeline.is_transformer_loaded,
         pipeline.is_vae_loaded)
    )  # fmt: skip


def test_the_core_calls_load_only_what_they_use(pipeline, encoding):
    pipeline.generate_pixels(PARAMETERS, encoding)
    assert pipeline.is_transformer_loaded
    assert pipeline.is_vae_loaded
    assert not pipeline.is_text_encoder_loaded
    assert not pipeline.is_tokenizer_loaded
    other = QwenImagePipeline.from_pretrained(pipeline.model, dtype="float32")
    other.encode_guidance_prompts("a fox")
    assert other.is_text_encoder_loaded
    assert not other.is_transformer_loaded
    assert not other.is_vae_loaded


def test_released_components_come_back_by_themselves(pipeline):
    first = pipeline.encode_guidance_prompts("a fox", "blurry")
    before = pipeline.generate_pixels(PARAMETERS, first)
    pipeline.release_encoders()
    pipeline.release_transformer()
    pipeline.release_vae()
    assert not pipeline.is_text_encoder_loaded
    assert not pipeline.is_tokenizer_loaded
    assert not pipeline.is_transformer_loaded
    assert not pipeline.is_vae_loaded
    again = pipeline.encode_guidance_prompts("a fox", "blurry")
    assert mx.array_equal(first.positive, again.positive)
    assert mx.array_equal(pipeline.generate_pixels(PARAMETERS, again), before)


def test_reloading_and_releasing_one_by_one(pipeline):
    pipeline.reload_tokenizer()
    assert (pipeline.is_tokenizer_loaded, pipeline.is_text_encoder_loaded) == (True, False)
    pipeline.reload_text_encoder()
    pipeline.release_tokenizer()
    assert (pipeline.is_tokenizer_loaded, pipeline.is_text_encoder_loaded) == (False, True)
    pipeline.release_text_encoder()
    pipeline.release_text_encoder()  # releasing what is not loaded is nothing
    assert not pipeline.is_text_encoder_loaded


def test_releasing_returns_the_memory(pipeline):
    def active() -> int:
        mx.clear_cache()
        return mx.get_active_memory()

    gc.collect()  # what earlier tests left in cycles is not counted
    empty = active()
    small = 100_000  # room for the results themselves
    states = pipeline.encode_guidance_prompts("a fox", "blurry")
    assert active() - empty > 300_000  # the text encoder alone
    pipeline.release_encoders()
    assert active() - empty < small
    pixels = pipeline.generate_pixels(PARAMETERS, states)
    assert active() - empty > 20 * small
    pipeline.release_transformer()
    pipeline.release_vae()
    assert active() - empty < small
    assert pixels.shape == (1, 48, 64, 3)


def test_results_are_evaluated(pipeline, encoding, tmp_path):
    """An unevaluated encoding would keep the encoder alive, and break once its files are gone."""
    shutil.copytree(pipeline.model, tmp_path / "model")
    other = QwenImagePipeline.from_pretrained(tmp_path / "model", dtype="float32")
    made = other.encode_guidance_prompts("a fox", "blurry")
    pixels = other.generate_pixels(PARAMETERS, made)
    shutil.rmtree(tmp_path / "model")
    assert mx.array_equal(made.positive, encoding.positive)
    assert mx.isfinite(pixels).all().item()


@pytest.mark.process
def test_an_encoding_travels_to_another_process(pipeline, encoding, tmp_path):
    encoding.save(tmp_path / "fox.safetensors")
    assert not list(tmp_path.glob(".*"))
    script = """
import sys, numpy as np
from qwen_image_mlx import GenerationParameters, GuidanceEncoding, QwenImagePipeline
pipeline = QwenImagePipeline.from_pretrained(sys.argv[1], dtype="float32")
encoding = GuidanceEncoding.load(sys.argv[2])
pixels = pipeline.generate_pixels(GenerationParameters(width=64, height=48, num_inference_steps=3), encoding, seed=4)
assert not pipeline.is_text_encoder_loaded and not pipeline.is_tokenizer_loaded
assert encoding.source.prompt == "a fox" and encoding.source.negative_prompt == "blurry"
np.save(sys.argv[3], np.array(pixels))
"""
    arguments = [str(pipeline.model), str(tmp_path / "fox.safetensors"), str(tmp_path / "pixels.npy")]
    subprocess.run([sys.executable, "-c", script, *arguments], check=True)
    expected = pipeline.generate_pixels(PARAMETERS, encoding, seed=4)
    np.testing.assert_array_equal(np.load(tmp_path / "pixels.npy"), np.array(expected))


def test_foreign_files_are_no_encodings(tmp_path, tiny):
    (tmp_path / "text.safetensors").write_text("hello")
    for path in (tmp_path / "text.safetensors", tmp_path / "none.safetensors",
                 tiny / "vae" / "diffusion_pytorch_model.safetensors"):  # fmt: skip
        with pytest.raises(CheckpointError, match=path.name):
            GuidanceEncoding.load(path)


@pytest.mark.reference
def test_damaged_encodings_are_said_to_be(tmp_path, tiny):
    reference = Reference(mx.zeros((1, 16, 64)), 4, 4)
    GuidanceEncoding(mx.zeros((1, 5, 64)), None, (reference,)).save(tmp_path / "whole.safetensors")
    arrays, metadata = mx.load(str(tmp_path / "whole.safetensors"), return_metadata=True)
    for change in ({"grids": "[[7, 4]]"}, {"grids": '[["a", "b"]]'}, {"grids": "[[4, 4], [4, 4]]"}, {"source": "[]"}):
        mx.save_safetensors(str(tmp_path / "odd.safetensors"), arrays, {**metadata, **change})
        with pytest.raises(CheckpointError, match="damaged"):
            GuidanceEncoding.load(tmp_path / "odd.safetensors")
    whole = {**arrays, "positive": arrays["positive"].astype(mx.int32)}
    mx.save_safetensors(str(tmp_path / "odd.safetensors"), whole, metadata)
    with pytest.raises(CheckpointError, match="damaged"):
        GuidanceEncoding.load(tmp_path / "odd.safetensors")


def test_two_writers_of_one_encoding_do_not_meet(encoding, tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    path = tmp_path / "shared.safetensors"
    encoding.save(path)
    with ThreadPoolExecutor(4) as pool:
        for saved in [pool.submit(encoding.save, path) for _ in range(40)]:
            saved.result()
            GuidanceEncoding.load(path)
    assert list(tmp_path.iterdir()) == [path]


def test_an_encoding_that_cannot_be_written_leaves_nothing(encoding, tmp_path):
    with pytest.raises(OutputError):
        encoding.save(tmp_path / "no" / "folder" / "fox.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_guidance_needs_a_negative_prompt_and_a_scale_above_one(pipeline, encoding, monkeypatch):
    """The second pass is skipped unless it changes the result."""
    calls = []
    pipeline.generate_pixels(PARAMETERS, encoding)  # loads
    block = type(pipeline.components.network("transformer").transformer_blocks[0])
    forward, blocks = block.__call__, len(pipeline.components.network("transformer").transformer_blocks)
    monkeypatch.setattr(block, "__call__", lambda self, *args: calls.append(1) or forward(self, *args))
    alone = GuidanceEncoding(encoding.positive)
    for scale, given, passes in ((1.0, encoding, 3), (4.0, alone, 3), (4.0, encoding, 6), (1.01, encoding, 6)):
        calls.clear()
        pipeline.generate_pixels(
            GenerationParameters(width=64, height=48, num_inference_steps=3, cfg_scale=scale), given
        )
        assert len(calls) == passes * blocks, scale


def test_progress_tells_stages_steps_sigmas_and_latents(pipeline):
    seen = []
    encoding = pipeline.encode_guidance_prompts("a fox", progress=seen.append)
    pipeline.generate_pixels(PARAMETERS, encoding, progress=seen.append)
    stages = [(p.stage, p.detail) for p in seen if p.stage != "layer"]
    assert list(dict.fromkeys(stages)) == [
        ("load", "tokenizer"), ("load", "text_encoder"), ("encode", "prompts"), ("load", "modulation"),
        ("load", "transformer"), ("denoise", ""), ("load", "vae_decoder"), ("decode", ""),
    ]  # fmt: skip
    steps = [p for p in seen if p.stage == "denoise"]
    assert [(p.step, p.total) for p in steps] == [(0, 3), (1, 3), (2, 3), (3, 3)]
    assert [p.sigma for p in steps] == sorted((p.sigma for p in steps), reverse=True)
    assert (steps[0].sigma, steps[-1].sigma) == (1.0, 0.0)
    assert all(p.latents.shape == (1, 12, 64) for p in steps)


@pytest.mark.parametrize("stage", ["load", "denoise", "decode"])
def test_cancelling_leaves_the_pipeline_usable(pipeline, encoding, stage):
    expected = pipeline.generate_pixels(PARAMETERS, encoding)
    pipeline.release_vae()

    def stop(progress):
        if progress.stage == stage and (stage != "denoise" or progress.step == 2):
            progress.cancel()

    with pytest.raises(Cancelled, match=stage):
        pipeline.generate_pixels(PARAMETERS, encoding, progress=stop)
    assert mx.array_equal(pipeline.generate_pixels(PARAMETERS, encoding), expected)


def test_a_failing_callback_leaves_the_pipeline_usable(pipeline, encoding):
    def fail(progress):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        pipeline.generate_pixels(PARAMETERS, encoding, progress=fail)
    assert pipeline.generate_pixels(PARAMETERS, encoding).shape == (1, 48, 64, 3)


def test_latents_replace_the_noise(pipeline, encoding):
    noise = []
    expected = pipeline.generate_pixels(
        PARAMETERS, encoding, seed=8, progress=lambda p: noise.append(p.latents) if p.stage == "denoise" else None
    )
    for latents in (noise[0], np.array(noise[0])):
        assert mx.array_equal(pipeline.generate_pixels(PARAMETERS, encoding, latents=latents), expected)
    with pytest.raises(RequestError, match=r"\(1, 12, 64\)"):
        pipeline.generate_pixels(PARAMETERS, encoding, latents=mx.zeros((1, 13, 64)))


def test_both_random_generators(pipeline, encoding):
    by_rng = {
        rng: pipeline.generate_pixels(
            GenerationParameters(width=64, height=48, num_inference_steps=3, rng=rng), encoding, seed=1
        )
        for rng in ("torch", "mlx")
    }
    assert not mx.array_equal(by_rng["torch"], by_rng["mlx"])


def test_generate_is_both_calls_in_one(pipeline, encoding):
    from qwen_image_mlx.images.pixels import to_images

    images = pipeline.generate(
        "a fox", negative_prompt="blurry", width=64, height=48, num_inference_steps=3, seed=5, num_images=2
    )
    assert not pipeline.is_text_encoder_loaded  # staged
    assert [image.size for image in images] == [(64, 48)] * 2
    for index, image in enumerate(images):
        pixels = pipeline.generate_pixels(PARAMETERS, encoding, seed=5, image_index=index)
        assert image.tobytes() == to_images(pixels)[0].tobytes()


def test_an_application_s_random_numbers_are_left_alone(tiny):
    mx.random.seed(123)
    expected = mx.random.normal((4,))
    mx.random.seed(123)
    pipeline = QwenImagePipeline.from_pretrained(tiny, dtype="float32")
    pipeline.generate("a fox", width=32, height=32, num_inference_steps=2, rng="mlx")
    assert mx.array_equal(mx.random.normal((4,)), expected)


def test_an_encoding_of_another_model_is_refused(pipeline):
    with pytest.raises(RequestError, match="encoding"):
        pipeline.generate_pixels(PARAMETERS, GuidanceEncoding(mx.zeros((1, 5, 63))))


def test_numbers_that_are_not_finite_are_an_error_not_a_black_image(pipeline, encoding):
    poisoned = GuidanceEncoding(mx.full(encoding.positive.shape, float("nan")))
    with pytest.raises(QwenImageError, match="not finite"):
        pipeline.generate_pixels(PARAMETERS, poisoned)


def test_a_broken_decoder_is_an_error_not_a_black_image(pipeline, encoding):
    decoder = pipeline.components.network("vae_decoder")
    decoder.update(tree_map(lambda array: array * mx.nan, decoder.parameters()))
    with pytest.raises(QwenImageError, match="not finite"):
        pipeline.generate_pixels(PARAMETERS, encoding)


@pytest.mark.parametrize("index", [-1, 1.5, 10**30])
def test_impossible_indices_are_refused(pipeline, encoding, index):
    with pytest.raises(RequestError, match="image_index"):
        pipeline.generate_pixels(PARAMETERS, encoding, image_index=index)


@pytest.mark.parametrize("model", [None, 5, b"model", ""])
def test_impossible_models_are_refused(model):
    with pytest.raises(RequestError, match="model"):
        QwenImagePipeline.from_pretrained(model)


@pytest.mark.parametrize("change", [
    {"width": 100}, {"width": 0}, {"height": -16}, {"width": 8}, {"width": 16384, "height": 16384}, {"width": 64.0},
    {"num_inference_steps": 0}, {"num_inference_steps": -3}, {"num_inference_steps": 5000}, {"cfg_scale": 0.5},
    {"cfg_scale": float("nan")}, {"cfg_scale": "4"}, {"rng": "numpy"}, {"sigmas": ()}, {"sigmas": (0.5, 0.7)},
    {"sigmas": (1.5, 1.0)}, {"sigmas": "abc"}, {"sigmas": 0.5}, {"sigmas": [[1]]},
    {"shift": 0}, {"shift": float("inf")},
], ids=str)  # fmt: skip
def test_impossible_parameters_are_refused(change):
    with pytest.raises(RequestError, match=next(iter(change)) if len(change) == 1 else "pixels"):
        GenerationParameters(**{"width": 64, "height": 64, **change})


def test_a_size_that_does_not_fit_is_answered_with_those_that_do():
    with pytest.raises(RequestError, match="992 and 1008"):
        GenerationParameters(width=1000, height=1024)


@pytest.mark.parametrize("seed", [-1, 2**64, 1.5, True])
def test_impossible_seeds_are_refused(pipeline, encoding, seed):
    with pytest.raises(RequestError, match="seed"):
        pipeline.generate_pixels(PARAMETERS, encoding, seed=seed)


@pytest.mark.reference
def test_an_encoding_with_images_does_not_fit_a_text_model(pipeline, encoding):
    reference = Reference(mx.zeros((1, 16, 64)), 4, 4)
    with pytest.raises(RequestError, match="generates from text"):
        pipeline.generate_pixels(PARAMETERS, replace(encoding, references=(reference,)))


@pytest.mark.parametrize(("arguments", "says"), [
    ({"mask": DISC}, "need an image"),
    ({"image": PHOTO, "mask_padding": 8}, "needs a mask"),
    ({"image": np.zeros((4, 4, 7), np.uint8)}, "cannot be read"),
    ({"width": 64}, "both width and height"),
    ({"mask_padding": 8}, "need an image"),
    ({"size": "source"}, "need an image"),
    ({"image": PHOTO, "mask": DISC, "mask_padding": -1}, "padding"),
    ({"image": PHOTO, "mask": DISC, "mask_padding": 1.5}, "padding"),
    ({"image": PHOTO, "size": 5}, "size is 5"),
    ({"image": [1]}, "of type list"),
    ({"image": 5}, "of type int"),
    ({"num_images": 1.5}, "num_images"),
    ({"num_images": 10**20}, "num_images"),
])  # fmt: skip
def test_impossible_calls_are_refused(pipeline, arguments, says):
    with pytest.raises(RequestError, match=says):
        pipeline.generate("a hat", **arguments)


def test_inpainting_a_mask_s_surroundings_keeps_the_rest(pipeline):
    (image,) = pipeline.generate(
        "a hat", image=PHOTO, mask=DISC, mask_padding=16, width=64, height=64, num_inference_steps=2
    )
    kept = np.asarray(DISC) == 0
    assert image.size == PHOTO.size
    np.testing.assert_array_equal(np.asarray(image)[kept], np.asarray(PHOTO)[kept])
    assert not np.array_equal(np.asarray(image), np.asarray(PHOTO))


def test_without_a_negative_prompt_generate_generates_unguided(pipeline, caplog):
    size = {"width": 64, "height": 64, "num_inference_steps": 2}
    (plain,), (unguided,) = (pipeline.generate("a fox", **size, **more) for more in ({}, {"cfg_scale": 1.0}))
    assert plain == unguided
    assert "guidance" not in caplog.text
    pipeline.generate("a fox", **size, cfg_scale=4.0)
    assert "guidance 4 has no effect" in caplog.text


def test_unknown_dtype_is_refused(tiny):
    with pytest.raises(RequestError, match="bfloat16, float16, float32"):
        QwenImagePipeline.from_pretrained(tiny, dtype="int8")
