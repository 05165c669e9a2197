"""What Qwen-Image 1.x takes in memory while it works: the constants of `pipeline/costs.py`.

Those of a CPU are measured by benchmarks/full_size.py and benchmarks/vae.py.
"""

from __future__ import annotations

from collections.abc import Mapping

from ..costs import Costs, Rate

COSTS: Mapping[str, Costs] = {
    "cpu": Costs(
        text=Rate(1.0), patch=Rate(0.0), image=20.0, reference=20.0, prompt=20.0, guided=0.0, queued=Rate(0.0),
        scores=1.2, pixel_in=115.0, pixel_whole=Rate(26.0), pixel_out=40.0, read=1.19, base=40 << 20, step=0,
    ),
    # Modelled: the smallest constants that cover the results of benchmarks/metal_model.py for Metal, with command
    # buffers of 40 or 50 kernels.
    "gpu": Costs(
        text=Rate(0.75, 2.5, 2000), patch=Rate(0.1, 5.2, 5476), image=11.4, reference=7.3, prompt=11.0, guided=6.6,
        queued=Rate(0.0, 12.5, 3000), scores=0.0, pixel_in=26.4, pixel_whole=Rate(13.6), pixel_out=22.3,
        read=1.19, base=80 * 10**6, step=220 * 10**6,
    ),
}  # fmt: skip
