"""Control images made from ordinary ones."""

from __future__ import annotations

import numpy as np
import pytest
from control_files import picture
from PIL import Image, ImageDraw

from qwen_image_mlx import RequestError
from qwen_image_mlx.images.control import KINDS, control_image


def shape(kind="circle", level=200):
    image = Image.new("RGB", (160, 120), (40, 40, 40))
    draw = ImageDraw.Draw(image)
    (draw.ellipse if kind == "circle" else draw.rectangle)((40, 20, 120, 100), fill=(level,) * 3)
    return image


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_the_size_of_the_result_and_changes_the_image(kind):
    source = picture(100, 75)
    made = control_image(source, kind, (64, 48))
    assert (made.mode, made.size) == ("RGB", (64, 48))
    same = np.array_equal(made, source.resize((64, 48), Image.Resampling.LANCZOS))
    assert same == (kind == "image")
    assert np.array_equal(made, control_image(source, kind, (64, 48)))


@pytest.mark.parametrize("kind", ["circle", "square"])
def test_canny_draws_the_outline_alone(kind):
    edges = np.asarray(control_image(shape(kind), "canny", (160, 120)))[..., 0]
    assert set(np.unique(edges)) == {0, 255}
    ys, xs = np.nonzero(edges)
    if kind == "circle":
        distance = np.abs(np.hypot(xs - 80, ys - 60) - 40)
        around = 2 * np.pi * 40
    else:
        distance = np.minimum(np.abs(np.abs(xs - 80) - 40), np.abs(np.abs(ys - 60) - 40))
        around = 4 * 80
    assert distance.max() <= 2
    assert 0.7 * around < len(xs) < 1.5 * around, "one pixel thin, and closed"


def test_canny_traces_weak_edges_from_strong_ones_alone():
    ramp = np.full((60, 200), 100, np.uint8)
    for x in range(200):  # a step whose height falls from 120 to 0
        ramp[30:, x] += np.uint8(120 * (1 - x / 200))
    traced = np.asarray(control_image(Image.fromarray(ramp).convert("RGB"), "canny", (200, 60)))[..., 0].any(axis=0)
    last = np.flatnonzero(traced).max()
    weak = shape(level=66)
    assert 100 < last < 180, "the edge is followed below the high threshold, and not to its end"
    assert not np.asarray(control_image(weak, "canny", (160, 120))).any()


def test_a_flat_image_has_no_edges_and_no_lines():
    flat = Image.new("RGB", (64, 64), (90, 120, 30))
    assert not np.asarray(control_image(flat, "canny", (64, 64))).any()
    assert not np.asarray(control_image(flat, "lineart", (64, 64))).any()


def test_lineart_draws_dark_lines_white():
    page = Image.new("RGB", (128, 128), "white")
    ImageDraw.Draw(page).line((20, 64, 108, 64), fill="black", width=3)
    lines = np.asarray(control_image(page, "lineart", (128, 128)))[..., 0]
    assert lines[64, 30:100].min() == 255
    assert lines[:40].max() == 0


def test_blur_and_tile_take_details_and_keep_the_rest():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8))
    for kind in ("blur", "tile"):
        made = np.asarray(control_image(noise, kind, (128, 128)), np.float32)
        assert made.std() < 0.45 * np.asarray(noise, np.float32).std()
        assert abs(made.mean() - np.asarray(noise, np.float32).mean()) < 2


def test_gray_has_no_colour():
    made = np.asarray(control_image(picture(64, 64), "gray", (64, 64)))
    assert np.array_equal(made[..., 0], made[..., 1])
    assert np.array_equal(made[..., 0], made[..., 2])
    assert made.std() > 5


def test_an_unknown_kind_is_refused():
    with pytest.raises(RequestError, match="must be one of image, canny"):
        control_image(picture(8, 8), "depth", (8, 8))
