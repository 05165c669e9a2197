"""Packing latents into tokens, against the reference's own functions."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import torch
from diffusers import QwenImagePipeline
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_image_mlx.sampling.latents import pack_latents, unpack_latents

SIZES = st.tuples(st.integers(1, 5), st.integers(1, 5))


@settings(deadline=None, max_examples=30)
@given(size=SIZES)
def test_packing_is_the_reference_s_and_can_be_undone(size):
    height, width = (2 * side for side in size)
    latents = np.random.default_rng(0).standard_normal((1, 16, height, width)).astype(np.float32)
    expected = QwenImagePipeline._pack_latents(torch.from_numpy(latents), 1, 16, height, width).numpy()
    image = mx.array(latents.transpose(0, 2, 3, 1))
    packed = pack_latents(image)
    np.testing.assert_array_equal(np.array(packed), expected)
    assert mx.array_equal(unpack_latents(packed, height, width), image)
    back = QwenImagePipeline._unpack_latents(torch.from_numpy(expected), 8 * height, 8 * width, 8)[:, :, 0].numpy()
    np.testing.assert_array_equal(np.array(image), back.transpose(0, 2, 3, 1))
