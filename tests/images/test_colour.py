"""One scene is one image, however its file is tagged; results are sRGB and say nothing else."""

from __future__ import annotations

import io
import json
import logging
import struct
import threading
import zipfile
import zlib
from contextvars import copy_context

import numpy as np
import pptx
import psd_tools
import pytest
from PIL import Image, ImageCms
from psd_tools.constants import Resource

from qwen_image_mlx import ignore_profiles
from qwen_image_mlx.images.sources import open_image, open_mask, open_rgba
from qwen_image_mlx.layers.formats import FORMATS, load_layers, save_layers
from qwen_image_mlx.layers.recompose import compose
from qwen_image_mlx.layers.stack import Layer, LayerStack, composite

COLOURS = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
P3_POINTS = (0.3127, 0.329, 0.68, 0.32, 0.265, 0.69, 0.15, 0.06)
# Published: CSS Color 4's matrices from linear Display P3 and Adobe RGB (both D65) to linear sRGB.
P3_TO_SRGB = [[1.2249401763, -0.2249401763, 0], [-0.0420569547, 1.0420569547, 0], [-0.0196375546, -0.0786360456,
              1.0982736001]]  # fmt: skip
ADOBE_TO_SRGB = [[1.3983557, -0.3983557, 0], [0, 1, 0], [0, -0.0429289, 1.0429289]]


def fixed(*values: float) -> bytes:
    return b"".join(struct.pack(">i", round(value * 65536)) for value in values)


def icc(space: bytes, tags: dict[bytes, bytes], kind: bytes = b"mntr", pcs: bytes = b"XYZ ", name="a test") -> bytes:
    """An ICC profile of version 2 by the specification."""
    text = name.encode() + b"\0"
    description = b"desc\0\0\0\0" + struct.pack(">I", len(text)) + text + b"\0" * 78
    white = b"XYZ \0\0\0\0" + fixed(0.9642, 1, 0.8249)
    tags = {b"desc": description, b"cprt": b"text\0\0\0\0none\0", b"wtpt": white} | tags
    start, table, data = 132 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for sign, body in tags.items():
        table += sign + struct.pack(">II", start + len(data), len(body))
        data += body + b"\0" * (-len(body) % 4)
    head = struct.pack(">I4xI", 128 + len(table) + len(data), 0x02400000) + kind + space + pcs
    head = head.ljust(36, b"\0") + b"acsp"
    return head.ljust(68, b"\0") + fixed(0.9642, 1, 0.8249).ljust(60, b"\0") + table + data


def curve(gamma: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256))


def matrix(primaries, gamma: float = 2.2, name: str = "a test") -> bytes:
    tags = {key + b"XYZ": b"XYZ \0\0\0\0" + fixed(*xyz) for key, xyz in zip((b"r", b"g", b"b"), primaries, strict=True)}
    return icc(b"RGB ", tags | {key + b"TRC": curve(gamma) for key in (b"r", b"g", b"b")}, name=name)


def print_profile() -> bytes:
    """CMYK on cream paper: a table of Lab with two points an axis, in 8 bits."""
    inks = np.indices((2, 2, 2, 2)).reshape(4, -1).T
    light = 90 * (1 - inks @ [0.3, 0.3, 0.05, 0.9]).clip(0.02, 1)
    lab = np.stack([light * 2.55, 128 + inks @ [-30, 60, -5, 0], 148 + inks @ [-50, -10, 60, 0]], 1).clip(0, 255)
    ramp = bytes(range(256))
    table = b"mft1\0\0\0\0" + bytes((4, 3, 2, 0)) + fixed(1, 0, 0, 0, 1, 0, 0, 0, 1)
    table += ramp * 4 + lab.round().astype(np.uint8).tobytes() + ramp * 3
    return icc(b"CMYK", {b"A2B0": table}, b"prtr", b"Lab ")


P3 = matrix([(0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407)], name="Display P3")
ADOBE = matrix([(0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457)], 563 / 256)
LINEAR_GREY = icc(b"GRAY", {b"kTRC": curve(1)})
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def encode(linear: np.ndarray) -> np.ndarray:
    """sRGB's levels of linear light."""
    linear = linear.clip(0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def meant(matrix, gamma: float, colours: np.ndarray = COLOURS) -> np.ndarray:
    return encode((colours / 255) ** gamma @ np.transpose(matrix))


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def with_chunks(png: bytes, **chunks: bytes) -> bytes:
    """A PNG with chunks behind its header."""
    made = b"".join(
        struct.pack(">I", len(data)) + name.encode() + data + struct.pack(">I", zlib.crc32(name.encode() + data))
        for name, data in chunks.items()
    )
    return png[:33] + made + png[33:]


def near(image: Image.Image, expected, levels: float = 2) -> bool:
    return np.abs(np.asarray(image.convert("RGB")).astype(float) - expected).max() <= levels


SCENE = Image.fromarray(COLOURS)


@pytest.mark.parametrize(("profile", "expected"), [
    (P3, meant(P3_TO_SRGB, 2.2)), (ADOBE, meant(ADOBE_TO_SRGB, 563 / 256)),
])  # fmt: skip
@pytest.mark.parametrize(("kind", "options"), [
    ("PNG", {}), ("TIFF", {}), ("WEBP", {"lossless": True}),
])  # fmt: skip
def test_a_profile_is_applied_in_every_format(profile, expected, kind, options):
    file = encoded(SCENE, kind, icc_profile=profile, **options)
    opened = open_image(file)
    assert near(opened, expected)
    assert opened.info.get("icc_profile") is None
    assert near(open_rgba(file), expected)
    with ignore_profiles():
        assert near(open_image(file), COLOURS, 0)
    assert near(open_image(open_image(file)), np.asarray(opened), 0)  # applied once


@pytest.mark.parametrize("kind", ["JPEG", "AVIF"])
def test_a_photograph_is_upright_and_in_its_colours(kind):
    exif = Image.Exif()
    exif[0x0112] = 3
    tagged = encoded(SCENE, kind, quality=95, exif=exif, icc_profile=P3)
    with ignore_profiles():
        numbers = open_image(tagged)
    with Image.open(io.BytesIO(tagged)) as image:
        assert image.rotate(180).tobytes() == numbers.tobytes() or kind == "AVIF"
    assert near(open_image(tagged), meant(P3_TO_SRGB, 2.2, np.asarray(numbers)))


def test_a_camera_that_says_adobe_rgb_in_exif_alone():
    """Interoperability index R03, by the Exif specification: IFD0 -> Exif IFD -> Interoperability IFD."""
    entry = struct.Struct(">HHII").pack
    blocks = b"MM\0*" + struct.pack(">IH", 8, 1) + entry(0x8769, 4, 1, 26) + b"\0" * 4
    blocks += struct.pack(">H", 1) + entry(0xA005, 4, 1, 44) + b"\0" * 4
    blocks += struct.pack(">H", 1) + struct.pack(">HHI4s", 1, 2, 4, b"R03\0") + b"\0" * 4
    assert near(open_image(with_chunks(encoded(SCENE), eXIf=blocks)), meant(ADOBE_TO_SRGB, 563 / 256))
    other = open_image(with_chunks(encoded(SCENE), eXIf=blocks.replace(b"R03", b"R98")))
    assert other.tobytes() == SCENE.tobytes()


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L", "LA", "1"])
def test_what_says_srgb_or_nothing_keeps_every_bit(mode, caplog):
    image = SCENE.convert(mode)
    for file in (
        encoded(image), encoded(image, icc_profile=SRGB), with_chunks(encoded(image), sRGB=b"\0"),
        with_chunks(encoded(image), gAMA=struct.pack(">I", 45455)),
        with_chunks(encoded(image), sRGB=b"\0", gAMA=struct.pack(">I", 100000)),
    ):  # fmt: skip
        assert open_image(file).tobytes() == open_image(encoded(image)).tobytes() == image.convert("RGB").tobytes()
    assert not caplog.records


def test_a_profile_by_its_colours_and_not_by_its_name():
    srgb_primaries = [(0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.71410)]
    grey = Image.fromarray(np.uint8([[[60, 60, 60]]]))
    other = open_image(encoded(grey, icc_profile=matrix(srgb_primaries, 1.8, name="sRGB IEC61966-2.1")))
    assert other.getpixel((0, 0)) == pytest.approx((77, 77, 77), abs=1)


def test_gamma_and_primaries_of_a_png():
    gamma, points = struct.pack(">I", 100000), struct.pack(">8I", *(round(value * 1e5) for value in P3_POINTS))
    assert near(open_image(with_chunks(encoded(SCENE), gAMA=gamma)), encode(COLOURS / 255))
    expected = encode((COLOURS / 255) @ np.transpose(P3_TO_SRGB))
    assert near(open_image(with_chunks(encoded(SCENE), gAMA=gamma, cHRM=points)), expected)


def test_greys_have_profiles_too():
    ramp = np.arange(256, dtype=np.uint8)[None].repeat(4, 0)
    expected = encode(ramp / 255)[..., None].repeat(3, 2)
    grey = Image.fromarray(ramp)
    assert near(open_image(encoded(grey, icc_profile=LINEAR_GREY)), expected)
    assert near(open_image(encoded(Image.fromarray(ramp.astype(np.uint16) * 257), icc_profile=LINEAR_GREY)), expected)
    half = Image.merge("LA", [grey, grey.point(lambda value: 255 - value)])
    opened = open_rgba(encoded(half, icc_profile=LINEAR_GREY))
    assert near(opened, expected)
    assert opened.getchannel("A").tobytes() == (255 - ramp).tobytes()


def test_inks_are_read_by_their_profile():
    inks = Image.fromarray(np.random.default_rng(1).integers(0, 256, (8, 8, 4), np.uint8), "CMYK")
    inks.putpixel((0, 0), (0, 0, 255, 0))
    profile = print_profile()
    opened = open_image(encoded(inks, "TIFF", icc_profile=profile))
    assert opened.getpixel((0, 0)) == pytest.approx((233, 215, 45), abs=3)  # where the inks alone are (255, 255, 0)
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    expected = ImageCms.profileToProfile(inks, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    assert near(opened, np.asarray(expected), 1)
    assert open_image(encoded(inks, "TIFF")).tobytes() == inks.convert("RGB").tobytes()


def test_transparency_and_palettes_keep_their_alpha():
    alpha = Image.fromarray(np.arange(600, dtype=np.int64).reshape(20, 30).astype(np.uint8))
    clear = SCENE.copy()
    clear.putalpha(alpha)
    opened = open_rgba(encoded(clear, icc_profile=P3))
    assert near(opened, meant(P3_TO_SRGB, 2.2))
    assert opened.getchannel("A").tobytes() == alpha.tobytes()
    few = SCENE.quantize(16)
    expected = open_image(encoded(few.convert("RGB"), icc_profile=P3))
    opened = open_rgba(encoded(few, icc_profile=P3, transparency=3))
    assert near(opened, np.asarray(expected), 0)
    assert set(np.unique(opened.getchannel("A"))) == {0, 255}


@pytest.mark.parametrize(("image", "profile"), [
    (SCENE, b"nonsense" * 40), (SCENE, P3[:200]), (SCENE, LINEAR_GREY), (SCENE, print_profile()),
    (SCENE.convert("CMYK"), P3), (SCENE, icc(b"RGB ", {})),
])  # fmt: skip
def test_a_profile_that_cannot_be_used_is_said(tmp_path, caplog, image, profile):
    image.save(tmp_path / "odd.tif", icc_profile=profile)
    with ignore_profiles(False):
        assert open_image(tmp_path / "odd.tif").tobytes() == image.convert("RGB").tobytes()
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "odd.tif has a colour profile that cannot be used" in record.getMessage()


def test_a_chunk_that_cannot_be_unpacked_is_said(tmp_path, caplog):
    (tmp_path / "odd.png").write_bytes(with_chunks(encoded(SCENE), iCCP=b"name\0\0nonsense"))
    assert open_image(tmp_path / "odd.png").tobytes() == SCENE.tobytes()
    assert "odd.png has a colour profile that cannot be used (it is damaged)" in caplog.text


def test_a_conversion_is_said_once(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    for name in "ab":
        SCENE.save(tmp_path / f"{name}.png", icc_profile=P3)
    with ignore_profiles(False):
        for name in "aab":
            open_image(tmp_path / f"{name}.png")
    (record,) = caplog.records
    assert "a.png has the colour profile Display P3" in record.getMessage()


def test_the_caller_s_image_stays_as_it_is():
    tagged = SCENE.copy()
    tagged.info["icc_profile"] = P3
    open_rgba(tagged)
    assert tagged.info["icc_profile"] == P3
    assert tagged.tobytes() == SCENE.tobytes()


def test_a_mask_is_numbers():
    mask = Image.fromarray(COLOURS[..., 0])
    assert open_mask(encoded(mask, icc_profile=LINEAR_GREY)).tobytes() == mask.tobytes()


def test_threads_keep_to_the_context_they_are_given():
    found = []
    with ignore_profiles():
        context = copy_context()
    file = encoded(SCENE, icc_profile=P3)
    read = lambda: found.append(open_image(file).tobytes())  # noqa: E731
    for run in (lambda: context.run(read), read):
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    assert found[0] == SCENE.tobytes() != found[1]


def test_layers_of_different_profiles_are_one_image(tmp_path):
    """A folder and an ORA whose layers are tagged differently, as other programs save them."""
    stack = LayerStack((30, 20), (Layer(open_rgba(SCENE)), Layer(open_rgba(SCENE))))
    save_layers(stack, tmp_path / "x", ["png", "ora"])
    for number, profile in enumerate((P3, ADOBE)):
        SCENE.save(tmp_path / "x" / f"layer_{number}.png", icc_profile=profile)
    with zipfile.ZipFile(tmp_path / "x" / "layers.ora") as old, zipfile.ZipFile(tmp_path / "y.ora", "w") as new:
        for name in old.namelist():
            number = name.removeprefix("data/layer").removesuffix(".png")
            new.writestr(name, (tmp_path / "x" / f"layer_{number}.png").read_bytes() if number in "01" else
                         old.read(name))  # fmt: skip
    for path in (tmp_path / "x", tmp_path / "y.ora"):
        back, front = load_layers(path).layers
        assert near(back.image, meant(P3_TO_SRGB, 2.2))
        assert near(front.image, meant(ADOBE_TO_SRGB, 563 / 256))
        assert near(compose(path), meant(ADOBE_TO_SRGB, 563 / 256))
        with ignore_profiles():
            assert near(compose(path), COLOURS, 0)


def tags_of(folder) -> dict[str, bool]:
    """By file, whether what lies in a saved folder says a profile."""
    has = lambda data: bool(Image.open(data).info.get("icc_profile"))  # noqa: E731
    found = {path.name: has(path) for path in folder.glob("*.png")}
    with zipfile.ZipFile(folder / "layers.ora") as ora:
        found |= {name: has(io.BytesIO(ora.read(name))) for name in ora.namelist() if name.endswith(".png")}
    found["psd"] = Resource.ICC_PROFILE in psd_tools.PSDImage.open(folder / "layers.psd").image_resources
    (slide,) = pptx.Presentation(folder / "layers.pptx").slides
    return found | {f"slide {n}": has(io.BytesIO(shape.image.blob)) for n, shape in enumerate(slide.shapes)}


def test_all_that_is_written_of_layers_agrees(tmp_path):
    tagged = SCENE.convert("RGBA")
    tagged.info["icc_profile"] = P3
    save_layers(LayerStack((30, 20), (Layer(tagged), Layer(tagged, offset=(3, 3)))), tmp_path / "x", FORMATS)
    assert set(tags_of(tmp_path / "x").values()) == {False}
    expected = meant(P3_TO_SRGB, 2.2)
    assert near(Image.open(tmp_path / "x" / "layer_0.png"), expected)
    assert near(Image.open(tmp_path / "x" / "composite.png").crop((0, 0, 30, 3)), expected[:3])
    assert json.loads((tmp_path / "x" / "manifest.json").read_text())["size"] == [30, 20]


@pytest.mark.parametrize("flat", [False, True])
def test_a_psd_is_read_by_its_profile(tmp_path, flat):
    document = psd_tools.PSDImage.frompil(SCENE)
    if not flat:
        document.create_pixel_layer(SCENE, name="x")
    for name, profile in (("wide", P3), ("broken", b"nonsense" * 40)):
        document.image_resources.pop(Resource.ICC_PROFILE, None)
        document.image_resources[Resource.ICC_PROFILE] = psd_tools.psd.image_resources.ImageResource(
            key=Resource.ICC_PROFILE, data=profile
        )
        with open(tmp_path / f"{name}.psd", "wb") as file:
            document._record.write(file)
    assert near(composite(load_layers(tmp_path / "wide.psd")), meant(P3_TO_SRGB, 2.2))
    with ignore_profiles():
        assert near(composite(load_layers(tmp_path / "wide.psd")), COLOURS, 0)
    assert near(composite(load_layers(tmp_path / "broken.psd")), COLOURS, 0)


def test_a_psd_with_a_broken_profile_says_so(tmp_path, caplog):
    test_a_psd_is_read_by_its_profile(tmp_path, flat=False)
    assert "broken.psd has a colour profile that cannot be used" in caplog.text
