"""Editing against the reference's pipelines, live: the same latents after every step from the same seed, and pixels."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from checkpoints import write_edit
from PIL import Image
from reference_edit import load_edit_reference, run_edit_reference

from qwen_image_mlx import GenerationParameters, QwenImagePipeline
from qwen_image_mlx.images.canvas import feather, plan_canvas
from qwen_image_mlx.images.pixels import to_images

pytestmark = pytest.mark.reference

PROMPT = "make the fox blue, 让它变蓝 🦊"
NEGATIVE = "blurry"


def sample_image(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth random colours, so that resampling matters and does not drown in noise."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def disc(width: int, height: int) -> Image.Image:
    y, x = np.mgrid[:height, :width]
    inside = ((x - width / 2) / width) ** 2 + ((y - height / 2) / height) ** 2 < 0.09
    return Image.fromarray((inside * 255).astype(np.uint8))


def relative(ours, theirs) -> float:
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


@pytest.fixture(scope="module", params=["released", "resaved"])
def edit(tmp_path_factory, request):
    return write_edit(tmp_path_factory.mktemp("edit") / "model", "edit", resaved=request.param == "resaved")


@pytest.fixture(scope="module")
def edit_plus(tmp_path_factory):
    return write_edit(tmp_path_factory.mktemp("edit_plus") / "model", "edit_plus")


@pytest.fixture(scope="module")
def edit_plus_resaved(tmp_path_factory):
    return write_edit(tmp_path_factory.mktemp("resaved") / "model", "edit_plus", resaved=True)


@pytest.fixture(scope="module")
def edit_2511(tmp_path_factory):
    return write_edit(tmp_path_factory.mktemp("2511") / "model", "edit_plus", transformer={"zero_cond_t": True})


@pytest.fixture
def small_areas(monkeypatch):
    """Both sides work at a fraction of the real areas: nothing else depends on them, and the tests stay quick."""
    import diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus as plus

    from qwen_image_mlx import variants

    def shrink(encoder_area, reference_area):
        monkeypatch.setattr(plus, "CONDITION_IMAGE_SIZE", encoder_area)
        monkeypatch.setattr(plus, "VAE_IMAGE_SIZE", reference_area)
        name = "QwenImageEditPlusPipeline"
        changed = replace(variants.VARIANTS[name], encoder_area=encoder_area, reference_area=reference_area)
        monkeypatch.setitem(variants.VARIANTS, name, changed)

    return shrink


def run_ours(
    folder, *, images=(), size=None, cfg_scale, steps, seed, initial=None, mask=None, strength=0.6, index=0, **kw
):
    pipeline = QwenImagePipeline.from_pretrained(folder, dtype="float32")
    encoding = pipeline.encode_guidance_prompts(PROMPT, NEGATIVE, images=images, **kw)
    width, height = size or pipeline.output_size(images)
    parameters = GenerationParameters(
        width=width, height=height, num_inference_steps=steps, cfg_scale=cfg_scale, strength=strength
    )
    start = None if initial is None else pipeline.encode_initial_image(initial, (width, height), mask)
    latents = []
    pixels = pipeline.generate_pixels(
        parameters,
        encoding,
        seed=seed,
        image_index=index,
        initial=start,
        progress=lambda p: latents.append(np.array(p.latents)) if p.stage == "denoise" else None,
    )
    return latents[1:], np.asarray(to_images(pixels)[0]).astype(int)


def assert_same(ours, theirs):
    (latents, pixels), (expected_latents, images) = ours, theirs
    assert len(latents) == len(expected_latents)
    assert max(relative(a, b) for a, b in zip(latents, expected_latents, strict=True)) < 1e-4
    expected = np.asarray(images[0]).astype(int)
    assert pixels.shape == expected.shape
    assert np.abs(pixels - expected).max() <= 1


@pytest.mark.parametrize("size", [(300, 200), (64, 181)])
@pytest.mark.parametrize("cfg_scale", [1.0, 4.0])
def test_edit(edit, monkeypatch, size, cfg_scale):
    import diffusers.pipelines.qwenimage.pipeline_qwenimage_edit as module

    from qwen_image_mlx import variants

    area = 160 * 160
    calculate = module.calculate_dimensions
    monkeypatch.setattr(module, "calculate_dimensions", lambda _area, ratio: calculate(area, ratio))
    row = variants.VARIANTS["QwenImageEditPipeline"]
    changed = replace(row, encoder_area=area, reference_area=area)
    monkeypatch.setitem(variants.VARIANTS, "QwenImageEditPipeline", changed)
    image = sample_image(*size)
    request = {"steps": 3, "cfg_scale": cfg_scale, "seed": 5}
    theirs = run_edit_reference(
        load_edit_reference(edit, "edit"), image=image, prompt=PROMPT, negative_prompt=NEGATIVE, **request
    )
    from qwen_image_mlx.images.geometry import size_of_area

    assert_same(run_ours(edit, images=[image], size=size_of_area(area, size), **request), theirs)


@pytest.mark.nightly
def test_edit_at_the_real_area(edit):
    image = sample_image(300, 280)
    request = {"steps": 1, "cfg_scale": 1.0, "seed": 5}
    pipe = load_edit_reference(edit, "edit")
    pipe.scheduler.register_to_config(shift_terminal=None)
    theirs = run_edit_reference(pipe, image=image, prompt=PROMPT, negative_prompt=NEGATIVE, **request)
    assert_same(run_ours(edit, images=[image], **request), theirs)


@pytest.mark.parametrize("name", ["edit_plus", "edit_plus_resaved", "edit_2511"])
@pytest.mark.parametrize("sizes", [[(300, 200)], [(300, 200), (64, 181)], [(90, 90), (200, 120), (75, 300)]], ids=len)
def test_edit_plus_with_images_of_different_aspects(request, small_areas, name, sizes):
    folder = request.getfixturevalue(name)
    small_areas(96 * 96, 128 * 128)
    images = [sample_image(*size, seed=n) for n, size in enumerate(sizes)]
    call = {"steps": 3, "cfg_scale": 4.0, "seed": 9}
    theirs = run_edit_reference(
        load_edit_reference(folder, "edit_plus"),
        image=images, prompt=PROMPT, negative_prompt=NEGATIVE, width=128, height=96, **call,
    )  # fmt: skip
    assert_same(run_ours(folder, images=images, size=(128, 96), **call), theirs)


def test_order_of_images_matters(edit_plus, small_areas):
    small_areas(96 * 96, 128 * 128)
    images = [sample_image(100, 100, 1), sample_image(120, 80, 2)]
    call = {"size": (64, 64), "steps": 2, "cfg_scale": 1.0, "seed": 9}
    (a, _), (b, _) = (run_ours(edit_plus, images=order, **call) for order in (images, images[::-1]))
    assert relative(a[-1], b[-1]) > 1e-2


def test_zero_cond_t_changes_the_image(edit_plus, edit_2511, small_areas):
    small_areas(96 * 96, 128 * 128)
    call = {"images": [sample_image(100, 100)], "size": (64, 64), "steps": 2, "cfg_scale": 1.0, "seed": 9}
    (a, _), (b, _) = (run_ours(folder, **call) for folder in (edit_plus, edit_2511))
    assert relative(a[-1], b[-1]) > 1e-2


def test_sequential_positions_equal_the_reference_that_lost_the_axes(edit_plus, small_areas):
    small_areas(96 * 96, 128 * 128)
    images, call = [sample_image(100, 140)], {"steps": 2, "cfg_scale": 4.0, "seed": 9}
    theirs = run_edit_reference(
        load_edit_reference(edit_plus, "edit_plus", sequential_positions=True),
        image=images, prompt=PROMPT, negative_prompt=NEGATIVE, width=64, height=64, **call,
    )  # fmt: skip
    assert_same(run_ours(edit_plus, images=images, size=(64, 64), sequential_positions=True, **call), theirs)
    latents, _ = run_ours(edit_plus, images=images, size=(64, 64), **call)
    assert relative(latents[-1], theirs[0][-1]) > 1e-3


@pytest.mark.parametrize("strength", [0.2, 0.6, 0.85, 1.0])
@pytest.mark.parametrize("cfg_scale", [1.0, 4.0])
def test_image_to_image(tiny, strength, cfg_scale):
    image, call = sample_image(150, 100), {"steps": 6, "cfg_scale": cfg_scale, "seed": 4}
    theirs = run_edit_reference(
        load_edit_reference(tiny, "img2img"),
        prompt=PROMPT, negative_prompt=NEGATIVE, image=image, width=96, height=64, strength=strength, **call,
    )  # fmt: skip
    assert_same(run_ours(tiny, size=(96, 64), initial=image, strength=strength, **call), theirs)


@pytest.mark.parametrize("strength", [0.5, 1.0])
@pytest.mark.parametrize("mode", ["L", "RGB", "1"])
def test_inpainting(tiny, strength, mode):
    image, mask, call = sample_image(150, 100), disc(150, 100), {"steps": 4, "cfg_scale": 3.0, "seed": 4}
    theirs = run_edit_reference(
        load_edit_reference(tiny, "inpaint"),
        prompt=PROMPT, negative_prompt=NEGATIVE, image=image, mask_image=mask, width=96, height=64,
        strength=strength, **call,
    )  # fmt: skip
    ours = run_ours(tiny, size=(96, 64), initial=image, mask=mask.convert(mode), strength=strength, **call)
    assert_same(ours, theirs)


@pytest.mark.parametrize("padding", [0, 9])
def test_inpainting_the_mask_s_surroundings_alone(tiny, padding):
    image, size, call = sample_image(180, 130), (96, 64), {"steps": 3, "cfg_scale": 1.0, "seed": 4}
    mask = Image.new("L", image.size)
    mask.paste(disc(60, 40), (100, 30))
    latents, images = run_edit_reference(
        load_edit_reference(tiny, "inpaint"),
        prompt=PROMPT, image=image, mask_image=mask, width=size[0], height=size[1], padding_mask_crop=padding, **call,
    )  # fmt: skip
    canvas = plan_canvas(image, mask=mask, size=size, crop_padding=padding, area=128**2)
    shown, shown_mask = canvas.initial
    ours, pixels = run_ours(tiny, size=size, initial=shown, mask=shown_mask, **call)
    assert max(relative(a, b) for a, b in zip(ours, latents, strict=True)) < 1e-4
    finished = np.asarray(canvas.finish(Image.fromarray(pixels.astype(np.uint8)))).astype(int)
    expected, deep = np.asarray(images[0]).astype(int), np.asarray(feather(mask)) == 255
    assert np.abs(finished - expected)[deep].max() <= 1
    assert np.array_equal(finished[np.asarray(mask) < 128], np.asarray(image)[np.asarray(mask) < 128])


def test_several_images_of_one_seed_share_the_sampled_image(tiny):
    image, mask, call = sample_image(150, 100), disc(150, 100), {"steps": 3, "cfg_scale": 1.0, "seed": 4}
    latents, images = run_edit_reference(
        load_edit_reference(tiny, "inpaint"),
        prompt=PROMPT, image=image, mask_image=mask, width=96, height=64, num_images_per_prompt=2, **call,
    )  # fmt: skip
    for index in range(2):
        ours = run_ours(tiny, size=(96, 64), initial=image, mask=mask, index=index, **call)
        assert_same(ours, ([step[index : index + 1] for step in latents], images[index : index + 1]))


@pytest.mark.parametrize("cfg_scale", [1.0, 4.0])
def test_edit_inpainting(edit, monkeypatch, cfg_scale):
    import diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_inpaint as module

    from qwen_image_mlx import variants
    from qwen_image_mlx.images.geometry import size_of_area

    area = 160 * 160
    calculate = module.calculate_dimensions
    monkeypatch.setattr(module, "calculate_dimensions", lambda _area, ratio: calculate(area, ratio))
    row = variants.VARIANTS["QwenImageEditPipeline"]
    changed = replace(row, encoder_area=area, reference_area=area)
    monkeypatch.setitem(variants.VARIANTS, "QwenImageEditPipeline", changed)
    image, mask, call = sample_image(150, 100), disc(150, 100), {"steps": 4, "cfg_scale": cfg_scale, "seed": 4}
    theirs = run_edit_reference(
        load_edit_reference(edit, "edit_inpaint"),
        image=image, mask_image=mask, prompt=PROMPT, negative_prompt=NEGATIVE, strength=0.7, **call,
    )  # fmt: skip
    ours = run_ours(
        edit, images=[image], initial=image, mask=mask, size=size_of_area(area, image.size), strength=0.7, **call
    )
    assert_same(ours, theirs)
