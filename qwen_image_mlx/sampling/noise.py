"""Initial noise from an explicit seed; never from global random state.

`torch_normal` reproduces `torch.randn(..., generator=torch.Generator("cpu").manual_seed(seed))` with numpy alone, so
that a seed from a model card gives the same picture. Source: ATen's normal_fill (Box-Muller in blocks of 16 over
24-bit uniforms of MT19937).
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

RNGS = ("torch", "mlx")
_BLOCK = 16


class TorchGenerator:
    """The stream of `torch.Generator("cpu")`; consecutive draws continue it.

    Args:
        seed: 0 … 2**64 - 1; like torch, only its low 32 bits matter.
    """

    def __init__(self, seed: int):
        self._state = np.random.RandomState(seed & 0xFFFFFFFF)

    def normal(self, count: int) -> np.ndarray:
        """float32 (count,), as `torch.randn(count)`; count is at least 16, where torch changes its method."""
        assert count >= _BLOCK, count
        uniform = self._uniform(count)
        whole = count - count % _BLOCK
        out = np.empty(count, np.float32)
        out[:whole] = _box_muller(uniform[:whole])
        if whole < count:
            out[-_BLOCK:] = _box_muller(self._uniform(_BLOCK))
        return out

    def _uniform(self, count: int) -> np.ndarray:
        words = np.frombuffer(self._state.bytes(4 * count), dtype="<u4")
        return (words & 0xFFFFFF).astype(np.float32) * np.float32(2**-24)


def _box_muller(uniform: np.ndarray) -> np.ndarray:
    pairs = uniform.reshape(-1, 2, _BLOCK // 2)
    radius = np.sqrt(-2 * np.log(1 - pairs[:, :1]))
    angle = np.float32(2 * np.pi) * pairs[:, 1:]
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(-1)


def draw_normal(shape: tuple[int, ...], *, seed: int, index: int = 0, rng: str = "torch") -> mx.array:
    """Standard normal noise, float32.

    Args:
        shape: shape of one draw.
        seed: 0 … 2**64 - 1.
        index: which of several consecutive draws of this shape; number k of `num_images_per_prompt` in the reference.
        rng: "torch" for the reference's values on the CPU, "mlx" for MLX's own.
    """
    if rng == "mlx":
        return mx.random.normal(shape, key=mx.random.split(mx.random.key(seed), index + 1)[index])
    generator = TorchGenerator(seed)
    count = int(np.prod(shape))
    for _ in range(index):
        generator.normal(count)
    return mx.array(generator.normal(count).reshape(shape))
