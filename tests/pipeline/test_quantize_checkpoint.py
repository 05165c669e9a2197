"""Packs: the pixels of a run that quantizes by itself, whole or not there, and going on where a run was cut."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest

from qwen_image_mlx import (
    CheckpointError,
    GenerationParameters,
    OutputError,
    Quantization,
    QwenImagePipeline,
    RequestError,
)
from qwen_image_mlx.cli.main import main
from qwen_image_mlx.licences import APACHE
from qwen_image_mlx.models.layers import QuantizedEmbedding, QuantizedLinear
from qwen_image_mlx.models.qwen_image_21 import facts
from qwen_image_mlx.pipeline import quantize_checkpoint as packing
from qwen_image_mlx.pipeline.quantize_checkpoint import quantize_checkpoint
from qwen_image_mlx.variants import VARIANTS
from qwen_image_mlx.weights import pack
from qwen_image_mlx.weights.safetensors_files import read_header
from qwen_image_mlx.weights.synthetic import TINY, write_checkpoint

PARAMETERS = GenerationParameters(width=64, height=48, num_inference_steps=2)
WIDE = {
    **TINY,
    "transformer": replace(TINY["transformer"], num_attention_heads=4),
    "text_encoder": replace(
        TINY["text_encoder"], hidden_size=128, intermediate_size=192, num_attention_heads=8, num_key_value_heads=4
    ),
}
WIDE["transformer"] = replace(WIDE["transformer"], joint_attention_dim=128)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("source") / "wide", WIDE, dtype=mx.float32)


def generate(folder, quantize=None, dtype="float32"):
    pipeline = QwenImagePipeline.from_pretrained(folder, dtype=dtype, quantize=quantize)
    encoding = pipeline.encode_guidance_prompts("a fox", " ")
    return np.array(pipeline.generate_pixels(PARAMETERS, encoding, seed=1)), pipeline.components


@pytest.mark.slow
@pytest.mark.sampled
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("bits", ["4", "8/32", "mxfp4", "nvfp4", "transformer=5,text_encoder=mxfp8"])
def test_a_pack_generates_what_a_run_that_quantizes_generates(source, tmp_path, bits, dtype):
    folder = quantize_checkpoint(source, tmp_path / "pack", Quantization.parse(bits))
    packed, components = generate(folder, dtype=dtype)
    running, _ = generate(source, bits, dtype)
    np.testing.assert_array_equal(packed, running)
    if dtype == "float32":
        assert np.abs(packed - generate(source)[0]).max() > 0
    assert type(components.network("transformer").transformer_blocks[0].attn.to_q) is QuantizedLinear
    assert type(components.network("text_encoder").model.embed_tokens) is QuantizedEmbedding


def test_a_pack_says_what_it_is(source, tmp_path):
    folder = quantize_checkpoint(source, tmp_path / "pack", Quantization.parse("4"))
    for component, scheme in (("transformer", 4), ("text_encoder", 8)):
        said = json.loads((folder / component / "config.json").read_text())["quantization"]
        assert (said["bits"], said["group_size"], said["mode"]) == (scheme, 64, "affine")
        (file,) = (folder / component).glob("*.safetensors")
        tensors = read_header(file)[0]
        for name, tensor in tensors.items():
            path, _, last = name.rpartition(".")
            if last == "weight" and len(tensor.shape) == 2:
                assert (said.get(path, True) is not False) == (f"{path}.scales" in tensors) == (tensor.dtype == "U32")
    assert json.loads((folder / "transformer/config.json").read_text())["quantization"]["img_in"] is False
    report = json.loads((folder / "quantization_report.json").read_text())
    assert 0.07 < report["transformer"]["transformer_blocks.0.attn.to_q"] < 0.1
    assert 0.004 < report["text_encoder"]["model.embed_tokens"] < 0.007
    card = (folder / "README.md").read_text()
    assert "transformer_blocks.*.img_mlp.net.0.proj" in card
    assert 'qwen-image-mlx generate "A red fox" --model ./pack' in card
    assert not list(tmp_path.glob("*.partial"))


CARDS = {
    "---\nlicense: mit\n---\n# x": ["license: mit"],
    "---\ntags: [a]\nlicense: other\nlicense_name: house\nlicense_link: LICENSE\n---\nlicense: mit": [
        "license: other", "license_name: house", "license_link: LICENSE",
    ],
    "---\r\nlicense: cc-by-nc-4.0\r\n---\r\n": ["license: cc-by-nc-4.0"],
    "# license: mit": [], "---\ntags: [a]\n---\nlicense: mit": [], "---\nlicense: \x1b[31m\n---\n": [], "": [],
}  # fmt: skip


@pytest.mark.parametrize("card", CARDS, ids=range(len(CARDS)))
def test_a_pack_has_the_licence_of_its_model(tmp_path, card):
    (tmp_path / "README.md").write_bytes(card.encode())
    assert packing._licence(packing.HubSnapshot(tmp_path), APACHE) == CARDS[card]
    binding = ["license: other", "license_name: qwen-research", f"license_link: {facts.LICENCE_LINK}"]
    licence = VARIANTS["QwenImage21Pipeline"].licence
    assert packing._licence(packing.HubSnapshot(tmp_path), licence) == (CARDS[card] or binding)


def test_the_licence_goes_along(source, tmp_path):
    """The lines of the card, and the files that state it."""
    model = shutil.copytree(source, tmp_path / "model")
    (model / "README.md").write_text("---\nlicense: other\nlicense_name: house\n---\n")
    legal = {"LICENSE", "Notice.txt", "USE_POLICY.md"}
    for name in (*legal, "licenses_of_images.txt", "notes.md"):
        (model / name).write_text(f"{name} in full")
    folder = quantize_checkpoint(model, tmp_path / "pack", Quantization.parse("4"))
    head = (folder / "README.md").read_text().split("---")[1]
    assert "license: other\nlicense_name: house\n" in head
    assert "apache" not in head
    files = {path.name for path in folder.iterdir() if path.is_file()}
    assert files == {*legal, "README.md", "model_index.json", "quantization_report.json"}
    assert (folder / "LICENSE").read_text() == "LICENSE in full"


def test_modulation_is_as_exact_as_in_the_source(source, tmp_path):
    folder = quantize_checkpoint(source, tmp_path / "pack", Quantization.parse("4"))
    name = "transformer_blocks.0.img_mod.1.weight"
    ours, theirs = (mx.load(str(next((f / "transformer").glob("*.safetensors"))))[name] for f in (folder, source))
    assert mx.array_equal(ours, theirs)


@pytest.mark.slow
def test_a_pack_in_several_files_is_the_same(source, tmp_path):
    whole = quantize_checkpoint(source, tmp_path / "whole", Quantization.parse("4"))
    parts = quantize_checkpoint(source, tmp_path / "parts", Quantization.parse("4"), shard_bytes=200_000)
    files = sorted((parts / "transformer").glob("*.safetensors"))
    assert len(files) > 3
    index = json.loads((parts / "transformer/diffusion_pytorch_model.safetensors.index.json").read_text())["weight_map"]
    assert index == {name: file.name for file in files for name in read_header(file)[0]}
    np.testing.assert_array_equal(generate(whole)[0], generate(parts)[0])


@pytest.mark.slow
def test_a_run_that_was_cut_goes_on(source, tmp_path, monkeypatch):
    out, done, save = tmp_path / "pack", [], pack.save_tensors

    def cut_after(number):
        def saving(path, *rest):
            if len(done) == number:
                raise OutputError("the disk is full")
            done.append(path.name)
            save(path, *rest)

        return saving

    arguments = {"quantization": Quantization.parse("4"), "shard_bytes": 200_000}
    monkeypatch.setattr(pack, "save_tensors", cut_after(3))
    with pytest.raises(OutputError, match="disk is full"):
        quantize_checkpoint(source, out, **arguments)
    assert not out.exists()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("pack.partial/*/*-of-*.safetensors")}
    assert len(before) == 3
    damaged = next(iter(before))
    damaged.write_bytes(damaged.read_bytes()[:-10])
    monkeypatch.setattr(pack, "save_tensors", cut_after(-1))
    done.clear()
    quantize_checkpoint(source, out, **arguments)
    assert damaged.name in done
    assert not {path.name for path in before} - {damaged.name} & set(done)
    np.testing.assert_array_equal(generate(out)[0], generate(source, "4")[0])


@pytest.mark.slow
def test_other_bits_do_not_go_on_from_what_lies_there(source, tmp_path, monkeypatch):
    out = tmp_path / "pack"
    monkeypatch.setattr(packing, "_card", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        quantize_checkpoint(source, out, Quantization.parse("4"))
    monkeypatch.undo()
    quantize_checkpoint(source, out, Quantization.parse("8"))
    np.testing.assert_array_equal(generate(out)[0], generate(source, "8")[0])


@pytest.mark.slow
def test_another_model_does_not_go_on_from_what_lies_there(source, tmp_path, monkeypatch):
    out = tmp_path / "pack"
    other = write_checkpoint(tmp_path / "other", WIDE, dtype=mx.float32, seed=9)
    monkeypatch.setattr(packing, "_card", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        quantize_checkpoint(other, out, Quantization.parse("4"))
    monkeypatch.undo()
    quantize_checkpoint(source, out, Quantization.parse("4"))
    np.testing.assert_array_equal(generate(out)[0], generate(source, "4")[0])
    assert not (out / "plan.txt").exists()


@pytest.mark.parametrize("name", ["mine.txt", "plan.txt", packing._PLAN])
def test_a_partial_folder_of_others_is_left_alone(source, tmp_path, name):
    (tmp_path / "pack.partial").mkdir()
    (tmp_path / "pack.partial" / name).write_text("mine")
    if name != packing._PLAN:
        (tmp_path / "pack.partial" / "README.md").write_text("mine, too")
    else:
        (tmp_path / "pack.partial" / "diary.txt").write_text("mine, too")
    with pytest.raises(RequestError, match="earlier run"):
        quantize_checkpoint(source, tmp_path / "pack", Quantization.parse("4"))
    assert (tmp_path / "pack.partial" / name).read_text() == "mine"


def test_what_macos_puts_into_a_partial_folder_stops_nothing(source, tmp_path):
    (tmp_path / "pack.partial").mkdir()
    for name in (".DS_Store", "._transformer"):
        (tmp_path / "pack.partial" / name).write_bytes(b"x")
    quantize_checkpoint(source, tmp_path / "pack", Quantization.parse("4"))
    assert (tmp_path / "pack" / "model_index.json").is_file()


def test_what_a_model_lacks_cannot_be_quantized(source, tmp_path):
    with pytest.raises(RequestError, match="has no vision"):
        quantize_checkpoint(source, tmp_path / "pack", Quantization.parse("transformer=4,vision=8"))


@pytest.mark.parametrize("quantize", [[4], {"transformer": 4}, 4.0, True])
def test_impossible_quantizations_are_refused(source, quantize):
    with pytest.raises(RequestError, match="quantize"):
        QwenImagePipeline.from_pretrained(source, quantize=quantize)


@pytest.mark.slow
def test_a_pack_is_packed_again(source, tmp_path):
    eight = quantize_checkpoint(source, tmp_path / "eight", Quantization.parse("8"))
    four = quantize_checkpoint(eight, tmp_path / "four", Quantization.parse("4"))
    np.testing.assert_array_equal(generate(four)[0], generate(eight, "4")[0])
    np.testing.assert_array_equal(generate(eight)[0], generate(eight, "8")[0])


@pytest.mark.parametrize("name", ["QwenImageEditPipeline", "QwenImageLayeredPipeline"])
def test_a_processor_that_transformers_5_saved_again_is_kept(tmp_path, name):
    folder = write_checkpoint(tmp_path / "model", WIDE, pipeline=name)
    old = folder / "processor/preprocessor_config.json"
    own = {**json.loads(old.read_text()), "image_std": [0.5, 0.25, 0.125]}
    old.unlink()
    (folder / "processor/processor_config.json").write_text(json.dumps({"image_processor": own}))
    out = quantize_checkpoint(folder, tmp_path / "pack", Quantization.parse("transformer=4"))
    processor = QwenImagePipeline.from_pretrained(out).components.image_processor
    assert processor.image_std == (0.5, 0.25, 0.125)


@pytest.mark.slow
def test_images_models_keep_their_vision_tower(tmp_path):
    configs = {**WIDE, "vision": replace(TINY["vision"], out_hidden_size=128)}
    folder = write_checkpoint(tmp_path / "edit", configs, pipeline="QwenImageEditPlusPipeline")
    out = quantize_checkpoint(folder, tmp_path / "pack", Quantization.parse("transformer=4,vision=8/32"))
    tensors = read_header(next((out / "text_encoder").glob("*.safetensors")))[0]
    assert {name for name in tensors if name.startswith("visual.")}
    assert (out / "processor/preprocessor_config.json").is_file()
    image = np.zeros((64, 64, 3), np.uint8)
    packed, running = (
        pipeline.encode_guidance_prompts("x", images=[image], reference_pixels=4096).positive
        for pipeline in (
            QwenImagePipeline.from_pretrained(out),
            QwenImagePipeline.from_pretrained(folder, quantize="transformer=4,vision=8/32"),
        )
    )
    assert mx.array_equal(packed, running)


@pytest.mark.parametrize(("arguments", "says"), [
    (["--bits", "7"], "'7'"),
    (["--bits", "none"], "nothing is to be quantized"),
    (["--bits", "4", "--group-size", "48"], "not of 48"),
    ([], "--bits"),
])  # fmt: skip
def test_bad_requests(source, tmp_path, capsys, arguments, says):
    assert main(["quantize", str(source), str(tmp_path / "pack"), *arguments]) == 2
    assert says in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_folder_that_exists_is_never_touched(source, tmp_path):
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack" / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match="exists already"):
        quantize_checkpoint(source, tmp_path / "pack", Quantization.parse("4"))
    assert [path.name for path in (tmp_path / "pack").iterdir()] == ["mine.txt"]
    with pytest.raises(RequestError, match="nothing"):
        quantize_checkpoint(source, tmp_path / "other", Quantization())


@pytest.fixture(scope="module")
def small(source, tmp_path_factory):
    return quantize_checkpoint(source, tmp_path_factory.mktemp("small") / "pack", Quantization.parse("8/32"))


# What is done to one weight's packed parts, (weight, scales, biases) each or None, and what is said of it.
DAMAGES = {
    "no scales": (lambda w, s, b: (w, None, b), "packed, without scales"),
    "no biases": (lambda w, s, b: (w, s, None), "packed without biases"),
    "a scale": (lambda w, s, b: (w, mx.array(1.0), b), "do not belong together"),
    "a weight": (lambda w, s, b: (w[0, 0], s, b), "do not belong together"),
    "fewer scales": (lambda w, s, b: (w, s[:-1], b), "do not belong together"),
    "fewer biases": (lambda w, s, b: (w, s, b[:-1]), "do not belong together"),
    "narrow biases": (lambda w, s, b: (w, s, b[:, :1]), "do not belong together"),
    "whole scales": (lambda w, s, b: (w, s.astype(mx.int32), b), "do not belong together"),
    "7 bits": (lambda w, s, b: (w[:, : w.shape[1] * 7 // 8], s, b), "7 bits"),
    "groups of 16": (lambda w, s, b: (w, mx.repeat(s, 2, 1), mx.repeat(b, 2, 1)), "groups of 16"),
    "odd groups": (lambda w, s, b: (w, s[:, :-1], b[:, :-1]), "not in whole bits and groups"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_pack_is_refused(small, tmp_path, damage):
    folder = shutil.copytree(small, tmp_path / "pack")
    (file,) = (folder / "transformer").glob("*.safetensors")
    path, parts = "transformer_blocks.1.attn.to_k", ("weight", "scales", "biases")
    arrays = dict(mx.load(str(file)).items())
    change, says = DAMAGES[damage]
    changed = change(*(arrays.pop(f"{path}.{part}") for part in parts))
    arrays |= {f"{path}.{part}": array for part, array in zip(parts, changed, strict=True) if array is not None}
    mx.save_safetensors(str(file), arrays)
    with pytest.raises(CheckpointError, match=says):
        QwenImagePipeline.from_pretrained(folder).prepare()


def test_two_bits_are_read_though_not_made(small, tmp_path, capsys):
    folder = shutil.copytree(small, tmp_path / "pack")
    (file,) = (folder / "transformer").glob("*.safetensors")
    path = "transformer_blocks.1.attn.to_k"
    arrays = dict(mx.load(str(file)).items())
    packed = mx.quantize(mx.random.normal((128, 128)), 64, 2)
    arrays |= {f"{path}.{part}": array for part, array in zip(("weight", "scales", "biases"), packed, strict=True)}
    mx.save_safetensors(str(file), arrays)
    assert main(["info", str(folder)]) == 0
    assert "packed 2/64" in capsys.readouterr().out
    generate(folder)


@pytest.mark.slow
def test_two_runs_into_one_folder_are_kept_apart(source, tmp_path, monkeypatch):
    out, refused = tmp_path / "pack", []
    write = packing.write_component

    def meanwhile(*arguments, **options):
        monkeypatch.setattr(packing, "write_component", write)
        with pytest.raises(RequestError, match="another run"):
            quantize_checkpoint(source, out, Quantization.parse("8"))
        refused.append(True)
        return write(*arguments, **options)

    monkeypatch.setattr(packing, "write_component", meanwhile)
    quantize_checkpoint(source, out, Quantization.parse("4"))
    assert refused
    np.testing.assert_array_equal(generate(out)[0], generate(source, "4")[0])
    assert [path.name for path in tmp_path.iterdir()] == ["pack"]


def test_a_failed_write_is_said_once(source, tmp_path, monkeypatch):
    def full(*_):
        raise RuntimeError("[save_safetensors] no space left")

    monkeypatch.setattr(mx, "save_safetensors", full)
    with pytest.raises(OutputError) as refusal:
        quantize_checkpoint(source, tmp_path / "pack", Quantization.parse("4"))
    assert str(refusal.value).count("could not be written") == 1
    assert str(refusal.value).endswith("run again to continue")


def test_nothing_is_left_where_there_is_no_space(source, tmp_path, monkeypatch):
    monkeypatch.setattr(packing.shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 20))
    monkeypatch.setattr(packing, "write_component", lambda *_, **__: pytest.fail("work was done"))
    with pytest.raises(OutputError, match="has 1 MB left, but the result takes 70 MB"):
        quantize_checkpoint(source, tmp_path / "deep" / "pack", Quantization.parse("4"))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_packing_a_pack_is_done_and_said(small, tmp_path, caplog):
    folder = quantize_checkpoint(small, tmp_path / "pack", Quantization.parse("4/32"))
    assert "is packed 8/32 already" in caplog.text
    assert "(F32, packed 8/32), with quantized weights" in (folder / "README.md").read_text()
    generate(folder)
