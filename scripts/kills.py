#!/usr/bin/env python3
"""Kill commands at random places, run them again, and look at what lies there.

python scripts/kills.py --count 100 --seed 0 [--only train]

A command runs in a process of its own, which kills itself (SIGKILL) before the Nth time it opens, renames, links or
removes something, or writes tensors. Then it runs again, to its end, in the same folder. What has the name of a result
must be whole at all times; the second run must leave no leftovers and give the same results as a run without a kill.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

_TOUCHES = ("open", "os.", "shutil.", "tempfile.")
_LOOKS = ("os.listdir", "os.scandir", "os.walk", "os.putenv", "os.fwalk")
_SIZE = ["--dtype", "float32", "--steps", "2", "--seed", "7"]
# By name: what stands behind qwen-image-mlx, in a folder with the inputs of `prepare`.
COMMANDS: dict[str, list[str]] = {
    "generate": ["generate", "a fox", "--model", "tiny", "--width", "64", "--height", "48", "--num-images", "2",
                 "--preview", "-o", "out/fox.png", *_SIZE],
    "quantize": ["quantize", "tiny", "out/pack", "--bits", "4"],
    "train": ["train", "--model", "tiny", "--data", "data", "--output", "out", "--steps", "3", "--rank", "4",
              "--resolution", "64", "--dtype", "float32", "--save-every", "1", "--sample-every", "2"],
    "decompose": ["decompose", "fox.png", "--model", "tiny-layered", "--layers", "2", "--format", "png,zip",
                  "--prompt", "a fox", "--resolution", "96", "-o", "out/layers", *_SIZE],
    "edit": ["edit", "make it red", "--layer", "out/layers:0", "--model", "tiny-edit",
             "-o", "out/layers/red.png", *_SIZE],
    "batch": ["generate", "--prompts-file", "prompts.txt", "--model", "tiny", "--width", "64", "--height", "48",
              "--preview", "-o", "out", *_SIZE],
    "compose": ["compose", "layers", "--harmonize", "match light", "--model", "tiny-edit",
                "-o", "out/whole.png", *_SIZE],
}  # fmt: skip


def child(at: int, arguments: list[str]) -> int:
    """Runs a command; dies before the `at`-th touch (0: never, and says on stderr how many there were)."""
    import mlx.core as mx

    from qwen_image_mlx.cli.main import main

    seen, places = 0, (os.getcwd(), tempfile.gettempdir())

    def touched() -> None:
        nonlocal seen
        seen += 1
        if seen == at:
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(event: str, about: tuple) -> None:
        if not event.startswith(_TOUCHES) or event in _LOOKS:
            return
        place = next((os.fsdecode(a) for a in about if isinstance(a, str | bytes | os.PathLike)), None)
        writes = event != "open" or (isinstance(about[2], int) and about[2] & (os.O_WRONLY | os.O_RDWR))
        if place is not None and writes and os.path.abspath(place).startswith(places):
            touched()

    save = mx.save_safetensors

    def slowly(file: str, *rest: object) -> None:
        touched()
        save(file, *rest)
        size = os.path.getsize(file)
        if seen + 1 == at:  # as if the kill had come in the middle
            os.truncate(file, size // 2)
        touched()

    mx.save_safetensors = slowly
    sys.addaudithook(audit)
    code = main(arguments)
    print(f"touches {seen}", file=sys.stderr)
    return code


def prepare(folder: Path) -> None:
    """Makes what all commands need."""
    from PIL import Image

    from qwen_image_mlx.layers.formats import save_layers
    from qwen_image_mlx.layers.stack import Layer, LayerStack
    from qwen_image_mlx.variants import OWN
    from qwen_image_mlx.weights.synthetic import TINY, write_checkpoint

    write_checkpoint(folder / "tiny", TINY)
    write_checkpoint(folder / "tiny-edit", TINY, pipeline="QwenImageEditPlusPipeline")
    write_checkpoint(folder / "tiny-layered", TINY, pipeline="QwenImageLayeredPipeline")
    small = {"encoder_area": 96**2, "reference_area": 128**2, "target_area": 128**2}  # nothing but time depends on it
    for name, own in (("tiny-edit", small), ("tiny-layered", {"resolutions": [96]})):
        index = folder / name / "model_index.json"
        index.write_text(json.dumps(json.loads(index.read_bytes()) | {OWN: own}))
    image = Image.linear_gradient("L").resize((64, 48)).convert("RGBA")
    image.save(folder / "fox.png")
    save_layers(LayerStack((64, 48), (Layer(image), Layer(image.resize((32, 24))))), folder / "layers")
    (folder / "data").mkdir()
    image.convert("RGB").resize((96, 96)).save(folder / "data" / "a.png")
    (folder / "data" / "a.txt").write_text("a fox")
    (folder / "prompts.txt").write_text("a fox\na hare\nan owl\n")


def run(folder: Path, name: str, at: int, again: bool = False) -> subprocess.CompletedProcess:
    """One run of a command in `folder`."""
    arguments = list(COMMANDS[name])
    if again and name == "train" and any((folder / "out").glob("*")):
        arguments.append("--resume")
    place, kernels = folder / "tmp", folder.parent / "kernels"  # MLX compiles them once for all runs
    kernels.mkdir(exist_ok=True)
    place.mkdir(exist_ok=True)
    (place / "mlx").symlink_to(kernels) if not (place / "mlx").is_symlink() else None
    return subprocess.run(
        [sys.executable, __file__, "--child", str(at), *arguments], cwd=folder, capture_output=True, text=True,
        timeout=120,
        env={**os.environ, "TMPDIR": str(place), "QWEN_IMAGE_CONFIG": os.devnull, "XDG_CACHE_HOME": str(folder / "c")},
    )  # fmt: skip


def fresh(source: Path, place: Path, name: str) -> Path:
    """A folder to run a command in: links to the inputs, and an empty place for results."""
    place.mkdir(parents=True)
    for entry in source.iterdir():
        (place / entry.name).symlink_to(entry)
    (place / "out").mkdir() if name != "train" else None
    if name == "edit":
        shutil.copytree(source / "layers", place / "out" / "layers")
    return place


def broken(folder: Path) -> Iterator[str]:
    """Names of results that are not whole."""
    import mlx.core as mx
    from PIL import Image

    for path in folder.rglob("*"):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if hidden or not path.is_file() or "pack.partial" in path.parts:
            continue
        try:
            if path.suffix == ".png":
                with Image.open(path) as image:
                    image.load()
            elif path.suffix == ".safetensors":
                mx.eval(mx.load(str(path)))
            elif path.suffix == ".json":
                json.loads(path.read_bytes())
            elif path.suffix == ".zip" and zipfile.ZipFile(path).testzip():
                raise ValueError("damaged")
        except Exception as error:
            yield f"{path.relative_to(folder)} is not whole: {error}"


def leftovers(folder: Path) -> list[str]:
    """What should be gone after a run that came to its end."""
    found = [path for path in folder.rglob("*") if path.name.startswith(".") or "-preview" in path.name]
    return [
        str(path.relative_to(folder)) for path in (*found, *folder.glob("tmp/[!m]*"), *folder.glob("out/*.partial"))
    ]


def results(folder: Path) -> set[str]:
    """The images and weights that lie there, by their contents: a run that comes later may number them."""
    import numpy as np
    from PIL import Image

    found = set()
    for path in (folder / "out").rglob("*"):
        if path.suffix == ".png" and path.name != "plot.png":
            with Image.open(path) as image:
                found.add(hashlib.sha256(np.asarray(image.convert("RGBA")).tobytes()).hexdigest())
        elif path.suffix == ".safetensors" and "cache" not in path.parts:
            found.add(hashlib.sha256(path.read_bytes()).hexdigest())
    return found


def kills(count: int, seed: int, only: list[str] | None = None) -> list[str]:
    """Kills that many times and returns the faults found."""
    names, draws, faults = only or list(COMMANDS), random.Random(seed), []
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch, "source")
        source.mkdir()
        prepare(source)
        expected, touches = {}, {}
        for name in names[:count]:
            place = fresh(source, Path(scratch, f"{name}-whole"), name)
            whole = run(place, name, 0)
            if whole.returncode:
                return [f"{name} fails: {whole.stderr[-2000:]}"]
            faults += [f"{name}, never killed: {left} is left" for left in leftovers(place)]
            expected[name], touches[name] = results(place), int(whole.stderr.rpartition("touches ")[2])
        for number in range(count):
            name = names[number % len(names)]
            at = draws.randint(1, touches[name])
            place = fresh(source, Path(scratch, f"{name}-{number}"), name)
            label = f"{name}, killed at touch {at} of {touches[name]}"
            first = run(place, name, at)
            if first.returncode != -signal.SIGKILL:
                faults.append(f"{label}: ended with {first.returncode}: {first.stderr[-500:]}")
            faults += [f"{label}: {said}" for said in broken(place / "out")]
            second = run(place, name, 0, again=True)
            finished = "exists already" in second.stderr or "steps already" in second.stderr
            if second.returncode and not finished:
                faults.append(f"{label}: the next run ended with {second.returncode}: {second.stderr[-500:]}")
            faults += [f"{label}: {said} after the next run" for said in broken(place / "out")]
            faults += [f"{label}: {left} is left after the next run" for left in leftovers(place)]
            if missing := expected[name] - results(place):
                faults.append(f"{label}: {len(missing)} results are missing or others")
            shutil.rmtree(place)
    return faults


def main() -> int:
    """The command line."""
    if sys.argv[1:2] == ["--child"]:
        return child(int(sys.argv[2]), sys.argv[3:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=14)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=COMMANDS, action="append")
    arguments = parser.parse_args()
    faults = kills(arguments.count, arguments.seed, arguments.only)
    print(*faults, f"{arguments.count} kills, {len(faults)} faults", sep="\n")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
