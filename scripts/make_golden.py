"""Runs a real text-to-image checkpoint in diffusers and writes a golden file for `qwen-image-mlx doctor --golden`.

    PYTHONPATH=. python scripts/make_golden.py Qwen/Qwen-Image-2512 golden.safetensors

To be run once, wherever diffusers and the checkpoint are; MLX is not needed there. The file (well below 1 MB) holds
fingerprints of the prompts' states, of the noise and of the latents after chosen steps, a small image, and how they
were made. A few steps are enough: what differs shows after one.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors.numpy import save_file

try:
    import diffusers
    import torch
    import transformers
    from diffusers import DiffusionPipeline, QwenImagePipeline
except ImportError as error:
    raise SystemExit(f"{error.name} is not installed; run pip install torch diffusers transformers") from error

from qwen_image_mlx.doctor.fingerprint import fingerprint

# As in qwen_image_mlx/doctor/golden.py, which reads the file.
FORMAT, VALUES, PARTS, THUMBNAIL = "qwen_image_mlx.golden.1", 4096, 16, 64
CONFIG = ("num_layers", "num_attention_heads", "attention_head_dim", "joint_attention_dim", "in_channels")


def main(argv: list[str] | None = None) -> None:
    """Writes the file that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", help="a folder in the Hugging Face layout, or a hub id")
    add("output", type=Path, help="the file to write, .safetensors")
    add("--revision", help="branch, tag or commit of a hub id")
    add("--prompt", default='A bookshop window at night, a sign that says "OPEN"')
    add("--negative-prompt", default=" ", help="guides where --cfg-scale is above 1")
    add("--seed", type=int, default=42)
    add("--width", type=int, default=1024)
    add("--height", type=int, default=1024)
    add("--steps", type=int, default=4)
    add(
        "--keep",
        type=int,
        nargs="+",
        metavar="STEP",
        help="steps whose latents are kept (default: 1, 2, 4, 8, … and the last)",
    )
    add("--cfg-scale", type=float, default=4.0)
    add("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args(argv)
    if arguments.steps < 1 or arguments.seed < 0 or arguments.width % 16 or arguments.height % 16:
        parser.error("--steps must be at least 1, --seed at least 0, --width and --height multiples of 16")
    if not 1 <= arguments.cfg_scale < float("inf"):
        parser.error(f"--cfg-scale is {arguments.cfg_scale}, but must be a number of at least 1")
    if not Path(arguments.output).absolute().parent.is_dir():
        parser.error(f"{arguments.output} cannot be written: its folder does not exist")
    if odd := [step for step in arguments.keep or () if not 1 <= step <= arguments.steps]:
        parser.error(f"--keep has {odd[0]}, but must be steps from 1 to {arguments.steps}")
    powers = {2**n for n in range(arguments.steps.bit_length())} | {arguments.steps}
    kept = sorted({step for step in arguments.keep or powers if 1 <= step <= arguments.steps})
    try:
        found = DiffusionPipeline.load_config(arguments.model, revision=arguments.revision).get("_class_name")
    except (OSError, ValueError) as error:
        parser.error(f"{arguments.model} cannot be opened: {error}")
    if found != QwenImagePipeline.__name__:
        parser.error(f"{arguments.model} is for {found}, but must be a text-to-image checkpoint (QwenImagePipeline)")
    pipe = QwenImagePipeline.from_pretrained(
        arguments.model, revision=arguments.revision, dtype=getattr(torch, arguments.dtype)
    ).to(arguments.device)
    arrays, image = computed(pipe, arguments, kept)
    factor = max(1, -(-max(image.size) // THUMBNAIL))
    tensors = {"image": np.asarray(image.convert("RGB").reduce(factor))}
    for name, array in arrays.items():
        tensors[f"{name}.values"], tensors[f"{name}.norms"] = fingerprint(array, VALUES, PARTS)
    said = described(pipe, arguments, kept, "text-negative" in arrays)
    save_file(tensors, arguments.output, {"format": FORMAT, "golden": json.dumps(said, ensure_ascii=False)})
    print(f"{arguments.output}: {', '.join(arrays)} and an image of {image.width}x{image.height}")


@torch.no_grad()
def computed(
    pipe: QwenImagePipeline, arguments: argparse.Namespace, kept: list[int]
) -> tuple[dict[str, np.ndarray], Image.Image]:
    """Each stage's array, fp32, and the image."""
    arrays = {"text": _numpy(pipe.encode_prompt(arguments.prompt, max_sequence_length=512)[0])}
    guided = arguments.cfg_scale > 1
    if guided:
        arrays["text-negative"] = _numpy(pipe.encode_prompt(arguments.negative_prompt, max_sequence_length=512)[0])
    # Drawn on the CPU in the pipeline's dtype, so that the noise is the same wherever this runs.
    noise = pipe.prepare_latents(
        1, pipe.transformer.config.in_channels // 4, arguments.height, arguments.width, pipe.transformer.dtype,
        torch.device("cpu"), torch.Generator("cpu").manual_seed(arguments.seed),
    )  # fmt: skip
    arrays["noise"] = _numpy(noise)

    def keep(_pipe: Any, step: int, _time: Any, state: dict[str, Any]) -> dict[str, Any]:
        if step + 1 in kept:
            arrays[f"latents-{step + 1}"] = _numpy(state["latents"])
        return state

    result = pipe(
        prompt=arguments.prompt, negative_prompt=arguments.negative_prompt if guided else None,
        true_cfg_scale=arguments.cfg_scale, width=arguments.width, height=arguments.height,
        num_inference_steps=arguments.steps, latents=noise.to(arguments.device), callback_on_step_end=keep,
    )  # fmt: skip
    return arrays, result.images[0]


def described(pipe: QwenImagePipeline, arguments: argparse.Namespace, kept: list[int], guided: bool) -> dict[str, Any]:
    """How the arrays were made; a local model by its folder's name alone."""
    folder = Path(arguments.model)
    config = pipe.transformer.config
    return {
        "model": folder.name if folder.exists() else arguments.model,
        "revision": arguments.revision,
        "commit": getattr(config, "_commit_hash", None),
        "class": type(pipe).__name__,
        "transformer": {name: config[name] for name in CONFIG},
        "prompt": arguments.prompt,
        "negative_prompt": arguments.negative_prompt if guided else None,
        "seed": arguments.seed,
        "width": arguments.width,
        "height": arguments.height,
        "steps": arguments.steps,
        "kept_steps": kept,
        "cfg_scale": arguments.cfg_scale,
        "dtype": arguments.dtype,
        "device": arguments.device,
        "versions": {
            "python": platform.python_version(), "torch": torch.__version__, "diffusers": diffusers.__version__,
            "transformers": transformers.__version__,
        },
    }  # fmt: skip


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().to("cpu", torch.float32).numpy()


if __name__ == "__main__":
    main()
