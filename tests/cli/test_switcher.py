"""Command lines of people who come from other programs: each works or is answered; none is silently wrong."""

from __future__ import annotations

import io
import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from commands import error_line
from PIL import ExifTags, Image

from qwen_image_mlx.cli.foreign import COMMANDS, FOREIGN
from qwen_image_mlx.cli.main import build_parser, main
from qwen_image_mlx.errors import CheckpointError
from qwen_image_mlx.images.files import read_metadata
from qwen_image_mlx.runtime.options import OpenOptions
from qwen_image_mlx.variants import MODEL_ALIASES, full_name
from qwen_image_mlx.weights.snapshot import HubSnapshot

DEMO = "--model demo --steps 2"
# What is typed, and what it comes to.
WORKS = [
    ('generate --prompt "a red circle"', {"prompt": "a red circle"}),
    ('generate -p "a red circle" --seed 42', {"prompt": "a red circle", "seed": [42]}),
    ('generate --seed 42 -p "a red circle"', {"prompt": "a red circle", "seed": [42]}),
    ('generate "a red circle" -q 8', {"quantize": "8"}),
    ('generate "a red circle" --quantize 4', {"quantize": "4"}),
    ("generate x --guidance 3.5", {"cfg_scale": 3.5}),
    ("generate x -g 1", {"cfg_scale": 1.0}),
    ("generate x --seed 1,2,3", {"seed": [1, 2, 3]}),
    ("generate x --seed=1,2", {"seed": [1, 2]}),
    ("generate x --seed 1 2,3", {"seed": [1, 2, 3]}),
    ("generate x --seed -1", {"seed": [-1]}),
    ("generate x --lora a.safetensors 0.7", {"loras": ["a.safetensors@0.7"]}),
    ("generate x --lora a.safetensors -.5 --steps 4", {"loras": ["a.safetensors@-.5"], "steps": 4}),
    ("generate x --lora a.safetensors --lora b.safetensors 1", {"loras": ["a.safetensors", "b.safetensors@1"]}),
    ('generate --lora a.safetensors "a fox"', {"loras": ["a.safetensors"], "prompt": "a fox"}),
    ("generate x --lora owner/repo:a.safetensors@0.8", {"loras": ["owner/repo:a.safetensors@0.8"]}),
    ("generate x --image-path a.png --strength 0.4", {"images": ["a.png"], "strength": 0.4}),
    ('edit -p "make it blue" --image-path a.png -i b.png', {"prompt": "make it blue", "images": ["a.png", "b.png"]}),
    ('decompose a.png -p "a boat"', {"prompt": "a boat", "image": "a.png"}),
    ("generate x --model qwen-image", {"model": "qwen-image"}),
    ("generate x -m 2512 --width 1024 --height 768", {"model": "2512", "width": 1024, "height": 768}),
    ("generate x -W 512 -H 512", {"width": 512, "height": 512}),
    ("generate x --negative-prompt blurry", {"negative_prompt": "blurry"}),
    ("generate x -o out-{seed}.jpg", {"output": "out-{seed}.jpg"}),
    ("generate -", {"prompt": "-"}),
    ("generate x --quiet --timings", {"quiet": True, "timings": True}),
    ("generate x --verbose --json", {"verbose": True, "json": True}),
    ("caption a.png --json", {"json": True}),
    ("quantize Qwen/Qwen-Image out -q 4", {"bits": "4"}),
    ("completion zsh", {"shell": "zsh"}),
]
# What is typed, and what the one sentence names.
ANSWERED = [
    ('generate "a red circle" -p "a fox"', "the prompt is given twice"),
    ("generate a red circle", "in quotes"),
    ("generate -portrait", "after two dashes"),
    ('generate --seed 1 "a red circle"', "put the prompt before --seed"),
    ("generate x --num-inference-steps 20", "give --steps"),
    ("generate x --num_inference_steps 20", "give --steps"),
    ("generate x --guidance-scale 4", "give --cfg-scale"),
    ("generate x --true-cfg-scale 4", "give --cfg-scale"),
    ("generate x --cfg 4", "give --cfg-scale"),
    ("generate x --batch-size 4", "give --num-images"),
    ("generate x --auto-seeds 4", "give --seeds 1-4"),
    ("generate x --sampler euler", "give --solver"),
    ("generate x --scheduler linear", "leave it out: the schedule"),
    ("generate x --clip-skip 2", "leave it out: these models have no CLIP"),
    ("generate x --lora-paths a.safetensors --lora-scales 0.7", "give --lora FILE STRENGTH"),
    ("generate x --lora-style storyboard", "give --lora FILE STRENGTH"),
    ("generate x --init-image a.png", "give --image"),
    ("generate x --image-strength 0.4", "give --strength"),
    ("edit x --image-paths a.png b.png", "give --image, once for each"),
    ("edit x --image a.png --masked-image-path m.png", "give --mask"),
    ("generate x --low-ram", "give --memory auto"),
    ("generate x --mlx-cache-limit-gb 8", "give --memory 16GB"),
    ("generate x --medvram", "give --memory auto"),
    ("generate x --device mps", "leave it out: MLX takes the GPU"),
    ("generate x --metadata", "leave it out: every image carries"),
    ("generate x --config-from-metadata a.png", "give --from-image"),
    ("generate x --stepwise-image-output-dir d", "give --preview"),
    ("generate x --controlnet-image-path a.png", "give --control-image"),
    ("generate x --no-progress", "give --quiet"),
    ("generate x -v", "give --verbose"),
    ("generate x --dry-run", "the command `plan`"),
    ("generate x --base-model qwen-image", "give --model"),
    ("generate x --outdir images", "give --output DIR/"),
    ("generate x --aspect-ratio 16:9", "give --aspect"),
    ("generate x --negative blurry", "give --negative-prompt"),
    ("generate x --profile", "--timings prints what each stage takes"),
    ("generate x --sedd 3", "did you mean --seed? (see qwen-image-mlx generate --help)"),
    ("generate x --out g.png", "give --output"),
    ("generate x -o out-{date}.png --model demo", "only {seed}, {index}, {prompt} are filled in"),
    ("generate x -o out.gif --model demo", "end the name in .png, .jpg or .webp"),
    ("generate x --model qwen-edit-2510", "did you mean qwen-edit-2511?"),
    ("generate x --layers 3", "--layers is a flag of decompose, plan"),
    ("edit x --image a.png --aspect 16:9", "--aspect is a flag of generate"),
    ("caption a.png --steps 3", "--steps is a flag of generate, edit, compose, decompose, plan"),
    ("txt2img x", "give generate"),
    ("img2img x --image a.png", "give generate --image"),
    ("download Qwen/Qwen-Image", "leave it out: a model is downloaded when it is first needed"),
    ("models", "or --model with a name such as 2512"),
    ("genrate x", "did you mean generate?"),
]  # fmt: skip


def test_there_are_enough_of_them():
    assert len(WORKS) + len(ANSWERED) >= 60
    assert len({line for line, _ in WORKS + ANSWERED}) == len(WORKS) + len(ANSWERED)


@pytest.mark.parametrize(("line", "means"), WORKS)
def test_it_is_understood(line, means):
    arguments = vars(build_parser().parse_args(shlex.split(line)))
    assert {name: arguments[name] for name in means} == means


@pytest.mark.parametrize(("line", "says"), ANSWERED)
def test_it_is_answered(here, capsys, line, says):
    code = main(shlex.split(line))
    out, err = capsys.readouterr()
    assert says in error_line((code, out.splitlines(), err))


def test_an_answer_is_what_the_command_has():
    """`caption` has no guidance: what another program calls it is not an answer there."""
    with pytest.raises(Exception, match="unrecognized arguments") as refused:
        build_parser().parse_args(["caption", "a.png", "--guidance-scale", "3"])
    assert "--cfg-scale" not in str(refused.value)


def test_no_foreign_name_is_one_of_ours():
    parsers = build_parser()._subparsers._group_actions[0].choices
    assert not COMMANDS.keys() & parsers.keys()
    image_parsers = [parsers[name] for name in ("generate", "edit")]
    assert not FOREIGN.keys() & {name for parser in image_parsers for name in parser._option_string_actions}


# --- short names of models -------------------------------------------------------------------------------------------


def test_a_short_name_is_a_hub_id(here):
    for name, model in MODEL_ALIASES.items():
        assert HubSnapshot(name).model == full_name(name.upper()) == model
        assert OpenOptions.from_options({"model": name}, "demo").model == model
    assert full_name("demo") == "demo"
    with pytest.raises(CheckpointError, match=r"did you mean layered\?"):
        HubSnapshot("layerd")


def test_a_folder_of_that_name_wins(here):
    Path("2512").mkdir()
    assert HubSnapshot("2512").is_local


# --- names and forms of files ----------------------------------------------------------------------------------------


@pytest.fixture
def run(here, capsys):
    """Runs a command in this process: (exit code, lines of stdout, stderr)."""

    def call(line):
        code = main(shlex.split(line))
        out, err = capsys.readouterr()
        return code, out.splitlines(), err

    return call


@pytest.mark.slow
def test_a_name_may_hold_index_and_prompt(run):
    code, out, err = run(f"generate -p 'A red, round circle' {DEMO} --seed 3,9 -o '{{prompt}}-{{index}}-{{seed}}.png'")
    assert (code, out) == (0, ["a-red-round-circle-1-3.png", "a-red-round-circle-2-9.png"]), err


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["jpg", "jpeg", "webp", "WEBP"])
def test_other_forms_carry_the_record_and_are_generated_again(run, suffix):
    assert run(f"generate 'ein roter Kreis ●' {DEMO} --seed 3 -o a.png")[0] == 0
    code, out, err = run(f"generate 'ein roter Kreis ●' {DEMO} --seed 3 -o a.{suffix}")
    assert (code, out) == (0, [f"a.{suffix}"]), err
    with Image.open(f"a.{suffix}") as image, Image.open("a.png") as exact:
        assert image.format == {"w": "WEBP", "j": "JPEG"}[suffix[0].lower()]
        far = np.abs(np.asarray(image, int) - np.asarray(exact, int)).max()
        assert far == 0 if image.format == "WEBP" else far < 40
    assert read_metadata(f"a.{suffix}") == read_metadata("a.png")
    code, (again,), err = run(f"generate --from-image a.{suffix} -o again.png")
    assert code == 0, err
    assert Path(again).read_bytes() == Path("a.png").read_bytes()
    assert "ein roter Kreis" in "\n".join(run(f"info a.{suffix}")[1])


def test_somebody_else_s_comment_is_not_taken_for_a_record(run):
    for comment in (b"ASCII\0\0\0Steps: 20", b'ASCII\0\0\0{"prompt": 1}', b"UNICODE\0x", b"ASCII\0\0\0" + b"[" * 5000):
        exif = Image.Exif()
        exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = comment
        Image.new("RGB", (8, 8)).save("a.jpg", exif=exif)
        assert "carries no parameters" in error_line(run("info a.jpg"))


def test_a_jpeg_that_would_lose_transparency_is_refused_before_any_work(run):
    Image.new("RGBA", (64, 64), (255, 0, 0, 100)).save("a.png")
    said = error_line(run("edit x --image a.png --keep-alpha --model ./none -o a.jpg"))
    assert "JPEG has no transparency" in said
    assert "folder" not in said


@pytest.mark.slow
def test_a_composition_is_a_jpeg_where_it_hides_nothing(run):
    Image.new("RGB", (64, 64), "red").save("a.png")
    assert run("decompose a.png -p x --model demo-layered --steps 1 --layers 2 -o apart")[0] == 0
    Image.new("RGBA", (64, 64), "blue").save("apart/layer_0.png")
    assert run("compose apart -o whole.jpg") == (0, ["whole.jpg"], "")
    assert read_metadata("whole.jpg")["layers"] == "apart"
    code, out, err = run("compose apart -o blended.jpg --harmonize x --model demo-edit --steps 1")
    assert (code, out) == (0, ["blended.jpg"]), err
    assert "has no effect" not in err
    with Image.open("blended-composed.png") as kept, Image.open("blended.jpg") as blended:
        assert (kept.format, blended.format) == ("PNG", "JPEG")
    Image.new("RGBA", (64, 64), (0, 0, 255, 9)).save("apart/layer_0.png")
    assert "JPEG has no transparency" in error_line(run("compose apart --hide 1 -o thin.jpg"))
    code, (line,), _ = run("compose apart -o whole.webp --json")
    assert (code, json.loads(line)["path"]) == (0, "whole.webp")


# --- what is shown ---------------------------------------------------------------------------------------------------


def test_quiet_shows_nothing_but_the_path(run):
    assert run(f"generate 'a red circle' {DEMO} --quiet -o a.png") == (0, ["a.png"], "")


def test_verbose_shows_the_options_and_what_stages_take(run):
    code, out, err = run(f"generate 'a red circle' {DEMO} --seed 3 --verbose -o a.png")
    assert (code, out) == (0, ["a.png"])
    assert "options: model 'demo'" in err
    assert "seconds" in err
    assert "profile" not in read_metadata("a.png")


@pytest.mark.slow
@pytest.mark.parametrize(("line", "facts"), [
    (f"generate 'a red circle' {DEMO} --seed 3 --num-images 2", {"seed": 3, "index": 1}),
    (f"generate 'a red circle' {DEMO} --seeds 3,4", {"seed": 4, "index": 0}),
    ("decompose a.png --prompt x --model demo-layered --steps 2 --layers 2 --seed 5", {"seed": 5, "prompt": "x"}),
])  # fmt: skip
def test_json_is_one_event_a_line(run, line, facts):
    Image.new("RGB", (64, 64), "red").save("a.png")
    code, out, err = run(f"{line} --json")
    assert (code, err) == (0, "")
    events = [json.loads(line) for line in out]
    assert {event["event"] for event in events} <= {"progress", "message", "result"}
    steps = [(e["step"], e["total"]) for e in events if e["event"] == "progress" and e["stage"] == "denoise"]
    assert (0, 2) in steps and (2, 2) in steps  # noqa: PT018
    result = [event for event in events if event["event"] == "result"][-1]
    assert Path(result["path"]).exists()
    assert {name: result[name] for name in facts} == facts


def test_json_tells_of_errors_too(run):
    code, out, err = run("generate x --model ./none --json")
    assert code == 2
    (event,) = [json.loads(line) for line in out]
    assert event == {"event": "error", "message": err.strip().removeprefix("error: ")}
    assert "./none" in event["message"]


@pytest.mark.slow
@pytest.mark.parametrize(("line", "says"), [
    (f"generate x {DEMO} --lora-mode side", "--lora-mode has no effect: no LoRA is given"),
    (f"generate x {DEMO} --ignore-profile", "--ignore-profile has no effect: no image is read"),
    (f"generate x {DEMO} --seeds 1 --lora-mode side", "--lora-mode has no effect: no LoRA is given"),
    ("edit x --image a.png --model demo-edit --steps 1 --keep-alpha", "--keep-alpha has no effect: the image has no"),
    ("decompose a.png -p x --model demo-layered --steps 1 --caption-language zh", "--caption-language has no effect"),
    ("decompose a.png -p x --model demo-layered --steps 1 -g 1 --cfg-normalize", "--cfg-normalize has no effect"),
    (f"generate x {DEMO} --parallel guidance", "--parallel has no effect: this is one process"),
    ("decompose a.png --layer-prompt x --model demo-layered --steps 1 --layers 3", "--layers has no effect: one layer"),
])  # fmt: skip
def test_a_flag_that_does_nothing_says_so(run, line, says):
    Image.new("RGB", (64, 64), "red").save("a.png")
    code, _, err = run(line)
    assert code == 0, err
    assert err.count(says) == 1
    assert " has no effect" not in run(f"generate x {DEMO}")[2]


# --- help and completion ---------------------------------------------------------------------------------------------


def help_of(command: str, capsys) -> str:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    return capsys.readouterr().out


@pytest.mark.parametrize("command", ["generate", "edit", "decompose", "compose", "caption"])
def test_help_is_short_before_it_is_long_and_ends_with_examples_that_parse(command, capsys):
    text = help_of(command, capsys)
    assert text.splitlines()[0].endswith("[flags]") or command == "caption"
    examples = text[text.index("examples:") :].splitlines()[1:]
    assert len(examples) >= 2
    for example in examples:
        words = shlex.split(example)
        assert words[0] == "qwen-image-mlx"
        assert words[1] == command
        build_parser().parse_args(words[1:])


def test_help_is_in_groups(capsys):
    lines = help_of("generate", capsys).splitlines()
    titles = [line.rstrip(":") for line in lines if line.endswith(":") and not line.startswith(" ")]
    assert titles[2:] == ["image", "size", "sampling", "image to image and inpainting",
                          "control by an image", "many images", "model",
                          "speed and memory", "output", "settings", "messages and progress", "examples"]  # fmt: skip


@pytest.mark.process
@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
@pytest.mark.parametrize(("words", "found"), [
    (["gen"], ["generate"]), (["edit", "--mask"], ["--mask", "--mask-padding"]),
    (["generate", "--rng", "t"], ["torch"]), (["config", "sh"], ["show"]),
])  # fmt: skip
def test_bash_completes(here, capsys, words, found):
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    line = " ".join(["qwen-image-mlx", *words])
    ask = f"{script}\nCOMP_WORDS=({line}); COMP_CWORD={len(words)}; _qwen_image_mlx; echo ${{COMPREPLY[@]}}"
    done = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, check=True)
    assert done.stdout.split() == found


def test_the_other_shells_name_every_command(capsys):
    from qwen_image_mlx.cli.main import COMMANDS as OURS

    for shell in ("zsh", "fish"):
        assert main(["completion", shell]) == 0
        said = capsys.readouterr().out
        assert all(command in said for command in OURS)
        assert "quantize" in said


def test_stdin_is_read(run, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a red circle\n")))
    code, _, err = run(f"generate - {DEMO} -o a.webp")
    assert code == 0, err
    assert read_metadata("a.webp")["prompt"] == "a red circle"
