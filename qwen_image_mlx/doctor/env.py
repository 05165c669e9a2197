"""The machine, MLX, and settings that change MLX's numbers. A missing tool leaves a figure out."""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..pipeline.limits import free_memory
from .chip import (
    PACKAGES,
    architecture,
    coarse_fp32,
    device_info,
    gpu_cores,
    has_neural_accelerators,
    macos_of,
    output_of,
    uses_neural_accelerators,
    version_of,
    wheel_tags,
)
from .outcome import Outcome

_DISK = 10 << 30  # bytes free, below which models do not fit
_SWAP = 1 << 30  # bytes swapped out, above which images will be slow
_DEFAULTS = {"MLX_ENABLE_TF32": "1 (MLX's default)", "MLX_CONV_WINOGRAD": "1 (MLX's default)"}


def run(options: Mapping[str, Any]) -> Outcome:
    """Describes the machine; warns of what makes it slow or its numbers coarse."""
    outcome = Outcome()
    machine = _mac() if sys.platform == "darwin" else _linux()
    machine["free_memory_bytes"] = free_memory()
    mlx = _mlx()
    disk = shutil.disk_usage(options["folder"])
    python = {"version": platform.python_version(), "machine": platform.machine()}
    outcome.figures = {"machine": machine, "python": python, "mlx": mlx, "free_disk_bytes": disk.free}
    _judge(outcome, machine, mlx, disk.free)
    memory = machine.get("memory_bytes", 0) / 1e9
    outcome.summary = (
        f"{machine.get('chip', platform.machine())}, {memory:.0f} GB, {machine['system']}; MLX {mlx['version']} on "
        f"{mlx['device']}, Python {python['version']}"
    )
    return outcome


def _judge(outcome: Outcome, machine: dict[str, Any], mlx: dict[str, Any], free: int) -> None:
    if machine.get("rosetta"):
        outcome.find("odd", "this Python is for Intel and runs in Rosetta, where MLX has no GPU; install one for arm64")
    if mlx["neural_accelerators"] and not mlx["neural_accelerators_used"]:
        outcome.find(
            "slow",
            "this GPU has neural accelerators, but this MLX cannot use them (its wheel is for macOS "
            f"{mlx['wheel_macos']}); update macOS to 26.2 or newer and reinstall mlx",
        )
    if mlx["fp32_is_tf32"]:
        outcome.find("odd", "fp32 products run as TF32 here, 300 times coarser; set MLX_ENABLE_TF32=0")
    if machine.get("swap_bytes", 0) > _SWAP:
        outcome.find("slow", f"{machine['swap_bytes'] / 1e9:.1f} GB are swapped out; close other programs")
    if machine.get("low_power"):
        outcome.find("slow", "low-power mode is on, which slows the GPU down; turn it off in the battery settings")
    if machine.get("on_battery"):
        outcome.find("odd", "the Mac runs on battery; rates may be lower than on its charger")
    if free < _DISK:
        outcome.find("odd", f"only {free / 1e9:.1f} GB are free on the disk of temporary files; a model takes 20 to 60")


def _mlx() -> dict[str, Any]:
    variables = {name: value for name, value in os.environ.items() if name.startswith("MLX_")}
    tags = wheel_tags()
    return {
        "version": mx.__version__,
        "packages": {name: version for name in PACKAGES if (version := version_of(name))},
        "wheel": tags,
        "wheel_macos": macos_of(tags),
        "device": "the GPU" if mx.default_device() == mx.gpu else "the CPU",
        "architecture": architecture(),
        "neural_accelerators": has_neural_accelerators(),
        "neural_accelerators_used": uses_neural_accelerators(),
        "fp32_is_tf32": coarse_fp32(),
        "device_info": device_info(),
        "variables": variables,
        "in_force": {name: os.environ.get(name, default) for name, default in _DEFAULTS.items()},
    }


def _linux() -> dict[str, Any]:
    machine: dict[str, Any] = {"system": f"Linux {platform.release()}", "cores": os.cpu_count()}
    for line in _read("/proc/cpuinfo").splitlines():
        if line.startswith("model name"):
            machine["chip"] = line.partition(":")[2].strip()
            break
    sizes = {
        name: 1024 * int(amount)
        for name, amount in re.findall(r"^(\w+):\s+(\d+) kB", _read("/proc/meminfo"), re.MULTILINE)
    }
    if "MemTotal" in sizes:
        machine["memory_bytes"] = sizes["MemTotal"]
        machine["swap_bytes"] = sizes.get("SwapTotal", 0) - sizes.get("SwapFree", 0)
    return machine


def _mac() -> dict[str, Any]:
    machine: dict[str, Any] = {"system": f"macOS {platform.mac_ver()[0]}", "cores": os.cpu_count()}
    machine["chip"] = output_of("sysctl", "-n", "machdep.cpu.brand_string") or platform.machine()
    machine["memory_bytes"] = int(output_of("sysctl", "-n", "hw.memsize") or 0)
    machine["rosetta"] = output_of("sysctl", "-n", "sysctl.proc_translated") == "1"
    machine["gpu_cores"] = gpu_cores()
    machine["wired_limit_mb"] = output_of("sysctl", "-n", "iogpu.wired_limit_mb")
    swap = re.search(r"used = ([\d.]+)M", output_of("sysctl", "-n", "vm.swapusage"))
    if swap:
        machine["swap_bytes"] = int(float(swap[1]) * (1 << 20))
    machine["low_power"] = bool(re.search(r"lowpowermode\s+1", output_of("pmset", "-g")))
    machine["on_battery"] = "Battery Power" in output_of("pmset", "-g", "batt")
    machine["thermal"] = output_of("pmset", "-g", "therm").replace("\n", "; ")
    return machine


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
