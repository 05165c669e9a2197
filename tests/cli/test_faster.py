"""Solvers, guidance, step caches and presets through every front end: the table of options alone carries them."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from commands import error_line

from qwen_image_mlx.cli.main import main
from qwen_image_mlx.images.files import read_metadata
from qwen_image_mlx.options import Switch
from qwen_image_mlx.pipeline.parameters import TASKS
from qwen_image_mlx.runtime.options import OPTIONS, of_task
from qwen_image_mlx.runtime.presets import GOVERNED, PRESETS, preset_of, yielding
from qwen_image_mlx.settings import SCHEMA
from qwen_image_mlx.weights.synthetic import TINY, write_checkpoint

PROMPT = "a red circle on a blue background"
NAMES = ("solver", "guidance_interval", "cfg_zero_star", "apg", "step_cache", "preset")
VALUES = {"solver": "unipc", "guidance_interval": "0.1:0.9", "apg": 0.3, "step_cache": "first-block:0.2"}


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
def test_flags_records_replays_lines_and_config(run):
    steps = ["--model", "demo", "--steps", "10"]
    flags = ["--solver", "unipc", "--guidance-interval", "0.1:0.9", "--apg", "0.3", "--step-cache", "first-block:0.2"]
    made = generated(run, PROMPT, *steps, *flags, "--seed", "1", "-o", "flags.png")
    assert {name: made[name] for name in VALUES} == VALUES
    assert made["passes"]["run"] + made["passes"]["skipped"] == 18
    again = generated(run, "--from-image", "flags.png", "-o", "again.png")
    assert Path("flags.png").read_bytes() == Path("again.png").read_bytes()
    assert again == made
    Path("my.toml").write_text("\n".join([
        "[default.qwen_image]", 'solver = "unipc"', 'guidance_interval = "0.1:0.9"', "apg = 0.3",
        'step_cache = "first-block:0.2"',
    ]))  # fmt: skip
    generated(run, PROMPT, *steps, "--seed", "1", "--config", "my.toml", "-o", "config.png")
    assert Path("config.png").read_bytes() == Path("flags.png").read_bytes()
    Path("p.jsonl").write_text(json.dumps({"prompt": PROMPT, "seed": 1, "steps": 10, **VALUES}))
    code, (line,), _ = run("generate", "--prompts-file", "p.jsonl", "--model", "demo", "-o", "many")
    assert code == 0
    assert {name: read_metadata(line)[name] for name in VALUES} == VALUES
    plain = generated(run, PROMPT, *steps, "--seed", "1", "-o", "plain.png")
    assert not {*NAMES, "passes"} & plain.keys()


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


def test_a_preset_overrides_the_record_and_the_config_and_yields_to_flags(run):
    Path("my.toml").write_text('[default.qwen_image]\nsolver = "heun"\n[default.qwen_image.generation]\nsteps = 3\n')
    common = [PROMPT, "--model", "demo", "--seed", "1", "--config", "my.toml", "--preset", "draft"]
    made = generated(run, *common, "-o", "a.png")
    assert (made["steps"], made.get("solver")) == (8, None)
    assert generated(run, *common, "--steps", "2", "-o", "b.png")["steps"] == 2


def test_calibrated_numbers_are_found_again(run, data):
    code, (path,), err = run("calibrate-cache", "--model", "demo", "--steps", "14", "--prompt", PROMPT)
    assert code == 0, err
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
