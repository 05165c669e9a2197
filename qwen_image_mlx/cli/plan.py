"""qwen-image-mlx plan: what painting will take in memory, before anything is downloaded or loaded."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from ..errors import RequestError
from ..pipeline.parameters import DTYPES, MAX_LAYERS, MAX_STEPS, check_size
from ..pipeline.request import parsed_size
from ..variants import DEFAULT_MODEL
from .config import add_config_flags, configured
from .results import json_text

if TYPE_CHECKING:
    from ..pipeline.components import Components
    from ..runtime.memory import MemoryPlan, Work

DESCRIPTION = """\
Say what each stage of painting will take in memory, in GB, for every way to keep weights there, and which fits.

  resident   everything stays loaded, for the next picture
  staged     encoders, transformer and autoencoder one after another (what generate does)
  streamed   layers are read from the files again at each pass

Reads configs, and of a model on disk the headers of its files; no weights are downloaded."""

_OTHERS = ("8", "6", "4")  # quantizations worth a look where nothing is said


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Adds the command's flags."""
    parser = commands.add_parser(
        "plan",
        help="say what a model will take in memory",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("model", nargs="?", metavar="MODEL", help="a local directory or a Hugging Face id "
        f"(default: {DEFAULT_MODEL})")  # fmt: skip
    add("--memory", metavar="M", help="what may be used, as 16GB; auto is this machine's "
        "(default: auto)")  # fmt: skip
    add("--revision", help="branch, tag or commit of a Hugging Face model")
    add("--dtype", choices=DTYPES, default=DTYPES[0], help="of the text encoder and the transformer")
    add("--quantize", metavar="Q", help="pack weights while they are loaded, as in generate")
    add("--group-size", type=int, metavar="G", help="columns that share a scale")
    add("--size", metavar="WxH", help="of the picture (default: the model's own)")
    add("--references", type=int, metavar="N", help="pictures an editing model is shown (default: 1)")
    add("--layers", type=int, metavar="N", help="of a layered model (default: 4)")
    add("--steps", type=int, metavar="N", help="denoising steps (default: the model's own)")
    add("--json", action="store_true", help="print JSON, in bytes")
    add_config_flags(parser)
    return parser


def run(arguments: argparse.Namespace) -> None:
    """Prints the tables."""
    from ..pipeline.pipeline import QwenImagePipeline
    from ..runtime.memory import alternatives, parse_memory, table_of
    from ..weights.quantize import NONE, Quantization
    from .console import messages

    usual = {"model": DEFAULT_MODEL, "memory": "auto", "layers": 4, **configured(arguments, "plan")}
    for name, value in usual.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    if not 1 <= arguments.layers <= MAX_LAYERS:
        raise RequestError(f"--layers is {arguments.layers}, but must be from 1 to {MAX_LAYERS}")
    if arguments.steps is not None and not 1 <= arguments.steps <= MAX_STEPS:
        raise RequestError(f"--steps is {arguments.steps}, but must be from 1 to {MAX_STEPS}")
    if arguments.group_size is not None and arguments.quantize is None:
        raise RequestError("--group-size needs --quantize")
    budget = parse_memory(arguments.memory).budget

    def plans_for(quantize: str | None) -> tuple[Components, Work, list[MemoryPlan]]:
        quantization = Quantization.parse(quantize or NONE, arguments.group_size if quantize else None)
        components = QwenImagePipeline.from_pretrained(
            arguments.model, revision=arguments.revision, dtype=arguments.dtype, quantize=quantization
        ).components
        work = _work(arguments, components)
        return components, work, alternatives(components, work, budget)

    with messages():
        components, work, plans = plans_for(arguments.quantize)
        others = [] if arguments.quantize else [(bits, plans_for(bits)[2]) for bits in _OTHERS]
    if arguments.json:
        print(json_text(_facts(components, work, plans, budget)))
        return
    quantized = f", --quantize {arguments.quantize}" if arguments.quantize else ""
    print(f"{arguments.model}: {plans[0].disk / 1e9:.1f} GB on disk; {work.width}x{work.height}{quantized}; "
          f"{budget / 1e9:.1f} GB may be used")  # fmt: skip
    print(table_of(plans, budget))
    for bits, plans in others:
        print(f"\nwith --quantize {bits}")
        print(table_of(plans, budget))


def _work(arguments: argparse.Namespace, components: Components) -> Work:
    from ..images.geometry import size_of_area
    from ..runtime.memory import Work

    variant = components.variant
    references = arguments.references
    if references is None:
        references = int(variant.takes_images)
    if references < 0 or (references and not variant.takes_images) or (variant.takes_images and not references):
        raise RequestError(f"--references is {references}, which {components.snapshot.model} does not take")
    square = (1, 1)
    if arguments.size is not None:
        size = parsed_size(arguments.size, "--size")
        if isinstance(size, str):
            raise RequestError(f"--size is {arguments.size}, but must be WIDTHxHEIGHT here")
    elif variant.layered:
        size = size_of_area(variant.resolutions[0] ** 2, square)
    else:
        size = size_of_area(variant.target_area, square) if variant.takes_images else variant.size_of("1:1")
    check_size(*size)
    shown = size if variant.layered else size_of_area(variant.reference_area, square) if references else size
    return Work(
        width=size[0], height=size[1], frames=arguments.layers + 1 if variant.layered else 1,
        shown=(shown,) * references, encoded=shown[0] * shown[1] if references else 0,
        guided=variant.cfg_scale > 1, steps=variant.steps if arguments.steps is None else arguments.steps,
    )  # fmt: skip


def _facts(components: Components, work: Work, plans: list[MemoryPlan], budget: int) -> dict[str, Any]:
    return {
        "model": components.snapshot.model,
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
