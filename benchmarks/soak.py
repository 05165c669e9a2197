"""Many images in one process: does it grow?

    python benchmarks/soak.py [--images 200] [--json FILE]

Tiny random checkpoints of each kind, opened once. Images of mixed sizes from text, over images, edited and taken
apart into layers, staged and streamed by turns, with LoRAs put on and off; now and then components are released as a
long-lived program would. After every tenth all are, and MLX's bytes in use and cached and the process's own are noted.
The first fifth is warm-up: compiled kernels and caches settle.

Takes 4 minutes and 1 GB of memory.
"""

from __future__ import annotations

import random
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import MIB, Table, Targets, finish, parser, preload_blas, resident

SIZES = ((64, 64), (96, 64), (64, 128), (128, 96), (160, 160))
SMALL = {
    "encoder_area": 96**2,
    "reference_area": 96**2,
    "target_area": 96**2,
    "resolutions": (64, 96),
    "captions": False,
}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--images", type=int, default=200, help="how many (200)")
    arguments = options.parse_args()
    preload_blas()
    with tempfile.TemporaryDirectory() as folder:
        rows = soak(Path(folder), arguments.images)
    table = Table("after so many images, MiB", ("images", "MLX in use", "MLX cache", "process"), rows)
    table.print()
    settled = [row for row in rows if row[0] > arguments.images // 5]
    middle = len(settled) // 2
    targets = Targets()
    grown = _mean(settled[middle:], 1) - _mean(settled[:middle], 1)
    targets.check("MLX in use: second half beyond the first, MiB", grown, 1.0)
    early, late = _mean(settled[:middle], 3), _mean(settled[middle:], 3)
    targets.check("process: second half / first", late / early, 1.03)
    finish([table, targets], arguments.json)


def soak(folder: Path, count: int) -> list[tuple[Any, ...]]:
    import mlx.core as mx
    import numpy as np

    from qwen_image_mlx import QwenImagePipeline, variants
    from qwen_image_mlx.weights.synthetic import TINY, write_checkpoint

    for name, variant in variants.VARIANTS.items():
        own = {field: value for field, value in SMALL.items() if getattr(variant, field)}
        variants.VARIANTS[name] = replace(variant, **own)
    pipelines = {}
    for task, name in (("generate", "QwenImagePipeline"), ("edit", "QwenImageEditPlusPipeline"),
                       ("decompose", "QwenImageLayeredPipeline")):  # fmt: skip
        model = write_checkpoint(folder / task, TINY, dtype=mx.float32, pipeline=name)
        pipelines[task] = [
            QwenImagePipeline.from_pretrained(model, dtype="float32", streamed=streamed)
            for streamed in ((), ("transformer", "text_encoder"))
        ]
    shapes = pipelines["generate"][0].components.lora_targets()
    lora = _write_lora(folder / "lora.safetensors", shapes)
    lots, rows = random.Random(1), []
    noise = np.random.default_rng(1)
    for number in range(1, count + 1):
        task, width, height = lots.choice([*pipelines, "over"]), *lots.choice(SIZES)
        pipeline = lots.choice(pipelines[{"over": "generate"}.get(task, task)])
        image = noise.integers(0, 256, (height, width, 3), np.uint8)
        steps = {"num_inference_steps": 2, "seed": number}
        if task == "generate":
            pipeline.generate(f"a fox {number}", negative_prompt="blurry", width=width, height=height, **steps)
            pipeline.set_loras([lora] if number % 3 else [], mode="side")
        elif task == "over":
            pipeline.generate("a fox", image=image, strength=1.0, size=(width, height), **steps)
        elif task == "edit":
            pipeline.edit("redder", images=[image] * lots.choice((1, 2)), **steps)
        else:
            pipeline.decompose(image, "a fox", num_layers=lots.choice((1, 3)), **steps)
        if number % 5 == 0:
            pipeline.release_transformer()
            pipeline.release_vae()
        if number % 10 == 0:
            for opened in (each for pair in pipelines.values() for each in pair):
                opened.release_encoders()
                opened.release_transformer()
                opened.release_vae()
            rows.append((number, *(n / MIB for n in (mx.get_active_memory(), mx.get_cache_memory(), resident()))))
    return rows


def _write_lora(path: Path, shapes: dict[str, tuple[int, ...]]) -> Path:
    import mlx.core as mx

    name = "transformer_blocks.0.attn.to_q"
    out, width = shapes[name]
    tensors = {f"{name}.lora_A.weight": mx.ones((4, width)) / width, f"{name}.lora_B.weight": mx.ones((out, 4))}
    mx.save_safetensors(str(path), tensors)
    return path


def _mean(rows: list[tuple[Any, ...]], column: int) -> float:
    return sum(row[column] for row in rows) / len(rows)


if __name__ == "__main__":
    main()
