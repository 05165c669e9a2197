"""A colour the demo model has never seen, learned by a LoRA: how long it takes, and how often it is generated then.

    python benchmarks/demo_lora.py [--steps 300] [--json FILE]

Draws images of pink shapes on backgrounds of the known colours, trains a LoRA on them with the command line, and
generates prompts that name pink, on combinations of shape and background that were kept back, without and with it.
The measure: images whose shape is nearer to pink than to any colour of the palette. Generated too are prompts without
pink, which must stay as right as they were.

Takes 5 minutes and 1 GB of memory.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from common import Table, Targets, finish, parser, preload_blas, stopwatch

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

PINK = (245, 130, 190)
IMAGES, JUDGED = 64, 40
MINUTES = 5


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--steps", type=int, default=300, help="optimizer steps (300)")
    arguments = options.parse_args()
    preload_blas()
    with tempfile.TemporaryDirectory() as folder:
        data, run = Path(folder) / "pink", Path(folder) / "run"
        draw(data)
        flags = f"--steps {arguments.steps} --batch-size 16 --rank 8 --targets all --learning-rate 2e-3 --warmup 20"
        flags += " --timesteps logit_normal --resolution 64 --dtype float32"
        command = [sys.executable, "-m", "qwen_image_mlx", "train", "--model", "demo", "--data", data, "--output", run]
        command += flags.split()
        seconds = stopwatch(lambda: subprocess.run(list(map(str, command)), check=True))
        before, after = judge([]), judge([run / "lora.safetensors"])
    table = Table(
        f"a LoRA for pink, {arguments.steps} steps: parts of {JUDGED} images", ("", "without", "with"),
        [(name, before[name], after[name]) for name in before],
    )  # fmt: skip
    table.print()
    targets = Targets()
    targets.check("minutes of training", seconds / 60, MINUTES)
    targets.check("pink prompts not generated pink, with the LoRA", 1 - after["pink, as asked"], 0.2)
    targets.check("other prompts generated wrong, with the LoRA", 1 - after["other colours, as asked"], 0.1)
    finish([table, targets], arguments.json)


def draw(folder: Path) -> None:
    """Images of pink things and their captions."""
    from demo.scenes import COLOURS
    from PIL import Image

    COLOURS["pink"] = PINK
    try:
        folder.mkdir()
        for number, scene in enumerate(_scenes(IMAGES, 1, held_out=False)):
            Image.fromarray(scene.render()).save(folder / f"{number:02}.png")
            (folder / f"{number:02}.txt").write_text(scene.caption)
    finally:
        del COLOURS["pink"]


def judge(loras: list[Path]) -> dict[str, float]:
    """How often the colour that a prompt names is generated."""
    import numpy as np
    from demo.scenes import COLOURS, analyse, draw_scene

    from qwen_image_mlx import QwenImagePipeline

    pipeline = QwenImagePipeline.from_pretrained("demo", dtype="float32", loras=loras)

    def share(scenes: list) -> float:
        right = 0
        for number, scene in enumerate(scenes):
            (image,) = pipeline.generate(scene.caption, negative_prompt=" ", seed=number)
            found = analyse(np.asarray(image))
            right += (found.colour, found.background) == (scene.things[0].colour, scene.background)
        return right / len(scenes)

    rng = np.random.default_rng(3)
    others = share([draw_scene(rng, held_out=True) for _ in range(JUDGED)])
    COLOURS["pink"] = PINK
    try:
        pink = share(_scenes(JUDGED, 2, held_out=True))
    finally:
        del COLOURS["pink"]
    return {"pink, as asked": pink, "other colours, as asked": others}


def _scenes(count: int, seed: int, held_out: bool) -> list:
    """One pink thing each, on a background of the palette."""
    import numpy as np
    from demo.scenes import draw_scene, is_held_out

    rng, found = np.random.default_rng(seed), []
    while len(found) < count:
        scene = draw_scene(rng, held_out=bool(rng.integers(2)))
        (thing,) = scene.things
        if thing.colour != "pink" or is_held_out(thing.shape, "pink", scene.background) != held_out:
            continue
        found.append(scene)
    return found


if __name__ == "__main__":
    main()
