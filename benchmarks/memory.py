"""Resident and peak memory of load, encode, denoise and decode, through the pipeline.

    python benchmarks/memory.py [--blocks 4]

On a random checkpoint of real width but few layers (fp32, as bf16 is slow on the CPU), at 64x64 pixels and two steps:
MLX's active and peak bytes after each stage, as ratios to the file of the component at work.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

from common import preload_blas, print_table, verdict


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=4)
    arguments = parser.parse_args()
    preload_blas()

    import mlx.core as mx

    from qwen_image_mlx import GenerationParameters, QwenImagePipeline
    from qwen_image_mlx.weights.synthetic import FULL, write_checkpoint

    configs = {
        **FULL,
        "transformer": replace(FULL["transformer"], num_layers=arguments.blocks),
        "text_encoder": replace(FULL["text_encoder"], num_hidden_layers=2, vocab_size=512),
    }
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = write_checkpoint(Path(folder) / "model", configs, dtype=mx.float32)
        mx.clear_cache()
        pipeline = QwenImagePipeline.from_pretrained(checkpoint, dtype="float32")
        files = {c: sum(f.stat().st_size for f in (checkpoint / c).glob("*.safetensors")) for c in configs}
        rows, start = [], mx.get_active_memory()

        def stage(name: str, component: str, work) -> None:
            mx.clear_cache()
            mx.reset_peak_memory()
            work()
            mx.clear_cache()
            active, peak = mx.get_active_memory() - start, mx.get_peak_memory() - start
            size = files[component]
            rows.append((name, size / 1e6, active / 1e6, active / size, peak / 1e6, peak / size))

        parts = pipeline._components
        parameters = GenerationParameters(width=64, height=64, num_inference_steps=2)
        made = {}
        stage("load text encoder", "text_encoder", pipeline.reload_text_encoder)
        stage("encode", "text_encoder", lambda: made.update(
            encoding=pipeline.encode_guidance_prompts("a red fox", "blurry")))  # fmt: skip
        stage("release encoders", "text_encoder", pipeline.release_encoders)
        stage("modulation table", "transformer", lambda: pipeline._modulation(pipeline._schedule(parameters, 16)))
        stage("load transformer", "transformer", lambda: parts.transformer)
        stage("denoise", "transformer", lambda: made.update(
            latents=pipeline.denoise_latents(parameters, made["encoding"])))  # fmt: skip
        resident = rows[-1][3]
        stage("release transformer", "transformer", pipeline.release_transformer)
        stage("load decoder", "vae", lambda: parts.vae_decoder)
        from qwen_image_mlx.pipeline.autoencode import decode

        latents = mx.random.normal((1, 64, 64, 16), key=mx.random.key(0))
        stage("decode 512x512", "vae", lambda: decode(parts.vae_decoder, parts.vae_config, latents))
        stage("release vae", "vae", pipeline.release_vae)
        print_table(
            f"{arguments.blocks} transformer blocks, 2 encoder layers, fp32",
            ("after", "file MB", "active MB", "active / file", "peak MB", "peak / file"), rows,
        )  # fmt: skip
        print_table(
            "Targets", ("", "measured", "at most", ""),
            [verdict("transformer bytes resident while denoising / its file", resident, 0.68)],
        )  # fmt: skip


if __name__ == "__main__":
    main()
