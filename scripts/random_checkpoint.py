#!/usr/bin/env python3
"""Write a checkpoint of random weights in the released layout, to try the program without a download.

python scripts/random_checkpoint.py tiny
python -m qwen_image_mlx generate "a red fox" --model tiny --width 256 --height 256 --steps 4
python scripts/random_checkpoint.py tiny-edit --pipeline QwenImageEditPlusPipeline
"""

import argparse
from pathlib import Path

from qwen_image_mlx.variants import VARIANTS
from qwen_image_mlx.weights.synthetic import FULL, TINY, write_checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a new folder")
    parser.add_argument("--full-size", action="store_true", help="the real configuration: about 55 GB")
    parser.add_argument("--pipeline", choices=VARIANTS, default="QwenImagePipeline", help="its class: %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.folder.exists():
        parser.error(f"{arguments.folder} exists already; name a new folder")
    configs = FULL if arguments.full_size else TINY
    print(write_checkpoint(arguments.folder, configs, pipeline=arguments.pipeline, seed=arguments.seed))


if __name__ == "__main__":
    main()
