"""info and lora inspect: what images, models, single files and LoRAs are said to be."""

from __future__ import annotations

import json
import math
import re

import gguf
import mlx.core as mx
import numpy as np
import pytest

from qwen_image_mlx.cli.main import main
from qwen_image_mlx.models.qwen_image.config import TransformerConfig
from qwen_image_mlx.pipeline.inspection import inspect_checkpoint
from qwen_image_mlx.pipeline.quantize_checkpoint import quantize_checkpoint
from qwen_image_mlx.weights.mapping import matrix_shapes
from qwen_image_mlx.weights.safetensors_files import read_header
from qwen_image_mlx.weights.schemes import Quantization
from qwen_image_mlx.weights.snapshot import DEMO_ROOT
from qwen_image_mlx.weights.synthetic import ROWS, TINY, write_checkpoint


@pytest.fixture
def run(capsys):
    def call(*arguments):
        code = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.mark.parametrize(("bits", "dtype"), [(None, "float32"), ("4", "bfloat16"), ("transformer=mxfp8", "bfloat16")])
def test_the_memory_that_is_announced_is_taken(tiny, bits, dtype):
    from mlx.utils import tree_flatten

    from qwen_image_mlx import QwenImagePipeline

    quantization = bits and Quantization.parse(bits)
    report = inspect_checkpoint(tiny, dtype=getattr(mx, dtype), quantization=quantization)
    components = QwenImagePipeline.from_pretrained(tiny, dtype=dtype, quantize=quantization).components
    loaded = {
        "text_encoder": [components.network("text_encoder")],
        "transformer": [components.network("transformer")],
        "vae": [components.network("vae_encoder"), components.network("vae_decoder")],
    }
    for part in report.components:
        held = sum(array.nbytes for module in loaded[part.name] for _, array in tree_flatten(module.parameters()))
        assert part.resident_bytes == held, part.name
    assert report.generating_bytes == sum(c.resident_bytes for c in report.components if c.name != "text_encoder")


def test_a_model_is_described(tiny, tmp_path, run):
    code, out, _ = run("info", tiny)
    assert code == 0
    assert re.search(r"class +QwenImagePipeline", out)
    assert re.search(r"transformer +[\d.]+ MB in files \(F32 [\d.]+ MB\), [\d.]+ MB in memory", out)
    source = write_checkpoint(tmp_path / "source", TINY)
    pack = quantize_checkpoint(source, tmp_path / "pack", Quantization.parse("text_encoder=8"))
    _, out, _ = run("info", pack, "--json")
    assert "packed 8" in json.loads(out)["text_encoder"]


@pytest.mark.parametrize("component", ["transformer", "text_encoder", "vae"])
def test_a_component_s_file_is_recognised(tiny, run, component):
    (file,) = (tiny / component).glob("*.safetensors")
    code, out, err = run("info", file, "--json")
    assert code == 0, err
    assert json.loads(out)["kind"] == component


def test_a_lora_is_described(tmp_path, run):
    shapes = matrix_shapes(ROWS["transformer"], TransformerConfig())
    name = "transformer_blocks.7.attn.to_q"
    out_features, in_features = shapes[name]
    file = tmp_path / "style.safetensors"
    tensors = {
        f"{name}.lora_down.weight": mx.ones((4, in_features)),
        f"{name}.lora_up.weight": mx.ones((out_features, 4)),
    }
    mx.save_safetensors(str(file), {**tensors, f"{name}.alpha": mx.array(2.0)})
    for arguments in (("lora", "inspect", file), ("info", file)):
        code, out, err = run(*arguments)
        assert code == 0, err
        assert re.search(r"alpha / rank +0\.5", out)
        assert re.search(rf"targets +1 of {sum(len(s) == 2 for s in shapes.values())}", out)


@pytest.mark.parametrize("prefix", ["", "transformer._orig_mod."])
def test_a_lora_of_the_demo_models_is_described(tmp_path, run, prefix):
    file = tmp_path / "mine.safetensors"
    config = TransformerConfig.from_dict(json.loads((DEMO_ROOT / "shared/transformer/config.json").read_bytes()))
    name = "transformer_blocks.0.attn.to_q"
    out_features, in_features = matrix_shapes(ROWS["transformer"], config)[name]
    mx.save_safetensors(str(file), {f"{prefix}{name}.lora_A.weight": mx.ones((2, in_features)),
                                    f"{prefix}{name}.lora_B.weight": mx.ones((out_features, 2))})  # fmt: skip
    assert run("lora", "inspect", file)[0] == 0
    code, out, err = run("info", file, "--json")
    assert code == 0, err
    assert json.loads(out)["made for"] == "the demo models"
    assert json.loads(out)["taken by"] == "--lora"
    assert (
        run("generate", "a fox", "--model", "demo", "--lora", file, "--steps", "1", "--output", tmp_path / "x.png")[0]
        == 0
    )


def test_an_all_in_one_file_is_described_by_its_parts(tiny, tmp_path, run):
    bundle = {}
    for part, prefix in (("transformer", "model.diffusion_model."), ("text_encoder", "text_encoders.qwen25_7b."),
                         ("vae", "vae.")):  # fmt: skip
        (file,) = (tiny / part).glob("*.safetensors")
        bundle |= {prefix + name: value for name, value in mx.load(str(file)).items()}
    mx.save_safetensors(str(tmp_path / "aio.safetensors"), bundle)
    code, out, err = run("info", tmp_path / "aio.safetensors", "--json")
    assert code == 0, err
    said = json.loads(out)
    assert said["kind"] == "transformer, text_encoder, vae"
    assert said["taken by"] == "--transformer, --text-encoder, --vae"


@pytest.mark.reference
@pytest.mark.parametrize("vision", [False, True])
def test_text_encoders_of_llama_cpp_are_described(tiny, tmp_path, run, vision):
    import foreign
    import torch

    tensors = foreign.read(tiny / "text_encoder")
    tensors = {n: t for n, t in tensors.items() if n.startswith("visual.") == vision}
    if vision and not tensors:
        tensors = {
            f"visual.blocks.0.{n}.weight": torch.ones(4, 4) for n in ("attn.proj", "mlp.up_proj", "mlp.down_proj")
        }
    file = foreign.write_llama(tmp_path / "text.gguf", tensors)
    code, out, err = run("info", file, "--json")
    assert code == 0, err
    said = json.loads(out)
    assert (said["kind"], said["taken by"]) == ("text_encoder", "--text-encoder")
    assert said["architecture"] == ("clip" if vision else "qwen2vl")
    assert said["vision tower"] == ("yes" if vision else "no")
    assert ("language model" in said) == vision


def test_a_whole_gguf_file_of_another_model_is_not_called_damaged(tmp_path, run):
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "flux")
    writer.add_tensor("double_blocks.0.img_attn.qkv.weight", np.ones((2, 2), np.float32))
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file(), writer.close()
    code, _, err = run("info", tmp_path / "other.gguf")
    assert code == 2
    assert "a whole GGUF file of flux" in err
    assert "download" not in err


@pytest.mark.parametrize(("words", "says"), [
    ({"weight.absmax": mx.uint8, "weight.quant_state.bitsandbytes__nf4": mx.uint8}, "bitsandbytes nf4"),
    ({"weight_scale_2": mx.float32}, "nvfp4"),
])  # fmt: skip
@pytest.mark.parametrize("part", ["transformer", "text_encoder"])
def test_info_and_generate_agree_on_what_cannot_be_used(tiny, tmp_path, run, part, words, says):
    (own,) = (tiny / part).glob("*.safetensors")
    tensors = mx.load(str(own))
    for name in [
        name for name, value in tensors.items() if (value.ndim == 2 and "layers." in name) or "attn.to_" in name
    ]:
        if name.endswith(".weight"):
            tensors[name] = mx.zeros((tensors[name].size // 2, 1), mx.uint8)
            tensors |= {name.replace("weight", word): mx.zeros((4,), dtype) for word, dtype in words.items()}
    file = tmp_path / "small.safetensors"
    mx.save_safetensors(str(file), tensors)
    code, out, err = run("info", file, "--json")
    assert code == 0, err
    said = json.loads(out)
    assert (said["kind"], said["format"]) == (part, says)
    code, _, err = run("generate", "a fox", "--model", tiny, f"--{part.replace('_', '-')}", file)
    assert code == 2
    assert said["cannot be used"] in err


@pytest.mark.parametrize(("content", "says"), [(b"", "safetensors"), (b"\x08" + bytes(15), "safetensors")])
def test_damaged_files_are_refused(tmp_path, run, content, says):
    (tmp_path / "odd.safetensors").write_bytes(content)
    for command in (["info"], ["lora", "inspect"]):
        code, out, err = run(*command, tmp_path / "odd.safetensors")
        assert (code, out) == (2, "")
        assert says in err


def test_other_models_are_refused(tmp_path, run):
    mx.save_safetensors(str(tmp_path / "other.safetensors"), {"double_blocks.0.img_attn.qkv.weight": mx.ones((4, 4))})
    code, _, err = run("info", tmp_path / "other.safetensors")
    assert code == 2
    assert "neither a part of a Qwen-Image model nor a LoRA" in err


def test_lora_inspect_takes_another_model_s_shapes(tiny, tmp_path, run):
    name, (out_features, in_features) = "transformer_blocks.0.attn.to_q", (96, 96)
    file = tmp_path / "tiny.safetensors"
    mx.save_safetensors(str(file), {f"{name}.lora_A.weight": mx.ones((2, in_features)),
                                    f"{name}.lora_B.weight": mx.ones((out_features, 2))})  # fmt: skip
    assert run("lora", "inspect", file, "--model", tiny)[0] == 0
    assert run("lora", "inspect", file)[0] == 2


@pytest.mark.slow
def test_a_single_file_s_memory_is_announced(tmp_path, run):
    """A file of the real width with holes for data: only its header is read."""
    from qwen_image_mlx.weights.mapping import expected_tensors

    specs = expected_tensors(ROWS["transformer"], TransformerConfig())
    header, end = {}, 0
    for spec in specs.values():
        size = 2 * math.prod(spec.shape)
        header[spec.name] = {"dtype": "BF16", "shape": list(spec.shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    file = tmp_path / "transformer.safetensors"
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        out.truncate(8 + len(text) + end)
    code, out, err = run("info", file)
    assert code == 0, err
    assert re.search(r"in the file +BF16 40\.86 GB", out)
    assert re.search(r"in memory +27\.\d+ GB", out)


def test_a_file_with_two_components_is_counted_once(tmp_path):
    folder = write_checkpoint(tmp_path / "model", TINY, pipeline="QwenImageEditPlusPipeline")
    parts = {part.name: part.file_bytes for part in inspect_checkpoint(folder).components}
    (file,) = (folder / "text_encoder").glob("*.safetensors")
    tensors = read_header(file)[0].values()
    assert parts["vision"] == sum(t.nbytes for t in tensors if t.name.startswith("visual."))
    assert parts["text_encoder"] + parts["vision"] <= sum(t.nbytes for t in tensors)


@pytest.mark.parametrize("name", ["model.ckpt", "model.PT", "model.bin"])
def test_pickles_are_refused_and_called_so(tmp_path, run, name):
    (tmp_path / name).write_bytes(b"anything")
    code, out, err = run("info", tmp_path / name)
    assert (code, out) == (2, "")
    assert "is a pickle" in err
