"""Computes what `qwen-image-mlx doctor` compares with: values of real-width blocks, and images of the demo models.

    python scripts/doctor_values.py

To be run on Linux with OpenBLAS preloaded (see CONTRIBUTING.md), after a change that is meant to change numbers, or
with a new case; everything is computed in fp32 on the CPU. Takes a minute.
"""

from __future__ import annotations

import json

import mlx.core as mx

from qwen_image_mlx.doctor import parity, picture
from qwen_image_mlx.doctor.measure import numbers
from qwen_image_mlx.doctor.parts import PARTS


def main() -> None:
    """Writes the stored values and images into the package."""
    mx.set_default_device(mx.cpu)
    parity.STORED.parent.mkdir(exist_ok=True)
    stored = {}
    for part in PARTS:
        module = part.build()
        for case in part.cases:
            for large in (False, True):
                result = numbers(case.run(module, case.large if large else case.small, mx.float32))
                stored[parity.key_of(case.name, large)] = parity.sample(result)
                print(parity.key_of(case.name, large), result.shape)
        del module
    rows = ",\n".join(f"{json.dumps(name)}: {json.dumps(values)}" for name, values in stored.items())
    parity.STORED.write_text("{\n" + rows + "\n}\n", encoding="utf-8")
    for name, image in picture.images().items():
        image.save(picture.STORED / f"{name}.png", optimize=True)
        print(name, image.size)


if __name__ == "__main__":
    main()
