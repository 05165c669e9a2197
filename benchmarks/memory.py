"""Memory of every stage of a generation: what MLX and the process hold after it and at most during it.

    python benchmarks/memory.py [--layers 4] [--json FILE]

The checkpoints are random and bf16, real in every width, and short: few transformer blocks, two layers of the text
encoder and of the vision tower, a small vocabulary; a real VAE, which is computed in fp32. A generation, and an edit of
one image. 64x64 pixels and two steps, as bf16 is slow on a CPU: what is held is weights. The process's own bytes
include what glibc keeps of freed memory, and the interpreter.

Takes 4 minutes, 5 GB of memory and 5 GB of temporary files.
"""

from __future__ import annotations

import ctypes
import tempfile
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from common import MIB, Table, Targets, finish, parser, peak_resident, preload_blas, reset_peak_resident, resident

if TYPE_CHECKING:
    from qwen_image_mlx.pipeline.progress import Progress

ENCODER_LAYERS = 2
SIZE = 64  # pixels along a side
VOCABULARY = 512
# A word in a stage's name, and the component whose file it is measured by.
COMPONENTS = {
    "encode ": "text_encoder",
    "encoders": "text_encoder",
    "text_encoder": "text_encoder",
    "vision": "text_encoder",
    "encode images": "text_encoder",
    "references": "vae",
    "modulation": "transformer",
    "transformer": "transformer",
    "denoise": "transformer",
    "vae": "vae",
    "VAE": "vae",
    "decode": "vae",
}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--layers", type=int, default=4, help="transformer blocks (4)")
    arguments = options.parse_args()
    preload_blas()

    tables, targets = [], Targets()
    for task, pipeline in (("generation", "QwenImagePipeline"), ("edit", "QwenImageEditPlusPipeline")):
        with tempfile.TemporaryDirectory() as folder:
            sizes = write(Path(folder), arguments.layers, pipeline)
            record = generate(folder, sizes)
        title = f"{task}: {arguments.layers} blocks, {ENCODER_LAYERS} encoder layers, bf16; MiB, and parts of the "
        title += "component's file: " + ", ".join(f"{name} {size / MIB:,.0f}" for name, size in sizes.items())
        tables.append(Table(title, Recorder.COLUMNS, record.rows))
        tables[-1].print()
        transformer = sizes["transformer"]
        targets.check(f"{task}: held while denoising / transformer on disk", record.held["denoise"] / transformer, 0.68)
        targets.check(f"{task}: peak while denoising / transformer on disk", record.peak["denoise"] / transformer, 0.68)
        beyond = record.peak["encode prompts"] - record.held["encode prompts"]
        targets.check(f"{task}: peak while encoding beyond what is held, MiB", beyond / MIB, 200)
        left = record.held["release VAE"] - record.held["start"]
        targets.check(f"{task}: left after releasing all / all on disk", left / sum(sizes.values()), 0.001)
    targets.check("held while denoising by count, for the 60 blocks of the real one", share_of_main(), 0.68)
    finish([*tables, targets], arguments.json)


def generate(folder: str, sizes: dict[str, int]) -> Recorder:
    """Encodes and generates, and releases each component when its work is done."""
    from PIL import Image

    from qwen_image_mlx import GenerationParameters, QwenImagePipeline

    pipeline = QwenImagePipeline.from_pretrained(folder)
    record = Recorder(sizes)
    record.note("start")
    images = [Image.linear_gradient("L").resize((SIZE, SIZE))] if pipeline.variant.takes_images else []
    encoding = pipeline.encode_guidance_prompts(
        "a red fox", images=images, reference_pixels=SIZE**2, progress=record.follow
    )
    pipeline.release_encoders()
    record.note("release encoders")
    parameters = GenerationParameters(width=SIZE, height=SIZE, num_inference_steps=2, cfg_scale=1)
    pipeline.generate_pixels(parameters, encoding, progress=record.follow)
    pipeline.release_transformer()
    record.note("release transformer")
    pipeline.release_vae()
    record.note("release VAE")
    if trim():
        record.note("glibc's malloc_trim")
    return record


def share_of_main() -> float:
    """Elements of the released transformer that stay loaded, of all."""
    from qwen_image_mlx.models.qwen_image.config import TransformerConfig
    from qwen_image_mlx.weights.mapping import expected_tensors
    from qwen_image_mlx.weights.synthetic import ROWS

    specs = expected_tensors(ROWS["transformer"], TransformerConfig()).values()
    return sum(prod(spec.shape) for spec in specs if spec.part == "main") / sum(prod(spec.shape) for spec in specs)


def write(folder: Path, layers: int, pipeline: str) -> dict[str, int]:
    """Writes the checkpoint; returns the bytes of each component's weights."""
    import mlx.core as mx

    from qwen_image_mlx.weights.synthetic import FULL, write_checkpoint

    configs = {
        "transformer": replace(FULL["transformer"], num_layers=layers),
        "text_encoder": replace(FULL["text_encoder"], num_hidden_layers=ENCODER_LAYERS, vocab_size=VOCABULARY),
        "vision": replace(FULL["vision"], depth=ENCODER_LAYERS, fullatt_block_indexes=(1,)),
        "vae": FULL["vae"],
    }
    write_checkpoint(folder, configs, pipeline=pipeline)
    mx.clear_cache()
    homes = ("transformer", "text_encoder", "vae")
    return {name: sum(f.stat().st_size for f in (folder / name).glob("*.safetensors")) for name in homes}


class Recorder:
    """Notes what is held after each stage, and the most during it, in bytes; a progress callback.

    Args:
        sizes: bytes of each component's weights on disk.
    """

    COLUMNS = ("after", "MLX holds", "/ file", "MLX peak", "/ file", "MLX cache", "process", "process peak")

    def __init__(self, sizes: dict[str, int]) -> None:
        self.sizes = sizes
        self.rows: list[tuple[str | float, ...]] = []
        self.held: dict[str, int] = {}
        self.peak: dict[str, int] = {}
        self._reset()

    def follow(self, progress: Progress) -> None:
        """A row at the end of each stage."""
        if progress.step == progress.total:
            self.note(f"{progress.stage} {progress.detail}".strip())
        elif progress.step == 0:
            self._reset()

    def note(self, name: str) -> None:
        """Adds a row and starts the next stage."""
        import mlx.core as mx

        held = mx.get_active_memory()
        peak = max(held, mx.get_peak_memory())
        size = next((self.sizes[component] for word, component in COMPONENTS.items() if word in name), None)
        shares = [figure / size if size else "" for figure in (held, peak)]
        others = [figure / MIB for figure in (mx.get_cache_memory(), resident(), peak_resident())]
        self.rows.append((name, held / MIB, shares[0], peak / MIB, shares[1], *others))
        self.held[name], self.peak[name] = held, peak
        self._reset()

    @staticmethod
    def _reset() -> None:
        import mlx.core as mx

        mx.reset_peak_memory()
        reset_peak_resident()


def trim() -> bool:
    """Lets glibc give freed blocks back to the system, which it otherwise keeps; False on other systems."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError):
        return False
    return True


if __name__ == "__main__":
    main()
