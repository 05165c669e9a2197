"""A matrix in MLX's quantized form."""

from __future__ import annotations

from dataclasses import dataclass, replace

import mlx.core as mx


@dataclass(frozen=True)
class Packed:
    """A quantized matrix of `rows` rows, as `mx.quantize` returns it and `mx.quantized_matmul` takes it.

    Attributes:
        weight: (rows, columns * bits / 32), uint32; little-endian.
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
        """(rows, columns) of the dequantized matrix."""
        return self.weight.shape[0], self.scales.shape[-1] * self.group_size

    def dequantize(self, dtype: mx.Dtype = mx.float32) -> mx.array:
        """The matrix (rows, columns), lazily, computed in `dtype`."""
        scales, biases = self.scales, self.biases
        if self.mode == "affine":
            assert biases is not None
            scales, biases = scales.astype(dtype), biases.astype(dtype)
        return mx.dequantize(self.weight, scales, biases, self.group_size, self.bits, self.mode, dtype=dtype)

    @property
    def arrays(self) -> tuple[mx.array, mx.array, mx.array | None]:
        """Weight, scales and biases."""
        return self.weight, self.scales, self.biases

    def of_rows(self, first: int, count: int) -> Packed:
        """Some of its rows, lazily."""
        rows = slice(first, first + count)
        biases = None if self.biases is None else self.biases[rows]
        return Packed(self.weight[rows], self.scales[rows], biases, self.group_size, self.bits, self.mode)

    def astype(self, dtype: mx.Dtype) -> Packed:
        """With scales and biases in this dtype; the microscaling modes are returned unchanged."""
        if self.mode != "affine":
            return self
        assert self.biases is not None
        return replace(self, scales=self.scales.astype(dtype), biases=self.biases.astype(dtype))
