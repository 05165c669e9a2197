"""Progress on stderr for callers without a callback of their own: one changing line."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any

from tqdm import tqdm

from ..outside import one_line
from .progress import Progress

_WORDS = {
    "caption": "writing a caption",
    "check": "checking",
    "decode": "decoding",
    "denoise": "denoising",
    "download": "downloading",
    "encode": "encoding",
    "load": "loading",
    "quantize": "quantizing",
}
_IN_BYTES = ("download", "quantize")
_ONE = "{desc} … {elapsed}"
_MANY = "{desc} {n_fmt}/{total_fmt}, {remaining} left ({rate_fmt}){postfix}"
_MAX_DETAIL = 200  # characters
_LAYER_PAUSE = 1.0  # seconds between two looks at the layers of a step
_LINE_PAUSE = 30.0  # seconds between two lines where stderr is not a terminal


class ProgressBars:
    """A progress callback that writes one changing line; a context manager that clears it."""

    def __init__(self) -> None:
        self._key: tuple[str, str] | None = None
        self._line: _Line | None = None
        self._looked = time.monotonic()

    def __call__(self, progress: Progress) -> None:
        if progress.stage == "layer":
            self._show_layer(progress)
            return
        key = progress.stage, progress.detail
        if key != self._key or self._line is None or progress.step < self._line.n:
            self.close()
            self._key, self._line = key, _line_of(progress)
        self._line.set_postfix_str("", refresh=False)
        self._line.total = progress.total
        self._line.update(progress.step - self._line.n)
        if progress.step == progress.total:
            self._line.refresh()

    def _show_layer(self, progress: Progress) -> None:
        """Shows the current layer of a long step at the end of the line."""
        now = time.monotonic()
        if self._line is not None and now - self._looked >= _LAYER_PAUSE:
            self._looked = now
            self._line.set_postfix_str(f"layer {progress.step} of {progress.total}")

    def close(self) -> None:
        """Clears the line."""
        if self._line is not None:
            self._line.close()
            self._line = None

    def __enter__(self) -> ProgressBars:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _line_of(progress: Progress) -> _Line:
    """The line for a stage that begins."""
    in_bytes = progress.stage in _IN_BYTES
    words = f"{_WORDS.get(progress.stage, progress.stage)} {progress.detail}".rstrip()
    return _Line(
        total=progress.total,
        desc=one_line(words, _MAX_DETAIL),
        bar_format=_MANY if progress.total > 1 else _ONE,
        unit="B" if in_bytes else " steps",
        unit_scale=in_bytes,
        unit_divisor=1000,
        dynamic_ncols=True,
        leave=False,
    )


class _Line(tqdm):  # type: ignore[misc]  # tqdm has no types
    """tqdm's line. Where stderr is not a terminal: a line when a stage of several units ends, and every 30 seconds."""

    def __init__(self, **settings: Any):
        self._written, self._is_ended = time.monotonic(), False
        super().__init__(**settings)

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Writes the line; returns whether stderr is a terminal."""
        if self.fp.isatty():
            return bool(super().display(msg, pos))
        now = time.monotonic()
        is_last = 1 < self.total == self.n and not self._is_ended
        if msg is None and (is_last or now - self._written >= _LINE_PAUSE):
            self._written, self._is_ended = now, is_last
            self.fp.write(f"{self}\n")
        return False
