"""Generates one prompt with several seeds and guidance values, and puts the images on one contact sheet.

    python examples/sweep.py "a red circle on a blue background" --output sheet.png

The prompt is encoded once. Then the text encoder is released, so that only the transformer and the VAE are in memory
while the images are generated.
"""

from __future__ import annotations

import argparse

from PIL import Image

from qwen_image_mlx import GenerationParameters, QwenImagePipeline, to_images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("prompt", nargs="?", default="a red circle on a blue background")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--size", type=int, default=64, help="width and height in pixels (64, which demo is made for)")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0, 4.0])
    parser.add_argument("--output", default="sheet.png")
    arguments = parser.parse_args()

    pipeline = QwenImagePipeline.from_pretrained(arguments.model)
    encoding = pipeline.encode_guidance_prompts(arguments.prompt, negative_prompt=" ")
    pipeline.release_encoders()

    side = arguments.size
    sheet = Image.new("RGB", (side * len(arguments.seeds), side * len(arguments.guidance)))
    for row, cfg_scale in enumerate(arguments.guidance):
        parameters = GenerationParameters(
            width=side, height=side, num_inference_steps=arguments.steps, cfg_scale=cfg_scale
        )
        for column, seed in enumerate(arguments.seeds):
            (image,) = to_images(pipeline.generate_pixels(parameters, encoding, seed=seed))
            sheet.paste(image, (column * side, row * side))
    sheet.save(arguments.output)
    print(arguments.output)


if __name__ == "__main__":
    main()
