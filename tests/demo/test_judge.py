"""The judges of the demo's images: perfect ones pass, and each fault is seen by its own entry."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from demo.judge import judge_edits, judge_layers, judge_paintings, judge_places
from demo.scenes import COLOURS, Scene, Thing, draw_scene, recolour

pytestmark = pytest.mark.demo

SCENES = [draw_scene(np.random.default_rng(n), held_out=True) for n in range(30)]


def rendered(scenes: list[Scene]) -> np.ndarray:
    return np.stack([scene.render() for scene in scenes])


def altered(scene: Scene, **changes) -> Scene:
    return replace(scene, things=(replace(scene.things[0], **changes),))


def other(word: str, *taken: str) -> str:
    return next(colour for colour in COLOURS if colour not in (word, *taken))


def test_the_scenes_themselves_are_right():
    found = judge_paintings(rendered(SCENES), SCENES)
    assert found == {"colour": 1, "background": 1, "shape": 1, "place": 1, "right": 1}


@pytest.mark.parametrize(
    ("entry", "change"),
    [
        ("colour", lambda s: altered(s, colour=other(s.things[0].colour, s.background))),
        ("background", lambda s: replace(s, background=other(s.background, s.things[0].colour))),
        ("shape", lambda s: altered(s, shape="square" if s.things[0].shape != "square" else "circle")),
    ],
)
def test_every_fault_of_a_painting_is_seen(entry, change):
    found = judge_paintings(rendered([change(scene) for scene in SCENES]), SCENES)
    assert found.pop(entry) == found.pop("right") == 0
    assert set(found.values()) == {1}


def test_a_painting_in_another_place_than_named_is_seen():
    scene = Scene((Thing("circle", "red", 0.28, 0.5, place="left"),), "blue")
    assert judge_paintings(rendered([altered(scene, x=0.72)]), [scene])["place"] == 0


def test_edits_must_do_what_is_asked_and_leave_the_rest():
    rng = np.random.default_rng(3)
    after = [recolour(scene, rng)[0] for scene in SCENES]
    assert judge_edits(rendered(after), SCENES, after)["right"] == 1
    assert judge_edits(rendered(after), SCENES, after)["psnr"] > 60
    assert judge_edits(rendered(SCENES), SCENES, after)["right"] == 0, "nothing was done"
    moved = [altered(scene, x=0.5 + (0.5 - scene.things[0].x) * 0.9 + 0.1) for scene in after]
    assert judge_edits(rendered(moved), SCENES, after)["place"] < 0.5
    noise = np.random.default_rng(0).normal(0, 20, (64, 64, 3))
    noisy = np.clip(rendered(after) + noise, 0, 255).astype(np.uint8)
    assert judge_edits(noisy, SCENES, after)["psnr"] < 25


def test_layers_must_make_up_the_image_each_in_its_place():
    scenes = [draw_scene(np.random.default_rng(n), things=2, held_out=True) for n in range(10)]
    stacks = np.stack([scene.layers() for scene in scenes])
    assert judge_layers(stacks, scenes) == pytest.approx({"psnr": 78.13, "iou": 1}, abs=0.01)
    swapped = judge_layers(stacks[:, [0, 2, 1]], scenes)
    assert swapped["iou"] < 0.5
    assert swapped["psnr"] < 30
    flat = stacks.copy()
    flat[:, 1:, ..., 3] = 0
    flat[:, 0, ..., :3] = rendered(scenes)
    assert judge_layers(flat, scenes)["iou"] == 0


def test_a_shape_must_lie_on_its_own_place():
    scene = Scene((Thing("circle", "red", 0.3, 0.6, 0.2),), "blue")
    assert judge_places(rendered([scene]), [scene])["iou"] > 0.95
    assert judge_places(rendered([altered(scene, x=0.4)]), [scene])["follows"] == 0
    assert judge_places(rendered([altered(scene, radius=0.27)]), [scene])["iou"] < 0.6
    assert judge_places(np.zeros((1, 64, 64, 3), np.uint8), [scene]) == {"iou": 0, "follows": 0, "right": 0}
