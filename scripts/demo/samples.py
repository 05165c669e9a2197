"""What the demo's transformers are trained on: scenes, edits and layers as latents and encoded prompts.

Everything is encoded once, by the demo's own encoders, and kept in a file. A batch holds prompts of one length, so that
nothing is padded; which samples a step sees follows from its number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import numpy as np
from PIL import Image

from qwen_image_mlx.images.pixels import to_patches
from qwen_image_mlx.models.qwen_image.rope import Segment, place_images
from qwen_image_mlx.pipeline.components import Components
from qwen_image_mlx.sampling.latents import pack_latents, unpack_latents
from qwen_image_mlx.text.prompt import TokenizedPrompt, replace_vision_tokens, tokenize_prompt
from qwen_image_mlx.training.network import Batch
from qwen_image_mlx.weights.snapshot import HubSnapshot

from . import fast
from .autoencoder import to_signed
from .scenes import SIDE, Scene, draw_scene, recolour

GRID = (4, 4)  # an image's tokens
DROPPED = ("", " ")  # what stands for no prompt
CHUNK = 64
EMPTY = np.broadcast_to(np.array([255, 255, 255, 0], np.uint8), (SIDE, SIDE, 4))  # a layer that shows nothing
_FEATURES = (2, 2)  # the vision tower's rows and columns of an image


class Frame:
    """A demo model but for its transformer: what encodes and decodes, frozen.

    Args:
        folder: of the model, or the name of one in the package.
    """

    def __init__(self, folder: Path | str):
        self._parts = Components(HubSnapshot(folder), mx.float32)
        self.template = self._parts.variant.template

    def latents(self, images: np.ndarray) -> np.ndarray:
        """Packed, normalised latents (N, 16, 64), float16, of images (N, H, W, C), uint8."""
        config = self._parts.config("vae")
        mean, std = mx.array(config.latents_mean), mx.array(config.latents_std)
        found = []
        for part in _chunks(images):
            latents, _ = fast.encode(self._parts.network("vae_encoder"), to_signed(part))
            found.append(np.array(pack_latents((latents - mean) / std), np.float16))
        return np.concatenate(found)

    def images(self, latents: mx.array) -> np.ndarray:
        """Images (N, H, W, C), uint8, of packed, normalised latents (N, 16, 64)."""
        config = self._parts.config("vae")
        mean, std = mx.array(config.latents_mean), mx.array(config.latents_std)
        spread = unpack_latents(latents, 2 * GRID[0], 2 * GRID[1]) * std + mean
        out = np.array(fast.decode(self._parts.network("vae_decoder"), spread))
        return np.rint(np.clip(out * 0.5 + 0.5, 0, 1) * 255).astype(np.uint8)

    def features(self, images: np.ndarray) -> np.ndarray:
        """What the text encoder is shown of images: (N, 4, C), float16."""
        parts = self._parts
        config, processor = parts.config("vision"), parts.image_processor
        side = config.patch_size * config.spatial_merge_size * _FEATURES[0]
        found = []
        for image in images:
            patches = to_patches(
                Image.fromarray(image), (side, side), patch=config.patch_size, merge=config.spatial_merge_size,
                mean=processor.image_mean, std=processor.image_std,
            )  # fmt: skip
            features = parts.network("vision")(patches, side // config.patch_size, side // config.patch_size)
            found.append(np.array(features, np.float16))
        return np.stack(found)

    def texts(self, prompts: Sequence[str], features: np.ndarray | None = None) -> list[np.ndarray]:
        """Encoder states of prompts, each (L, C), float16; features (N, 4, C) if each is about an image."""
        grids = [] if features is None else [_FEATURES]
        tokens = [tokenize_prompt(self._parts.tokenizer, self._parts.variant.template, p, grids) for p in prompts]
        found: list[np.ndarray] = [np.empty(0)] * len(prompts)
        for members in by_length([len(t.ids) for t in tokens]).values():
            for part in _chunks(members):
                shown = None if features is None else features[part]
                states = self._states([tokens[n] for n in part], shown)
                for n, state in zip(part, states, strict=True):
                    found[n] = state
        return found

    def _states(self, tokens: Sequence[TokenizedPrompt], features: np.ndarray | None) -> np.ndarray:
        """(N, L, C) of prompts of one length."""
        encoder, first = self._parts.network("text_encoder"), tokens[0]
        embeddings = encoder.embed(mx.array(np.stack([t.ids for t in tokens])))
        if features is not None:
            flat = mx.array(features.astype(np.float32)).flatten(0, 1)
            everywhere = np.tile(first.is_image, len(tokens))
            embeddings = replace_vision_tokens(embeddings.reshape(1, -1, embeddings.shape[-1]), everywhere, flat)
            embeddings = embeddings.reshape(len(tokens), len(first.ids), -1)
        return np.array(encoder(embeddings, mx.array(first.positions))[:, first.first :], np.float16)


@dataclass(frozen=True)
class Samples:
    """Encoded samples of one task.

    Attributes:
        latents: of the target, all its frames (N, F * 16, 64).
        texts: distinct encoder states, each (L, C).
        prompt: (N,) which of `texts` a sample's is.
        dropped: (N, k) which of `texts` are its prompt left away.
        references: (N, 16, 64), or None.
        layered: whether the reference is an image that the frames are layers of.
    """

    latents: np.ndarray
    texts: list[np.ndarray]
    prompt: np.ndarray
    dropped: np.ndarray
    references: np.ndarray | None = None
    layered: bool = False

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The target's frames, then the reference."""
        frames = self.latents.shape[1] // (GRID[0] * GRID[1])
        return tuple(place_images([GRID] * (frames + (self.references is not None)), self.layered))

    @cached_property
    def lengths(self) -> np.ndarray:
        """(N,): tokens of every sample's prompt."""
        return np.array([len(text) for text in self.texts])[self.prompt]

    @cached_property
    def alike(self) -> dict[int, np.ndarray]:
        """The samples, keyed by the number of tokens of their prompts."""
        return by_length(self.lengths)

    def batch(self, rng: np.random.Generator, size: int, drop: float = 0.1) -> Batch:
        """Samples drawn by lot, of one length of prompt; with probability `drop` all of them without their prompt."""
        if rng.random() < drop:
            chosen = rng.integers(len(self.latents), size=size)
            texts = self.dropped[chosen, rng.integers(self.dropped.shape[1])]
        else:
            alike = self.alike[rng.choice(self.lengths)]
            chosen = rng.choice(alike, size)
            texts = self.prompt[chosen]
        return self.at(chosen, texts)

    def at(self, chosen: np.ndarray, texts: np.ndarray) -> Batch:
        """Chosen samples, with given texts of one length."""
        shown = None if self.references is None else _array(self.references[chosen])
        return Batch(
            _array(self.latents[chosen]), _array(np.stack([self.texts[n] for n in texts])), self.segments, shown
        )

    def save(self, path: Path) -> None:
        """Writes an uncompressed .npz."""
        lengths = np.array([len(text) for text in self.texts])
        arrays = {"latents": self.latents, "texts": np.concatenate(self.texts), "lengths": lengths,
                  "prompt": self.prompt, "dropped": self.dropped, "layered": np.array(self.layered)}  # fmt: skip
        if self.references is not None:
            arrays["references"] = self.references
        new = path.with_suffix(".new.npz")
        np.savez(new, **arrays)
        new.replace(path)

    @classmethod
    def load(cls, path: Path) -> Samples:
        """Reads what `save` wrote."""
        with np.load(path) as file:
            arrays = dict(file)
        texts = np.split(arrays["texts"], np.cumsum(arrays["lengths"])[:-1])
        return cls(arrays["latents"], texts, arrays["prompt"], arrays["dropped"], arrays.get("references"),
                   bool(arrays["layered"]))  # fmt: skip


def paintings(frame: Frame, scenes: Sequence[Scene]) -> Samples:
    """Scenes and their captions."""
    texts, prompt, dropped = _captioned(frame, scenes)
    return Samples(frame.latents(rendered(scenes)), texts, prompt, dropped)


def edits(frame: Frame, pairs: Sequence[Edit]) -> Samples:
    """Scenes after an edit, made from the scenes before; the text encoder sees those too."""
    images, count = rendered([pair.before for pair in pairs]), len(pairs)
    features = frame.features(images)
    prompts = [*(pair.instruction for pair in pairs), *[" "] * count]
    texts = frame.texts(prompts, np.concatenate([features, features]))
    target, numbers = frame.latents(rendered([pair.after for pair in pairs])), np.arange(count)
    return Samples(target, texts, numbers, numbers[:, None] + count, frame.latents(images))


def decompositions(frame: Frame, scenes: Sequence[Scene], layers: int) -> Samples:
    """Scenes as they are and in layers, back to front; those left over show nothing."""
    texts, prompt, dropped = _captioned(frame, scenes)
    opaque = np.full((len(scenes), SIDE, SIDE, 1), 255, np.uint8)
    whole = frame.latents(np.concatenate([rendered(scenes), opaque], axis=-1))
    stacks = [[*scene.layers(), *[EMPTY] * layers] for scene in scenes]
    found = [frame.latents(np.stack([stack[n] for stack in stacks])) for n in range(layers)]
    return Samples(np.concatenate([whole, *found], axis=1), texts, prompt, dropped, whole, layered=True)


def _captioned(frame: Frame, scenes: Sequence[Scene]) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """The distinct texts of scenes, which is whose, and which are none's."""
    captions = [scene.caption for scene in scenes]
    distinct = [*DROPPED, *dict.fromkeys(captions)]
    place = {caption: n for n, caption in enumerate(distinct)}
    dropped = np.broadcast_to(np.arange(len(DROPPED)), (len(scenes), len(DROPPED)))
    return frame.texts(distinct), np.array([place[caption] for caption in captions]), dropped


# What is encoded ------------------------------------------------------------------------------------------------------


class Edit(NamedTuple):
    """A scene, the scene after an edit, and the instruction."""

    before: Scene
    after: Scene
    instruction: str


def draw_scenes(
    count: int, seed: int, most_things: int = 2, held_out: bool = False, as_told: bool = False
) -> list[Scene]:
    """Scenes drawn by lot as `draw_scene` does; where there may be two things, every third has them."""
    rng = np.random.default_rng([seed, 1])
    things = [2 if n % 3 == 2 <= most_things else 1 for n in range(count)]
    return [draw_scene(rng, things=n, held_out=held_out, as_told=as_told) for n in things]


def draw_edits(count: int, seed: int, held_out: bool = False) -> list[Edit]:
    """Edits drawn by lot; neither side of one that is not held out is."""
    rng = np.random.default_rng([seed, 2])
    found: list[Edit] = []
    while len(found) < count:
        before = draw_scene(rng, held_out=held_out)
        after, instruction = recolour(before, rng)
        if held_out or not after.is_held_out:
            found.append(Edit(before, after, instruction))
    return found


def rendered(scenes: Sequence[Scene]) -> np.ndarray:
    """(N, H, W, 3), uint8."""
    return np.stack([scene.render() for scene in scenes])


def by_length(lengths: Sequence[int]) -> dict[int, np.ndarray]:
    """By a length, the numbers of those that have it."""
    lengths = np.asarray(lengths)
    return {int(length): np.flatnonzero(lengths == length) for length in np.unique(lengths)}


def _chunks(values: np.ndarray) -> list[np.ndarray]:
    return [values[n : n + CHUNK] for n in range(0, len(values), CHUNK)]


def _array(values: np.ndarray) -> mx.array:
    return mx.array(values.astype(np.float32))
