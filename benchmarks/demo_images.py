"""What the benchmarks of steps share: the demo's images of scenes it was never trained on, and how alike two are."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

_SEED = 12  # of the scenes; not that of the images which the training was watched with
_WINDOW = 7  # pixels of SSIM's squares


@dataclass
class Images:
    """Images (N, 64, 64, 3), uint8, their latents, and what they took.

    Attributes:
        images, latents: of each scene, in order.
        seconds: of denoising, all together.
        run, skipped: passes of all.
    """

    images: list[np.ndarray] = field(default_factory=list)
    latents: list[np.ndarray] = field(default_factory=list)
    seconds: float = 0.0
    run: int = 0
    skipped: int = 0


class Demo:
    """The shipped text model, fp32, and scenes for it.

    Args:
        count: number of scenes.
    """

    def __init__(self, count: int):
        from demo.samples import draw_scenes

        from qwen_image_mlx import QwenImagePipeline

        self.scenes = draw_scenes(count, _SEED, most_things=1, held_out=True, as_told=True)
        self.pipeline = QwenImagePipeline.from_pretrained("demo", dtype="float32")
        self.encodings = [self.pipeline.encode_guidance_prompts(scene.caption, " ") for scene in self.scenes]

    def generate(self, **options: Any) -> Images:
        """All scenes with some fields of `GenerationParameters`; the seed is the scene's number."""
        import mlx.core as mx

        from qwen_image_mlx import GenerationParameters
        from qwen_image_mlx.images.pixels import to_images

        parameters = GenerationParameters(width=64, height=64, cfg_scale=options.pop("cfg_scale", 3.0), **options)
        found = Images()
        for seed, encoding in enumerate(self.encodings):
            begun = time.perf_counter()
            latents = self.pipeline.denoise_latents(parameters, encoding, seed=seed)
            found.seconds += time.perf_counter() - begun
            passes = self.pipeline.components.passes
            found.run, found.skipped = found.run + passes.run, found.skipped + passes.skipped
            found.latents.append(np.array(latents.astype(mx.float32)))
            (frame,) = self.pipeline.decode_frames(parameters, latents)
            found.images.append(np.asarray(to_images(frame[None])[0]))
        return found

    def right(self, found: Images) -> float:
        """Part of the images whose colour, background, shape and place are right."""
        from demo.judge import judge_paintings

        return judge_paintings(np.stack(found.images), self.scenes)["right"]


def alike(ours: Images, theirs: Images) -> tuple[float, float]:
    """Mean SSIM and mean PSNR in dB of two sets of images."""
    from demo.judge import psnr

    pairs = list(zip(ours.images, theirs.images, strict=True))
    return float(np.mean([ssim(a, b) for a, b in pairs])), float(np.mean([psnr(a, b) for a, b in pairs]))


def latent_error(ours: Images, theirs: Images) -> float:
    """Mean over images of the root mean square of the latents' difference, over that of the latents."""
    return float(
        np.mean([
            np.sqrt(np.mean((a - b) ** 2) / np.mean(b**2)) for a, b in zip(ours.latents, theirs.latents, strict=True)
        ])
    )  # fmt: skip


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Structural similarity of two uint8 images (H, W, C), 1 where they are equal, by uniform 7x7 squares of luma.

    Source: Wang et al. 2004, with K1 0.01, K2 0.03.
    """
    weights = np.array([0.299, 0.587, 0.114])
    x, y = (np.lib.stride_tricks.sliding_window_view(i @ weights, (_WINDOW, _WINDOW)) for i in (a, b))
    mean_x, mean_y = x.mean(axis=(2, 3)), y.mean(axis=(2, 3))
    var_x, var_y = x.var(axis=(2, 3)), y.var(axis=(2, 3))
    both = (x * y).mean(axis=(2, 3)) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    top = (2 * mean_x * mean_y + c1) * (2 * both + c2)
    return float((top / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))).mean())


def percent(part: float, whole: Sequence[Any]) -> str:
    """A part of some images, as a count."""
    return f"{round(part * len(whole))} of {len(whole)}"
