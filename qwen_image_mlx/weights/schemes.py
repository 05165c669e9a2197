"""Parses quantizations such as "4", "mxfp8/32" and "transformer=4,vision=8". Importable without MLX."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from ..errors import RequestError

if TYPE_CHECKING:
    import mlx.core as mx

# Name on the command line -> (mode, bits, group sizes, the usual one first).
SCHEMES: dict[str, tuple[str, int, tuple[int, ...]]] = {
    **{str(bits): ("affine", bits, (64, 32, 128)) for bits in (3, 4, 5, 6, 8)},
    "mxfp4": ("mxfp4", 4, (32,)),
    "mxfp8": ("mxfp8", 8, (32,)),
    "nvfp4": ("nvfp4", 4, (16,)),
}
NONE = "none"
_SCALE_BYTES = 2  # bf16
_TEXT_ENCODER_DEFAULT = "8"  # where only the transformer's scheme is named: 7 GB, in addition to its 8


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
        """From "4", "mxfp8" or "4/32" (bits and group size).

        Raises:
            RequestError: the scheme is unknown, or it has no groups of that size.
        """
        name, slash, group = str(text).partition("/")
        if name not in SCHEMES or (slash and not group):
            raise RequestError(f"{text!r} is not a quantization; give one of {', '.join(SCHEMES)}, {NONE}")
        mode, bits, groups = SCHEMES[name]
        if group and group_size is not None and group != str(group_size):
            raise RequestError(f"quantization {text} has a group size of its own; leave {group_size} out")
        size = group or str(group_size or groups[0])
        if size not in map(str, groups):
            raise RequestError(f"quantization {name} has groups of {' or '.join(map(str, groups))}, not of {size}")
        return cls(mode, bits, int(size))

    def __str__(self) -> str:
        name = str(self.bits) if self.mode == "affine" else self.mode
        usual = SCHEMES[name][2][0] if name in SCHEMES else None  # others are read, but not made
        return name if self.group_size == usual else f"{name}/{self.group_size}"

    def nbytes(self, shape: tuple[int, ...], dtype: mx.Dtype | None = None) -> int:
        """Bytes of a matrix of that shape, packed, with scales in a dtype (bf16) if they are floating."""
        elements = shape[0] * shape[1]
        per_group = 2 * (_SCALE_BYTES if dtype is None else dtype.size) if self.mode == "affine" else 1
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
        """The components that are quantized."""
        return tuple(field.name for field in fields(self) if getattr(self, field.name))

    @classmethod
    def parse(cls, text: str | int, group_size: int | None = None) -> Quantization:
        """From "4" (the transformer; the text encoder then takes 8) or "transformer=4,text_encoder=8,vision=none".

        Args:
            text: one scheme, or component=scheme separated by commas; components not named stay as they are.
            group_size: for every scheme that has it; None takes each scheme's default.

        Raises:
            RequestError: a component or scheme is unknown, or the group size is not one of a scheme's.
        """
        text = str(text)
        if "=" not in text:
            if text == NONE:
                return cls()
            scheme = Scheme.parse(text, group_size)
            group = scheme.group_size if scheme.mode == "affine" else None
            return cls(transformer=scheme, text_encoder=Scheme.parse(_TEXT_ENCODER_DEFAULT, group))
        known = [field.name for field in fields(cls)]
        schemes: dict[str, Scheme | None] = {}
        for part in text.split(","):
            component, _, name = (word.strip() for word in part.partition("="))
            if component not in known or component in schemes:
                raise RequestError(
                    f"quantization has {part!r}, but takes each of {', '.join(known)} once: write {known[0]}=4"
                )
            schemes[component] = None if name == NONE else Scheme.parse(name, group_size)
        return cls(**schemes)

    def __str__(self) -> str:
        schemes = {field.name: getattr(self, field.name) for field in fields(self)}
        return ",".join(f"{component}={scheme}" for component, scheme in schemes.items() if scheme) or NONE
