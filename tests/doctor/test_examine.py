"""Groups as processes: what dies or hangs loses one group; what it wrote is gone."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import pytest

from qwen_image_mlx.doctor import examine
from qwen_image_mlx.doctor.groups import GOLDEN, GROUPS, Group, group_named
from qwen_image_mlx.doctor.outcome import CRASH, HANG
from qwen_image_mlx.errors import CheckpointError

pytestmark = pytest.mark.process


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """Where groups have their folders."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_a_killed_group_is_lost_and_others_go_on(temporary):
    said = []
    report = examine.examine(
        [group_named("limits"), group_named("env")], {CRASH: "limits"}, {}, lambda name, outcome: said.append(name)
    )
    assert said == ["limits", "env"]
    assert report["groups"]["limits"]["verdict"] == "lost"
    assert "ended by SIGKILL" in report["groups"]["limits"]["sentence"]
    assert report["groups"]["env"]["figures"]["mlx"]["version"]
    assert (report["exit"], report["verdict"]) == (1, "slow or odd")
    assert list(temporary.iterdir()) == []


def test_a_group_that_hangs_is_ended(temporary):
    start = time.monotonic()
    outcome = examine.run_group(Group("env", 1, ""), {HANG: "env"}, {})
    assert time.monotonic() - start < 15
    assert outcome["verdict"] == "lost"
    assert "did not end within 1 seconds" in outcome["sentence"]
    assert list(temporary.iterdir()) == []


def test_an_unforeseen_error_is_told(temporary):
    outcome = examine.run_group(GOLDEN, {}, {})
    assert outcome["verdict"] == "lost"
    assert "ended with 1 (KeyError: 'golden')" in outcome["sentence"]


def test_what_a_group_refuses_is_an_error(temporary):
    with pytest.raises(CheckpointError, match=r"the golden file .* cannot be read, it is not there"):
        examine.examine([GOLDEN], {}, {"golden": str(temporary / "none"), "model": "demo"}, lambda *_: None)


def test_every_group_is_a_module():
    for group in (*GROUPS, GOLDEN):
        assert (Path(examine.__file__).parent / f"{group.module or group.name}.py").is_file()
        assert group.limit is None or 60 <= group.limit <= 240


def test_the_disk_is_the_one_of_the_hub_s_cache(tmp_path, monkeypatch):
    (tmp_path / "hub").mkdir()
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    assert examine._place(group_named("disk")) == tmp_path / "hub"
    assert examine._place(group_named("env")) is None
    monkeypatch.setenv("HF_HOME", str(tmp_path / "missing"))
    assert examine._place(group_named("disk")) is None
