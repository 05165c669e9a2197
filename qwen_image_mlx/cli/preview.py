"""The file of --preview: a small image next to the output, replaced at each step and removed at the end."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..runtime.preview import Show

logger: logging.Logger = logging.getLogger(__name__)


@contextmanager
def preview_file(output: Path) -> Iterator[Show]:
    """Writes previews to `<stem>-preview.png` next to `output`, or to the first free name after it.

    The file exists from the first step until the `with` block ends, for whatever reason. If it cannot be written, one
    warning is logged, and generation continues without previews.
    """
    from PIL import PngImagePlugin

    from ..files import PREVIEW_KEY, new_file, owner, remove_previews, replace_file, sweep

    target = output.with_name(f"{output.stem}-preview.png")
    path, failed = None, False
    info = PngImagePlugin.PngInfo()
    info.add_text(PREVIEW_KEY, owner())
    sweep(target.parent)

    def show(image: Image, step: int, total: int) -> None:
        nonlocal path, failed
        if failed:
            return
        png = io.BytesIO()
        image.save(png, "PNG", compress_level=1, pnginfo=info)
        try:
            if path is None:
                path = new_file(target, png.getvalue())
                logger.info("preview: %s", path)
            else:
                replace_file(path, png.getvalue())
        except OSError as error:
            failed = True
            logger.warning("no preview: %s", error)

    try:
        yield show
    finally:
        remove_previews(target.parent)  # Ctrl-C may have come before `path` was known
