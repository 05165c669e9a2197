"""config.toml as a file: what may stand in it, with the line of what may not; where it is found; what it adds up to."""

from __future__ import annotations

import itertools
import os
import re
import sys
import time
from pathlib import Path

import pytest

from qwen_image_mlx.errors import RequestError
from qwen_image_mlx.settings import (
    SCHEMA,
    UnknownProfile,
    default_place,
    example_config,
    files,
    find_config,
    lines,
    load_settings,
    schema,
)

ROWS = {row.key: row for row in SCHEMA}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory, with a home and no config anywhere."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("QWEN_IMAGE_CONFIG", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "work"


def written(text: str | bytes, path: Path | str = "config.toml") -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def refused(text: str | bytes) -> str:
    with pytest.raises(RequestError) as caught:
        load_settings(written(text))
    return str(caught.value)


OURS = '[default.qwen_image]\nmodel_path = "demo"\n'


# --- the table and the rooms that obey its limits ------------------------------------------------------------------


def accepted(parse, *arguments) -> bool:
    try:
        parse(*arguments)
    except RequestError:
        return False
    return True


def test_limits_are_those_of_the_rooms():
    from qwen_image_mlx.pipeline.parameters import GenerationParameters, check_seed, check_side
    from qwen_image_mlx.variants import ASPECT_SIZES, DEFAULT_EDIT_MODEL, DEFAULT_LAYERED_MODEL, DEFAULT_MODEL

    def fits(field):
        return lambda value: GenerationParameters(**{"width": 64, "height": 64, field: value})

    rooms = {
        "num_layers": fits("num_layers"),
        "steps": fits("num_inference_steps"),
        "cfg_scale": fits("cfg_scale"),
        "seed": check_seed,
        "resolution": check_side,
    }
    values = [-1, 0, 0.5, 1, 8, 9, 31, 32, 100, 100.5, 101, 1000, 1001, 4096, 4097, 2**64 - 1, 2**64]
    values += [True, "4", float("nan")]
    for key, parse in rooms.items():
        assert [ROWS[key].kind.accepts(v) for v in values] == [accepted(parse, v) for v in values], key
    assert tuple(ASPECT_SIZES) == ROWS["aspect"].kind.values
    usual = [ROWS[key].usual for key in ("model_path", "edit_model_path", "layered_model_path", "aspect")]
    assert usual == [DEFAULT_MODEL, DEFAULT_EDIT_MODEL, DEFAULT_LAYERED_MODEL, next(iter(ASPECT_SIZES))]


def test_quantizations_are_those_of_the_quantizer():
    from qwen_image_mlx.weights.schemes import Quantization

    names = ("2", "3", "4", "5", "6", "8", "mxfp4", "mxfp8", "nvfp4", "none", "lots", "")
    schemes = [n + g for n in names for g in ("", "/", "/16", "/32", "/64", "/128", "/256")]
    said = [*schemes, *(f"transformer={scheme}" for scheme in schemes), 4, 2]
    parts = ("transformer=4", "vision=8", " vision = none ", "vae=4", "4")
    said += [",".join(pair) for pair in itertools.product(parts, repeat=2)]
    for value in said:
        assert ROWS["quantize"].kind.accepts(value) == accepted(Quantization.parse, value), value


def test_memories_are_those_of_the_planner():
    from qwen_image_mlx.runtime.memory import parse_memory
    from qwen_image_mlx.runtime.residency import RESIDENCIES

    said = ["auto", "AUTO ", "lots", "", "16GB", "16 gib", "12.5 GiB", "16", "256MiB", "255MiB",
            "268435456", "268435455", "1e9", "-1GB", "16TB", "1000m",
            "1000000GB", "1000001GB", "9" * 309, "١٦GB"]  # fmt: skip
    said += [residency.name for residency in RESIDENCIES]
    for value in said:
        assert ROWS["memory"].kind.accepts(value) == accepted(parse_memory, value), value


def test_every_setting_feeds_flags_that_are_there():
    from qwen_image_mlx.cli.main import COMMANDS, build_parser

    parsers = build_parser()._subparsers._group_actions[0].choices
    known = {name: {action.dest for action in parser._actions} for name, parser in parsers.items()}
    assert len(known) == len(COMMANDS)
    for row in SCHEMA:
        assert row.feeds
        for command, flag in row.feeds.items():
            assert flag in known[command.split()[0]], (row.key, command)


@pytest.mark.parametrize(("key", "good", "bad"), [
    ("model_path", ['"demo"'], ['""', "3", '["demo"]', "true"]),
    ("edit_model_path", ['"demo-edit"'], ['" "', "1.5"]),
    ("layered_model_path", ['"demo-layered"'], ["[]", "{}"]),
    ("num_layers", ["1", "8"], ["0", "9", "99", "4.0", '"4"', "true"]),
    ("cfg_scale", ["1", "2.5", "100"], ["0", "0.99", "101", "nan", "inf", '"4"', "true"]),
    ("resolution", ["64", "640", "1024"], ["0", "640.0", "true", '"640"']),
    ("quantize", ["4", '"8"', '"mxfp4"', '"transformer=4,vision=8"', '"none"'],
     ["7", "4.0", "true", '"transformer=7"', "[4]"]),
    ("memory", ['"16GB"', '"auto"', '"streamed"', "16000000000"], ['"lots"', '"16 TB"', "16", "true", "[]"]),
    ("loras", ['["a@0.5", "o/r"]', "[]"], ['"a"', "[1]", '[""]', "{}"]),
    ("controls", ['[{controlnet = "o/r"}]', '[{controlnet = "a", scale = 1, kind = "canny", image = "b"}]', "[]"],
     ['{controlnet = "a"}', '["a"]', "[{}]", '[{controlnet = "a", scale = 11}]', '[{controlnet = "a", kind = "depth"}]',
      '[{controlnet = "a", strength = 1}]', "[{controlnet = 3}]"]),
    ("steps", ["1", "1000"], ["0", "-3", "1001", "2.0", "true", '"30"', "1979-05-27"]),
    ("seed", ["0", "18446744073709551615"], ["-1", "18446744073709551616", "1.0", "[1, 2]"]),
    ("negative_prompt", ['""', '"blurry"'], ["3", "false", "[]"]),
    ("aspect", ['"1:1"', '"16:9"'], ['"5:1"', '"16x9"', "1", "[1, 1]"]),
], ids=lambda value: value if isinstance(value, str) else "")  # fmt: skip
def test_what_a_setting_may_be(here, key, good, bad):
    table = schema.table_name("default", ROWS[key].table)
    for value in good:
        assert load_settings(written(f"[{table}]\n{key} = {value}"))[key] is not None
    for value in bad:
        message = refused(f"[{table}]\n\n{key} = {value}\n")
        part, allowed = re.fullmatch(r"config\.toml, line 3: (.*?) is .*, but must be (.*)", message).groups()
        assert part == key or part.endswith(f"item 1 of {key}"), message
        kind = ROWS[key].kind
        if part != key:
            kind = kind.kind  # of an item
        if part.startswith("a field of "):
            assert allowed == f"one of {', '.join(kind.rows)}"
            continue
        if not part.startswith(("item ", key)):
            kind = kind.rows[part.partition(" of ")[0]].kind
        assert allowed == kind.allowed


# --- errors and their lines ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [
    "[default.qwen_image]\n\n# cfg_scal = 1\ncfg_scal = 4 # HERE\n",
    "cfg_scal = 1\n[other]\ncfg_scal = 2\n[default.qwen_image]\ncfg_scal = 3 # HERE",
    'x = "cfg_scal"\n[default.qwen_image]\nmodel_path = "[default.qwen_image]cfg_scal = 3"\ncfg_scal = 3 # HERE',
    'notes = """\n[default.qwen_image]\ncfg_scal = 3\n"""\n[default.qwen_image]\ncfg_scal = 3 # HERE',
    "notes = '''\n[default.qwen_image]\ncfg_scal = 3\n\\'''\n[default.qwen_image]\ncfg_scal = 3 # HERE",
    '[default.qwen_image]\nloras = [ # [x]\n  "cfg_scal = 3", # ]\n]\ncfg_scal = 3 # HERE',
    "[default.qwen_image]\n'cfg_scal' = 3 # HERE",
    '[default."qwen_image"]\n"cfg_sc\\u0061l" = 3 # HERE',
    " [ default . 'qwen_image' ] # x\n\tcfg_scal=3 # HERE",
    "default.qwen_image.cfg_scal = 3 # HERE",
    "[default]\nqwen_image.num_layers = 4\nqwen_image.cfg_scal = 3 # HERE\n",
    "default.qwen_image = {num_layers = 4, cfg_scal = 3} # HERE",
    "[default]\n\nqwen_image = {generation = {}, cfg_scal = 3} # HERE",
    "[default.qwen_image]\n[default.qwen_image.generation]\nsteps = 3\n[fast.qwen_image]\ncfg_scal = 3 # HERE",
    "[[others]]\ncfg_scal = 3\n[[others]]\n[default.qwen_image]\ncfg_scal = 3 # HERE",
    "[default.qwen_image]\n[default.qwen_image.cfg_scal] # HERE\nx = 1",
    "[default.qwen_image.generation]\nsteps = 1\n[default.other]\n[default.qwen_image]\ncfg_scal = 3 # HERE",
], ids=itertools.count())  # fmt: skip
@pytest.mark.parametrize("ending", ["\n", "\r\n"], ids=["lf", "crlf"])
@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "bom"])
def test_an_unknown_key_has_its_line_and_the_nearest_key(here, text, ending, mark):
    (line,) = [n for n, line in enumerate(text.split("\n"), 1) if "# HERE" in line]
    message = refused((mark + text.replace("\n", ending)).encode())
    assert message == f"config.toml, line {line}: cfg_scal is not a setting; did you mean cfg_scale?"


@pytest.mark.parametrize(("key", "near"), [
    ("cfg_scal", "cfg_scale"), ("cfg-scale", "cfg_scale"), ("CFG_SCALE", "cfg_scale"), ("modelpath", "model_path"),
    ("lora", "loras"), ("num_layer", "num_layers"), ("quantise", "quantize"), ("generatoin", "generation"),
    ("step", "steps"), ("negative-prompt", "negative_prompt"),
])  # fmt: skip
def test_the_nearest_key_is_named(here, key, near):
    for table in ("default.qwen_image", "fast.qwen_image.generation"):
        assert refused(f'[{table}]\n{key} = ""').endswith(f"{key} is not a setting; did you mean {near}?")


def test_a_key_like_no_other_gets_the_list(here):
    message = refused("[default.qwen_image]\nxyzzy = 1")
    assert message.startswith("config.toml, line 2: xyzzy is not a setting; there are model_path, ")
    assert all(row.key in message for row in SCHEMA)


@pytest.mark.parametrize(("text", "message"), [
    ("[default.qwen_image]\nsteps = 3", "line 2: steps belongs in [default.qwen_image.generation]"),
    ("[fast.qwen_image.generation]\nquantize = 4", "line 2: quantize belongs in [fast.qwen_image]"),
    ("[default.qwen_image.generation.generation]", "line 1: generation belongs in [default.qwen_image]"),
    ("x = 1\n[default]\nqwen_image = 3", "line 3: qwen_image is 3, but must be a table"),
    ("[default.qwen_image]\ngeneration = []", "line 2: generation is [], but must be a table"),
    ("[[default.qwen_image]]\nsteps = 3", 'line 1: qwen_image is [{"steps": 3}], but must be a table'),
])  # fmt: skip
def test_what_stands_in_the_wrong_place(here, text, message):
    assert refused(text) == f"config.toml, {message}"


@pytest.mark.parametrize(("data", "line"), [
    (b"[default.qwen_image]\nmodel_path = demo\n", 2),
    (b"[default.qwen_image]\r\n\r\nmodel_path \r\n", 3),
    (b'[default.qwen_image]\nmodel_path = "demo', 2),
    (b'[default.qwen_image]\nmodel_path = "demo\nnum_layers = 3', 2),
    (b'[default.qwen_image]\n\nmodel_path = """demo\nnum_layers = 3\n\n', 3),
    (b"[default.qwen_image]\nnum_layers = 3\nnum_layers = 4", 3),
    (b"[default.qwen_image]\nnum_layers = 3\n[default.qwen_image]\n", 3),
    (b"[default.qwen_image\nnum_layers = 3", 1),
    (b"x = 1\n[default.qwen_image", 2),
    (b'# \xc3\xa4\n[default.qwen_image]\nmodel_path = "\xe4"', 3),
    (b"x = 1\ny = " + b"[" * 5000 + b"\nz = 1", 2),
    (b"x = 1\n\ny = " + b"9" * 5000 + b"\nz = 1", 3),
])  # fmt: skip
def test_what_is_no_toml_has_its_line(here, data, line):
    message = refused(data)
    assert message.startswith(f"config.toml, line {line}: "), message
    assert "\n" not in message


def test_a_value_is_cut_where_it_is_long(here):
    assert len(refused(f'[default.qwen_image]\nmemory = "{"x" * 10_000}"')) < 300


def test_a_file_without_a_table_of_ours_is_not_taken_for_one(here):
    assert "config.toml has no table [default.qwen_image]" in refused("[default.qwen-image]\nx = 3")
    assert load_settings(written("# nothing yet\n")).values["steps"] is None


# --- profiles ------------------------------------------------------------------------------------------------------

PROFILES = """
[default.qwen_image]
model_path = "o/base"
cfg_scale = 3
loras = ["o/style@0.5"]
generation.steps = 30
generation.seed = 7
[fast.qwen_image]
quantize = 4
loras = []
[fast.qwen_image.generation]
steps = 8
[fast.other]
cfg_scal = 1
[other]
qwen = 3
[slow]
qwen_image = {}
"""


def test_a_profile_goes_over_default_value_by_value(here):
    path = written(PROFILES)
    usual, fast = load_settings(path), load_settings(path, "fast")
    keys = ("model_path", "cfg_scale", "loras", "steps", "seed", "quantize", "aspect")
    assert [usual[key] for key in keys] == ["o/base", 3.0, ["o/style@0.5"], 30, 7, None, None]
    assert [fast[key] for key in keys] == ["o/base", 3.0, [], 8, 7, "4", None]
    assert [fast.origins[key] for key in keys] == [
        "config.toml [default.qwen_image]",
        "config.toml [default.qwen_image]",
        "config.toml [fast.qwen_image]",
        "config.toml [fast.qwen_image.generation]",
        "config.toml [default.qwen_image.generation]",
        "config.toml [fast.qwen_image]",
        "built-in",
    ]
    assert (usual.profile, fast.profile, fast.path) == ("default", "fast", path)
    assert load_settings(path, "default") == usual
    assert load_settings(path, "slow").values == usual.values
    assert fast.of_command("generate") == {
        "model": "o/base", "cfg_scale": 3.0, "quantize": "4", "loras": [], "steps": 8, "seed": 7,
    }  # fmt: skip
    assert fast.of_command("caption") == {"quantize": "4"}


@pytest.mark.parametrize(("path", "model", "says"), [
    ("o/mine", None, True), ("o/mine", "o/mine", True), ("o/mine", "o/other", False),
    (None, None, True), (None, "Qwen/Qwen-Image-2512", True), (None, "o/other", False),
])  # fmt: skip
def test_loras_are_said_for_their_own_model(here, path, model, says):
    settings = load_settings(
        written(f"[default.qwen_image]\nloras = ['o/style']\n{f'model_path = {path!r}' if path else ''}")
    )
    assert ("loras" in settings.of_command("generate", model)) == says


@pytest.mark.parametrize("name", ["other", "nope", "", "qwen_image"])
def test_an_unknown_profile_gets_those_there_are(here, name):
    expected = f"the profile '{name}' does not exist: config.toml has default, fast, slow$"
    with pytest.raises(UnknownProfile, match=expected):
        load_settings(written(PROFILES), name)


def test_without_a_file_there_is_default_alone():
    assert set(load_settings(None).values.values()) == {None}
    assert set(load_settings(None, "default").origins.values()) == {"built-in"}
    with pytest.raises(UnknownProfile, match="no config exists"):
        load_settings(None, "fast")


def test_a_profile_that_is_not_chosen_is_checked_too(here):
    assert "line 4: steps is 0" in refused(OURS + "[fast.qwen_image.generation]\nsteps = 0")


# --- places of models and LoRAs ------------------------------------------------------------------------------------


def test_places_beside_the_config(here, monkeypatch):
    folder = here / "sub"
    for name in ("model", "demo", "o/base", "styles@2"):
        (folder / name).mkdir(parents=True)
    written("", folder / "style.safetensors")
    written("", here / "elsewhere")
    home = Path(os.environ["HOME"])

    def placed(value: str, key: str = "model_path"):
        text = f'["{value}"]' if key == "loras" else f'"{value}"'
        found = load_settings(written(f"[default.qwen_image]\n{key} = {text}", folder / "config.toml"))[key]
        return found[0] if key == "loras" else found

    assert placed("model") == placed("./model") == str(folder / "model")
    assert placed("o/base") == str(folder / "o/base")
    assert placed("demo") == "demo"  # a demo's name is one wherever it is said
    assert placed("./demo") == str(folder / "demo")
    assert placed("Qwen/Qwen-Image") == "Qwen/Qwen-Image"
    assert placed("elsewhere") == "elsewhere"
    assert placed("~/model") == str(home / "model")
    assert placed(str(here / "elsewhere")) == str(here / "elsewhere")
    assert placed("style.safetensors", "loras") == str(folder / "style.safetensors")
    assert placed("style.safetensors@0.8", "loras") == f"{folder / 'style.safetensors'}@0.8"
    assert placed("styles@2", "loras") == str(folder / "styles@2")
    assert placed("styles@2@0.5", "loras") == f"{folder / 'styles@2'}@0.5"
    assert placed("owner/repo:file.safetensors@0.8", "loras") == "owner/repo:file.safetensors@0.8"
    assert placed("~/style.safetensors@1", "loras") == f"{home / 'style.safetensors'}@1"


def test_places_of_controls_beside_the_config(here):
    folder = here / "sub"
    for name in ("edges.safetensors", "edges.png", "in-context", "demo-control"):
        written("", folder / name)

    def placed(control: str) -> dict:
        path = written(f"[default.qwen_image]\ncontrols = [{{{control}}}]", folder / "config.toml")
        (found,) = load_settings(path)["controls"]
        return found

    assert placed('controlnet = "edges.safetensors", image = "edges.png", mask = "none.png", scale = 1') == {
        "controlnet": str(folder / "edges.safetensors"), "image": str(folder / "edges.png"), "mask": "none.png",
        "scale": 1,
    }  # fmt: skip
    for name in ("in-context", "demo-control", "owner/repo:file.safetensors"):
        assert placed(f'controlnet = "{name}"') == {"controlnet": name}


def test_controls_as_tables_of_their_own(here):
    text = "\n[[default.qwen_image.controls]]\ncontrolnet = 'a'\n[[default.qwen_image.controls]]\ncontrolnet = 'b'\n"
    settings = load_settings(written(OURS + text + "scale = 0.5\n[bare.qwen_image]\ncontrols = []"))
    assert settings["controls"] == [{"controlnet": "a"}, {"controlnet": "b", "scale": 0.5}]
    assert (
        settings.of_command("generate")["controls"] == settings.of_command("edit")["controls"] == settings["controls"]
    )
    assert "controls" not in settings.of_command("decompose")
    assert load_settings(Path("config.toml"), "bare")["controls"] == []
    for more, fault in (
        ("start = 0.5\nend = 0.2", "the control starts at 0.5, after its end at 0.2"),
        ("source = 'x.png'", "the control has a source to inpaint, but no mask"),
        ("image = ''", 'image of item 2 of controls is "", but must be the name of an image'),
    ):
        assert refused(OURS + text + more).startswith(f"config.toml, line 4: {fault}")
    assert "controlnet is ''" in refused(OURS + '\ncontrols = [{controlnet = ""}]')
    assert 'a field of item 1 of controls is "strength", but must be one of controlnet, image' in refused(
        OURS + '\ncontrols = [{controlnet = "a", strength = 1}]'
    )
    fault = "scale of item 2 of controls is 99, but must be a number from -10 to 10"
    assert refused(OURS + text + "scale = 99") == f"config.toml, line 4: {fault}"


# --- where it is found ---------------------------------------------------------------------------------------------


def test_a_pipe_is_a_config_too(here):
    read, write = os.pipe()
    os.write(write, OURS.encode())
    os.close(write)
    assert load_settings(find_config(f"/dev/fd/{read}"))["model_path"] == "demo"
    os.close(read)


def test_a_pipe_that_may_have_no_writer_is_refused(here):
    os.mkfifo("pipe")
    with pytest.raises(RequestError, match="the config pipe does not exist, or is not a file that can be read"):
        find_config("pipe")


def test_an_empty_name_is_called_so(here):
    with pytest.raises(RequestError, match="the config's name is empty"):
        find_config("")


def test_a_file_without_an_end_is_refused(here):
    assert set(load_settings(find_config("/dev/null")).values.values()) == {None}
    with pytest.raises(RequestError, match="the config /dev/zero has more than 100 KB"):
        load_settings(find_config("/dev/zero"))


SLOW = {
    "a key of many names": "a" + ".a" * 49_000 + " = 1",
    "a table of many names": "[" + "a . " * 24_000 + "a]",
    "many names in braces": "a = {b" + ".b" * 40_000 + " = 1}",
    "quotes that do not end": 'a = "' + '\\"' * 49_000,
    "deep lists": "a = " + "[" * 99_000,
    "many tables": "\n".join(f"[qwen_image.b{n}]" for n in range(5_000)),
}


@pytest.mark.parametrize("text", SLOW.values(), ids=SLOW)
def test_no_file_takes_long(here, text):
    Path("config.toml").write_text(text)
    since = time.perf_counter()
    with pytest.raises(RequestError, match=r"config\.toml"):
        load_settings(Path("config.toml"))
    assert time.perf_counter() - since < 10


@pytest.mark.parametrize("text", ["a = [" + "1.5, " * 10_000 + "]", 'a = "' + "a." * 100 + '"  # ' + "a." * 100])
def test_dots_that_join_no_names_are_no_fault(here, text):
    Path("config.toml").write_text(f"{text}\n[default.qwen_image]\nnum_layers = 2\n")
    assert load_settings(Path("config.toml"))["num_layers"] == 2


def test_a_file_that_went_away_is_said(here):
    with pytest.raises(RequestError, match=r"the config gone.toml cannot be read: No such file"):
        load_settings(Path("gone.toml"))


def test_the_nearest_config_is_in_force(here, monkeypatch):
    home = here.parent / "home"
    assert find_config() is None
    if sys.platform == "darwin":
        place = home / "Library/Application Support/qwen-image-mlx/config.toml"
    else:
        place = home / ".config/qwen-image-mlx/config.toml"
    assert default_place() == place
    written("", place)
    assert find_config() == place
    written(OURS)
    assert find_config() == Path("config.toml")
    named = written(OURS, here / "by-variable.toml")
    monkeypatch.setenv("QWEN_IMAGE_CONFIG", str(named))
    assert find_config() == named
    monkeypatch.setenv("QWEN_IMAGE_CONFIG", "")
    assert find_config() == Path("config.toml")
    monkeypatch.setenv("QWEN_IMAGE_CONFIG", "./none.toml")
    assert find_config(written(OURS, "by-flag.toml")) == Path("by-flag.toml")
    written(OURS, home / "my.toml")
    assert find_config("~/my.toml") == home / "my.toml"


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS has a folder of its own")
def test_xdg_config_home(here, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(here / "xdg"))
    assert default_place() == here / "xdg/qwen-image-mlx/config.toml"
    monkeypatch.setenv("XDG_CONFIG_HOME", "relative")  # to be ignored, says the specification
    assert default_place() == here.parent / "home/.config/qwen-image-mlx/config.toml"


def test_macos_has_its_own_folder(here, monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(here / "xdg"))
    assert default_place() == here.parent / "home/Library/Application Support/qwen-image-mlx/config.toml"


@pytest.mark.parametrize("text", [
    "", "# qwen_image", "[server]\nport = 80", "[qwen_image]\nsteps = 3", "broken =", b"\xff\xfe[\x00",
    'names = ["qwen_image"]', "[default]\nqwen_imag = {}", "# qwen_image\nbroken =", "{{ qwen_image }}",
])  # fmt: skip
def test_another_program_s_config_toml_is_passed_over(here, text):
    written(text)
    assert find_config() is None


@pytest.mark.parametrize("text", [OURS, "[fast.qwen_image]\nbroken =", "\ufeff" + OURS])
def test_our_own_is_not_even_when_it_is_broken(here, text):
    written(text)
    assert find_config() == Path("config.toml")


def test_a_folder_of_that_name_is_passed_over(here):
    Path("config.toml").mkdir()
    assert find_config() is None


@pytest.mark.parametrize(("by", "place"), [
    ("flag", "none.toml"), ("flag", "folder"), ("flag", "nul\0"), ("variable", "none.toml"),
    ("variable", "folder"),
])  # fmt: skip
def test_a_named_config_must_be_there(here, monkeypatch, by, place):
    written(OURS)
    Path("folder").mkdir()
    if by == "variable":
        monkeypatch.setenv("QWEN_IMAGE_CONFIG", place)
    with pytest.raises(RequestError, match=r"the config .* does not exist, or is not a file") as caught:
        find_config(place if by == "flag" else None)
    assert ("QWEN_IMAGE_CONFIG" in str(caught.value)) == (by == "variable")


# --- the example ---------------------------------------------------------------------------------------------------


def test_the_example_sets_nothing_and_each_of_its_lines_is_good(here):
    path = written(example_config())
    assert set(load_settings(path).origins.values()) == {"built-in"}
    uncommented = "\n".join(line[1:] if line[:2] not in ("# ", "") and line[0] == "#" else line
                            for line in example_config().splitlines())  # fmt: skip
    settings = load_settings(written(uncommented))
    for row in SCHEMA:
        assert settings[row.key] == row.kind.store(row.example)
    assert load_settings(path.with_name("config.toml"), "fast")["steps"] == 20


def test_deep_keys_are_refused_in_a_sentence(here):
    deep = ".".join(["a"] * 3000)
    assert "line 2: a key has more than 32 names" in refused(f"[default.qwen_image]\n{deep} = 1")
    assert "line 2: a key has more than 32 names" in refused(f"[default.qwen_image]\nsteps.{deep} = 1")
    assert "line 2: cfg_scale is" in refused(f"[default.qwen_image]\ncfg_scale.{'.'.join('a' * 20)} = 1")
    assert "line 1: a key has more than 32 names" in refused(f"[other.{deep}]\n[default.qwen_image]\ncfg_scale = 0")
    assert "line 3: this cannot be read as TOML" in refused(f"a = 1\n\nb = {'[' * 90_000}\nc = 2")


@pytest.mark.parametrize("table", ["project", "default.qwen_image"])
def test_long_configs_are_read_in_no_time(here, table):
    items = "".join(f'  "item {n}",\n' for n in range(20_000))
    began = time.perf_counter()
    _, found = lines.parse_toml(f"[{table}]\nitems = [\n{items}]\n[end]\n".encode(), "x")
    assert found["end",] == 20_004
    assert time.perf_counter() - began < 10  # a minute where every line is tried as the last


def test_another_program_s_config_is_not_even_parsed(here, monkeypatch):
    written("[project]\nitems = []")
    monkeypatch.setattr(files, "parse_toml", None)
    assert find_config() is None


@pytest.mark.parametrize("value", [
    '"]"', "'['", '"\\"["', '"""\n"]\n[a]\n\\""" """', '"""\na"""""', "'''\n[b]\n\\''''",
    "[ # ]\n1, # '\n]", "[\n[\n],\n]",
    "{a = [\n1,\n]}", "1 # [", '""', "''", '""""""', "''''''", '"#" # "',
])  # fmt: skip
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_lines_after_whatever_a_value_is(value, end):
    text = f"before = 1\na.b = {value}\n\n[after]\nc = 2\n"
    _, found = lines.parse_toml(text.replace("\n", end).encode(), "x")
    last = 5 + value.count("\n")
    assert found == {("before",): 1, ("a",): 2, ("a", "b"): 2, ("after",): last - 1, ("after", "c"): last} | (
        {("a", "b", "a"): 2} if value[0] == "{" else {}
    )


def test_lines_are_those_of_every_key(here):
    text = "a.b = 1\n[c]\n\nd = [\n1,\n]\n[c.e]\nf = {g = 2}\n[[h]]\ni = 3\n"
    values, found = lines.parse_toml(text.encode(), "x")
    assert values == {"a": {"b": 1}, "c": {"d": [1], "e": {"f": {"g": 2}}}, "h": [{"i": 3}]}
    assert found == {
        ("a",): 1, ("a", "b"): 1, ("c",): 2, ("c", "d"): 4, ("c", "e"): 7, ("c", "e", "f"): 8, ("c", "e", "f", "g"): 8,
        ("h",): 9, ("h", "i"): 10,
    }  # fmt: skip


@pytest.mark.parametrize("text", [
    '[models]\nqwen_image = "Qwen/Qwen-Image"\n', "[default]\nqwen_image = true\n", "qwen_image = 3\n",
    "[[models]]\nqwen_image = 1\n", "[server]\nport = 8501\n",
])  # fmt: skip
def test_a_config_of_another_program_in_the_working_directory_is_left_alone(here, text):
    written(text)
    assert find_config() is None
