"""Scenes of shapes on plain backgrounds: what the demo models are trained on, and how their images are judged.

A scene is drawn with exact coverage at every edge, so its layers have exact alpha. Its colours are a fixed palette,
moved a little from scene to scene. Which combinations of shape, colour and background are never trained on is decided
by a hash, so training and judging agree on it without sharing a list.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

SIDE = 64
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40), "green": (42, 157, 73), "blue": (38, 84, 200), "yellow": (247, 211, 55),
    "orange": (245, 130, 32), "purple": (130, 60, 180), "white": (245, 245, 245), "black": (20, 20, 20),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle")
# Where an object's middle is: word -> (across, down) as parts of the side.
PLACES: dict[str, tuple[float, float]] = {
    "left": (0.28, 0.5), "right": (0.72, 0.5), "top": (0.5, 0.28), "bottom": (0.5, 0.72), "middle": (0.5, 0.5),
}  # fmt: skip
SIZES = {"small": 0.14, "": 0.2, "large": 0.27}  # half of an object's extent, as part of the side
_WOBBLE = 8  # how far a colour's channels move, in levels
_HELD_OUT = 0.15


@dataclass(frozen=True)
class Thing:
    """One shape.

    Attributes:
        shape, colour: words of `SHAPES` and `COLOURS`.
        x, y: its middle, as parts of the side from the left and the top.
        radius: half its extent, as part of the side.
        size, place: the words a caption uses; "" for what it does not say.
    """

    shape: str
    colour: str
    x: float = 0.5
    y: float = 0.5
    radius: float = SIZES[""]
    size: str = ""
    place: str = ""

    @property
    def words(self) -> str:
        """Such as "small red circle"."""
        return " ".join(word for word in (self.size, self.colour, self.shape) if word)


@dataclass(frozen=True)
class Scene:
    """Things, back to front, on a background."""

    things: tuple[Thing, ...]
    background: str
    seed: int = 0

    @property
    def caption(self) -> str:
        """What a user would write: "a red circle at the left on a blue background"."""
        front, *behind = self.things[::-1]
        text = f"{_article(front.words)} {front.words}"
        text += f" at the {front.place}" if front.place else ""
        text += "".join(f" in front of {_article(thing.words)} {thing.words}" for thing in behind)
        return f"{text} on {_article(self.background)} {self.background} background"

    @property
    def is_held_out(self) -> bool:
        """Whether it is never trained on: one of its combinations of shape, colour and background is not."""
        return any(is_held_out(thing.shape, thing.colour, self.background) for thing in self.things)

    def render(self, side: int = SIDE) -> np.ndarray:
        """(side, side, 3), uint8."""
        return flatten(self.layers(side))

    def layers(self, side: int = SIDE) -> np.ndarray:
        """(1 + things, side, side, 4), uint8, straight alpha, back to front; the background is opaque."""
        rng = np.random.default_rng(self.seed)
        out = np.zeros((1 + len(self.things), side, side, 4), np.uint8)
        out[0, ..., :3], out[0, ..., 3] = _moved(self.background, rng), 255
        for layer, thing in zip(out[1:], self.things, strict=True):
            layer[..., :3] = _moved(thing.colour, rng)
            layer[..., 3] = np.rint(255 * coverage(thing, side))
        return out


def is_held_out(shape: str, colour: str, background: str) -> bool:
    """Whether this combination is kept for judging."""
    digest = hashlib.sha256(f"{shape} {colour} {background}".encode()).digest()
    return int.from_bytes(digest[:4], "big") < _HELD_OUT * 2**32


def coverage(thing: Thing, side: int = SIDE) -> np.ndarray:
    """How much of each pixel a shape covers: (side, side), float64 in [0, 1]."""
    return np.clip(0.5 - distance(thing, side), 0, 1)


def outline(thing: Thing, width: float, side: int = SIDE) -> np.ndarray:
    """How much of each pixel a shape's outline covers: (side, side), float64 in [0, 1]; its width is in pixels."""
    return np.clip(0.5 + width / 2 - np.abs(distance(thing, side)), 0, 1)


def distance(thing: Thing, side: int = SIDE) -> np.ndarray:
    """Each pixel's distance to a shape, negative inside: (side, side), float64, in pixels."""
    down, across = (np.mgrid[:side, :side] + 0.5) / side
    x, y, r = across - thing.x, down - thing.y, thing.radius
    if thing.shape == "circle":
        found = np.hypot(x, y) - r
    elif thing.shape == "square":
        found = np.maximum(np.abs(x), np.abs(y)) - r * 0.9
    else:  # its tip up, as wide as high
        slope = np.hypot(2, 1)
        found = np.maximum(y - r, (2 * np.abs(x) - (y + r)) / slope)
    return found * side


def flatten(layers: np.ndarray) -> np.ndarray:
    """Layers (n, H, W, 4), uint8, laid over each other: (H, W, 3), uint8; the first is opaque."""
    out = layers[0, ..., :3].astype(np.float64)
    for layer in layers[1:]:
        alpha = layer[..., 3:] / 255
        out = layer[..., :3] * alpha + out * (1 - alpha)
    return np.rint(out).astype(np.uint8)


# Drawing scenes by lot ------------------------------------------------------------------------------------------------


def draw_scene(rng: np.random.Generator, *, things: int = 1, held_out: bool = False, as_told: bool = False) -> Scene:
    """A scene of one or two things, held out or not; captions name size and place as often as not.

    Args:
        rng: draws the lots.
        things: one or two.
        held_out: whether it is one that is never trained on.
        as_told: what a caption does not name is as it would be expected: of middling size, in the middle, and a thing
            behind looks out at the upper left. Otherwise it is anything.
    """
    while True:
        background, *colours = rng.choice(list(COLOURS), 1 + things, replace=False)
        drawn = [_draw_thing(rng, str(colour), n == things - 1, as_told) for n, colour in enumerate(colours)]
        if things == 2:
            drawn = _overlapping(1.25 * np.pi if as_told else rng.uniform(0, 2 * np.pi), *drawn)
        scene = Scene(tuple(drawn), str(background), int(rng.integers(2**31)))
        if scene.is_held_out == held_out:
            return scene


def recolour(scene: Scene, rng: np.random.Generator) -> tuple[Scene, str]:
    """An edit of a one-thing scene: the scene after it, and the instruction."""
    (thing,) = scene.things
    if rng.random() < 0.75:
        colour = str(rng.choice([c for c in COLOURS if c not in (thing.colour, scene.background)]))
        return replace(scene, things=(replace(thing, colour=colour),)), f"make the {thing.shape} {colour}"
    background = str(rng.choice([c for c in COLOURS if c not in (thing.colour, scene.background)]))
    return replace(scene, background=background), f"make the background {background}"


def _draw_thing(rng: np.random.Generator, colour: str, named: bool, as_told: bool) -> Thing:
    size, place = (str(rng.choice(list(words))) for words in (SIZES, PLACES))
    shows_size, shows_place = rng.random(2) < 0.5
    away, wider = (0.02, 0.05) if as_told else (0.05 if shows_place and named else 0.2, 0.2)
    jitter = rng.uniform(-away, away, 2)
    middle = PLACES[place] if shows_place and named else (0.5, 0.5)
    radius = SIZES[size] if shows_size else SIZES[""] * rng.uniform(1 - wider, 1 + wider)
    x, y = (float(np.clip(m + j, radius + 0.02, 0.98 - radius)) for m, j in zip(middle, jitter, strict=True))
    return Thing(
        str(rng.choice(SHAPES)), colour, x, y, float(radius), size if shows_size else "",
        place if shows_place and named else "",
    )  # fmt: skip


def _overlapping(angle: float, back: Thing, front: Thing) -> list[Thing]:
    """The object behind, large; its centre is offset from the front one's in a direction (radians), so both show."""
    radius = 0.24
    x, y = (
        float(np.clip(middle + 0.24 * part, radius + 0.02, 0.98 - radius))
        for middle, part in ((front.x, np.cos(angle)), (front.y, np.sin(angle)))
    )
    return [replace(back, x=x, y=y, radius=radius, size="", place=""), front]


def _moved(colour: str, rng: np.random.Generator) -> np.ndarray:
    return np.clip(np.array(COLOURS[colour]) + rng.integers(-_WOBBLE, _WOBBLE + 1, 3), 0, 255)


def _article(words: str) -> str:
    return "an" if words[0] in "aeiou" else "a"


# Judging images by their pixels -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finding:
    """What an image shows, by plain pixel analysis.

    Attributes:
        background, colour: nearest words of the palette; colour is None if nothing stands out.
        shape: None if nothing stands out.
        x, y: middle of what stands out, as parts of the side.
        mask: (H, W), bool: what stands out.
    """

    background: str
    colour: str | None
    shape: str | None
    x: float
    y: float
    mask: np.ndarray


def analyse(image: np.ndarray) -> Finding:
    """Judges an image of one thing.

    Background: the median colour of the border. Thing: what is far from it. Its colour: the median; its shape by how
    much of its bounding box it fills (square 1, circle pi/4, triangle 1/2), measured on soft coverage.

    Args:
        image: (H, W, 3), uint8.
    """
    pixels = image.astype(np.float64)
    border = np.concatenate([pixels[:2].reshape(-1, 3), pixels[-2:].reshape(-1, 3),
                             pixels[:, :2].reshape(-1, 3), pixels[:, -2:].reshape(-1, 3)])  # fmt: skip
    ground = np.median(border, axis=0)
    far = np.linalg.norm(pixels - ground, axis=-1)
    mask = far > 60
    background = nearest(ground)
    if mask.sum() < 0.01 * mask.size:
        return Finding(background, None, None, 0.5, 0.5, mask)
    colour = np.median(pixels[mask], axis=0)
    soft = np.clip(((pixels - ground) @ (colour - ground)) / np.sum((colour - ground) ** 2), 0, 1)
    inside = soft > 0.5
    rows, cols = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
    if not len(rows):
        return Finding(background, nearest(colour), None, 0.5, 0.5, mask)
    height, width = rows[-1] - rows[0] + 1, cols[-1] - cols[0] + 1
    filled = soft[rows[0] : rows[-1] + 1, cols[0] : cols[-1] + 1].sum() / (height * width)
    shape = "square" if filled > 0.89 else "circle" if filled > 0.65 else "triangle"
    x, y = (cols[0] + cols[-1] + 1) / 2 / image.shape[1], (rows[0] + rows[-1] + 1) / 2 / image.shape[0]
    return Finding(background, nearest(colour), shape, float(x), float(y), mask)


def nearest(colour: Sequence[float]) -> str:
    """The palette's word for a colour."""
    return min(COLOURS, key=lambda name: float(np.sum((np.array(COLOURS[name]) - colour) ** 2)))
