"""What a preview costs beside a step: an image of 1024x1024 latents, and its file, against a block of real width.

    python benchmarks/preview.py [--size 1024] [--rounds 3] [--json FILE]

A step of the released models is 60 such blocks, twice with guidance, so its share is at most a 60th of that of a block,
which alone fits a small machine. fp32, random weights. Takes 3 minutes on two cores and 5 GB.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from statistics import median

from common import Table, Targets, finish, median_ratio, parser, preload_blas, stopwatch, take_turns
from transformer import Ours, write_inputs, write_weights

BLOCKS = 60
STEPS = 20  # previews of a round, whose mean counts


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--size", type=int, default=1024, help="pixels along a side, a multiple of 16 (1024)")
    options.add_argument("--rounds", type=int, default=3, help="rounds the medians are taken of (3)")
    arguments = options.parse_args()
    preload_blas()

    import mlx.core as mx

    from qwen_image_mlx import GenerationParameters, Progress, QwenImagePipeline
    from qwen_image_mlx.cli.preview import preview_file
    from qwen_image_mlx.pipeline.request import Request
    from qwen_image_mlx.runtime.preview import Preview, Show
    from qwen_image_mlx.weights.synthetic import TINY, write_checkpoint

    side = arguments.size // 16
    parameters = GenerationParameters(width=arguments.size, height=arguments.size, num_inference_steps=STEPS)
    request = Request(prompt="", negative_prompt=None, parameters=parameters, seeds=(0,))
    latents = [mx.random.normal((1, side**2, 64), key=mx.random.key(n)).astype(mx.bfloat16) for n in range(STEPS + 1)]
    mx.eval(latents)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pipeline = QwenImagePipeline.from_pretrained(write_checkpoint(folder / "tiny", TINY))
        weights, inputs = str(folder / "transformer.safetensors"), str(folder / "inputs.safetensors")
        write_weights(weights, 1)
        write_inputs(inputs, side**2, 0)
        ours = Ours(weights, 1)
        ours.prepare(inputs, (side, side), 0)

        def one(show: Show) -> float:
            preview = Preview(show, None, pipeline, request)

            def run() -> None:
                for n, x in enumerate(latents):
                    preview(Progress("denoise", n, STEPS, sigma=1 - n / STEPS, latents=x))

            return stopwatch(run) / STEPS

        with preview_file(folder / "image.png") as show:
            candidates = {
                "one block": ours.block,
                "preview": lambda: one(lambda *_: None),
                "preview and its file": lambda: one(show),
            }
            seconds = take_turns(candidates, arguments.rounds)

    table = Table(f"A preview of {arguments.size}x{arguments.size}", ["", "ms", "share of a step of 60 blocks"])
    targets = Targets()
    for candidate in list(candidates)[1:]:
        share = median_ratio(seconds, candidate, "one block") / BLOCKS
        table.rows.append((candidate, 1e3 * median(seconds[candidate]), share))
        targets.check(f"{candidate} / step", share, 0.03)
    table.rows.append(("one block", 1e3 * median(seconds["one block"]), 1 / BLOCKS))
    table.print()
    finish([table, targets], arguments.json)


if __name__ == "__main__":
    main()
