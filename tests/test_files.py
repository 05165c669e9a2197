"""Names of what is being written: leftovers of ended processes go, and nothing else; kills leave nothing half-done."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from contextlib import nullcontext
from itertools import count
from pathlib import Path

import pytest
from PIL import Image

from qwen_image_mlx import files
from qwen_image_mlx.cli.preview import preview_file
from qwen_image_mlx.files import atomic_file, atomic_folder, claim, new_file, replace_file, umask

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import kills

pytestmark = pytest.mark.process

WRITES = """
import sys
from pathlib import Path
from qwen_image_mlx.files import hidden
for name in ("fox.png", "a.safetensors"):
    hidden(Path(name)).write_bytes(b"half")
hidden(Path("layers")).mkdir()
if sys.argv[1] == "preview":
    from PIL import Image
    from qwen_image_mlx.cli.preview import preview_file
    context = preview_file(Path("fox.png"))
    context.__enter__()(Image.new("RGB", (8, 8)), 1, 2)
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def writer(tmp_path):
    """Starts a process that has begun to write in `tmp_path`, and waits."""

    def start(what=""):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITES, what], cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        assert process.stdout.readline() == "ready\n"
        return process

    started = []
    yield start
    for process in started:
        process.kill()
        process.communicate()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_what_a_dead_process_left_goes_and_what_a_living_one_writes_stays(tmp_path, writer):
    dead = writer()
    dead.kill()
    dead.communicate()
    assert len(names(tmp_path)) == 3
    writer()
    living = names(tmp_path)
    files.sweep(tmp_path)
    assert len(living) == 3
    assert names(tmp_path) == living
    assert {Path(name).suffix for name in living} == {".png", ".safetensors", ".qwen-image-mlx"}


def test_a_preview_goes_with_its_process(tmp_path, writer):
    process = writer("preview")
    files.sweep(tmp_path)
    assert "fox-preview.png" in names(tmp_path)
    process.kill()
    process.communicate()
    Image.new("RGB", (8, 8)).save(tmp_path / "hare-preview.png")  # somebody's own
    files.sweep(tmp_path)
    assert names(tmp_path) == ["hare-preview.png"]


@pytest.mark.parametrize(
    "name",
    [
        ".fox.png.partial",
        ".fox.png.00000000-1-00000000-0.qwen-image-mlx.png",  # another machine's
        pytest.param(f".fox.png.{files.owner()}-0.qwen-image-mlx.png", id="this process's"),
        "fox.qwen-image-mlx.png",
    ],
)
def test_files_of_others_stay(tmp_path, name):
    (tmp_path / name).write_text("mine")
    files.sweep(tmp_path)
    assert names(tmp_path) == [name]


def test_a_later_process_of_the_same_number_is_another_one(tmp_path):
    host, pid, _ = files.owner().split("-")
    (tmp_path / f".fox.png.{host}-{pid}-00000000-0.qwen-image-mlx.png").write_text("")
    files.sweep(tmp_path)
    assert names(tmp_path) == []


@pytest.mark.parametrize("links", [True, False])
def test_a_new_file_takes_the_first_free_name(tmp_path, monkeypatch, links):
    if not links:

        def refuse(*_):
            raise OSError(errno.EOPNOTSUPP, "no links")

        monkeypatch.setattr(os, "link", refuse)
    written = [new_file(tmp_path / "fox.png", data) for data in (b"1", b"2", b"3")]
    assert [path.name for path in written] == ["fox.png", "fox-1.png", "fox-2.png"]
    assert [path.read_bytes() for path in written] == [b"1", b"2", b"3"]
    replace_file(written[0], b"4")
    assert names(tmp_path) == ["fox-1.png", "fox-2.png", "fox.png"]


def test_names_as_long_as_can_be(tmp_path):
    name = "狐" * 65 + ".png"
    assert new_file(tmp_path / name, b"1").name == name


def test_a_name_is_never_there_without_its_contents(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "open", None)  # the name is not claimed by an empty file
    assert new_file(tmp_path / "fox.png", b"1").read_bytes() == b"1"


def test_a_preview_is_gone_when_painting_ends(tmp_path):
    with preview_file(tmp_path / "fox.png") as show:
        show(Image.new("RGB", (8, 8)), 1, 2)
        show(Image.new("RGB", (8, 8), "red"), 2, 2)
        assert Image.open(tmp_path / "fox-preview.png").getpixel((0, 0)) == (255, 0, 0)
    assert names(tmp_path) == []


def interrupt(monkeypatch, name, call=1):
    """Ctrl-C when a function of `os` has done its work for the `call`th time, before it returns."""
    does, calls = getattr(os, name), count(1)

    def interrupted(*given):
        does(*given)
        if next(calls) == call:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, name, interrupted)


@pytest.mark.parametrize(("name", "call"), [("link", 1), ("replace", 1), ("replace", 2)])
def test_an_interrupted_preview_is_gone(tmp_path, monkeypatch, name, call):
    def generate():
        with preview_file(tmp_path / "fox.png") as show:
            for step in (1, 2, 3):
                show(Image.new("RGB", (8, 8)), step, 3)

    interrupt(monkeypatch, name, call)
    with pytest.raises(KeyboardInterrupt):
        generate()
    assert names(tmp_path) == []


@pytest.mark.parametrize("name", ["open", "close"])
def test_a_name_that_was_taken_before_ctrl_c_is_free_again(tmp_path, monkeypatch, name):
    def refuse(*_):
        raise OSError(errno.EOPNOTSUPP, "no links")

    monkeypatch.setattr(os, "link", refuse)
    partial = tmp_path / "partial"
    partial.write_text("new")
    interrupt(monkeypatch, name)
    with pytest.raises(KeyboardInterrupt):
        files.publish(partial, tmp_path / "fox.png")
    assert names(tmp_path) == ["partial"]


def test_commands_that_are_killed_leave_nothing_half_written():
    assert kills.kills(2, seed=3, only=["generate", "compose"]) == []


def test_the_kills_see_what_is_not_whole(tmp_path):
    (tmp_path / "empty.png").touch()
    (tmp_path / "half.safetensors").write_bytes(b"\x10\0\0\0")
    (tmp_path / "half.json").write_text("{")
    assert len(list(kills.broken(tmp_path))) == 3


def test_a_file_takes_its_place_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(TypeError), atomic_file(path) as partial:
        partial.write_text("half") + path.read_text()
    assert (path.read_text(), os.listdir(tmp_path)) == ("old", ["a.txt"])
    with atomic_file(path) as partial:
        partial.write_text("new")
    assert (path.read_text(), os.listdir(tmp_path)) == ("new", ["a.txt"])


@pytest.mark.parametrize("replacing", [False, True])
def test_a_folder_takes_its_place_whole_or_not_at_all(tmp_path, replacing):
    folder = tmp_path / "new" / "a"
    with atomic_folder(folder) as partial:
        assert partial.stat().st_mode & 0o777 == 0o700
        (partial / "x").write_text("old")
    assert folder.stat().st_mode & 0o777 == 0o777 & ~umask()
    with pytest.raises(ZeroDivisionError), atomic_folder(folder, replacing=replacing) as partial:
        raise ZeroDivisionError
    assert ((folder / "x").read_text(), os.listdir(folder.parent)) == ("old", ["a"])
    refused = nullcontext() if replacing else pytest.raises(OSError, match="not empty")
    with refused, atomic_folder(folder, replacing=replacing) as partial:
        (partial / "y").write_text("new")
    assert (os.listdir(folder), os.listdir(folder.parent)) == (["y"] if replacing else ["x"], ["a"])


def test_what_a_folder_could_not_replace_comes_back(tmp_path, monkeypatch):
    folder, replace, moved = tmp_path / "a", os.replace, []
    folder.mkdir()
    (folder / "x").write_text("old")

    def fails_second(source, target):
        moved.append(source)
        if len(moved) == 2:
            raise OSError("disk")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fails_second)
    with pytest.raises(OSError, match="disk"), atomic_folder(folder, replacing=True):
        pass
    assert ((folder / "x").read_text(), os.listdir(tmp_path)) == ("old", ["a"])


@pytest.mark.parametrize(("call", "left"), [(1, "old"), (2, "new")])
def test_ctrl_c_loses_no_folder(tmp_path, monkeypatch, call, left):
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "x").write_text("old")
    interrupt(monkeypatch, "replace", call)
    with pytest.raises(KeyboardInterrupt), atomic_folder(folder, replacing=True) as partial:
        (partial / "x").write_text("new")
    assert ((folder / "x").read_text(), os.listdir(tmp_path)) == (left, ["a"])


def test_a_folder_is_claimed_by_one(tmp_path):
    with claim(tmp_path), pytest.raises(BlockingIOError), claim(tmp_path):
        pytest.fail("claimed twice")
    with claim(tmp_path):
        pass
