"""Runs a pipeline in one worker thread: a queue of prompts, progress, and cancelling.

    python examples/worker_thread.py --model demo

An app with a user interface needs this shape. The interface thread puts prompts into a queue and stays free. One worker
thread owns the pipeline, because the GPU works on one image at a time. A progress callback runs in the worker thread;
it tells the interface where the work is and cancels it when the interface has asked for that. Before the thread ends it
calls `mx.clear_streams()`: with MLX 0.32 a process may otherwise abort at exit.
"""

from __future__ import annotations

import argparse
import queue
import threading

import mlx.core as mx
from PIL.Image import Image

from qwen_image_mlx import Cancelled, Progress, QwenImagePipeline


class Worker(threading.Thread):
    """Generates images from a queue of prompts until it gets None.

    Args:
        model: what `QwenImagePipeline.from_pretrained` takes.
    """

    def __init__(self, model: str) -> None:
        super().__init__(daemon=True)
        self.model = model
        self.prompts: queue.Queue[str | None] = queue.Queue()
        self.results: queue.Queue[tuple[str, Image | Exception]] = queue.Queue()
        self.stop_this_image = threading.Event()
        self.step = (0, 0)

    def run(self) -> None:
        pipeline = QwenImagePipeline.from_pretrained(self.model)
        while (prompt := self.prompts.get()) is not None:
            self.stop_this_image.clear()
            try:
                (image,) = pipeline.generate(prompt, negative_prompt=" ", progress=self.watch)
                self.results.put((prompt, image))
            except Exception as error:  # Cancelled, GPUError, ...: the pipeline stays usable after each of them
                self.results.put((prompt, error))
        mx.clear_streams()

    def watch(self, progress: Progress) -> None:
        if progress.stage == "denoise":
            self.step = (progress.step, progress.total)
        if self.stop_this_image.is_set():
            progress.cancel()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="demo")
    worker = Worker(parser.parse_args().model)
    worker.start()
    worker.prompts.put("a red circle on a blue background")
    prompt, result = worker.results.get()
    if isinstance(result, Exception):
        raise result
    result.save("circle.png")
    print(f"{prompt}: circle.png after {worker.step[0]} of {worker.step[1]} steps")

    # Cancel the second image as soon as it has done a step.
    worker.step = (0, 0)
    worker.prompts.put("a green square on a white background")
    while worker.step[0] == 0 and worker.results.empty():
        threading.Event().wait(0.01)
    worker.stop_this_image.set()
    prompt, result = worker.results.get()
    print(f"{prompt}: {'cancelled' if isinstance(result, Cancelled) else 'finished before it was cancelled'}")
    worker.prompts.put(None)
    worker.join()


if __name__ == "__main__":
    main()
