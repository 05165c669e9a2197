"""README's examples are part of the contract: its Python runs, its commands parse, its figures add up."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from math import prod
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qwen_image_mlx import QwenImagePipeline
from qwen_image_mlx.cli.main import build_parser
from qwen_image_mlx.settings import SCHEMA, load_settings
from qwen_image_mlx.weights.mapping import expected_tensors
from qwen_image_mlx.weights.synthetic import FULL, ROWS

pytestmark = pytest.mark.process

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_python_examples_run(tiny, tmp_path, monkeypatch, tmp_path_factory):
    from checkpoints import write_edit, write_layered
    from lora_files import TARGETS, write_lora

    from qwen_image_mlx import variants

    edit = write_edit(tmp_path_factory.mktemp("readme") / "edit", "edit_plus")
    layered = write_layered(tmp_path_factory.mktemp("readme") / "layered")
    changes = {"encoder_area": 96 * 96, "reference_area": 96 * 96, "target_area": 96 * 96, "steps": 2}
    for name, changed in (
        ("QwenImageEditPlusPipeline", changes),
        ("QwenImageLayeredPipeline", {"steps": 2, "resolutions": (64,)}),
    ):
        monkeypatch.setitem(variants.VARIANTS, name, replace(variants.VARIANTS[name], **changed))
    monkeypatch.chdir(tmp_path)
    mask = np.zeros((64, 64), np.uint8)
    mask[10:40, 20:50] = 255
    Image.fromarray(mask).save("hat-mask.png")
    targets = QwenImagePipeline.from_pretrained(tiny).components.lora_targets()
    write_lora(Path("fox-style.safetensors"), targets, targets=TARGETS)
    smaller = {
        '"Qwen/Qwen-Image-2512"': repr(str(tiny)),
        '"Qwen/Qwen-Image-Edit-2511"': repr(str(edit)),
        '"Qwen/Qwen-Image-Layered"': repr(str(layered)),
        "1024": "64",
        "640": "64",
        "num_inference_steps=30": "num_inference_steps=3",
    }
    scope: dict = {}
    examples = blocks("python")
    assert len(examples) == 6
    for example in examples:
        for old, new in smaller.items():
            example = example.replace(old, new)
        exec(compile(example, "README.md", "exec"), scope)
    assert Image.open("fox.png").size == (64, 64)
    assert scope["pixels"].shape == (1, 64, 64, 3)
    assert scope["image"].size == (64, 64)
    assert len({image.tobytes() for image in scope["sweep"]}) == 3
    assert [layer.size for layer in scope["result"].layers] == 4 * [(64, 64)]
    assert Image.open("moved.png").mode == "RGBA"


def test_pictures_are_there():
    places = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", README)
    assert len(places) == 4
    for place in places:
        Image.open(Path(__file__).parents[2] / place).verify()


@pytest.mark.parametrize("line", [
    line for block in blocks("sh") for line in block.splitlines() if line.startswith("qwen-image-mlx")
])  # fmt: skip
def test_commands_parse(line):
    build_parser().parse_args(shlex.split(line)[1:])


def test_settings_are_those_of_the_schema(tmp_path):
    rows = [f"| `{row.key}` | {row.help} | {row.kind.allowed} | {row.usual} |" for row in SCHEMA]
    assert "\n".join(rows) in README
    (example,) = blocks("toml")
    (tmp_path / "config.toml").write_text(example)
    settings = load_settings(tmp_path / "config.toml", "draft")
    assert (settings["memory"], settings["steps"], settings["cfg_scale"]) == ("16GB", 8, 1.0)


def test_figures_of_the_memory_table_are_those_of_the_weights_map():
    def gigabytes(component: str, *parts: str) -> float:
        specs = expected_tensors(ROWS[component], FULL[component]).values()
        return 2 * sum(prod(s.shape) for s in specs if not parts or s.part in parts) / 1e9

    for figure in (
        f"| transformer | {gigabytes('transformer'):.1f} GB | {gigabytes('transformer', 'main'):.1f} GB",
        f"| text encoder, language part | {gigabytes('text_encoder'):.1f} GB",
        f"| autoencoder | {gigabytes('vae'):.2f} GB",
    ):
        assert figure in README
