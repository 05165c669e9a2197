"""How near each solver comes with how many passes: the demo's latents and images against Euler's at 400 steps.

    python benchmarks/solvers.py [--images 4] [--reference 400] [--json FILE]

Passes are guided ones: each is two evaluations of the network. LCM draws new noise at each step, so its images are
other ones, and only whether they are right says something. Takes 5 minutes with 4 images.
"""

from __future__ import annotations

from common import Table, finish, parser, preload_blas
from demo_images import Demo, alike, latent_error, percent

PASSES = (4, 6, 8, 12, 20, 50)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--images", type=int, default=4, help="images of each row (4)")
    options.add_argument("--reference", type=int, default=400, help="steps of the reference (400)")
    arguments = options.parse_args()
    preload_blas()

    from qwen_image_mlx.sampling.solvers import SOLVERS

    demo = Demo(arguments.images)
    reference = demo.generate(num_inference_steps=arguments.reference)
    title = f"against Euler at {arguments.reference} steps, {arguments.images} images"
    errors = Table(f"Relative error of the latents {title}", ["solver", *(f"{n} passes" for n in PASSES)])
    images = Table(f"SSIM and images judged right {title}", ["solver", *(f"{n} passes" for n in PASSES)])
    for name, solver in SOLVERS.items():
        near, seen = [], []
        for passes in PASSES:
            steps = max(n for n in range(1, passes + 1) if solver.count(n) <= passes)
            found = demo.generate(num_inference_steps=steps, solver=name)
            near.append(latent_error(found, reference))
            seen.append(f"{alike(found, reference)[0]:.3f}, {percent(demo.right(found), demo.scenes)}")
        errors.rows.append((name, *near))
        images.rows.append((name, *seen))
        print(errors.rows[-1], images.rows[-1], flush=True)
    errors.print()
    finish([errors, images], arguments.json)


if __name__ == "__main__":
    main()
