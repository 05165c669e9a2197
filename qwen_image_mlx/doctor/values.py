"""Weights and inputs from an integer hash: the same fp32 numbers on every machine, with no file and no random state."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from math import prod

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from ..models import nn

_CHUNK = 1 << 16  # values made at once: they stay in a core's cache
_ROUNDS = ((0x9E3779B1, 15), (0x85EBCA77, 13), (0xC2B2AE3D, 16))  # odd multipliers of xxHash32 and murmur3; shifts


def uniform(name: str, shape: Sequence[int], scale: float = 1.0) -> np.ndarray:
    """Numbers between -sqrt(3) and sqrt(3) times `scale` (variance scale**2), fp32, of a shape.

    Value n is a hash of n and of the name's CRC-32, in whole numbers; the last steps, two products with constants and
    a difference, round alike on every machine.
    """
    size, seed = prod(shape), zlib.crc32(name.encode())
    out, counts = np.empty(size, np.float32), np.arange(_CHUNK, dtype=np.uint32)
    factor = np.float32(scale * 3**0.5)
    for start in range(0, size, _CHUNK):
        x = counts[: size - start] + np.uint32((seed + start) % 2**32)
        for multiplier, shift in _ROUNDS:
            x *= np.uint32(multiplier)
            x ^= x >> np.uint32(shift)
        chunk = (x >> np.uint32(8)).astype(np.float32)
        chunk *= np.float32(2**-23)
        chunk -= np.float32(1)
        out[start : start + _CHUNK] = chunk * factor
    return out.reshape(shape)


def array(name: str, shape: Sequence[int], dtype: mx.Dtype, scale: float = 1.0) -> mx.array:
    """Hashed numbers in a dtype."""
    return mx.array(uniform(name, shape, scale)).astype(dtype)


def fill(module: nn.Module, name: str) -> nn.Module:
    """Gives a module hashed fp32 weights that keep activations of order one.

    Matrices and kernels are scaled by their inputs, norms are 1 + a tenth, biases a tenth.

    Returns:
        The module.
    """
    filled = []
    for key, old in tree_flatten(module.parameters()):
        shape = old.shape
        if old.ndim > 1:
            values = uniform(f"{name}.{key}", shape, prod(shape[1:]) ** -0.5)
        else:
            values = uniform(f"{name}.{key}", shape, 0.1) + np.float32(not key.endswith("bias"))
        filled.append((key, mx.array(values)))
    module.load_weights(filled)
    return module
