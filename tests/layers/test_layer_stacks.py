"""Stacks of layers: what they refuse, how they are changed, laid together, measured and shown."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from qwen_image_mlx.errors import RequestError
from qwen_image_mlx.layers import stack as module
from qwen_image_mlx.layers.stack import (
    MAX_LAYERS,
    MAX_OFFSET,
    MAX_SIDE,
    Layer,
    LayerStack,
    clean_name,
    composite,
    contact_sheet,
    psnr,
)


def noise(size: tuple[int, int], seed: int = 0) -> Image.Image:
    """RGBA noise with many wholly clear and wholly opaque pixels."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (size[1], size[0], 4), np.uint8)
    pixels[..., 3] = np.clip(pixels[..., 3].astype(int) * 2 - 128, 0, 255)
    return Image.fromarray(pixels)


def plain(colour, size=(8, 6)) -> Image.Image:
    return Image.new("RGBA", size, colour)


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


sides = st.integers(1, 12)


@st.composite
def stacks(draw, max_layers=5):
    images = st.builds(noise, st.tuples(sides, sides), st.integers(0, 999))
    offsets = st.tuples(st.integers(-15, 15), st.integers(-15, 15))
    layer = st.builds(Layer, images, st.just("x"), offsets, st.booleans(), st.floats(0, 1))
    layers = draw(st.lists(layer, min_size=1, max_size=max_layers))
    return LayerStack(draw(st.tuples(sides, sides)), tuple(layers))


def oracle(stack: LayerStack) -> np.ndarray:
    """Source over by its definition, pixel by pixel."""
    width, height = stack.size
    result = np.zeros((height, width, 4))
    for y in range(height):
        for x in range(width):
            colour, alpha = np.zeros(3), 0.0
            for layer in stack.layers:
                place = x - layer.offset[0], y - layer.offset[1]
                if not layer.visible or not all(0 <= p < side for p, side in zip(place, layer.image.size, strict=True)):
                    continue
                *source, opacity = layer.image.getpixel(place)
                opacity *= layer.opacity / 255
                total = opacity + alpha * (1 - opacity)
                if total:
                    colour = (np.array(source) * opacity + colour * alpha * (1 - opacity)) / total
                alpha = total
            result[y, x] = (*colour, alpha * 255)
    result[np.rint(result[..., 3]) == 0] = 0
    return result


@pytest.mark.slow
@given(stacks())
@settings(max_examples=150, deadline=None)
def test_layers_lie_over_each_other_as_the_formula_says(stack):
    result = composite(stack)
    assert (result.mode, result.size) == ("RGBA", stack.size)
    np.testing.assert_allclose(pixels(result), oracle(stack), rtol=0, atol=0.5 + 1e-6)


@given(st.integers(0, 10_000), st.integers(0, 10_000))
def test_two_layers_are_within_one_level_of_pillow(back, front):
    back, front = noise((16, 16), back), noise((16, 16), front)
    result = pixels(composite(LayerStack((16, 16), (Layer(back), Layer(front)))))
    expected = pixels(Image.alpha_composite(back, front))
    seen = expected[..., 3] > 0
    assert np.abs(result - expected)[seen].max() <= 1
    assert not result[~seen].any()


def test_layers_over_an_opaque_one_are_within_one_level_of_pillow():
    images = [plain((10, 200, 30, 255), (64, 64)), *(noise((64, 64), seed) for seed in range(3))]
    expected = images[0]
    for image in images[1:]:
        expected = Image.alpha_composite(expected, image)
    result = composite(LayerStack((64, 64), tuple(map(Layer, images))))
    assert np.abs(pixels(result) - pixels(expected)).max() <= 1


@given(stacks(max_layers=1))
def test_one_layer_keeps_its_pixels(stack):
    alone = LayerStack(stack.layers[0].image.size, (Layer(stack.layers[0].image),))
    result, image = pixels(composite(alone)), pixels(alone.layers[0].image)
    np.testing.assert_array_equal(result[..., 3], image[..., 3])
    np.testing.assert_array_equal(result[image[..., 3] > 0], image[image[..., 3] > 0])
    assert not result[image[..., 3] == 0].any()


@pytest.mark.slow
@given(stacks(), st.integers(1, 40))
def test_bands_leave_no_trace(stack, size):
    whole = composite(stack)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_BAND_PIXELS", size)
        assert composite(stack).tobytes() == whole.tobytes()


def test_layers_beside_the_canvas_do_not_count():
    stack = LayerStack((8, 6), (Layer(plain("red")), Layer(plain("blue"), offset=(8, 0))))
    assert composite(stack) == composite(stack.hide(1)) == plain("red")
    assert composite(stack.move(1, -1, 5)).getpixel((7, 5)) == (0, 0, 255, 255)


def test_layers_can_be_hidden():
    stack = LayerStack((8, 6), (Layer(plain("red")), Layer(plain("lime")), Layer(plain("blue"))))
    assert composite(stack, hide=[2]) == composite(stack.hide(2)) == plain("lime")
    assert composite(stack, hide=(1, 2)) == plain("red")
    assert composite(stack, hide=range(3)) == plain((0, 0, 0, 0))
    assert [layer.visible for layer in stack.hide(0, 2).layers] == [False, True, False]
    assert all(layer.visible for layer in stack.layers), "a stack never changes"


@pytest.mark.slow
@given(stacks(), st.integers(-20, 20), st.integers(-20, 20))
def test_moving_there_and_back_changes_nothing(stack, dx, dy):
    last = len(stack.layers) - 1
    moved = stack.move(last, dx, dy)
    x, y = stack.layers[last].offset
    assert moved.layers[last].offset == (x + dx, y + dy)
    assert moved.move(last, -dx, -dy) == stack


@pytest.mark.parametrize("factor", [0.25, 0.5, 1.5, 2, 3])
def test_scaling_keeps_the_middle_of_what_is_shown(factor):
    image = Image.new("RGBA", (100, 80))
    image.paste((255, 0, 0, 255), (20, 30, 60, 50))
    stack = LayerStack((200, 200), (Layer(image, offset=(30, 40)),)).scale(0, factor)
    left, upper, right, lower = composite(stack).getchannel("A").point(lambda a: 255 * (a > 127)).getbbox()
    assert (right - left, lower - upper) == pytest.approx((40 * factor, 20 * factor), abs=1)
    assert ((left + right) / 2, (upper + lower) / 2) == pytest.approx((70, 80), abs=1)


def test_scaling_gives_edges_no_fringe():
    image = Image.new("RGBA", (40, 40), (0, 0, 0, 0))
    image.paste((255, 0, 0, 255), (10, 10, 30, 30))
    image.putpixel((20, 20), (255, 0, 0, 0))
    scaled = pixels(LayerStack((40, 40), (Layer(image),)).scale(0, 1.7).layers[0].image)
    assert ((scaled[..., 3] > 16) & (scaled[..., 3] < 240)).any()
    seen = scaled[scaled[..., 3] > 16]
    assert seen[:, 0].min() >= 250
    assert seen[:, 1:3].max() == 0


def test_scaling_nothing_or_by_one_changes_nothing():
    stack = LayerStack((8, 6), (Layer(plain("red")), Layer(plain((0, 0, 0, 0)))))
    assert stack.scale(0, 1) == stack
    assert stack.scale(1, 5) == stack
    assert stack.scale(0, 1e-9).layers[0].image.size == (1, 1)


@pytest.mark.parametrize("factor", [0, -1, math.nan, math.inf, 1e308, 10**400, "2", None, True])
def test_senseless_factors_are_refused(factor):
    with pytest.raises(RequestError, match="scaled"):
        LayerStack((8, 6), (Layer(plain("red")),)).scale(0, factor)


@pytest.mark.parametrize("index", [-1, 1, 0.0, "0", True, None])
def test_layers_that_do_not_exist_are_refused(index):
    stack = LayerStack((8, 6), (Layer(plain("red")),))
    for change in (stack.hide, lambda i: stack.move(i, 1, 1), lambda i: stack.scale(i, 2)):
        with pytest.raises(RequestError, match=r"layer .* does not exist; layers go from 0, the backmost, to 0"):
            change(index)
    with pytest.raises(RequestError, match="does not exist"):
        composite(stack, [index])


@pytest.mark.parametrize(("fields", "says"), [
    ({"image": Image.new("RGB", (8, 6))}, "RGBA"),
    ({"image": np.zeros((6, 8, 4), np.uint8)}, "RGBA"),
    ({"image": Image.new("RGBA", (0, 5))}, "from 1 to"),
    ({"image": Image.new("RGBA", (MAX_SIDE + 1, 1))}, "from 1 to"),
    ({"name": 5}, "name"),
    ({"name": "a\nb"}, "name"),
    ({"name": "a" * 256}, "name"),
    ({"name": "\ud83d"}, "name"),
    ({"offset": (1,)}, "offset"),
    ({"offset": (1.5, 0)}, "offset"),
    ({"offset": (True, 0)}, "offset"),
    ({"offset": (MAX_OFFSET + 1, 0)}, "offset"),
    ({"offset": "12"}, "offset"),
    ({"offset": None}, "offset"),
    ({"visible": 1}, "visib"),
    ({"visible": "yes"}, "visib"),
    ({"opacity": 1.01}, "opacity"),
    ({"opacity": -0.1}, "opacity"),
    ({"opacity": math.nan}, "opacity"),
    ({"opacity": math.inf}, "opacity"),
    ({"opacity": "1"}, "opacity"),
    ({"opacity": True}, "opacity"),
])  # fmt: skip
def test_senseless_layers_are_refused(fields, says):
    with pytest.raises(RequestError, match=says):
        Layer(**{"image": plain("red"), **fields})


@pytest.mark.parametrize(("size", "count", "says"), [
    ((0, 6), 1, "canvas"),
    ((8, MAX_SIDE + 1), 1, "canvas"),
    ((8.0, 6), 1, "canvas"),
    (None, 1, "canvas"),
    ((8, 6), 0, "0 layers"),
    ((8, 6), MAX_LAYERS + 1, f"from 1 to {MAX_LAYERS}"),
])  # fmt: skip
def test_senseless_stacks_are_refused(size, count, says):
    with pytest.raises(RequestError, match=says):
        LayerStack(size, (Layer(plain("red")),) * count)


@given(st.text(alphabet=st.characters(exclude_categories=()), max_size=300))
def test_cleaned_names_are_names(name):
    cleaned = clean_name(name)
    assert Layer(plain("red"), cleaned).name == clean_name(cleaned) == cleaned
    if name.isprintable() and len(name) <= 255:
        assert cleaned == name


def test_psnr():
    grey = Image.new("RGB", (10, 10), (100, 100, 100))
    assert psnr(grey, grey) == math.inf
    assert psnr(grey, Image.new("RGB", (10, 10), (101, 101, 101))) == pytest.approx(20 * math.log10(255))
    assert psnr(grey, Image.new("RGB", (10, 10), (110, 100, 100))) == pytest.approx(10 * math.log10(255**2 / (100 / 3)))
    assert psnr(Image.new("RGB", (10, 10)), Image.new("RGB", (10, 10), "white")) == 0
    assert psnr(plain("red"), plain((255, 0, 0, 7))) == math.inf, "alpha is not looked at"
    with pytest.raises(RequestError, match="cannot be compared"):
        psnr(grey, Image.new("RGB", (10, 11)))


def test_the_contact_sheet_shows_every_layer_and_all_of_them():
    colours = [(200, 0, 0), (0, 200, 0), (0, 0, 200)]
    layers = [Layer(plain((*colour, 255), (100, 200)), visible=number != 2) for number, colour in enumerate(colours)]
    sheet = contact_sheet(LayerStack((100, 200), tuple(layers)))
    assert sheet.mode == "RGB"
    cells = [sheet.getpixel((x + 90, y + 180)) for y in range(8, sheet.height, 208) for x in range(8, sheet.width, 108)]
    assert cells == [*colours, colours[1]], "the hidden layer alone is shown, in the whole it is not"


def test_the_contact_sheet_shows_clear_parts_as_a_checkerboard():
    sheet = contact_sheet(LayerStack((100, 100), (Layer(plain((0, 0, 0, 0), (100, 100))),)))
    colours = {colour for _, colour in sheet.crop((60, 60, 108, 108)).getcolors()}
    assert colours == {(204, 204, 204), (255, 255, 255)}


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2, 7, 8, 40])
@pytest.mark.parametrize("size", [(30, 20), (1500, 1000), (29_000, 3), (3, 29_000)])
def test_the_contact_sheet_is_never_too_large(count, size):
    stack = LayerStack(size, (Layer(plain("red")),) * count)
    assert max(contact_sheet(stack, max_side=1024).size) <= 1024
