"""LoRAs in the pipeline: the reference's pixels, the same from every dialect, merged or unmerged, packed or not."""

from __future__ import annotations

import json
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from lora_files import DIALECTS, MODULATION, TARGETS, write_lora

from qwen_image_mlx import CheckpointError, GenerationParameters, QwenImagePipeline, RequestError
from qwen_image_mlx.cli.main import main
from qwen_image_mlx.images.pixels import to_images
from qwen_image_mlx.lora.branch import SideBranch
from qwen_image_mlx.models.layers import QuantizedLinear
from qwen_image_mlx.pipeline.quantize_checkpoint import quantize_checkpoint
from qwen_image_mlx.weights.mapping import expected_tensors
from qwen_image_mlx.weights.schemes import Quantization
from qwen_image_mlx.weights.synthetic import ROWS, TINY, write_checkpoint

REQUEST = {"prompt": "a fox", "negative_prompt": "blurry", "width": 64, "height": 48, "steps": 3, "cfg_scale": 3.0,
           "seed": 5}  # fmt: skip


def shapes_of(config) -> dict[str, tuple[int, ...]]:
    return {n.removesuffix(".weight"): s.shape for n, s in expected_tensors(ROWS["transformer"], config).items()}


@pytest.fixture(scope="module")
def shapes(tiny):
    return QwenImagePipeline.from_pretrained(tiny).components.lora_targets()


def generate(folder, dtype="float32", **options):
    """8-bit image and the pipeline."""
    pipeline = QwenImagePipeline.from_pretrained(folder, dtype=dtype, **options)
    return regenerate(pipeline), pipeline


def regenerate(pipeline):
    encoding = pipeline.encode_guidance_prompts(REQUEST["prompt"], REQUEST["negative_prompt"])
    parameters = GenerationParameters(width=64, height=48, num_inference_steps=3, cfg_scale=3.0)
    return np.asarray(to_images(pipeline.generate_pixels(parameters, encoding, seed=5))[0]).astype(int)


@pytest.mark.reference
@pytest.mark.parametrize("strength", [1.0, -0.5])
def test_pixels_are_the_reference_s(tiny, shapes, tmp_path, strength):
    from reference import load_reference, run_reference

    file = write_lora(tmp_path / "lora.safetensors", shapes, targets=[*TARGETS, *MODULATION])
    reference = load_reference(tiny)
    reference.load_lora_weights(file, adapter_name="one")
    reference.set_adapters(["one"], [strength])
    expected = np.asarray(run_reference(reference, **REQUEST).image).astype(int)
    plain, _ = generate(tiny)
    for mode in ("auto", "merge", "side"):
        ours, _ = generate(tiny, loras=[(file, strength)], lora_mode=mode)
        assert np.abs(ours - expected).max() <= 1
    assert np.abs(plain - expected).max() > 8


@pytest.mark.slow
@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_dialect_gives_the_same_pixels(tiny, shapes, tmp_path, dialect):
    one, other = (write_lora(tmp_path / f"{name}.safetensors", shapes, name) for name in ("peft", dialect))
    np.testing.assert_array_equal(generate(tiny, loras=[str(one)])[0], generate(tiny, loras=[str(other)])[0])


@pytest.mark.reference
def test_several_loras_add_up(tiny, shapes, tmp_path):
    from reference import load_reference, run_reference

    files = [write_lora(tmp_path / f"{n}.safetensors", shapes, seed=n, targets=TARGETS[n:]) for n in range(2)]
    references = [f"{files[0]}@0.7", f"{files[1]}@-0.4"]
    reference = load_reference(tiny)
    for n, file in enumerate(files):
        reference.load_lora_weights(file, adapter_name=f"n{n}")
    reference.set_adapters(["n0", "n1"], [0.7, -0.4])
    expected = np.asarray(run_reference(reference, **REQUEST).image).astype(int)
    for mode in ("merge", "side"):
        ours, pipeline = generate(tiny, loras=references, lora_mode=mode)
        assert np.abs(ours - expected).max() <= 1
    layer = pipeline.components.network("transformer").transformer_blocks[1].attn.to_q
    assert type(layer) is SideBranch
    assert layer.a.shape[0] == 8, "one branch of both ranks"


WIDE = {**TINY, "transformer": replace(TINY["transformer"], num_attention_heads=4)}
WIDE_SHAPES = shapes_of(WIDE["transformer"])


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("wide") / "model", WIDE, dtype=mx.float32)


@pytest.fixture(scope="module")
def pack(wide, tmp_path_factory):
    return quantize_checkpoint(wide, tmp_path_factory.mktemp("pack") / "model", Quantization.parse("transformer=4"))


def kinds(pipeline):
    return {name: type(m) for name, m in pipeline.components.network("transformer").named_modules() if name in TARGETS}


@pytest.mark.slow
def test_a_packed_base_runs_loras_beside_it(wide, pack, tmp_path, caplog):
    caplog.set_level("INFO")
    file = write_lora(tmp_path / "lora.safetensors", WIDE_SHAPES)
    beside, pipeline = generate(pack, loras=[str(file)])
    assert set(kinds(pipeline).values()) == {SideBranch}
    assert "running unmerged with 9 matrices" in caplog.text
    merged_first, running = generate(wide, loras=[str(file)], quantize="transformer=4")
    assert set(kinds(running).values()) == {QuantizedLinear}
    exact, _ = generate(wide, loras=[str(file)])
    without, _ = generate(pack)
    change = np.abs(exact - without).mean()
    for image in (beside, merged_first):
        assert np.abs(image - exact).mean() < 0.5 * change
    with pytest.raises(CheckpointError, match="packing them again would lose it"):
        QwenImagePipeline.from_pretrained(pack, loras=[str(file)], lora_mode="merge").prepare()
    name = "transformer_blocks.0.attn.to_q"
    whole = {f"{name}.diff": mx.ones(WIDE_SHAPES[name]) * 0.01}
    mx.save_safetensors(str(tmp_path / "whole.safetensors"), whole)
    with pytest.raises(CheckpointError, match=r"whole\.safetensors cannot run unmerged with packed weights"):
        pipeline.set_loras([str(tmp_path / "whole.safetensors")])
    np.testing.assert_array_equal(regenerate(pipeline), beside)
    broken = {key: value * mx.nan for key, value in mx.load(str(file)).items()}
    mx.save_safetensors(str(tmp_path / "nan.safetensors"), broken)
    with pytest.raises(CheckpointError, match="NaN"):
        pipeline.set_loras([str(tmp_path / "nan.safetensors")])
    np.testing.assert_array_equal(regenerate(pipeline), beside)
    for odd in ([5], [(str(file),)], [[str(file), 1]]):
        with pytest.raises(RequestError, match="a LoRA is"):
            pipeline.set_loras(odd)


@pytest.mark.slow
def test_a_lora_at_strength_nothing_changes_nothing(tiny, shapes, tmp_path):
    file = write_lora(tmp_path / "lora.safetensors", shapes)
    for mode in ("auto", "merge", "side"):
        np.testing.assert_array_equal(generate(tiny, loras=[f"{file}@0"], lora_mode=mode)[0], generate(tiny)[0])


@pytest.mark.slow
def test_changes_too_small_for_bf16_run_beside_it(wide, tmp_path, caplog):
    """As Lightning's, which are below half a unit in the last place of most weights."""
    caplog.set_level("INFO")
    folder = write_checkpoint(tmp_path / "bf16", WIDE)
    large, small = (write_lora(tmp_path / f"{size}.safetensors", WIDE_SHAPES, size=size) for size in (0.3, 0.0005))
    _, pipeline = generate(folder, dtype="bfloat16", loras=[str(large)])
    assert SideBranch not in kinds(pipeline).values()
    assert pipeline.components.placement.share_kept > 0.99
    assert "merged into 9 matrices; 100.0% of the change is in the stored weights" in caplog.text
    _, pipeline = generate(folder, dtype="bfloat16", loras=[str(small)])
    assert set(kinds(pipeline).values()) == {SideBranch}
    caplog.clear()
    _, pipeline = generate(folder, dtype="bfloat16", loras=[str(small)], lora_mode="merge")
    assert pipeline.components.placement.share_kept < 0.9
    assert next(r for r in caplog.records if "merged into" in r.getMessage()).levelname == "WARNING"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("base", "mode", "kept"), [("pack", "auto", True), ("wide", "side", True), ("wide", "auto", False)]
)
def test_loras_are_swapped(request, base, mode, kept, tmp_path):
    folder = request.getfixturevalue(base)
    files = [
        str(write_lora(tmp_path / f"{n}.safetensors", WIDE_SHAPES, seed=n, targets=TARGETS[n:] + MODULATION))
        for n in range(2)
    ]
    images = {n: generate(folder, loras=[files[n]], lora_mode=mode)[0] for n in range(2)}
    plain, pipeline = generate(folder)
    transformer = pipeline.components.network("transformer")
    pipeline.set_loras([files[0]], mode)
    assert pipeline.is_transformer_loaded == kept
    np.testing.assert_array_equal(regenerate(pipeline), images[0])
    pipeline.set_loras([files[1]], mode)
    np.testing.assert_array_equal(regenerate(pipeline), images[1])
    assert (pipeline.components.network("transformer") is transformer) == kept
    with pytest.raises(RequestError):
        pipeline.set_loras(["none.safetensors"])
    np.testing.assert_array_equal(regenerate(pipeline), images[1])
    pipeline.set_loras([])
    np.testing.assert_array_equal(regenerate(pipeline), plain)


@pytest.mark.slow
def test_loras_are_taken_away_when_their_files_are_gone(pack, tmp_path):
    file = write_lora(tmp_path / "lora.safetensors", WIDE_SHAPES)
    plain, pipeline = generate(pack)
    pipeline.set_loras([str(file)])
    assert not np.array_equal(regenerate(pipeline), plain)
    file.unlink()
    pipeline.set_loras([])
    assert pipeline.is_transformer_loaded
    np.testing.assert_array_equal(regenerate(pipeline), plain)


@pytest.mark.reference
def test_strengths_are_recorded_to_the_last_digit(tiny, shapes, tmp_path):
    file = write_lora(tmp_path / "lora.safetensors", shapes)
    _, pipeline = generate(tiny, loras=[(file, 0.123456789012345)])
    (reference,) = pipeline.components.adapters.references
    assert float(reference.rpartition("@")[2]) == 0.123456789012345


def test_what_bound_is_said(tiny, shapes, tmp_path, caplog):
    caplog.set_level("INFO")
    file = write_lora(tmp_path / "style.safetensors", shapes)
    tensors = {
        **mx.load(str(file)),
        "stranger.lora_A.weight": mx.ones((4, 8)),
        "stranger.lora_B.weight": mx.ones((8, 4)),
    }
    mx.save_safetensors(str(file), tensors)
    generate(tiny, loras=[f"{file}@0.5"])
    matrices = sum(len(shape) == 2 for shape in shapes.values())
    assert f"LoRA style.safetensors at 0.5: changes 9 of {matrices} matrices" in caplog.text
    warning = next(record for record in caplog.records if record.levelname == "WARNING")
    assert "stranger.lora_A.weight" in warning.getMessage()


# --- the command line -----------------------------------------------------------------------------------------------


@pytest.fixture
def run(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def call(*arguments, model=tiny):
        usual = ["--model", str(model), "--dtype", "float32", "--width", "64", "--height", "48", "--seed", "5"]
        code = main(["generate", "a fox", *usual, *map(str, arguments)])
        out, err = capsys.readouterr()
        return code, out.splitlines(), err

    return call


def recorded(path):
    from PIL import Image

    return json.loads(Image.open(path).text["qwen_image_mlx"])


@pytest.mark.slow
def test_lightning_sets_the_schedule_and_yields_to_flags(run, shapes, tmp_path):
    write_lora(tmp_path / "Fox-Lightning-4steps-V1.0.safetensors", shapes)
    code, (path,), err = run("--lora", "Fox-Lightning-4steps-V1.0.safetensors")
    assert code == 0, err
    assert "4 steps, guidance 1 and a static shift of 3" in err
    metadata = recorded(path)
    assert (metadata["steps"], metadata["cfg_scale"], metadata["shift"]) == (4, 1.0, 3.0)
    assert metadata["loras"] == ["Fox-Lightning-4steps-V1.0.safetensors@1"]
    _, (again,), _ = run("--from-image", path, "-o", "again.png")
    assert path != again
    assert (tmp_path / path).read_bytes() == (tmp_path / again).read_bytes()
    _, (other,), _ = run(
        "--lora", "Fox-Lightning-4steps-V1.0.safetensors", "--steps", "2", "--cfg-scale", "1.5", "-o", "o.png"
    )
    assert (recorded(other)["steps"], recorded(other)["cfg_scale"]) == (2, 1.5)


@pytest.mark.parametrize(("flags", "says"), [
    (["--lora", "none.safetensors"], "none.safetensors does not exist"),
    (["--lora", "lora.safetensors@much"], "not a number"),
    (["--lora", "lora.pt"], "pickle"),
    (["--lora", "cut.safetensors"], "cut.safetensors"),
    (["--lora", "other.safetensors"], "made for FLUX"),
    (["--lora", "nan.safetensors"], "NaN"),
    (["--lora", "shape.safetensors"], "attn.to_q"),
    (["--lightning", "4"], "no official Lightning LoRA"),
    (["--lora-mode", "both"], "--lora-mode"),
])  # fmt: skip
def test_bad_loras(run, shapes, tmp_path, flags, says):
    whole = write_lora(tmp_path / "lora.safetensors", shapes)
    (tmp_path / "lora.pt").write_bytes(b"pickle")
    (tmp_path / "cut.safetensors").write_bytes(whole.read_bytes()[:-100])
    name = "transformer_blocks.0.attn.to_q"
    for file, tensors in {
        "other": {
            f"double_blocks.0.{name}.lora_A.weight": mx.ones((4, 8)),
            f"double_blocks.0.{name}.lora_B.weight": mx.ones((8, 4)),
        },
        "nan": {
            f"{name}.lora_A.weight": mx.full((4, shapes[name][1]), mx.nan),
            f"{name}.lora_B.weight": mx.ones((shapes[name][0], 4)),
        },
        "shape": {f"{name}.lora_A.weight": mx.ones((4, 7)), f"{name}.lora_B.weight": mx.ones((8, 4))},
    }.items():
        mx.save_safetensors(str(tmp_path / f"{file}.safetensors"), tensors)
    before = sorted(tmp_path.iterdir())
    code, out, err = run("--steps", "1", *flags)
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert (code, out) == (2, [])
    assert says in line
    assert "Traceback" not in err
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("loras", [5, 1.5])
def test_loras_that_are_no_list_are_refused(tiny, loras):
    with pytest.raises(RequestError, match="list of references"):
        QwenImagePipeline.from_pretrained(tiny).set_loras(loras)


def test_a_image_finds_its_lora_beside_it(run, shapes, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    write_lora(tmp_path / "fox.safetensors", shapes)
    _, (path,), _ = run("--lora", "fox.safetensors@0.7", "--steps", "1")
    image = (tmp_path / path).read_bytes()
    monkeypatch.chdir(tmp_path / "elsewhere")
    code, (again,), err = run("--from-image", f"../{path}", "-o", "again.png")
    assert code == 0, err
    assert recorded(again)["loras"] == ["../fox.safetensors@0.7"]
    from PIL import Image

    np.testing.assert_array_equal(np.asarray(Image.open(again)), np.asarray(Image.open(tmp_path / path)))
    assert (tmp_path / path).read_bytes() == image


def test_what_cannot_run_beside_packed_weights_is_refused_before_any_work(pack, tmp_path, monkeypatch):
    name = "transformer_blocks.0.attn.to_q"
    out, width = QwenImagePipeline.from_pretrained(pack).components.lora_targets()[name]
    tensors = {
        f"{name}.lora_A.weight": mx.ones((4, width)),
        f"{name}.lora_B.weight": mx.ones((out, 4)),
        f"{name}.lora_magnitude_vector": mx.ones((out,)),
    }
    mx.save_safetensors(str(tmp_path / "dora.safetensors"), tensors)
    pipeline = QwenImagePipeline.from_pretrained(pack, loras=[tmp_path / "dora.safetensors"])
    monkeypatch.setattr(pipeline, "encode_guidance_prompts", lambda *_, **__: pytest.fail("work was done"))
    with pytest.raises(CheckpointError, match="cannot run unmerged with packed weights"):
        pipeline.generate("a fox", width=64, height=48, num_inference_steps=1)


def test_infinite_loras_are_refused_before_any_work(tiny, shapes, tmp_path, monkeypatch):
    name = "transformer_blocks.0.attn.to_q"
    tensors = {f"{name}.lora_A.weight": mx.ones((4, shapes[name][1])),
               f"{name}.lora_B.weight": mx.full((shapes[name][0], 4), mx.nan)}  # fmt: skip
    mx.save_safetensors(str(tmp_path / "nan.safetensors"), tensors)
    pipeline = QwenImagePipeline.from_pretrained(tiny, loras=[tmp_path / "nan.safetensors"])
    with pytest.raises(CheckpointError, match="NaN"):
        pipeline.prepare()


def test_each_load_counts_anew(tiny, shapes, tmp_path, caplog):
    caplog.set_level("INFO")
    file = write_lora(tmp_path / "lora.safetensors", shapes, targets=[*TARGETS, *MODULATION])
    pipeline = QwenImagePipeline.from_pretrained(tiny, dtype="float32", loras=[file])
    for _ in range(2):
        regenerate(pipeline)
        pipeline.release_transformer()
    said = [record.getMessage() for record in caplog.records]
    assert sum(f"merged into {len(TARGETS)} matrices" in line for line in said) == 2
    assert sum(f"the other {len(MODULATION)} are merged where the modulation is made" in line for line in said) == 2


def test_a_bias_for_what_has_none_does_nothing_and_is_said(tiny, shapes, tmp_path, caplog):
    norm, layer = "transformer_blocks.0.attn.norm_q", "transformer_blocks.0.attn.to_q"
    odd = {f"diffusion_model.{norm}.diff_b": mx.ones(shapes[norm])}
    mx.save_safetensors(str(tmp_path / "odd.safetensors"), odd)
    with pytest.raises(CheckpointError, match="norm_q"):
        QwenImagePipeline.from_pretrained(tiny, loras=[tmp_path / "odd.safetensors"]).prepare()
    both = odd | {f"diffusion_model.{layer}.diff_b": mx.ones(shapes[layer][:1])}
    mx.save_safetensors(str(tmp_path / "both.safetensors"), both)
    caplog.set_level("INFO")
    QwenImagePipeline.from_pretrained(tiny, loras=[tmp_path / "both.safetensors"]).prepare()
    assert "changes 0 of 34 matrices and 1 biases" in caplog.text
    assert f"belong to nothing in this model and do nothing: diffusion_model.{norm}.diff_b" in caplog.text
