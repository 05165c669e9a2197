"""qwen-image-mlx lora: describes LoRA files."""

from __future__ import annotations

import argparse
from typing import Any


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Adds the command's flags."""
    parser = commands.add_parser("lora", help="describe LoRA files", description="Describe LoRA files.")
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    inspect = actions.add_parser(
        "inspect",
        help="print what a LoRA changes",
        description="Print a LoRA's dialect, kinds, ranks, scales and targets, and what of it would do nothing. Reads "
        "no weights.",
    )
    inspect.add_argument("file", metavar="REF", help="a file, a folder, owner/repo, owner/repo:file or a hub address")
    inspect.add_argument(
        "--model", "-m", help="whose transformer it is for (default: that of the released or the demo models)"
    )
    return parser


def run(arguments: argparse.Namespace) -> None:
    """Prints one fact a line."""
    from ..lora.description import describe
    from ..lora.fetch import fetch_lora, split_reference
    from ..lora.file import read_lora
    from ..pipeline.identify import read_known_lora
    from ..pipeline.pipeline import QwenImagePipeline
    from ..pipeline.reporter import Reporter
    from .console import ProgressBars, messages
    from .results import print_table

    with messages(), ProgressBars() as bars:
        reference, strength = split_reference(arguments.file)
        path = fetch_lora(reference, download=Reporter(bars).download)
        if arguments.model is None:
            lora, _ = read_known_lora(path, strength)
        else:
            pipeline = QwenImagePipeline.from_pretrained(arguments.model, progress=bars)
            lora = read_lora(path, pipeline.lora_targets(), strength)
        bars.close()
        print_table(describe(lora))
