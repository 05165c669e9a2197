"""The autoencoder at real width (base_dim 96), fp32, random weights: time and peak memory of decoding and encoding.

    python benchmarks/vae.py [--sizes 256 512] [--rounds 3] [--json FILE]

Ours (in the strips its pipeline chooses, and in 1 and 4), mflux and diffusers on torch, each as its pipeline runs it by
default, with the same weights and input. Every measurement is a fresh process: it loads the weights, warms up on
64x64 pixels, runs once and ends. MLX's peak counts weights and activations; the process's peak is the growth of its
resident set since before the weights were loaded, MLX's buffer cache included.

Needs the extra [test], and for mflux the environment that mflux_env.py makes. The default takes 15 minutes and, for
mflux at 512x512, 14 GB.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from common import (
    MIB,
    Seconds,
    Table,
    Targets,
    Worker,
    finish,
    median_ratio,
    parser,
    peak_resident,
    preload_blas,
    reset_peak_resident,
    resident,
    serve,
    stopwatch,
    take_turns,
)
from mflux_env import MFLUX, add_option, mflux_python

WARM_UP = 64
STRIPS = {"ours": None, "ours, 1 strip": 1, "ours, 4 strips": 4}
Measurement = dict[str, Any]


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--sizes", type=int, nargs="+", default=[256, 512], help="pixels of a side, multiples of 64")
    options.add_argument("--rounds", type=int, default=3, help="rounds the medians are taken of (3)")
    options.add_argument("--worker", choices=["ours", "diffusers"], help="measure one candidate; for this script's use")
    add_option(options)
    arguments = options.parse_args()
    preload_blas()
    if arguments.worker:
        serve({"vae": {"ours": ours, "diffusers": diffusers}[arguments.worker]})
        return
    python = mflux_python(arguments.mflux)
    targets, tables = Targets(), []
    with tempfile.TemporaryDirectory() as folder:
        write_weights(Path(folder, "vae.safetensors"))
        for size in {WARM_UP, *arguments.sizes}:
            write_inputs(Path(folder), size)
        for what in ("decode", "encode"):
            for size in arguments.sizes:
                tables.append(compare(Path(folder), what, size, arguments.rounds, python, targets))
                tables[-1].print()
    finish([*tables, targets], arguments.json)


def compare(folder: Path, what: str, size: int, rounds: int, python: Path | None, targets: Targets) -> Table:
    """The table of one task at one size."""
    results: dict[str, Measurement] = {}

    def measure(name: str, interpreter: str | Path, script: list[str], **arguments: Any) -> float:
        files = {
            "weights": f"{folder}/vae.safetensors",
            "inputs": f"{folder}/{what}-{size}.safetensors",
            "warm_up": f"{folder}/{what}-{WARM_UP}.safetensors",
            "output": f"{folder}/{name}.safetensors",
        }
        with Worker(interpreter, *script) as worker:
            results[name] = worker.call("vae", what=what, **files, **arguments)
        return results[name]["seconds"]

    me = [Path(__file__).name, "--worker"]
    runs: dict[str, Callable[[], float]] = {}
    for name, strips in STRIPS.items():
        if strips is None or (what == "decode" and strips != default_strips(size)):
            runs[name] = partial(measure, name, sys.executable, [*me, "ours"], strips=strips)
    if python:
        runs["mflux"] = partial(measure, "mflux", python, ["mflux_worker.py"])
    runs["diffusers"] = partial(measure, "diffusers", sys.executable, [*me, "diffusers"])
    seconds = take_turns(runs, rounds, warm_up=0)

    base = "mflux" if python else "diffusers"
    if python and what == "decode":
        peaks = [results[name]["mlx_peak"] for name in ("ours", "mflux")]
        targets.check(f"time of decoding {size}x{size} / {MFLUX}", median_ratio(seconds, "ours", "mflux"), 0.4)
        targets.check(f"MLX peak of decoding {size}x{size} / {MFLUX}", peaks[0] / peaks[1], 0.2)
    return describe(f"{what.title()} {size}x{size}", seconds, results, base, differences(folder, list(runs)))


def describe(title: str, seconds: Seconds, results: dict[str, Measurement], base: str, apart: dict[str, str]) -> Table:
    """One row per candidate."""
    columns = ["", "s", f"time / {base}", "MLX peak MiB", f"MLX peak / {base}", "process peak MiB", "difference"]
    table = Table(title, columns)
    peer = results[base].get("mlx_peak")
    for name, result in results.items():
        peak = result.get("mlx_peak")
        table.rows.append(
            (
                name,
                median(seconds[name]),
                median_ratio(seconds, name, base),
                peak / MIB if peak else "-",
                peak / peer if peak and peer else "-",
                result["process_peak"] / MIB,
                apart[name],
            )
        )
    return table


def differences(folder: Path, names: list[str]) -> dict[str, str]:
    """Largest difference of each output to diffusers', relative to its largest value."""
    import numpy as np
    from safetensors.numpy import load_file

    outputs = {name: load_file(f"{folder}/{name}.safetensors")["y"] for name in names}
    reference = outputs["diffusers"]
    return {name: f"{np.abs(y - reference).max() / np.abs(reference).max():.1e}" for name, y in outputs.items()}


def default_strips(size: int) -> int:
    """The strips that ours takes by itself."""
    from qwen_image_mlx.pipeline.autoencode import STRIP_PIXELS, strips_of

    return strips_of(size * size, STRIP_PIXELS)


def write_weights(file: Path) -> None:
    """A whole VAE under the checkpoint's names and in its shapes."""
    import mlx.core as mx

    from qwen_image_mlx.models.qwen_image.config import VAEConfig
    from qwen_image_mlx.weights.mapping import expected_tensors
    from qwen_image_mlx.weights.synthetic import ROWS, random_values

    specs = list(expected_tensors(ROWS["vae"], VAEConfig()).values())
    keys = mx.random.split(mx.random.key(0), len(specs))
    mx.save_safetensors(str(file), {spec.name: random_values(spec, keys[n]) for n, spec in enumerate(specs)})


def write_inputs(folder: Path, size: int) -> None:
    """Normalised latents and pixels in [-1, 1], channels first."""
    import mlx.core as mx

    latents = mx.random.normal((1, 16, size // 8, size // 8), key=mx.random.key(1))
    pixels = mx.random.uniform(-1, 1, (1, 3, size, size), key=mx.random.key(2))
    mx.save_safetensors(f"{folder}/decode-{size}.safetensors", {"x": latents})
    mx.save_safetensors(f"{folder}/encode-{size}.safetensors", {"x": pixels})


def ours(weights: str, what: str, inputs: str, warm_up: str, output: str, strips: int | None) -> Measurement:
    """One run of this package in this process; writes pixels in [0, 1] or normalised latents, channels first."""
    import mlx.core as mx

    from qwen_image_mlx.models.qwen_image.config import VAEConfig
    from qwen_image_mlx.models.qwen_image.vae import Decoder, Encoder
    from qwen_image_mlx.pipeline.autoencode import decode, encode_mode
    from qwen_image_mlx.weights.loader import ComponentWeights, load_module
    from qwen_image_mlx.weights.safetensors_files import component_tensors
    from qwen_image_mlx.weights.synthetic import ROWS

    before = resident()
    config = VAEConfig()
    checked = ComponentWeights(ROWS["vae"], config, component_tensors((Path(weights),), None), ("encoder", "decoder"))
    if what == "decode":
        decoder = load_module(Decoder(config), checked, "decoder", mx.float32)
        call = partial(decode, decoder, config, strips=strips)
    else:
        call = partial(encode_mode, load_module(Encoder(config), checked, "encoder", mx.float32), config)
    call(mx.load(warm_up)["x"].transpose(0, 2, 3, 1))
    x = mx.load(inputs)["x"].transpose(0, 2, 3, 1)
    mx.eval(x)
    mx.clear_cache()
    mx.reset_peak_memory()
    reset_peak_resident()
    result = []
    seconds = stopwatch(lambda: result.append(call(x)))
    peaks = {"mlx_peak": mx.get_peak_memory(), "process_peak": peak_resident() - before}
    mx.save_safetensors(output, {"y": result[0].transpose(0, 3, 1, 2)})
    return {"seconds": seconds, **peaks}


def diffusers(weights: str, what: str, inputs: str, warm_up: str, output: str) -> Measurement:
    """One run of the reference in this process."""
    import torch
    from diffusers import AutoencoderKLQwenImage
    from safetensors.torch import load_file, save_file

    before = resident()
    with torch.device("meta"):
        vae = AutoencoderKLQwenImage()
    vae.load_state_dict(load_file(weights), assign=True)
    vae.eval()
    mean, std = (torch.tensor(v).view(1, -1, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))

    @torch.no_grad()
    def call(file: str) -> torch.Tensor:
        x = load_file(file)["x"][:, :, None]
        if what == "decode":
            return vae.decode(x * std + mean, return_dict=False)[0]
        return (vae.encode(x).latent_dist.mode() - mean) / std

    call(warm_up)
    reset_peak_resident()
    result = []
    seconds = stopwatch(lambda: result.append(call(inputs)))
    peak = peak_resident() - before
    y = result[0].squeeze(2) * 0.5 + 0.5 if what == "decode" else result[0].squeeze(2)  # its decoder clamps
    save_file({"y": y.contiguous()}, output)
    return {"seconds": seconds, "process_peak": peak}


if __name__ == "__main__":
    main()
