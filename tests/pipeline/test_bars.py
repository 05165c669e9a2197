"""The line that shows progress: one that changes on a terminal, few whole lines in a file."""

from __future__ import annotations

import io
import sys

import pytest

from qwen_image_mlx.pipeline.bars import ProgressBars
from qwen_image_mlx.pipeline.progress import Progress

STORY = [
    Progress("load", 0, 1, "text_encoder"),
    Progress("load", 1, 1, "text_encoder"),
    *(Progress("denoise", step, 4) for step in range(5)),
    Progress("decode", 0, 1),
    Progress("decode", 1, 1),
]


def told(story: list[Progress]) -> None:
    with ProgressBars() as bars:
        for progress in story:
            bars(progress)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_one_line_that_changes_and_is_gone_at_the_end(monkeypatch):
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    told(STORY)
    written = terminal.getvalue()
    assert "\n" not in written
    for words in ("loading text_encoder …", "denoising 0/4", "denoising 4/4, 00:00 left", "decoding …"):
        assert words in written
    assert written.split("\r")[-2].strip() == ""
    assert written.endswith("\r")


def test_a_file_gets_a_line_for_each_stage_of_several_units(capsys):
    told(STORY)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("denoising 4/4, 00:00 left (")


def test_a_file_gets_a_line_every_thirty_seconds(capsys, monkeypatch):
    now = iter(range(0, 10_000, 20))
    monkeypatch.setattr("qwen_image_mlx.pipeline.bars.time.monotonic", lambda: float(next(now)))
    with ProgressBars() as bars:
        for step in range(5):
            bars(Progress("denoise", step, 9))
            bars._line.refresh()
    lines = capsys.readouterr().err.splitlines()
    assert 1 <= len(lines) <= 4
    assert all(line.startswith("denoising ") for line in lines)


@pytest.mark.parametrize("stage", ["denoise", "download"])
def test_layers_are_shown_behind_a_long_step(stage, capsys, monkeypatch):
    bars = ProgressBars()
    bars(Progress(stage, 0, 2))
    bars._looked -= 2
    bars(Progress("layer", 7, 60, "transformer"))
    assert str(bars._line).endswith("layer 7 of 60")
    bars.close()
