"""Initial noise from an explicit seed; never from global random state.

`torch_normal` reproduces `torch.randn(..., generator=torch.Generator("cpu").manual_seed(seed))` with numpy alone, so
that a seed from a model card gives the same image. Source: ATen's normal_fill (Box-Muller in blocks of 16 over
24-bit uniforms of MT19937).
"""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np

from ..names import Rng

_BLOCK = 16


class TorchGenerator:
    """The stream of `torch.Generator("cpu")`; consecutive draws continue it.

    Args:
        seed: 0 … 2**64 - 1; like torch, only its low 32 bits matter.
    """

    def __init__(self, seed: int):
        self._state = np.random.RandomState(seed & 0xFFFFFFFF)

    def normal(self, shape: tuple[int, ...]) -> mx.array:
        """fp32 (*shape), equal to `torch.randn(shape)`; at least 16 values, because torch draws fewer differently."""
        count = math.prod(shape)
        assert count >= _BLOCK, shape
        uniform = self._uniform(count)
        whole = count - count % _BLOCK
        out = np.empty(count, np.float32)
        out[:whole] = _box_muller(uniform[:whole])
        if whole < count:
            out[-_BLOCK:] = _box_muller(self._uniform(_BLOCK))
        return mx.array(out.reshape(shape))

    def _uniform(self, count: int) -> np.ndarray:
        words = np.frombuffer(self._state.bytes(4 * count), dtype="<u4")
        return (words & 0xFFFFFF).astype(np.float32) * np.float32(2**-24)


def _box_muller(uniform: np.ndarray) -> np.ndarray:
    pairs = uniform.reshape(-1, 2, _BLOCK // 2)
    radius = np.sqrt(-2 * np.log(1 - pairs[:, :1]))
    angle = np.float32(2 * np.pi) * pairs[:, 1:]
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(-1)


class MLXGenerator:
    """MLX's own noise, from a key; consecutive draws differ.

    Args:
        seed: 0 … 2**64 - 1.
    """

    def __init__(self, seed: int):
        self._key = mx.random.key(seed)

    def normal(self, shape: tuple[int, ...]) -> mx.array:
        """Standard normal noise, fp32 (*shape)."""
        self._key, key = mx.random.split(self._key)
        return mx.random.normal(shape, key=key)


def generator(rng: Rng, seed: int) -> TorchGenerator | MLXGenerator:
    """The noise generator of a seed; `rng` is "torch" or "mlx"."""
    generators: dict[Rng, type[TorchGenerator] | type[MLXGenerator]] = {"torch": TorchGenerator, "mlx": MLXGenerator}
    return generators[rng](seed)
