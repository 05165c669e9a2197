"""qwen-image-mlx info: what a file or folder is."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .results import json_text, print_table


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Adds the command's flags."""
    parser = commands.add_parser(
        "info",
        help="say what a picture, layers, a model or a LoRA is",
        description="Print the parameters a picture was painted with (as stored in its PNG), what a model holds and "
        "will cost in memory, or what a LoRA changes.",
    )
    parser.add_argument(
        "path",
        metavar="PATH",
        help="a PNG painted by this program, layers, a model's folder or a demo's name, or a file of weights",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def run(arguments: argparse.Namespace) -> None:
    """Prints one fact a line, or JSON."""
    from ..files import named_path
    from ..layers.formats import is_layers
    from ..weights.safetensors_files import PICKLES
    from ..weights.snapshot import DEMOS

    path = named_path(arguments.path, "PATH")
    if path.exists() and path.suffix.lower() not in PICKLES and is_layers(path):
        facts = _layers(path)
    elif path.is_dir() or arguments.path in DEMOS:
        facts = _checkpoint(str(path))
    elif path.suffix.lower() in (".safetensors", ".gguf", *PICKLES):
        facts = _weights(path)
    else:
        from ..images.files import read_metadata

        facts = read_metadata(path)
    if arguments.json:
        print(json_text(facts))
        return
    print_table([(name, "" if value is None else value) for name, value in facts.items()])


def _layers(path: Path) -> dict[str, Any]:
    from ..layers.formats import load_layers

    stack = load_layers(path)
    facts: dict[str, Any] = {"layers": len(stack.layers), "size": "x".join(map(str, stack.size))}
    for number, layer in enumerate(stack.layers):
        width, height = layer.image.size
        facts[f"layer {number}"] = f"{layer.name}, {width}x{height}"
    return facts | dict(stack.metadata)


def _checkpoint(path: str) -> dict[str, Any]:
    from ..pipeline.inspection import inspect_checkpoint

    report = inspect_checkpoint(path)
    facts: dict[str, Any] = {
        "model": report.model, "class": report.class_name, "for": report.task, "transformer blocks": report.blocks,
    }  # fmt: skip
    for part in report.components:
        forms = ", ".join(f"{form} {_size(nbytes)}" for form, nbytes in part.forms.items())
        facts[part.name] = f"{_size(part.file_bytes)} in files ({forms}), {_size(part.resident_bytes)} in memory"
    facts["while encoding"] = f"{_size(report.encoding_bytes)} and the pictures"
    facts["while painting"] = f"{_size(report.painting_bytes)} and the picture"
    return facts


def _weights(path: Path) -> dict[str, Any]:
    from ..pipeline.identify import identify

    report = identify(path)
    forms = ", ".join(f"{form} {_size(nbytes)}" for form, nbytes in report.forms.items())
    facts: dict[str, Any] = {"kind": report.kind, "tensors": report.tensors, "in the file": forms}
    if report.resident_bytes is not None:
        facts["in memory"] = _size(report.resident_bytes)
    return facts | report.facts


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.2f} MB"
