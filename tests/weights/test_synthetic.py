"""Random checkpoints: real enough for the reference classes, and the same from the same seed."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from qwen_image_mlx import QwenImagePipeline
from qwen_image_mlx.weights.synthetic import TINY, write_checkpoint

pytestmark = pytest.mark.reference

SCRIPT = Path(__file__).parents[2] / "scripts" / "random_checkpoint.py"


def test_the_reference_classes_load_it_whole(tmp_path):
    from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel

    write_checkpoint(tmp_path, TINY)
    for model, name in ((QwenImageTransformer2DModel, "transformer"), (AutoencoderKLQwenImage, "vae")):
        _, report = model.from_pretrained(tmp_path / name, output_loading_info=True)
        assert not report["missing_keys"]
        assert not report["unexpected_keys"]


def test_an_editing_checkpoint_has_the_vision_tower_and_edits(tmp_path):
    from PIL import Image
    from transformers import Qwen2_5_VLForConditionalGeneration

    write_checkpoint(tmp_path, TINY, pipeline="QwenImageEditPlusPipeline")
    _, report = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "text_encoder", output_loading_info=True)
    assert not report["unexpected_keys"]
    assert set(report["missing_keys"]) <= {"lm_head.weight"}
    image = Image.linear_gradient("L").convert("RGB").resize((64, 64))
    pipeline = QwenImagePipeline.from_pretrained(tmp_path)
    options = {"size": (64, 64), "reference_pixels": 64 * 64, "num_inference_steps": 1}
    one, other = (pipeline.edit("generate it red", images=[shown], **options) for shown in (image, image.rotate(90)))
    assert one != other


@pytest.mark.parametrize("shard_bytes", [10**9, 300_000])
def test_it_paints_the_same_image_from_the_same_seed(tmp_path, shard_bytes):
    deeper = {**TINY, "transformer": replace(TINY["transformer"], num_layers=3)}
    images = []
    for n, seed in enumerate((1, 1, 2)):
        folder = write_checkpoint(tmp_path / str(n), deeper, seed=seed, shard_bytes=shard_bytes)
        pipeline = QwenImagePipeline.from_pretrained(folder)
        images += pipeline.generate("a fox", negative_prompt=" ", width=64, height=64, num_inference_steps=2)
    assert images[0] == images[1]
    assert images[0] != images[2]
    assert (tmp_path / "0/transformer/diffusion_pytorch_model.safetensors.index.json").exists() == (shard_bytes < 10**6)


def test_the_script_never_writes_into_a_folder_that_exists(tmp_path):
    done = subprocess.run([sys.executable, SCRIPT, tmp_path / "new"], capture_output=True, text=True, check=True)
    assert (done.stdout.strip(), (tmp_path / "new" / "model_index.json").exists()) == (str(tmp_path / "new"), True)
    again = subprocess.run([sys.executable, SCRIPT, tmp_path / "new"], capture_output=True, text=True, check=False)
    assert again.returncode == 2
