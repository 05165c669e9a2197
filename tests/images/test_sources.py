"""Images from anywhere: every mode in 8 bits, upright, and one sentence for what is no image."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from qwen_image_mlx.errors import RequestError
from qwen_image_mlx.images.sources import open_image, open_mask, open_rgba

COLOURS = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_every_kind_of_source_gives_the_same_image(tmp_path):
    image = Image.fromarray(COLOURS)
    image.save(tmp_path / "a.png")
    for source in (image, COLOURS, tmp_path / "a.png", str(tmp_path / "a.png"), encoded(image)):
        opened = open_image(source)
        assert opened.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(opened), COLOURS)


@pytest.mark.parametrize("modes", ["1", "L", "LA", "P", "P PA", "RGBA", "CMYK", "YCbCr", "HSV", "RGBX"])
def test_every_mode_of_8_bits_is_read(modes):
    image = Image.fromarray(COLOURS)
    for mode in modes.split():
        image = image.convert(mode)
    assert (open_image(image).mode, open_image(image).size) == ("RGB", (30, 20))


@pytest.mark.parametrize("opener", [open_image, open_mask])
def test_16_bits_are_scaled_and_not_clipped(opener):
    ramp = np.linspace(0, 65535, 600, dtype=np.uint16).reshape(20, 30)
    opened = np.asarray(opener(encoded(Image.fromarray(ramp))).convert("L"))
    np.testing.assert_array_equal(opened, ramp >> 8)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_are_turned_upright(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    photograph = encoded(Image.fromarray(COLOURS), "PNG", exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(photograph)))
    np.testing.assert_array_equal(np.asarray(open_image(photograph)), np.asarray(expected))
    assert (np.asarray(expected).shape == COLOURS.shape) == (orientation < 5)
    if orientation > 1:
        assert not np.array_equal(np.asarray(expected), COLOURS)


def test_transparency_is_laid_on_white_and_said(caplog):
    clear = Image.new("RGBA", (2, 2), (100, 0, 0, 0))
    assert open_image(clear).getpixel((0, 0)) == (255, 255, 255)
    assert "laid on white" in caplog.text
    assert open_rgba(clear).getpixel((0, 0)) == (100, 0, 0, 0)
    caplog.clear()
    assert open_rgba(Image.fromarray(COLOURS)).getextrema()[3] == (255, 255)
    open_image(Image.fromarray(COLOURS).convert("RGBA"))
    assert not caplog.records


@pytest.mark.parametrize(("source", "says"), [
    (b"nonsense", "not an image"),
    (encoded(Image.fromarray(COLOURS))[:200], "cannot be read"),
    (np.zeros((4, 4, 7), np.uint8), "cannot be read"),
    (np.zeros((4, 4, 3)), "as uint8"),
    (np.zeros((4, 4), np.float32), "as uint8"),
    (np.zeros((4, 4), np.int32), "as uint8"),
    (Image.new("F", (4, 4)), "32 bits"),
    ("none.png", "the image none.png does not exist"),
    (Path(__file__).parent, "is a folder"),
    (encoded(Image.new("1", (10_000, 10_000))), "too large"),  # beyond Pillow's first limit
    (encoded(Image.new("1", (20_000, 20_000))), "too large"),  # beyond its second
])  # fmt: skip
def test_what_is_no_image_is_said(source, says):
    with pytest.raises(RequestError, match=says):
        open_image(source)


@pytest.mark.parametrize("error", [RuntimeError, OverflowError, EOFError, IndexError, MemoryError])
def test_whatever_a_decoder_raises_is_one_sentence(tmp_path, monkeypatch, error):
    def fails(*_, **__):
        raise error("not implemented")

    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image.Image, "load", fails)
    with pytest.raises(RequestError, match=r"a.png cannot be read as an image: not implemented"):
        open_image(tmp_path / "a.png")


def test_a_image_that_breaks_off_when_it_is_loaded(tmp_path):
    (tmp_path / "cut.png").write_bytes(encoded(Image.fromarray(COLOURS))[:200])
    with pytest.raises(RequestError, match="cannot be read"):
        open_image(Image.open(tmp_path / "cut.png"))
