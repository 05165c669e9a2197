#!/usr/bin/env python3
"""Save a copy of a model with quantized weights: the same as `qwen-image-mlx quantize`.

python scripts/quantize.py Qwen/Qwen-Image-2512 qwen-image-2512-4bit --bits 4
python -m qwen_image_mlx generate "a red fox" --model qwen-image-2512-4bit
"""

import sys

from qwen_image_mlx.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["quantize", *sys.argv[1:]]))
