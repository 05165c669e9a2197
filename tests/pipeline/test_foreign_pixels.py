"""What other programs wrote generates what the same numbers generate in the released layout."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import foreign
import foreign_names
import mlx.core as mx
import numpy as np
import pytest
import torch
from PIL import Image

from qwen_image_mlx import CheckpointError, GenerationParameters, Quantization, QwenImagePipeline, RequestError
from qwen_image_mlx.cli.main import main
from qwen_image_mlx.models.layers import Linear, QuantizedLinear
from qwen_image_mlx.pipeline.components import Components
from qwen_image_mlx.pipeline.inspection import inspect_checkpoint
from qwen_image_mlx.pipeline.quantize_checkpoint import quantize_checkpoint
from qwen_image_mlx.weights.gguf import read_gguf
from qwen_image_mlx.weights.gguf_blocks import decode
from qwen_image_mlx.weights.snapshot import HubSnapshot
from qwen_image_mlx.weights.synthetic import FULL, PROCESSOR, SCHEDULER, TINY, write_checkpoint

pytestmark = pytest.mark.reference

PARAMETERS = GenerationParameters(width=64, height=48, num_inference_steps=1)  # every number is used in one step
PHOTO = Image.linear_gradient("L").resize((64, 48)).convert("RGB")
# Rows of 256 columns, so that every packed form fits.
WIDE = {
    **TINY,
    "transformer": replace(TINY["transformer"], num_attention_heads=8, joint_attention_dim=128),
    "text_encoder": replace(
        TINY["text_encoder"], hidden_size=128, intermediate_size=192, num_attention_heads=8, num_key_value_heads=4
    ),
    "vision": replace(TINY["vision"], out_hidden_size=128),
}
CLASSES = {
    "generate": "QwenImagePipeline",
    "edit": "QwenImageEditPlusPipeline",
    "decompose": "QwenImageLayeredPipeline",
}
STEMS = {"transformer": "diffusion_pytorch_model", "text_encoder": "model", "vae": "diffusion_pytorch_model"}
SMALL = ["--width", "64", "--height", "48", "--steps", "2", "--dtype", "float32"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {
        task: write_checkpoint(folder / task, WIDE, pipeline=name, dtype=mx.float32) for task, name in CLASSES.items()
    }


@pytest.fixture
def copied(models, tmp_path):
    """Copies a model, with other numbers in the released layout if some are given."""

    def copy(task: str, name: str = "copy", **numbers) -> Path:
        folder = Path(shutil.copytree(models[task], tmp_path / name))
        for part, tensors in numbers.items():
            foreign.replace_weights(folder / part, {f"{STEMS[part]}.safetensors": tensors})
        return folder

    return copy


def generate(folder: Path, **options) -> np.ndarray:
    pipeline = QwenImagePipeline.from_pretrained(folder, dtype="float32", **options)
    images = [PHOTO.convert("RGBA" if pipeline.variant.layered else "RGB")] if pipeline.variant.takes_images else []
    encoding = pipeline.encode_guidance_prompts("a fox", " ", images=images, reference_pixels=4096)
    return np.array(pipeline.generate_pixels(PARAMETERS, encoding, seed=1))


@pytest.fixture(scope="module")
def dense(models, tmp_path_factory):
    """Generates by a model with other numbers in the released layout; the same numbers are run once."""
    known: dict[str, np.ndarray] = {}

    def run(task: str, **numbers: dict[str, torch.Tensor]) -> np.ndarray:
        digest = hashlib.sha256(task.encode())
        for part, tensors in sorted(numbers.items()):
            for name, tensor in sorted(tensors.items()):
                digest.update(f"{part} {name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
        if digest.hexdigest() not in known:
            folder = shutil.copytree(models[task], tmp_path_factory.mktemp("dense") / "model")
            for part, tensors in numbers.items():
                foreign.replace_weights(folder / part, {f"{STEMS[part]}.safetensors": tensors})
            known[digest.hexdigest()] = generate(folder)
            shutil.rmtree(folder)
        return known[digest.hexdigest()]

    return run


def assert_same(found: np.ndarray, expected: np.ndarray, *, packed: bool = False) -> None:
    assert np.isfinite(expected).all()
    assert expected.std() > 0.01
    if packed:  # another order of sums
        np.testing.assert_allclose(found, expected, atol=2e-4)
    else:
        np.testing.assert_array_equal(found, expected)


# --- single files next to a model ------------------------------------------------------------------------------------


@pytest.mark.sampled
@pytest.mark.parametrize("prefix", foreign_names.PREFIXES)
@pytest.mark.parametrize("form", foreign.COMFY)
def test_comfy_transformers(models, dense, tmp_path, form, prefix):
    written, numbers = foreign.COMFY[form](foreign.read(models["generate"] / "transformer"))
    file = foreign.save(tmp_path / "comfy.safetensors", foreign.prefixed(written, prefix))
    assert_same(generate(models["generate"], transformer=file), dense("generate", transformer=numbers))


@pytest.mark.sampled
@pytest.mark.parametrize("form", foreign.COMFY)
@pytest.mark.parametrize("spelling", ["model.", "model.language_model."])
def test_comfy_text_encoders(models, dense, tmp_path, form, spelling):
    tensors = foreign.read(models["edit"] / "text_encoder") | {"lm_head.weight": mx_like((512, 128))}
    written, numbers = foreign.COMFY[form](tensors)
    numbers.pop("lm_head.weight")
    if spelling != "model.":
        written = {
            n.replace("model.", spelling, 1) if n.startswith("model.") else n.replace("visual.", "model.visual."): t
            for n, t in written.items()
        }
    file = foreign.save(tmp_path / "qwen_2.5_vl.safetensors", written)
    assert_same(generate(models["edit"], text_encoder=str(file)), dense("edit", text_encoder=numbers))


def mx_like(shape):
    return torch.ones(shape) / 10


@pytest.mark.parametrize("task", CLASSES)
@pytest.mark.parametrize("form", ["bf16", "float32"])
def test_wan_named_autoencoders(models, dense, tmp_path, task, form):
    """Three channels, and the four of layered models."""
    tensors = foreign.read(models[task] / "vae")
    written, numbers = foreign.comfy_bf16(tensors) if form == "bf16" else (tensors, tensors)
    file = foreign.save(tmp_path / "vae.safetensors", {foreign_names.wan_name(n): t for n, t in written.items()})
    channels = {"generate": 3, "edit": 3, "decompose": 4}[task]
    assert written["encoder.conv_in.weight"].shape[1] == channels
    assert_same(generate(models[task], vae=file), dense(task, vae=numbers))


@pytest.mark.parametrize("modulation", [None, 8, 4])
def test_the_swift_port_s_single_file(models, dense, tmp_path, modulation):
    written, numbers = foreign.swift_single(foreign.read(models["edit"] / "transformer"), 4, modulation)
    file = foreign.save(tmp_path / "dit.safetensors", written, dit_bits="4", group_size="64",
                        modulation_bits=str(modulation or "none"))  # fmt: skip
    assert_same(generate(models["edit"], transformer=file), dense("edit", transformer=numbers), packed=True)


GGUF = {"Q4_0": True, "Q4_1": True, "Q8_0": True, "Q5_0": False, "BF16": False, "F16": False, "F32": False,
        "Q4_K": False, "Q5_K": False, "Q6_K": False, "Q2_K": False, "Q3_K": False}  # fmt: skip


@pytest.mark.parametrize(
    ("word", "prefix", "metadata"),
    [
        *((word, "", True) for word in GGUF),
        ("Q4_K", "model.diffusion_model.", True),
        ("Q8_0", "", False),
        ("Q4_0", "model.diffusion_model.", False),
    ],
)
def test_gguf_transformers(models, dense, tmp_path, word, prefix, metadata):
    file = tmp_path / "transformer.gguf"
    numbers = foreign.write_gguf(file, foreign.read(models["generate"] / "transformer"), word, prefix, metadata)
    assert_same(
        generate(models["generate"], transformer=file),
        dense("generate", transformer=numbers),
        packed=GGUF[word],
    )


@pytest.mark.parametrize(("word", "quantize", "kind"), [
    ("Q4_0", None, QuantizedLinear), ("Q8_0", None, QuantizedLinear), ("Q4_1", None, QuantizedLinear),
    ("Q4_K", None, Linear), ("Q4_K", "4", QuantizedLinear), ("Q8_0", "4", QuantizedLinear),
])  # fmt: skip
def test_what_mlx_can_use_stays_packed_and_the_rest_is_packed_when_asked(models, tmp_path, word, quantize, kind):
    file = tmp_path / "transformer.gguf"
    foreign.write_gguf(file, foreign.read(models["generate"] / "transformer"), word)
    pipeline = QwenImagePipeline.from_pretrained(models["generate"], transformer=file, quantize=quantize)
    layer = pipeline.components.network("transformer").transformer_blocks[0].attn.to_q
    assert type(layer) is kind
    if kind is QuantizedLinear:
        expected = (4, 64) if quantize else (8 if word == "Q8_0" else 4, 32)
        assert (layer.bits, layer.group_size) == expected


def test_gguf_of_a_layered_model(models, dense, tmp_path):
    file = tmp_path / "layered.gguf"
    numbers = foreign.write_gguf(file, foreign.read(models["decompose"] / "transformer"), "Q5_K")
    assert_same(generate(models["decompose"], transformer=file), dense("decompose", transformer=numbers))


@pytest.mark.parametrize("ending", ["safetensors", "gguf"])
def test_the_only_file_of_a_folder_needs_no_usual_name(models, copied, ending):
    folder = copied("generate")
    tensors = foreign.read(folder / "transformer")
    foreign.replace_weights(folder / "transformer", {})
    if ending == "gguf":
        foreign.write_gguf(folder / "transformer" / "qwen-image-F32.gguf", tensors, "F32")
        foreign.write_gguf(folder.parent / "same.gguf", tensors, "F32")
        expected = generate(models["generate"], transformer=folder.parent / "same.gguf")
    else:
        foreign.save(folder / "transformer" / "qwen_image_fp32.safetensors", tensors)
        expected = generate(models["generate"])
    assert_same(generate(folder), expected)
    foreign.save(folder / "transformer" / "another.safetensors", tensors)
    with pytest.raises(CheckpointError, match="not clear which of them belong together"):
        generate(folder)


# --- llama.cpp's text encoders, all-in-one files, rare types ---------------------------------------------------------


def split(tensors):
    """(the language model with its head, the vision tower) of a text encoder."""
    vision = {name: tensor for name, tensor in tensors.items() if name.startswith("visual.")}
    return {name: tensor for name, tensor in tensors.items() if name not in vision}, vision


@pytest.mark.parametrize("word", ["F32", "BF16", "Q8_0", "Q4_0"])
def test_text_encoders_of_llama_cpp(models, dense, tmp_path, word):
    language, _ = split(foreign.read(models["generate"] / "text_encoder"))
    file = foreign.write_llama(tmp_path / f"Qwen2.5-VL-7B-Instruct-{word}.gguf", language, word)
    stored = read_gguf(file)[0].values()
    numbers = {
        n: torch.from_numpy(np.array(decode(t).astype(mx.float32))) for n, t in zip(language, stored, strict=True)
    }
    expected = dense("generate", text_encoder=numbers)
    assert_same(generate(models["generate"], text_encoder=file), expected, packed=word.startswith("Q"))


@pytest.mark.parametrize("joined", [True, False])
@pytest.mark.parametrize("place", ["file", "folder"])
def test_the_vision_tower_of_llama_cpp_lies_next_to_the_text_encoder(models, dense, tmp_path, joined, place):
    """Other numbers than the model's own, so that these cannot have been used."""
    own = foreign.read(models["edit"] / "text_encoder")
    other = {n: t * 1.25 if n.endswith("weight") else t + 0.1 for n, t in own.items()}
    language, vision = split(other)
    file = foreign.write_llama(tmp_path / "Qwen2.5-VL-7B-Instruct-F32.gguf", language)
    foreign.write_llama(tmp_path / "Qwen2.5-VL-7B-Instruct-mmproj-F16.gguf", vision, "F16", split=not joined)
    foreign.write_llama(tmp_path / "another-mmproj-F32.gguf", {n: t * 2 for n, t in vision.items()})
    halved = {n: t.half().float() if t.ndim == 2 else t for n, t in vision.items()}
    expected = dense("edit", text_encoder=language | halved)
    assert_same(generate(models["edit"], text_encoder=file if place == "file" else tmp_path), expected)


@pytest.mark.parametrize("form", ["gguf", "safetensors"])
def test_without_one_the_model_s_own_vision_tower_is_used(models, dense, tmp_path, form):
    own = foreign.read(models["edit"] / "text_encoder")
    language, vision = split(own)
    language = {n: t * 1.25 for n, t in language.items()}
    if form == "gguf":
        file = foreign.write_llama(tmp_path / "text.gguf", language)
    else:
        file = foreign.save(tmp_path / "text.safetensors", language)
    assert_same(generate(models["edit"], text_encoder=file), dense("edit", text_encoder=language | vision))


def test_a_vision_tower_alone_is_no_text_encoder(models, tmp_path):
    _, vision = split(foreign.read(models["edit"] / "text_encoder"))
    file = foreign.write_llama(tmp_path / "mmproj-F32.gguf", vision)
    with pytest.raises(CheckpointError, match=r"a vision tower and not the language model.*text encoder's folder"):
        generate(models["edit"], text_encoder=file)


def test_a_cached_encoding_is_not_that_of_another_vision_tower(models, tmp_path):
    language, vision = split(foreign.read(models["edit"] / "text_encoder"))
    file = foreign.write_llama(tmp_path / "text.gguf", language)

    def fingerprint():
        return Components(HubSnapshot(models["edit"]), mx.float32, replaced={"text_encoder": file}).fingerprint

    before = fingerprint()
    foreign.write_llama(tmp_path / "mmproj.gguf", vision)
    assert fingerprint() != before


@pytest.mark.parametrize(("task", "form", "wrapper"), [
    ("generate", "fp8", "_orig_mod."), ("edit", "float32", ""), ("decompose", "float32", ""),
])  # fmt: skip
def test_each_flag_takes_its_part_of_an_all_in_one_file(models, dense, tmp_path, task, form, wrapper):
    parts = {part: foreign.read(models[task] / part) for part in STEMS}
    parts = {part: {n: t * 1.125 for n, t in tensors.items()} for part, tensors in parts.items()}
    kept = {part: t for part, t in parts.items() if part == "vae" or form == "float32"}
    written, numbers = dict(kept), dict(kept)
    for part in parts.keys() - kept.keys():
        written[part], numbers[part] = foreign.comfy_fp8(parts[part])
    file = foreign.save(tmp_path / "Rapid-AIO.safetensors", {
        **foreign.prefixed(written["transformer"], f"model.diffusion_model.{wrapper}"),
        **foreign.prefixed(written["text_encoder"], "text_encoders.qwen25_7b.transformer."),
        **{f"vae.{foreign_names.wan_name(name)}": tensor for name, tensor in written["vae"].items()},
        "text_encoders.qwen25_7b.logit_scale": mx_like(()),
    })  # fmt: skip
    for part in STEMS:
        assert_same(generate(models[task], **{part: file}), dense(task, **{part: numbers[part]}))
    assert_same(generate(models[task], **dict.fromkeys(STEMS, file)), dense(task, **numbers))


def test_an_all_in_one_file_without_the_part_is_refused(models, tmp_path):
    parts = {part: foreign.read(models["generate"] / part) for part in ("transformer", "vae")}
    file = foreign.save(tmp_path / "aio.safetensors", {
        **foreign.prefixed(parts["transformer"], "model.diffusion_model."), **foreign.prefixed(parts["vae"], "vae."),
    })  # fmt: skip
    with pytest.raises(CheckpointError, match="all-in-one checkpoint with a transformer and an autoencoder, not with"):
        generate(models["generate"], text_encoder=file)


@pytest.mark.parametrize(("part", "form"), [
    ("transformer", "e5m2"), ("text_encoder", "e5m2 scaled"), ("transformer", "one float64"),
    ("text_encoder", "float64"),
])  # fmt: skip
def test_types_that_mlx_does_not_open(models, copied, dense, tmp_path, part, form):
    numbers = foreign.read(models["generate"] / part)
    written = dict(numbers)
    for number, (name, tensor) in enumerate(numbers.items()):
        matrix = tensor.ndim == 2 and name.endswith(".weight")
        if form == "float64" or (form == "one float64" and number == 3):
            written[name] = tensor.double()
        elif form.startswith("e5m2") and matrix:
            scale = tensor.abs().max() / 57344 if "scaled" in form else torch.tensor(1.0)
            written[name] = (tensor / scale).to(torch.float8_e5m2)
            numbers[name] = written[name].float() * scale
            if "scaled" in form:
                written[name.replace("weight", "weight_scale")] = scale
    file = foreign.save(tmp_path / "rare.safetensors", written)
    expected = dense("generate", **{part: numbers})
    assert_same(generate(models["generate"], **{part: file}), expected)
    assert_same(generate(copied("generate", "folder", **{part: written})), expected)


# --- zero_cond_t ----------------------------------------------------------------------------------------------------


@pytest.mark.sampled
@pytest.mark.parametrize(("marker", "said", "expected"), [
    (True, None, True), (False, None, False), (True, False, False), (False, True, True),
])  # fmt: skip
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_the_marker_of_2511(models, tmp_path, marker, said, expected, prefix):
    tensors = foreign.read(models["edit"] / "transformer")
    extra = {"__index_timestep_zero__": torch.zeros(1)} if marker else {}
    file = foreign.save(tmp_path / "2511.safetensors", foreign.prefixed(tensors | extra, prefix))
    options = {"transformer": file, "zero_cond_t": said}
    components = QwenImagePipeline.from_pretrained(models["edit"], **options).components
    assert components.config("transformer").zero_cond_t is expected
    assert_same(generate(models["edit"], **options), generate(models["edit"], zero_cond_t=expected))


# --- whole snapshots ------------------------------------------------------------------------------------------------


@pytest.mark.sampled
@pytest.mark.parametrize(("bits", "group", "mode"), [(4, 64, "affine"), (8, 32, "affine"), (4, 32, "mxfp4")])
@pytest.mark.parametrize("task", ["generate", "edit"])
def test_swift_snapshots(copied, dense, task, bits, group, mode):
    folder = copied(task, "swift")
    numbers = foreign.write_swift(folder, bits, group, mode)
    packed = json.loads((folder / "quantization.json").read_text())["layers"]
    names = {layer["name"] for layer in packed}
    assert {"model.embed_tokens", "img_in", "transformer_blocks.0.img_mod.1"} <= names
    assert_same(generate(folder), dense(task, **numbers), packed=True)


RECORDS = {
    None: None,
    "qwen-image": {"model_name": "qwen-image", "base_model": None, "upstream": {"repo_id": "Qwen/Qwen-Image-2512"}},
    "qwen-image-edit": {"model_name": "mine", "base_model": "qwen-image-edit", "upstream": {"repo_id": None}},
}


@pytest.mark.parametrize(("task", "bits", "record"), [
    ("generate", None, None), ("generate", 4, "qwen-image"), ("generate", 8, None), ("edit", None, None),
    ("edit", 4, "qwen-image-edit"), ("edit", 6, None),
])  # fmt: skip
def test_mflux_saves(copied, dense, task, bits, record):
    folder = copied(task, "mflux")
    numbers = foreign.write_mflux(folder, bits, RECORDS[record])
    assert_same(generate(folder), dense(task, **numbers), packed=bits is not None)
    report = inspect_checkpoint(folder)
    assert report.class_name == CLASSES[task]


def test_mflux_saves_are_packed_as_they_say(copied):
    folder = copied("generate", "mflux")
    foreign.write_mflux(folder, 4, None)
    weights = QwenImagePipeline.from_pretrained(folder).components.weights("transformer")
    bits = {n: weights.stored(f"transformer_blocks.0.{n}.weight").scheme.bits for n in ("img_mod.1", "txt_mod.1")}
    assert bits == {"img_mod.1": 8, "txt_mod.1": 4}


def test_numbered_shards_without_an_index(copied, dense):
    folder = copied("generate", "mflux")
    numbers = foreign.write_mflux(folder, 8, None)
    for index in folder.glob("*/*.index.json"):
        index.unlink()
    assert_same(generate(folder), dense("generate", **numbers), packed=True)


@pytest.mark.parametrize(("record", "class_name", "zero_cond_t"), [
    (None, "QwenImageEditPlusPipeline", False),
    ({"base_model": "qwen-image-edit"}, "QwenImageEditPlusPipeline", False),
    ({"model_name": "qwen-image-edit-2511"}, "QwenImageEditPlusPipeline", True),
    ({"upstream": {"repo_id": "Qwen/Qwen-Image-Edit"}}, "QwenImageEditPipeline", False),
    ({"model_name": "flux"}, "QwenImageEditPlusPipeline", False),
])  # fmt: skip
def test_what_stands_in_for_missing_configs(copied, caplog, record, class_name, zero_cond_t):
    folder = copied("edit", "mflux")
    foreign.write_mflux(folder, None, record)
    for config in folder.glob("*/config.json"):
        config.unlink()
    with caplog.at_level("INFO"):
        components = Components(HubSnapshot(folder), mx.float32)
    assert components.sources.index["_class_name"] == class_name
    assert f"taken for a {class_name}" in caplog.text
    assert components.config("transformer") == replace(FULL["transformer"], zero_cond_t=zero_cond_t)
    assert components.config("text_encoder") == FULL["text_encoder"]
    assert components.config("vision") == FULL["vision"]
    assert components.config("vae") == FULL["vae"]
    assert components.scheduler_config == SCHEDULER
    assert components.image_processor == PROCESSOR
    guessed = record is None or record.get("model_name") == "flux"
    assert ("--zero-cond-t on" in caplog.text) is guessed


def test_an_mflux_save_can_be_packed_anew(copied, tmp_path):
    folder = copied("edit", "mflux")
    foreign.write_mflux(folder, None, None)
    out = quantize_checkpoint(folder, tmp_path / "pack", Quantization.parse("4"))
    assert_same(generate(out), generate(folder, quantize="4"))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("place", ["in the model", "next to it"])
def test_text_encoders_converted_by_mlx_vlm(models, copied, dense, tmp_path, bits, place):
    written, numbers = foreign.mlx_vlm(foreign.read(models["edit"] / "text_encoder"), bits)
    folder, options = copied("edit", "mlx-vlm"), {}
    encoder = folder / "text_encoder"
    foreign.replace_weights(encoder, {"model.safetensors": written}, "model.safetensors.index.json")
    config = json.loads((encoder / "config.json").read_text())
    quantization = {"group_size": 64, "bits": bits, "mode": "affine"}
    config |= {"quantization": quantization, "quantization_config": quantization}
    (encoder / "config.json").write_text(json.dumps(config))
    if place == "next to it":
        folder, options = models["edit"], {"text_encoder": encoder}
    assert_same(generate(folder, **options), dense("edit", text_encoder=numbers), packed=True)


# --- the command line -----------------------------------------------------------------------------------------------


def test_flags_metadata_and_generating_again(models, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    files = {}
    for part in STEMS:
        tensors = foreign.read(models["generate"] / part)
        written = (
            {foreign_names.wan_name(n): t for n, t in tensors.items()}
            if part == "vae"
            else foreign.comfy_fp8(tensors)[0]
        )
        files[part] = foreign.save(tmp_path / f"{part}.safetensors", written)
    flags = [x for part in files for x in (f"--{part.replace('_', '-')}", f"{part}.safetensors")]
    assert main(["generate", "a fox", *SMALL, *flags, "-m", str(models["generate"]), "-s", "3", "-o", "one.png"]) == 0
    assert main(["generate", "--from-image", "one.png", "-o", "two.png"]) == 0
    assert Path("two.png").read_bytes() == Path("one.png").read_bytes()
    assert main(["generate", "a fox", *SMALL, "-m", str(models["generate"]), "-s", "3", "-o", "own.png"]) == 0
    assert Image.open("own.png").tobytes() != Image.open("one.png").tobytes()
    capsys.readouterr()
    assert main(["info", "one.png", "--json"]) == 0
    recorded = json.loads(capsys.readouterr().out)
    assert {part: recorded[part] for part in files} == {part: f"{part}.safetensors" for part in files}


def test_encodings_are_kept_apart_by_their_files(models, tmp_path):
    file = foreign.save(tmp_path / "text.safetensors", foreign.read(models["edit"] / "text_encoder"))
    prints = [QwenImagePipeline.from_pretrained(models["edit"], **o).components.fingerprint for o in
              ({}, {"text_encoder": file}, {"transformer": file})]  # fmt: skip
    assert prints[0] == prints[2] != prints[1]


# --- bad files ------------------------------------------------------------------------------------------------------


def flux(tensors):
    return {"img_in.weight": torch.ones(3, 3), "double_blocks.0.img_attn.qkv.weight": torch.ones(3, 3)}


def newer(tensors):
    return tensors | {"transformer_blocks.0.img_mlp.gate_layer.weight": tensors["img_in.weight"]}


def without(name):
    return lambda tensors: {n: t for n, t in tensors.items() if n != name}


def missing_scales(tensors):
    return without("transformer_blocks.0.attn.to_q.scales")(foreign.swift_single(tensors, 4, None)[0])


def odd_scales(tensors):
    written = foreign.COMFY["weight_scale"](tensors)[0]
    return written | {"transformer_blocks.0.attn.to_q.weight_scale": torch.ones(7)}


def layered(tensors):
    return tensors | {"time_text_embed.addition_t_embedding.weight": tensors["img_in.weight"][:2]}


def twice(tensors):
    return tensors | foreign.prefixed({"img_in.weight": tensors["img_in.weight"]}, "model.diffusion_model.")


def other_dtype(tensors):
    return tensors | {"img_in.bias": tensors["img_in.bias"].to(__import__("torch").int32)}


BAD = {
    "FLUX": (flux, "holds FLUX or a model built like it, not a transformer of Qwen-Image"),
    "2.1": (newer, "holds Qwen-Image-2.1, not a transformer"),
    "lacking": (without("img_in.weight"), "lacks img_in.weight"),
    "mis-shaped": (lambda t: t | {"img_in.bias": t["img_in.bias"][:5]}, r"img_in.bias \[5\] instead of \[256\]"),
    "missing scales": (missing_scales, r"to_q.weight \(packed, without scales\)"),
    "odd scales": (odd_scales, r"weight_scale of shape \(7,\)"),
    "layered": (layered, "those of a layered model, but its config is that of a model that is not layered"),
    "twice": (twice, "has img_in.weight twice, under two spellings"),
    "other dtype": (other_dtype, r"img_in.bias \(I32\)"),
    "nothing": (lambda t: {}, "lacks"),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_transformers_are_one_sentence(models, tmp_path, bad):
    change, says = BAD[bad]
    file = foreign.save(tmp_path / "bad.safetensors", change(foreign.read(models["generate"] / "transformer")))
    with pytest.raises(CheckpointError, match=says) as error:
        generate(models["generate"], transformer=file)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("given", "wanted", "says"), [
    ("vae", "transformer", "holds an autoencoder of Qwen-Image's kind, not a transformer"),
    ("transformer", "vae", "holds a transformer of Qwen-Image's kind, not an autoencoder"),
    ("text_encoder", "transformer", "holds a text encoder of Qwen-Image's kind, not a transformer"),
    ("transformer", "text_encoder", "holds a transformer of Qwen-Image's kind, not a text encoder"),
])  # fmt: skip
def test_files_of_another_part_are_named(models, tmp_path, given, wanted, says):
    file = foreign.save(tmp_path / "file.safetensors", foreign.read(models["generate"] / given))
    with pytest.raises(CheckpointError, match=says):
        generate(models["generate"], **{wanted: file})


@pytest.mark.parametrize(("name", "content", "error", "says"), [
    ("model.ckpt", b"PK\3\4", CheckpointError, "is a pickle"),
    ("model.safetensors", b"PK\3\4 and so on", CheckpointError, "is a zip file"),
    ("model.safetensors", b"", CheckpointError, "not a whole safetensors file"),
    ("model.gguf", b"GGUF\3\0\0\0", CheckpointError, "not a whole GGUF file"),
    ("model.gguf", b"PK\3\4 and so on", CheckpointError, "not a GGUF file"),
    ("model.png", b"x", RequestError, "is not a weights file"),
    (None, b"", RequestError, "does not exist"),
])  # fmt: skip
@pytest.mark.parametrize("part", STEMS)
def test_files_that_are_none(models, tmp_path, part, name, content, error, says):
    path = tmp_path / (name or "missing.safetensors")
    if name:
        path.write_bytes(content)
    with pytest.raises(error, match=says):
        generate(models["generate"], **{part: path})


def test_cut_files_are_said_to_be(models, tmp_path):
    tensors = foreign.read(models["generate"] / "transformer")
    foreign.write_gguf(tmp_path / "whole.gguf", tensors, "Q8_0")
    foreign.save(tmp_path / "whole.safetensors", tensors)
    for whole in tmp_path.glob("whole.*"):
        cut = tmp_path / f"cut{whole.suffix}"
        cut.write_bytes(whole.read_bytes()[:-1000])
        with pytest.raises(CheckpointError, match="download it again"):
            generate(models["generate"], transformer=cut)


def test_gguf_types_that_are_not_read_are_said_before_loading(models, tmp_path):
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "iq.gguf", "qwen_image")
    for name, tensor in foreign.read(models["generate"] / "transformer").items():
        if name.endswith("attn.to_q.weight"):
            data = np.zeros((tensor.shape[0], tensor.shape[1] // 256 * 136), np.uint8)
            writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType.IQ4_XS)
        else:
            writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match="quantized as GGUF's IQ4_XS, which is not read here"):
        generate(models["generate"], transformer=tmp_path / "iq.gguf")


@pytest.mark.parametrize("task", ["generate", "edit"])
def test_damaged_mflux_saves(copied, task):
    folder = copied(task, "mflux")
    foreign.write_mflux(folder, 4, {"model_name": ["nonsense"], "upstream": 3})
    (folder / "transformer" / "1.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"transformer/1\.safetensors"):
        generate(folder)


def test_folders_that_are_no_model_say_so(tmp_path):
    with pytest.raises(CheckpointError, match=r"model_index\.json"):
        QwenImagePipeline.from_pretrained(tmp_path)
    for part in STEMS:
        foreign.save(tmp_path / part / "0.safetensors", {"x.weight": torch.ones(2)})
    with pytest.raises(CheckpointError, match="not those of a Qwen-Image model"):
        QwenImagePipeline.from_pretrained(tmp_path)
