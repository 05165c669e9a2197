"""Layer files in other programs' eyes: what they make of ours, what we make of theirs."""

from __future__ import annotations

import io
import json
import struct
import zipfile
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pptx
import psd_tools
import pytest
from PIL import Image
from psd_tools.constants import BlendMode, Compression, Tag
from psd_tools.psd.layer_and_mask import ChannelData, ChannelInfo
from test_layer_files import STACK, described, is_same, refusal
from test_layer_stacks import pixels, plain

from qwen_image_mlx.layers.formats import FORMATS, load_layers, save_layers
from qwen_image_mlx.layers.stack import Layer, LayerStack, composite


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("layers") / "fox"
    save_layers(STACK, folder, FORMATS)
    return folder


def unpacked(data: bytes) -> bytes:
    """PackBits: n < 128 is followed by n + 1 bytes as they are, n > 128 by one that stands for 257 - n."""
    result, place = bytearray(), 0
    while place < len(data):
        head = data[place]
        if head < 128:
            result += data[place + 1 : place + 2 + head]
            place += 2 + head
        else:
            result += data[place + 1 : place + 2] * (257 - head if head > 128 else 0)
            place += 2
    return bytes(result)


def psd_layers(data: bytes):
    """(size, signed layer count, layers), read from a PSD's bytes by Adobe's specification without any library."""
    file = io.BytesIO(data)

    def take(form: str):
        return struct.unpack(f">{form}", file.read(struct.calcsize(f">{form}")))

    assert take("4sH6x") == (b"8BPS", 1)
    channels, height, width, depth, mode = take("HIIHH")
    assert (channels, depth, mode) == (4, 8, 3)
    for _ in range(2):  # colour mode data, image resources
        file.seek(take("I")[0], 1)
    _, _, count = take("IIh")
    records = []
    for _ in range(abs(count)):
        top, left, bottom, right, channels = take("iiiiH")
        ids = [take("hI")[0] for _ in range(channels)]
        signature, blending, opacity, _, flags, extra = take("4s4sBBBxI")
        assert (signature, blending, sorted(ids)) == (b"8BIM", b"norm", [-1, 0, 1, 2])
        end = file.tell() + extra
        for _ in range(2):  # mask, blending ranges
            file.seek(take("I")[0], 1)
        file.seek((take("B")[0] + 4) // 4 * 4 - 1, 1)  # the name in Mac Roman
        while file.tell() < end:
            key, size = take("4x4sI")
            block = file.read((size + 3) // 4 * 4)
            if key == b"luni":
                name = block[4 : 4 + 2 * struct.unpack(">I", block[:4])[0]].decode("utf-16-be").rstrip("\0")
        records.append((name, (left, top), (right - left, bottom - top), not flags & 2, opacity, ids))
    layers = []
    for *record, ids in records:
        width_, height_ = record[2]
        bands = {}
        for band in ids:
            assert take("H") == (1,), "run-length coded"
            rows = [file.read(length) for length in take(f"{height_}H")]
            bands[band] = Image.frombytes("L", (width_, height_), b"".join(map(unpacked, rows)))
        layers.append((*record, Image.merge("RGBA", [bands[band] for band in (0, 1, 2, -1)]).tobytes()))
    return (width, height), count, layers


def test_a_psd_says_by_the_specification_what_its_layers_are(saved):
    size, count, layers = psd_layers((saved / "layers.psd").read_bytes())
    assert size == STACK.size
    assert count == -5, "the merged image's fourth channel is its transparency"
    assert layers == [
        (la.name, la.offset, la.image.size, la.visible, round(la.opacity * 255), la.image.tobytes())
        for la in STACK.layers
    ]


def test_pillow_reads_the_psd(saved):
    """Its merged image and the layers' places; of names it knows Mac Roman only, and it mixes up the channels."""
    with Image.open(saved / "layers.psd") as image:
        assert (image.mode, image.size) == ("RGBA", STACK.size)
        assert [(mode, box) for _, mode, box, _ in image.layers] == [
            ("RGBA", (x, y, x + layer.image.width, y + layer.image.height))
            for layer in STACK.layers
            for x, y in [layer.offset]
        ]
        merged, expected = pixels(image), pixels(composite(STACK))
    np.testing.assert_array_equal(merged[..., 3], expected[..., 3])
    opaque = expected[..., 3] == 255
    assert opaque.any()
    np.testing.assert_array_equal(merged[opaque], expected[opaque])


def test_the_merged_image_of_a_psd_is_laid_on_white(tmp_path):
    save_layers(LayerStack((8, 6), (Layer(plain((200, 100, 0, 51))),)), tmp_path / "x", ["psd"])
    with Image.open(tmp_path / "x" / "layers.psd") as image:
        assert image.getpixel((0, 0)) == (244, 224, 204, 51)
    assert psd_tools.PSDImage.open(tmp_path / "x" / "layers.psd").topil().getpixel((0, 0)) == pytest.approx(
        (200, 100, 0, 51), abs=3
    )


def test_the_ora_is_as_its_specification_says(saved):
    path = saved / "layers.ora"
    assert path.read_bytes()[30:54] == b"mimetypeimage/openraster"
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        first = archive.infolist()[0]
        assert (first.filename, first.compress_type, first.extra) == ("mimetype", zipfile.ZIP_STORED, b"")
        root = ElementTree.fromstring(archive.read("stack.xml"))
        assert (root.tag, root.get("w"), root.get("h"), root.get("version")) == ("image", "60", "40", "0.0.3")
        (stack,) = root
        front_to_back = list(reversed(STACK.layers))
        assert [layer.attrib for layer in stack] == [
            {
                "name": layer.name, "src": f"data/layer{4 - number}.png",
                "x": str(layer.offset[0]), "y": str(layer.offset[1]),
                "opacity": {1: "1.0", 0: "0.0"}.get(layer.opacity, repr(layer.opacity)),
                "visibility": "visible" if layer.visible else "hidden", "composite-op": "svg:src-over",
            }
            for number, layer in enumerate(front_to_back)
        ]  # fmt: skip
        for element, layer in zip(stack, front_to_back, strict=True):
            assert is_same(archive.open(element.get("src")), layer.image)
        assert is_same(archive.open("mergedimage.png"), composite(STACK))


@pytest.mark.parametrize(("size", "expected"), [((1000, 500), (256, 128)), ((60, 40), (60, 40)), ((4000, 2), (256, 1))])
def test_the_ora_has_a_thumbnail(tmp_path, size, expected):
    save_layers(LayerStack(size, (Layer(plain("red")),)), tmp_path / "x", ["ora"])
    with zipfile.ZipFile(tmp_path / "x" / "layers.ora") as archive:
        assert Image.open(archive.open("Thumbnails/thumbnail.png")).size == expected
        assert Image.open(archive.open("mergedimage.png")).size == size


def test_the_slide_has_every_layer_on_its_place(saved):
    show = pptx.Presentation(saved / "layers.pptx")
    (slide,) = show.slides
    unit = show.slide_width / 60
    assert show.slide_height / unit == pytest.approx(40, abs=0.01)
    assert [shape.name for shape in slide.shapes] == [layer.name for layer in STACK.layers]
    for shape, layer in zip(slide.shapes, STACK.layers, strict=True):
        box = [value / unit for value in (shape.left, shape.top, shape.width, shape.height)]
        assert box == pytest.approx([*layer.offset, *layer.image.size], abs=0.01)
        assert is_same(io.BytesIO(shape.image.blob), layer.image)
        hidden = shape._element.nvPicPr.cNvPr.get("hidden")
        assert (hidden == "1") == (not layer.visible)
        amounts = [effect.get("amt") for effect in shape._element.iter() if effect.tag.endswith("}alphaModFix")]
        assert amounts == ([] if layer.opacity == 1 else [str(round(layer.opacity * 100_000))])


@pytest.mark.slow
@pytest.mark.parametrize(("size", "unit"), [
    ((1000, 500), 9525), ((1, 1), 914_400), ((20, 1000), 914_400 / 20), ((30_000, 600), 51_206_400 / 30_000),
])  # fmt: skip
def test_slides_are_of_96_pixels_an_inch_within_powerpoint_s_limits(tmp_path, size, unit):
    save_layers(LayerStack(size, (Layer(plain("red")),)), tmp_path / "x", ["pptx"])
    show = pptx.Presentation(tmp_path / "x" / "layers.pptx")
    sides = show.slide_width, show.slide_height
    assert 914_400 <= min(sides) <= max(sides) <= 51_206_400
    assert sides == pytest.approx([side * unit for side in size], abs=1)


def psd(path: Path, *layers, mode="RGBA", size=(8, 6), depth=8) -> Path:
    """A PSD with pixel layers given as keyword arguments of psd-tools, each with a function that changes it."""
    document = psd_tools.PSDImage.new(mode, size, depth=depth)
    for fields, change in layers:
        change(document.create_pixel_layer(fields.pop("image", plain("red")), **fields))
    document.save(path)
    return path


def as_is(layer) -> None:
    pass


def test_groups_of_a_psd_are_flattened(tmp_path, caplog):
    document = psd_tools.PSDImage.new("RGBA", (8, 6))
    document.create_pixel_layer(plain("red"), name="back")
    group = document.create_group(name="outer", opacity=128)
    inner = group.create_group(name="inner")
    inner.create_pixel_layer(plain("blue"), name="in", left=2, top=-1, opacity=51)
    group.visible = False
    document.create_pixel_layer(plain("lime"), name="front")
    document.save(tmp_path / "x.psd")
    stack = load_layers(tmp_path / "x.psd")
    assert [(layer.name, layer.offset, layer.visible) for layer in stack.layers] == [
        ("back", (0, 0), True), ("in", (2, -1), False), ("front", (0, 0), True),
    ]  # fmt: skip
    assert stack.layers[1].opacity == pytest.approx(128 * 51 / 255**2)
    assert "outer has an opacity, which goes to each of its layers" in caplog.text


def adjustment(layer) -> None:
    layer._record.tagged_blocks.set_data(Tag.INVERT)


def fill(layer) -> None:
    layer._record.tagged_blocks.set_data(Tag.SOLID_COLOR_SHEET_SETTING)


def hollow(layer) -> None:
    for channel in layer._channels:
        channel.data = b""


def masked(layer) -> None:
    layer.create_mask(Image.new("L", (4, 6), 100), left=6, top=0)


def unmasked(layer) -> None:
    masked(layer)
    layer.mask.disabled = True


def clipped(layer) -> None:
    layer.clipping = True


@pytest.mark.parametrize("change", [adjustment, fill, hollow])
def test_layers_of_a_psd_without_pixels_are_skipped_and_said(tmp_path, caplog, change):
    path = psd(tmp_path / "x.psd", ({"name": "red"}, as_is), ({"name": "other"}, change))
    assert [layer.name for layer in load_layers(path).layers] == ["red"]
    assert "layer other" in caplog.text
    assert "has no pixels and is skipped" in caplog.text


@pytest.mark.parametrize(("change", "fields", "alpha", "says"), [
    (masked, {"left": 4}, [0, 0, 100, 100, 100, 100, 0, 0], "has a mask, which goes into its alpha"),
    (unmasked, {"left": 4}, [255] * 8, "has a mask"),
    (clipped, {}, [255] * 8, "is clipped"),
    (as_is, {"blend_mode": BlendMode.MULTIPLY}, [255] * 8, "is not blended as normal and is read so"),
])  # fmt: skip
def test_what_a_flat_stack_cannot_hold_is_said(tmp_path, caplog, change, fields, alpha, says):
    path = psd(tmp_path / "x.psd", ({"name": "red"}, as_is), ({"name": "other", **fields}, change))
    image = load_layers(path).layers[1].image
    assert pixels(image)[3, :, 3].tolist() == alpha
    assert f"layer other {says}" in caplog.text


def transparent(layer) -> None:
    """Gives a layer of a document without alpha what Photoshop gives it: a channel of transparency."""
    data = ChannelData(compression=Compression.RAW)
    data.set_data(bytes(range(48)), 8, 6, 8, 1)
    layer._record.channel_info.append(ChannelInfo(id=-1, length=len(data.data) + 2))
    layer._channels.append(data)


@pytest.mark.parametrize(("mode", "depth", "expected", "says"), [
    ("RGB", 8, (200, 100, 50), None),
    ("RGB", 16, (200, 100, 50), "RGB of 16 bits"),
    ("RGB", 32, (200, 100, 50), "RGB of 32 bits"),
    ("L", 8, (124, 124, 124), "GRAYSCALE of 8 bits"),
    ("CMYK", 8, (200, 100, 50), "CMYK of 8 bits"),
])  # fmt: skip
def test_other_modes_and_depths_are_converted_and_said(tmp_path, caplog, mode, depth, expected, says):
    layer = {"image": Image.new("RGB", (8, 6), (200, 100, 50)), "name": "x"}
    path = psd(tmp_path / "x.psd", (layer, as_is), mode=mode, depth=depth)
    (layer,) = load_layers(path).layers
    assert layer.image.getpixel((3, 3)) == (*expected, 255)
    assert (says in caplog.text) if says else not caplog.records


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_layers_keep_their_transparency_in_any_mode(tmp_path, mode):
    layer = {"image": Image.new("RGB", (8, 6)), "name": "x"}
    path = tmp_path / "x.psd"
    document = psd_tools.PSDImage.new(mode, (8, 6))
    made = document.create_pixel_layer(**layer)
    for place in [n for n, info in enumerate(made._record.channel_info) if info.id == -1]:
        del made._record.channel_info[place], made._channels[place]
    transparent(made)
    document.save(path)
    assert load_layers(path).layers[0].image.getchannel("A").tobytes() == bytes(range(48))


def test_modes_without_colours_we_know_are_refused(tmp_path):
    assert "LAB; convert it to RGB" in refusal(psd(tmp_path / "x.psd", mode="LAB"))


def test_a_psd_without_layers_is_one(tmp_path, caplog):
    psd_tools.PSDImage.frompil(Image.new("RGB", (8, 6), (1, 2, 3))).save(tmp_path / "photo.psd")
    stack = load_layers(tmp_path / "photo.psd")
    assert described(stack) == described(LayerStack((8, 6), (Layer(plain((1, 2, 3, 255)), "photo"),)))
    assert "read as one" in caplog.text


def ora(path: Path, stack: str, files=("a.png",), **members) -> Path:
    """An OpenRaster file with this XML inside its <image> and red PNGs of these names."""
    buffer = io.BytesIO()
    plain("red").save(buffer, "PNG")
    xml = stack if stack.startswith("<?") else f'<image w="8" h="6">{stack}</image>'
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in {"mimetype": "image/openraster", "stack.xml": xml, **members}.items():
            archive.writestr(name, data)
        for name in files:
            archive.writestr(name, buffer.getvalue())
    return path


def test_stacks_within_an_ora_are_flattened(tmp_path, caplog):
    path = ora(
        tmp_path / "x.ora",
        """<stack>
        <layer name="front" src="a.png"/>
        <stack name="group" x="3" y="1" opacity="0.5" visibility="hidden">
            <layer name="inner" src="a.png" x="-1" y="2" opacity="0.5"/>
        </stack>
        <layer name="back" src="a.png" composite-op="svg:multiply"/>
        <text name="words"/><filter/><layer name="drawing" src="a.svg"/>
    </stack>""",
    )
    stack = load_layers(path)
    assert [(layer.name, layer.offset, layer.visible, layer.opacity) for layer in stack.layers] == [
        ("back", (0, 0), True, 1), ("inner", (2, 3), False, 0.25), ("front", (0, 0), True, 1),
    ]  # fmt: skip
    for said in (
        "text words is not a pixel layer",
        "filter",
        "layer drawing is not a pixel layer",
        "svg:multiply",
        "stack group",
    ):
        assert said in caplog.text


def test_an_ora_of_another_program_has_no_metadata(tmp_path):
    for merged in ("no png", json.dumps([1])):
        path = ora(tmp_path / "x.ora", '<stack><layer src="a.png"/></stack>', **{"mergedimage.png": merged})
        assert load_layers(path).metadata == {}
