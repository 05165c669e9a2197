"""The hardware and build of MLX: Apple's chip, MLX's wheel, and the features of the two together."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from functools import cache
from importlib import metadata
from typing import Any

import mlx.core as mx

PACKAGES = ("mlx", "mlx-metal", "mlx-cpu", "mlx-cuda")
_NEURAL = 17  # the generation of Apple's GPU that has neural accelerators: applegpu_g17, the M5's
# fp32 (and, but for M1 and M2, 16-bit) TFLOP/s of one GPU core: cores x 128 lanes x 2 x clock, from public clocks; for
# the M5's neural accelerators what MLX reached in bf16 (mlx#3211).
_CORE_TFLOPS = {"M1": 0.327, "M2": 0.358, "M3": 0.353, "M4": 0.43, "M5": 1.25}


@cache
def device_info() -> dict[str, Any]:
    """MLX's information on the GPU, or else on its default device; {} where it has none."""
    for ask in (lambda: mx.device_info(mx.gpu), mx.device_info):
        try:
            return dict(ask())
        except (KeyError, RuntimeError, TypeError, ValueError):
            continue
    return {}


def architecture() -> str:
    """Name of Apple's GPU, such as applegpu_g13s; empty elsewhere."""
    return str(device_info().get("architecture", "")) if mx.metal.is_available() else ""


def has_neural_accelerators() -> bool:
    """Whether the GPU has neural accelerators."""
    found = re.search(r"applegpu_g(\d+)", architecture())
    return bool(found) and int(found[1]) >= _NEURAL


@cache
def uses_neural_accelerators() -> bool:
    """Whether MLX uses the neural accelerators: only the macOS 26 wheel has the kernels, and MLX needs 26.2."""
    system = tuple(int(part) for part in platform.mac_ver()[0].split(".")[:2] if part.isdigit())
    macos = macos_of(wheel_tags())
    return has_neural_accelerators() and system >= (26, 2) and (macos is None or macos >= 26)


def coarse_fp32() -> bool:
    """Whether fp32 products run as TF32."""
    return uses_neural_accelerators() and os.environ.get("MLX_ENABLE_TF32", "1") != "0"


def version_of(package: str) -> str | None:
    """The installed version of a package; None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def wheel_tags() -> list[str]:
    """Tags of the wheels that MLX was installed from; empty if it was built here."""
    texts = [metadata.distribution(name).read_text("WHEEL") or "" for name in PACKAGES if version_of(name)]
    lines = [line for text in texts for line in text.splitlines()]
    return [line.removeprefix("Tag: ") for line in lines if line.startswith("Tag: ")]


def macos_of(tags: list[str]) -> int | None:
    """The newest macOS that one of the tags is for."""
    return max(map(int, re.findall(r"macosx_(\d+)", " ".join(tags))), default=None)


def nominal_tflops() -> float | None:
    """This chip's nominal TFLOP/s in 16-bit products; None if unknown."""
    brand = re.search(r"Apple (M\d+)", output_of("sysctl", "-n", "machdep.cpu.brand_string"))
    cores = gpu_cores()
    return _CORE_TFLOPS[brand[1]] * cores if brand and cores and brand[1] in _CORE_TFLOPS else None


def gpu_cores() -> int | None:
    """Cores of Apple's GPU; None if unknown."""
    found = re.search(r'"gpu-core-count"\s*=\s*(\d+)', output_of("ioreg", "-rc", "AGXAccelerator", "-d", "1"))
    return int(found[1]) if found else None


def output_of(*command: str) -> str:
    """The output of a system program; "" where it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
