"""qwen-image-mlx plan: estimates memory use before anything is downloaded or loaded."""

from __future__ import annotations

import argparse
import logging
from typing import TYPE_CHECKING, Any

from ..errors import RequestError
from ..pipeline.parameters import GenerationParameters, check_size
from ..pipeline.request import parse_size
from ..runtime.options import OPTIONS
from ..runtime.ranks import current
from ..sampling.choices import NO_CACHE, parse_cache
from ..variants import DEFAULT_MODEL
from .config import config_options
from .flags import add_options
from .results import json_text

if TYPE_CHECKING:
    from ..pipeline.pipeline import QwenImagePipeline
    from ..runtime.memory_plan import MemoryPlan, Work
    from ..runtime.session import Session

logger: logging.Logger = logging.getLogger(__name__)

DESCRIPTION = """\
Estimate the memory that each stage of generation takes, in GB, for every residency of the weights, and show which fits.

  resident   everything stays loaded, for the next image
  staged     encoders, transformer and autoencoder one after another (what generate does)
  streamed   layers are read from the files again at each pass

Reads configs and, for a model on disk, the headers of its files; no weights are downloaded."""

_OTHERS = ("8", "6", "4")  # quantizations that are shown too if none is given

SHARES = True  # all ranks run it


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Adds the command's flags."""
    parser = commands.add_parser(
        "plan",
        help="estimate the memory that a model takes",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add_options(parser, "plan")
    add("--references", type=int, metavar="N", help="reference images of an editing model (default: 1)")
    add("--json", action="store_true", help="print JSON, in bytes")
    return parser


def run(arguments: argparse.Namespace) -> None:
    """Prints the tables."""
    from ..doctor.rates import duration
    from ..runtime.memory_plan import table_of
    from ..runtime.session import Session
    from .console import messages

    given = {name for name, value in vars(arguments).items() if value is not None}
    usual = {"memory": "auto", "num_layers": GenerationParameters.num_layers, **config_options(arguments, "plan")}
    for name, value in usual.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    for row in (OPTIONS["num_layers"], OPTIONS["steps"]):
        value, kind = getattr(arguments, row.name), row.kind
        if value is not None and not kind.accepts(value):
            raise RequestError(f"{row.flag} is {value}, but must be from {kind.low} to {kind.high}")
    if arguments.group_size is not None and arguments.quantize is None:
        raise RequestError("--group-size needs --quantize")

    def plans_for(quantize: str | None) -> tuple[Session, Work, list[MemoryPlan]]:
        session = Session.open(vars(arguments) | {"quantize": quantize}, DEFAULT_MODEL)
        work = _work(arguments, session.pipeline)
        return session, work, session.alternatives(work)

    with messages():
        session, work, plans = plans_for(arguments.quantize)
        others = [] if arguments.quantize else [(bits, plans_for(bits)[2]) for bits in _OTHERS]
        if "num_layers" in given and not session.pipeline.variant.layered:
            logger.warning("--layers has no effect: %s is not a layered model", session.pipeline.model)
    ranks = current()
    shared = session.shared_table(work) if ranks.size > 1 else ""
    if not ranks.leads:
        return
    budget, model = session.memory.budget, session.pipeline.model
    licence = str(session.pipeline.variant.licence)
    presets = _presets(session, work, arguments)
    if arguments.json:
        more = {"presets": presets, "ranks": shared.splitlines()}
        print(json_text({"licence": licence} | _facts(model, work, plans, budget) | more))
        return
    quantized = f", --quantize {arguments.quantize}" if arguments.quantize else ""
    print(f"{model}: {plans[0].disk / 1e9:.1f} GB on disk; {work.width}x{work.height}{quantized}; "
          f"{budget / 1e9:.1f} GB may be used")  # fmt: skip
    print(f"licence of the released weights: {licence}")
    print(table_of(plans, budget))
    print("\npreset    steps  passes      time  on this machine, modelled; the passes of a step cache are an estimate")
    for one in presets:
        time, cache = duration(one["modelled_seconds"]), f", {one['step_cache']}" if one["step_cache"] else ""
        print(f"{one['preset']:8}  {one['steps']:5}  {one['passes']:6}  {time:>8}  {one['solver']}{cache}")
    for bits, plans in others:
        print(f"\nwith --quantize {bits}")
        print(table_of(plans, budget))
    if shared:
        print(f"\n{shared}")


def _presets(session: Session, work: Work, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """What each preset takes: passes, and the seconds that the work of their transformer is modelled to take.

    With --steps they are the presets of that number; --solver overrides their own.
    """
    from ..doctor.rates import product_rate
    from ..pipeline.presets import PRESETS
    from ..sampling.solvers import SOLVERS

    flop, rate = session.pass_flop(work), product_rate()
    found = []
    for name in PRESETS:
        preset = session.preset(name, arguments.steps)
        solver = arguments.solver or preset.values.get("solver", "euler")
        passes = round(preset.passes(work.guided) * SOLVERS[solver].count(preset.steps) / preset.steps)
        found.append({
            "preset": name, "steps": preset.steps, "solver": solver,
            "step_cache": preset.values.get("step_cache"), "passes": passes,
            "modelled_seconds": round(passes * flop / rate, 1),
        })  # fmt: skip
    return found


def _work(arguments: argparse.Namespace, pipeline: QwenImagePipeline) -> Work:
    from ..images.geometry import size_of_area
    from ..runtime.memory_plan import Work

    variant = pipeline.variant
    references = arguments.references
    if references is None:
        references = int(variant.needs_images)
    most = references if variant.max_images is None else variant.max_images
    if not int(variant.needs_images) <= references <= most:
        raise RequestError(f"--references is {references}, which {pipeline.model} does not take")
    square = (1, 1)
    if arguments.size is not None:
        size = parse_size(arguments.size, "--size")
        if isinstance(size, str):
            raise RequestError(f"--size is {arguments.size}, but must be WIDTHxHEIGHT here")
    elif variant.layered:
        size = size_of_area(variant.resolutions[0] ** 2, square)
    else:
        size = size_of_area(variant.target_area, square) if references else variant.size_of("1:1")
    check_size(*size, variant.size_multiple)
    shown = size if variant.layered else size_of_area(variant.reference_area, square) if references else size
    return Work(
        width=size[0], height=size[1], frames=arguments.num_layers + 1 if variant.layered else 1,
        shown=(shown,) * references, encoded=shown[0] * shown[1] if references else 0,
        guided=variant.cfg_scale > 1, steps=variant.steps if arguments.steps is None else arguments.steps,
        solver=arguments.solver or "euler", step_cache=_cache(arguments.step_cache),
        keeps_prefix=not arguments.no_prefix_cache,
    )  # fmt: skip


def _cache(text: str | None) -> str | None:
    """A step cache that is one; raises RequestError."""
    return None if text is None or parse_cache(text)[0] == NO_CACHE else text


def _facts(model: str, work: Work, plans: list[MemoryPlan], budget: int) -> dict[str, Any]:
    return {
        "model": model,
        "disk": plans[0].disk,
        "width": work.width,
        "height": work.height,
        "memory": budget,
        "plans": [
            {
                "residency": plan.residency.name,
                "peak": plan.peak,
                "fits": plan.fits(budget),
                "needs_pack": plan.needs_pack,
                "stages": {stage.name: {"resident": stage.resident, "peak": stage.peak} for stage in plan.stages},
            }
            for plan in plans
        ],
    }
