"""What importing loads: features are imported where they are used, so that a stranger reads, and Python loads, less."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.process

# What nobody needs who generates an image from a prompt, by the beginning of its name.
FEATURES = (
    "lora", "layers", "training", "server", "doctor", "weights.gguf", "weights.gguf_blocks", "weights.streaming",
    "weights.hub", "pipeline.caption", "pipeline.decomposition", "pipeline.quantize_checkpoint", "runtime.batch",
    "runtime.cache", "runtime.preview",
)  # fmt: skip
LISTS = """
import json, sys
{0}
print("loaded:" + json.dumps(sorted(m.partition(".")[2] for m in sys.modules if m.partition(".")[0] == "qwen_image_mlx")))
"""  # noqa: E501
RUN = """
from qwen_image_mlx.cli.main import main
assert main(["generate", "a red circle", "--model", "demo", "--steps", "1", "--seed", "1", "--quiet"]) == 0
"""


def loaded(tmp_path, script: str) -> list[str]:
    """The package's modules that a script loads, without the package's name."""
    done = subprocess.run(
        [sys.executable, "-c", LISTS.format(script)], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("loaded:")]
    return json.loads(line.removeprefix("loaded:"))


def features(modules: list[str]) -> list[str]:
    return [m for m in modules if any(m == feature or m.startswith(f"{feature}.") for feature in FEATURES)]


@pytest.mark.parametrize(("script", "most"), [
    ("import qwen_image_mlx", 2),
    ("import qwen_image_mlx.cli.generate", 42),
    ("import qwen_image_mlx.pipeline.pipeline", 75),
    (RUN, 126),
], ids=["package", "cli", "pipeline", "a run"])  # fmt: skip
def test_no_more_is_loaded_than_is_used(tmp_path, script, most):
    modules = loaded(tmp_path, script)
    assert features(modules) == []
    assert len(modules) <= most, modules


def test_a_feature_that_is_loaded_is_seen(tmp_path):
    modules = loaded(tmp_path, "import qwen_image_mlx.pipeline.pipeline, qwen_image_mlx.lora.fetch")
    assert {"lora", "lora.fetch"} <= {*features(modules)}
