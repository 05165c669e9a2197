"""What users rely on by name; a change here is a change of the public contract."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import pytest

import qwen_image_mlx
from qwen_image_mlx.cli.main import build_parser

ROOT = Path(__file__).parents[2]
HEAVY = ("mlx", "numpy", "PIL", "tokenizers", "huggingface_hub", "torch", "transformers")

PUBLIC = {
    "__version__", "QwenImagePipeline", "GenerationParameters", "GuidanceEncoding", "InitialImage", "Progress",
    "LayeredResult", "Control", "Quantization", "compose", "Preview", "to_images", "pack_multi_layer_latents",
    "unpack_multi_layer_latents", "HubSnapshot",
    "ignore_profiles", "QwenImageError", "RequestError", "CheckpointError", "GPUError", "HubError", "OutputError",
    "Cancelled",
}  # fmt: skip
MODEL = {
    "--help", "--model", "--revision", "--dtype", "--quantize", "--group-size", "--text-encoder", "-h", "-m", "-q",
}  # fmt: skip
PAINTER = MODEL | {
    "--lora", "--lora-mode", "--lightning", "--transformer", "--vae", "--memory", "--force", "--config", "--profile",
    "--preview", "--wire", "--timings", "--quiet", "--verbose", "--json",
}  # fmt: skip
SAMPLING = {"--negative-prompt", "--steps", "--cfg-scale", "--guidance", "--seed", "--rng", "-n", "-g", "-s"} | {
    "--solver",
    "--guidance-interval",
    "--cfg-zero-star",
    "--apg",
    "--step-cache",
    "--preset",
}
PAINTING = PAINTER | SAMPLING | {
    "--width", "--height", "--num-images", "--output", "--image", "--mask", "--strength", "--size", "--mask-padding",
    "--no-composite", "--transparent", "--no-prefix-cache", "--cache", "--from-image", "--ignore-profile", "-W", "-H",
    "-o", "--prompt", "-p", "--image-path", "--outpaint", "--controlnet", "--control-image", "--control-scale",
    "--control-start", "--control-end", "--control-mask", "--control-source", "--control-kind", "--parallel",
}  # fmt: skip
FLAGS = {
    "generate": PAINTING | {"--aspect", "--prompts-file", "--seeds", "--contact-sheet", "--pick"},
    "edit": PAINTING | {"-i", "--layer", "--reference-pixels", "--keep-alpha", "--zero-cond-t"},
    "decompose": PAINTER | SAMPLING | {
        "--layer", "--prompt", "-p", "--layers", "--resolution", "--size", "--cfg-normalize", "--caption-language",
        "--format", "--output", "--layer-prompt", "--layer-mask", "--cache", "--ignore-profile", "-o", "--parallel",
    },
    "compose": PAINTER | SAMPLING | {
        "--hide", "--move", "--scale", "--output", "--harmonize", "--num-images", "--cache", "--ignore-profile", "-o",
    },
    "caption": MODEL | {
        "--config", "--profile", "--language", "--resolution", "--seed", "--ignore-profile", "-s", "--quiet",
        "--verbose", "--json",
    },
    "train": MODEL | {
        "--config", "--profile", "--ignore-profile",
        "--data", "--output", "--task", "--steps", "--rank", "--alpha", "--targets", "--full", "--learning-rate",
        "--warmup", "--schedule", "--batch-size", "--accumulate", "--weight-decay", "--timesteps", "--logit-mean",
        "--logit-std", "--shift", "--weighting", "--resolution", "--caption-dropout", "--checkpointing", "--ema",
        "--seed", "--save-every", "--sample-every", "--sample-prompt", "--resume", "-o", "-s",
    },
    "quantize": {"-h", "--help", "--bits", "-q", "--group-size", "--revision"},
    "plan": {
        "-h", "--help", "--memory", "--revision", "--dtype", "--quantize", "-q", "--group-size", "--size",
        "--references", "--layers", "--steps", "--solver", "--step-cache", "--json", "--config", "--profile",
        "--no-prefix-cache",
    },
    "lora": {"-h", "--help"},
    "lora inspect": {"-h", "--help", "--model", "-m"},
    "info": {"-h", "--help", "--json"},
    "completion": {"-h", "--help"},
    "doctor": {"-h", "--help", "--only", "--json", "--compare", "--golden", "--model", "-m", "--env"},
    "config": {"-h", "--help"},
    "config show": {"-h", "--help", "--json", "--config", "--profile"},
    "config init": {"-h", "--help"},
    "config path": {"-h", "--help", "--config"},
    "calibrate-cache": MODEL | {
        "--lora", "--lora-mode", "--lightning", "--transformer", "--vae", "--memory", "--cfg-scale", "-g", "--guidance",
        "--quiet", "--prompt", "-p", "--steps", "--size",
    },
    "serve": {
        "-h", "--help", "--host", "--port", "--config", "--profile", "--model", "-m", "--edit-model", "--layered-model",
        "--quantize", "-q", "--memory", "--token-file", "--alias", "--allow-host", "--allow-origin", "--idle-unload",
        "--job-limit", "--grace", "--queue", "--max-pixels", "--max-steps", "--ignore-profile", "--controlnet",
        "--parallel",
    },
}  # fmt: skip


def test_public_names():
    assert set(qwen_image_mlx.__all__) == PUBLIC
    for name in PUBLIC:
        assert getattr(qwen_image_mlx, name) is not None
    assert set(dir(qwen_image_mlx)) >= PUBLIC


def commands_of(parser: argparse.ArgumentParser, prefix: str = ""):
    """(command, flags) of every command and of those below it."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, below in action.choices.items():
                yield prefix + name, {option for a in below._actions for option in a.option_strings}
                yield from commands_of(below, f"{prefix}{name} ")


def test_flags_of_every_command():
    found = dict(commands_of(build_parser()))
    assert found == FLAGS


def heavy_modules(*commands: str) -> list[str]:
    """What a fresh interpreter says of the package's import and then of every command's help, one after another."""
    code = (
        "import contextlib, io, runpy, sys\n"
        "import qwen_image_mlx\n"
        f"loaded = lambda: [name for name in {HEAVY} if name in sys.modules]\n"
        "print('import', loaded())\n"
        "for command in sys.argv[1:]:\n"
        "    sys.argv = ['-', *command.split(), '--help']\n"
        "    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.suppress(SystemExit):\n"
        "        runpy.run_module('qwen_image_mlx', run_name='__main__')\n"
        "    print(command, loaded(), 'usage:' in said.getvalue())"
    )
    done = subprocess.run([sys.executable, "-c", code, *commands], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


@pytest.mark.process
def test_importing_and_asking_for_help_load_nothing_heavy():
    commands = ["", *FLAGS]
    assert heavy_modules(*commands) == ["import []", *(f"{command} [] True" for command in commands)]


def test_the_package_is_typed():
    assert (ROOT / "qwen_image_mlx" / "py.typed").is_file()


def test_ci_runs_the_readme_s_test_command():
    readme, ci = (ROOT / "README.md").read_text(), (ROOT / ".ci" / "run").read_text()
    (line,) = [line for line in readme.splitlines() if line.endswith("-m pytest")]
    steps = [step.strip() for step in line.split("&&")]
    assert steps[-1] == ".venv/bin/python -m pytest"
    lines = [line.replace(" --quiet", "") for line in ci.splitlines()]
    assert [step for step in steps if step not in lines] == []
