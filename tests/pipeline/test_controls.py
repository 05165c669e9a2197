"""ControlNets without torch: what runs and what does not, records, memory, and refusals."""

from __future__ import annotations

import json
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from commands import error_line
from control_files import BLOCKWISE, FUN, FUN_21, INSTANTX, half_mask, picture, write_control

from qwen_image_mlx import Control, GenerationParameters, QwenImagePipeline, RequestError
from qwen_image_mlx.cli.main import main
from qwen_image_mlx.images.files import read_metadata
from qwen_image_mlx.images.pixels import to_images
from qwen_image_mlx.pipeline.conditioning import Reference
from qwen_image_mlx.pipeline.control import CONTROL_KINDS, controls_of
from qwen_image_mlx.pipeline.control_networks import condition_tokens, open_control
from qwen_image_mlx.pipeline.identify import identify
from qwen_image_mlx.pipeline.reporter import Reporter
from qwen_image_mlx.registry import CONTROLS, TRANSFORMER, resolve
from qwen_image_mlx.runtime.memory_plan import Work, make_plan
from qwen_image_mlx.runtime.residency import RESIDENCIES
from qwen_image_mlx.weights.mapping import UNUSED, expected_tensors, weights_map
from qwen_image_mlx.weights.recognize import family_of
from qwen_image_mlx.weights.safetensors_files import component_tensors, save_tensors
from qwen_image_mlx.weights.synthetic import TINY, write_checkpoint

SIZE = 64, 48
PARAMETERS = GenerationParameters(width=64, height=48, num_inference_steps=2, cfg_scale=2.0)
FAMILIES = {  # layers, extra condition channels
    "residuals": (INSTANTX, 1, 0), "inpainting": (INSTANTX, 2, 1), "fun": (FUN, 1, 17),
    "block-wise": (BLOCKWISE, 2, 0), "block-wise inpainting": (BLOCKWISE, 2, 1),
}  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("controls") / "tiny", TINY)


@pytest.fixture(scope="module")
def files(tiny):
    folder = tiny.parent
    picture(80, 70).save(folder / "photo.png")
    half_mask(80, 70).save(folder / "mask.png")
    made = {}
    for title, (name, layers, extra) in FAMILIES.items():
        made[title] = write_control(folder / f"{title}.safetensors", tiny, name, layers=layers, extra=extra)
    return made


@pytest.fixture(scope="module")
def opened(tiny):
    pipeline = QwenImagePipeline.from_pretrained(tiny, dtype="float32")
    return pipeline, pipeline.encode_guidance_prompts("a fox", " ")


def control(files, title, **said):
    said |= {"mask": half_mask(80, 70)} if "inpainting" in title else {}
    return Control(files[title], picture(80, 70), **said)


def latents(opened, *controls, **said):
    pipeline, encoding = opened
    return np.array(pipeline.denoise_latents(PARAMETERS, encoding, controls=pipeline.encode_controls(controls, SIZE)))


@pytest.fixture(scope="module")
def plain(opened):
    return latents(opened)


@pytest.mark.parametrize("title", FAMILIES)
def test_a_control_has_an_effect_that_grows_with_its_scale(opened, files, plain, title):
    whole, slight = (latents(opened, control(files, title, scale=scale)) for scale in (1.0, 0.1))
    assert 0 < np.abs(slight - plain).max() < np.abs(whole - plain).max()


@pytest.mark.parametrize(("said", "encoded"), [
    ({"scale": 0}, 0), ({"start": 0.5, "end": 0.5}, 0), ({"start": 0.1, "end": 0.4}, 1),
])  # fmt: skip
def test_without_effect_nothing_runs(opened, files, plain, said, encoded):
    """No image is encoded or no network loaded, and the bits are those of no control."""
    pipeline, _ = opened
    role = open_control(pipeline.components, Reporter(), control(files, "residuals"))
    pipeline.components.release(role)
    assert len(pipeline.encode_controls([control(files, "residuals", **said)], SIZE)) == encoded
    assert np.array_equal(latents(opened, control(files, "residuals", **said)), plain)
    assert not pipeline.components.is_loaded(role)


def test_a_window_is_that_of_diffusers(opened, files, monkeypatch):
    """In two steps the second half is the second step."""
    pipeline, _ = opened
    (made,) = pipeline.encode_controls([control(files, "residuals", start=0.5)], SIZE)
    assert [made.runs(n, 2) for n in (0, 1)] == [False, True]
    (made,) = pipeline.encode_controls([control(files, "residuals", start=0.2, end=0.7)], SIZE)
    assert [made.runs(n, 4) for n in range(4)] == [False, True, False, False]


def test_a_residual_is_computed_once_for_both_passes(opened, files, monkeypatch):
    calls = []
    pipeline, _ = opened
    latents(opened, control(files, "residuals"))
    network = type(
        pipeline.components.network(open_control(pipeline.components, Reporter(), control(files, "residuals")))
    )
    call = network.__call__
    monkeypatch.setattr(network, "__call__", lambda self, *a, **k: calls.append(1) or call(self, *a, **k))
    latents(opened, control(files, "residuals"))
    assert len(calls) == PARAMETERS.num_inference_steps


def test_released_with_the_transformer(opened, files):
    pipeline, _ = opened
    latents(opened, control(files, "fun"))
    role = open_control(pipeline.components, Reporter(), control(files, "fun"))
    assert pipeline.components.is_loaded(role)
    pipeline.release_transformer()
    assert not pipeline.components.is_loaded(role)
    assert not pipeline.components.kept


@pytest.mark.parametrize("title", ["residuals", "fun", "block-wise"])
def test_streamed_the_bits_are_the_same(opened, files, tiny, title):
    whole = latents(opened, control(files, title))
    streamed = QwenImagePipeline.from_pretrained(tiny, dtype="float32", streamed=["transformer"])
    assert np.array_equal(latents((streamed, opened[1]), control(files, title)), whole)
    assert streamed.components.streams("controlnet")


def test_quantized_with_the_transformer(tiny, files):
    pipeline = QwenImagePipeline.from_pretrained(tiny, dtype="float32", quantize="transformer=8", streamed=())
    role = open_control(pipeline.components, Reporter(), control(files, "residuals"))
    scheme = pipeline.quantization.transformer
    packed = [spec for spec in pipeline.components.weights(role).specs("main") if spec.is_packed_by(scheme)]
    network = pipeline.components.network(role)
    for spec in packed:
        place = network
        for part in spec.name.split(".")[:-1]:
            place = place[int(part)] if isinstance(place, list) else place[part]
        assert "scales" in place, spec.name
    assert packed


def test_the_plan_counts_a_control(tiny, files):
    components = QwenImagePipeline.from_pretrained(tiny, dtype="float32").components
    role = open_control(components, Reporter(), control(files, "fun"))
    before, after = (make_plan(components, Work(64, 48, steps=2, controls=roles)) for roles in ((), (role,)))
    kept = components.control(role).kept_values(components.config(role), 2, 12, 2)
    weights = components.weights(role).resident_bytes("main", mx.float32)
    assert after.stages[2].resident - before.stages[2].resident == weights + 4 * kept
    assert after.disk - before.disk == components.weights(role).nbytes
    bare, streamed = (
        make_plan(components, Work(64, 48, steps=2, controls=roles), RESIDENCIES[-1]) for roles in ((), (role,))
    )
    assert streamed.stages[2].resident < after.stages[2].resident - weights / 2
    moving, unsteered = (plan.stages[2].peak - plan.stages[2].resident for plan in (streamed, bare))
    assert moving - unsteered > weights / 2, "its one layer is read while it works"


def test_what_a_network_is_given(opened, files):
    """Channels of the control image, of where pixels are kept, and of the masked image, in this order."""
    pipeline, _ = opened
    components, encode = pipeline.components, []
    for title in ("residuals", "inpainting", "fun"):
        made = control(files, title)
        role = open_control(components, Reporter(), made)
        encode.append(np.array(condition_tokens(components, role, made, SIZE)))
    shown, inpainted, union = encode
    assert (shown.shape, inpainted.shape, union.shape) == ((1, 12, 64), (1, 12, 68), (1, 12, 132))
    keep = inpainted[0, :, 64:].reshape(3, 4, 2, 2).transpose(0, 2, 1, 3).reshape(6, 8)
    expected = np.ones((6, 8))
    expected[1:, 2:6] = 0  # the mask's box, by nearest latent
    assert np.array_equal(keep[2:], expected[2:])
    assert np.array_equal(union[..., :64], shown), "the control image"
    assert not union[..., 64:].any(), "without a mask nothing is kept, and no image is shown"
    role = open_control(components, Reporter(), control(files, "fun"))
    both = Control(files["fun"], picture(80, 70), mask=half_mask(80, 70), source=picture(80, 70, 1))
    alone = Control(files["fun"], picture(80, 70, 1), mask=half_mask(80, 70))
    both, alone = (np.array(condition_tokens(components, role, made, SIZE)) for made in (both, alone))
    assert np.array_equal(both[..., :64], shown)
    assert not alone[..., :64].any()
    assert np.array_equal(both[..., 64:], alone[..., 64:])
    assert np.array_equal(alone[..., 64:68], inpainted[..., 64:])


@pytest.mark.slow
@pytest.mark.parametrize("title", ["residuals", "fun", "block-wise"])
def test_a_pass_in_parts_has_the_hints_of_a_whole_one(opened, files, title):
    """A step cache that never skips, and one that skips; outside the guidance's interval the prompt alone is run."""
    pipeline, encoding = opened
    made = pipeline.encode_controls([control(files, title)], SIZE)

    def run(**said):
        parameters = GenerationParameters(width=64, height=48, num_inference_steps=10, cfg_scale=2.0, **said)
        return np.array(pipeline.denoise_latents(parameters, encoding, controls=made))

    whole = run()
    assert np.abs(run(step_cache="first-block:0") - whole).max() < 1e-4 * np.abs(whole).max()
    for said in ({"step_cache": "first-block:0.9"}, {"step_cache": "taylorseer"}, {"guidance_interval": "0.3:0.6"}):
        other = run(**said)
        assert np.isfinite(other).all()
        assert not np.array_equal(other, whole)


@pytest.mark.parametrize("method", ["first-block:100", "easycache:100", "taylorseer:9"])
def test_a_step_cache_reuses_nothing_across_the_end_of_a_control(opened, files, method):
    """Caches that leave out all they may compute the step where the control begins and the one after its end."""
    pipeline, encoding = opened
    (made,) = pipeline.encode_controls([control(files, "block-wise", start=0.25, end=0.75)], SIZE)

    def computed(*controls):
        steps, before = [], 0

        def note(progress):
            nonlocal before
            if progress.stage == "denoise" and progress.step:
                steps.extend([progress.step - 1] * (progress.skipped == before))
                before = progress.skipped

        parameters = GenerationParameters(width=64, height=48, num_inference_steps=12, cfg_scale=2.0, step_cache=method)
        pipeline.denoise_latents(parameters, encoding, controls=controls, progress=note)
        return set(steps)

    assert computed(made) >= {0, 3, 9, 11}
    assert 9 not in computed()


# In context -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lora(tiny):
    key = mx.random.key(3)
    factors = {
        f"transformer_blocks.0.attn.to_q.lora_{side}.weight": mx.random.normal(shape, key=key)
        for side, shape in (("A", (2, 96)), ("B", (96, 2)))
    }
    save_tensors(tiny.parent / "context.safetensors", factors, {})
    return tiny.parent / "context.safetensors"


def test_in_context_the_image_is_a_reference_and_the_prompt_says_so(tiny, lora, monkeypatch):
    """The same as the image's latents after the target, with the words before the prompt."""
    pipeline = QwenImagePipeline.from_pretrained(tiny, dtype="float32", loras=[lora])
    asked = {"width": 64, "height": 48, "num_inference_steps": 2, "seed": 3, "progress": False}
    control = Control("in-context", picture(80, 70), kind="gray")
    shown, again, plain = (
        pipeline.generate(prompt, controls=controls, **asked)[0]
        for prompt, controls in (("a fox", [control]), ("Context_Control. a fox", [control]), ("a fox", ()))
    )
    assert np.array_equal(shown, again), "the words are said once"
    assert not np.array_equal(shown, plain)
    record = json.loads(shown.info["qwen_image_mlx"])
    assert record["prompt"] == "Context_Control. a fox"
    assert record["controls"] == [{"controlnet": "in-context", "kind": "gray"}]
    tokens = pipeline.encode_controls([control], SIZE)[0].tokens
    encoding = pipeline.encode_guidance_prompts("Context_Control. a fox")
    parameters = GenerationParameters(width=64, height=48, num_inference_steps=2, cfg_scale=1)
    given = replace(encoding, references=(Reference(tokens, 3, 4),))
    monkeypatch.setattr("qwen_image_mlx.pipeline.generation._check_encoding", lambda *_: None)
    expected = pipeline.generate_pixels(parameters, given, seed=3)
    assert np.array_equal(to_images(expected)[0], shown)


@pytest.mark.parametrize(("said", "sentence"), [
    ({"scale": 0.5}, "no scale, start, end or mask"), ({"end": 0.5}, "no scale, start, end or mask"),
    ({"image": None}, "lacks its image"),
])  # fmt: skip
def test_in_context_is_refused(tiny, lora, said, sentence):
    pipeline = QwenImagePipeline.from_pretrained(tiny, dtype="float32", loras=[lora])
    with pytest.raises(RequestError, match=sentence):
        pipeline.open_controls([Control("in-context", **{"image": picture(8, 8)} | said)])
    plain = QwenImagePipeline.from_pretrained(tiny, dtype="float32")
    with pytest.raises(RequestError, match="needs the LoRA"):
        plain.open_controls([Control("in-context", picture(8, 8))])


# Recognition ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("title", FAMILIES)
def test_told_by_its_tensors(files, title):
    assert family_of(component_tensors([files[title]], None)) == FAMILIES[title][0]


@pytest.mark.parametrize("name", CONTROLS)
def test_every_row_is_whole(name):
    (row,) = CONTROLS[name].components
    rules, config = weights_map(row.map), row.released
    specs = expected_tensors(row, config)
    assert {spec.part for spec in specs.values()} - {UNUSED} == set(row.parts)
    assert {rules["control"]["marker"], rules["control"]["layer"]} <= specs.keys()
    assert all(callable(getattr(resolve(CONTROLS[name].use), method)) for method in ("hint", "kept_values"))
    assert CONTROLS[name].steers
    assert CONTROLS[name].title


@pytest.mark.parametrize("title", FAMILIES)
def test_info_names_it_and_it_is_no_transformer(files, tiny, title, capsys):
    """As a transformer it is refused for what it is."""
    report = identify(files[title])
    assert (report.kind, report.facts["taken by"]) == ("ControlNet", "--controlnet")
    assert "for Qwen-Image" in report.facts["made for"]
    line = error_line(run(capsys, "generate", *ASKED, "--model", str(tiny), "--transformer", str(files[title])))
    assert "holds a ControlNet, not a transformer of Qwen-Image 1.x: give it as one" in line


SIZES = {
    INSTANTX: ({"num_layers": 5}, 1_768_003_584),
    FUN: ({"num_layers": 5, "condition_channels": 132}, 1_756_206_592),
    BLOCKWISE: ({}, 1_133_399_040),
    FUN_21: ({"num_layers": 16}, 3_775_479_808),
}


@pytest.mark.parametrize("name", SIZES)
def test_sizes_of_the_released_ones(name):
    (row,) = CONTROLS[name].components
    said, parameters = SIZES[name]
    specs = expected_tensors(row, row.config(**said))
    assert sum(int(np.prod(spec.shape)) for spec in specs.values()) == parameters


def run(capsys, *words):
    """(exit code, lines of stdout, stderr) of the command line."""
    try:
        code = main(list(words))
    except SystemExit as left:
        code = left.code
    out, err = capsys.readouterr()
    return code, out.splitlines(), err


ASKED = ["a fox", "--steps", "1", "--seed", "1", "-W", "32", "-H", "32", "--dtype", "float32", "--quiet"]


def test_recorded_and_generated_again(tiny, files, capsys, monkeypatch):
    monkeypatch.chdir(tiny.parent)
    words = ["--controlnet", "inpainting.safetensors", "--control-image", "photo.png", "--control-mask", "mask.png",
             "--controlnet", "fun.safetensors", "--control-image", "photo.png", "--control-scale", "0.5",
             "--control-kind", "canny", "--control-end", "1"]  # fmt: skip
    assert run(capsys, "generate", *ASKED, "--model", "tiny", *words, "-o", "one.png")[0] == 0
    assert read_metadata("one.png")["controls"] == [
        {"controlnet": "inpainting.safetensors", "image": "photo.png", "mask": "mask.png"},
        {"controlnet": "fun.safetensors", "image": "photo.png", "scale": 0.5, "kind": "canny"},
    ]
    assert run(capsys, "generate", "--from-image", "one.png", "--quiet", "-o", "two.png")[0] == 0
    pixels = [np.asarray(picture_of(name)) for name in ("one.png", "two.png")]
    assert np.array_equal(*pixels)


def picture_of(name):
    from PIL import Image

    return Image.open(name)


def test_a_line_of_a_file_of_prompts_has_its_own_controls(tiny, files, capsys, monkeypatch):
    monkeypatch.chdir(tiny.parent)
    lines = [{"prompt": "a", "controls": [{"controlnet": "fun.safetensors", "image": "photo.png"}]}, {"prompt": "a"}]
    (tiny.parent / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    words = ["--model", "tiny", "--steps", "1", "--dtype", "float32", "--quiet", "-o", "many", "--aspect", "1:1"]
    monkeypatch.setitem(__import__("qwen_image_mlx.variants").variants.ASPECT_SIZES, "1:1", (32, 32))
    code, out, err = run(capsys, "generate", "--prompts-file", "p.jsonl", *words)
    assert (code, len(out)) == (0, 2), err
    made = {str(read_metadata(path).get("controls")): np.asarray(picture_of(path)) for path in out}
    assert made.keys() == {str(lines[0]["controls"]), "None"}
    steering = ["--controlnet", "fun.safetensors", "--control-image", "photo.png"]
    for controls, more in ((lines[0]["controls"], steering), (None, [])):
        alone = ["a", "--model", "tiny", "--steps", "1", "--dtype", "float32", "--quiet", "--seed", "0", *more]
        _, (path,), _ = run(capsys, "generate", *alone, "-W", "32", "-H", "32", "-o", "alone.png")
        assert np.array_equal(picture_of(path), made[str(controls)])
    lines = [*reversed(lines), {"prompt": "b", "controls": [{"controlnet": "fun.safetensors", "image": "none.png"}]}]
    (tiny.parent / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    line = error_line(run(capsys, "generate", "--prompts-file", "p.jsonl", *words))
    assert line.endswith("p.jsonl, line 3: the image none.png does not exist")
    for control, why in (({"image": "photo.png"}, "a control lacks its controlnet"),
                         ({"controlnet": "fun.safetensors"}, "a control lacks its image"),
                         ({"controlnet": "none.safetensors", "image": "photo.png"}, "does not exist")):  # fmt: skip
        lines[2] = {"prompt": "b", "controls": [control]}
        (tiny.parent / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
        line = error_line(run(capsys, "generate", "--prompts-file", "p.jsonl", *words))
        assert line.startswith("error: p.jsonl, line 3: ")
        assert why in line
    (tiny.parent / "p.txt").write_text("a")
    gone = ["--controlnet", "fun.safetensors", "--control-image", "gone.png"]
    many = ["generate", "--prompts-file", "p.txt", *words, *gone]
    assert error_line(run(capsys, *many)).endswith("error: the image gone.png does not exist")  # of no line
    (tiny.parent / "gone.png").write_bytes((tiny.parent / "photo.png").read_bytes())
    assert run(capsys, *many)[0] == 0
    (tiny.parent / "gone.png").unlink()
    assert run(capsys, *many)[:2] == (0, [])  # there is nothing left to do
    loud = [word for word in words if word != "--quiet"]
    idle = [*loud[:-3], "idle", *loud[-2:], "--controlnet", "fun.safetensors", "--control-image", "photo.png"]
    code, _, err = run(capsys, "generate", "a", "--seeds", "1-2", *idle, "--control-scale", "0")
    assert code == 0
    assert err.count("has no effect: its scale is 0") == 1


BAD = {
    "no network": (["--control-image", "photo.png"], "belongs to a --controlnet"),
    "no image": (["--controlnet", "fun.safetensors"], "a control lacks its image"),
    "twice": (["--controlnet", "fun.safetensors", "--control-scale", "1", "--control-scale", "2"], "is given twice"),
    "a scale": (["--control-scale", "11"], "the control's scale is 11.0"),
    "no number": (["--control-scale", "much"], "--control-scale"),
    "a start": (["--control-start", "2"], "the control's start is 2.0"),
    "the wrong way": (["--control-start", "0.5", "--control-end", "0.2"], "after its end"),
    "a kind": (["--control-kind", "depth"], "--control-kind"),
    "a source alone": (["--control-source", "photo.png"], "no mask"),
    "nowhere": (["--controlnet", "none.safetensors", "--control-image", "photo.png"], "does not exist"),
    "a picture": (["--controlnet", "photo.png", "--control-image", "photo.png"], "not a weights file"),
    "a transformer": (["--controlnet", "tiny/transformer", "--control-image", "photo.png"], "holds a transformer"),
    "a folder": (["--controlnet", "tiny", "--control-image", "photo.png"], "diffusion_pytorch_model"),
    "no picture": (["--controlnet", "fun.safetensors", "--control-image", "fun.safetensors"], "image"),
    "no such picture": (["--controlnet", "fun.safetensors", "--control-image", "none.png"], "does not exist"),
    "a mask for none": (["--control-mask", "mask.png"], "reads no mask"),
    "no mask": (["--controlnet", "inpainting.safetensors", "--control-image", "photo.png"], "needs a mask"),
    "no such mask": (["--controlnet", "inpainting.safetensors", "--control-image", "photo.png", "--control-mask", "x"],
                     "does not exist"),
    "two images": (["--controlnet", "inpainting.safetensors", "--control-image", "photo.png", "--control-mask",
                    "mask.png", "--control-source", "photo.png"], "sees one image"),
    "wider": (["--controlnet", "wider.safetensors", "--control-image", "photo.png"], "of width 128"),
    "fewer blocks": (["--controlnet", "short.safetensors", "--control-image", "photo.png"], "has 1 block, but"),
    "more blocks": (["--controlnet", "long.safetensors", "--control-image", "photo.png"], "has 3 blocks, but"),
    "odd channels": (["--controlnet", "odd.safetensors", "--control-image", "photo.png"], "takes 72 values"),
    "cut": (["--controlnet", "cut.safetensors", "--control-image", "photo.png"], "cut.safetensors"),
    "a tensor less": (["--controlnet", "less.safetensors", "--control-image", "photo.png"], "it lacks"),
    "a LoRA": (["--controlnet", "lora.safetensors", "--control-image", "photo.png"], "holds a LoRA"),
    "too many": ([*["--controlnet", "fun.safetensors", "--control-image", "photo.png"] * 9], "at most 8"),
}  # fmt: skip


@pytest.fixture(scope="module")
def damaged(files, tiny):
    folder = tiny.parent
    write_control(folder / "wider.safetensors", tiny, INSTANTX, layers=1, num_attention_heads=4)
    write_control(folder / "short.safetensors", tiny, BLOCKWISE, layers=1)
    write_control(folder / "long.safetensors", tiny, INSTANTX, layers=3)
    write_control(folder / "odd.safetensors", tiny, BLOCKWISE, layers=2, extra=2)
    whole = files["fun"].read_bytes()
    (folder / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    tensors = mx.load(str(files["fun"]))
    tensors.pop("control_blocks.0.attn.to_q.weight")
    save_tensors(folder / "less.safetensors", tensors, {})
    save_tensors(folder / "lora.safetensors", {"transformer_blocks.0.attn.to_q.lora_A.weight": mx.zeros((1, 4))}, {})
    return folder


@pytest.mark.parametrize("title", BAD)
def test_refused_in_one_sentence(title, damaged, capsys, monkeypatch):
    monkeypatch.chdir(damaged)
    words, sentence = BAD[title]
    if title not in ("no network", "no image") and "--control-image" not in words:
        words = ["--controlnet", "residuals.safetensors", "--control-image", "photo.png", *words]
        words = [w for n, w in enumerate(words) if not (title == "twice" and n in (4, 5))]
    before = sorted(damaged.iterdir())
    line = error_line(run(capsys, "generate", *ASKED, "--model", "tiny", *words, "-o", "bad.png"))
    assert sentence in line
    assert sorted(damaged.iterdir()) == before


@pytest.mark.parametrize(("said", "sentence"), [
    ([{"controlnet": "a", "mask": "b"}], "has a mask, but no image"),
    ([{"image": "a"}], "lacks its controlnet"),
    ([{"controlnet": "a", "image": "b", "size": 1}], "a control has 'size'"),
    ([{"controlnet": "a", "image": "b", "scale": "1"}], "scale is '1'"),
    ([{"controlnet": "a", "image": "b", "scale": True}], "scale is True"),
    ([{"controlnet": 3, "image": "b"}], "controlnet is 3"),
    (["a"], "must be a Control"),
    (3, "controls are 3, but must be a list"),
    ({"controlnet": "a"}, "controls are {'controlnet': 'a'}, but must be a list"),
    (Control("a", "b"), "controls are Control"),
    ([{"controlnet": "a", "image": "b"}] * 9, "at most 8"),
])  # fmt: skip
def test_objects_are_checked(said, sentence):
    with pytest.raises(RequestError, match=sentence):
        controls_of(said)


def test_kinds_are_those_that_are_made():
    from qwen_image_mlx.images.control import KINDS

    assert tuple(KINDS) == CONTROL_KINDS


def test_another_generation_s_is_refused(files, opened, monkeypatch):
    entry = CONTROLS[BLOCKWISE]
    monkeypatch.setitem(CONTROLS, BLOCKWISE, replace(entry, steers="QwenImage21Transformer2DModel", title="2.1"))
    pipeline, _ = opened
    pipeline.components.references.clear()
    with pytest.raises(Exception, match=r"is a ControlNet of 2\.1, which does not steer"):
        open_control(pipeline.components, Reporter(), control(files, "block-wise"))
    assert pipeline.components.rows.keys() >= {TRANSFORMER}
