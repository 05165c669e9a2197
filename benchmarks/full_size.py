"""Text to image at the released size, with little memory: what is predicted, and what is taken.

    python benchmarks/full_size.py [--pipeline QwenImagePipeline] [--blocks N] [--encoder-layers N] [--bits B]
                                   [--residency streamed ...] [--size 256] [--dtype float32] [--folder DIR]
                                   [--json FILE]

Writes a random checkpoint of a released model's configuration (bf16, in shards; --bits packs it on the way) into a
temporary folder, or into DIR, where it stays and is found the next time: Qwen-Image-2512, 57 GB with all 60 blocks, 26
at 4 bits; with --pipeline QwenImage21Pipeline Qwen-Image-2.1, 31 GB with all 32, its vision tower included. Then the
command line generates one image in one step without guidance, each time with the memory that the plan for one residency
asks for. The predicted peak of each stage stands beside the one that --timings noted, which is MLX's own count, and
beside the most the process had resident at all.

A CPU computes in fp32 (--dtype), as MLX's bf16 products are slow there; weights are then cast while they pass.
Takes half an hour on two cores and a free disk of the checkpoint's size.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

from common import MIB, Table, Targets, finish, parser, preload_blas

# The stages of a profile that belong to each stage of a plan.
STAGES = {
    "encode": ("load text_encoder", "encode prompts"),
    "load": ("load modulation", "load transformer"),
    "denoise": ("denoise",),
    "decode": ("load vae_decoder", "decode"),
}
PROMPT = "A red fox in the snow, a wooden sign beside it that says OPEN, evening light"
MOST_RESIDENT = 6e9  # bytes of the process, streamed
WITHIN = 0.15


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--pipeline", default="QwenImagePipeline", help="the class of the checkpoint (%(default)s)")
    options.add_argument("--blocks", type=int, help="transformer blocks (all)")
    options.add_argument("--encoder-layers", type=int, help="layers of the text encoder (all)")
    options.add_argument("--bits", help="pack the transformer in so many bits and the text encoder in 8")
    options.add_argument("--residency", nargs="+", default=["streamed"], help="streamed, staged, resident (streamed)")
    options.add_argument("--size", type=int, default=256, help="side of the image (256)")
    options.add_argument("--dtype", default="float32", help="of the computation (float32)")
    options.add_argument("--folder", type=Path, help="keep the checkpoint there, or find it there")
    arguments = options.parse_args()
    preload_blas()
    with ExitStack() as stack:
        folder = arguments.folder or Path(stack.enter_context(tempfile.TemporaryDirectory())) / "model"
        if not (folder / "model_index.json").exists():
            # In a process of its own: the most that this one ever held would count as its children's.
            options = [arguments.pipeline, arguments.blocks, arguments.encoder_layers, arguments.bits or ""]
            code = f"import full_size; from pathlib import Path; full_size.write(Path({str(folder)!r}), *{options!r})"
            subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, check=True)
        table, targets = generate(folder, arguments)
    table.print()
    finish([table, targets], arguments.json)


def write(folder: Path, pipeline: str, blocks: int | None, encoder_layers: int | None, bits: str) -> None:
    """Writes the checkpoint under another name and renames it; asks the disk first."""
    from qwen_image_mlx.pipeline.quantize_checkpoint import quantize_checkpoint
    from qwen_image_mlx.registry import components_of
    from qwen_image_mlx.variants import VARIANTS
    from qwen_image_mlx.weights.mapping import expected_tensors
    from qwen_image_mlx.weights.schemes import Quantization
    from qwen_image_mlx.weights.synthetic import released, write_checkpoint

    configs, rows = released(pipeline), components_of(VARIANTS[pipeline].classes)
    if not VARIANTS[pipeline].takes_images:
        del configs["vision"]
    if blocks:
        configs["transformer"] = replace(configs["transformer"], num_layers=blocks)
    if encoder_layers:
        configs["text_encoder"] = replace(configs["text_encoder"], num_hidden_layers=encoder_layers)
    nbytes = sum(2 * prod(s.shape) for name, c in configs.items() for s in expected_tensors(rows[name], c).values())
    folder.parent.mkdir(parents=True, exist_ok=True)
    needed, free = 1.02 * nbytes * (1.5 if bits else 1), shutil.disk_usage(folder.parent).free
    if free < needed:
        sys.exit(
            f"{folder.parent} has {free / 1e9:.0f} GB left, but {needed / 1e9:.0f} GB are needed; take fewer blocks"
        )
    partial = folder.with_name(f"{folder.name}.partial")
    write_checkpoint(partial, configs, pipeline=pipeline)
    if bits:
        quantize_checkpoint(partial, folder, Quantization.parse(bits))
        shutil.rmtree(partial)
    else:
        partial.rename(folder)


def generate(folder: Path, arguments: Any) -> tuple[Table, Targets]:
    rows, targets = [], Targets()
    size = f"{arguments.size}x{arguments.size}"
    for residency in arguments.residency:
        planned = json.loads(
            command("plan", folder, "--json", "--size", size, "--steps", 1, "--dtype", arguments.dtype)[0]
        )
        plan = next(plan for plan in planned["plans"] if plan["residency"] == residency)
        image = folder.with_name("image.png")
        _, most = command(
            "generate", PROMPT, "--model", folder, "--width", arguments.size, "--height", arguments.size, "--steps", 1,
            "--cfg-scale", 1, "--dtype", arguments.dtype, "--memory", residency, "--seed", 1, "--timings",
            "--output", image,
        )  # fmt: skip
        costs = {row["stage"]: row for row in json.loads(command("info", image, "--json")[0])["profile"]}
        image.unlink()
        for stage, names in STAGES.items():
            predicted = plan["stages"][stage]["peak"]
            measured = max(costs[name]["peak"] for name in names)
            seconds = sum(costs[name]["seconds"] for name in names)
            rows.append((residency, stage, predicted / MIB, measured / MIB, predicted / measured, seconds))
            targets.check(f"{residency}: {stage} predicted / measured, off 1", abs(predicted / measured - 1), WITHIN)
        rows.append((residency, "process", "", most / MIB, "", ""))
        if residency == "streamed":
            targets.check("streamed: GB of the process at most", most / 1e9, MOST_RESIDENT / 1e9)
    nbytes = sum(file.stat().st_size for file in folder.glob("*/*.safetensors"))
    blocks = f"{arguments.blocks or 'all'} blocks, {nbytes / 1e9:.1f} GB on disk"
    title = f"{arguments.pipeline}, {blocks}, {size}, one step, {arguments.dtype}; MiB"
    return Table(title, ("residency", "stage", "predicted", "measured", "ratio", "seconds"), rows), targets


def command(*arguments: object) -> tuple[str, int]:
    """A command's stdout, and the most bytes that its process had resident."""
    line = [sys.executable, "-m", "qwen_image_mlx", *map(str, arguments)]
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen(line, stdout=out)
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            sys.exit(f"{' '.join(line[2:5])} failed")
        out.seek(0)
        return out.read(), usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    main()
