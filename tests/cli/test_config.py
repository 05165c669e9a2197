"""config.toml at the command line: who wins over whom, and that a setting generates what its flag generates."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from commands import error_line

from qwen_image_mlx.cli.config import config_options
from qwen_image_mlx.cli.main import build_parser, main
from qwen_image_mlx.settings import SCHEMA
from qwen_image_mlx.variants import DEFAULT_MODEL

PROMPT = "a red circle on a blue background"
DEMOS = """
[default.qwen_image]
model_path = "demo"
edit_model_path = "demo-edit"
layered_model_path = "demo-layered"
"""
BROKEN = '[default.qwen_image]\nmodel_path = "demo"\n\ncfg_scal = 4\n'


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("QWEN_IMAGE_CONFIG", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.fixture
def run(here, capsys):
    """Runs a command in this process: (exit code, lines of stdout, stderr)."""

    def call(*arguments):
        code = main([str(a) for a in arguments])
        out, err = capsys.readouterr()
        return code, out.splitlines(), err

    return call


@pytest.fixture(scope="module")
def circle(tmp_path_factory):
    """An image that the demo generated in one step, without a config."""
    path = tmp_path_factory.mktemp("generated") / "circle.png"
    assert main(["generate", PROMPT, "--model", "demo", "--steps", "1", "--seed", "1", "-o", str(path)]) == 0
    return path


def config(text: str, path: Path | str = "config.toml") -> Path:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text, encoding="utf-8")
    return Path(path)


def refusal(result) -> str:
    return error_line(result).removeprefix("error: ")


def generated(result) -> dict:
    """The metadata of the only image that a command generated."""
    from qwen_image_mlx.images.files import read_metadata

    code, (path,), err = result
    assert code == 0, err
    return read_metadata(path)


def picked(facts: dict, *names: str) -> list:
    return [facts[name] for name in names]


# --- who wins ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_flags_beat_the_profile_which_beats_default_which_beats_what_is_built_in(run):
    config(DEMOS + """
        cfg_scale = 2
        generation = {steps = 3, seed = 3, negative_prompt = "default's", aspect = "16:9"}
        [quick.qwen_image]
        cfg_scale = 1.5
        quantize = 8
        [quick.qwen_image.generation]
        steps = 1
        seed = 4
        """)  # fmt: skip
    names = ("model", "steps", "seed", "cfg_scale", "negative_prompt", "quantize", "rng")
    usual = generated(run("generate", PROMPT, "--steps", 2))
    assert picked(usual, *names) == ["demo", 2, 3, 2.0, "default's", None, "torch"]
    assert usual["width"] > usual["height"]
    quick = generated(run("generate", PROMPT, "--profile", "quick", "--seed", 5, "--width", 48, "--height", 64))
    packed = "transformer=8,text_encoder=8"
    assert picked(quick, *names) == ["demo", 1, 5, 1.5, "default's", packed, "torch"]
    assert picked(quick, "width", "height") == [48, 64]


@pytest.mark.slow
def test_what_an_image_recorded_beats_the_config_and_flags_beat_both(run, circle):
    config(DEMOS.replace('"demo"', '"./none"') + """
        cfg_scale = 2
        quantize = 8
        memory = "streamed"
        loras = ["none.safetensors"]
        generation = {steps = 3, seed = 3, negative_prompt = "the config's", aspect = "16:9"}
        """)  # fmt: skip
    code, out, err = run("generate", "--from-image", circle, "-o", "again.png")
    assert (code, out) == (0, ["again.png"]), err
    assert Path("again.png").read_bytes() == circle.read_bytes()
    assert "streamed: " in err  # nothing of that is recorded: it changes no pixel
    flagged = generated(run("generate", "--from-image", circle, "--seed", 9, "--cfg-scale", 1, "-o", "flagged.png"))
    assert picked(flagged, "seed", "cfg_scale", "steps", "quantize", "loras") == [9, 1.0, 1, None, None]


def test_an_image_that_recorded_little_leaves_the_rest_to_the_config(run):
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    said = PngInfo()
    said.add_text("qwen_image_mlx", json.dumps({"prompt": PROMPT, "steps": 1, "aspect": "3:2"}))
    Image.new("RGB", (8, 8)).save("little.png", pnginfo=said)
    config(DEMOS + 'generation = {steps = 3, seed = 3, aspect = "9:16"}')
    facts = generated(run("generate", "--from-image", "little.png"))
    assert picked(facts, "model", "prompt", "steps", "seed") == ["demo", PROMPT, 1, 3]


def test_a_command_s_own_usual_values_come_last(here):
    """What decompose, caption and plan take where nobody says anything, and with a config."""
    config(
        DEMOS + "num_layers = 3\nresolution = 64\nmemory = \"1GB\"\nquantize = 4\nloras = ['o/r']\ngeneration.steps = 2"
    )
    asked = build_parser().parse_args
    assert config_options(asked(["decompose", "x.png"]), "decompose") == {
        "model": "demo-layered", "num_layers": 3, "resolution": 64, "quantize": "4", "memory": "1GB", "loras": ["o/r"],
        "steps": 2,
    }  # fmt: skip
    assert config_options(asked(["caption", "x.png"]), "caption") == {"model": "demo-layered", "quantize": "4"}
    assert config_options(asked(["plan"]), "plan") == {
        "model": "demo", "num_layers": 3, "quantize": "4", "memory": "1GB", "steps": 2,
    }  # fmt: skip
    train = asked(["train", "--data", "d", "-o", "o", "--steps", "1"])
    models = {task: config_options(train, f"train --task {task}") for task in ("t2i", "edit", "layered")}
    assert models == {"t2i": {"model": "demo"}, "edit": {"model": "demo-edit"}, "layered": {"model": "demo-layered"}}


@pytest.mark.parametrize(("flags", "recorded", "loras"), [
    ([], {}, ["o/r"]),
    (["--model", "o/mine"], {}, ["o/r"]),
    (["--model", "o/other"], {}, None),
    ([], {"model": "o/mine"}, ["o/r"]),
    ([], {"model": "o/other"}, None),
    (["--model", "o/mine"], {"model": "o/other"}, ["o/r"]),
    (["--model", "o/mine"], {"model": "o/mine", "loras": None}, None),
])  # fmt: skip
def test_loras_of_the_config_are_for_its_own_model(here, flags, recorded, loras):
    config('[default.qwen_image]\nmodel_path = "o/mine"\nloras = ["o/r"]')
    said = config_options(build_parser().parse_args(["generate", "x", *flags]), "generate", recorded)
    assert said.get("loras") == loras


def test_loras_of_a_config_without_a_model_are_for_the_usual_one(here):
    config('[default.qwen_image]\nloras = ["o/r"]')
    for flags, loras in (([], ["o/r"]), (["--model", DEFAULT_MODEL], ["o/r"]), (["--model", "demo"], None)):
        arguments = build_parser().parse_args(["generate", "x", *flags])
        assert config_options(arguments, "generate").get("loras") == loras


def test_lightning_brings_its_own_steps_and_guidance(here):
    config("[default.qwen_image]\ncfg_scale = 3\nquantize = 4\ngeneration.steps = 30")
    said = config_options(build_parser().parse_args(["generate", "x", "--lightning", "8"]), "generate")
    assert said == {"quantize": "4"}


@pytest.mark.slow
def test_lora_flags_replace_the_config_s_list(run):
    from lora_files import TARGETS, write_lora

    from qwen_image_mlx import QwenImagePipeline

    targets = QwenImagePipeline.from_pretrained("demo").components.lora_targets()
    named = [name for name in TARGETS if name in targets]
    write_lora(Path("a.safetensors"), targets, targets=named)
    write_lora(Path("b.safetensors"), targets, targets=named, seed=1)
    config(DEMOS + 'loras = ["a.safetensors@0.5"]\ngeneration = {steps = 1, seed = 1}')
    assert generated(run("generate", PROMPT))["loras"] == ["a.safetensors@0.5"]
    assert generated(run("generate", PROMPT, "--lora", "b.safetensors"))["loras"] == ["b.safetensors@1"]


# --- the same as with flags ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_generate_generates_what_its_flags_generate(run):
    settings = (
        DEMOS
        + "cfg_scale = 2\nquantize = 8\ngeneration = {steps = 2, seed = 11, negative_prompt = 'blue', aspect = '3:2'}"
    )
    config(settings, "my.toml")
    flags = ["--cfg-scale", 2, "--quantize", 8, "--steps", 2, "--seed", 11, "-n", "blue", "--aspect", "3:2"]
    assert run("generate", PROMPT, "--config", "my.toml", "-o", "config.png")[0] == 0
    assert run("generate", PROMPT, "--model", "demo", *flags, "-o", "flags.png")[0] == 0
    assert Path("config.png").read_bytes() == Path("flags.png").read_bytes()


@pytest.mark.slow
def test_edit_generates_what_its_flags_generate(run, circle):
    settings = DEMOS + "cfg_scale = 1\ngeneration = {steps = 1, seed = 11, negative_prompt = 'x', aspect = '16:9'}"
    config(settings, "my.toml")
    flags = ["--cfg-scale", 1, "--steps", 1, "--seed", 11, "-n", "x"]
    assert run("edit", "make it green", "--image", circle, "--config", "my.toml", "-o", "config.png")[0] == 0
    assert run("edit", "make it green", "--image", circle, "--model", "demo-edit", *flags, "-o", "flags.png")[0] == 0
    assert Path("config.png").read_bytes() == Path("flags.png").read_bytes()


@pytest.mark.slow
def test_decompose_generates_what_its_flags_generate(run, circle):
    resolution = 64
    config(DEMOS + f"cfg_scale = 1\nnum_layers = 2\nresolution = {resolution}\n"
                   "generation = {steps = 1, seed = 11, negative_prompt = 'x'}", "my.toml")  # fmt: skip
    flags = ["--cfg-scale", 1, "--layers", 2, "--resolution", resolution, "--steps", 1, "--seed", 11, "-n", "x"]
    assert run("decompose", circle, "--prompt", PROMPT, "--config", "my.toml", "-o", "config")[0] == 0
    given = run("decompose", circle, "--prompt", PROMPT, "--model", "demo-layered", *flags, "-o", "flags")
    assert given[0] == 0
    names = sorted(path.name for path in Path("flags").iterdir())
    assert [name for name in names if name.startswith("layer_")] == ["layer_0.png", "layer_1.png"]
    assert sorted(path.name for path in Path("config").iterdir()) == names
    said = json.loads(Path("config", "manifest.json").read_text())
    assert picked(said, "steps", "cfg_scale", "resolution", "seed") == [1, 1.0, 64, 11]
    for name in names:
        assert Path("config", name).read_bytes() == Path("flags", name).read_bytes(), name


@pytest.mark.slow
def test_compose_takes_the_editing_model_s_settings_only_to_harmonize(run, circle):
    config(DEMOS + "num_layers = 1\ngeneration = {steps = 1, seed = 11}")
    assert run("decompose", circle, "--prompt", PROMPT, "-o", "apart")[0] == 0
    facts = generated(run("compose", "apart", "--harmonize", "blend it"))
    assert picked(facts, "model", "steps", "seed") == ["demo-edit", 1, 11]
    config(BROKEN)
    assert run("compose", "apart", "-o", "plain.png")[0] == 0
    assert "line 4" in refusal(run("compose", "apart", "--harmonize", "blend it"))
    assert refusal(run("compose", "apart", "--config", "config.toml")).startswith("--config needs --harmonize")


def test_plan_counts_with_the_config(run):
    config(DEMOS + 'quantize = 4\nmemory = "300MiB"')
    code, out, err = run("plan")
    assert code == 0, err
    assert out[0].startswith("demo: ")
    assert "--quantize 4; 0.3 GB may be used" in out[0]
    _, out, _ = run("plan", "demo-layered", "--quantize", 8, "--memory", "1GB")
    assert out[0].startswith("demo-layered: ")
    assert "--quantize 8; 1.0 GB may be used" in out[0]


def test_train_takes_the_model_alone(run, here):
    config('[default.qwen_image]\nmodel_path = "./none"\nedit_model_path = "./no-editor"\ngeneration.seed = 3')
    Path("data").mkdir()
    (here / "data" / "a.txt").write_text("a fox")
    flags = ["--data", "data", "-o", "out", "--steps", 1]
    assert "no directory './none'" in refusal(run("train", *flags))
    config('[fast.qwen_image]\nmodel_path = "./fast"')
    assert "no directory './fast'" in refusal(run("train", *flags, "--profile", "fast"))


# --- --profile and --timings ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_profile_chooses_and_timings_are_printed_and_recorded(run):
    config(DEMOS + "generation = {steps = 1, seed = 1}\n[two.qwen_image]\ngeneration.seed = 2")
    facts = generated(run("generate", PROMPT, "--timings"))
    assert facts["seed"] == 1
    assert "denoise" in json.dumps(facts["profile"])
    facts = generated(run("generate", PROMPT, "--profile", "two"))
    assert facts["seed"] == 2
    assert "profile" not in facts
    facts = generated(run("generate", "--timings", "--profile", "two", PROMPT))
    assert facts["seed"] == 2
    assert "profile" in facts


@pytest.mark.parametrize("command", [["generate", "x"], ["edit", "--image", "x.png"], ["decompose", "x.png"]])
def test_profile_without_a_name_is_answered_with_both_meanings(run, command):
    message = refusal(run(*command, "--profile"))
    assert "--profile takes the name of a profile in config.toml; --timings prints what each stage takes" in message


def test_an_unknown_profile_names_those_there_are(run):
    config(DEMOS + "[fast.qwen_image]\n[other.program]\n")
    message = refusal(run("config", "show", "--profile", "slow"))
    assert message == "the profile 'slow' does not exist: config.toml has default, fast"
    assert "has default, fast" in refusal(run("plan", "--profile", "slow"))


# --- faults --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [
    ["generate", "x"], ["edit", "x", "--image", "x.png"], ["decompose", "x.png"], ["plan"], ["config", "show"],
    ["train", "--data", "d", "-o", "o", "--steps", "1"],
], ids=lambda command: " ".join(command[:2]))  # fmt: skip
def test_a_fault_has_its_file_and_line(run, command):
    config(BROKEN)
    assert refusal(run(*command)) == "config.toml, line 4: cfg_scal is not a setting; did you mean cfg_scale?"
    path = config("x = 1\n[default.qwen_image]\nnum_layers = 99", "other/my.toml")
    assert refusal(run(*command, "--config", path)) == (
        "other/my.toml, line 3: num_layers is 99, but must be an integer from 1 to 8"
    )
    assert refusal(run(*command, "--config", "none.toml")).startswith("the config none.toml does not exist")


def test_caption_reads_the_config_too(run, circle):
    config(BROKEN)
    assert "line 4" in refusal(run("caption", circle))
    config('[default.qwen_image]\nlayered_model_path = "./none"')
    assert "no directory './none'" in refusal(run("caption", circle))


def test_a_broken_config_does_not_stop_what_does_not_need_it(run, circle, tmp_path):
    shutil.copy(circle, "circle.png")
    config(BROKEN)
    assert run("config", "path") == (0, ["config.toml"], "")
    assert run("config", "init", "new.toml") == (0, ["new.toml"], "")
    assert run("info", "circle.png")[0] == 0
    assert "no-lora.safetensors" in refusal(run("lora", "inspect", "no-lora.safetensors"))
    for command in ("generate", "config", "decompose"):
        with pytest.raises(SystemExit) as left:
            main([command, "--help"])
        assert left.value.code == 0


# --- config show, init, path ---------------------------------------------------------------------------------------


def test_show_says_where_each_value_came_from(run):
    config(DEMOS + "[fast.qwen_image]\nquantize = 4\nloras = ['a@0.5']\n[fast.qwen_image.generation]\nseed = 3\n")
    code, out, err = run("config", "show", "--profile", "fast")
    assert (code, err) == (0, "")
    assert [line.split()[0] for line in out] == [f"{row.table}.{row.key}".lstrip(".") for row in SCHEMA]
    lines = {line.split()[0]: line.split(maxsplit=1)[1] for line in out}
    assert lines["model_path"].split("  ")[0] == '"demo"'
    assert lines["model_path"].endswith("config.toml [default.qwen_image]")
    assert lines["quantize"].endswith("config.toml [fast.qwen_image]")
    assert lines["loras"].startswith('["a@0.5"]')
    assert lines["generation.seed"].split(maxsplit=1) == ["3", "config.toml [fast.qwen_image.generation]"]
    assert lines["memory"].split() == ["staged", "built-in"]
    columns = {max(line.rfind("  built-in"), line.rfind("  config.toml [")) for line in out}
    assert len(columns) == 1
    code, out, _ = run("config", "show", "--json", "--profile", "fast")
    said = json.loads("\n".join(out))
    assert (said["file"], said["profile"]) == ("config.toml", "fast")
    assert said["settings"]["quantize"] == {"value": "4", "origin": "config.toml [fast.qwen_image]"}
    assert said["settings"]["generation.steps"] == {"value": None, "origin": "built-in"}
    assert len(said["settings"]) == len(SCHEMA)


def test_show_without_any_config(run):
    code, out, _ = run("config", "show")
    assert code == 0
    assert all(line.endswith("  built-in") for line in out)
    code, out, _ = run("config", "show", "--json")
    assert json.loads("\n".join(out))["file"] is None


def test_init_then_show(run, here, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(here / "xdg"))
    monkeypatch.setattr("sys.platform", "linux")
    place = here / "xdg" / "qwen-image-mlx" / "config.toml"
    assert refusal(run("config", "path")).startswith("no config.toml is in force")
    assert run("config", "init") == (0, [str(place)], "")
    assert run("config", "path") == (0, [str(place)], "")
    code, out, _ = run("config", "show")
    assert code == 0
    assert all(line.endswith("  built-in") for line in out)
    place.write_text(place.read_text().replace('#model_path = "Qwen/Qwen-Image-2512"', 'model_path = "demo"'))
    assert generated(run("generate", PROMPT, "--steps", 1))["model"] == "demo"
    kept = place.read_bytes()
    assert "already exists" in refusal(run("config", "init"))
    assert place.read_bytes() == kept


def test_init_never_writes_over_anything(run):
    config("mine")
    assert "already exists" in refusal(run("config", "init", "config.toml"))
    assert Path("config.toml").read_text() == "mine"
    os.symlink("nowhere", "link.toml")
    assert "already exists" in refusal(run("config", "init", "link.toml"))
    assert "cannot write config.toml/below.toml" in refusal(run("config", "init", "config.toml/below.toml"))
    assert "leads nowhere" in refusal(run("config", "init", "~nosuchuser/my.toml"))
    assert run("config", "init", "new/folder/my.toml")[0] == 0
    assert run("config", "show", "--config", "new/folder/my.toml")[0] == 0


def test_path_follows_the_flag_the_variable_the_folder_and_the_platform(run, here, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(here / "xdg"))
    monkeypatch.setattr("sys.platform", "linux")
    places = ["xdg/qwen-image-mlx/config.toml", "config.toml", "variable.toml", "flag.toml"]
    for place in places:
        config(DEMOS, place)
    assert run("config", "path", "--config", "flag.toml")[1] == ["flag.toml"]
    monkeypatch.setenv("QWEN_IMAGE_CONFIG", "variable.toml")
    assert run("config", "path")[1] == ["variable.toml"]
    monkeypatch.delenv("QWEN_IMAGE_CONFIG")
    assert run("config", "path")[1] == ["config.toml"]
    config("[tool]\nx = 1")
    assert run("config", "path")[1] == [str(here / places[0])]
    monkeypatch.setenv("QWEN_IMAGE_CONFIG", "none.toml")
    assert "none.toml" in refusal(run("config", "path"))
