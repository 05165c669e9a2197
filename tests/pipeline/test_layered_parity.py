"""Layered decomposition against the reference's pipeline, live: latents after every step, layers, captions."""

from __future__ import annotations

import diffusers.pipelines.qwenimage.pipeline_qwenimage_layered as module
import mlx.core as mx
import numpy as np
import pytest
from checkpoints import write_layered
from PIL import Image
from reference_edit import load_edit_reference, run_edit_reference

from qwen_image_mlx import GenerationParameters, QwenImagePipeline
from qwen_image_mlx.config import GenerationConfig
from qwen_image_mlx.images.geometry import size_of_area
from qwen_image_mlx.images.pixels import to_images
from qwen_image_mlx.pipeline import caption
from qwen_image_mlx.text.tokenizer import QwenTokenizer

pytestmark = pytest.mark.reference

PROMPT = "a fox in front of trees, 狐狸 🦊"
SMALL = {640: 96, 1024: 160}


def sample_image(width: int, height: int, seed: int = 0, holes: bool = False) -> Image.Image:
    """Smooth random colours; with holes, parts that are transparent and half transparent."""
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 256, (5, 7, 4), np.uint8)
    values[..., 3] = rng.choice([0, 128, 255], (5, 7)) if holes else 255
    return Image.fromarray(values, "RGBA").resize((width, height), Image.Resampling.BICUBIC)


def relative(ours, theirs) -> float:
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


@pytest.fixture(scope="module")
def layered(tmp_path_factory):
    return write_layered(tmp_path_factory.mktemp("layered") / "model")


@pytest.fixture
def small_areas(monkeypatch):
    """Both buckets at a fraction of their areas: nothing else depends on them, and the tests stay quick."""
    calculate = module.calculate_dimensions
    monkeypatch.setattr(
        module, "calculate_dimensions", lambda area, ratio: calculate(SMALL[round(area**0.5)] ** 2, ratio)
    )
    return SMALL


def run_ours(folder, image, side, *, negative, layers, cfg_scale, normalize, steps, seed):
    pipeline = QwenImagePipeline.from_pretrained(folder, dtype="float32")
    encoding = pipeline.encode_guidance_prompts(PROMPT, negative, images=[image], reference_pixels=side**2)
    width, height = size_of_area(side**2, image.size)
    parameters = GenerationParameters(
        width=width, height=height, num_inference_steps=steps, cfg_scale=cfg_scale, num_layers=layers,
        cfg_normalize=normalize,
    )  # fmt: skip
    latents = []
    pixels = pipeline.generate_pixels(
        parameters,
        encoding,
        seed=seed,
        progress=lambda p: latents.append(np.array(p.latents)) if p.stage == "denoise" else None,
    )
    return latents[1:], to_images(pixels)


def assert_same(ours, theirs, layers):
    (latents, images), (expected_latents, (expected,)) = ours, theirs
    assert len(latents) == len(expected_latents)
    assert max(relative(a, b) for a, b in zip(latents, expected_latents, strict=True)) < 1e-4
    assert len(images) == len(expected) == layers
    for image, other in zip(images, expected, strict=True):
        assert (image.mode, image.size) == (other.mode, other.size) == ("RGBA", image.size)
        assert np.abs(np.asarray(image).astype(int) - np.asarray(other).astype(int)).max() <= 1


@pytest.mark.parametrize("resolution", [640, 1024])
@pytest.mark.parametrize(
    ("layers", "size", "holes", "negative", "cfg_scale", "normalize"),
    [
        (2, (120, 120), False, " ", 4.0, False),
        (4, (150, 100), True, " ", 4.0, True),
        (4, (61, 140), True, None, 4.0, None),
        (2, (150, 100), False, "blurry", 1.0, None),
        (1, (100, 130), True, "", 2.5, None),
        (3, (300, 40), False, " ", 3.0, True),
    ],
)
def test_latents_and_layers(layered, small_areas, resolution, layers, size, holes, negative, cfg_scale, normalize):
    image, call = sample_image(*size, holes=holes), {"steps": 3, "cfg_scale": cfg_scale, "seed": 7}
    theirs = run_edit_reference(
        load_edit_reference(layered, "layered"), image=image, prompt=PROMPT, negative_prompt=negative, layers=layers,
        resolution=resolution, cfg_normalize=bool(normalize), **call,
    )  # fmt: skip
    ours = run_ours(
        layered, image, small_areas[resolution], negative=negative, layers=layers, normalize=normalize, **call
    )
    assert_same(ours, theirs, layers)


@pytest.mark.nightly
@pytest.mark.parametrize("resolution", [640, 1024])
def test_the_real_areas(layered, resolution):
    image, call = sample_image(320, 240, holes=True), {"steps": 1, "cfg_scale": 1.0, "seed": 7}
    theirs = run_edit_reference(
        load_edit_reference(layered, "layered"), image=image, prompt=PROMPT, layers=2, resolution=resolution, **call
    )
    ours = run_ours(layered, image, resolution, negative=None, layers=2, normalize=None, **call)
    assert_same(ours, theirs, 2)


def test_channels_come_from_the_tensors_where_the_config_is_silent(layered, tmp_path):
    import json
    import shutil

    folder = shutil.copytree(layered, tmp_path / "silent")
    config = json.loads((folder / "vae" / "config.json").read_text())
    del config["input_channels"]
    (folder / "vae" / "config.json").write_text(json.dumps(config))
    call = {"negative": None, "layers": 1, "cfg_scale": 1.0, "normalize": None, "steps": 1, "seed": 1}
    (_, (one,)), (_, (other,)) = (run_ours(path, sample_image(80, 80), 64, **call) for path in (layered, folder))
    assert one == other


@pytest.mark.parametrize("penalty", [1.0, 1.3])
@pytest.mark.parametrize(("language", "english"), [("en", True), ("zh", False)])
def test_captions_are_the_reference_s_greedy_ones(layered, language, english, penalty, monkeypatch):
    image = sample_image(200, 120, seed=3, holes=True)
    reference = load_edit_reference(layered, "layered")
    reference.text_encoder.generation_config.update(
        repetition_penalty=penalty, do_sample=False, eos_token_id=[151645, 151643], max_new_tokens=None
    )
    generate, written = reference.text_encoder.generate, []

    def shorter(**inputs):
        out = generate(**{**inputs, "max_new_tokens": 24})
        written.extend(out[0, inputs["input_ids"].shape[1] :].tolist())
        return out

    reference.text_encoder.generate = shorter
    prompt_image = image.resize(size_of_area(160**2, image.size), Image.Resampling.LANCZOS)
    expected = reference.get_image_caption(prompt_image, use_en_prompt=english, device="cpu")

    monkeypatch.setattr(caption, "MAX_TOKENS", 24)
    config = GenerationConfig(repetition_penalty=penalty)
    pipeline = QwenImagePipeline.from_pretrained(layered, dtype="float32")
    monkeypatch.setattr(type(pipeline.components), "generation_config", config)
    chosen = []
    monkeypatch.setattr(QwenTokenizer, "decode", lambda self, ids: chosen.extend(ids) or self._tokenizer.decode(ids))
    ours = pipeline.caption_image(image, language=language, resolution=160)
    assert chosen == [token for token in written if token not in config.eos_token_id]
    assert len(chosen) > 3
    assert ours == expected


def test_sampled_captions_follow_the_seed_and_leave_the_application_s_randomness_alone(layered, monkeypatch):
    monkeypatch.setattr(caption, "MAX_TOKENS", 12)
    pipeline = QwenImagePipeline.from_pretrained(layered, dtype="float32")
    config = GenerationConfig(do_sample=True, temperature=2.0, top_k=40, top_p=0.9, repetition_penalty=1.05)
    monkeypatch.setattr(type(pipeline.components), "generation_config", config)
    image = sample_image(100, 100)
    mx.random.seed(5)
    expected = mx.random.normal((3,)).tolist()
    mx.random.seed(5)
    one, again, other = (pipeline.caption_image(image, resolution=96, seed=seed) for seed in (1, 1, 2))
    assert mx.random.normal((3,)).tolist() == expected
    assert one == again != other
