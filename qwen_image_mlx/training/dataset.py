"""Examples as latents and text encodings: made once by the pipeline's own encoders, kept on disk, drawn in batches.

An entry's name is a hash of all it depends on, so that a change of an image, a caption or the model makes a new one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import mlx.core as mx
from PIL import Image, ImageOps

from ..errors import CheckpointError, OutputError, QwenImageError, RequestError, some
from ..files import reason
from ..gpu import all_finite
from ..images.colour import profiles_are_ignored
from ..images.formats import check_file
from ..images.geometry import Size, size_of_area
from ..images.pixels import to_pixels
from ..images.sources import open_rgba
from ..pipeline.autoencode import encode_mode
from ..pipeline.encode import open_for
from ..pipeline.pipeline import QwenImagePipeline
from ..pipeline.progress import Progress, ProgressCallback
from ..registry import TEXT_ENCODER, TRANSFORMER, VAE, VAE_ENCODER
from ..weights.safetensors_files import load_tensors, read_header, save_tensors
from .examples import Example, bucket_of, buckets_of
from .loss import key_of
from .network import Batch
from .seam import Segments, trainable_of

_FORMAT = "qwen_image_mlx.example.1"
_ENLARGED = 1.1  # maximum enlargement of an image, along a side
DROPPED = " "  # replaces a dropped caption; the reference's pipelines write an empty prompt so


@dataclass(frozen=True)
class _Entry:
    """An encoded example: its file, and what a batch must have in common."""

    path: Path
    segments: Segments
    tokens: int
    dropped_tokens: int

    def load(self, dropped: bool) -> Batch:
        try:
            arrays, _ = load_tensors(self.path)
            text = arrays["dropped" if dropped else "text"]
            return Batch(arrays["latents"], text, self.segments, arrays.get("references"))
        except (OSError, RuntimeError, KeyError) as error:
            raise CheckpointError(
                f"{self.path} is gone or damaged ({error}): resume the run to make it again"
            ) from error


class Dataset:
    """Encoded examples, and the batches of every step.

    Args:
        entries: by example.
        seed: of their order, which differs in every epoch, and of the dropped captions.
        batch_size: maximum samples of a batch.
        accumulate: a step has `accumulate` times `batch_size` samples.
        caption_dropout: share of samples without their caption.
    """

    def __init__(
        self, entries: Sequence[_Entry], seed: int, batch_size: int, accumulate: int = 1, caption_dropout: float = 0.0
    ):
        self._entries, self._seed, self._size = tuple(entries), seed, batch_size
        self._samples, self._dropout = batch_size * accumulate, caption_dropout
        self._order: tuple[int, list[int]] = (-1, [])

    def __len__(self) -> int:
        return len(self._entries)

    def batches(self, step: int) -> list[Batch]:
        """The batches of a step, as few as the samples' shapes allow."""
        return [Batch.join([entry.load(drop) for entry, drop in group]) for group in self._groups(step)]

    def batch_sizes(self, step: int) -> list[int]:
        """How many samples each of a step's batches has."""
        return [len(group) for group in self._groups(step)]

    def _groups(self, step: int) -> list[list[tuple[_Entry, bool]]]:
        shapes: dict[tuple, list[tuple[_Entry, bool]]] = {}
        for position in range(step * self._samples, (step + 1) * self._samples):
            entry, drop = self._entries[self._example(position)], self._drops(position)
            shape = entry.segments, entry.dropped_tokens if drop else entry.tokens
            shapes.setdefault(shape, []).append((entry, drop))
        return [same[n : n + self._size] for same in shapes.values() for n in range(0, len(same), self._size)]

    def _example(self, position: int) -> int:
        epoch, place = divmod(position, len(self._entries))
        if self._order[0] != epoch:
            order = mx.random.permutation(len(self._entries), key=key_of(self._seed, "order", epoch))
            self._order = epoch, order.tolist()
        return self._order[1][place]

    def _drops(self, position: int) -> bool:
        if not self._dropout:
            return False
        return mx.random.uniform(key=key_of(self._seed, "caption", position)).item() < self._dropout


def check_images(
    examples: Sequence[Example], task: str, resolution: int, report: Callable[[Progress], None], multiple: int = 16
) -> None:
    """Decodes every image once, before any model is loaded.

    Raises:
        RequestError: one cannot be read, is too small for the resolution, or a layer's size differs from its image's.
    """
    small, unequal = [], []
    for n, example in enumerate(examples):
        sizes = {file: open_rgba(file).size for file in example.files}
        size = sizes[example.image]
        target = target_size(size, task, resolution, multiple)
        if max(want / have for want, have in zip(target, size, strict=True)) > _ENLARGED:
            small.append(f"{example.image.name} ({size[0]}x{size[1]})")
        unequal += [f"{file} ({sizes[file][0]}x{sizes[file][1]})" for file in example.layers if sizes[file] != size]
        report(Progress("check", n + 1, len(examples), "images"))
    if small:
        raise RequestError(
            f"{len(small)} of {len(examples)} images are smaller than the {resolution}x{resolution} pixels that "
            f"the resolution {resolution} trains on: {some(small)}; lower it, or remove them"
        )
    if unequal:
        raise RequestError(f"{len(unequal)} layers differ in size from their image: {some(unequal)}")


def target_size(size: Size, task: str, resolution: int, multiple: int = 16) -> Size:
    """(width, height) at which an image is trained on.

    For text to image, the bucket with the nearest aspect; otherwise the pipeline's size for a result of that area, so
    that image and result have the same size.
    """
    return bucket_of(size, buckets_of(resolution, multiple)) if task == "t2i" else size_of_area(resolution**2, size)


def encode_examples(
    pipeline: QwenImagePipeline,
    examples: Sequence[Example],
    task: str,
    resolution: int,
    with_dropped: bool,
    folder: Path,
    progress: ProgressCallback | None = None,
) -> list[_Entry]:
    """Encodes the examples that are not encoded yet, and releases the encoders.

    Args:
        pipeline: of the model being trained.
        examples: images and captions.
        task: "t2i", "edit" or "layered".
        resolution: images are encoded at about resolution² pixels.
        with_dropped: encode each example without its caption too.
        folder: where the entries are kept.
        progress: called for every example.

    Raises:
        RequestError: an image cannot be read, or is too small.
        QwenImageError: an encoding is not finite.
        OutputError: an entry could not be written.
    """
    report = progress or (lambda _: None)
    made_by = (_FORMAT, task, resolution, with_dropped, pipeline.fingerprint, str(pipeline.dtype),
               str(pipeline.quantization), profiles_are_ignored())  # fmt: skip
    paths = [folder / f"{_digest(example, made_by)}.safetensors" for example in examples]
    widths = pipeline.components.config(TRANSFORMER).in_channels, pipeline.components.config(TEXT_ENCODER).hidden_size
    entries = [_read_entry(path, widths) for path in paths]
    new = [n for n, entry in enumerate(entries) if entry is None]
    if new:
        check_images([examples[n] for n in new], task, resolution, report, pipeline.variant.size_multiple)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"cannot write {folder}: {reason(error)}") from error
        pipeline.components.load(VAE_ENCODER, TEXT_ENCODER)  # reported, unlike the encoding calls below
        shared = None  # without images all dropped captions are one
        if with_dropped and not pipeline.variant.takes_images:
            shared = pipeline.encode_guidance_prompts(DROPPED, progress=_no_report).positive
        for done, n in enumerate(new, start=1):
            _encode(pipeline, examples[n], task, resolution, with_dropped, shared, paths[n])
            report(Progress("encode", done, len(new), "examples"))
        pipeline.release_encoders()
        entries = [_read_entry(path, widths) for path in paths]
        if lost := [path for path, entry in zip(paths, entries, strict=True) if entry is None]:
            raise OutputError(f"{some(lost)} could not be read after it was written: check the disk")
    return entries


def _encode(
    pipeline: QwenImagePipeline,
    example: Example,
    task: str,
    resolution: int,
    with_dropped: bool,
    shared: mx.array | None,
    path: Path,
) -> None:
    parts = pipeline.components
    layered = task == "layered"
    frames = [open_for(parts, file) for file in (example.image, *example.layers)]
    size = target_size(frames[0].size, task, resolution, pipeline.variant.size_multiple)
    fit = partial(ImageOps.fit, size=size, method=Image.Resampling.LANCZOS) if task == "t2i" else (lambda image: image)
    encode = partial(encode_mode, parts.network(VAE_ENCODER), parts.config(VAE))
    latents = mx.stack([encode(to_pixels(fit(frame), size))[0] for frame in frames])[None]
    space = pipeline.latent_space
    conditions = (frames[0],) if layered else example.sources
    encoding = pipeline.encode_guidance_prompts(
        example.caption,
        DROPPED if with_dropped and shared is None else None,
        images=conditions,
        reference_pixels=resolution**2 if conditions else None,
        progress=_no_report,
    )
    arrays, references = {"latents": space.pack_frames(latents), "text": encoding.positive}, encoding.references
    if with_dropped:
        arrays["dropped"] = encoding.negative if shared is None else shared
    if references:
        arrays["references"] = mx.concatenate([reference.latents for reference in references], axis=1)
    if not all_finite(arrays["latents"]):
        raise QwenImageError(f"the latents of {example.image} are not finite: check the autoencoder's weights")
    grids = [space.grid(*size)] * len(frames)
    segments = trainable_of(pipeline).segments(parts.config(TRANSFORMER), grids, references)
    metadata = {"format": _FORMAT, "segments": json.dumps(segments)}
    save_tensors(path, arrays, metadata)


def _no_report(progress: Progress) -> None:
    """Ignores the progress of short calls, which are reported together."""


def _read_entry(path: Path, widths: tuple[int, int]) -> _Entry | None:
    """An entry by its header; None if it is missing, damaged, or of other widths than the model's (latents, text)."""
    try:
        tensors, metadata = read_header(path) if path.is_file() else ({}, {})
        if metadata.get("format") != _FORMAT:
            return None
        segments = tuple(_triple(*segment) for segment in json.loads(metadata["segments"]))
        lengths = {name: tensors[name].shape[1] for name in ("text", "dropped", "references") if name in tensors}
        own = sum(height * width for _, height, width in segments) - lengths.get("references", 0)
        expected = {"latents": (1, own, widths[0]), "text": (1, lengths["text"], widths[1])}
        expected |= {"dropped": (1, lengths["dropped"], widths[1])} if "dropped" in lengths else {}
        expected |= {"references": (1, lengths["references"], widths[0])} if "references" in lengths else {}
        if own <= 0 or {name: tensor.shape for name, tensor in tensors.items()} != expected:
            return None
        return _Entry(path, segments, lengths["text"], lengths.get("dropped", 0))
    except (CheckpointError, IndexError, KeyError, TypeError, ValueError, RecursionError):
        return None


def _triple(place: int, height: int, width: int) -> tuple[int, int, int]:
    return place, height, width


def digest_of(examples: Sequence[Example]) -> str:
    """A hash of all images and captions, in their order."""
    return hashlib.sha256(repr([_digest(example, ()) for example in examples]).encode()).hexdigest()[:32]


def _digest(example: Example, made_by: tuple) -> str:
    digest = hashlib.sha256(repr((made_by, example.caption, [len(example.sources), len(example.layers)])).encode())
    for file in example.files:
        try:
            check_file(file, str(file))
            digest.update(hashlib.sha256(file.read_bytes()).digest())
        except OSError as error:
            raise RequestError(f"{file} cannot be read: {reason(error)}") from error
    return digest.hexdigest()[:32]
