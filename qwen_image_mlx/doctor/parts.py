"""The table of blocks whose parity is checked: one block of each network at real width, with hashed weights and inputs.

A part is a module and the cases it is run in; to add a case, add a row and run `scripts/doctor_values.py`. Chains of
transformer blocks, which groups time, are made here too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx

from ..gpu import Pace, finish
from ..models import nn
from ..models.qwen2_5_vl.text import DecoderLayer, mrope_tables
from ..models.qwen2_5_vl.vision import VisionBlock, window_index
from ..models.qwen_image.config import TransformerConfig
from ..models.qwen_image.rope import Segment, place_images, rotary_tables
from ..models.qwen_image.transformer import BlockRows, TransformerBlock
from ..models.qwen_image.vae import Decoder, Encoder
from ..models.rotary import patch_tables as vision_tables
from ..pipeline.autoencode import decode, encode_moments
from ..weights.synthetic import FULL
from .values import array, fill

# (module, shape, dtype) -> all outputs as one array.
Run = Callable[[nn.Module, tuple[int, ...], mx.Dtype], mx.array]
_DIT, _TEXT, _VISION, _VAE = (FULL[name] for name in ("transformer", "text_encoder", "vision", "vae"))


class Case(NamedTuple):
    """A way to run a part.

    Attributes:
        name: its name in a report and in the stored values.
        run: computes it.
        small: its shape on a CPU.
        large: its shape on a GPU.
    """

    name: str
    run: Run
    small: tuple[int, ...]
    large: tuple[int, ...]


class Part(NamedTuple):
    """A module of real width.

    Attributes:
        build: makes it, with fp32 weights.
        cases: the ways it is run in.
        tolerance: of fp32 results, relative.
        halves: whether it runs in bf16 as well.
    """

    build: Callable[[], nn.Module]
    cases: tuple[Case, ...]
    tolerance: float = 1e-5
    halves: bool = True


def transformer_block(last: bool = False) -> nn.Module:
    """A block of the transformer: 227 M weights, or the last one's 170 M."""
    return fill(TransformerBlock(_DIT, last), f"transformer_block.{last}")


def block_inputs(
    text: int, grids: Sequence[tuple[int, int]], dtype: mx.Dtype, config: TransformerConfig = _DIT
) -> tuple[list[mx.array], mx.array, BlockRows, Sequence[mx.array]]:
    """The inputs of a transformer block: images, text, rows, rotary tables.

    Args:
        text: tokens.
        grids: rows and columns of tokens of the target and of each reference.
        dtype: the model's.
        config: gives the width.
    """
    sizes = [height * width for height, width in grids]
    images = [array("target", (1, sizes[0], config.dim), dtype)]
    if sizes[1:]:
        images.append(array("references", (1, sum(sizes[1:]), config.dim), dtype))
    rows = BlockRows(*(modulation_rows(name, config.dim, dtype) for name in ("text", "target", "references")))
    segments = place_images(list(grids), False) if sizes[1:] else [Segment(0, *grids[0])]
    return (
        images,
        array("text", (1, text, config.dim), dtype),
        rows,
        rotary_tables(segments, text, config.axes_dims_rope),
    )


def modulation_rows(name: str, dim: int, dtype: mx.Dtype) -> tuple[mx.array, ...]:
    """Shift, 1 + scale and gate (D,), of attention and of the MLP."""
    kinds = ("shift1", "scale1", "gate1", "shift2", "scale2", "gate2")
    return tuple(array(f"{name}.{kind}", (dim,), dtype, 0.1) + ("scale" in kind) for kind in kinds)


def chained_block(config: TransformerConfig) -> nn.Module:
    """A block in bf16."""
    if config == FULL["transformer"]:
        block = transformer_block()
    else:
        block = fill(TransformerBlock(config, False), "narrow")
    block.set_dtype(mx.bfloat16)
    mx.eval(block.parameters())
    mx.clear_cache()
    return block


def chain(
    block: nn.Module, inputs: Any, count: int, branches: int = 1, on_layer: Callable[[int], None] = lambda count: None
) -> float:
    """Runs a block on its own output `count` times, for each branch; returns the seconds."""
    images, text, rows, rotary = inputs
    streams, pace, start = [(images, text)] * branches, Pace(on_layer), time.perf_counter()
    for _ in range(count):
        streams = [block(images, text, rows, rotary) for images, text in streams]
        pace([x for images, text in streams for x in (*images, text)])
    finish(streams)
    return time.perf_counter() - start


def _joint(references: int, block: nn.Module, shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    text, height, width, *reference = shape
    grids = [(height, width)] + [tuple(reference)] * references
    images, text = block(*block_inputs(text, grids, dtype))
    return mx.concatenate([text, *images], axis=1) if references or not block._last else images[0]


def _language(layer: nn.Module, shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    (tokens,) = shape
    positions = mx.stack([mx.arange(tokens), mx.arange(tokens) // 5, mx.arange(tokens) % 7])
    tables = mrope_tables(positions, _TEXT.mrope_section, _TEXT.head_dim, _TEXT.rope_theta, dtype)
    return layer(array("language", (1, tokens, _TEXT.hidden_size), dtype), tables, None)


def _seeing(windowed: bool, block: nn.Module, shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    height, width = shape
    merge = _VISION.spatial_merge_size
    windows = window_index(height // merge, width // merge, _VISION.window_cells, merge**2, dtype) if windowed else None
    hidden = array("vision", (height * width, _VISION.hidden_size), dtype)
    return block(hidden, vision_tables(height, width, merge, _VISION.head_dim), windows)


def _decode(decoder: nn.Module, shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    return decode(decoder, _VAE, array("latents", (1, *shape, _VAE.z_dim), dtype), strips=1)


def _encode(encoder: nn.Module, shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    mean, std = encode_moments(encoder, _VAE, mx.tanh(array("pixels", (1, *shape, _VAE.input_channels), dtype)))
    return mx.concatenate([mean, std], axis=-1)


# Shapes: text tokens, rows and columns of the target, of the reference; tokens; rows and columns.
PARTS = (
    Part(
        transformer_block,
        (
            Case("transformer-block", partial(_joint, 0), (4, 2, 4), (16, 8, 8)),
            Case("transformer-reference", partial(_joint, 1), (4, 2, 4, 2, 2), (16, 8, 8, 4, 4)),
        ),
    ),
    Part(partial(transformer_block, True), (Case("transformer-last", partial(_joint, 0), (4, 2, 4), (16, 8, 8)),)),
    Part(
        lambda: fill(DecoderLayer(_TEXT), "language"),
        (Case("language-layer", _language, (8,), (80,)),),
    ),
    Part(
        lambda: fill(VisionBlock(_VISION), "vision"),
        (
            Case("vision-windowed", partial(_seeing, True), (2, 10), (8, 10)),
            Case("vision-full", partial(_seeing, False), (2, 10), (8, 10)),
        ),
    ),
    # Winograd, which Metal uses, is 8e-6 from exact sums by itself.
    Part(lambda: fill(Decoder(_VAE), "decoder"), (Case("vae-decoder", _decode, (4, 4), (32, 32)),), 5e-5, halves=False),
    Part(
        lambda: fill(Encoder(_VAE), "encoder"),
        (Case("vae-encoder", _encode, (32, 32), (256, 256)),),
        5e-5,
        halves=False,
    ),
)
