"""Our own work, traced at the released models' real shapes: blocks, forward passes, encoders, the autoencoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import mlx.core as mx
import numpy as np

from qwen_image_mlx.gpu import Pace
from qwen_image_mlx.models.qwen2_5_vl import text as text_encoder
from qwen_image_mlx.models.qwen2_5_vl import vision
from qwen_image_mlx.models.qwen_image import transformer, vae
from qwen_image_mlx.models.qwen_image.config import TransformerConfig, VAEConfig
from qwen_image_mlx.models.rotary import Rotary
from qwen_image_mlx.pipeline import autoencode
from qwen_image_mlx.sampling.denoise import denoise
from qwen_image_mlx.sampling.guidance import Guidance
from qwen_image_mlx.sampling.schedule import Schedule
from qwen_image_mlx.weights.synthetic import FULL

from .graph import Graph, blank, blank_module, trace

DTYPE = mx.bfloat16
GUIDANCE = Guidance(4.0, True)


def block(image: int, text: int, references: int = 0, dtype: mx.Dtype = DTYPE) -> Graph:
    """One block of the transformer, by tokens of the image, of the prompt and of all references."""
    config = TransformerConfig()
    module = blank_module(transformer.TransformerBlock(config, False), dtype)
    images = [blank((1, n, config.dim), dtype) for n in (image, references) if n]
    tables = _rotary(config, image + text + references)
    return trace(module, images, blank((1, text, config.dim), dtype), _rows(config, dtype), tables)


def forward(image: int, texts: Sequence[int], references: int = 0, blocks: int = 6, steps: int = 1) -> Graph:
    """Denoising steps as the pipeline runs them, with one text or, guided, with two; block by block (`gpu.Pace`).

    With 6 blocks peak and buffers are those of 60: there are never more than three blocks' arrays at once.
    """
    config = TransformerConfig(num_layers=blocks)
    model = blank_module(transformer.Transformer(config), DTYPE)
    modulation = transformer.Modulation(
        [_rows(config, DTYPE)] * blocks, [blank((config.dim,), DTYPE), blank((config.dim,), DTYPE)]
    )
    prompts = [blank((1, n, config.dim), DTYPE) for n in texts]
    tables = [_rotary(config, n + image + references) for n in texts]
    shown = blank((1, references, config.dim), DTYPE) if references else None
    pace = Pace()

    def step(latents: mx.array, _: int, __: int) -> list[mx.array]:
        return model.velocities(latents, prompts, modulation, tables, shown, on_layer=pace)

    guidance = GUIDANCE if len(texts) > 1 else None
    schedule = Schedule(np.linspace(1, 0, steps + 1, dtype=np.float32))
    return trace(denoise, step, blank((1, image, config.in_channels), DTYPE), schedule, guidance)


@cache
def decode(width: int, height: int, strips: int | None = None) -> Graph:
    """Latents to an image in pixels, as `pipeline/autoencode.py` does it."""
    config = VAEConfig()
    decoder = blank_module(vae.Decoder(config), mx.float32)
    latents = blank((1, height // 8, width // 8, config.z_dim), mx.float32)
    return trace(autoencode.decode, decoder, config, latents, strips)


def encode(width: int, height: int) -> Graph:
    """An image in pixels to latents, as `pipeline/autoencode.py` does it."""
    config = VAEConfig()
    encoder = blank_module(vae.Encoder(config), mx.float32)
    return trace(autoencode.encode_mode, encoder, config, blank((1, height, width, 3), mx.float32))


def language(prompts: Sequence[int], layers: int = 6) -> Graph:
    """Layers of the text encoder for prompts of these lengths in tokens, layer by layer; with 6 peak is that of 28."""
    config = replace(FULL["text_encoder"], num_hidden_layers=layers)
    model = blank_module(text_encoder.TextEncoder(config), DTYPE)
    given = [(blank((1, n, config.hidden_size), DTYPE), blank((3, n), mx.int32)) for n in prompts]
    return trace(lambda: model.together(given, Pace()))


def tower(height: int, width: int, layers: int = 8) -> Graph:
    """The vision tower's blocks for a grid of patches, of which the last attends to all; with 8 peak is that of 32."""
    config = replace(FULL["vision"], depth=layers, fullatt_block_indexes=(layers - 1,))
    model = blank_module(vision.VisionTower(config), DTYPE)
    patches = blank((height * width, config.patch_pixels), DTYPE)
    return trace(lambda: model(patches, height, width, Pace()))


def language_layer(tokens: int) -> Graph:
    """One layer of the text encoder."""
    config = FULL["text_encoder"]
    module = blank_module(text_encoder.DecoderLayer(config), DTYPE)
    tables = tuple(blank((tokens, 2, config.head_dim // 2), DTYPE) for _ in range(2))
    return trace(module, blank((1, tokens, config.hidden_size), DTYPE), tables, None)


def vision_block(height: int, width: int, windowed: bool) -> Graph:
    """One block of the vision tower, over all patches of a grid or inside windows."""
    config = FULL["vision"]
    module = blank_module(vision.VisionBlock(config), DTYPE)
    tables = tuple(blank((height * width, 1, 2, config.head_dim // 2), mx.float32) for _ in range(2))
    windows = None
    if windowed:
        made = vision.window_index(height // 2, width // 2, config.window_cells, 4, DTYPE)
        windows = vision.Windows(*(blank(x.shape, x.dtype) for x in made))
    return trace(module, blank((height * width, config.hidden_size), DTYPE), tables, windows)


def _rows(config: TransformerConfig, dtype: mx.Dtype) -> transformer.BlockRows:
    return transformer.BlockRows(*([blank((config.dim,), dtype) for _ in range(6)] for _ in range(3)))


def _rotary(config: TransformerConfig, tokens: int) -> Rotary:
    return Rotary(*(blank((tokens, 1, config.attention_head_dim // 2, 2), mx.float32) for _ in range(2)))
