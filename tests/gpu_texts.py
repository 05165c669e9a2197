"""What MLX raises when a GPU fails, and a GPU that fails at a chosen place."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import mlx.core as mx
import pytest

_COMMAND = "[METAL] Command buffer execution failed: {} ({}:kIOGPUCommandBufferCallbackError{})."
MEMORY = _COMMAND.format("Insufficient Memory", "00000008", "OutOfMemory")
TIMEOUT = _COMMAND.format("Caused GPU Timeout Error", "00000002", "Timeout")
BUSY = _COMMAND.format("Impacting Interactivity", "0000000e", "ImpactingInteractivity")
REFUSED = _COMMAND.format("Ignored (for causing prior/excessive GPU errors)", "00000004", "SubmissionsIgnored")


class Told(NamedTuple):
    """A text of MLX, and what a GPUError is to make of it."""

    text: str
    fault: str
    advice: tuple[str, ...]
    fatal: bool = False


FAULTS = (
    Told(MEMORY, "memory", ("smaller size", "quantize", "close other programs")),
    Told(TIMEOUT, "timeout", ("smaller size", "internal disk", "swap", "AGX_RELAX_CDM_CTXSTORE_TIMEOUT=1")),
    Told(_COMMAND.format("Caused GPU Hang Error", "00000003", "Hang"), "timeout", ("smaller size", "AGX_RELAX")),
    Told(BUSY, "busy display", ("smaller size", "screen", "AGX_RELAX_CDM_CTXSTORE_TIMEOUT=1")),
    Told(REFUSED, "refused", ("refuses", "start the program again"), fatal=True),
    Told(_COMMAND.format("Discarded (victim of GPU error/recovery)", "00000005", "InnocentVictim"), "unknown",
         ("another program", "try again")),
    Told(_COMMAND.format("Caused GPU Address Fault Error", "0000000b", "PageFault"), "unknown",
         ("wrong address", "start the program again")),
    Told(_COMMAND.format("Something New", "000000ff", "New"), "unknown", ("try again",)),
    Told("[metal::malloc] Attempting to allocate 48736917632 bytes which is greater than the maximum allowed buffer "
         "size of 30150672384 bytes.", "memory", ("one array", "smaller size")),
    Told("[metal::malloc] Resource limit (499000) exceeded.", "memory", ("smaller size", "quantize")),
    Told("[conv] A single unfolding row needs 9 bytes, which exceeds the maximum Metal buffer size of 8 bytes.",
         "memory", ("smaller size",)),
    Told("[malloc] Unable to allocate 1073741824 bytes.", "memory", ("smaller size", "quantize")),
    Told("[malloc_async] Unable to allocate 8 bytes.", "memory", ("smaller size",)),
    Told("[METAL] Failed to do something.", "unknown", ("try again",)),
    Told("[metal::CommandEncoder] Failed to make new command queue.", "unknown", ("try again",)),
    Told("[Event::Event] Failed to create Metal shared event.", "unknown", ("try again",)),
    Told("[metal::Device] Unable to load kernel steel_gemm_fused_nax_nt\nmore\n", "unknown", ("install MLX again",)),
    Told("Failed to load the default metallib. library not found", "unknown", ("install MLX again",)),
    Told("cudaMallocAsync(&data, size, stream) failed: out of memory", "memory", ("smaller size",)),
    Told("cudaMallocManaged failed: an illegal memory access was encountered.", "unknown",
         ("start the program again",), fatal=True),
    Told("cublasLtMatmul(handle) failed with code: 13.", "unknown", ("try again",)),
)  # fmt: skip


class FailingGPU:
    """Has `mx.eval`, `mx.async_eval` and `mx.synchronize` fail when they are called from a file of the package.

    Args:
        patch: undoes it after the test.
        text: of the error.
        place: how the file's path ends; with a function's name after a colon, that function alone; empty fits all.
        functions: those of MLX that fail.
    """

    def __init__(
        self,
        patch: pytest.MonkeyPatch,
        text: str,
        place: str = "",
        functions: tuple[str, ...] = ("eval", "async_eval", "synchronize"),
    ):
        self.failed = 0
        self._text = text
        self._file, _, self._function = place.partition(":")
        for name in functions:
            patch.setattr(mx, name, self._failing(getattr(mx, name)))

    def _failing(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            if self._is_place():
                self.failed += 1
                raise RuntimeError(self._text)
            return function(*arguments)

        return call

    def _is_place(self) -> bool:
        frame = sys._getframe(2)
        while frame is not None:
            file, function = frame.f_code.co_filename, frame.f_code.co_name
            if "qwen_image_mlx" in file and file.endswith(self._file) and self._function in ("", function):
                return True
            frame = frame.f_back
        return False
