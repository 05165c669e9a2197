"""The parameters of a generation, validated once.

Importable without MLX: the command line makes its flags from this module.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import RequestError
from ..names import Dtype, Rng, SolverName
from ..options import Choice, Config, Integer, Number, Parsed, Several, Switch, option, options_of
from ..sampling.choices import (
    CACHE_NAMES,
    CACHE_WORDS,
    INTERVAL_WORDS,
    NO_CACHE,
    SOLVER_NAMES,
    check_cache,
    check_guidance,
    parse_cache,
    parse_interval,
)

if TYPE_CHECKING:
    from ..variants import Variant

DTYPES: tuple[Dtype, ...] = ("bfloat16", "float16", "float32")
RNGS: tuple[Rng, ...] = ("torch", "mlx")
SIZE_STEP = 16  # sides are multiples of it for every model; `LatentSpace.size_multiple` is a model's own
MAX_PIXELS = 4096 * 4096
MAX_STEPS = 1000
MAX_LAYERS = 8
MAX_IMAGES = 10_000
MAX_SEED = 2**64 - 1
SEED = Integer(0, MAX_SEED)
IMAGE_INDEX = Integer(0, MAX_IMAGES - 1)
NUM_IMAGES = Integer(1, MAX_IMAGES)
SIDE = Integer(32, 4096)  # of a square with the same area
REFERENCE_PIXELS = Integer(32 * 32)  # the smallest image


# Commands with a canvas, commands that sample from a prompt, and all that generate.
CANVAS = ("generate", "edit")
WORDS = (*CANVAS, "compose")
IMAGE_COMMANDS = (*WORDS, "decompose")
TASKS = ("generate", "edit", "decompose")  # of the server
GENERATION = "generation"  # the table of config.toml for what changes from image to image


class Recommended(NamedTuple):
    """A model's recommended sampling; the fields are those of `GenerationParameters`.

    Attributes:
        num_inference_steps: denoising steps.
        cfg_scale: guidance.
        shift: a static shift of the schedule; None takes the checkpoint's own.
        sigmas: unshifted noise levels; None is the uniform grid, or a distilled model's own.
        stretch: whether the schedule is stretched to the checkpoint's shift_terminal.
    """

    num_inference_steps: int
    cfg_scale: float
    shift: float | None
    sigmas: tuple[float, ...] | None
    stretch: bool


@dataclass(frozen=True, kw_only=True)
class GenerationParameters:
    """The parameters of `generate_pixels`, without the prompt, which is in the encoding, and the seed.

    Each field carries its `Option`: the flag, setting, JSON field and record by which the front ends know it.

    Attributes:
        width, height: size in pixels; multiples of 16.
        num_inference_steps: denoising steps, 1 … 1000.
        cfg_scale: classifier-free guidance; 1 turns it off, as does an encoding without a negative prompt.
        rng: "torch" draws the noise `torch.Generator("cpu")` would, "mlx" MLX's own.
        sigmas: unshifted noise levels in (0, 1], falling, instead of the uniform grid, one for each step.
        num_layers: with a layered model, the number of layers to decompose an image into, 1 … 8.
        single_layer: with a layered model that takes layers by name, generate the one that the prompt, or a mask, says.
        cfg_normalize: whether guidance keeps the length of each token's velocity; None is the model's default (layered
            models: no, all others: yes).
        strength: how much of an initial image is regenerated, above 0 and at most 1; without one it has no effect.
        shift: one static shift instead of the checkpoint's resolution-dependent one, as distilled models need it
            (3 for Lightning).
        solver: how velocities become steps; a name of `sampling.solvers.SOLVERS`.
        guidance_interval: "A:B", the part of the steps, from 0 to 1, that are guided; None is all.
        cfg_zero_star: CFG-Zero*: the negative velocity is scaled to fit, and the first step does not move.
        apg: eta of adaptive projected guidance; None is ordinary guidance.
        step_cache: METHOD or METHOD:THRESHOLD of `sampling.step_caches.METHODS`; None computes every pass.
        no_prefix_cache: whether a model that keeps the keys and values of text and references between steps computes
            them in every step instead: the same image but for rounding.
        stretch: whether the schedule is stretched to the checkpoint's shift_terminal, unless the shift is static;
            some distilled LoRAs were trained without.

    Raises:
        RequestError: a value is out of range; the message says which and what is allowed.
    """

    width: int = option(
        kind=Integer(SIZE_STEP, step=SIZE_STEP), help="pixels, a multiple of 16",
        group="size", commands=CANVAS, flags=("--width", "-W"), tasks=("generate",), line=True, record="always",
    )  # fmt: skip
    height: int = option(
        kind=Integer(SIZE_STEP, step=SIZE_STEP), help="pixels, a multiple of 16",
        group="size", commands=CANVAS, flags=("--height", "-H"), tasks=("generate",), line=True, record="always",
    )  # fmt: skip
    num_inference_steps: int = option(
        50, name="steps", kind=Integer(1, MAX_STEPS), help="denoising steps", usual="50",
        group="sampling", commands=(*IMAGE_COMMANDS, "plan"), flags=("--steps",), tasks=TASKS,
        line=True, record="always",
        config=(Config(commands=(*TASKS, "plan"), table=GENERATION, usual="the model's own", example=30),),
        but={"edit": {"usual": "40"}, "compose": {"usual": "40"}, "plan": {"usual": "the model's own"}},
    )  # fmt: skip
    cfg_scale: float = option(
        4.0, kind=Number(1, 100), help="guidance scale; 1 turns guidance off", usual="4.0",
        group="sampling", commands=IMAGE_COMMANDS, flags=("--cfg-scale", "-g", "--guidance"), metavar="S",
        tasks=TASKS, line=True, record="always", config=(Config(commands=TASKS, usual="the model's own", example=4.0),),
    )  # fmt: skip
    rng: Rng = option(
        "torch", kind=Choice(RNGS), help="the generator of the noise: PyTorch's on the CPU, or MLX's", usual="torch",
        group="sampling", commands=IMAGE_COMMANDS, flags=("--rng",), tasks=TASKS, line=True, record="always",
        page=False,
    )  # fmt: skip
    sigmas: tuple[float, ...] | None = option(None, kind=Several(Number(0, 1, above=True)), record="always")
    shift: float | None = option(None, kind=Number(0, 100, above=True), record="always")
    solver: SolverName = option(
        "euler", kind=Choice(SOLVER_NAMES), help="how velocities become steps; heun takes two passes a step",
        usual="euler", group="sampling", commands=(*IMAGE_COMMANDS, "plan"), flags=("--solver",), tasks=TASKS,
        line=True, record="set", config=(Config(commands=(*TASKS, "plan"), example="unipc"),),
    )  # fmt: skip
    guidance_interval: str | None = option(
        None, kind=Parsed(INTERVAL_WORDS, parse_interval), group="sampling", commands=IMAGE_COMMANDS,
        flags=("--guidance-interval",), metavar="A:B", tasks=TASKS, line=True, record="set",
        help="guide only this part of the steps, such as 0.1:0.9; the others take one pass",
        config=(Config(commands=TASKS, example="0:0.8"),),
    )  # fmt: skip
    cfg_zero_star: bool = option(
        False, kind=Switch(), group="sampling", commands=IMAGE_COMMANDS, flags=("--cfg-zero-star",), tasks=TASKS,
        help="guidance by CFG-Zero*: the negative velocity is scaled to fit, and the first step rests",
        line=True, record="set", config=(Config(commands=TASKS, example=True),),
    )  # fmt: skip
    apg: float | None = option(
        None, kind=Number(0, 10), group="sampling", commands=IMAGE_COMMANDS, flags=("--apg",), metavar="ETA",
        nargs="?", bare=0.0, tasks=TASKS, line=True, record="set",
        help="adaptive projected guidance: less saturated at high guidance; ETA weighs the part along the prompt's "
        "velocity, 0 if it is left out", config=(Config(commands=TASKS, example=0.0),),
    )  # fmt: skip
    step_cache: str | None = option(
        None, kind=Parsed(CACHE_WORDS, parse_cache), group="sampling", commands=(*IMAGE_COMMANDS, "plan"),
        flags=("--step-cache",), metavar="METHOD[:T]", tasks=TASKS, line=True, record="set", usual=NO_CACHE,
        help=f"leave passes out that would change little: {', '.join(CACHE_NAMES)}; T is the method's threshold, and a "
        "higher one saves more", config=(Config(commands=(*TASKS, "plan"), example="teacache"),),
    )  # fmt: skip
    stretch: bool = option(True, kind=Switch(), record="set")
    strength: float = option(
        0.6, kind=Number(0, 1, above=True), help="how much of the image changes, above 0 and at most 1", usual="0.6",
        group="image to image", commands=CANVAS, flags=("--strength",), metavar="S", tasks=CANVAS,
        record="started from", needs=("images",), but={"edit": {"needs": ("images", "mask")}},
    )  # fmt: skip
    num_layers: int = option(
        4, kind=Integer(1, MAX_LAYERS), help=f"number of layers, 1 to {MAX_LAYERS}", usual="4",
        group="layers", commands=("decompose", "plan"), flags=("--layers",), metavar="N", tasks=("decompose",),
        record="layered", but={"plan": {"help": "number of layers of a layered model"}},
        config=(Config(help="how many layers an image is decomposed into", example=4),),
    )  # fmt: skip
    single_layer: bool = option(False, kind=Switch(), record="set")
    cfg_normalize: bool | None = option(
        None, kind=Switch(), help="guidance keeps the length of each token's velocity",
        group="sampling", commands=("decompose",), flags=("--cfg-normalize",), tasks=("decompose",), record="layered",
    )  # fmt: skip
    no_prefix_cache: bool = option(
        False, kind=Switch(), group="sampling", commands=(*CANVAS, "plan"), flags=("--no-prefix-cache",), tasks=CANVAS,
        help="with Qwen-Image-2.1, compute text and references in every step: less memory, much more time",
        line=True, record="set", page=False, config=(Config(commands=CANVAS, example=True),),
        but={"plan": {"help": "with Qwen-Image-2.1, as in generate"}},
    )  # fmt: skip

    def __post_init__(self) -> None:
        check_size(self.width, self.height)
        if self.sigmas is not None:
            object.__setattr__(self, "sigmas", _check_sigmas(self.sigmas))
            object.__setattr__(self, "num_inference_steps", len(self.sigmas))
        for row in options_of(type(self)):
            value = getattr(self, row.field)
            if row.field not in ("width", "height", "sigmas") and not (value is None and _may_be_none(self, row.field)):
                object.__setattr__(self, row.field, row.kind.check(row.field, value))
        if self.step_cache == NO_CACHE:  # said against a config or a preset
            object.__setattr__(self, "step_cache", None)
        check_cache(self.step_cache, self.num_inference_steps)
        self.check_guidance(self.num_inference_steps, negative=True)

    def check_guidance(self, steps: int, negative: bool) -> None:
        """Raises RequestError if a variant of guidance has no effect in these steps."""
        check_guidance(
            steps=steps, cfg_scale=self.cfg_scale if negative else 1.0,
            interval=self.guidance_interval, zero_star=self.cfg_zero_star, apg=self.apg,
        )  # fmt: skip

    @classmethod
    def from_options(cls, options: Mapping[str, Any], **fixed: Any) -> GenerationParameters:
        """Makes parameters from a request's options.

        Args:
            options: options, keyed by name; missing ones and None take the defaults; other options are ignored.
            fixed: values that override the options, keyed by field.

        Raises:
            RequestError: a value is out of range.
        """
        values = {row.field: options[row.name] for row in options_of(cls) if options.get(row.name) is not None}
        return cls(**(values | fixed))

    def recorded(self, *kinds: str) -> dict[str, Any]:
        """The values for an image's record whose `Option.record` is one of `kinds`, keyed by option."""
        values = [(row, getattr(self, row.field)) for row in options_of(type(self)) if row.record in kinds]
        return {
            row.name: value for row, value in values if row.record != "set" or value != getattr(type(self), row.field)
        }


def _may_be_none(parameters: GenerationParameters, field: str) -> bool:
    return getattr(type(parameters), field, ...) is None


def check_size(width: int, height: int, step: int = SIZE_STEP) -> None:
    """Raises RequestError unless both sides are positive multiples of `step` and the area is at most 16.8 MP."""
    for name, value in (("width", width), ("height", height)):
        Integer(1).check(name, value)
        if value % step:
            below, above = value // step * step, -(-value // step) * step
            near = f"{below} and {above} are near" if below else f"{above} is the nearest"
            raise RequestError(f"{name} is {value}, but must be a multiple of {step}; {near}")
    if width * height > MAX_PIXELS:
        raise RequestError(f"{width}x{height} are {width * height:,} pixels; at most {MAX_PIXELS:,} work")


def check_fits(parameters: GenerationParameters, variant: Variant) -> None:
    """Raises RequestError if the model does not generate images of that size, or not in that number of steps."""
    check_size(parameters.width, parameters.height, variant.size_multiple)
    if variant.sigmas and parameters.sigmas is None and parameters.num_inference_steps != len(variant.sigmas):
        raise RequestError(
            f"steps is {parameters.num_inference_steps}, but this model was distilled for its own "
            f"{len(variant.sigmas)} noise levels: leave the steps out"
        )


def explicit_size(width: int | None, height: int | None) -> tuple[int, int] | None:
    """(width, height), or None without either; raises RequestError for one alone."""
    if (width is None) != (height is None):
        raise RequestError("give both width and height, or neither")
    return None if width is None or height is None else (width, height)


def check_seed(seed: int) -> int:
    """Returns the seed; raises RequestError unless it is an integer from 0 to 2**64 - 1."""
    checked: int = SEED.check("seed", seed)
    return checked


def check_image_index(index: int) -> int:
    """Returns the index; raises RequestError unless it is an integer from 0 to 9999."""
    checked: int = IMAGE_INDEX.check("image_index", index)
    return checked


def check_num_images(count: int) -> int:
    """Returns the number of images; raises RequestError unless it is an integer from 1 to 10000."""
    checked: int = NUM_IMAGES.check("num_images", count)
    return checked


def check_side(resolution: int) -> None:
    """Raises RequestError unless it is an integer from 32 to 4096: the side of a square with the same area."""
    SIDE.check("resolution", resolution)


def check_reference_pixels(pixels: int | None) -> None:
    """Raises RequestError unless it is None or an integer of at least 1024, the smallest image."""
    if pixels is not None:
        REFERENCE_PIXELS.check("reference_pixels", pixels)


def _check_sigmas(sigmas: Sequence[float]) -> tuple[float, ...]:
    try:
        values = tuple(float(s) for s in sigmas)
    except (TypeError, ValueError, OverflowError):
        values = ()
    falling = all(a > b for a, b in pairwise(values))
    if not values or not falling or not all(0 < s <= 1 for s in values):
        raise RequestError(f"sigmas is {sigmas!r:.80}, but must be falling numbers above 0 and at most 1")
    return values
