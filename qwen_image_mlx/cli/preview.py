"""What --preview shows: a small image beside the output, replaced at each step and removed in the end."""

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
    """Writes what it is shown to `<stem>-preview.png` beside `output`, or the first free name after it.

    The file is there from the first step until the `with` ends, however it ends. Where it cannot be written that is
    said once, and generation goes on without.
    """
    from PIL import PngImagePlugin

    from ..files import PREVIEW_KEY, new_file, owner, replace_file, sweep

    wanted = output.with_name(f"{output.stem}-preview.png")
    path, failed = None, False
    info = PngImagePlugin.PngInfo()
    info.add_text(PREVIEW_KEY, owner())
    sweep(wanted.parent)

    def show(image: Image, step: int, total: int) -> None:
        nonlocal path, failed
        if failed:
            return
        png = io.BytesIO()
        image.save(png, "PNG", compress_level=1, pnginfo=info)
        try:
            if path is None:
                path = new_file(wanted, png.getvalue())
                logger.info("preview: %s", path)
            else:
                replace_file(path, png.getvalue())
        except OSError as error:
            failed = True
            logger.warning("no preview: %s", error)

    try:
        yield show
    finally:
        if path is not None:
            path.unlink(missing_ok=True)
