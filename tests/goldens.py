"""The reference's numbers for tiny inputs, kept as files, so that the fast tests check numbers without torch.

`test_goldens.py` computes the same with this package. `test_goldens_reference.py` computes them anew with the
reference and compares, so that the files cannot rot; after a change of the inputs it writes them:

python -m pytest -n 0 -m reference tests/test_goldens_reference.py --write-goldens
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from checkpoints import REAL_CONFIGS, write_edit, write_layered, write_text_to_image
from PIL import Image

FOLDER = Path(__file__).parent / "goldens"

PROMPT = "make the fox blue, 让它变蓝 🦊"
NEGATIVE = "blurry"
AREA = 96 * 96
"""Of the images that edits and layers start from, in place of the real ones: nothing else depends on it."""

SEEDS = (0, 7, 2**32 + 7)
NOISE_SHAPES = ((16,), (40,), (2, 16, 6, 4))
SCHEDULES = {
    f"{name} {steps} {tokens}": (REAL_CONFIGS[name], steps, tokens)
    for name in ("scheduler", "scheduler-layered")
    for steps, tokens in ((4, 1024), (20, 4096), (50, 6889))
}
TEXTS = (
    PROMPT,
    "A red fox, jumping over 123 dogs! It's what I'LL say; you don't.",
    "def f(x):\n    return x**2  # it's\n\n\n",
    "  lead\t\ttabs \r\n trailing   ",
    "e\u0301 \ufb01 \uff21 na\u00efve \x00\x7f\u200b",
    "Привет العربية हिन्दी ไทย 日本語 한국어 👩‍👩‍👧‍👦 🇩🇪🇨🇳",
    "a tag <|im_end|> inside <|vision_start|>",
)
TRAINED = ("img_in.weight", "transformer_blocks.1.attn.to_q.weight", "transformer_blocks.0.img_mlp.net.2.bias",
           "transformer_blocks.0.txt_mod.1.bias", "proj_out.weight")  # fmt: skip
"""Tensors whose gradients are kept."""


def image(width: int, height: int, seed: int = 0, mode: str = "RGB") -> Image.Image:
    """Smooth random colours, so that resampling matters and does not drown in noise; RGBA has holes."""
    rng = np.random.RandomState(seed)
    values = rng.randint(0, 256, (5, 7, 4)).astype(np.uint8)
    values[..., 3] = rng.choice([0, 128, 255], (5, 7))
    return Image.fromarray(values, "RGBA").convert(mode).resize((width, height), Image.Resampling.BICUBIC)


def mask(width: int, height: int) -> Image.Image:
    """A white disc on black."""
    y, x = np.mgrid[:height, :width]
    inside = ((x - width / 2) / width) ** 2 + ((y - height / 2) / height) ** 2 < 0.09
    return Image.fromarray((inside * 255).astype(np.uint8))


CHECKPOINTS = {
    "text to image": write_text_to_image,
    "edit": lambda folder: write_edit(folder, "edit"),
    "edit plus": lambda folder: write_edit(folder, "edit_plus"),
    "edit 2511": lambda folder: write_edit(folder, "edit_plus", transformer={"zero_cond_t": True}),
    "layered": write_layered,
}
GENERATIONS = {
    "generate": ("text to image", {"size": (96, 64), "cfg_scale": 4.0, "seed": 42}),
    "generate_unguided": ("text to image", {"size": (48, 80), "cfg_scale": 1.0, "seed": 2**32 + 7}),
    "image_to_image": (
        "text to image",
        {"size": (96, 64), "cfg_scale": 4.0, "seed": 4, "initial": image(150, 100), "strength": 0.6},
    ),
    "inpaint": (
        "text to image",
        {"size": (96, 64), "cfg_scale": 3.0, "seed": 4, "initial": image(150, 100), "mask": mask(150, 100),
         "strength": 0.8},
    ),
    "edit": ("edit", {"size": (96, 96), "cfg_scale": 4.0, "seed": 5, "images": [image(140, 105)]}),
    "edit_plus": (
        "edit plus",
        {"size": (96, 64), "cfg_scale": 4.0, "seed": 9,
         "images": [image(90, 90), image(200, 120, 1), image(75, 300, 2)]},
    ),
    "edit_2511": ("edit 2511", {"size": (64, 64), "cfg_scale": 4.0, "seed": 9, "images": [image(300, 200)]}),
    "decompose": (
        "layered",
        {"size": (96, 96), "cfg_scale": 4.0, "seed": 7, "images": [image(140, 105, mode="RGBA")], "layers": 2},
    ),
}  # fmt: skip
"""A checkpoint and a request by golden file; three steps each."""
STEPS = 3


def stored(name: str) -> dict[str, np.ndarray]:
    """One golden file's arrays."""
    with np.load(FOLDER / f"{name}.npz") as file:
        return {key: file[key] for key in file.files if key != "made with"}


def write(name: str, arrays: Mapping[str, np.ndarray], made_with: str) -> None:
    """Write a golden file."""
    FOLDER.mkdir(exist_ok=True)
    np.savez_compressed(FOLDER / f"{name}.npz", **arrays, **{"made with": np.array(made_with)})


def assert_agree(name: str, arrays: Mapping[str, np.ndarray], tolerance: float) -> None:
    """Fails unless arrays are those of a golden file.

    `tolerance`: largest difference of floating-point numbers, in units of an array's largest value. Pixels may differ
    by one; other integers by nothing.
    """
    expected = stored(name)
    assert arrays.keys() == expected.keys()
    for key, golden in expected.items():
        array = np.asarray(arrays[key])
        assert (array.shape, array.dtype) == (golden.shape, golden.dtype), key
        difference = np.abs(array.astype(np.float64) - golden.astype(np.float64)).max()
        if golden.dtype == np.uint8:
            assert difference <= 1, (key, difference)
        elif golden.dtype.kind == "f":
            assert difference <= tolerance * np.abs(golden).max(), (key, difference)
        else:
            np.testing.assert_array_equal(array, golden)


GRID = (4, 6)
LEVELS = (200, 731)
"""The size in tokens and the noise levels, of 1000, of two samples to train on."""


def training_batch() -> dict[str, np.ndarray]:
    """Two random samples of text to image: `latents` and `noise` (2, 24, 64) and `text` (2, 7, 64), fp32."""
    rng = np.random.RandomState(0)
    shape = (2, GRID[0] * GRID[1], 64)
    drawn = {"latents": rng.standard_normal(shape), "noise": rng.standard_normal(shape)}
    drawn["text"] = 3 * rng.standard_normal((2, 7, 64))
    return {name: values.astype(np.float32) for name, values in drawn.items()}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file's object."""
    return json.loads(path.read_text(encoding="utf-8"))
