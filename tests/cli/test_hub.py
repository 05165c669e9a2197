"""From an empty cache to an image, and again without the network, against a hub on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from weights.hub_server import HubServer

COMMAND = ["generate", "a fox", "--model", "someone/tiny", "--width", "64", "--height", "48", "--steps", "2"]


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    from checkpoints import write_text_to_image

    return write_text_to_image(tmp_path_factory.mktemp("hub") / "tiny", max_shard_size=300_000)


def run(folder, endpoint, *flags):
    environment = {**os.environ, "HF_HOME": str(folder / "hf"), "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0"}
    return subprocess.run(
        [sys.executable, "-m", "qwen_image_mlx", *COMMAND, "--seed", "1", *flags],
        cwd=folder, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.process
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_loras_are_fetched_from_the_hub(tmp_path, sharded):
    from lora_files import TARGETS, write_lora

    from qwen_image_mlx import QwenImagePipeline

    shapes = QwenImagePipeline.from_pretrained(sharded).components.lora_targets()
    one, two = tmp_path / "one", tmp_path / "two"
    (two / "styles").mkdir(parents=True)
    one.mkdir()
    write_lora(one / "only.safetensors", shapes, targets=TARGETS)
    write_lora(two / "a.safetensors", shapes, targets=TARGETS, seed=1)
    write_lora(two / "styles" / "b.safetensors", shapes, targets=TARGETS)
    with HubServer() as hub:
        hub.add("someone/tiny", sharded)
        hub.add("someone/one", one)
        hub.add("someone/two", two)
        images = {}
        for n, reference in enumerate((
            str(one / "only.safetensors"), "someone/one", "someone/two:styles/b.safetensors",
            "https://huggingface.co/someone/two/blob/main/styles/b.safetensors",
        )):  # fmt: skip
            done = run(tmp_path, hub.url, "--lora", f"{reference}@0.5", "-o", f"{n}.png")
            assert done.returncode == 0, done.stderr
            images[reference] = (tmp_path / f"{n}.png").read_bytes()[-2000:]
        assert len(set(images.values())) == 1
        hub.add("someone/several", two / "styles")
        write_lora(two / "styles" / "c.safetensors", shapes)
        hub.add("someone/several", two / "styles")
        for reference, says in (
            ("someone/several", "b.safetensors"),
            ("someone/none", "someone/none"),
            ("someone/two:gone.safetensors", "gone.safetensors"),
        ):
            assert says in one_error(run(tmp_path, hub.url, "--lora", reference))
    offline = run(tmp_path, "http://127.0.0.1:9", "--lora", "someone/one@0.5", "-o", "offline.png")
    assert offline.returncode == 0, offline.stderr
    assert (tmp_path / "offline.png").read_bytes()[-2000:] == images["someone/one"]


@pytest.mark.process
def test_a_plan_downloads_no_weights(tmp_path, sharded):
    with HubServer() as hub:
        hub.add("someone/tiny", sharded)
        environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0"}
        done = subprocess.run(
            [sys.executable, "-m", "qwen_image_mlx", "plan", "someone/tiny", "--size", "64x64"],
            cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "streamed" in done.stdout
        assert not [path for path in hub.paths() if path.endswith(".safetensors")]


@pytest.mark.process
def test_a_plan_for_a_pack_on_the_hub_is_that_of_the_pack_on_disk(tmp_path):
    from qwen_image_mlx.pipeline.quantize_checkpoint import quantize_checkpoint
    from qwen_image_mlx.weights.schemes import Quantization
    from qwen_image_mlx.weights.synthetic import TINY, write_checkpoint

    source = write_checkpoint(tmp_path / "source", TINY)
    pack = quantize_checkpoint(source, tmp_path / "pack", Quantization.parse("4/32"))
    with HubServer() as hub:
        hub.add("someone/pack", pack)
        environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0"}
        plans = [
            json.loads(
                subprocess.run(
                    [sys.executable, "-m", "qwen_image_mlx", "plan", str(model), "--size", "64x64", "--json"],
                    cwd=tmp_path, env=environment, capture_output=True, text=True, check=True,
                ).stdout
            )["plans"]
            for model in ("someone/pack", pack)
        ]  # fmt: skip
        assert not [path for path in hub.paths() if path.endswith(".safetensors")]
    for ours, theirs in zip(*plans, strict=True):
        for stage in ours["stages"]:
            assert ours["stages"][stage]["resident"] == theirs["stages"][stage]["resident"], (ours["residency"], stage)
