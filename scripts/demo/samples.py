"""What the demo's transformers are trained on: scenes, edits and layers as latents and encoded prompts.

Everything is encoded once, by the demo's own encoders, and kept in a file. A batch holds prompts of one length, so that
nothing is padded; which samples a step sees follows from its number.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np
from PIL import Image

from qwen_image_mlx.images.pixels import to_patches
from qwen_image_mlx.models.rope import Segment, place_images
from qwen_image_mlx.pipeline.components import Components
from qwen_image_mlx.sampling.latents import pack_latents
from qwen_image_mlx.text.prompt import TokenizedPrompt, replace_vision_tokens, tokenize_prompt
from qwen_image_mlx.training.network import Batch
from qwen_image_mlx.weights.snapshot import HubSnapshot

from . import fast
from .autoencoder import to_signed
from .scenes import Scene, draw_scene, recolour

GRID = (4, 4)  # a picture's tokens
DROPPED = ("", " ")  # what stands for no prompt
CHUNK = 64
_FEATURES = (2, 2)  # the vision tower's rows and columns of a picture


class Encoders:
    """The frozen parts of a demo model.

    Args:
        folder: of the model; it needs no transformer yet.
    """

    def __init__(self, folder: Path):
        self._parts = Components(HubSnapshot(folder), mx.float32)
        self.channels = self._parts.vae_config.input_channels

    def latents(self, pictures: np.ndarray) -> np.ndarray:
        """Packed, normalised latents (N, 16, 64), float16, of pictures (N, H, W, C), uint8."""
        config = self._parts.vae_config
        mean, std = mx.array(config.latents_mean), mx.array(config.latents_std)
        found = []
        for part in _chunks(pictures):
            latents, _ = fast.encode(self._parts.vae_encoder, to_signed(part))
            found.append(np.array(pack_latents((latents - mean) / std), np.float16))
        return np.concatenate(found)

    def features(self, pictures: np.ndarray) -> np.ndarray:
        """What the text encoder is shown of pictures: (N, 4, C), float16."""
        parts = self._parts
        config, processor = parts.vision_config, parts.image_processor
        side = config.patch_size * config.spatial_merge_size * _FEATURES[0]
        found = []
        for picture in pictures:
            shown = Image.fromarray(picture).resize((384, 384), Image.Resampling.LANCZOS)
            patches = to_patches(
                shown, (side, side), patch=config.patch_size, merge=config.spatial_merge_size,
                mean=processor.image_mean, std=processor.image_std,
            )  # fmt: skip
            features = parts.vision(patches, side // config.patch_size, side // config.patch_size)
            found.append(np.array(features, np.float16))
        return np.stack(found)

    def texts(self, prompts: Sequence[str], features: np.ndarray | None = None) -> list[np.ndarray]:
        """Encoder states of prompts, each (L, C), float16; features (N, 4, C) if each is about a picture."""
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
        encoder, first = self._parts.text_encoder, tokens[0]
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
        layered: whether the reference is a picture that the frames are layers of.
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

    def batch(self, rng: np.random.Generator, size: int, drop: float = 0.1) -> Batch:
        """Samples drawn by lot, of one length of prompt; with probability `drop` all of them without their prompt."""
        if rng.random() < drop:
            chosen = rng.integers(len(self.latents), size=size)
            texts = self.dropped[chosen, rng.integers(self.dropped.shape[1])]
        else:
            lengths = np.array([len(self.texts[n]) for n in self.prompt])
            alike = np.flatnonzero(lengths == rng.choice(lengths))
            chosen = rng.choice(alike, size)
            texts = self.prompt[chosen]
        return self.at(chosen, texts)

    def at(self, chosen: np.ndarray, texts: np.ndarray) -> Batch:
        """Some samples, with given texts of one length."""
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


def paintings(encoders: Encoders, count: int, seed: int, held_out: bool = False) -> Samples:
    """Scenes and their captions; a third of them of two things."""
    rng = np.random.default_rng([seed, 1])
    scenes = [draw_scene(rng, things=1 + (n % 3 == 2), held_out=held_out) for n in range(count)]
    latents = encoders.latents(_rendered(scenes))
    captions = [scene.caption for scene in scenes]
    distinct = [*DROPPED, *dict.fromkeys(captions)]
    place = {caption: n for n, caption in enumerate(distinct)}
    dropped = np.broadcast_to(np.arange(len(DROPPED)), (count, len(DROPPED)))
    return Samples(latents, encoders.texts(distinct), np.array([place[c] for c in captions]), dropped)


def edits(encoders: Encoders, count: int, seed: int, held_out: bool = False) -> Samples:
    """Scenes of one thing with a new colour, made from the scenes before; the text encoder sees those too."""
    rng = np.random.default_rng([seed, 2])
    before = [draw_scene(rng, held_out=held_out) for _ in range(count)]
    after, instructions = zip(*(_edit(scene, rng, held_out) for scene in before), strict=True)
    pictures = _rendered(before)
    features = encoders.features(pictures)
    texts = encoders.texts([*instructions, *[" "] * count], np.concatenate([features, features]))
    numbers = np.arange(count)
    return Samples(
        encoders.latents(_rendered(after)), texts, numbers, (numbers + count)[:, None], encoders.latents(pictures)
    )


def decompositions(encoders: Encoders, count: int, seed: int, frames: int, held_out: bool = False) -> Samples:
    """Scenes as they are and in layers, back to front; those left over show nothing."""
    rng = np.random.default_rng([seed, 3, frames])
    scenes = [draw_scene(rng, things=int(rng.integers(1, min(3, frames))), held_out=held_out) for _ in range(count)]
    pictures = np.concatenate([_rendered(scenes), np.full((count, *_rendered(scenes[:1]).shape[1:3], 1), 255)], axis=-1)
    whole = encoders.latents(pictures.astype(np.uint8))
    layers = [whole]
    stacks = [scene.layers() for scene in scenes]
    for n in range(frames):
        layers.append(encoders.latents(np.stack([s[n] if n < len(s) else empty_layer(s[0].shape) for s in stacks])))
    captions = [scene.caption for scene in scenes]
    distinct = [*DROPPED, *dict.fromkeys(captions)]
    place = {caption: n for n, caption in enumerate(distinct)}
    dropped = np.broadcast_to(np.arange(len(DROPPED)), (count, len(DROPPED)))
    return Samples(
        np.concatenate(layers, axis=1), encoders.texts(distinct), np.array([place[c] for c in captions]), dropped,
        whole, layered=True,
    )  # fmt: skip


def empty_layer(shape: tuple[int, int, int]) -> np.ndarray:
    """A layer that shows nothing: white, transparent."""
    return np.broadcast_to(np.array([255, 255, 255, 0], np.uint8), shape)


def by_length(lengths: Iterable[int]) -> dict[int, np.ndarray]:
    """Numbers of the members of each length."""
    lengths = np.array(list(lengths))
    return {int(length): np.flatnonzero(lengths == length) for length in np.unique(lengths)}


def _edit(scene: Scene, rng: np.random.Generator, held_out: bool) -> tuple[Scene, str]:
    """An edit whose outcome is held out, or is not, as asked."""
    while True:
        after, instruction = recolour(scene, rng)
        if after.is_held_out <= held_out:
            return after, instruction


def _rendered(scenes: Sequence[Scene]) -> np.ndarray:
    return np.stack([scene.render() for scene in scenes])


def _chunks(values: np.ndarray) -> list[np.ndarray]:
    return [values[n : n + CHUNK] for n in range(0, len(values), CHUNK)]


def _array(values: np.ndarray) -> mx.array:
    return mx.array(values.astype(np.float32))
