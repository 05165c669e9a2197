"""What --preview shows: a small picture beside the output, replaced at each step and removed in the end."""

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

logger = logging.getLogger(__name__)


@contextmanager
def preview_file(output: Path) -> Iterator[Show]:
    """Writes what it is shown to `<stem>-preview.png` beside `output`, or the first free name after it.

    The file is there from the first step until the `with` ends, however it ends. Where it cannot be written that is
    said once, and painting goes on without.
    """
    from ..images.files import claim, replace_file

    wanted = output.with_name(f"{output.stem}-preview.png")
    path, failed = None, False

    def show(image: Image, step: int, total: int) -> None:
        nonlocal path, failed
        if failed:
            return
        png = io.BytesIO()
        image.save(png, "PNG", compress_level=1)
        try:
            if path is None:
                wanted.parent.mkdir(parents=True, exist_ok=True)
                path = claim(wanted)
                logger.info("preview: %s", path)
            replace_file(path, png.getvalue())
        except OSError as error:
            failed = True
            logger.warning("no preview: %s", error)

    try:
        yield show
    finally:
        if path is not None:
            path.unlink(missing_ok=True)
