"""Packing against the static methods of diffusers' QwenImagePipeline."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_image_mlx.sampling.latents import pack_latents, unpack_latents

SHAPES = [(1, 2, 2, 16), (1, 2, 6, 16), (2, 8, 4, 16), (1, 26, 14, 16), (3, 4, 10, 1), (1, 6, 4, 5)]


def numbered(shape: tuple[int, ...]) -> np.ndarray:
    """Every value another, so that any wrong place shows."""
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


@pytest.mark.reference
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_packing_is_the_reference_s(shape):
    import torch
    from diffusers import QwenImagePipeline

    b, h, w, c = shape
    images = numbered(shape)
    # The reference's images are (B, 1, C, h, w).
    theirs = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())[:, None]
    expected = QwenImagePipeline._pack_latents(theirs, b, c, h, w).numpy()
    np.testing.assert_array_equal(np.array(pack_latents(mx.array(images))), expected)


@pytest.mark.reference
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_unpacking_is_the_reference_s(shape):
    import torch
    from diffusers import QwenImagePipeline

    b, h, w, c = shape
    tokens = numbered((b, h // 2 * (w // 2), 4 * c))
    expected = QwenImagePipeline._unpack_latents(torch.from_numpy(tokens), 8 * h, 8 * w, vae_scale_factor=8).numpy()
    ours = np.array(unpack_latents(mx.array(tokens), h, w))
    np.testing.assert_array_equal(ours, expected[:, :, 0].transpose(0, 2, 3, 1))


@settings(deadline=None)
@given(b=st.integers(1, 3), rows=st.integers(1, 20), cols=st.integers(1, 20), c=st.integers(1, 16))
def test_unpacking_undoes_packing(b, rows, cols, c):
    images = mx.array(numbered((b, 2 * rows, 2 * cols, c)))
    tokens = pack_latents(images)
    assert tokens.shape == (b, rows * cols, 4 * c)
    assert mx.array_equal(unpack_latents(tokens, 2 * rows, 2 * cols), images)


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16, mx.float32])
def test_dtype_is_kept(dtype):
    tokens = pack_latents(mx.zeros((1, 4, 4, 16), dtype))
    assert (tokens.dtype, unpack_latents(tokens, 4, 4).dtype) == (dtype, dtype)
