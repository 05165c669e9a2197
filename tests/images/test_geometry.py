"""Sizes and resampling against the reference's own functions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from qwen_image_mlx.errors import RequestError
from qwen_image_mlx.images.canvas import crop_region, feather, fill, plan_canvas
from qwen_image_mlx.images.geometry import size_of_area, vision_size
from qwen_image_mlx.images.pixels import on_white, to_mask, to_patches, to_pixels

SIDES = st.integers(1, 3000)
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def picture(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


@pytest.mark.reference
@settings(deadline=None)  # the first of them imports the reference
@given(width=SIDES, height=SIDES, area=st.sampled_from([384**2, 640**2, 1024**2]))
def test_areas_are_the_reference_s(width, height, area):
    from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus import calculate_dimensions

    if max(width, height) > 200 * min(width, height):
        with pytest.raises(RequestError, match="too long"):
            size_of_area(area, (width, height))
        return
    expected = calculate_dimensions(area, width / height)
    assert size_of_area(area, (width, height)) == tuple(max(32, side) for side in expected)


@pytest.mark.parametrize(("size", "area", "golden"), [
    ((1, 1), 1024**2, (1024, 1024)), ((16, 9), 1024**2, (1376, 768)), ((4, 3), 1024**2, (1184, 896)),
    ((2, 3), 384**2, (320, 480)), ((16, 9), 640**2, (864, 480)),
])  # fmt: skip
def test_area_goldens(size, area, golden):
    assert size_of_area(area, size) == golden


@pytest.mark.reference
@given(width=SIDES, height=SIDES, limit=st.sampled_from([1003520, 12845056]))
def test_vision_sizes_are_the_reference_s(width, height, limit):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    if max(width, height) > 200 * min(width, height):
        return
    h, w = smart_resize(height, width, factor=28, min_pixels=3136, max_pixels=limit)
    assert vision_size((width, height), 28, 3136, limit) == (w, h)


@pytest.mark.reference
@pytest.mark.parametrize("size", [(56, 56), (100, 300), (513, 77)])
def test_patches_are_the_processor_s(size):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    image = picture(*size)
    prepared = Qwen2VLImageProcessorPil(size={"shortest_edge": 3136, "longest_edge": 12845056})(
        images=[image], return_tensors="np"
    )
    fitted = vision_size(size, 28, 3136, 12845056)
    ours = np.array(to_patches(image, fitted, patch=14, merge=2, mean=MEAN, std=STD))
    theirs = prepared["pixel_values"].reshape(len(ours), 3, 2, 14, 14)
    assert prepared["image_grid_thw"].tolist() == [[1, fitted[1] // 14, fitted[0] // 14]]
    for tap in range(2):
        np.testing.assert_allclose(ours, theirs[:, :, tap].reshape(len(ours), -1), atol=1e-5)


@pytest.mark.reference
def test_pixels_and_masks_are_the_vae_processor_s():
    from diffusers.image_processor import VaeImageProcessor

    image, mask = picture(150, 90), picture(150, 90, 1).convert("L")
    pixels = VaeImageProcessor(vae_scale_factor=16).preprocess(image, height=64, width=96).numpy()
    np.testing.assert_allclose(np.array(to_pixels(image, (96, 64))), pixels.transpose(0, 2, 3, 1), atol=1e-6)
    masks = VaeImageProcessor(
        vae_scale_factor=16, do_normalize=False, do_binarize=True, do_convert_grayscale=True
    ).preprocess(mask, height=64, width=96)
    np.testing.assert_array_equal(to_mask(mask, (96, 64)), masks[0, 0].numpy())


@pytest.mark.reference
@given(
    box=st.tuples(st.integers(0, 140), st.integers(0, 80), st.integers(1, 60), st.integers(1, 40)),
    size=st.sampled_from([(64, 64), (128, 64), (64, 160)]),
    padding=st.integers(0, 40),
)
def test_crops_are_the_reference_s(box, size, padding):
    from diffusers.image_processor import VaeImageProcessor

    mask = np.zeros((90, 150), np.uint8)
    mask[box[1] : box[1] + box[3], box[0] : box[0] + box[2]] = 255
    image = Image.fromarray(mask)
    expected = VaeImageProcessor().get_crop_region(image, *size, pad=padding)
    assert crop_region(image, size, padding) == expected


@pytest.mark.reference
@pytest.mark.parametrize("size", [(64, 64), (128, 48), (48, 128), (150, 90)])
def test_filling_is_the_reference_s(size):
    from diffusers.image_processor import VaeImageProcessor

    image = picture(150, 90)
    expected = VaeImageProcessor()._resize_and_fill(image, *size)
    np.testing.assert_array_equal(np.asarray(fill(image, size)), np.asarray(expected))


@pytest.mark.parametrize("seed", range(5))
def test_a_feathered_mask_never_leaves_the_mask(seed):
    mask = Image.fromarray((np.random.default_rng(seed).random((8, 10)) > 0.5).astype(np.uint8) * 255)
    mask = mask.resize((1000, 800), Image.Resampling.NEAREST)
    opacity, inside = np.asarray(feather(mask)), np.asarray(mask) >= 128
    assert (opacity[~inside] == 0).all()
    assert (opacity[inside] > 0).all()
    assert np.unique(opacity).tolist() == [0, 85, 170, 255]


def test_a_seam_rises_inside_and_not_at_the_image_s_border():
    mask = np.zeros((1024, 1024), np.uint8)
    mask[:, 500:] = 255
    opacity = np.asarray(feather(Image.fromarray(mask)))
    assert opacity[300, 499:505].tolist() == [0, 64, 128, 191, 255, 255]
    assert (opacity[:, -1] == 255).all()


@pytest.mark.parametrize(("size", "mask", "composite", "padding", "generated", "result"), [
    (None, False, True, None, (160, 96), (160, 96)),
    ("source", False, True, None, (160, 96), (150, 90)),
    ((64, 64), False, True, None, (64, 64), (64, 64)),
    (None, True, True, None, (160, 96), (150, 90)),
    (None, True, False, None, (160, 96), (160, 96)),
    ("source", True, False, None, (160, 96), (150, 90)),
    (None, True, True, 4, (160, 96), (150, 90)),
    (None, True, False, 4, (160, 96), (150, 90)),
    ("1mp", True, True, 4, (160, 96), (150, 90)),
    ((64, 64), True, False, 4, (64, 64), (150, 90)),
])  # fmt: skip
def test_sizes_of_a_canvas(size, mask, composite, padding, generated, result):
    grey = np.zeros((90, 150), np.uint8)
    grey[20:50, 30:90] = 255
    source = picture(150, 90)
    canvas = plan_canvas(
        source, mask=Image.fromarray(grey) if mask else None, size=size, composite=composite, crop_padding=padding,
        area=128 * 128,
    )  # fmt: skip
    assert (canvas.size, canvas.result_size) == (generated, result)
    finished = canvas.finish(Image.new("RGB", generated, "red"))
    assert finished.size == result
    if padding is not None:  # what was generated lands on the mask, and nowhere near the corners
        assert finished.getpixel((60, 35)) == (255, 0, 0)
        assert finished.getpixel((149, 89)) == source.getpixel((149, 89))


@pytest.mark.parametrize("padding", [None, 4])
def test_transparent_pixels_outside_the_mask_come_back(padding):
    straight = Image.new("RGBA", (150, 90), (200, 0, 0, 128))
    grey = np.zeros((90, 150), np.uint8)
    grey[20:50, 30:90] = 255
    canvas = plan_canvas(
        on_white(straight), mask=Image.fromarray(grey), crop_padding=padding, straight=straight, area=128 * 128
    )
    finished = np.asarray(canvas.finish(Image.new("RGB", canvas.size, "blue")))
    assert (finished[grey == 0] == (200, 0, 0, 128)).all()
    assert (finished[30:40, 50:70] == (0, 0, 255, 128)).all()


def test_a_size_of_another_name_is_refused():
    with pytest.raises(RequestError, match="'1mp' or 'source'"):
        plan_canvas(picture(64, 64), size="2mp", area=128 * 128)
