"""Files of Qwen-Image-2.1 by other programs generate what the same numbers generate in the released layout."""

from __future__ import annotations

import json
import shutil

import foreign_names
import mlx.core as mx
import numpy as np
import pytest
from checkpoints import merged
from checkpoints_21 import TINY_TEXT_ENCODER, values_21
from PIL import Image

from qwen_image_mlx import CheckpointError, GenerationParameters, QwenImagePipeline
from qwen_image_mlx.cli.main import main
from qwen_image_mlx.pipeline.conditioning import GuidanceEncoding
from qwen_image_mlx.weights.synthetic import TINY, write_checkpoint

pytestmark = pytest.mark.slow

PARAMETERS = GenerationParameters(width=64, height=32, num_inference_steps=1, cfg_scale=1.0)
PHOTO = Image.linear_gradient("L").resize((64, 64)).convert("RGB")
TRANSFORMER = {name: mx.array(value) for name, value in values_21("transformer").items()}
# The layers of the vision tower that are tapped are those of Qwen3-VL-8B, by which llama.cpp names its mergers.
TAPPED = merged(TINY_TEXT_ENCODER, {"vision_config": {"depth": 17, "deepstack_visual_indexes": [8, 16]}})


def fused(tensors):
    """A transformer's tensors as ComfyUI has them."""
    names = foreign_names.fused_21(tensors)
    return {whole: mx.concatenate([tensors[name] for name in parts]) for whole, parts in names.items()}


def packed(tensors):
    """Matrices of the blocks packed by MLX in 8 bits; and the numbers they stand for."""
    written, numbers = {}, {}
    for name, tensor in tensors.items():
        if tensor.ndim == 2 and "transformer_blocks" in name:
            parts = mx.quantize(tensor, 32, 8)
            words = ("weight", "scales", "biases")
            written |= {name.removesuffix("weight") + word: part for word, part in zip(words, parts, strict=True)}
            numbers[name] = mx.dequantize(*parts, 32, 8)
        else:
            written[name] = numbers[name] = tensor
    return written, numbers


def released(tensors):
    """The tensors by their released names: those that are fused taken apart."""
    found = {}
    for whole, parts in foreign_names.fused_21(TRANSFORMER).items():
        found |= dict(zip(parts, mx.split(tensors[whole], len(parts)), strict=True))
    return found


def save(path, tensors):
    path.parent.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(str(path), tensors)
    return path


def edited(folder, **options):
    """Latents of an edit, for which all parts are used."""
    pipeline = QwenImagePipeline.from_pretrained(folder, dtype="float32", **options)
    encoding = pipeline.encode_guidance_prompts("a fox", images=[PHOTO])
    return np.array(pipeline.denoise_latents(PARAMETERS, encoding, seed=1))


@pytest.fixture(scope="module")
def generate(tiny_21):
    """Latents of the checkpoint with other files for its transformer."""
    states = np.random.default_rng(0).standard_normal((1, 7, 64)).astype(np.float32)
    encoding = GuidanceEncoding(mx.array(states))

    def run(**options):
        pipeline = QwenImagePipeline.from_pretrained(tiny_21, dtype="float32", **options)
        return np.array(pipeline.denoise_latents(PARAMETERS, encoding, seed=1))

    return run


@pytest.fixture(scope="module")
def expected(generate):
    return generate()


@pytest.mark.parametrize("prefix", foreign_names.PREFIXES)
def test_a_fused_single_file_is_the_released_transformer(generate, expected, tmp_path, prefix):
    written = {prefix + name: tensor for name, tensor in fused(TRANSFORMER).items()}
    file = save(tmp_path / "qwen_image_2.1.safetensors", written)
    np.testing.assert_array_equal(generate(transformer=file), expected)
    if not prefix:
        streamed = generate(transformer=file, streamed=("transformer",))
        np.testing.assert_array_equal(streamed, expected)


def test_a_fused_file_packed_by_mlx(generate, expected, tmp_path):
    written, numbers = packed(fused(TRANSFORMER))
    file = save(tmp_path / "fused.safetensors", written)
    dense = save(tmp_path / "dense.safetensors", released(numbers))
    found, wanted = generate(transformer=file), generate(transformer=dense)
    np.testing.assert_allclose(found, wanted, atol=2e-4)
    assert np.abs(found - expected).max() > 1e-3


@pytest.mark.reference
@pytest.mark.parametrize("form", ["fp8", "weight_scale", "scale of rows"])
def test_comfy_s_fp8_files(generate, tmp_path, form):
    import foreign
    import torch

    tensors = {name: torch.from_numpy(np.array(tensor)) for name, tensor in fused(TRANSFORMER).items()}
    written, numbers = foreign.COMFY[form](tensors)
    file = foreign.save(tmp_path / "fp8.safetensors", written)
    dense = released({name: mx.array(value.numpy()) for name, value in numbers.items()})
    wanted = generate(transformer=save(tmp_path / "dense.safetensors", dense))
    np.testing.assert_array_equal(generate(transformer=file), wanted)


@pytest.mark.slow
def test_an_all_in_one_file_gives_each_part(tiny_21, tmp_path):
    parts = {part: mx.load(str(next((tiny_21 / part).glob("*.safetensors")))) for part in ("text_encoder", "vae")}
    flat = {name.replace("model.language_model.", "model.").replace("model.visual.", "visual."): tensor
            for name, tensor in parts["text_encoder"].items()}  # fmt: skip
    bundle = {f"model.diffusion_model.{name}": tensor for name, tensor in fused(TRANSFORMER).items()}
    bundle |= {f"text_encoders.qwen3vl_8b.transformer.{name}": tensor for name, tensor in flat.items()}
    bundle |= {f"vae.{name}": tensor for name, tensor in parts["vae"].items()}
    file = save(tmp_path / "all.safetensors", bundle)
    given = dict.fromkeys(("transformer", "text_encoder", "vae"), file)
    np.testing.assert_array_equal(edited(tiny_21, **given), edited(tiny_21))


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A checkpoint of 1.x with every part: it edits."""
    return write_checkpoint(
        tmp_path_factory.mktemp("first") / "model", TINY, pipeline="QwenImageEditPlusPipeline", dtype=mx.float32
    )


@pytest.mark.parametrize("part", ["transformer", "text_encoder", "vae"])
def test_a_file_of_the_other_generation_is_refused_by_its_name(tiny_21, first, part):
    (old,), (new,) = (list((folder / part).glob("*.safetensors")) for folder in (first, tiny_21))
    with pytest.raises(CheckpointError, match=r"holds .*Qwen-Image 1\.x, not an? .* of Qwen-Image-2\.1: give"):
        QwenImagePipeline.from_pretrained(tiny_21, **{part: old}).prepare()
    with pytest.raises(CheckpointError, match=r"holds .*Qwen-Image-2\.1, not an? .* of Qwen-Image 1\.x: give"):
        QwenImagePipeline.from_pretrained(first, **{part: new}).prepare()


def test_single_files_are_described(tiny_21, tmp_path, capsys):
    save(tmp_path / "fused.safetensors", {f"diffusion_model.{n}": t for n, t in fused(TRANSFORMER).items()})
    files = {"transformer": tmp_path / "fused.safetensors"}
    files |= {part: next((tiny_21 / part).glob("*.safetensors")) for part in ("text_encoder", "vae")}
    for part, file in files.items():
        assert main(["info", str(file), "--json"]) == 0
        said = json.loads(capsys.readouterr().out)
        assert (said["kind"], said["generation"]) == (part, "Qwen-Image-2.1")


# --- GGUF ------------------------------------------------------------------------------------------------------------


def test_full_size_names_of_llama_cpp_lead_back():
    from checkpoints_21 import NETWORKS, REAL_TEXT_ENCODER

    from qwen_image_mlx.registry import component_of
    from qwen_image_mlx.weights.mapping import canonical_names, dialect_of, expected_tensors, known_share

    for network in ("text_encoder", "vision"):
        name, config, _ = NETWORKS[network]
        names = expected_tensors(component_of(name), config.from_dict(REAL_TEXT_ENCODER))
        spelled = {foreign_names.llama_name_21(name): name for name in names}
        assert canonical_names(component_of(name), spelled) == spelled
        assert dialect_of(component_of(name), spelled) == "llama.cpp"
        assert known_share(component_of(name), spelled) == 1


@pytest.mark.reference
@pytest.mark.parametrize("word", ["F16", "Q8_0", "Q4_0"])
def test_gguf_transformers(generate, tmp_path, word):
    import foreign
    import torch

    tensors = {name: torch.from_numpy(np.array(tensor)) for name, tensor in fused(TRANSFORMER).items()}
    numbers = foreign.write_gguf(tmp_path / "model.gguf", tensors, word)
    dense = released({name: mx.array(value.numpy()) for name, value in numbers.items()})
    wanted = generate(transformer=save(tmp_path / "dense.safetensors", dense))
    found = generate(transformer=tmp_path / "model.gguf")
    np.testing.assert_allclose(found, wanted, atol=2e-4 if word.startswith("Q") else 0)


@pytest.mark.reference
def test_text_encoders_of_llama_cpp_with_their_vision_tower(tiny_21, tmp_path):
    import foreign

    folder = tmp_path / "model"
    shutil.copytree(tiny_21, folder)
    tensors = {n: mx.array(v) for part in ("text_encoder", "vision") for n, v in values_21(part, TAPPED).items()}
    save(folder / "text_encoder" / "model.safetensors", tensors)
    (folder / "text_encoder" / "config.json").write_text(json.dumps(TAPPED))
    whole = foreign.read(folder / "text_encoder")
    parts = {v: {n: t for n, t in whole.items() if ("visual." in n) == v} for v in (False, True)}
    file = tmp_path / "Qwen3VL-8B-Instruct-F32.gguf"
    foreign.write_llama(file, parts[False], spell=foreign_names.llama_name_21)
    wanted = edited(folder)
    np.testing.assert_array_equal(edited(folder, text_encoder=file), wanted)
    mmproj = tmp_path / "mmproj-Qwen3VL-8B-Instruct-F32.gguf"
    foreign.write_llama(mmproj, parts[True], split=False, spell=foreign_names.llama_name_21)
    np.testing.assert_array_equal(edited(folder, text_encoder=file), wanted)
    foreign.write_llama(mmproj, {n: t * 2 for n, t in parts[True].items()}, split=False,
                        spell=foreign_names.llama_name_21)  # fmt: skip
    assert not np.array_equal(edited(folder, text_encoder=file), wanted), "the tower beside it is read"
