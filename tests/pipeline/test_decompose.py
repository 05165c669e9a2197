"""Decomposing images: the layers' size, the way back, captions in place of prompts, memory by the layer."""

from __future__ import annotations

import inspect
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import write_edit, write_layered
from PIL import Image

from qwen_image_mlx import (
    GenerationParameters,
    QwenImagePipeline,
    RequestError,
    compose,
    pack_multi_layer_latents,
    unpack_multi_layer_latents,
    variants,
)
from qwen_image_mlx.images.geometry import size_of_area
from qwen_image_mlx.pipeline import caption, decomposition
from qwen_image_mlx.pipeline.conductor import decompose
from qwen_image_mlx.runtime.cache import EncodingCache
from qwen_image_mlx.settings import SCHEMA

QUICK = {"num_inference_steps": 2, "seed": 3, "resolution": 96}


@pytest.fixture(scope="module")
def layered(tmp_path_factory):
    return write_layered(tmp_path_factory.mktemp("layered") / "model")


@pytest.fixture(autouse=True)
def small_areas(monkeypatch):
    """The real buckets are of 640 and 1024 pixels squared; nothing but time depends on them."""
    name = "QwenImageLayeredPipeline"
    monkeypatch.setitem(variants.VARIANTS, name, replace(variants.VARIANTS[name], resolutions=(96, 160)))
    monkeypatch.setattr(caption, "MAX_TOKENS", 5)


@pytest.fixture
def pipeline(layered):
    return QwenImagePipeline.from_pretrained(layered, dtype="float32")


def image(width: int = 150, height: int = 100) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (5, 7, 4), np.uint8)
    values[..., 3] = 255
    values[1:3, 2:4, 3] = 0
    return Image.fromarray(values).resize((width, height), Image.Resampling.BICUBIC)


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


@pytest.mark.reference
@pytest.mark.parametrize(("resolution", "num_layers", "cfg_normalize"), [(96, 2, True), (160, 4, False)])
def test_layers_are_the_reference_s(layered, pipeline, monkeypatch, resolution, num_layers, cfg_normalize):
    import diffusers.pipelines.qwenimage.pipeline_qwenimage_layered as module
    from reference_edit import load_edit_reference, run_edit_reference

    calculate = module.calculate_dimensions
    monkeypatch.setattr(module, "calculate_dimensions", lambda area, ratio: calculate(resolution**2, ratio))
    _, (expected,) = run_edit_reference(
        load_edit_reference(layered, "layered"), image=image(), prompt="a fox", negative_prompt=" ", steps=3,
        layers=num_layers, resolution=640, cfg_normalize=cfg_normalize, cfg_scale=4.0, seed=3,
    )  # fmt: skip
    result = pipeline.decompose(
        image(), "a fox", num_layers=num_layers, resolution=resolution, size="bucket", num_inference_steps=3,
        cfg_scale=4.0, cfg_normalize=cfg_normalize, seed=3,
    )  # fmt: skip
    assert len(result.layers) == num_layers
    for ours, theirs in zip(result.layers, expected, strict=True):
        assert (ours.size, ours.mode) == (theirs.size, "RGBA")
        assert np.abs(pixels(ours) - pixels(theirs)).max() <= 1


@pytest.mark.slow
def test_layers_come_back_at_the_image_s_size(pipeline):
    result = pipeline.decompose(image(151, 99), "a fox", **QUICK)
    bucket = pipeline.decompose(image(151, 99), "a fox", size="bucket", **QUICK)
    assert {layer.size for layer in result.layers} == {result.source.size} == {(151, 99)}
    assert {layer.size for layer in bucket.layers} == {bucket.source.size} == {size_of_area(96**2, (151, 99))}
    assert bucket.layers[0].resize((151, 99), Image.Resampling.LANCZOS) == result.layers[0]


@pytest.mark.slow
def test_saved_layers_laid_together_are_the_layers_laid_over_each_other(pipeline, tmp_path):
    result = pipeline.decompose(image(), "a fox", num_layers=3, **QUICK)
    expected = result.layers[0]
    for layer in result.layers[1:]:
        expected = Image.alpha_composite(expected, layer)
    result.save(tmp_path / "layers")
    for composed in (compose(tmp_path / "layers"), compose(result.stack), result.composite()):
        seen = pixels(composed)[..., 3] > 0
        assert np.abs(pixels(composed) - pixels(expected))[seen].max() <= 1
    assert result.psnr < 60


@pytest.mark.slow
def test_what_made_the_layers_is_recorded(pipeline):
    result = pipeline.decompose(image(), "a fox", negative_prompt="blurry", cfg_scale=2.0, **QUICK)
    recorded = result.stack.metadata
    assert (recorded["prompt"], recorded["negative_prompt"], recorded["seed"]) == ("a fox", "blurry", 3)
    assert (recorded["steps"], recorded["cfg_scale"], recorded["resolution"]) == (2, 2.0, 96)
    assert (recorded["num_layers"], recorded["caption_language"]) == (4, None)


@pytest.mark.slow
def test_an_empty_prompt_is_answered_with_a_caption(pipeline):
    written = {language: pipeline.caption_image(image(), language=language, resolution=96) for language in ("en", "zh")}
    assert written["en"] != written["zh"]
    for language, text in written.items():
        result = pipeline.decompose(image(), caption_language=language, **QUICK)
        told = pipeline.decompose(image(), text, **QUICK)
        assert result.prompt == text
        assert result.layers == told.layers
        assert result.stack.metadata["caption_language"] == language


@pytest.mark.slow
def test_captions_of_a_checkpoint_that_transformers_5_saved_again(layered, tmp_path):
    """The same limits, other than the usual ones, under both spellings."""
    limits = {"min_pixels": 56 * 56, "max_pixels": 84 * 84, "image_mean": [0.1, 0.2, 0.3]}
    folders = [write_layered(tmp_path / str(resaved), processor=limits, resaved=resaved) for resaved in (False, True)]
    models = [QwenImagePipeline.from_pretrained(folder, dtype="float32") for folder in (*folders, layered)]
    assert not (folders[1] / "processor" / "preprocessor_config.json").exists()
    configs = [model.components.image_processor for model in models]
    assert configs[0] == configs[1] != configs[2]
    released, resaved = (model.caption_image(image(), resolution=96) for model in models[:2])
    assert released == resaved


def test_the_usual_values_are_those_that_all_front_ends_leave_to_the_request():
    shown = inspect.signature(QwenImagePipeline.decompose).parameters
    usual = inspect.signature(decomposition.layers_request).parameters
    shared = [name for name in usual.keys() & shown.keys() if usual[name].default is not inspect.Parameter.empty]
    assert len(shared) >= 7
    assert {name: shown[name].default for name in shared} == {name: usual[name].default for name in shared}
    (row,) = [row for row in SCHEMA if row.key == "num_layers"]
    assert row.usual == str(usual["num_layers"].default)


@pytest.mark.slow
def test_a_cached_caption_loads_no_language_model(layered, tmp_path):
    stages = []

    def run(**change):
        stages.clear()
        pipeline = QwenImagePipeline.from_pretrained(
            layered, dtype="float32", progress=lambda p: stages.append((p.stage, p.detail))
        )
        settings = {
            "negative_prompt": " ", "num_layers": 2, "size": "bucket", "cfg_scale": 1.0, "cfg_normalize": False,
            "caption_language": "en", "rng": "torch", **QUICK, **change,
        }  # fmt: skip
        settings["sampling"] = {name: settings.pop(name) for name in ("num_inference_steps", "cfg_scale")}
        request = decomposition.layers_request(image(), "", resolutions=(96, 160), **settings)
        return decompose(pipeline, request, cache=EncodingCache(tmp_path))

    first = run()
    assert ("load", "language_head") in stages
    again = run()
    assert (first.prompt, first.layers) == (again.prompt, again.layers)
    assert not {name for stage, name in stages if stage == "load"} & {"text_encoder", "language_head", "vision"}
    run(seed=4, num_layers=1)
    assert ("load", "language_head") not in stages
    run(caption_language="zh")
    assert ("load", "language_head") in stages


@pytest.mark.slow
def test_decoding_takes_no_more_memory_for_more_layers(pipeline):
    encoding = pipeline.encode_guidance_prompts("a fox", None, images=[image()], reference_pixels=96**2)
    pipeline.release_encoders()
    width, height = size_of_area(96**2, image().size)
    peaks = {}
    for layers in (1, 1, 4, 8):  # the first loads the decoder
        parameters = GenerationParameters(width=width, height=height, num_layers=layers, num_inference_steps=1)
        latents = pipeline.denoise_latents(parameters, encoding)
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        for _ in pipeline.decode_frames(parameters, latents):
            pass
        peaks[layers] = mx.get_peak_memory() - before
    assert peaks[1] > 1_000_000
    assert max(peaks.values()) < 1.1 * peaks[1]


def test_packing_is_undone():
    latents = mx.random.normal((2, 3, 4, 6, 16), key=mx.random.key(0))
    tokens = pack_multi_layer_latents(latents)
    assert tokens.shape == (2, 3 * 2 * 3, 64)
    assert mx.array_equal(unpack_multi_layer_latents(tokens, 3, 4, 6), latents)


@pytest.mark.slow
@pytest.mark.parametrize(("arguments", "says"), [
    ({"num_layers": 0}, "num_layers"),
    ({"num_layers": 9}, "from 1 to 8"),
    ({"resolution": 512}, "resolution is 512"),
    ({"size": "1mp"}, "source or bucket"),
    ({"caption_language": "de"}, "en or zh"),
    ({"image": Image.new("RGBA", (64, 64))}, "transparent everywhere"),
    ({"image": Image.new("RGB", (6400, 10))}, "6400x10"),
    ({"image": "none.png"}, "the image none.png does not exist"),
    ({"cfg_scale": 0.5}, "cfg_scale"),
    ({"seed": -1}, "seed"),
])  # fmt: skip
def test_impossible_requests_are_refused_before_any_work(pipeline, arguments, says):
    with pytest.raises(RequestError, match=says):
        pipeline.decompose(**{"image": image(), "prompt": "a fox", **QUICK, **arguments})
    assert not pipeline.is_text_encoder_loaded
    assert not pipeline.is_vae_loaded


@pytest.mark.slow
def test_models_do_what_they_are_made_for(pipeline, tiny, tmp_path):
    painter = QwenImagePipeline.from_pretrained(tiny, dtype="float32")
    with pytest.raises(RequestError, match="use generate"):
        painter.decompose(image(), "a fox")
    editor = QwenImagePipeline.from_pretrained(write_edit(tmp_path / "edit", "edit_plus"), dtype="float32")
    with pytest.raises(RequestError, match="use edit"):
        editor.generate("a fox")
    with pytest.raises(RequestError, match="use decompose"):
        pipeline.edit("make it blue", images=[image()])
