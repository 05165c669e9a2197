"""A matrix in MLX's quantized form."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx


@dataclass(frozen=True)
class Packed:
    """A quantized matrix of `rows` rows, as `mx.quantize` returns it and `mx.quantized_matmul` takes it.

    Attributes:
        weight: (rows, columns * bits / 32), uint32; little end first.
        scales: (rows, columns / group_size); floating for "affine", uint8 for the microscaling modes.
        biases: like `scales` for "affine", None for the others.
        group_size: columns that share a scale.
        bits: per element.
        mode: "affine", "mxfp4", "mxfp8" or "nvfp4".
    """

    weight: mx.array
    scales: mx.array
    biases: mx.array | None
    group_size: int
    bits: int
    mode: str = "affine"

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) of the matrix it stands for."""
        return self.weight.shape[0], self.scales.shape[-1] * self.group_size

    def dequantize(self, dtype: mx.Dtype = mx.float32) -> mx.array:
        """The matrix (rows, columns), lazily."""
        return mx.dequantize(self.weight, self.scales, self.biases, self.group_size, self.bits, self.mode, dtype=dtype)
