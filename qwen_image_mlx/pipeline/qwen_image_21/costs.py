"""What Qwen-Image-2.1 takes in memory while it works: the constants of `pipeline/costs.py`.

Those of a CPU are measured by benchmarks/transformer_21.py and benchmarks/full_size.py.
"""

from __future__ import annotations

from collections.abc import Mapping

from ..costs import Costs, Rate

COSTS: Mapping[str, Costs] = {
    "cpu": Costs(
        text=Rate(1.0), patch=Rate(0.0), image=23.5, reference=16.0, prompt=16.0, guided=0.0, queued=Rate(0.0),
        scores=1.2, pixel_in=115.0, pixel_whole=Rate(40.0), pixel_out=78.0, read=1.19, base=40 << 20, step=0,
    ),
    # Modelled, as those of 1.x: they cover what benchmarks/metal_backend/work_21.py takes by the model of Metal.
    "gpu": Costs(
        text=Rate(1.5, 2.07, 1700), patch=Rate(5.9), image=12.3, reference=14.8, prompt=18.0, guided=8.1,
        queued=Rate(0.0, 13.2, 3000), scores=0.0, pixel_in=30.2, pixel_whole=Rate(10.3, 4.6, 1 << 20), pixel_out=45.0,
        pixel_kept=2.9, read=1.19, base=80 * 10**6, step=55 * 10**6,
    ),
}  # fmt: skip
