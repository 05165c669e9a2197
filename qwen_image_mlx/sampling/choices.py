"""What can be chosen of sampling, as words: solvers, step caches, the interval of guidance. Importable without MLX."""

from __future__ import annotations

from ..errors import RequestError
from ..names import SolverName

SOLVER_NAMES: tuple[SolverName, ...] = ("euler", "heun", "unipc", "dpmpp-2m", "res-2m", "lcm")
CACHE_NAMES = ("teacache", "first-block", "easycache", "magcache", "taylorseer")
FEW_STEPS = 8  # with so few, every step differs too much from the last for a step cache
NO_CACHE = "off"

CACHE_WORDS = f"{NO_CACHE}, or one of {', '.join(CACHE_NAMES)}, and a threshold from 0 to 100 after a colon if you like"
INTERVAL_WORDS = "like 0.1:0.9, two numbers from 0 to 1, the first one smaller"


def parse_cache(text: str) -> tuple[str, float | None]:
    """Method and threshold (None: the method's own) of METHOD[:THRESHOLD]; the method "off" is none.

    Raises:
        RequestError: the method is unknown, or the threshold not a number from 0 to 100.
    """
    method, colon, figure = text.partition(":")
    try:
        threshold = float(figure) if colon else None
    except ValueError:
        threshold = -1.0
    known = method in CACHE_NAMES or (method == NO_CACHE and not colon)
    if not known or (threshold is not None and not 0 <= threshold <= 100):
        raise RequestError(f"step_cache is {text!r:.80}, but must be {CACHE_WORDS}")
    return method, threshold


def parse_interval(text: str) -> tuple[float, float]:
    """The two ends of A:B; raises RequestError unless 0 <= A < B <= 1."""
    first, _, last = text.partition(":")
    try:
        begin, end = float(first), float(last)
    except ValueError:
        begin, end = 1.0, 0.0
    if not 0 <= begin < end <= 1:
        raise RequestError(f"guidance_interval is {text!r:.80}, but must be {INTERVAL_WORDS}")
    return begin, end


def skipped_steps(steps: int, strength: float) -> int:
    """How many of the first steps are left out for an image that is only partly regenerated; at least one is taken.

    Source: get_timesteps of diffusers' QwenImageImg2ImgPipeline.

    Args:
        steps: of the schedule.
        strength: how much of the image is regenerated, above 0.
    """
    return min(int(max(steps - min(steps * strength, steps), 0)), steps - 1)


def check_guidance(*, steps: int, cfg_scale: float, interval: str | None, zero_star: bool, apg: float | None) -> None:
    """Raises RequestError for variants of guidance that contradict each other, or that nothing is left of.

    Args:
        steps: that are taken.
        cfg_scale: guidance; 1 is off, and stands for a missing negative prompt too.
        interval, zero_star, apg: the variants; None or False where one is not chosen.
    """
    variants = [
        name
        for name, chosen in (
            ("a guidance interval", interval is not None), ("CFG-Zero*", zero_star), ("APG", apg is not None),
        )
        if chosen
    ]  # fmt: skip
    if variants and cfg_scale <= 1:
        raise RequestError(
            f"{' and '.join(variants)} would change nothing: guidance is off; it needs a negative prompt and a "
            "cfg_scale above 1"
        )
    if zero_star and apg is not None:
        raise RequestError("CFG-Zero* and APG are two ways to combine the same two velocities: choose one")
    if interval is not None:
        begin, end = (int(part * steps) for part in parse_interval(interval))
        if begin >= end:
            raise RequestError(f"the guidance interval {interval} holds no step of {steps}: make it wider")
    if zero_star and steps <= 1:
        raise RequestError("CFG-Zero* leaves the first step out, and there is only one")


def check_cache(text: str | None, steps: int) -> None:
    """Raises RequestError for a step cache with so few steps that it saves nothing."""
    if text is not None and parse_cache(text)[0] != NO_CACHE and steps <= FEW_STEPS:
        raise RequestError(
            f"a step cache is useless with {steps} step{'s' * (steps > 1)}: up to {FEW_STEPS}, each differs too much "
            "from the last",
            cause="few steps",
        )
