"""Commands whose stdout is full, or read by nobody; and Ctrl-C before a command has begun."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from qwen_image_mlx.cli import main as entry

COMMAND = [sys.executable, "-m", "qwen_image_mlx"]
PAINT = ["generate", "a fox", "--model", "demo", "--steps", "1"]


def ended(folder, *arguments, stdout, unbuffered=False):
    """(exit code, stderr) of a command in a process of its own."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1" if unbuffered else ""}
    done = subprocess.run([*COMMAND, *arguments], stdout=stdout, stderr=subprocess.PIPE, text=True, cwd=folder,
                          env=environment, check=False)  # fmt: skip
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    return done.returncode, done.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
@pytest.mark.parametrize(("arguments", "unbuffered"), [(["config", "show"], False), (["plan", "demo", "--json"], True),
                                                       (PAINT, False)], ids=lambda value: str(value)[:12])  # fmt: skip
def test_a_full_stdout_is_one_sentence_and_pictures_stay(tmp_path, arguments, unbuffered):
    with open("/dev/full", "w") as full:
        code, err = ended(tmp_path, *arguments, stdout=full, unbuffered=unbuffered)
    assert code == 2
    assert err.splitlines()[-1] == "error: cannot write to stdout: no space left on device"
    assert (tmp_path / "qwen-image.png").exists() == (arguments == PAINT)


@pytest.mark.parametrize("arguments", [["config", "show"], ["--help"]], ids=" ".join)
def test_nobody_reading_is_no_fault(tmp_path, arguments):
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as unread:
        assert ended(tmp_path, *arguments, stdout=unread) == (141, "")


def test_a_closed_stdout_is_no_fault(tmp_path):
    closed = subprocess.run(["sh", "-c", '"$@" >&-', "sh", *COMMAND, "config", "show"], capture_output=True, text=True,
                            cwd=tmp_path, check=False)  # fmt: skip
    assert (closed.returncode, closed.stderr) == (0, "")


def test_ctrl_c_while_commands_are_imported(monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(entry, "import_module", interrupted)
    assert entry.main(["plan"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_no_command_is_imported_before_ctrl_c_is_understood():
    names = "{name for name in sys.modules if name.startswith('qwen_image_mlx.cli.')}"
    said = subprocess.run([sys.executable, "-c", f"import sys, qwen_image_mlx.cli.main; print(*sorted({names}))"],
                          capture_output=True, text=True, check=True).stdout  # fmt: skip
    assert said.split() == [f"qwen_image_mlx.cli.{name}" for name in ("cures", "ending", "main", "results")]
