"""From an empty cache to a picture, and again without the network, against a hub on this machine."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from weights.hub_server import HubServer

COMMAND = ["generate", "a fox", "--model", "someone/tiny", "--width", "64", "--height", "48", "--steps", "2"]


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    from reference import write_text_to_image

    return write_text_to_image(tmp_path_factory.mktemp("hub") / "tiny", max_shard_size="300KB")


def run(folder, endpoint, *flags):
    environment = {**os.environ, "HF_HOME": str(folder / "hf"), "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0"}
    return subprocess.run(
        [sys.executable, "-m", "qwen_image_mlx", *COMMAND, "--seed", "1", *flags],
        cwd=folder, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_only_what_painting_needs_is_fetched_and_then_never_again(tmp_path, sharded):
    (sharded / "README.md").write_text("a model card")
    with HubServer() as hub:
        commit = hub.add("someone/tiny", sharded)
        first = run(tmp_path, hub.url)
        assert first.returncode == 0, first.stderr
        assert "downloading transformer of someone/tiny" in first.stderr
    cache = tmp_path / "hf" / "hub" / "models--someone--tiny" / "snapshots" / commit
    fetched = {str(path.relative_to(cache)) for path in cache.rglob("*") if path.is_file()}
    left = {str(path.relative_to(sharded)) for path in sharded.rglob("*") if path.is_file()} - fetched
    # Shards that hold only the vision tower or lm_head are no use to text to image.
    shards = {path for path in left if path.endswith(".safetensors")}
    assert shards
    assert all(path.startswith("text_encoder/model-") for path in shards)
    assert left - shards <= {
        *("README.md", "text_encoder/generation_config.json", "tokenizer/special_tokens_map.json"),
    }

    gone = "http://127.0.0.1:9"
    second = run(tmp_path, gone, "-o", "again.png")
    assert second.returncode == 0, second.stderr
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "qwen-image.png").read_bytes()
    info = subprocess.run(
        [sys.executable, "-m", "qwen_image_mlx", "info", "again.png"],
        cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert commit in info.stdout


def test_an_unknown_model_or_revision(tmp_path, sharded):
    with HubServer() as hub:
        assert "someone/tiny" in one_error(run(tmp_path, hub.url))
        hub.add("someone/tiny", sharded)
        assert "v9" in one_error(run(tmp_path, hub.url, "--revision", "v9"))


def one_error(done) -> str:
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in done.stderr
    return line
