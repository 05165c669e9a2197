"""The autoencoder at real width (96), fp32: time and peak memory of decoding and encoding 256 and 512 pixels.

    python benchmarks/vae.py [--rounds 2] [--task decode encode] [--side 256 512]

Ours (in strips as the pipeline chooses, and whole) against mflux 0.24.0 and diffusers on torch. Times are medians of
turns taken in one process; peak memory is that of a fresh process per candidate: MLX's own count, and for torch the
growth of the resident set.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path

from common import add_mflux, in_fresh_process, preload_blas, print_table, take_turns, verdict

CANDIDATES = ("ours", "ours whole", "mflux", "diffusers")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--task", nargs="+", choices=("decode", "encode"), default=["decode", "encode"])
    parser.add_argument("--side", nargs="+", type=int, default=[256, 512])
    parser.add_argument("--peak", nargs=3, metavar=("NAME", "TASK", "SIDE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    preload_blas()
    names = [name for name in CANDIDATES if name != "mflux" or add_mflux()]
    if arguments.peak:
        name, task, side = arguments.peak
        print(json.dumps(peak(name, task, int(side))))
        return
    targets = []
    for task in arguments.task:
        for side in arguments.side:
            known = [name for name in names if task == "decode" or name != "ours whole"]
            times = take_turns({name: build(name, task, side) for name in known}, arguments.rounds)
            peaks = {name: in_fresh_process(__file__, "--peak", name, task, str(side))["bytes"] for name in known}
            base = "mflux" if "mflux" in times else "diffusers"
            print_table(
                f"{task} {side}x{side}",
                ("", "s", f"time / {base}", "peak MB", f"peak / {base}"),
                [(n, times[n], times[n] / times[base], peaks[n] / 1e6, peaks[n] / peaks[base]) for n in known],
            )
            if task == "decode" and base == "mflux":
                targets.append(verdict(f"decode {side}: time / mflux", times["ours"] / times[base], 0.4))
                targets.append(verdict(f"decode {side}: peak / mflux", peaks["ours"] / peaks[base], 0.2))
    print_table("Targets", ("", "measured", "at most", ""), targets)


def build(name: str, task: str, side: int) -> Callable[[], None]:
    """A function that runs the task once."""
    import numpy as np

    rng = np.random.default_rng(0)
    latents = rng.standard_normal((1, side // 8, side // 8, 16)).astype(np.float32)
    pixels = rng.uniform(-1, 1, (1, side, side, 3)).astype(np.float32)
    given = latents if task == "decode" else pixels
    return {"mflux": _mflux, "diffusers": _diffusers}.get(name, _ours)(task, given, name == "ours whole")


def _ours(task: str, given, whole: bool) -> Callable[[], None]:
    import mlx.core as mx
    from mlx.utils import tree_map

    from qwen_image_mlx.config import VAEConfig
    from qwen_image_mlx.models.vae import Decoder, Encoder
    from qwen_image_mlx.pipeline.autoencode import decode, encode_mode

    config = VAEConfig()
    model = (Decoder if task == "decode" else Encoder)(config)
    key = mx.random.key(0)
    model.update(tree_map(lambda a: 0.05 * mx.random.normal(a.shape, key=key), model.parameters()))
    x = mx.array(given)
    mx.eval(model.parameters(), x)
    if task == "decode":
        return lambda: decode(model, config, x, strips=1 if whole else None)
    return lambda: encode_mode(model, config, x)


def _mflux(task: str, given, whole: bool) -> Callable[[], None]:
    import mlx.core as mx
    from mflux.models.qwen.model.qwen_vae.qwen_vae import QwenVAE

    model = QwenVAE()
    x = mx.array(given).transpose(0, 3, 1, 2)
    mx.eval(model.parameters(), x)
    run = model.decode if task == "decode" else model.encode
    return lambda: mx.eval(run(x))


def _diffusers(task: str, given, whole: bool) -> Callable[[], None]:
    import torch
    from diffusers import AutoencoderKLQwenImage

    torch.set_num_threads(2)
    model = AutoencoderKLQwenImage().eval()
    x = torch.from_numpy(given).permute(0, 3, 1, 2)[:, :, None].contiguous()

    @torch.no_grad()
    def run() -> None:
        (model.decode if task == "decode" else model.encode)(x)

    return run


def peak(name: str, task: str, side: int) -> dict[str, int]:
    """Bytes that one run takes above what was there before it."""
    run = build(name, task, side)
    if name == "diffusers":
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
        before = _peak_resident()
        run()
        return {"bytes": _peak_resident() - before}
    import mlx.core as mx

    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    run()
    return {"bytes": mx.get_peak_memory() - before}


def _peak_resident() -> int:
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])


if __name__ == "__main__":
    main()
