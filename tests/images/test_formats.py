"""Which images are read, and the sentence for every file that is not one."""

from __future__ import annotations

import io
import os
import struct

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from qwen_image_mlx.errors import RequestError
from qwen_image_mlx.images import formats
from qwen_image_mlx.images.sources import open_image

HEIC = struct.pack(">I", 24) + b"ftypheic\0\0\0\0mif1heic" + b"\0" * 400


def refusal(source):
    with pytest.raises(RequestError) as raised:
        open_image(source)
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "AVIF", "TIFF", "BMP", "GIF", "JPEG2000", "PPM", "TGA"])
def test_formats_that_are_read(kind):
    file = io.BytesIO()
    Image.new("RGB", (16, 8), "red").save(file, kind)
    assert open_image(file.getvalue()).size == (16, 8)


def test_heic_is_read_by_pillow_heif(tmp_path):
    heif = pytest.importorskip("pillow_heif")
    path = tmp_path / "IMG_0001.jpg"  # as phones send them under other names
    heif.from_pillow(Image.new("RGB", (64, 32), (200, 30, 30))).save(tmp_path / "a.heic")
    (tmp_path / "a.heic").rename(path)
    image = open_image(path)
    assert image.size == (64, 32)
    assert np.abs(np.asarray(image, int) - (200, 30, 30)).max() < 6


@pytest.mark.parametrize("brand", [b"heic", b"heix", b"mif1"])
def test_heic_without_it_has_its_name_and_cure(tmp_path, monkeypatch, brand):
    monkeypatch.setattr(formats, "find_spec", lambda name: None)
    monkeypatch.delitem(Image.OPEN, "HEIF", raising=False)
    path = tmp_path / "IMG_0001.heic"
    path.write_bytes(HEIC.replace(b"ftypheic", b"ftyp" + brand))
    said = refusal(path)
    assert "IMG_0001.heic is a HEIC image" in said
    assert "sips -s format jpeg" in said
    assert "pip install pillow-heif" in said


@pytest.mark.parametrize(("head", "said"), [
    (b"\0\0\0\x0cJXL \r\n", "JPEG XL"), (b"\xff\x0a\0\0", "JPEG XL"), (b"%PDF-1.7\n", "a PDF"),
    (b"%!PS-Adobe", "PostScript"),
    (b"<svg xmlns=''>", "an SVG drawing"), (b"\xef\xbb\xbf\n<?xml version='1.0'?>", "SVG"),
    (b"<!doctype HTML>", "a web page"), (b"<html>", "a web page"),
    (b"version https://git-lfs.github.com", "git lfs pull"),
    (b"\0\0\0\x18ftypmp42", "a video"), (b"\0\0\0\x18ftypcrx ", "raw photo"), (b"\x1aE\xdf\xa3", "a video"),
    (b"\0\5\x16\7\0\2\0\0Mac OS X", "AppleDouble"), (b"PK\3\4", "a zip"), (b"DDS |\0\0\0", "a DDS texture"),
    (b"\1\0\0\0" + b"\0" * 36 + b" EMF", "PNG, JPEG, WebP"), (b"hello", "PNG, JPEG, WebP"), (b"", "is empty"),
])  # fmt: skip
def test_other_files_are_named(tmp_path, head, said):
    (tmp_path / "a.png").write_bytes(head + b"\0" * (40 if head else 0))
    assert said in refusal(tmp_path / "a.png")
    assert said in refusal(head + b"\0" * (40 if head else 0))


@pytest.mark.parametrize(("path", "said"), [
    ("https://example.org/a.png", "download the file first"), ("http://example.org/a", "download the file first"),
    ("file:///tmp/a.png", "without file://"), (".", "is a folder"), ("/dev/zero", "it is not a regular file"),
    ("none.png", "the image none.png does not exist"),
])  # fmt: skip
def test_paths_that_are_no_files(path, said):
    assert said in refusal(path)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    assert "it is not a regular file" in refusal(tmp_path / "a.png")


def test_a_huge_file_is_not_read(tmp_path):
    with (tmp_path / "a.png").open("wb") as file:
        file.truncate(formats.MOST_BYTES + 1)
    assert "more than the maximum of 1,074 MB" in refusal(tmp_path / "a.png")


def test_a_huge_image_is_told_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    Image.new("L", (50, 40)).save(tmp_path / "a.png")
    assert "more than 1,000 pixels" in refusal(tmp_path / "a.png")


def test_too_much_text_in_a_png(tmp_path):
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", "x" * (2 << 20), zip=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", pnginfo=info)
    assert "save it again without metadata" in refusal(tmp_path / "a.png")


@pytest.mark.parametrize(("array", "said"), [
    (np.zeros((8, 8, 3), np.float32), "x * 255, rounded, as uint8"), (np.zeros((8, 8), np.float64), "x * 255"),
    (np.zeros((8, 8, 3), np.int64), "0 to 255 as uint8"), (np.zeros((8, 8, 3), np.uint16), "0 to 255 as uint8"),
])  # fmt: skip
def test_arrays_of_other_numbers(array, said):
    assert said in refusal(array)


def test_arrays_of_levels_are_read():
    assert open_image(np.full((4, 6), 65535, np.uint16)).getpixel((0, 0)) == (255, 255, 255)
    assert open_image(np.ones((4, 6), bool)).size == (6, 4)
