"""qwen-image-mlx quantize: save a copy of a model with quantized weights."""

from __future__ import annotations

import argparse
from typing import Any

DESCRIPTION = """\
Save a copy of a model with quantized weights, in a folder that loads like any other model, without a flag.

At 8 bits a transformer takes 14.4 GB of memory instead of 27.0, and its images are hard to tell from the original's;
at 4 bits it takes 7.6 GB.
The VAE, norms and the modulation, which is in the file but never stays in memory, are as exact as they were.
quantization_report.json in the new folder has every matrix's error. An interrupted run continues when it is
started again; an incomplete folder never loads."""


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Adds the command's flags."""
    parser = commands.add_parser(
        "quantize",
        help="save a copy of a model with quantized weights",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="a local directory or a Hugging Face id")
    add("out", metavar="OUT", help="a new folder")
    add("--bits", "-q", required=True, metavar="B", help="3, 4, 5, 6, 8, mxfp4, mxfp8 or nvfp4 (the transformer's; the "
        "text encoder's take 8), or transformer=4,text_encoder=8,vision=8")  # fmt: skip
    add("--group-size", type=int, metavar="G", help="columns that share a scale: 32, 64 or 128 "
        "(default: 64); the microscaling formats have their own")  # fmt: skip
    add("--revision", help="branch, tag or commit of a Hugging Face model")
    return parser


def run(arguments: argparse.Namespace) -> None:
    """Writes the quantized model and prints its path."""
    from ..pipeline.quantize_checkpoint import quantize_checkpoint
    from ..weights.schemes import Quantization
    from .console import ProgressBars, messages

    quantization = Quantization.parse(arguments.bits, arguments.group_size)
    with messages(), ProgressBars() as bars:
        out = quantize_checkpoint(
            arguments.model, arguments.out, quantization, revision=arguments.revision, progress=bars
        )
        bars.close()
        print(out)
