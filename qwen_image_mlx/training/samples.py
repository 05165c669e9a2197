"""Images that show how far a training run is: its own pipeline, generation with the weights as they are."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map
from PIL import Image

from ..errors import CheckpointError
from ..images.colour import profiles_are_ignored
from ..images.files import save_png
from ..images.geometry import size_of_area
from ..images.pixels import to_images
from ..images.sources import open_rgba
from ..models.qwen_image.modulation import TimeModulation
from ..models.qwen_image.transformer import Modulation
from ..pipeline.components import Components
from ..pipeline.conditioning import GuidanceEncoding
from ..pipeline.parameters import GenerationParameters
from ..pipeline.pipeline import QwenImagePipeline
from ..pipeline.progress import ProgressCallback
from ..pipeline.qwen_image.denoiser import TrainedDenoisers
from ..pipeline.reporter import Reporter
from ..variants import recommended_negative_prompt
from .examples import Example
from .network import Network

STEPS = 20  # at most: enough to judge by
_GAP = 8


def painter_of(components: Components, network: Network, progress: ProgressCallback | None = None) -> QwenImagePipeline:
    """A pipeline whose transformer is being trained.

    Args:
        components: those the network's transformer is one of.
        network: what is trained; its modulation is used where it has one.
        progress: told of the images' steps.
    """
    denoiser = None
    if "modulation" in network:
        denoiser = TrainedDenoisers(partial(rows_of_steps, network.modulation, dtype=components.dtype))
    return QwenImagePipeline(components, Reporter(progress), denoiser)


def rows_of_steps(modulation: TimeModulation, sigmas: np.ndarray, dtype: mx.Dtype) -> list[Modulation]:
    """The modulation at every noise level (S,), as `modulation_table` makes it from files."""
    rows = modulation(mx.array(sigmas), dtype)
    mx.eval(rows)

    def of_step(step: int) -> Modulation:
        return tree_map(lambda row: row[step, 0] if row.ndim == 3 else row, rows)

    table = [of_step(step) for step in range(len(sigmas))]
    mx.eval(table)
    return table


class Samples:
    """What is generated every so often: encoded once, so that no encoder comes back.

    Args:
        pipeline: of the model that is trained; its encoders are used here.
        example: gives the images an editing or layered model works on, and its caption where there are no prompts.
        prompts: what the samples show.
        resolution: they have about resolution² pixels.
        folder: where encodings are kept.
        seed: of the noise.
    """

    def __init__(
        self,
        pipeline: QwenImagePipeline,
        example: Example,
        prompts: Sequence[str],
        resolution: int,
        folder: Path,
        seed: int,
    ):
        variant, recommended = pipeline.variant, pipeline.recommended
        images = {"generate": (), "edit": example.sources, "decompose": (example.image,)}[variant.task]
        size = size_of_area(resolution**2, open_rgba(images[0]).size) if images else (resolution, resolution)
        self._parameters = GenerationParameters(
            width=size[0],
            height=size[1],
            num_inference_steps=min(STEPS, recommended.num_inference_steps),
            cfg_scale=recommended.cfg_scale,
            shift=recommended.shift,
            num_layers=len(example.layers) or 1,
        )
        negative = recommended_negative_prompt(variant, pipeline.model) if recommended.cfg_scale > 1 else None
        self._seed, self._encodings = seed, []
        for prompt in prompts or (example.caption,):
            key = (
                prompt,
                negative,
                [str(image) for image in images],
                resolution,
                pipeline.fingerprint,
                profiles_are_ignored(),
            )
            path = folder / f"sample-{hashlib.sha256(repr(key).encode()).hexdigest()[:32]}.safetensors"
            try:
                encoding = GuidanceEncoding.load(path)
            except CheckpointError:
                encoding = pipeline.encode_guidance_prompts(
                    prompt, negative, images=images, reference_pixels=resolution**2 if images else None
                )
                folder.mkdir(parents=True, exist_ok=True)
                encoding.save(path)
            self._encodings.append(encoding)

    def generate(self, painter: QwenImagePipeline, path: Path) -> Path:
        """Generates and saves all of them, side by side; layers under each other.

        Raises:
            OutputError: the file could not be written.
        """
        columns = []
        for encoding in self._encodings:
            pixels = painter.generate_pixels(self._parameters, encoding, seed=self._seed)
            columns.append([frame.convert("RGBA") for frame in to_images(pixels)])
        painter.release_vae()
        return save_png(side_by_side(columns), path, {"prompts": [e.source.prompt for e in self._encodings]})


def side_by_side(columns: Sequence[Sequence[Image.Image]]) -> Image.Image:
    """Images of one size as columns, on white, RGB; `Samples` has a column for each prompt."""
    width, height = columns[0][0].size
    rows = max(map(len, columns))
    size = (len(columns) * (width + _GAP) - _GAP, rows * (height + _GAP) - _GAP)
    sheet = Image.new("RGB", size, "white")
    for x, column in enumerate(columns):
        for y, image in enumerate(column):
            sheet.paste(image, (x * (width + _GAP), y * (height + _GAP)), image)
    return sheet
