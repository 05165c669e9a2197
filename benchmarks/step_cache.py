"""What step caches save and cost: the demo's images at 50 steps with each method, against those without.

    python benchmarks/step_cache.py [--images 6] [--steps 50] [--rounds 3] [--json FILE]

The shipped model is trained, so its trajectories are real ones, but small: 64x64 pixels, 16 tokens, few blocks.
TeaCache and MagCache take numbers that are calibrated here, with prompts and seeds that are not among those judged. The
time counts denoising alone, and for so small a model much of it is not a pass. The target: some threshold that
saves 1.6 times of the passes at an SSIM of 0.97. Takes 2 to 8 minutes with 6 images.
"""

from __future__ import annotations

from functools import partial

from common import Table, Targets, finish, median_ratio, parser, preload_blas, take_turns
from demo_images import Demo, Images, alike, percent

METHODS = {
    "teacache": (0.05, 0.1, 0.2, 0.4),
    "first-block": (0.03, 0.06, 0.12, 0.2),
    "easycache": (0.02, 0.05, 0.1, 0.2),
    "magcache": (0.06, 0.2, 0.5),
    "taylorseer": (2, 3, 5),
}
PROMPTS = ("a blue square on a yellow background", "a red star on a white background", "a green circle on a black "
           "background")  # fmt: skip
SAVING, LIKENESS = 1.6, 0.97

# Figures of others on the released models, at 50 steps.
PUBLISHED = (
    ("Qwen-Image, teacache 0.30", "2.68", "SSIM 0.967", "mlx-teacache 0.14.1, 768x768, 4 bits"),
    ("Qwen-Image, teacache 0.15", "", "SSIM 0.980", "the same; 24 of 48 steps skipped"),
    ("Qwen-Image-2512, teacache 0.25", "", "SSIM 0.969", "the same; 29 of 48 steps skipped"),
    ("Qwen-Image, magcache 0.06", "1.5", "", "MagCache's repository, A800"),
    ("Qwen-Image-2.1, first-block 0.08", "1.57", "", "tillknuesting, M4 16 GB, 25 steps: 536 to 341 s"),
    ("Qwen-Image, DBCache with TaylorSeer", "1.85-2.38", "", "cache-dit"),
)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--images", type=int, default=6, help="images of each row (6)")
    options.add_argument("--steps", type=int, default=50, help="steps of each image (50)")
    options.add_argument("--rounds", type=int, default=3, help="rounds the medians are taken of (3)")
    arguments = options.parse_args()
    preload_blas()

    from qwen_image_mlx.pipeline import calibration, step_cache

    demo = Demo(arguments.images)
    facts = calibration.calibrate(demo.pipeline, PROMPTS, width=64, height=64, steps=arguments.steps)
    step_cache.facts_of = lambda components: facts  # in place of this machine's calibrations
    print(f"calibrated: {facts}")
    found: dict[str, Images] = {}

    def one(name: str) -> float:
        found[name] = demo.generate(num_inference_steps=arguments.steps, step_cache=name or None)
        return found[name].seconds

    names = ["", *(f"{method}:{threshold}" for method, thresholds in METHODS.items() for threshold in thresholds)]
    seconds = take_turns({name: partial(one, name) for name in names}, arguments.rounds)
    table = Table(
        f"Step caches, {arguments.steps} steps, {arguments.images} images",
        ["method", "threshold", "passes / passes run", "time ratio", "SSIM", "PSNR dB", "judged right"],
    )
    targets, best = Targets(), ("none", 1.0)
    for name in names:
        images = found[name]
        saving = (images.run + images.skipped) / images.run
        ssim, psnr = alike(images, found[""])
        method, _, threshold = name.partition(":")
        table.rows.append((
            method or "none", threshold, saving, median_ratio(seconds, "", name), f"{ssim:.3f}", f"{psnr:.1f}",
            percent(demo.right(images), demo.scenes),
        ))  # fmt: skip
        if ssim >= LIKENESS and saving > best[1]:
            best = name, saving
    table.print()
    Table("Others' figures", ["", "time ratio", "likeness", "source"], list(PUBLISHED)).print()
    targets.check(f"1 / saving of {best[0]} at SSIM {LIKENESS}", 1 / best[1], 1 / SAVING)
    finish([table, targets], arguments.json)


if __name__ == "__main__":
    main()
