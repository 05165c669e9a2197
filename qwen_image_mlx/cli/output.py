"""The path that --output means."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import RequestError
from ..files import check_writable, named_path
from ..runtime.ranks import leads

DEFAULT_NAME = "qwen-image.png"


def check_output(path: Path, nbytes: int) -> None:
    """Raises OutputError if a file of some bytes could not be written; ranks that write nothing check nothing."""
    if leads():
        check_writable(path, nbytes)


def output_path(output: str | None, default_name: str = DEFAULT_NAME) -> Path:
    """The image a user's --output means: a file, or a directory to put `default_name` in; raises RequestError."""
    from ..images.files import WRITERS  # here, because it loads Pillow

    if output is None:
        return Path(default_name)
    path = named_path(output, "--output")
    if path.is_dir():
        return path / default_name
    if output.endswith(("/", os.sep)):
        return path / default_name
    if path.name.lower() in WRITERS:
        raise RequestError(f"--output is {output}, which has no name before {path.name}; name it, as in fox.png")
    if not path.suffix:
        return path.with_name(path.name + ".png")
    if path.suffix.lower() not in WRITERS:
        raise RequestError(
            f"--output is {output}, but images are written as PNG, JPEG or WebP; end the name in .png, .jpg or .webp"
        )
    return path
