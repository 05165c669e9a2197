"""The demo's scenes: drawn as captioned, split as promised, and judged rightly by their pixels."""

from __future__ import annotations

import numpy as np
import pytest
from demo.scenes import COLOURS, SHAPES, Thing, analyse, coverage, draw_scene, flatten, is_held_out, recolour

pytestmark = pytest.mark.demo


def scenes(count: int, **options):
    rng = np.random.default_rng(1)
    return [draw_scene(rng, **options) for _ in range(count)]


@pytest.mark.parametrize("held_out", [False, True])
def test_images_are_judged_rightly(held_out):
    for scene in scenes(300, held_out=held_out):
        (thing,) = scene.things
        found = analyse(scene.render())
        assert (found.colour, found.shape, found.background) == (thing.colour, thing.shape, scene.background)
        assert max(abs(found.x - thing.x), abs(found.y - thing.y)) < 0.02
        assert scene.is_held_out == held_out


def test_nothing_is_seen_where_nothing_is():
    found = analyse(np.full((64, 64, 3), COLOURS["red"], np.uint8))
    assert (found.background, found.colour, found.shape) == ("red", None, None)


def test_noise_is_no_scene():
    noise = np.random.default_rng(0).integers(0, 256, (100, 64, 64, 3), np.uint8)
    right = [analyse(image) for image in noise]
    assert sum(f.colour == "red" and f.background == "blue" for f in right) < 10


def test_some_combinations_are_held_out():
    every = [(s, c, b) for s in SHAPES for c in COLOURS for b in COLOURS if b != c]
    held = [combination for combination in every if is_held_out(*combination)]
    assert 0.08 < len(held) / len(every) < 0.2
    assert {shape for shape, _, _ in held} == set(SHAPES)


def test_layers_laid_together_are_the_image():
    for scene in scenes(20, things=2):
        layers = scene.layers()
        assert layers.shape == (3, 64, 64, 4)
        assert (layers[0, ..., 3] == 255).all()
        np.testing.assert_array_equal(flatten(layers), scene.render())
        back, front = (layers[n, ..., 3] > 127 for n in (1, 2))
        assert (back & ~front).sum() > 20, "both are seen"
        assert " in front of " in scene.caption


@pytest.mark.parametrize(("shape", "area"), [("circle", np.pi * 0.25**2), ("square", 0.45**2), ("triangle", 0.125)])
def test_coverage_adds_up_to_the_area(shape, area):
    assert coverage(Thing(shape, "red", radius=0.25), 256).mean() == pytest.approx(area, rel=0.01)


def test_an_edit_changes_what_it_says():
    rng = np.random.default_rng(2)
    for scene in scenes(100):
        after, instruction = recolour(scene, rng)
        found = analyse(after.render())
        if "background" in instruction:
            assert instruction == f"make the background {found.background}"
            assert found.colour == scene.things[0].colour
        else:
            assert instruction == f"make the {found.shape} {found.colour}"
            assert found.background == scene.background
        assert (found.shape, after.seed) == (scene.things[0].shape, scene.seed)


def test_the_same_seed_draws_the_same_scenes():
    assert scenes(20) == scenes(20)
    np.testing.assert_array_equal(scenes(1)[0].render(), scenes(1)[0].render())
