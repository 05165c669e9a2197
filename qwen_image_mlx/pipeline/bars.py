"""Progress bars on stderr, for whoever runs a pipeline and gives no callback of their own."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any

from tqdm import tqdm

from ..outside import one_line
from .progress import Progress

_LABELS = {"denoise": "steps"}
_MOST_DETAIL = 200  # characters
_PAUSE = 1.0  # seconds between two looks at the layers of a step


class ProgressBars:
    """A progress callback that shows one bar per stage; a context manager that closes the last."""

    def __init__(self) -> None:
        self._key: tuple[str, str] | None = None
        self._bar: tqdm[Any] | None = None
        self._shown = time.monotonic()

    def __call__(self, progress: Progress) -> None:
        if progress.stage == "layer":
            self._show_layer(progress)
            return
        key = progress.stage, progress.detail
        if key != self._key or self._bar is None or progress.step < self._bar.n:
            self.close()
            in_bytes = progress.stage in ("download", "quantize")
            self._key = key
            self._bar = tqdm(
                total=progress.total,
                desc=one_line(f"{_LABELS.get(progress.stage, progress.stage)} {progress.detail}", _MOST_DETAIL),
                unit="B" if in_bytes else "it",
                unit_scale=in_bytes,
                unit_divisor=1000,
                dynamic_ncols=True,
            )
        self._bar.set_postfix_str("", refresh=False)
        self._bar.total = progress.total
        self._bar.update(progress.step - self._bar.n)

    def _show_layer(self, progress: Progress) -> None:
        """Says behind the bar where a long step is."""
        now = time.monotonic()
        if self._bar is not None and now - self._shown >= _PAUSE:
            self._shown = now
            self._bar.set_postfix_str(f"layer {progress.step} of {progress.total}")

    def close(self) -> None:
        """Ends the current bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def __enter__(self) -> ProgressBars:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
