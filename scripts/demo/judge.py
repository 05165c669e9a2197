"""Judges what the demo's models generate, by plain pixel analysis, against scenes that were never trained on.

Images in, numbers out: knows no model, so scripts and tests judge alike.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .scenes import PLACES, Scene, Thing, analyse, coverage, flatten

NEAR = 0.06  # how far an object may have moved, as part of the side
NAMED_NEAR = 0.12  # how far from a named place's middle it may be
FOLLOWS = 0.8  # overlap of a shape with its outline's inside, from which on it follows it
_RIM = 2  # pixels on both sides of an edge that belong to neither what is inside nor what is outside


def judge_paintings(images: np.ndarray, scenes: Sequence[Scene]) -> dict[str, float]:
    """Parts of images (N, H, W, 3), uint8, of one thing each, that are right in each respect, and in all."""
    rows = []
    for image, scene in zip(images, scenes, strict=True):
        (thing,), found = scene.things, analyse(image)
        there = PLACES.get(thing.place)
        rows.append({
            "colour": found.colour == thing.colour,
            "background": found.background == scene.background,
            "shape": found.shape == thing.shape,
            "place": there is None or _distance((found.x, found.y), there) < NAMED_NEAR,
        })  # fmt: skip
    return _means(rows)


def judge_edits(images: np.ndarray, before: Sequence[Scene], after: Sequence[Scene]) -> dict[str, float]:
    """Parts of edited images (N, H, W, 3), uint8, that are right, and the PSNR of what was to stay, in dB."""
    rows = []
    for image, old, new in zip(images, before, after, strict=True):
        (thing,), found = new.things, analyse(image)
        outside = old.background == new.background
        rows.append({
            "colour": found.colour == thing.colour,
            "background": found.background == new.background,
            "shape": found.shape == thing.shape,
            "place": _distance((found.x, found.y), (thing.x, thing.y)) < NEAR,
            "psnr": psnr(image, old.render(), _outside(thing) if outside else _inside(thing)),
        })  # fmt: skip
    return _means(rows)


def judge_layers(stacks: np.ndarray, scenes: Sequence[Scene]) -> dict[str, float]:
    """How well layers (N, frames, H, W, 4), uint8, straight alpha, make up their scenes.

    Returns:
        "psnr": of all frames laid together, in dB; "iou": of the alpha of every thing's layer, soft; both are means.
    """
    rows = []
    for stack, scene in zip(stacks, scenes, strict=True):
        things = zip(stack[1 : 1 + len(scene.things)], scene.things, strict=True)
        overlaps = [_overlap(layer[..., 3], 255 * coverage(thing)) for layer, thing in things]
        rows.append({"psnr": psnr(flatten(stack), scene.render()), "iou": float(np.mean(overlaps))})
    return _means(rows)


def judge_places(images: np.ndarray, scenes: Sequence[Scene]) -> dict[str, float]:
    """How far the shapes in images (N, H, W, 3), uint8, of one thing each lie where they do in their scenes.

    Returns:
        "iou": the mean overlap of what stands out with the scene's shape; "follows": the part with at least
        `FOLLOWS`.
    """
    overlaps = [_overlap(analyse(image).mask, coverage(scene.things[0]) > 0.5)
                for image, scene in zip(images, scenes, strict=True)]  # fmt: skip
    return _means([{"iou": overlap, "follows": overlap >= FOLLOWS} for overlap in overlaps])


def psnr(a: np.ndarray, b: np.ndarray, where: np.ndarray | None = None) -> float:
    """Peak signal to noise ratio of two uint8 images in dB, over the pixels of a mask (H, W)."""
    error = (a.astype(np.float64) - b) ** 2
    error = error if where is None else error[where]
    return float(10 * np.log10(255**2 / max(error.mean(), 1e-3)))


def _outside(thing: Thing) -> np.ndarray:
    return coverage(_grown(thing, _RIM)) == 0


def _inside(thing: Thing) -> np.ndarray:
    return coverage(_grown(thing, -_RIM)) == 1


def _grown(thing: Thing, pixels: float) -> Thing:
    return Thing(thing.shape, thing.colour, thing.x, thing.y, thing.radius + pixels / 64)


def _overlap(alpha: np.ndarray, expected: np.ndarray) -> float:
    return float(np.minimum(alpha, expected).sum() / np.maximum(alpha, expected).sum())


def _distance(a: tuple[float, float], b: tuple[float, float]) -> float:
    return max(abs(a[0] - b[0]), abs(a[1] - b[1]))


def _means(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """Means of every entry, and as "right" the part of the rows in which everything that is true or false is true."""
    means = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
    flags = [[value for value in row.values() if isinstance(value, bool | np.bool_)] for row in rows]
    return means | ({"right": float(np.mean([all(row) for row in flags]))} if flags[0] else {})
