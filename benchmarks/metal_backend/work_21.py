"""The work of Qwen-Image-2.1, traced at the released model's real shapes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import mlx.core as mx
import numpy as np

from qwen_image_mlx.gpu import Pace
from qwen_image_mlx.models.qwen3_vl import text, vision
from qwen_image_mlx.models.qwen3_vl.config import TextEncoderConfig, VisionConfig
from qwen_image_mlx.models.qwen_image_21 import transformer, vae
from qwen_image_mlx.models.qwen_image_21.config import TransformerConfig, VAEConfig
from qwen_image_mlx.models.qwen_image_21.denoiser import Condition, Denoiser, Reference
from qwen_image_mlx.pipeline import autoencode
from qwen_image_mlx.sampling.denoise import denoise
from qwen_image_mlx.sampling.guidance import Guidance
from qwen_image_mlx.sampling.schedule import Schedule

from .graph import Graph, blank, blank_module, trace

DTYPE = mx.bfloat16
GUIDANCE = Guidance(4.0, False)


def forward(
    grid: tuple[int, int],
    texts: Sequence[int],
    references: Sequence[tuple[int, int]] = (),
    blocks: int = 6,
    steps: int = 1,
    keep: bool = True,
) -> Graph:
    """Denoising steps as the pipeline runs them, block by block (`gpu.Pace`); the first computes the prefix.

    Args:
        grid: rows and columns of the target's latents.
        texts: tokens of the prompt, without its images, and of the negative prompt.
        references: rows and columns of each reference's latents.
        blocks: with 6, peak and buffers are those of 32 but for what is kept.
        steps: how many.
        keep: whether the prefix is kept between steps.
    """
    config = TransformerConfig(num_layers=blocks)
    model = blank_module(transformer.Transformer(config), DTYPE)
    rows = transformer.Rows(*(blank((config.dim,), DTYPE) for _ in transformer.Rows._fields))
    places = [height * width // 4 for height, width in references]
    starts = [8 + sum(places[:n]) + 8 * n for n in range(len(places))]
    shown = [Reference(blank((1, h * w, config.in_channels), DTYPE), h, w) for h, w in references]

    def run() -> mx.array:
        states = [blank((1, n + sum(places), config.context_in_dim), DTYPE) for n in texts]
        made = Denoiser(
            model, config, table=[rows] * steps, still=rows, references=shown, grid=grid, dtype=DTYPE, keep_prefix=keep,
            conditions=[Condition(one, starts) for one in states],
        )  # fmt: skip
        mx.eval(made.prepared)
        pace = Pace()
        schedule = Schedule(np.linspace(1, 0, steps + 1, dtype=np.float32))
        guidance = GUIDANCE if len(texts) > 1 else None
        noise = blank((1, grid[0] * grid[1], config.in_channels), DTYPE)
        return denoise(lambda x, step, _: made.velocities(x, step, pace), noise, schedule, guidance)

    return trace(run)


@cache
def decode(width: int, height: int, strips: int | None = None) -> Graph:
    """Latents to an image in pixels."""
    config = VAEConfig()
    decoder = blank_module(vae.Decoder(config), mx.float32)
    latents = blank((1, height // 16, width // 16, config.z_dim), mx.float32)
    return trace(autoencode.decode, decoder, config, latents, strips)


def encode(width: int, height: int) -> Graph:
    """An image in pixels to latents."""
    config = VAEConfig()
    encoder = blank_module(vae.Encoder(config), mx.float32)
    return trace(autoencode.encode_mode, encoder, config, blank((1, height, width, 4), mx.float32))


def language(prompts: Sequence[int], layers: int = 6) -> Graph:
    """Layers of the text encoder for prompts of these lengths in tokens; with 6 the peak is that of 36."""
    config = replace(TextEncoderConfig(), num_hidden_layers=layers)
    model = blank_module(text.TextEncoder(config), DTYPE)
    given = [text.Prompt(blank((1, n, config.hidden_size), DTYPE), blank((3, n), mx.int32)) for n in prompts]
    return trace(lambda: model.together(given, Pace()))


def tower(height: int, width: int, layers: int = 8) -> Graph:
    """The vision tower for a grid of patches; with 8 blocks the peak is that of 27."""
    config = replace(VisionConfig(), depth=layers, deepstack_visual_indexes=(2, 4, 6))
    model = blank_module(vision.VisionTower(config), DTYPE)
    patches = blank((height * width, config.patch_pixels), DTYPE)
    return trace(lambda: model(patches, height, width, Pace()))
