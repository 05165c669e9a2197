"""Outpainting: an image grows, and its own pixels come back bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
from control_files import INSTANTX, picture, write_control

from qwen_image_mlx import Control, QwenImagePipeline, RequestError
from qwen_image_mlx.images.canvas import extend, parse_sides
from qwen_image_mlx.pipeline.image_request import canvas_of
from qwen_image_mlx.variants import VARIANTS
from qwen_image_mlx.weights.synthetic import TINY, write_checkpoint

SIDES = 16, 0, 32, 8
FAST = {"num_inference_steps": 1, "cfg_scale": 1, "progress": False}


@pytest.fixture(scope="module")
def generating(tmp_path_factory):
    folder = write_checkpoint(tmp_path_factory.mktemp("outpaint") / "tiny", TINY)
    return QwenImagePipeline.from_pretrained(folder, dtype="float32")


@pytest.fixture
def small(monkeypatch, generating):
    """A model whose own size is small."""
    from dataclasses import replace

    monkeypatch.setattr(generating.components, "variant", replace(generating.variant, target_area=64 * 64))
    return generating


def test_the_room_around_has_the_edge_s_colours_and_is_white_in_the_mask():
    image = picture(40, 30)
    wide, mask = extend(image, SIDES)
    pixels, inside = np.asarray(wide), np.asarray(mask) == 0
    assert wide.size == mask.size == (88, 38)
    assert np.array_equal(pixels[:30, 16:56], np.asarray(image))
    assert np.array_equal(pixels[:30, :16], np.repeat(np.asarray(image)[:, :1], 16, axis=1))
    assert inside[:30, 16:56].all()
    assert inside.sum() == 40 * 30


def test_its_own_pixels_come_back_bit_for_bit_and_the_seam_is_soft(small):
    image = picture(80, 60)
    (made,) = small.generate("a fox", image=image, outpaint=SIDES, **FAST)
    wide, _ = extend(image, SIDES)
    pixels, filled = np.asarray(made).astype(int), np.asarray(wide).astype(int)
    assert made.size == (128, 68)
    assert np.array_equal(pixels[:60, 16:96], np.asarray(image))
    assert np.abs(pixels[:, :16] - filled[:, :16]).mean() > 5, "the rest is generated"
    first, far = (np.abs(pixels[:60, x] - filled[:60, x]).mean() for x in (96, 110))
    assert first < far, "next to the image it is blended"


def test_all_that_is_added_is_generated_unless_a_strength_is_given(small):
    import json

    records = [
        json.loads(
            small.generate("a fox", image=picture(80, 60), outpaint=SIDES, **FAST, **said)[0].info["qwen_image_mlx"]
        )
        for said in ({}, {"strength": 0.5})
    ]
    assert [record["strength"] for record in records] == [1.0, 0.5]


def test_a_controlnet_that_inpaints_is_shown_the_same(small, tmp_path):
    file = write_control(tmp_path / "inpaint.safetensors", small.model, INSTANTX, layers=1, extra=1)
    image = picture(80, 60)
    wide, mask = extend(image, SIDES)
    asked = {"image": image, "outpaint": SIDES, **FAST}
    plain, shown, said = (
        np.asarray(small.generate("a fox", controls=controls, **asked)[0])
        for controls in ([], [Control(file)], [Control(file, wide, mask=mask)])
    )
    assert np.array_equal(shown, said)
    assert not np.array_equal(shown, plain)
    assert np.array_equal(shown[:60, 16:96], np.asarray(image))
    with pytest.raises(RequestError, match="a control lacks its image"):
        small.generate("a fox", controls=[Control(file)], **FAST)


def test_edits_outpaint_too(tmp_path):
    folder = write_checkpoint(tmp_path / "edit", TINY, pipeline="QwenImageEditPlusPipeline")
    editing = QwenImagePipeline.from_pretrained(folder, dtype="float32")
    image = picture(80, 60)
    (made,) = editing.edit(
        "more sky", images=[image], outpaint=(0, 36, 0, 0), size=(80, 96), reference_pixels=1024, **FAST
    )
    assert made.size == (80, 96)
    assert np.array_equal(np.asarray(made)[36:], np.asarray(image))


@pytest.mark.parametrize("said", ["1,2,3", "a,b,c,d", "", "-1,0,0,0", "1,1,1,99999", (1, 2), None])
def test_sides_are_four_numbers(said):
    with pytest.raises(RequestError, match="must be LEFT,TOP,RIGHT,BOTTOM"):
        parse_sides([None] if said is None else said)


@pytest.mark.parametrize("size", ["1mp", (80, 60), [64, 64]])
def test_an_outpainted_image_has_one_size(size):
    with pytest.raises(RequestError, match=r"outpainted by \(0, 36, 0, 0\) the image has 80x96 pixels: give no size"):
        canvas_of(VARIANTS["QwenImageEditPlusPipeline"], [picture(80, 60)], outpaint=(0, 36, 0, 0), size=size)


@pytest.mark.parametrize("composite", [True, False])
def test_an_outpainted_image_keeps_its_size(composite):
    canvas = canvas_of(VARIANTS["QwenImagePipeline"], [picture(80, 60)], outpaint="0,36,0,0", composite=composite)
    assert canvas.result_size == (80, 96)


@pytest.mark.parametrize("said", [True, 0, (16.5, 0, 0, 0), (1, 2, 3, None)])
def test_sides_are_whole_numbers(said):
    with pytest.raises(RequestError, match="each from 0 to"):
        parse_sides(said)


def test_what_cannot_be_outpainted():
    with pytest.raises(RequestError, match="adds nothing"):
        extend(picture(8, 8), (0, 0, 0, 0))
    with pytest.raises(RequestError, match="16008x16008 pixels"):
        extend(picture(8, 8), (16000, 16000, 0, 0))
