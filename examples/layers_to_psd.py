"""Decomposes an image into layers and saves them for an image editor: PSD (needs psd-tools) and OpenRaster.

python examples/layers_to_psd.py photo.png --model Qwen/Qwen-Image-Layered --layers 4
python examples/layers_to_psd.py                   # draws an image and uses the model inside the package
"""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path

from PIL import Image, ImageDraw

from qwen_image_mlx import QwenImagePipeline, compose


def drawn() -> Image.Image:
    """A red circle on blue, which demo-layered can decompose."""
    image = Image.new("RGB", (64, 64), (40, 70, 200))
    ImageDraw.Draw(image).ellipse((16, 16, 47, 47), fill=(220, 40, 40))
    return image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("image", nargs="?", type=Path)
    parser.add_argument("--model", default="demo-layered")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--prompt", default="", help="what the image shows; the released model writes its own caption")
    parser.add_argument("--output", type=Path, default=Path("layers"), help="a folder")
    arguments = parser.parse_args()

    pipeline = QwenImagePipeline.from_pretrained(arguments.model)
    prompt = arguments.prompt or ("" if arguments.image else "a red circle on a blue background")
    result = pipeline.decompose(arguments.image or drawn(), prompt, num_layers=arguments.layers)
    if find_spec("psd_tools"):
        result.save(arguments.output, formats=["png", "ora", "psd"])
    else:
        print('no PSD: it needs psd-tools, pip install ".[psd]" in the checkout')
        result.save(arguments.output, formats=["png", "ora"])
    print(f"{arguments.output}: {len(result.layers)} layers, {result.psnr:.1f} dB PSNR against the image")

    # The layers as they came back, and with the front one moved 8 pixels to the right.
    front = len(result.layers) - 1
    moved = compose(arguments.output, move={front: (8, 0)})
    moved.save(arguments.output / "moved.png")
    print(arguments.output / "moved.png")


if __name__ == "__main__":
    main()
