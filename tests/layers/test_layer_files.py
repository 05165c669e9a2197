"""Layers on disk: what is written comes back, all of it or nothing, and never over anything."""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from test_layer_stacks import noise, plain, stacks

from qwen_image_mlx.errors import OutputError, RequestError
from qwen_image_mlx.layers import folder as own_format
from qwen_image_mlx.layers import formats as layer_files
from qwen_image_mlx.layers.formats import FORMATS, check_formats, free_folder, load_layers, save_layers, split_reference
from qwen_image_mlx.layers.stack import Layer, LayerStack, clean_name, composite, contact_sheet

STACK = LayerStack(
    (60, 40),
    (
        Layer(noise((60, 40), 1), "Himmel é"),
        Layer(noise((20, 10), 2), "狐狸 🦊", (-5, 7), True, 128 / 255),
        Layer(noise((30, 30), 3), '<hidden> & "quoted"\'', (45, 25), False),
        Layer(noise((5, 5), 4), "🦊" * 255, (100, 100), True, 51 / 255),
        Layer(noise((9, 9), 5), "", (3, 3), True, 0.0),
    ),
    {"seed": 7, "prompt": "一只狐狸 🦊"},
)
IMAGES = {"composite.png", "contact_sheet.png"}
READABLE = [name for name, row in FORMATS.items() if row.read]
small = LayerStack((8, 6), (Layer(plain("red")), Layer(plain((0, 0, 255, 128)), "blue", (2, 1))))


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("layers") / "fox"
    save_layers(STACK, folder, FORMATS)
    return folder


@pytest.fixture
def folder(tmp_path) -> Path:
    save_layers(small, tmp_path / "small")
    return tmp_path / "small"


def described(stack: LayerStack):
    layers = [(la.name, la.offset, la.visible, pytest.approx(la.opacity, abs=1e-12)) for la in stack.layers]
    return stack.size, layers, [la.image.tobytes() for la in stack.layers]


def is_same(file, image: Image.Image) -> bool:
    with Image.open(file) as found:
        return (found.format, found.mode, found.tobytes()) == ("PNG", image.mode, image.tobytes())


def refusal(path) -> str:
    """What load_layers says to a file it refuses; any other exception fails the test."""
    with pytest.raises(RequestError) as caught:
        load_layers(path)
    assert type(caught.value) is RequestError
    line = str(caught.value)
    assert "\n" not in line
    assert "object at 0x" not in line
    return line


@pytest.mark.parametrize("name", READABLE)
def test_layers_come_back_as_they_were(saved, name):
    loaded = load_layers(saved / FORMATS[name].file)
    assert described(loaded) == described(STACK)
    assert loaded.metadata == ({} if name == "psd" else STACK.metadata)
    assert composite(loaded) == composite(STACK)


@pytest.mark.parametrize("name", READABLE)
@given(stack=stacks(), names=st.lists(st.text(), min_size=5, max_size=5))
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_layers_come_back(tmp_path_factory, name, stack, names):
    layers = [
        Layer(la.image, clean_name(text), la.offset, la.visible, round(la.opacity * 255) / 255)
        for la, text in zip(stack.layers, names, strict=False)
    ]
    stack = LayerStack(stack.size, tuple(layers))
    path = tmp_path_factory.mktemp("any") / "stack"
    save_layers(stack, path, [name])
    assert described(load_layers(path / FORMATS[name].file)) == described(stack)


def test_files_are_told_apart_by_what_they_are(saved, tmp_path):
    for name in ("psd", "ora", "zip"):
        path = tmp_path / f"{name}.txt"
        path.write_bytes((saved / FORMATS[name].file).read_bytes())
        assert described(load_layers(path)) == described(STACK)


def test_a_folder_holds_what_its_formats_say(saved, tmp_path):
    layers = {f"layer_{n}.png" for n in range(5)} | {"manifest.json"}
    assert {path.name for path in saved.iterdir()} == layers | IMAGES | {row.file for row in FORMATS.values()} - {""}
    paths = save_layers(small, tmp_path / "a" / "b", ["ora", "ora"])
    assert [path.name for path in paths] == ["composite.png", "contact_sheet.png", "layers.ora"]
    assert all(path.is_file() for path in paths)
    assert is_same(saved / "composite.png", composite(STACK))
    assert is_same(saved / "contact_sheet.png", contact_sheet(STACK))
    assert os.stat(tmp_path / "a" / "b").st_mode & 0o777 == os.stat(tmp_path / "a").st_mode & 0o777


def test_the_manifest(saved):
    manifest = json.loads((saved / "manifest.json").read_text(encoding="utf-8"))
    assert {key: manifest[key] for key in manifest if key != "layers"} == {
        "manifest_version": 1, "size": [60, 40], "order": "back to front", **STACK.metadata,
    }  # fmt: skip
    assert manifest["layers"][1] == {
        "file": "layer_1.png", "name": "狐狸 🦊", "size": [20, 10], "offset": [-5, 7], "visible": True,
        "opacity": 128 / 255,
    }  # fmt: skip
    assert "狐狸" in (saved / "manifest.json").read_text(encoding="utf-8"), "names are readable, not escaped"


def test_the_same_layers_give_the_same_bytes(saved, tmp_path):
    save_layers(STACK, tmp_path / "again", ["png", "psd", "ora", "zip"])
    for path in (tmp_path / "again").iterdir():
        assert path.read_bytes() == (saved / path.name).read_bytes(), path.name


def test_a_folder_without_manifest_goes_by_numbers(tmp_path):
    for number in (10, 2, 1):
        plain((number, 0, 0, 255)).save(tmp_path / f"layer_{number}.png")
    plain("white").save(tmp_path / "layer_3b.png")
    stack = load_layers(tmp_path)
    assert [layer.image.getpixel((0, 0))[0] for layer in stack.layers] == [1, 2, 10]
    assert [layer.name for layer in stack.layers] == ["layer_1", "layer_2", "layer_10"]
    plain("white", (3, 3)).save(tmp_path / "layer_4.png")
    assert "of one size" in refusal(tmp_path)


@pytest.mark.parametrize(("image", "expected"), [
    (Image.new("L", (8, 6), 77), (77, 77, 77, 255)),
    (Image.new("LA", (8, 6), (77, 99)), (77, 77, 77, 99)),
    (Image.new("RGB", (8, 6), (1, 2, 3)), (1, 2, 3, 255)),
    (Image.new("1", (8, 6), 1), (255, 255, 255, 255)),
    (Image.new("RGB", (8, 6), (1, 2, 3)).quantize(4), (1, 2, 3, 255)),
    (Image.fromarray(np.full((6, 8), 0x7FFF, np.uint16)), (127, 127, 127, 255)),
])  # fmt: skip
def test_any_png_can_be_a_layer(folder, image, expected):
    image.save(folder / "layer_0.png")
    assert load_layers(folder).layers[0].image.getpixel((3, 3)) == expected


def test_a_folder_is_never_written_over(folder):
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(OutputError, match=f"cannot write {folder}: it exists already"):
        save_layers(STACK, folder)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    assert os.listdir(folder.parent) == ["small"]


@pytest.mark.parametrize("make", [
    Path.touch, lambda path: path.symlink_to("nowhere"), lambda path: path.symlink_to(tempfile.mkdtemp()),
])  # fmt: skip
def test_files_and_links_are_never_written_over(tmp_path, make):
    make(tmp_path / "x")
    with pytest.raises(OutputError, match="already"):
        save_layers(small, tmp_path / "x")
    assert os.listdir(tmp_path) == ["x"]


def test_an_empty_folder_is_taken(tmp_path):
    (tmp_path / "x").mkdir()
    save_layers(small, tmp_path / "x")
    assert described(load_layers(tmp_path / "x")) == described(small)


@pytest.mark.parametrize("broken", ["composite", "contact_sheet"])
def test_a_failure_leaves_nothing_behind(tmp_path, monkeypatch, broken):
    def fail(stack):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(layer_files, broken, fail)
    with pytest.raises(OutputError, match="the disk is full"):
        save_layers(small, tmp_path / "x", FORMATS)
    assert os.listdir(tmp_path) == []


def test_a_folder_taken_meanwhile_is_left_alone(tmp_path, monkeypatch):
    def late(stack):
        (tmp_path / "x").mkdir()
        (tmp_path / "x" / "theirs").touch()
        return plain("red")

    monkeypatch.setattr(layer_files, "contact_sheet", late)
    with pytest.raises(OutputError):
        save_layers(small, tmp_path / "x")
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["x", "x/theirs"]


@pytest.mark.parametrize("name", ["ab", "狐" * 80])
def test_names_of_any_length_are_folders(tmp_path, name):
    save_layers(small, tmp_path / name)
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize(("formats", "says"), [
    (["png", "gif"], "'gif' is not a format of layers; give some of png, psd, ora, zip, pptx"),
    ([], "nothing is not a format"),
    (["PSD"], "'PSD' is not a format"),
])  # fmt: skip
def test_unknown_formats_are_refused(tmp_path, formats, says):
    with pytest.raises(RequestError, match=says):
        save_layers(small, tmp_path / "x", formats)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(("name", "module", "package"), [
    ("psd", "psd_tools", "psd-tools"), ("pptx", "pptx", "python-pptx"),
])  # fmt: skip
def test_missing_libraries_are_noticed_before_anything_is_written(tmp_path, saved, monkeypatch, name, module, package):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(own_format, "write_folder", lambda *_: pytest.fail("written"))
    with pytest.raises(RequestError, match=rf"writing {name} needs {package}: pip install {package}$"):
        save_layers(small, tmp_path / "x", ["png", name])
    assert os.listdir(tmp_path) == []
    if name == "psd":
        assert "reading psd needs psd-tools" in refusal(saved / "layers.psd")


@pytest.mark.parametrize("name", ["png", "zip", "ora"])
@pytest.mark.parametrize("value", [math.inf, object(), "\ud83d", {1: {object(): 2}}])
def test_metadata_that_cannot_be_written_is_refused(tmp_path, name, value):
    with pytest.raises(RequestError, match="the metadata cannot be written as JSON"):
        save_layers(LayerStack((8, 6), small.layers, {"psnr": value}), tmp_path / "x", [name])
    assert os.listdir(tmp_path) == []


def test_metadata_never_hides_the_manifest(tmp_path):
    with pytest.raises(RequestError, match="the metadata has 'layers', which is one of the manifest's own keys"):
        save_layers(LayerStack((8, 6), small.layers, {"layers": []}), tmp_path / "x")
    assert os.listdir(tmp_path) == []


def test_formats_count_once():
    assert check_formats(["ora", "png", "ora"]) == ("ora", "png")


def test_free_folders(folder, caplog):
    assert free_folder(folder.with_name("other")) == folder.with_name("other")
    assert not caplog.records
    assert free_folder(folder) == folder.with_name("small-1")
    assert "small exists already; saved as small-1" in caplog.text
    folder.with_name("small-1").touch()
    assert free_folder(folder) == folder.with_name("small-2")
    with pytest.raises(RequestError, match="is a file"):
        free_folder(folder / "layer_0.png")


def test_references(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    monkeypatch.setenv("HOME", str(folder.parent))
    Path("small:7").mkdir()
    assert split_reference("small:2") == (Path("small"), 2)
    assert split_reference("small:7") == (Path("small:7"), None), "a path that exists wins"
    assert split_reference("small:7:0") == (Path("small:7"), 0)
    assert split_reference("~/small:0") == (folder, 0)
    assert split_reference("~nobody-has-this-name/small:0") == (Path("~nobody-has-this-name/small"), 0)
    for text in ("small", "small:", "small:-1", "small:x", "small:1.0", ":1"):
        assert split_reference(text) == (Path(text), None)


@pytest.mark.parametrize(("folder", "formats", "says"), [
    (None, ("png",), "must be a path"),
    ("a\0b", ("png",), "must be a path"),
    ("layers", None, "formats are None"),
    ("layers", (1,), "formats are"),
])  # fmt: skip
def test_what_is_no_place_and_no_format_is_refused(tmp_path, monkeypatch, folder, formats, says):
    monkeypatch.chdir(tmp_path)
    stack = LayerStack((4, 4), (Layer(Image.new("RGBA", (4, 4))),))
    with pytest.raises(RequestError, match=says):
        save_layers(stack, folder, formats)
    assert not list(tmp_path.iterdir())


def test_one_format_may_be_a_word(tmp_path):
    save_layers(LayerStack((4, 4), (Layer(Image.new("RGBA", (4, 4))),)), tmp_path / "layers", "ora")
    assert (tmp_path / "layers" / "layers.ora").is_file()


# --- folders and archives that other programs have touched ------------------------------------------------------------


def test_images_that_look_like_layers_are_named(folder, caplog):
    (folder / "manifest.json").unlink()
    Image.new("RGB", (8, 6)).save(folder / "layer_2.jpg")
    (folder / "._layer_1.png").write_bytes(b"\0\5\x16\7")
    (folder / ".DS_Store").write_bytes(b"Bud1")
    (folder / "IMG_1.heic").write_bytes(b"x")
    assert len(load_layers(folder).layers) == 2
    (said,) = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert said.endswith(": IMG_1.heic, layer_2.jpg are not named layer_N.png and are left out")


@pytest.mark.parametrize("manifest", [True, False])
def test_a_folder_that_finder_zipped_is_read(folder, tmp_path, manifest):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("small/", b"")
        for file in sorted(folder.iterdir()):
            if manifest or file.suffix == ".png":
                archive.write(file, f"small/{file.name}")
                archive.writestr(f"__MACOSX/small/._{file.name}", b"\0\5\x16\7")
        archive.writestr("small/.DS_Store", b"Bud1")
    read = load_layers(tmp_path / "a.zip")
    assert (read.layers[1].name == "blue") == manifest
    assert [layer.image.tobytes() for layer in read.layers] == [layer.image.tobytes() for layer in small.layers]
