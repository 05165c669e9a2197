"""What a training step takes: time and memory at real width, and a model of the memory that 60 blocks take.

    python benchmarks/training.py [--blocks 2] [--json FILE]

A LoRA of rank 16 beside all attention projections of a transformer of 1 and of 2 blocks, real in every width, with
random weights. Times are a CPU's: MLX multiplies in fp32 there with BLAS, in bf16 and quantized with slow kernels of
its own, so that only fp32's with and without checkpointing say anything of another machine. Memory is MLX's own count
of the most bytes a step takes beyond the weights.

The last table is a model, not a measurement: weights as they lie in memory, the adapters' fp32 state, what is kept of
each block and the widest moment of one, with the coefficients that the second table was fitted with.

Takes 12 minutes and 6 GB of memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from common import MIB, Table, finish, parser, preload_blas, stopwatch

TEXT_TOKENS = 64
RANK = 16
SHORT = 8  # side of an image in tokens, where slow kernels are timed
SIDES = (8, 12, 16, 24)  # where memory is measured
FORMS = ("fp32", "bf16", "8 bit", "4 bit")
# Bytes of 60 blocks in memory without the modulation, of the released models.
WEIGHTS = {"bf16": 27.0e9, "8 bit": 14.4e9, "4 bit": 7.6e9}
BLOCKS, WIDTH, PROJECTIONS = 60, 3072, 8
MACS = (32, 64, 128)
USABLE = 0.75  # of a Mac's memory a process can wire, by default
IMAGES = {"512x512": (32, 1), "1024x1024": (64, 1), "edit at 512x512": (32, 2), "edit at 1024x1024": (64, 2)}


class Step(NamedTuple):
    """A measured step: seconds, bytes beyond the weights, tokens."""

    seconds: float
    nbytes: int
    tokens: int


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--blocks", type=int, default=2, help="most transformer blocks (2)")
    arguments = options.parse_args()
    preload_blas()
    timed = times(arguments.blocks)
    timed.print()
    memory, coefficients = fitted(arguments.blocks)
    memory.print()
    finish([timed, memory, model(coefficients)], arguments.json)


def times(blocks: int) -> Table:
    rows = []
    for form in FORMS:
        for count in (1, blocks):
            kept, again = (measure(count, SHORT, form, checkpointing) for checkpointing in (False, True))
            rows.append((form, count, kept.seconds, again.seconds, again.seconds / kept.seconds, kept.nbytes / MIB,
                         again.nbytes / MIB))  # fmt: skip
    title = f"a step of {SHORT**2 + TEXT_TOKENS} tokens on this machine; seconds, and MiB beyond the weights"
    return Table(title, ["weights", "blocks", "s", "s, checkpointing", "ratio", "MiB", "MiB, checkpointing"], rows)


def fitted(blocks: int) -> tuple[Table, dict[str, tuple[float, float]]]:
    """Bytes of a step as a T + b T^2 of T tokens in fp32, by least squares, and bf16's share of them."""
    import numpy as np

    few, many = 2, max(3, blocks)
    measured = {
        ("all", few): [measure(few, side, "fp32", False) for side in SIDES],
        ("all", many): [measure(many, side, "fp32", False) for side in SIDES],
        ("one", few): [measure(few, side, "fp32", True) for side in SIDES],
        ("one", many): [measure(many, side, "fp32", True) for side in SIDES],
    }
    halves = [measure(few, SHORT, form, True).nbytes for form in ("bf16", "fp32")]
    share = halves[0] / halves[1]
    coefficients, rows = {"share": (share, 0.0)}, []
    tokens = np.array([step.tokens for step in measured["all", few]], float)
    for name, key in (("kept of each block", "all"), ("kept of each block, checkpointing", "one")):
        pairs = zip(measured[key, many], measured[key, few], strict=True)
        rest = np.array([(a.nbytes - b.nbytes) / (many - few) for a, b in pairs])
        slope = float((rest @ tokens) / (tokens @ tokens))
        coefficients[key] = slope, 0.0
        rows.append((name, slope / 1024, 0.0))
    widest = np.array([step.nbytes for step in measured["one", few]]) - few * coefficients["one"][0] * tokens
    linear, square = np.linalg.lstsq(np.stack([tokens, tokens**2], axis=1), widest, rcond=None)[0]
    coefficients["widest"] = float(linear), float(square)
    rows += [("the widest moment of one", linear / 1024, square), ("bf16's share of fp32", share, "")]
    return Table("fp32, by T tokens", ["", "KiB per T", "bytes per T^2"], rows), coefficients


def model(coefficients: dict[str, tuple[float, float]]) -> Table:
    """GB of a LoRA's training, and the Macs that have as much."""
    share = coefficients["share"][0]
    state = BLOCKS * PROJECTIONS * 2 * RANK * WIDTH * 4 * 4  # the adapters, their gradient, and AdamW's two
    rows: list[Sequence[Any]] = []
    for image, (side, images) in IMAGES.items():
        tokens = images * side**2 + 4 * TEXT_TOKENS
        linear, square = coefficients["widest"]
        widest = share * (linear * tokens + square * tokens**2)
        for form, weights in WEIGHTS.items():
            needed = [
                (weights + state + widest + BLOCKS * share * coefficients[key][0] * tokens) / 1e9
                for key in ("all", "one")
            ]
            fits = [", ".join(str(mac) for mac in MACS if gb < USABLE * mac) or "none" for gb in needed]
            rows.append((image, form, needed[0], fits[0], needed[1], fits[1]))
    columns = ["image", "weights", "GB", "fits Macs of GB", "GB, checkpointing", "fits Macs of GB"]
    return Table("MODEL of 60 blocks, batch 1, bf16 compute", columns, rows)


def measure(blocks: int, side: int, form: str, checkpointing: bool) -> Step:
    """One step, after one that fills caches; a fresh network."""
    import mlx.core as mx
    import mlx.nn as nn
    from mlx.utils import tree_map

    from qwen_image_mlx.models.qwen_image.config import TransformerConfig
    from qwen_image_mlx.models.qwen_image.rope import Segment
    from qwen_image_mlx.models.qwen_image.transformer import BlockRows, Modulation, Transformer
    from qwen_image_mlx.training.loop import LoopSettings, Trainer
    from qwen_image_mlx.training.lora import add_lora, matrices
    from qwen_image_mlx.training.loss import FlowMatching
    from qwen_image_mlx.training.network import Batch
    from qwen_image_mlx.training.optimizers import Optimizer, Rate
    from qwen_image_mlx.training.qwen_image.network import Network

    dtype = mx.float32 if form == "fp32" else mx.bfloat16
    config = TransformerConfig(num_layers=blocks)
    keys = iter(mx.random.split(mx.random.key(0), 1000))
    transformer = Transformer(config)

    def random(array: mx.array) -> mx.array:
        return (
            0.02 * mx.random.normal(array.shape, key=next(keys)) if array.ndim > 1 else mx.ones(array.shape)
        ).astype(dtype)

    transformer.update(tree_map(random, transformer.parameters()))
    if form.endswith("bit"):
        nn.quantize(
            transformer, 64, int(form[0]),
            class_predicate=lambda name, layer: isinstance(layer, nn.Linear) and name.startswith("transformer_blocks"),
        )  # fmt: skip
    mx.eval(transformer.parameters())
    add_lora(transformer, matrices(config), "attention", RANK)
    batch = Batch(
        mx.random.normal((1, side * side, 64), key=next(keys)),
        mx.random.normal((1, TEXT_TOKENS, config.joint_attention_dim), key=next(keys)),
        (Segment(0, side, side),),
    )
    row = mx.full((6, config.dim), 0.3, dtype)
    rows = Modulation([BlockRows(row, row, row)] * blocks, mx.ones((2, config.dim), dtype))
    network = Network(transformer, config, checkpointing=checkpointing)
    trainer = Trainer(
        network, lambda step: [batch], Optimizer(Rate(1e-4)), FlowMatching(), LoopSettings(dtype=dtype), lambda _: rows
    )
    if form == "fp32":
        trainer.take_step()
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    seconds = stopwatch(trainer.take_step)
    return Step(seconds, mx.get_peak_memory() - before, side * side + TEXT_TOKENS)


if __name__ == "__main__":
    main()
