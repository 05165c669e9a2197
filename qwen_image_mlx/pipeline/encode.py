"""Runs the encoders: prompts, pictures for the text encoder, pictures for the transformer.

Functions over a checkpoint's components; each evaluates what it returns.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np
from PIL import Image

from ..errors import CheckpointError, QwenImageError
from ..gpu import all_finite, finish
from ..images.geometry import Size, size_of_area, vision_size
from ..images.pixels import on_white, to_mask, to_patches, to_pixels
from ..registry import TEXT_ENCODER, VAE, VAE_ENCODER, VISION
from ..sampling.latents import pack_latents
from ..text.prompt import TokenizedPrompt, replace_vision_tokens
from .autoencode import encode_mode, encode_moments
from .components import Components
from .conditioning import InitialImage, Reference


def feature_grid(components: Components, image: Image.Image, area: int) -> tuple[int, int]:
    """Rows and columns of the features that a picture, shown at about `area` pixels, turns into."""
    config = components.config(VISION)
    cell = config.patch_size * config.spatial_merge_size
    width, height = _vision_size(components, image, area)
    return height // cell, width // cell


def encode_vision(components: Components, images: Sequence[Image.Image], area: int) -> mx.array:
    """Features (tokens, C) of all pictures, in order, each shown at about `area` pixels."""
    config, processor, tower = components.config(VISION), components.image_processor, components.network(VISION)
    features = []
    for image in images:
        size = _vision_size(components, image, area)
        # Resized twice, as in the reference: to the pipeline's area, then to what the tower's patches fit.
        resized = on_white(image.resize(size_of_area(area, image.size), Image.Resampling.LANCZOS))
        patches = to_patches(
            resized, size, patch=config.patch_size, merge=config.spatial_merge_size,
            mean=processor.image_mean, std=processor.image_std,
        )  # fmt: skip
        rows, columns = size[1] // config.patch_size, size[0] // config.patch_size
        with components.passing(VISION) as pace:
            features.append(tower(patches.astype(components.dtype), rows, columns, pace))
            finish(features[-1])
    return mx.concatenate(features)


def encode_prompts(
    components: Components, prompts: Sequence[TokenizedPrompt], features: mx.array | None
) -> list[mx.array]:
    """States (1, L, C) of each prompt's rows that count.

    Raises:
        QwenImageError: they are not finite, which float16 can cause.
    """
    encoder, embedded = components.network(TEXT_ENCODER), []
    size = components.config(TEXT_ENCODER).vocab_size
    for tokens in prompts:
        if (largest := int(max(tokens.ids, default=0))) >= size:  # MLX does not look before it reads
            raise CheckpointError(
                f"the tokenizer gives the token {largest}, but the text encoder has {size}: they do not belong together"
            )
        embeddings = encoder.embed(mx.array(tokens.ids)[None])
        if features is not None:
            embeddings = replace_vision_tokens(embeddings, tokens.is_image, features)
        embedded.append((embeddings, mx.array(tokens.positions)))
    with components.passing(TEXT_ENCODER) as pace:
        whole = encoder.together(embedded, pace)
        states = [rows[:, tokens.first :] for rows, tokens in zip(whole, prompts, strict=True)]
        finish(states)
    if not all_finite(*states):
        raise QwenImageError("the encoded prompt is not finite: try --dtype bfloat16, or check the weights")
    return states


def encode_references(
    components: Components, images: Sequence[Image.Image], max_pixels: int | None
) -> tuple[Reference, ...]:
    """What the transformer is shown of each picture, at its own size of the pipeline's area (at most `max_pixels`)."""
    area = components.variant.reference_area
    area = area if max_pixels is None else min(area, max_pixels)
    references = []
    for image in images:
        latents = encode_mode(
            components.network(VAE_ENCODER), components.config(VAE), to_pixels(image, size_of_area(area, image.size))
        )
        references.append(Reference(pack_latents(latents), latents.shape[1] // 2, latents.shape[2] // 2))
        finish(references[-1].latents)
    return tuple(references)


def encode_initial_image(
    components: Components, image: Image.Image, size: Size, mask: Image.Image | None
) -> InitialImage:
    """Latent statistics of a picture resized to `size`, and its mask by nearest latent."""
    mean, std = encode_moments(components.network(VAE_ENCODER), components.config(VAE), to_pixels(image, size))
    if mask is None:
        return InitialImage(mean, std)
    factor = components.config(VAE).spatial_factor
    latent_mask = mx.array(np.ascontiguousarray(to_mask(mask, size)[::factor, ::factor])[None, :, :, None])
    finish(latent_mask)
    return InitialImage(mean, std, latent_mask)


def _vision_size(components: Components, image: Image.Image, area: int) -> Size:
    config, processor = components.config(VISION), components.image_processor
    return vision_size(
        size_of_area(area, image.size),
        config.patch_size * config.spatial_merge_size,
        processor.min_pixels,
        processor.max_pixels,
    )
