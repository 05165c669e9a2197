"""Quantizes matrices: which ones, into which form, and better than `mx.quantize` at equal size.

Affine: w ≈ scale · q + bias for each group of consecutive columns. Scale and bias are rounded to bf16 before the
elements are chosen, so that no rounding is left over; then they are refitted by least squares to the elements, which
are chosen anew, while that helps. They are bf16 whatever the dtype of a run, so that a pack and a run mean the same
numbers. The microscaling modes are MLX's own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache
from typing import Any

import mlx.core as mx

from ..errors import RequestError
from ..gpu import number
from .packed import Packed

# What users write -> (mode, bits, group sizes, the usual one first).
SCHEMES: dict[str, tuple[str, int, tuple[int, ...]]] = {
    **{str(bits): ("affine", bits, (64, 32, 128)) for bits in (3, 4, 5, 6, 8)},
    "mxfp4": ("mxfp4", 4, (32,)),
    "mxfp8": ("mxfp8", 8, (32,)),
    "nvfp4": ("nvfp4", 4, (16,)),
}
NONE = "none"
REFITS = 6
SCALES: mx.Dtype = mx.bfloat16
_BESIDE = "8"  # the text encoder's scheme where only the transformer's is said: 7 GB beside a transformer of 8
_BAND = 1 << 21  # elements quantized at once: 8 MiB in fp32, of which a refit takes some fifteen


@dataclass(frozen=True)
class Scheme:
    """How matrices are quantized.

    Attributes:
        mode: "affine", "mxfp4", "mxfp8" or "nvfp4".
        bits: per element.
        group_size: columns that share a scale.
    """

    mode: str
    bits: int
    group_size: int

    @classmethod
    def parse(cls, text: str | int, group_size: int | None = None) -> Scheme:
        """From "4", "mxfp8" or "4/32", the last with its group size.

        Raises:
            RequestError: there is no such scheme, or it has no groups of that size.
        """
        name, slash, group = str(text).partition("/")
        if name not in SCHEMES or (slash and not group):
            raise RequestError(f"{text!r} is no quantization; give one of {', '.join(SCHEMES)}, {NONE}")
        mode, bits, groups = SCHEMES[name]
        if group and group_size is not None and group != str(group_size):
            raise RequestError(f"quantization {text} has a group size of its own; leave {group_size} out")
        wanted = group or str(group_size or groups[0])
        if wanted not in map(str, groups):
            raise RequestError(f"quantization {name} has groups of {' or '.join(map(str, groups))}, not of {wanted}")
        return cls(mode, bits, int(wanted))

    def __str__(self) -> str:
        name = str(self.bits) if self.mode == "affine" else self.mode
        usual = SCHEMES[name][2][0] if name in SCHEMES else None  # others are read, but not made
        return name if self.group_size == usual else f"{name}/{self.group_size}"

    def nbytes(self, shape: tuple[int, ...], dtype: mx.Dtype = SCALES) -> int:
        """Bytes of a matrix of that shape, packed, with scales in a dtype if they are floating."""
        elements = shape[0] * shape[1]
        per_group = 2 * dtype.size if self.mode == "affine" else 1
        return elements * self.bits // 8 + elements // self.group_size * per_group

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether a weight is a matrix whose rows are whole groups (and whole words)."""
        return len(shape) == 2 and shape[1] % self.group_size == 0 and shape[1] * self.bits % 32 == 0


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """The scheme of each component; None leaves it as it is. The VAE is never quantized.

    Attributes:
        transformer: of the attention and MLP matrices of its blocks; what enters and leaves the transformer stays in
            full precision (0.1% of its bytes), and so does the modulation, which is never resident.
        text_encoder: of all its matrices, the embedding included.
        vision: of the matrices of the vision tower's blocks.
    """

    transformer: Scheme | None = None
    text_encoder: Scheme | None = None
    vision: Scheme | None = None

    @property
    def components(self) -> tuple[str, ...]:
        """Those that are quantized."""
        return tuple(field.name for field in fields(self) if getattr(self, field.name))

    @classmethod
    def parse(cls, text: str | int, group_size: int | None = None) -> Quantization:
        """From "4" (the transformer; the text encoder then takes 8) or "transformer=4,text_encoder=8,vision=none".

        Args:
            text: one scheme, or component=scheme separated by commas; components not named stay as they are.
            group_size: for every scheme that has it; None takes each one's usual.

        Raises:
            RequestError: a component or scheme is unknown, or the group size is not one of a scheme's.
        """
        given = str(text)
        if "=" not in given:
            if given == NONE:
                return cls()
            scheme = Scheme.parse(given, group_size)
            beside = scheme.group_size if scheme.mode == "affine" else None
            return cls(transformer=scheme, text_encoder=Scheme.parse(_BESIDE, beside))
        known = [field.name for field in fields(cls)]
        schemes: dict[str, Scheme | None] = {}
        for part in given.split(","):
            component, _, wanted = (word.strip() for word in part.partition("="))
            if component not in known or component in schemes:
                raise RequestError(
                    f"quantization has {part!r}, but wants each once of {', '.join(known)}: {known[0]}=4"
                )
            schemes[component] = None if wanted == NONE else Scheme.parse(wanted, group_size)
        return cls(**schemes)

    def __str__(self) -> str:
        schemes = {field.name: getattr(self, field.name) for field in fields(self)}
        return ",".join(f"{component}={scheme}" for component, scheme in schemes.items() if scheme) or NONE


def quantize_matrix(w: mx.array, scheme: Scheme, refits: int = REFITS) -> Packed:
    """A matrix in a scheme's form, evaluated band by band.

    Args:
        w: (rows, columns), floating, lazily if that is how it is read.
        scheme: one that `fits`.
        refits: at most so many least-squares refits; 0 is min-max quantization with rounded scales.

    Returns:
        What `mx.quantized_matmul` takes.
    """
    rows = max(1, _BAND // w.shape[1])
    bands = []
    for top in range(0, w.shape[0], rows):
        band = w[top : top + rows].astype(mx.float32)
        if scheme.mode == "affine":
            parts = _affine(band, scheme, refits)
        else:
            parts = mx.quantize(band, scheme.group_size, scheme.bits, scheme.mode)
        mx.eval(parts)
        bands.append(parts)
    weight, scales, *biases = (mx.concatenate(list(parts)) for parts in zip(*bands, strict=True))
    mx.eval(weight, scales, biases)
    return Packed(weight, scales, biases[0] if biases else None, scheme.group_size, scheme.bits, scheme.mode)


def relative_error(w: mx.array, packed: Packed) -> float:
    """|w - w'| / |w| in the Frobenius norm, of a matrix and its quantized form."""
    w = w.astype(mx.float32)
    return float(number(mx.linalg.norm(w - packed.dequantize()) / mx.maximum(mx.linalg.norm(w), 1e-30)))


def _affine(w: mx.array, scheme: Scheme, refits: int) -> tuple[mx.array, mx.array, mx.array]:
    groups = w.reshape(w.shape[0], -1, scheme.group_size)
    low, high = groups.min(axis=-1, keepdims=True), groups.max(axis=-1, keepdims=True)
    levels, slack = 2**scheme.bits - 1, mx.finfo(SCALES).eps / 2
    # Widened by what rounding may take, so that the ends stay within reach.
    bias = (low - slack * mx.abs(low)).astype(SCALES).astype(mx.float32)
    scale, bias = _rounded(mx.maximum((high - bias) / levels * (1 + slack), 1e-12), bias)
    q = _elements(groups, scale, bias, levels)
    error = _error(groups, q, scale, bias)
    for _ in range(refits):
        q, scale, bias, error = fused(_refit)(groups, q, scale, bias, error, levels)
    columns = w.shape[1]
    return (
        fused(_pack)(q.astype(mx.uint32).reshape(-1, columns), scheme.bits),
        scale.reshape(w.shape[0], -1).astype(SCALES),
        bias.reshape(w.shape[0], -1).astype(SCALES),
    )


def _refit(
    groups: mx.array, q: mx.array, scale: mx.array, bias: mx.array, error: mx.array, levels: int
) -> tuple[mx.array, ...]:
    """Elements, scale, bias and error of each group after a refit, where that is better."""
    # Least squares of w over q, for each group: scale = cov(q, w) / var(q).
    mean_q, mean_w = q.mean(axis=-1, keepdims=True), groups.mean(axis=-1, keepdims=True)
    variance = mx.square(q - mean_q).mean(axis=-1, keepdims=True)
    covariance = ((q - mean_q) * (groups - mean_w)).mean(axis=-1, keepdims=True)
    slope = mx.where(variance > 0, covariance / mx.maximum(variance, 1e-12), scale)
    new_scale, new_bias = _rounded(slope, mean_w - slope * mean_q)
    new_q = _elements(groups, new_scale, new_bias, levels)
    new_error = _error(groups, new_q, new_scale, new_bias)
    better = new_error < error
    return tuple(
        mx.where(better, new, old)
        for new, old in ((new_q, q), (new_scale, scale), (new_bias, bias), (new_error, error))
    )


def fused(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function with its elementwise operations in few kernels, bit for bit the same; on a CPU the function itself.

    On a GPU each kernel costs a pass over memory; on a CPU compiling them takes longer than they save.
    """
    return _compiled(function) if mx.default_device() == mx.gpu else function


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return mx.compile(function)


def _rounded(scale: mx.array, bias: mx.array) -> tuple[mx.array, mx.array]:
    return scale.astype(SCALES).astype(mx.float32), bias.astype(SCALES).astype(mx.float32)


def _elements(w: mx.array, scale: mx.array, bias: mx.array, levels: int) -> mx.array:
    safe = mx.where(scale == 0, 1, scale)
    return mx.clip(mx.round((w - bias) / safe), 0, levels)


def _error(w: mx.array, q: mx.array, scale: mx.array, bias: mx.array) -> mx.array:
    return mx.square(scale * q + bias - w).sum(axis=-1, keepdims=True)


def _pack(q: mx.array, bits: int) -> mx.array:
    """uint32 elements (rows, columns) to the words of a bit stream (rows, columns * bits / 32), little end first."""
    q = q.reshape(q.shape[0], -1, 32)
    words = [mx.zeros(q.shape[:2], dtype=mx.uint32) for _ in range(bits)]
    for n in range(32):
        word, shift = divmod(n * bits, 32)
        words[word] = words[word] | (q[..., n] << shift)
        if shift + bits > 32:
            words[word + 1] = words[word + 1] | (q[..., n] >> (32 - shift))
    return mx.stack(words, axis=-1).reshape(q.shape[0], -1)
