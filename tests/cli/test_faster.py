"""Solvers, guidance, step caches and presets through every front end: the table of options alone carries them."""

from __future__ import annotations

import json
import logging
from base64 import b64decode
from pathlib import Path
from typing import Any

import pytest
from commands import error_line
from PIL import Image

from qwen_image_mlx import QwenImagePipeline, SamplingOptions
from qwen_image_mlx.cli.main import main
from qwen_image_mlx.images.files import METADATA_KEY, encode_png, read_metadata
from qwen_image_mlx.images.sheet import contact_sheet
from qwen_image_mlx.options import Switch
from qwen_image_mlx.pipeline.parameters import TASKS
from qwen_image_mlx.pipeline.presets import GOVERNED, PRESETS, preset_of, yielding
from qwen_image_mlx.runtime.options import OPTIONS, of_task
from qwen_image_mlx.settings import SCHEMA
from qwen_image_mlx.weights.synthetic import TINY, write_checkpoint

PROMPT = "a red circle on a blue background"
NAMES = tuple(SamplingOptions.__annotations__)
# For each its flags, what the record says of it, and the same flags as options of the other front ends.
FILES: dict[str, tuple[list[str], Any, dict[str, Any]]] = {
    "solver": (["--steps", "4", "--solver", "unipc"], "unipc", {"steps": 4, "solver": "unipc"}),
    "guidance_interval": (
        ["--steps", "4", "--guidance-interval", "0:0.5"], "0:0.5", {"steps": 4, "guidance_interval": "0:0.5"},
    ),
    "cfg_zero_star": (["--steps", "4", "--cfg-zero-star"], True, {"steps": 4, "cfg_zero_star": True}),
    "apg": (["--steps", "4", "--apg", "0.3"], 0.3, {"steps": 4, "apg": 0.3}),
    "step_cache": (["--steps", "9", "--step-cache", "taylorseer:4"], "taylorseer:4",
                   {"steps": 9, "step_cache": "taylorseer:4"}),
    "preset": (["--preset", "draft"], "draft", {"preset": "draft"}),
}  # fmt: skip


@pytest.fixture(autouse=True)
def data(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    return tmp_path / "data"


@pytest.fixture
def run(here, capsys):
    """Runs a command with the demo model: (exit code, lines of stdout, stderr)."""

    def call(*arguments):
        code = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return code, out.splitlines(), err

    return call


def pixels(path) -> bytes:
    with Image.open(path) as image:
        return image.tobytes()


def generated(run, *arguments) -> dict:
    code, out, err = run("generate", *arguments)
    assert code == 0, err
    return read_metadata(out[-1])


@pytest.mark.parametrize("name", NAMES)
def test_each_is_everywhere_by_its_row(name):
    row = OPTIONS[name]
    assert {"generate", "edit", "decompose", "compose"} <= {*row.commands}
    assert row.line
    assert row.config
    for task in TASKS:
        assert name in {field.name for field in of_task(task)}
    assert name in {setting.key for setting in SCHEMA} or isinstance(row.kind, Switch)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_each_makes_the_same_file_everywhere(run, name):
    """A flag, a replayed record, a config, a line of a file of prompts, and Python; the server is below."""
    flags, value, options = FILES[name]
    made = generated(run, PROMPT, "--model", "demo", "--seed", "1", *flags, "-o", "flag.png")
    assert made[name] == value
    plain = generated(run, PROMPT, "--model", "demo", "--seed", "1", "--steps", str(made["steps"]), "-o", "plain.png")
    assert not {*NAMES, "passes"} & plain.keys()
    assert (pixels("flag.png") == pixels("plain.png")) == (name == "preset")  # a draft is the steps alone
    expected = Path("flag.png").read_bytes()

    again = generated(run, "--from-image", "flag.png", "-o", "again.png")
    assert again == {key: one for key, one in made.items() if key != "preset"}  # a record has what a preset meant
    Path("my.toml").write_text(
        "[default.qwen_image]\n"
        + "\n".join(f"{key} = {json.dumps(one)}" for key, one in options.items() if key != "steps")
        + "".join(f"\n[default.qwen_image.generation]\nsteps = {options[key]}" for key in options if key == "steps")
    )
    generated(run, PROMPT, "--model", "demo", "--seed", "1", "--config", "my.toml", "-o", "config.png")
    assert Path("config.png").read_bytes() == expected
    Path("p.jsonl").write_text(json.dumps({"prompt": PROMPT, "seed": 1, **options}))
    code, (line,), err = run("generate", "--prompts-file", "p.jsonl", "--model", "demo", "-o", "many")
    assert code == 0, err
    assert Path(line).read_bytes() == expected
    pipeline, words = QwenImagePipeline.from_pretrained("demo"), dict(options)
    words["num_inference_steps"] = words.pop("steps", None)
    made_here = pipeline.generate(
        PROMPT, negative_prompt=made["negative_prompt"], cfg_scale=made["cfg_scale"], seed=1, progress=False, **words
    )
    made_here[0].save("python.png")
    assert Path("python.png").read_bytes() == expected


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_each_makes_the_same_file_in_the_server(run, name):
    pytest.importorskip("fastapi")
    from qwen_image_mlx.server.models import Models
    from qwen_image_mlx.server.openai import Generation
    from qwen_image_mlx.server.schema import BODIES, form_of
    from qwen_image_mlx.server.tasks import Limits, Tasks

    class Feed:
        followed, images = False, 1

        def __call__(self, progress):
            pass

    flags, _, options = FILES[name]
    generated(run, PROMPT, "--model", "demo", "--seed", "1", *flags, "-o", "flag.png")
    models = Models({"generate": {"model": "demo", "quantize": None, "loras": []}}, None, None)
    for defaults, fields in (({}, options), (options, {})):  # said by a request, and by the server's config
        tasks = Tasks(models, {"generate": defaults}, Limits())
        body = BODIES["generate"](prompt=PROMPT, seed=1, **fields)
        (made,) = tasks.work("generate", body)(Feed())["images"]
        assert b64decode(made["image"].partition(",")[2]) == Path("flag.png").read_bytes()
    for task in TASKS:
        assert name in form_of(task)
        assert name in BODIES[task].model_json_schema()["properties"]
    assert name in Generation.model_fields


def test_apg_without_a_number_is_zero(run):
    assert generated(run, PROMPT, "--model", "demo", "--steps", "2", "--apg", "--seed", "1")["apg"] == 0.0


@pytest.mark.parametrize(("flags", "said"), [
    (["--step-cache", "first-block", "--steps", "8"], "useless with 8 steps"),
    (["--step-cache", "teacache", "--steps", "12"], "calibrate-cache"),
    (["--step-cache", "magic"], "one of teacache"),
    (["--apg", "--cfg-zero-star"], "choose one"),
    (["--cfg-zero-star", "--cfg-scale", "1"], "guidance is off"),
    (["--guidance-interval", "0.9:0.1"], "the first one smaller"),
    (["--pick", "2"], "--pick needs --from-image"),
    (["--contact-sheet"], "give --seeds or --prompts-file"),
])  # fmt: skip
def test_what_makes_no_sense_is_one_sentence_and_code_2(run, flags, said):
    assert said in error_line(run("generate", PROMPT, "--model", "demo", *flags))


@pytest.mark.slow
@pytest.mark.parametrize(("flags", "options"), [
    (["--solver", "unipc", "--guidance-interval", "0.1:0.9", "--apg", "0.3", "--step-cache", "first-block:0.2"],
     {"solver": "unipc", "guidance_interval": (0.1, 0.9), "apg": 0.3, "step_cache": "first-block:0.2"}),
    (["--preset", "draft", "--cfg-zero-star"], {"preset": "draft", "cfg_zero_star": True}),
    (["--preset", "best", "--solver", "lcm"], {"preset": "best", "solver": "lcm"}),
])  # fmt: skip
def test_python_makes_the_same_file(run, flags, options):
    words = ["--model", "demo", "--seed", "1", "--negative-prompt", "blurry", "--cfg-scale", "3", *flags]
    if "preset" not in options:
        words, options = [*words, "--steps", "10"], options | {"num_inference_steps": 10}
    generated(run, PROMPT, *words, "-o", "line.png")
    pipeline = QwenImagePipeline.from_pretrained("demo")
    (image,) = pipeline.generate(PROMPT, negative_prompt="blurry", cfg_scale=3, seed=1, progress=False, **options)
    image.save("python.png")
    assert read_metadata("python.png") == read_metadata("line.png")
    assert Path("python.png").read_bytes() == Path("line.png").read_bytes()


@pytest.mark.slow
def test_edits_and_layers_in_python_record_them():
    photo = Image.new("RGB", (64, 64), "red")
    options = {"seed": 1, "progress": False, "solver": "dpmpp-2m", "num_inference_steps": 2}
    editor = QwenImagePipeline.from_pretrained("demo-edit")
    (edited,) = editor.edit("make the circle green", images=[photo], preset="draft", **options)
    made = json.loads(edited.info[METADATA_KEY])
    assert (made["solver"], made["preset"]) == ("dpmpp-2m", "draft")
    layered = QwenImagePipeline.from_pretrained("demo-layered")
    result = layered.decompose(photo, PROMPT, preset="draft", **options)
    assert (result.stack.metadata["solver"], result.stack.metadata["preset"]) == ("dpmpp-2m", "draft")


@pytest.mark.slow
def test_explore_then_refine(run):
    sweep = ["--model", "demo", "--seeds", "1-3", "--preset", "draft", "--contact-sheet", "-o", "many"]
    code, lines, err = run("generate", PROMPT, *sweep)
    assert code == 0
    assert lines[-1] == "many/contact-sheet.png"
    assert err.count("preset draft: 8 steps, euler") == 1
    draft = read_metadata(lines[1])
    assert (draft["seed"], draft["steps"], draft["preset"]) == (2, 8, "draft")
    code, (sheet,), _ = run("generate", PROMPT, *sweep)  # nothing is missing, and the sheet is made again
    assert sheet == "many/contact-sheet.png"
    best = generated(run, "--from-image", sheet, "--pick", "2", "--preset", "best", "-o", "best.png")
    assert (best["seed"], best["steps"], best["preset"], best["prompt"]) == (2, 12, "best", PROMPT)
    same = generated(run, "--from-image", sheet, "--pick", "2", "-o", "same.png")
    assert same == {name: value for name, value in draft.items() if name != "preset"}
    for words, said in (([], "--pick with its number"), (["--pick", "4"], "images 1 to 3")):
        code, _, err = run("generate", "--from-image", sheet, *words)
        assert code == 2
        assert said in err
    code, _, err = run("generate", "--from-image", "best.png", "--pick", "1")
    assert code == 2
    assert "nothing to pick" in err
    code, lines, _ = run("info", sheet)
    assert code == 0
    assert [line.split()[:2] for line in lines[1:]] == [["image", str(number)] for number in (1, 2, 3)]
    assert lines[2].endswith(f"{PROMPT}, seed 2, 8 steps")


def test_a_sheet_shows_each_number():
    """Two cells with one image and one label differ by the number that --pick takes."""
    sheet = contact_sheet([Image.new("RGB", (64, 64), "red")] * 2, ["seed 1"] * 2)
    gap = (sheet.width - 2 * 64) // 3
    below = [sheet.crop((left, gap + 64, left + 64, sheet.height)).tobytes() for left in (gap, 2 * gap + 64)]
    assert below[0] != below[1]


def test_a_preset_overrides_the_record_and_the_config_and_yields_to_flags(run):
    Path("my.toml").write_text('[default.qwen_image]\nsolver = "heun"\n[default.qwen_image.generation]\nsteps = 3\n')
    common = [PROMPT, "--model", "demo", "--seed", "1", "--config", "my.toml", "--preset", "draft"]
    made = generated(run, *common, "-o", "a.png")
    assert (made["steps"], made.get("solver")) == (8, None)
    assert generated(run, *common, "--steps", "2", "-o", "b.png")["steps"] == 2


def test_calibrated_numbers_are_found_again(run, data):
    code, (path,), err = run("calibrate-cache", "--model", "demo", "--steps", "14", "--prompt", PROMPT)
    assert code == 0, err
    assert "from now on --step-cache teacache and magcache use these numbers for demo" in err
    assert Path(path).parent == data / "qwen-image-mlx" / "step-caches"
    said = json.loads(Path(path).read_text())
    assert len(said["magcache"]["ratios"]) == 14
    made = generated(run, PROMPT, "--model", "demo", "--steps", "20", "--step-cache", "teacache", "--seed", "1")
    assert made["passes"]["skipped"] > 0
    code, _, err = run("calibrate-cache", "--model", "demo", "--steps", "4")
    assert code == 2
    assert "at least 12" in err


def test_the_plan_shows_the_presets(run):
    code, out, _ = run("plan", "demo", "--json")
    assert code == 0
    presets = json.loads("\n".join(out))["presets"]
    assert [one["preset"] for one in presets] == [*PRESETS]
    assert [one["passes"] for one in presets] == [16, 24, 24]
    assert all(one["modelled_seconds"] >= 0 for one in presets)
    _, out, _ = run("plan", "demo")
    assert sum(line.startswith(("draft", "balanced", "best")) for line in out) == 3
    _, out, _ = run("plan", "demo", "--steps", "40", "--solver", "heun", "--json")
    presets = json.loads("\n".join(out))["presets"]
    assert [(one["steps"], one["solver"]) for one in presets] == [(10, "heun"), (40, "heun"), (40, "heun")]
    assert [one["passes"] for one in presets] == [38, 101, 158]
    assert presets[1]["step_cache"] == "first-block:0.08"


def test_a_preset_is_of_the_steps_that_are_given(run):
    made = generated(run, PROMPT, "--model", "demo", "--preset", "balanced", "--steps", "24", "--seed", "1")
    assert (made["steps"], made["step_cache"], made["preset"]) == (24, "first-block:0.08", "balanced")


def test_presets_of_large_and_of_distilled_models():
    best, balanced, draft = (
        preset_of(name, 50, distilled=False, measured=True) for name in ("best", "balanced", "draft")
    )
    assert (best.passes(True), balanced.passes(True), draft.passes(True)) == (100, 52, 24)
    assert balanced.values == {"step_cache": "teacache:0.15"}
    assert preset_of("balanced", 50, distilled=False, measured=False).values == {"step_cache": "first-block:0.08"}
    for name in PRESETS:
        assert preset_of(name, 8, distilled=True, measured=True).values == {}
        assert preset_of(name, 50, distilled=False, measured=True).values.keys() <= GOVERNED


def test_only_a_preset_makes_others_yield():
    options = {"steps": 3, "seed": 1}
    assert yielding(options, {"preset": "best"}) == {"seed": 1}
    assert yielding(options, {"solver": "heun"}) == options


def test_skipped_passes_are_in_the_timings(run, caplog):
    with caplog.at_level(logging.INFO):
        made = generated(
            run, PROMPT, "--model", "demo", "--steps", "12", "--step-cache", "taylorseer", "--timings", "--seed", "1"
        )
    (denoise,) = (cost for cost in made["profile"] if cost["stage"] == "denoise")
    assert denoise["skipped"] == made["passes"]["skipped"] > 0


@pytest.mark.slow
def test_edits_and_layers_with_a_cache(run):
    generated(run, PROMPT, "--model", "demo", "--steps", "2", "--seed", "1", "-o", "x.png")
    cache = ["--steps", "9", "--seed", "1", "--step-cache", "taylorseer"]
    code, (path,), err = run(
        "edit", "make the circle green", "--image", "x.png", "--model", "demo-edit", *cache, "-o", "e.png"
    )
    assert code == 0, err
    assert read_metadata(path)["passes"]["skipped"] > 0
    code, _, err = run("decompose", "x.png", "--model", "demo-layered", *cache, "--prompt", PROMPT, "-o", "layers")
    assert code == 0, err
    assert json.loads(Path("layers/manifest.json").read_text())["passes"]["skipped"] > 0
    draft = ["--model", "demo-layered", "--prompt", PROMPT, "--preset", "draft", "--seed", "1", "-o", "draft"]
    code, _, err = run("decompose", "x.png", *draft)
    assert code == 0, err
    made = json.loads(Path("draft/manifest.json").read_text())
    assert (made["steps"], made["preset"]) == (8, "draft")


@pytest.mark.slow
def test_the_steps_that_are_taken_count(run):
    """Of 12 steps from an image one is taken, which CFG-Zero* leaves out."""
    generated(run, PROMPT, "--model", "demo", "--steps", "2", "--seed", "1", "-o", "x.png")
    start = ["--model", "demo", "--image", "x.png", "--steps", "12", "--seed", "1"]
    error = error_line((*run("generate", PROMPT, *start, "--strength", "0.05", "--cfg-zero-star"),))
    assert error.endswith("CFG-Zero* leaves the first step out, and there is only one")
    error = error_line((*run("generate", PROMPT, *start, "--strength", "0.5", "--step-cache", "taylorseer"),))
    assert "useless with 6 steps" in error
    generated(run, PROMPT, *start, "--strength", "0.5", "--cfg-zero-star", "-o", "y.png")


@pytest.mark.slow
def test_a_contact_sheet_replaces_an_earlier_one_of_its_images_alone(run):
    sweep = ["--model", "demo", "--steps", "1", "--contact-sheet", "-o", "many"]
    Path("many").mkdir()
    Path("many/contact-sheet.png").write_text("notes")
    code, lines, err = run("generate", PROMPT, *sweep, "--seeds", "1-2")
    assert (code, lines[-1]) == (0, "many/contact-sheet-1.png"), err
    assert "many/contact-sheet.png exists already" in err
    assert Path("many/contact-sheet.png").read_text() == "notes"
    Path("many/contact-sheet.png").unlink()
    for seeds, sheet, count in (("1-2", "", 2), ("1-3", "", 3), ("3", "-2", 1)):
        code, lines, err = run("generate", PROMPT, *sweep, "--seeds", seeds)
        assert (code, lines[-1]) == (0, f"many/contact-sheet{sheet}.png"), err
        assert len(read_metadata(lines[-1])["contact_sheet"]) == count
    assert len(read_metadata("many/contact-sheet.png")["contact_sheet"]) == 3


@pytest.mark.parametrize(
    "records", [[], [1, 2], [None, {"prompt": "a"}], {"a": 1}, "abc", 5, [{}], [{"prompt": "a"}] * 401]
)
def test_a_damaged_sheet_is_refused(run, records):
    image = contact_sheet([Image.new("RGB", (8, 8))], ["a"])
    Path("d.png").write_bytes(encode_png(image, {"contact_sheet": records}))
    for words in (["info", "d.png"], ["generate", "--from-image", "d.png", "--pick", "1"]):
        assert "the metadata of d.png is damaged" in error_line((*run(*words),))


def test_an_edit_takes_no_contact_sheet(run):
    sheet = contact_sheet([Image.new("RGB", (8, 8))], ["a"])
    Path("s.png").write_bytes(encode_png(sheet, {"contact_sheet": [{"prompt": "a"}]}))
    assert "use generate" in error_line((*run("edit", "x", "--from-image", "s.png", "--model", "demo-edit"),))


def test_a_prompt_of_several_lines_is_no_row_of_info(run):
    Path("n.png").write_bytes(encode_png(Image.new("RGB", (8, 8)), {"prompt": "a\nseed  999", "seed": 1}))
    _, lines, _ = run("info", "n.png")
    assert [line.split()[0] for line in lines if line[0] != " "] == ["prompt", "seed"]


def test_a_whole_model_is_distilled_by_its_name(run, tmp_path_factory):
    folder = write_checkpoint(tmp_path_factory.mktemp("hub") / "Qwen-Image-Distill-Full", TINY)
    code, (path,), err = run("generate", "x", "--model", folder, "--width", "32", "--height", "32", "--seed", "1")
    assert code == 0
    assert "a distilled model (by its name): 15 steps, guidance 1 and the model's own shift" in err
    made = read_metadata(path)
    assert (made["steps"], made["cfg_scale"], made["shift"]) == (15, 1.0, None)
    sizes = ["--width", "32", "--height", "32", "--seed", "1"]
    given = generated(run, "x", "--model", folder, "--steps", "2", "--cfg-scale", "2", "-o", "y.png", *sizes)
    assert (given["steps"], given["cfg_scale"]) == (2, 2.0)


def test_below_the_fewest_steps_of_its_card_a_model_is_sampled_as_usual(run, tmp_path_factory):
    folder = write_checkpoint(tmp_path_factory.mktemp("hub") / "Qwen-Rapid-AIO-v5", TINY)
    common = ["--model", folder, "--width", "32", "--height", "32", "--seed", "1"]
    made = [generated(run, "x", *common, *steps, "-o", "y.png") for steps in ([], ["--steps", "6"], ["--steps", "3"])]
    assert [(one["steps"], one["cfg_scale"], one["shift"]) for one in made] == [
        (4, 1.0, 3.0),
        (6, 1.0, 3.0),
        (3, 4.0, None),
    ]
