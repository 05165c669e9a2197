"""What a picture is asked for with, validated once.

Importable without MLX: the command line builds its flags from here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from ..errors import RequestError
from ..names import Dtype, Rng

DTYPES: tuple[Dtype, ...] = ("bfloat16", "float16", "float32")
RNGS: tuple[Rng, ...] = ("torch", "mlx")
SIZE_STEP = 16  # pixels per token side: the VAE's 8 times the transformer's 2x2 patches
MAX_PIXELS = 4096 * 4096
MAX_STEPS = 1000
MAX_LAYERS = 8
MAX_IMAGES = 10_000
MAX_SEED = 2**64 - 1


@dataclass(frozen=True, kw_only=True)
class GenerationParameters:
    """How `generate_pixels` paints; the prompt is in the encoding, the seed beside it.

    Attributes:
        width, height: size in pixels; multiples of 16.
        num_inference_steps: denoising steps, 1 … 1000.
        cfg_scale: classifier-free guidance; 1 turns it off, as does an encoding without a negative prompt.
        rng: "torch" draws the noise `torch.Generator("cpu")` would, "mlx" MLX's own.
        sigmas: unshifted noise levels in (0, 1], falling, instead of the uniform grid; their number is the step count.
        num_layers: with a layered model, layers to take a picture apart into, 1 … 8.
        cfg_normalize: whether guidance keeps the length of each token's velocity; None is the model's habit (layered
            models: no, all others: yes).
        strength: how much of an initial image is painted anew, above 0 and at most 1; without one it has no effect.
        shift: one static shift instead of the checkpoint's resolution-dependent one, as distilled models want it
            (3 for Lightning).

    Raises:
        RequestError: a value is out of range; the message says which and what is allowed.
    """

    width: int
    height: int
    num_inference_steps: int = 50
    cfg_scale: float = 4.0
    rng: Rng = "torch"
    sigmas: tuple[float, ...] | None = None
    shift: float | None = None
    strength: float = 0.6
    num_layers: int = 4
    cfg_normalize: bool | None = None

    def __post_init__(self) -> None:
        check_size(self.width, self.height)
        if self.sigmas is not None:
            object.__setattr__(self, "sigmas", _checked_sigmas(self.sigmas))
            object.__setattr__(self, "num_inference_steps", len(self.sigmas))
        _check_integer("num_inference_steps", self.num_inference_steps, 1, MAX_STEPS)
        if not _is_number(self.cfg_scale) or not 1 <= self.cfg_scale <= 100:
            raise RequestError(f"cfg_scale is {self.cfg_scale}, but must be between 1 (no guidance) and 100")
        if self.rng not in RNGS:
            raise RequestError(f"rng is {self.rng!r}, but must be one of {', '.join(RNGS)}")
        if not _is_number(self.strength) or not 0 < self.strength <= 1:
            raise RequestError(f"strength is {self.strength}, but must be above 0 and at most 1")
        for name in ("cfg_scale", "strength"):  # recorded alike, whether they came as 1 or as 1.0
            object.__setattr__(self, name, float(getattr(self, name)))
        _check_integer("num_layers", self.num_layers, 1, MAX_LAYERS)
        if self.shift is not None and not (_is_number(self.shift) and 0 < self.shift <= 100):
            raise RequestError(f"shift is {self.shift}, but must be above 0 and at most 100")


def check_size(width: int, height: int) -> None:
    """Raises RequestError unless both sides are positive multiples of 16 and the area is at most 16.8 MP."""
    for name, value in (("width", width), ("height", height)):
        _check_integer(name, value, 1)
        if value % SIZE_STEP:
            below, above = value // SIZE_STEP * SIZE_STEP, -(-value // SIZE_STEP) * SIZE_STEP
            near = f"{below} and {above} are near" if below else f"{above} is the nearest"
            raise RequestError(f"{name} is {value}, but must be a multiple of {SIZE_STEP}; {near}")
    if width * height > MAX_PIXELS:
        raise RequestError(f"{width}x{height} are {width * height:,} pixels; at most {MAX_PIXELS:,} work")


def explicit_size(width: int | None, height: int | None) -> tuple[int, int] | None:
    """(width, height), or None without either; raises RequestError for one alone."""
    if (width is None) != (height is None):
        raise RequestError("give both width and height, or neither")
    return None if width is None or height is None else (width, height)


def check_seed(seed: int) -> int:
    """Returns the seed; raises RequestError unless it is an integer from 0 to 2**64 - 1."""
    _check_integer("seed", seed, 0, MAX_SEED)
    return seed


def check_image_index(index: int) -> int:
    """Returns the index; raises RequestError unless it is an integer from 0 to 9999."""
    _check_integer("image_index", index, 0, MAX_IMAGES - 1)
    return index


def check_num_images(count: int) -> int:
    """Returns the number of pictures; raises RequestError unless it is an integer from 1 to 10000."""
    _check_integer("num_images", count, 1, MAX_IMAGES)
    return count


def check_side(resolution: int) -> None:
    """Raises RequestError unless it is an integer from 32 to 4096: the side of a square of as many pixels."""
    _check_integer("resolution", resolution, 32, 4096)


def check_reference_pixels(pixels: int | None) -> None:
    """Raises RequestError unless it is None or an integer of at least 1024, the smallest picture."""
    if pixels is not None:
        _check_integer("reference_pixels", pixels, 32 * 32)


def _check_integer(name: str, value: int, low: int, high: int | None = None) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < low or (high is not None and value > high):
        allowed = f"of at least {low}" if high is None else f"from {low} to {high}"
        raise RequestError(f"{name} is {value!r}, but must be an integer {allowed}")


def _checked_sigmas(sigmas: Sequence[float]) -> tuple[float, ...]:
    try:
        values = tuple(float(s) for s in sigmas)
    except (TypeError, ValueError, OverflowError):
        values = ()
    falling = all(a > b for a, b in pairwise(values))
    if not values or not falling or not all(0 < s <= 1 for s in values):
        raise RequestError(f"sigmas is {sigmas!r:.80}, but must be falling numbers above 0 and at most 1")
    return values


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value
