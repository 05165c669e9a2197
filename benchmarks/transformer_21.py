"""A step of Qwen-Image-2.1's transformer at real width (4096, 32 heads), fp32, with random weights.

    python benchmarks/transformer_21.py [--tokens 1024] [--reference-tokens 256] [--references 0 1 4 10] [--layers 2]
                                        [--rounds 5] [--json FILE]

First ours against mflux's, from text alone: both keep the text between steps; mflux packs its projections and compiles
its step. Then ours with reference images, with the prefix cache and without: the first step, which computes the prefix,
and a later one. All have the same weights; how far velocities are apart is printed. Memory is MLX's own peak in a step
in addition to the weights, next to what the memory plan counts for a CPU.

Needs the environment that mflux_env.py makes for mflux's rows. Takes a quarter of an hour on two cores and 4 GB.
"""

from __future__ import annotations

import tempfile
from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from common import MIB, Table, Targets, Worker, finish, median_ratio, parser, preload_blas, stopwatch, take_turns
from mflux_env import MFLUX, add_option, mflux_python

PIPELINE = "QwenImage21Pipeline"
TEXT_TOKENS = 64
SIGMAS = (0.6, 0.5)
STEPS = 40
AT_MOST = 0.95


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--layers", type=int, default=2, help="blocks (2)")
    options.add_argument("--rounds", type=int, default=5, help="rounds the medians are taken of (5)")
    options.add_argument("--tokens", type=int, default=1024, help="image tokens against mflux, a square number (1024)")
    options.add_argument(
        "--reference-tokens", type=int, default=256, help="of the target and each reference in the second part (256)"
    )
    options.add_argument("--references", type=int, nargs="*", default=[0, 1, 4, 10], help="how many (0 1 4 10)")
    add_option(options)
    arguments = options.parse_args()
    preload_blas()
    targets, tables = Targets(), []
    with tempfile.TemporaryDirectory() as folder:
        weights = str(Path(folder, "transformer.safetensors"))
        write_weights(weights, arguments.layers)
        ours = Ours(weights, arguments.layers)
        if python := mflux_python(arguments.mflux):
            tables += against_mflux(ours, python, weights, arguments, Path(folder), targets)
        if arguments.references:
            tables += with_references(ours, arguments, targets)
    for table in tables:
        table.print()
    finish([*tables, targets], arguments.json)


def against_mflux(
    ours: Ours, python: Path, weights: str, options: Namespace, folder: Path, targets: Targets
) -> list[Table]:
    """A step from text alone, both with the text kept."""
    import mlx.core as mx
    import numpy as np

    side = round(options.tokens**0.5)
    latents = mx.random.normal((1, side * side, 64), key=mx.random.key(1))
    text = mx.random.normal((1, TEXT_TOKENS, 4096), key=mx.random.key(2))
    inputs, output = str(folder / "inputs.safetensors"), str(folder / "velocity.safetensors")
    mx.save_safetensors(inputs, {"latents": latents, "text": text})
    denoiser = ours.denoiser((side, side), text, [])
    mine = np.array(denoiser.velocities(latents, 0)[0])
    with Worker(python, "mflux_worker_21.py") as worker:
        worker.call("load", weights=weights, layers=options.layers)
        worker.call("prepare", inputs=inputs, grid=(side, side), sigmas=SIGMAS)
        worker.call("velocity", output=output)
        theirs = np.array(mx.load(output)["velocity"])
        runs = {"ours": lambda: ours.step(denoiser, latents), MFLUX: lambda: worker.call("step")}
        seconds = take_turns(runs, options.rounds)
    apart = float(np.abs(mine - theirs).max() / np.abs(mine).max())
    ratio = median_ratio(seconds, "ours", MFLUX)
    targets.check(f"a step / {MFLUX}, {side * side} tokens", ratio, AT_MOST)
    rows = [(name, 1e3 * median(times), median_ratio(seconds, name, MFLUX)) for name, times in seconds.items()]
    title = f"One step, {side * side} image and {TEXT_TOKENS} text tokens, {options.layers} blocks; "
    return [Table(f"{title}velocities differ by {apart:.1e} of the largest", ["", "ms", f"ratio to {MFLUX}"], rows)]


def with_references(ours: Ours, options: Namespace, targets: Targets) -> list[Table]:
    """Steps with references, with the prefix cache and without."""
    import mlx.core as mx

    side = round(options.reference_tokens**0.5)
    latents = mx.random.normal((1, side * side, 64), key=mx.random.key(1))
    columns = ["references", "first step, ms", "later, kept", "later, not kept", "ratio", f"{STEPS} steps, ratio",
               "first step, MiB", "plan, MiB", "later, kept", "later, not kept", "kept"]  # fmt: skip
    title = f"Steps with references, {side * side} tokens each and of the target, {options.layers} blocks"
    table = Table(title, columns)
    for count in options.references:
        places = count * side * side // 4
        text = mx.random.normal((1, TEXT_TOKENS + places, 4096), key=mx.random.key(3))
        make = partial(ours.denoiser, (side, side), text, [(side, side)] * count)
        kept, anew = make(), make(keep=False)
        first_memory = peak(partial(ours.step, make(), latents))
        ours.step(kept, latents)
        memory = [peak(partial(ours.step, one, latents)) for one in (kept, anew)]
        seconds = take_turns(
            {
                "first": lambda make=make: ours.step(make(), latents),
                "kept": partial(ours.step, kept, latents),
                "anew": partial(ours.step, anew, latents),
            },
            options.rounds,
        )
        first, later, without = (median(seconds[name]) for name in ("first", "kept", "anew"))
        ratio = median_ratio(seconds, "kept", "anew")
        whole = (first + (STEPS - 1) * later) / (STEPS * without)
        keys = sum(array.nbytes for branch in kept._branches for pair in branch.prefix for array in pair)
        planned = ours.planned(side, count)
        table.rows.append(
            (count, 1e3 * first, 1e3 * later, 1e3 * without, ratio, whole, first_memory / MIB, planned / MIB,
             *(amount / MIB for amount in memory), keys / MIB)
        )  # fmt: skip
        targets.check(f"{count} references: a first step's memory / plan", first_memory / planned, 1.0)
    return [table]


def peak(run: Any) -> int:
    """The most bytes that MLX held during a call, beyond those before it."""
    import mlx.core as mx

    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    run()
    return int(mx.get_peak_memory() - before)


def write_weights(file: str, layers: int) -> None:
    """A transformer of this many blocks, under the checkpoint's names."""
    import mlx.core as mx

    from qwen_image_mlx.weights.mapping import expected_tensors
    from qwen_image_mlx.weights.synthetic import random_values

    row, config = _row(layers)
    specs = list(expected_tensors(row, config).values())
    keys = mx.random.split(mx.random.key(0), len(specs))
    mx.save_safetensors(file, {spec.name: random_values(spec, keys[n]) for n, spec in enumerate(specs)})
    mx.clear_cache()


def _row(layers: int) -> tuple[Any, Any]:
    """The registry's row of the transformer, and its released config with this many blocks."""
    from dataclasses import replace

    from qwen_image_mlx.registry import components_of
    from qwen_image_mlx.variants import VARIANTS

    row = components_of(VARIANTS[PIPELINE].classes)["transformer"]
    return row, replace(row.released, num_layers=layers)


class Ours:
    """This package."""

    def __init__(self, weights: str, layers: int):
        import mlx.core as mx

        from qwen_image_mlx.models.qwen_image_21.modulation import TimeModulation
        from qwen_image_mlx.weights.loader import ComponentWeights, load_module
        from qwen_image_mlx.weights.safetensors_files import component_tensors

        row, self.config = _row(layers)
        tensors = component_tensors((Path(weights),), None)
        stored = ComponentWeights(row, self.config, tensors, ("main", "modulation"))
        (network,) = row.networks
        self.model = load_module(network.build(self.config), stored, "main", mx.float32)
        modulation = load_module(TimeModulation(self.config), stored, "modulation", mx.float32)
        self.rows, self.still = modulation.table(mx.array([SIGMAS[0], 0.0]), mx.float32)
        mx.eval(self.rows, self.still)

    def denoiser(
        self, grid: tuple[int, int], text: Any, references: Sequence[tuple[int, int]], keep: bool = True
    ) -> Any:
        """A denoiser whose references' places stand among the first text tokens."""
        import mlx.core as mx

        from qwen_image_mlx.models.qwen_image_21.denoiser import Condition, Denoiser, Reference

        shown = [
            Reference(mx.random.normal((1, h * w, 64), key=mx.random.key(9 + n)), h, w)
            for n, (h, w) in enumerate(references)
        ]
        places = [h * w // 4 for h, w in references]
        starts = tuple(4 * (n + 1) + sum(places[:n]) for n in range(len(places)))
        made = Denoiser(
            self.model, self.config, table=[self.rows], still=self.still, references=shown, grid=grid,
            conditions=[Condition(text, starts)], dtype=mx.float32, keep_prefix=keep,
        )  # fmt: skip
        mx.eval(made.prepared)
        return made

    def step(self, denoiser: Any, latents: Any) -> float:
        """Seconds of one step, block by block as the pipeline runs it."""
        import numpy as np

        from qwen_image_mlx.gpu import Pace
        from qwen_image_mlx.sampling.denoise import denoise
        from qwen_image_mlx.sampling.schedule import Schedule

        schedule, pace = Schedule(np.array(SIGMAS, np.float32)), Pace()
        return stopwatch(lambda: denoise(lambda x, *_: denoiser.velocities(x, 0, pace), latents, schedule, None))

    def planned(self, side: int, references: int) -> int:
        """Bytes that the memory plan counts for a first step, in addition to the weights."""
        from tempfile import TemporaryDirectory

        from qwen_image_mlx import QwenImagePipeline
        from qwen_image_mlx.runtime.memory_plan import Planner, Work
        from qwen_image_mlx.runtime.residency import DEFAULT
        from qwen_image_mlx.weights.synthetic import released, write_configs

        with TemporaryDirectory() as folder:
            write_configs(Path(folder), released(PIPELINE) | {"transformer": self.config}, pipeline=PIPELINE)
            components = QwenImagePipeline.from_pretrained(folder, dtype="float32").components
            size = (16 * side, 16 * side)
            work = Work(*size, shown=(size,) * references, text_tokens=TEXT_TOKENS, guided=False, steps=1)
            planner = Planner(components, work, DEFAULT)
            return planner.denoise_bytes() + planner.table()


if __name__ == "__main__":
    main()
