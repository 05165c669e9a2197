"""Several ranks on one machine, over MLX's ring backend: the same images as one process, and one end for all."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from control_files import BLOCKWISE, FUN, FUN_21, INSTANTX, write_control
from lora_files import write_lora
from PIL import Image
from ranked import environments, finish, free_ports, latents_of, run, start

from qwen_image_mlx.sampling.step_caches import CacheFacts, TeaFacts

pytestmark = pytest.mark.process

SIZE = ("--width", "64", "--height", "48", "--dtype", "float32", "--steps", "2")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Small checkpoints of four blocks, or three of 2.1; and a LoRA, ControlNets and a calibration."""
    from dataclasses import replace

    from checkpoints_21 import write_checkpoint_21

    from qwen_image_mlx.pipeline import calibrated
    from qwen_image_mlx.pipeline.pipeline import QwenImagePipeline
    from qwen_image_mlx.variants import OWN
    from qwen_image_mlx.weights.synthetic import TINY, write_checkpoint

    folder = tmp_path_factory.mktemp("ranks")
    configs = TINY | {"transformer": replace(TINY["transformer"], num_layers=4)}
    layered = configs | {
        "transformer": replace(configs["transformer"], use_additional_t_cond=True, use_layer3d_rope=True)
    }
    small = {"encoder_area": 96**2, "reference_area": 64**2, "target_area": 64**2}
    for name, kind, its, own in (
        ("t2i", "QwenImagePipeline", configs, {}),
        ("edit", "QwenImageEditPlusPipeline", configs, small),
        ("layered", "QwenImageLayeredPipeline", layered, {"resolutions": [64]}),
    ):
        write_checkpoint(folder / name, its, pipeline=kind)
        index = folder / name / "model_index.json"
        index.write_text(json.dumps(json.loads(index.read_bytes()) | {OWN: own}))
    write_checkpoint_21(folder / "v21")
    shapes = QwenImagePipeline.from_pretrained(folder / "t2i").lora_targets()
    write_lora(folder / "style.safetensors", shapes)
    for name, kind, layers in (("control", INSTANTX, 2), ("fun", FUN, 2), ("blockwise", BLOCKWISE, 4)):
        write_control(folder / f"{name}.safetensors", folder / "t2i", kind, layers=layers)
    write_control(folder / "control21.safetensors", folder / "v21", FUN_21, layers=1, extra=65)
    Image.linear_gradient("L").resize((64, 48)).convert("RGB").save(folder / "photo.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_DATA_HOME", str(folder))
        calibrated.write_facts(CacheFacts(TeaFacts((1.0, 0.0), 0.0, 9.0, 1.0), (1.0,)), str(folder / "t2i"), ())
        yield folder


BOTH = ["guidance", "layers"]
T2I = {"model": "t2i", "steps": 2, "cfg_scale": 4.0}
EDIT_21 = T2I | {"model": "v21", "reference_pixels": 4096}
CONTROL = {"controlnet": "control.safetensors", "image": "photo.png"}
BLOCKS = CONTROL | {"controlnet": "blockwise.safetensors"}
INTERVAL = {"guidance_interval": "0.3:0.8"}
CAPTIONED = T2I | {"model": "layered", "layers": 2, "prompt": ""}
CACHED = T2I | {"steps": 9}
CONTROL_21 = CONTROL | {"controlnet": "control21.safetensors"}
CASES = [
    {"name": "generate", "modes": BOTH, "options": T2I},
    {"name": "unguided", "modes": ["layers"], "options": T2I | {"cfg_scale": 1.0}},
    {"name": "bf16", "modes": ["layers"], "options": T2I | {"dtype": "bfloat16"}},
    {"name": "quantized", "modes": BOTH, "options": T2I | {"quantize": "transformer=8", "group_size": 32}},
    {"name": "merged", "modes": ["guidance"], "options": T2I | {"loras": ["style.safetensors"], "lora_mode": "merge"}},
    {"name": "unmerged", "modes": BOTH, "options": T2I | {"loras": ["style.safetensors"], "lora_mode": "side"}},
    {"name": "streamed", "modes": ["layers"], "options": T2I | {"memory": "streamed"}},
    {"name": "inpainted", "modes": BOTH, "images": 1, "mask": True, "options": T2I | {"strength": 0.9}},
    {"name": "controlled", "modes": ["images", *BOTH], "options": T2I | {"controls": [CONTROL], "num_images": 2}},
    {"name": "fun", "modes": BOTH, "options": T2I | {"controls": [CONTROL | {"controlnet": "fun.safetensors"}]}},
    {"name": "blockwise", "modes": ["layers"], "options": T2I | {"controls": [BLOCKS]}},
    {"name": "blockwise streamed", "modes": ["layers"], "options": T2I | {"controls": [BLOCKS], "memory": "streamed"}},
    {"name": "controlled21", "modes": BOTH, "options": T2I | {"model": "v21", "controls": [CONTROL_21]}},
    {"name": "first-block", "modes": BOTH, "options": CACHED | {"step_cache": "first-block:9"}},
    {"name": "teacache", "modes": BOTH, "options": CACHED | {"step_cache": "teacache"}},
    {"name": "easycache", "modes": BOTH, "options": CACHED | {"step_cache": "easycache:0.5", "model": "v21"}},
    {"name": "taylorseer", "modes": BOTH, "options": CACHED | {"step_cache": "taylorseer"} | INTERVAL},
    {"name": "edit", "modes": BOTH, "images": 2, "options": T2I | {"model": "edit"}},
    {"name": "decompose", "modes": ["guidance"], "images": 1, "options": T2I | {"model": "layered", "layers": 2}},
    {"name": "captioned", "modes": ["layers"], "images": 1, "options": CAPTIONED},
    {"name": "generate21", "modes": BOTH, "options": T2I | {"model": "v21"}},
    {"name": "another step21", "modes": ["layers"], "options": T2I | {"model": "v21", "steps": 3}},
    {"name": "edit21", "modes": BOTH, "images": 1, "options": EDIT_21},
    {"name": "unkept21", "modes": ["guidance"], "images": 1, "options": EDIT_21 | {"no_prefix_cache": True}},
]


def facts(file):
    """What a rank saved of a case: bytes it read, by tensor, and sent, passes that were left out, what was loaded."""
    return json.loads(file.read_text())


THREE = [case for case in CASES if case["name"] in ("generate", "controlled", "blockwise", "taylorseer", "captioned")]


@pytest.mark.parametrize(("size", "cases"), [(2, CASES), (3, THREE)])
def test_latents_are_those_of_one_process(models, size, cases):
    latents_of(1, models, cases)
    latents_of(size, models, cases)
    for case in cases:
        name = case["name"]
        latents, skipped = np.load(models / f"{name}.npy"), facts(models / f"{name}.0.json")["skipped"]
        assert bool(skipped) == ("step_cache" in case["options"])
        for mode in case["modes"]:
            place = models / f"{mode}{size}"
            np.testing.assert_array_equal(np.load(place / f"{name}.npy"), latents, f"{name} {mode}")
            assert facts(place / f"{name}.0.json")["skipped"] == skipped
    reads = [facts(models / f"layers{size}" / f"generate.{rank}.json")["read"] for rank in range(size)]
    every = facts(models / "generate.0.json")["read"]
    blocks = [{name for name in read if name.startswith("transformer_blocks.")} for read in reads]
    assert set.union(*blocks) == {name for name in every if name.startswith("transformer_blocks.")}
    assert sum(map(len, blocks)) == len(set.union(*blocks))  # no block is read twice
    assert all(read[name] == every[name] for read in reads for name in read)
    # A rank without a prompt loads no encoder, and only rank 0 writes captions.
    loaded = [facts(models / f"layers{size}" / f"captioned.{rank}.json")["loaded"] for rank in range(size)]
    assert ["text_encoder" in names for names in loaded] == [True, True, False][:size]
    assert ["language_head" in names for names in loaded] == [True, False, False][:size]
    if size == 2:
        less, more = (facts(models / "layers2" / f"{name}.0.json")["sent"] for name in ("generate21", "another step21"))
        width = json.loads((models / "v21" / "transformer" / "config.json").read_text())
        assert more - less == 2 * 16 * width["attention_head_dim"] * width["num_attention_heads"] * 4  # no prefix


def test_an_image_and_its_record_are_those_of_one_process(models):
    command = ("generate", "a fox", "--model", "t2i", "--seed", "5", *SIZE)
    subprocess.run([sys.executable, "-m", "qwen_image_mlx", *command, "-o", "one.png"], cwd=models, check=True)
    (port,) = free_ports(1)
    launch = [Path(sys.executable).with_name("mlx.launch"), "-n", "2", "--starting-port", str(port), "--"]
    launch += [sys.executable, "-m", "qwen_image_mlx", *command, "-o", "two.png"]
    done = subprocess.run(launch, cwd=models, capture_output=True, text=True, timeout=120)
    assert (models / "two.png").read_bytes() == (models / "one.png").read_bytes(), done.stderr
    assert done.stdout.splitlines() == ["two.png"]
    assert "rank 1 of 2: the negative branch" in done.stderr


def test_a_batch_is_shared_and_resumed(models):
    lines = [{"prompt": "a fox", "seed": seed} for seed in range(1, 6)]
    lines[1]["step_cache"] = "first-block:9"  # its record has the passes of the rank that ran it
    (models / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    command = ("generate", "--prompts-file", "prompts.jsonl", "--model", "t2i", *SIZE[:-1], "9")
    subprocess.run([sys.executable, "-m", "qwen_image_mlx", *command, "-o", "alone"], cwd=models, check=True)
    files = {file.name: file.read_bytes() for file in (models / "alone").iterdir()}
    _, (_, _, other) = run(2, models, *command, "-o", "shared")
    assert "a share of the images" in other
    assert {file.name: file.read_bytes() for file in (models / "shared").iterdir()} == files
    for name in sorted(files)[1:4:2]:
        (models / "shared" / name).unlink()
    shutil.copytree(models / "shared", models / "nearly")
    shutil.copy(models / "alone" / sorted(files)[1], models / "nearly")
    run(2, models, *command, "-o", "nearly", "--parallel", "images")  # one is left, which cannot be shared so
    assert {file.name: file.read_bytes() for file in (models / "nearly").iterdir()} == files
    ended = run(3, models, *command, "-o", "shared", "--parallel", "images")  # more ranks than images
    assert len(ended[0][1].splitlines()) == 2
    assert "rank 2 of 3: nothing to do" in ended[2][2]
    assert {file.name: file.read_bytes() for file in (models / "shared").iterdir()} == files


def test_layers_of_an_image(models):
    command = ("decompose", "photo.png", "--model", "layered", "--prompt", "a fox", "--layers", "2", "--resolution",
               "64", "--seed", "3", "--dtype", "float32", "--steps", "2")  # fmt: skip
    subprocess.run([sys.executable, "-m", "qwen_image_mlx", *command, "-o", "a"], cwd=models, check=True)
    run(2, models, *command, "-o", "b", "--parallel", "layers")
    files = [{file.name: file.read_bytes() for file in (models / name).iterdir()} for name in ("a", "b")]
    assert files[0] == files[1]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"--seed": "2"}, "rank 1 differs from rank 0 in the seeds: [2], not [1]"),
        ({"--model": "other"}, "rank 1 differs from rank 0 in the files of the transformer"),
        ({"--controlnet": "other.safetensors"}, "rank 1 differs from rank 0 in the files of the controlnet"),
        ({"--control-image": "other.png"}, "rank 1 differs from rank 0 in the controls"),
    ],
)
def test_ranks_that_differ_end_with_one_sentence(models, tmp_path, changed, said):
    if "--model" in changed:
        shutil.copytree(models / "t2i", models / "other")
        file = next((models / "other" / "transformer").glob("*.safetensors"))
        data = bytearray(file.read_bytes())
        data[-(len(data) // 2) :] = bytes(len(data) // 2)  # other values under the same header
        file.write_bytes(data)
    write_control(models / "other.safetensors", models / "t2i", INSTANTX, layers=2, seed=1)
    Image.linear_gradient("L").rotate(90).resize((64, 48)).convert("RGB").save(models / "other.png")
    flags = {"--model": "t2i", "--seed": "1", "--width": "64", "--height": "48", "--dtype": "float32", "--steps": "2",
             "--controlnet": "control.safetensors", "--control-image": "photo.png"}  # fmt: skip
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "qwen_image_mlx", "generate", "a fox", *(w for p in own.items() for w in p),
             "-o", "differs.png"],
            cwd=models, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for own, environment in zip((flags, flags | changed), environments(2, tmp_path), strict=True)
    ]  # fmt: skip
    for code, out, err in finish(processes):
        assert (code, out) == (2, "")
        assert said in err
        assert "Traceback" not in err
    assert not (models / "differs.png").exists()


def test_a_step_cache_that_needs_more_blocks_of_a_rank_says_so(models):
    flags = ("--step-cache", "first-block", "--steps", "12", "--parallel", "layers")
    for code, out, err in finish(start(3, models, "generate", "a", "--model", "t2i", *SIZE, *flags, "-o", "no.png")):
        assert (code, out) == (2, "")
        assert "3 ranks cannot share 4 blocks, at least 2 each: start at most 2" in err
    assert not (models / "no.png").exists()


@pytest.mark.parametrize(
    ("mode", "dies", "sent"),
    [("guidance", 0, signal.SIGKILL), ("layers", 1, signal.SIGINT)],
)
def test_a_rank_that_dies_ends_all(models, tmp_path, mode, dies, sent):
    # Without a seed: they would end in another way if each drew its own.
    processes = start(
        2, models, "generate", "a fox", "--model", "t2i", *SIZE[:-1], "150", "--parallel", mode,
        "-o", str(tmp_path / "fox.png"),
    )  # fmt: skip
    while "2 ranks share" not in processes[0].stderr.readline():
        assert processes[0].poll() is None
    time.sleep(2)  # of the ten that it takes, or more
    processes[dies].send_signal(sent)
    began = time.monotonic()
    ended = finish(processes, seconds=60)
    assert time.monotonic() - began < 10
    assert all(code not in (0, None) for code, _, _ in ended), ended
    assert "another rank has ended" in ended[1 - dies][2]
    assert "Traceback" not in ended[1 - dies][2]
    assert not list(tmp_path.glob("*.png"))
