"""An option has one home: a row that is added there, and nowhere else, is found by everyone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.process

ROOT = Path(__file__).parents[2]
ROW = """    sparkle: float = option(
        0.0, kind=Number(0, 10), help="how much it sparkles", usual="0", group="sampling", commands=IMAGE_COMMANDS,
        flags=("--sparkle",), tasks=TASKS, line=True, record="set", config=(Config(commands=TASKS, example=2.0),),
    )  # fmt: skip

"""
ASKS = """
import contextlib, io, json, sys
from pathlib import Path
from qwen_image_mlx.cli.main import build_parser, main
from qwen_image_mlx.images.files import read_metadata
from qwen_image_mlx.settings import example_config

PROMPT = ["a red circle", "--model", "demo", "--steps", "1", "--seed", "1"]
found = {}

def run(*words):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(list(words))
        except SystemExit as left:
            code = left.code
    return code, out.getvalue(), err.getvalue()

def generated(*words):
    code, out, err = run(*words)
    assert code == 0, err
    return read_metadata(out.split()[0]).get("sparkle")

found["help"] = ["--sparkle" in run(command, "--help")[1] for command in ("generate", "edit", "decompose", "compose")]
found["parsed"] = build_parser().parse_args(["generate", "x", "--sparkle", "3"]).sparkle
found["refused"] = run("generate", *PROMPT, "--sparkle", "11")[2]
found["unsaid"] = generated("generate", *PROMPT, "-o", "plain.png")
found["flag"] = generated("generate", *PROMPT, "--sparkle", "3", "-o", "flag.png")
found["replayed"] = generated("generate", "--from-image", "flag.png", "-o", "again.png")
found["flag beats record"] = generated("generate", "--from-image", "flag.png", "--sparkle", "4", "-o", "won.png")
Path("my.toml").write_text("[default.qwen_image]\\nsparkle = 2\\n")
found["config"] = generated("generate", *PROMPT, "--config", "my.toml", "-o", "config.png")
found["record beats config"] = generated("generate", "--from-image", "flag.png", "--config", "my.toml", "-o", "w.png")
Path("bad.toml").write_text("[default.qwen_image]\\nsparkle = 12\\n")
found["config refused"] = run("generate", *PROMPT, "--config", "bad.toml")[2]
found["example"] = "#sparkle = 2.0" in example_config()
Path("p.jsonl").write_text('{"prompt": "a red circle", "sparkle": 5}\\n')
found["line"] = generated("generate", "--prompts-file", "p.jsonl", "--model", "demo", "--steps", "1", "-o", "many")
Path("q.jsonl").write_text('{"prompt": "a", "sparkle": 50}\\n')
found["line refused"] = run("generate", "--prompts-file", "q.jsonl", "--model", "demo")[2]
apart = ["--model", "demo-layered", "--prompt", "x", "--steps", "1", "-o", "layers"]
run("decompose", "flag.png", *apart, "--sparkle", "6")
found["layers"] = json.loads(Path("layers/manifest.json").read_text())["sparkle"]

if "server" in sys.argv:
    from qwen_image_mlx.server.models import Models
    from qwen_image_mlx.server.openai import Generation
    from qwen_image_mlx.server.schema import BODIES, form_of
    from qwen_image_mlx.server.tasks import Limits, Tasks

    class Feed:
        followed, images = False, 1
        def __call__(self, told): pass

    offers = {"generate": {"model": "demo", "quantize": None, "loras": []}}
    def job(defaults, **fields):
        tasks = Tasks(Models(offers, None, None), {"generate": defaults}, Limits())
        body = BODIES["generate"](prompt="a red circle", steps=1, **fields)
        return tasks.work("generate", body)(Feed())["images"][0]["metadata"].get("sparkle")

    found["body"] = [job({}, sparkle=7), job({"sparkle": 8}), job({})]
    found["schema"] = [BODIES[task].model_json_schema()["properties"]["sparkle"]["anyOf"][0]
                       for task in ("generate", "edit", "decompose")]
    found["openai"] = "sparkle" in Generation.model_fields
    found["page"] = form_of("edit")["sparkle"]
print("found:" + json.dumps(found))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    """What a copy of the package with one more row says of it everywhere."""
    home, here = tmp_path_factory.mktemp("package"), tmp_path_factory.mktemp("work")
    skipped = shutil.ignore_patterns("__pycache__", "demo")
    package = Path(shutil.copytree(ROOT / "qwen_image_mlx", home / "qwen_image_mlx", ignore=skipped))
    (package / "demo").symlink_to(ROOT / "qwen_image_mlx" / "demo")
    (home / "weights_map").symlink_to(ROOT / "weights_map")
    file = package / "pipeline" / "parameters.py"
    before = file.read_text()
    place = "    def __post_init__"
    assert before.count(place) == 1
    file.write_text(before.replace(place, ROW + place))
    environment = os.environ | {"PYTHONPATH": str(home), "XDG_CONFIG_HOME": str(here)}
    try:
        import fastapi  # noqa: F401

        extra = ["server"]
    except ImportError:
        extra = []
    done = subprocess.run(
        [sys.executable, "-c", ASKS, *extra], cwd=here, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("found:")]
    return json.loads(line.removeprefix("found:"))


def test_the_command_line_knows_it(found):
    assert found["help"] == [True] * 4
    assert found["parsed"] == 3.0
    assert "sparkle is 11.0, but must be a number from 0 to 10" in found["refused"]


def test_it_is_recorded_and_replayed(found):
    assert (found["unsaid"], found["flag"], found["replayed"]) == (None, 3.0, 3.0)
    assert found["layers"] == 6.0


def test_flags_win_over_the_record_and_that_over_the_config(found):
    assert (found["flag beats record"], found["record beats config"]) == (4.0, 3.0)


def test_the_config_knows_it(found):
    assert (found["config"], found["example"]) == (2.0, True)
    assert "line 2: sparkle is 12, but must be a number from 0 to 10" in found["config refused"]


def test_a_line_of_a_file_of_prompts_knows_it(found):
    assert found["line"] == 5.0
    assert "line 1: sparkle is 50" in found["line refused"]


def test_the_server_knows_it(found):
    pytest.importorskip("fastapi")
    assert found["body"] == [7.0, 8.0, None]
    assert found["schema"] == [{"maximum": 10, "minimum": 0, "type": "number"}] * 3
    assert found["openai"]
    assert found["page"] == {"type": "number", "min": 0, "max": 10, "help": "how much it sparkles"}
