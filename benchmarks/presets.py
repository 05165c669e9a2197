"""What each preset takes, and how far a draft shows the image that is made of it, on the demo.

    python benchmarks/presets.py [--images 6] [--drafts 8] [--json FILE]

Drafts go the way of the command line: a sweep of seeds with a contact sheet, then each number of it again with the
preset "best". That is done as if the model's own steps were 12, which they are, and 50. An image is also
compared with the draft of the next seed, which shows what likeness means without the same noise.
Takes 2 minutes.
"""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
from collections.abc import Sequence
from functools import partial
from statistics import mean, median

import numpy as np
from common import Table, finish, median_ratio, parser, preload_blas, take_turns
from demo_images import Demo, percent, ssim

STEPS = (12, 50)  # of the preset "best"
TIMED = 50  # steps from which the presets are timed
ROUNDS = 3


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--images", type=int, default=6, help="scenes (6)")
    options.add_argument("--drafts", type=int, default=8, help="drafts of each scene (8)")
    arguments = options.parse_args()
    preload_blas()

    demo = Demo(arguments.images)
    captions = [scene.caption for scene in demo.scenes]
    tables = [presets(demo)]
    tables[0].print()
    likeness = Table(
        f"A draft and its refined image, {len(captions)} scenes of {arguments.drafts} seeds",
        ["steps", "compared with", "SSIM, median", "SSIM, least", "shape, colours alike", "moved, mean", "moved, most"],
    )
    for steps in STEPS:
        drafts, refined = explore(captions, arguments.drafts, steps)
        others = [[*row[1:], row[0]] for row in drafts]
        for name, before in (("its draft", drafts), ("the next seed's draft", others)):
            likeness.rows.append((f"{draft_steps(steps)} to {steps}", name, *compare(before, refined)))
            print(likeness.rows[-1], flush=True)
    finish([*tables, likeness], arguments.json)


def draft_steps(steps: int) -> int:
    """Steps of a draft of a model whose own number is `steps`."""
    from qwen_image_mlx.pipeline.presets import preset_of

    return preset_of("draft", steps, distilled=False, measured=False).steps


def presets(demo: Demo) -> Table:
    """Passes and time of each preset, denoising alone, against "best"."""
    from qwen_image_mlx.pipeline.presets import PRESETS, preset_of

    passes = {}

    def one(name: str) -> float:
        values = dict(preset_of(name, TIMED, distilled=False, measured=False).values)
        found = demo.generate(num_inference_steps=values.pop("steps", TIMED), **values)
        passes[name] = found.run
        return found.seconds

    seconds = take_turns({name: partial(one, name) for name in PRESETS}, ROUNDS)
    table = Table(f"Presets of a model with {TIMED} steps", ["preset", "passes", "passes / best", "time / best"])
    for name in PRESETS:
        table.rows.append((name, passes[name], passes[name] / passes["best"], median_ratio(seconds, name, "best")))
    return table


def explore(captions: Sequence[str], drafts: int, steps: int) -> tuple[list[list[np.ndarray]], list[list[np.ndarray]]]:
    """Drafts of each caption with seeds 1, 2, … on a contact sheet, and the image of each number of the sheet."""
    before, after = [], []
    size = ["--width", "64", "--height", "64"]
    with tempfile.TemporaryDirectory() as folder:
        for number, caption in enumerate(captions):
            # The preset's own steps are the demo's: others are given.
            made = command(
                "generate", caption, "--model", "demo", "--seeds", f"1-{drafts}", *size, "--preset", "draft",
                "--contact-sheet", "--steps", draft_steps(steps), "--output", f"{folder}/drafts-{number}",
            )  # fmt: skip
            *images, sheet = made
            before.append([_pixels(path) for path in images])
            after.append([
                _pixels(*command("generate", "--from-image", sheet, "--pick", pick, "--preset", "best",
                                 "--steps", steps, "--output", f"{folder}/refined-{number}-{pick}.png"))
                for pick in range(1, drafts + 1)
            ])  # fmt: skip
    return before, after


def command(*arguments: object) -> list[str]:
    """The paths that a command of the command line prints."""
    from qwen_image_mlx.cli.main import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(argument) for argument in arguments])
    if code:
        raise SystemExit(err.getvalue())
    return out.getvalue().splitlines()


def _pixels(path: str) -> np.ndarray:
    from qwen_image_mlx.images.sources import open_image

    return np.asarray(open_image(path))


def compare(before: Sequence[Sequence[np.ndarray]], after: Sequence[Sequence[np.ndarray]]) -> tuple[object, ...]:
    """How alike images are, one of each pair after the other, as the cells of a row."""
    from demo.scenes import analyse

    alike, same, moved = [], [], []
    for one, other in zip((i for row in before for i in row), (i for row in after for i in row), strict=True):
        alike.append(ssim(one, other))
        a, b = analyse(one), analyse(other)
        same.append((a.shape, a.colour, a.background) == (b.shape, b.colour, b.background))
        moved.append(float(np.hypot(a.x - b.x, a.y - b.y)))
    sides = (f"{mean(moved):.1%} of the side", f"{max(moved):.1%}")
    return f"{median(alike):.3f}", f"{min(alike):.3f}", percent(mean(same), same), *sides


if __name__ == "__main__":
    os.environ["QWEN_IMAGE_CONFIG"] = os.devnull
    main()
