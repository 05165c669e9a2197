"""Every field of a PSD or an ORA that changes what a layer shows is applied, or named in a warning."""

from __future__ import annotations

import io
import os
import zipfile
from pathlib import Path

import numpy as np
import psd_tools
import pytest
from PIL import Image
from psd_tools.constants import BlendMode, EffectOSType, Tag
from psd_tools.psd import effects_layer
from psd_tools.psd.descriptor import Bool, Descriptor, Double
from psd_tools.psd.layer_and_mask import MaskParameters
from psd_tools.psd.tagged_blocks import TaggedBlock
from psd_tools.psd.vector import Path as Outline
from test_layer_stacks import plain

from qwen_image_mlx.errors import RequestError
from qwen_image_mlx.layers.formats import load_layers
from qwen_image_mlx.layers.stack import composite

CORPUS = os.environ.get("PSD_CORPUS")  # a folder of PSDs, such as tests/psd_files of psd-tools' repository


def over_blue(path: Path, change, group: bool = False) -> Path:
    """A red layer, or one in a group, over a blue one; `change` is given that layer or group."""
    document = psd_tools.PSDImage.new("RGB", (8, 6))
    document.create_pixel_layer(plain("blue").convert("RGB"), name="below")
    place = document.create_group(name="other") if group else document
    made = place.create_pixel_layer(plain("red").convert("RGB"), name="inner" if group else "other")
    change(place if group else made)
    with open(path, "wb") as file:
        document._record.write(file)
    return path


def shown(path: Path) -> tuple[int, ...]:
    return composite(load_layers(path)).getpixel((3, 3))


@pytest.mark.parametrize("group", [False, True])
@pytest.mark.parametrize(("fill", "opacity"), [(128, 255), (0, 255), (51, 128), (255, 64)])
def test_fill_and_opacity_multiply(tmp_path, fill, opacity, group):
    def change(layer):
        layer.opacity, layer.fill_opacity = opacity, fill

    share = fill * opacity / 255**2
    expected = (255 * share, 0, 255 * (1 - share), 255)
    assert shown(over_blue(tmp_path / "x.psd", change, group)) == pytest.approx(expected, abs=1)


@pytest.mark.parametrize("group", [False, True])
def test_a_group_s_fill_is_given_to_its_layers_and_said(tmp_path, caplog, group):
    over_blue(tmp_path / "x.psd", lambda layer: setattr(layer, "fill_opacity", 100), group)
    load_layers(tmp_path / "x.psd")
    assert ("other has an opacity, which goes to each of its layers" in caplog.text) is group


def masked(**parameters):
    def change(layer):
        layer.create_mask(Image.new("L", (8, 6), 55))
        layer._record.mask_data.flags.parameters_applied = bool(parameters)
        layer._record.mask_data.parameters = MaskParameters(**parameters) if parameters else None

    return change


@pytest.mark.parametrize(("parameters", "share"), [
    ({}, 55 / 255),
    ({"user_mask_density": 255}, 55 / 255),
    ({"user_mask_density": 128}, 1 - 128 / 255 * 200 / 255),
    ({"user_mask_density": 0}, 1),
])  # fmt: skip
def test_a_mask_is_as_dense_as_it_says(tmp_path, parameters, share):
    path = over_blue(tmp_path / "x.psd", masked(**parameters))
    assert shown(path) == pytest.approx((255 * share, 0, 255 * (1 - share), 255), abs=1)


def clipped(layer):
    layer._record.clipping = 1


def cut(layer):
    layer.tagged_blocks.set_data(Tag.VECTOR_MASK_SETTING1, path=Outline([]))


def ranged(layer):
    layer._record.blending_ranges.composite_ranges = [(0, 65535), (0, 30000)]


def restricted(layer):
    layer.tagged_blocks.set_data(Tag.CHANNEL_BLENDING_RESTRICTIONS_SETTING, [1])


def knocked(layer):
    layer.tagged_blocks.set_data(Tag.KNOCKOUT_SETTING, 1)


def shadowed(enabled: int):
    """A shadow in the block of Photoshop 5."""

    def change(layer):
        shadow = effects_layer.ShadowInfo(enabled=enabled, opacity=255)
        state = effects_layer.CommonStateInfo()
        effects = effects_layer.EffectsLayer([(EffectOSType.COMMON_STATE, state), (EffectOSType.DROP_SHADOW, shadow)])
        layer.tagged_blocks[Tag.EFFECTS_LAYER] = TaggedBlock(key=Tag.EFFECTS_LAYER, data=effects)

    return change


def unknown_effect(on: bool):
    """An effect of a kind that psd-tools does not know, in the block of today."""

    def change(layer):
        effect = Descriptor(classID=b"NewF", items=[(b"enab", Bool(on)), (b"present", Bool(True))])
        layer.tagged_blocks.set_data(
            Tag.OBJECT_BASED_EFFECTS_LAYER_INFO, version=0, data_version=16,
            items=[(b"masterFXSwitch", Bool(True)), (b"NewF", effect)],
        )  # fmt: skip

    return change


def damaged_effects(layer):
    key = Tag.OBJECT_BASED_EFFECTS_LAYER_INFO
    layer.tagged_blocks[key] = TaggedBlock(key=key, data=b"\0\0\0\0nonsense")


def artboard(layer):
    rectangle = Descriptor(
        classID=b"classFloatRect", items=[(side, Double(8.0)) for side in (b"Top ", b"Left", b"Btom", b"Rght")]
    )
    layer.tagged_blocks.set_data(Tag.ARTBOARD_DATA1, version=16, items=[(b"artboardRect", rectangle)])


@pytest.mark.parametrize(("change", "group", "says"), [
    (clipped, False, "is clipped to the layer below"),
    (clipped, True, "is clipped to the layer below"),
    (cut, False, "has a vector mask, which is left out"),
    (cut, True, "has a vector mask, which is left out"),
    (masked(user_mask_feather=4.0), False, "has a mask with a feather, which is left out"),
    (masked(), True, "has a mask, which is left out"),
    (ranged, False, "is blended by ranges (Blend If)"),
    (restricted, False, "is blended in some channels alone"),
    (knocked, False, "knocks out what is below"),
    (shadowed(1), False, "has effects, which are left out"),
    (unknown_effect(True), False, "has effects, which are left out"),
    (unknown_effect(True), True, "has effects, which are left out"),
    (damaged_effects, False, "has effects, which are left out"),
    (artboard, True, "is an artboard: its background is left out"),
    (lambda layer: setattr(layer, "blend_mode", BlendMode.DISSOLVE), False, "is not blended as normal"),
])  # fmt: skip
def test_what_is_not_applied_is_named(tmp_path, caplog, change, group, says):
    load_layers(over_blue(tmp_path / "x.psd", change, group))
    assert f"layer other {says}" in caplog.text


@pytest.mark.parametrize("change", [lambda layer: None, shadowed(0), unknown_effect(False)])
def test_what_changes_nothing_is_not_named(tmp_path, caplog, change):
    path = over_blue(tmp_path / "x.psd", change)
    document = psd_tools.PSDImage.open(path)
    document.save(path)
    assert shown(path) == (255, 0, 0, 255)
    assert "layer other" not in caplog.text


@pytest.mark.parametrize("colour", [(255, 0, 0), (0, 0, 255)])
def test_a_image_that_is_not_that_of_its_layers_is_said(tmp_path, caplog, colour):
    """Whatever the field, the file's own merged image tells."""
    document = psd_tools.PSDImage.frompil(Image.new("RGB", (8, 6), colour))
    document.create_pixel_layer(plain("red").convert("RGB"), name="red")
    with open(tmp_path / "x.psd", "wb") as file:
        document._record.write(file)
    load_layers(tmp_path / "x.psd")
    assert ("differs from its merged image" in caplog.text) is (colour != (255, 0, 0))


def ora(path: Path, attributes: str, inside: str = "") -> Path:
    buffer = io.BytesIO()
    plain("red").save(buffer, "PNG")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("mimetype", "image/openraster")
        archive.writestr("stack.xml", f'<image w="8" h="6"><stack><layer name="other" src="a.png" {attributes}>{inside}'
                         "</layer></stack></image>")  # fmt: skip
        archive.writestr("a.png", buffer.getvalue())
    return path


@pytest.mark.parametrize(("attributes", "inside", "says"), [
    ('alpha-preserve="true"', "", "other has alpha-preserve, which is left out"),
    ('clip="1" mask="mask.png"', "", "other has clip, mask, which is left out"),
    ('fill-opacity="0.5"', "", "other has fill-opacity"),
    ("", '<mask src="mask.png"/>', "other has <mask>, which is left out"),
    ('composite-op="svg:src-atop"', "", "blended with svg:src-atop"),
])  # fmt: skip
def test_an_ora_s_masks_and_clipping_are_named(tmp_path, caplog, attributes, inside, says):
    load_layers(ora(tmp_path / "x.ora", attributes, inside))
    assert says in caplog.text


@pytest.mark.parametrize("attributes", ["", 'alpha-preserve="false" clip="0"', 'selected="true" edit-locked="true"'])
def test_an_ora_s_fields_that_change_nothing_are_not_named(tmp_path, caplog, attributes):
    load_layers(ora(tmp_path / "x.ora", attributes))
    assert not caplog.records


@pytest.mark.skipif(not CORPUS, reason="PSD_CORPUS names no folder of PSDs")
def test_a_corpus_is_read_as_it_looks_or_not_without_a_word(caplog):
    silent, read = [], 0
    for path in sorted(Path(CORPUS).rglob("*.ps[db]")):
        caplog.clear()
        try:
            stack = load_layers(path)
            merged = psd_tools.PSDImage.open(path).topil().convert("RGBA")
        except RequestError:
            continue
        read += 1
        white = Image.new("RGBA", merged.size, "white")
        pair = (np.asarray(Image.alpha_composite(white, image), np.int32) for image in (merged, composite(stack)))
        if np.abs(np.subtract(*pair)).mean() > 2 and not caplog.records:
            silent.append(str(path))
    assert read
    assert silent == []
