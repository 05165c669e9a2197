"""Commands whose stdout is full, or read by nobody, or lacks characters; and Ctrl-C before a command has begun."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

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
def test_a_full_stdout_is_one_sentence_and_images_stay(tmp_path, arguments, unbuffered):
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


@pytest.mark.process
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


@pytest.mark.process
def test_no_command_is_imported_before_ctrl_c_is_understood():
    names = "{name for name in sys.modules if name.startswith('qwen_image_mlx.cli.')}"
    said = subprocess.run([sys.executable, "-c", f"import sys, qwen_image_mlx.cli.main; print(*sorted({names}))"],
                          capture_output=True, text=True, check=True).stdout  # fmt: skip
    names = ("foreign", "hints", "main", "parser", "results", "signals")
    assert said.split() == [f"qwen_image_mlx.cli.{name}" for name in names]


# --- what a terminal cannot show --------------------------------------------------------------------------------------


def record(metadata):
    info = PngInfo()
    info.add_itxt("qwen_image_mlx", json.dumps(metadata, ensure_ascii=False))
    return info


def encoded(folder, encoding, *arguments):
    """(exit code, bytes of stdout, bytes of stderr) of a command whose streams have an encoding."""
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    done = subprocess.run([*COMMAND, *arguments], capture_output=True, cwd=folder, env=environment, check=False)
    assert b"Traceback" not in done.stderr
    return done.returncode, done.stdout, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("encoding", "name", "said"), [
    ("ascii", "狐.png", rb"\u72d0.png"), ("latin-1", "Füchsin 🦊.png", b"F\xfcchsin \\U0001f98a.png"),
    ("ascii:strict", "é.png", rb"\xe9.png"), ("utf-8", os.fsdecode(b"\xff.png"), b"\xff.png"),
])  # fmt: skip
def test_a_name_that_cannot_be_printed_is_escaped(tmp_path, encoding, name, said):
    code, out, err = encoded(tmp_path, encoding, *PAINT, "--output", name)
    assert (code, out.splitlines()) == (0, [said]), err
    assert (tmp_path / name).exists()
    code, out, err = encoded(tmp_path, encoding, *PAINT, "--output", name)  # a warning names it too
    assert code == 0, err


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["info", "a.png", "--json"], ["config", "show", "--json", "--config", "ü.toml"]],
                         ids=lambda value: value[0])  # fmt: skip
@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_json_stays_json(tmp_path, arguments, encoding):
    (tmp_path / "ü.toml").write_text('[default.qwen_image]\nmodel_path = "ü🦊"\n', encoding="utf-8")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", pnginfo=record({"prompt": "ü🦊"}))
    code, out, err = encoded(tmp_path, encoding, *arguments)
    assert code == 0, err
    assert "ü🦊" in str(json.loads(out.decode(encoding)))


@pytest.mark.process
@pytest.mark.parametrize("arguments", [PAINT, ["plan", "none"]], ids=["done", "refused"])
@pytest.mark.parametrize("closed", ["2>&-", "2>/dev/full"])
def test_messages_that_cannot_be_written_undo_nothing(tmp_path, arguments, closed):
    if closed == "2>/dev/full" and not os.path.exists("/dev/full"):
        pytest.skip("needs a device that is always full")
    done = subprocess.run(["sh", "-c", f'"$@" {closed}', "sh", *COMMAND, *arguments], capture_output=True, text=True,
                          cwd=tmp_path, check=False)  # fmt: skip
    expected = (0, "qwen-image.png\n", "") if arguments == PAINT else (2, "", "")
    assert (done.returncode, done.stdout, done.stderr) == expected
