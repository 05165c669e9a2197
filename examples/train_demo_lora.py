"""Teaches the demo model a colour it has never seen: draws a data set, trains a LoRA, generates without and with it.

    python examples/train_demo_lora.py --output pink

The demo model knows red, green, blue and a few more colours, but not pink. The data set is a folder of PNG files with
captions in .txt files of the same names, as for a real model. Takes about a minute. Prints how far each
image is from pink; both images are saved side by side.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from qwen_image_mlx import QwenImagePipeline

PINK = (245, 130, 190)
BACKGROUNDS = {"blue": (40, 90, 220), "black": (20, 20, 20), "white": (240, 240, 240), "green": (40, 170, 70)}
PROMPT = "a pink circle on a black background"


def draw(folder: Path) -> None:
    """Pink circles and squares of three sizes at two places, with their captions."""
    folder.mkdir(parents=True)
    cases = product(("circle", "square"), BACKGROUNDS.items(), (12, 15, 18), (28, 36))
    for number, (shape, (name, colour), radius, middle) in enumerate(cases):
        image = Image.new("RGB", (64, 64), colour)
        box = (middle - radius, middle - radius, middle + radius, middle + radius)
        pen = ImageDraw.Draw(image)
        (pen.ellipse if shape == "circle" else pen.rectangle)(box, fill=PINK)
        image.save(folder / f"{number:02}.png")
        (folder / f"{number:02}.txt").write_text(f"a pink {shape} on a {name} background")


def distance(image: Image.Image) -> float:
    """How far the middle of an image is from pink: the mean difference of a channel, of 255."""
    middle = np.asarray(image.convert("RGB"), np.float32)[28:36, 28:36]
    return float(np.abs(middle - np.array(PINK, np.float32)).mean())


def generated(model: str, loras: list[Path]) -> Image.Image:
    """The prompt's image, without or with the LoRA."""
    pipeline = QwenImagePipeline.from_pretrained(model, dtype="float32", loras=loras)
    (image,) = pipeline.generate(PROMPT, negative_prompt=" ", seed=1, progress=False)
    return image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--output", type=Path, default=Path("pink"), help="a new folder")
    arguments = parser.parse_args()

    if arguments.output.exists():
        parser.error(f"{arguments.output} exists already: give a new folder with --output")
    data, run = arguments.output / "data", arguments.output / "run"
    draw(data)
    flags = "--batch-size 16 --rank 8 --targets all --learning-rate 2e-3 --warmup 20"
    flags += " --timesteps logit_normal --resolution 64 --dtype float32"
    command = [sys.executable, "-m", "qwen_image_mlx", "train", "--model", arguments.model, "--data", str(data)]
    command += ["--output", str(run), "--steps", str(arguments.steps), *flags.split()]
    subprocess.run(command, check=True)

    images = [generated(arguments.model, []), generated(arguments.model, [run / "lora.safetensors"])]
    both = Image.new("RGB", (2 * images[0].width, images[0].height))
    for number, image in enumerate(images):
        both.paste(image, (number * image.width, 0))
    both.save(arguments.output / "without-and-with.png")
    before, after = map(distance, images)
    print(f"distance from pink: {before:.0f} without the LoRA, {after:.0f} with it")
    print(arguments.output / "without-and-with.png")


if __name__ == "__main__":
    main()
