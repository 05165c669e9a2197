"""int8 files as ComfyUI writes them, rotated and not: their numbers, and how near they are to their originals."""

from __future__ import annotations

import json
import re

import mlx.core as mx
import numpy as np
import pytest
from commands import error_line

from qwen_image_mlx import CheckpointError, QwenImagePipeline
from qwen_image_mlx.cli.main import main
from qwen_image_mlx.pipeline.identify import identify
from qwen_image_mlx.registry import TRANSFORMER
from qwen_image_mlx.weights import int8
from qwen_image_mlx.weights.recognize import unreadable
from qwen_image_mlx.weights.safetensors_files import save_tensors
from qwen_image_mlx.weights.snapshot import weight_file
from qwen_image_mlx.weights.synthetic import TINY, write_checkpoint

GROUP = 16


def rotation(group: int) -> np.ndarray:
    """The orthonormal matrix, by its definition: products of a 4x4 one."""
    quarter = np.array([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]]) / 2
    matrix = np.ones((1, 1))
    while len(matrix) < group:
        matrix = np.kron(matrix, quarter)
    return matrix


def quantized(weight: np.ndarray, group: int, by_row: bool = True) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(integers, scale, what they stand for in float64) of a matrix."""
    turned = weight.astype(np.float64)
    if group:
        turned = (turned.reshape(-1, group) @ rotation(group)).reshape(weight.shape)
    scale = (np.abs(turned).max(axis=1, keepdims=True) if by_row else np.abs(turned).max()) / 127
    scale = np.asarray(scale, np.float32)
    integers = np.clip(np.round(turned / scale), -127, 127).astype(np.int8)
    stands = integers * scale.astype(np.float64)
    if group:
        stands = (stands.reshape(-1, group) @ rotation(group)).reshape(weight.shape)
    return integers, scale, stands


def said(**fields) -> mx.array:
    return mx.array(np.frombuffer(json.dumps(fields).encode(), np.uint8))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("int8") / "tiny", TINY, dtype=mx.float32)


def written(tiny, path, group, by_row=True, note=None, **changed):
    """A transformer's file with its blocks' matrices in int8; returns what they stand for, by name."""
    stored, stands = mx.load(str(tiny / "transformer/diffusion_pytorch_model.safetensors")), {}
    for name, value in [*stored.items()]:
        if re.match(r"transformer_blocks\..*(attn|mlp).*weight$", name) and value.ndim == 2:
            integers, scale, stands[name] = quantized(np.array(value), group, by_row)
            base = name.removesuffix("weight")
            stored[name], stored[f"{base}weight_scale"] = mx.array(integers), mx.array(scale)
            fields = {"format": "int8_tensorwise"} | ({"convrot": True, "convrot_groupsize": group} if group else {})
            stored[f"{base}comfy_quant"] = said(**fields if note is None else note)
    for name, value in changed.items():
        stored = {key: value if key.endswith(name) else old for key, old in stored.items()}
    save_tensors(path, {key: value for key, value in stored.items() if value is not None}, {"format": "pt"})
    return stands


@pytest.mark.parametrize("group", [4, 16, 64, 256])
def test_the_rotation_is_exact(group):
    """Symmetric, its own inverse, and its sums of integers are those of float64, bit for bit."""
    matrix = rotation(group)
    assert np.array_equal(matrix, matrix.T)
    assert np.array_equal(matrix @ matrix, np.eye(group))
    assert np.array_equal(np.array(int8.signs(group)), matrix * np.sqrt(group))
    integers = np.random.default_rng(0).integers(-127, 128, (8, 2 * group)).astype(np.int8)
    integers[0] = 127
    undone = np.array(int8.dense(mx.array(integers), mx.array(1.0), group))
    assert np.array_equal(undone, (integers.reshape(-1, group) @ matrix).reshape(integers.shape).astype(np.float32))


@pytest.mark.parametrize(("group", "by_row"), [(0, True), (0, False), (4, True), (GROUP, True), (GROUP, False)])
def test_a_file_is_read_as_what_it_stands_for(tiny, tmp_path, group, by_row):
    path = tmp_path / "int8.safetensors"
    stands = written(tiny, path, group, by_row)
    pipeline = QwenImagePipeline.from_pretrained(tiny, dtype="float32", transformer=path)
    network, seen = pipeline.components.network(TRANSFORMER), 0
    for name, expected in stands.items():
        place = network
        for part in name.split(".")[:-1]:
            place = place[int(part)] if isinstance(place, list) else place.get(part)
            if place is None:
                break
        if place is not None:  # the last block's text is not used
            value, seen = np.array(place["weight"]), seen + 1
            assert np.abs(value - expected).max() <= 2e-7 * np.abs(expected).max(), name
    assert seen > 15
    forms = pipeline.components.weights(TRANSFORMER).forms
    assert ("int8_convrot" if group else "int8_tensorwise") in forms


def test_the_image_is_near_that_of_the_original(tiny, tmp_path):
    path = tmp_path / "int8.safetensors"
    written(tiny, path, GROUP)
    said = {"width": 64, "height": 64, "num_inference_steps": 2, "cfg_scale": 1, "progress": False}
    whole, near, streamed = (
        np.asarray(QwenImagePipeline.from_pretrained(tiny, dtype="float32", **files).generate("a", **said)[0], float)
        for files in ({}, {"transformer": path}, {"transformer": path, "streamed": ["transformer"]})
    )
    assert 0 < np.abs(whole - near).mean() < 6
    assert np.array_equal(near, streamed)


@pytest.mark.parametrize(("group", "name"), [(GROUP, "int8_convrot"), (0, "int8_tensorwise")])
def test_info_names_it(tiny, tmp_path, capsys, group, name):
    path = tmp_path / "int8.safetensors"
    written(tiny, path, group)
    report = identify(path)
    assert (report.kind, report.facts["stored as"]) == ("transformer", name)
    assert "cannot be used" not in report.facts
    assert main(["info", str(path)]) == 0
    assert name in capsys.readouterr().out


W4 = {"format": "convrot_w4a4", "convrot": True, "convrot_groupsize": 64}
BAD = {
    "w4a4": ({"note": W4}, "convrot_w4a4"),
    "w4a8": ({"note": {"format": "asym_w4a8_int8"}}, "asym_w4a8_int8"),
    "an odd group": ({"note": {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 8}}, "groups of 8"),
    "no number": ({"note": {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": "x"}}, "groups of 'x'"),
    "too wide": ({"note": {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 256}}, "groups of 256"),
    "no JSON": ({"comfy_quant": mx.array(np.frombuffer(b"{oh", np.uint8))}, "nothing readable"),
    "no object": ({"comfy_quant": mx.array(np.frombuffer(b"[1]", np.uint8))}, "nothing readable"),
    "no scale": ({"weight_scale": None, "comfy_quant": None}, "int8 without scales"),
    "a wrong scale": ({"weight_scale": mx.zeros((5, 1))}, "scale of shape"),
}


@pytest.mark.parametrize("title", BAD)
def test_others_are_named_and_refused(tiny, tmp_path, capsys, title):
    changed, sentence = BAD[title]
    path = tmp_path / "odd.safetensors"
    written(tiny, path, GROUP, **changed)
    words = ["a", "--model", str(tiny), "--transformer", str(path), "--quiet", "-o", str(tmp_path / "x.png")]
    code = main(["generate", *words])
    out, err = capsys.readouterr()
    assert sentence in error_line((code, out.splitlines(), err))
    assert not (tmp_path / "x.png").exists()


def test_what_is_not_read_is_named_by_the_file(tiny, tmp_path):
    path = tmp_path / "w4.safetensors"
    written(tiny, path, GROUP, note=W4)
    assert "is quantized as convrot_w4a4, which is not read here" in unreadable(weight_file(path).tensors)
    with pytest.raises(CheckpointError, match="convrot_w4a4"):
        QwenImagePipeline.from_pretrained(tiny, transformer=path).prepare()
