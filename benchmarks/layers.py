"""Memory and time of decoding 1, 4 and 8 layers: one by one, as the pipeline does, and all at once.

    python benchmarks/layers.py [--size 256] [--json FILE]

A random checkpoint whose VAE is real in every width and has four channels; nothing else of it matters here. The peak is
what MLX held while decoding, beyond what it held before. Layers leave as 8-bit images, as on their way to files.

Takes 5 minutes and 7 GB of memory at 256.
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path

from common import MIB, Table, Targets, finish, parser, preload_blas, stopwatch

LAYERS = (1, 4, 8)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--size", type=int, default=256, help="pixels along a side, a multiple of 16 (256)")
    arguments = options.parse_args()
    preload_blas()

    import mlx.core as mx

    from qwen_image_mlx import GenerationParameters, QwenImagePipeline, unpack_multi_layer_latents
    from qwen_image_mlx.images.pixels import to_images
    from qwen_image_mlx.pipeline.autoencode import decode
    from qwen_image_mlx.weights.synthetic import FULL, TINY, write_checkpoint

    size = arguments.size
    columns = ("layers", "one by one: s", "MLX peak MiB", "all at once: s", "MLX peak MiB")
    table = Table(f"decoding layers of {size}x{size}", columns)
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder), {**TINY, "vae": FULL["vae"]}, pipeline="QwenImageLayeredPipeline")
        pipeline = QwenImagePipeline.from_pretrained(folder)
        components = pipeline.components
        decoder, config = components.network("vae_decoder"), components.config("vae")

        def one_by_one(parameters: GenerationParameters, latents: mx.array) -> None:
            for frame in pipeline.decode_frames(parameters, latents):
                to_images(frame[None])

        def at_once(parameters: GenerationParameters, latents: mx.array) -> None:
            frames = unpack_multi_layer_latents(latents, parameters.num_layers + 1, size // 8, size // 8)
            decode(decoder, config, frames[0, 1:])

        rows = {}
        for layers in LAYERS:
            parameters = GenerationParameters(width=size, height=size, num_layers=layers)
            latents = mx.random.normal((1, (layers + 1) * (size // 16) ** 2, 64), key=mx.random.key(layers))
            mx.eval(latents)

            rows[layers] = []
            for way in (one_by_one, at_once):
                mx.clear_cache()
                held = mx.get_active_memory()
                mx.reset_peak_memory()
                seconds = stopwatch(partial(way, parameters, latents))
                rows[layers] += seconds, (mx.get_peak_memory() - held) / MIB
            table.rows.append((layers, *rows[layers]))
    table.print()
    targets = Targets()
    for layers in LAYERS[1:]:
        targets.check(f"peak of decoding {layers} layers / 1 layer", rows[layers][1] / rows[1][1], 1.05)
    finish([table, targets], arguments.json)


if __name__ == "__main__":
    main()
