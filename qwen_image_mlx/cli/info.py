"""qwen-image-mlx info: what a file says of itself."""

from __future__ import annotations

import argparse
import json
from typing import Any


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Adds the command's flags."""
    parser = commands.add_parser(
        "info",
        help="print the parameters a picture was painted with",
        description="Print the parameters a picture was painted with, as stored in its PNG.",
    )
    parser.add_argument("image", metavar="IMAGE", help="a PNG file painted by this program")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def run(arguments: argparse.Namespace) -> None:
    """Prints one parameter a line, or JSON."""
    from ..images.files import read_metadata

    metadata = read_metadata(arguments.image)
    if arguments.json:
        print(json.dumps(metadata, ensure_ascii=False, indent=2))
        return
    width = max(map(len, metadata), default=0)
    for name, value in metadata.items():
        print(f"{name:{width}}  {'' if value is None else value}")
