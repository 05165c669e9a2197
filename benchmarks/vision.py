"""The vision tower at real width (1280, 16 heads), fp32, with random weights: time, and how often Python waits in it.

    python benchmarks/vision.py [--depth 8] [--rounds 5] [--json FILE]

Ours, mflux's and transformers' (the reference). At 384x384 pixels, which Edit-Plus shows the encoder for each image,
and at a border size whose windows do not come out even. Eight of the 32 blocks: seven attend inside windows, the eighth
to the whole image, which is the real tower's rhythm. Needs the extra [test], and for mflux the environment that
mflux_env.py makes. Two minutes and 2 GB.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from common import (
    Table,
    Targets,
    Worker,
    count_host_syncs,
    finish,
    median_ratio,
    parser,
    preload_blas,
    stopwatch,
    take_turns,
)
from mflux_env import add_option, mflux_python

if TYPE_CHECKING:
    from qwen_image_mlx.models.qwen2_5_vl.config import VisionConfig

GRIDS = ((28, 28), (22, 34))  # patches: 392x392 pixels, which 384x384 is rounded to, and 308x476


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--depth", type=int, default=8, help="blocks (8)")
    options.add_argument("--rounds", type=int, default=5, help="rounds the medians are taken of (5)")
    add_option(options)
    arguments = options.parse_args()
    preload_blas()
    from qwen_image_mlx.models.qwen2_5_vl.config import VisionConfig

    depth = arguments.depth
    config = replace(VisionConfig(), depth=depth, fullatt_block_indexes=tuple(range(7, depth, 8)))
    tables: list[Table] = []
    targets = Targets()
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder, "model.safetensors")
        write_weights(weights, config)
        sides: list[Any] = [Ours(weights, config), Reference(weights, config)]
        python = mflux_python(arguments.mflux)
        if python:
            sides.append(Mflux(python, weights, config))
        for grid in GRIDS:
            inputs = Path(folder, f"{grid[0]}x{grid[1]}.safetensors")
            write_inputs(inputs, grid, config)
            runs: dict[str, Callable[[], float]] = {s.name: partial(s.run, inputs, grid) for s in sides}
            seconds = take_turns(runs, arguments.rounds)
            base = sides[-1].name
            rows = [
                (s.name, 1e3 * median(seconds[s.name]), median_ratio(seconds, s.name, base), s.syncs, s.error(sides[1]))
                for s in sides
            ]
            columns = ["", "ms", f"ratio to {base}", "host syncs", "relative difference to transformers"]
            tables.append(Table(f"{depth} blocks, {grid[0]}x{grid[1]} patches", columns, rows))
            tables[-1].print()
        targets.check("waits of Python for a result", sides[0].syncs, 0)
    finish([*tables, targets], arguments.json)


def write_weights(file: Path, config: VisionConfig) -> None:
    """A tower under the checkpoint's names."""
    import mlx.core as mx

    from qwen_image_mlx.weights.mapping import expected_tensors
    from qwen_image_mlx.weights.synthetic import ROWS, random_values

    specs = list(expected_tensors(ROWS["vision"], config).values())
    keys = mx.random.split(mx.random.key(0), len(specs))
    mx.save_safetensors(str(file), {spec.name: random_values(spec, keys[n]) for n, spec in enumerate(specs)})


def write_inputs(file: Path, grid: tuple[int, int], config: VisionConfig) -> None:
    """Patches of one image: both frames are the same, as the processor makes them."""
    import mlx.core as mx

    shape = (grid[0] * grid[1], config.in_channels, 1, config.patch_size**2)
    patches = mx.random.normal(shape, key=mx.random.key(1))
    twice = mx.repeat(patches, config.temporal_patch_size, axis=2).reshape(shape[0], -1)
    mx.save_safetensors(str(file), {"patches": twice, "frame": patches.reshape(shape[0], -1)})


class Side:
    """One library: `run` returns seconds and leaves `features` and `syncs`."""

    name: str
    features: Any
    syncs: int | str = "-"

    def error(self, reference: Side) -> float:
        """Largest difference of the features, relative to their largest."""
        import numpy as np

        return float(np.abs(self.features - reference.features).max() / np.abs(reference.features).max())


class Ours(Side):
    """This package."""

    name = "ours"

    def __init__(self, weights: Path, config: VisionConfig):
        import mlx.core as mx

        from qwen_image_mlx.models.qwen2_5_vl.vision import VisionTower
        from qwen_image_mlx.weights.loader import ComponentWeights, load_module
        from qwen_image_mlx.weights.safetensors_files import component_tensors
        from qwen_image_mlx.weights.synthetic import ROWS

        tensors = ComponentWeights(ROWS["vision"], config, component_tensors((weights,), None), ("main",))
        self.tower = load_module(VisionTower(config), tensors, "main", mx.float32)

    def run(self, inputs: Path, grid: tuple[int, int]) -> float:
        import mlx.core as mx
        import numpy as np

        patches, result = mx.load(str(inputs))["frame"], []
        mx.eval(patches)

        def work() -> None:
            result.append(self.tower(patches, *grid))
            mx.eval(result)

        with count_host_syncs() as syncs:
            seconds = stopwatch(work)
        self.syncs, self.features = syncs(), np.array(result[0])
        return seconds


class Reference(Side):
    """transformers' Qwen2.5-VL, on torch."""

    name = "transformers"

    def __init__(self, weights: Path, config: VisionConfig):
        import torch
        from safetensors.torch import load_file
        from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
        from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

        settings = Qwen2_5_VLVisionConfig(
            depth=config.depth,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_heads=config.num_heads,
            out_hidden_size=config.out_hidden_size,
            fullatt_block_indexes=list(config.fullatt_block_indexes),
        )
        settings._attn_implementation = "sdpa"
        self.tower = Qwen2_5_VisionTransformerPretrainedModel(settings)
        state = {name.removeprefix("visual."): tensor for name, tensor in load_file(weights).items()}
        self.tower.load_state_dict(state)
        self.tower.to(torch.float32).eval()

    def run(self, inputs: Path, grid: tuple[int, int]) -> float:
        import torch
        from safetensors.torch import load_file

        patches, result = load_file(inputs)["patches"], []

        def work() -> None:
            with torch.no_grad():
                result.append(self.tower(patches, grid_thw=torch.tensor([[1, *grid]])))

        seconds = stopwatch(work)
        self.features = result[0].pooler_output.numpy()
        return seconds


class Mflux(Side):
    """mflux, in its own environment and process; seconds and waits are counted there."""

    name = "mflux"

    def __init__(self, python: Path, weights: Path, config: VisionConfig):
        self.worker = Worker(python, "mflux_worker.py")
        full = list(config.fullatt_block_indexes)
        self.worker.call("load_vision", weights=str(weights), depth=config.depth, full=full)

    def run(self, inputs: Path, grid: tuple[int, int]) -> float:
        from safetensors.numpy import load_file

        output = str(inputs.with_suffix(".mflux.safetensors"))
        answer = self.worker.call("vision", inputs=str(inputs), grid=grid, output=output)
        self.syncs, self.features = answer["syncs"], load_file(output)["features"]
        return answer["seconds"]


if __name__ == "__main__":
    main()
