"""Awaits images from asyncio, and cancels one that takes too long.

    python examples/asyncio_app.py --model demo

MLX blocks the thread that computes, so the event loop must not call the pipeline itself. A pool of one thread runs it.
When the awaiting task is cancelled, or its timeout has passed, a flag tells the progress callback to stop the work.
`close` calls `mx.clear_streams()` in that thread: with MLX 0.32 a process may otherwise abort at exit.
"""

from __future__ import annotations

import argparse
import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
from PIL.Image import Image

from qwen_image_mlx import Cancelled, Progress, QwenImagePipeline


class Generator:
    """A pipeline that is awaited.

    Args:
        model: what `QwenImagePipeline.from_pretrained` takes.
    """

    def __init__(self, model: str) -> None:
        self._pipeline = QwenImagePipeline.from_pretrained(model)
        self._pool = ThreadPoolExecutor(max_workers=1)

    async def image(self, prompt: str, *, seed: int = 0, steps: int | None = None) -> Image:
        """One image; if the awaiting task is cancelled, so is the work."""
        stop = threading.Event()

        def watch(progress: Progress) -> None:
            if stop.is_set():
                progress.cancel()

        def work() -> Image:
            return self._pipeline.generate(
                prompt, negative_prompt=" ", seed=seed, num_inference_steps=steps, progress=watch
            )[0]

        running = asyncio.get_running_loop().run_in_executor(self._pool, work)
        try:
            return await asyncio.shield(running)
        except asyncio.CancelledError:
            stop.set()
            await asyncio.wait([running])
            if isinstance(running.exception(), Cancelled):
                print(f"stopped: {prompt}")
            raise

    def close(self) -> None:
        """Ends the thread."""
        self._pool.submit(mx.clear_streams)
        self._pool.shutdown()


async def run(model: str) -> None:
    generator = Generator(model)
    prompts = ("a red circle on a blue background", "a green square on a white background")
    images = await asyncio.gather(*(generator.image(prompt, seed=1) for prompt in prompts))
    for number, image in enumerate(images):
        image.save(f"async-{number}.png")
        print(f"async-{number}.png")
    try:
        await asyncio.wait_for(generator.image("a blue star on a black background", steps=1000), timeout=0.5)
    except asyncio.TimeoutError:
        print("the third image took longer than 0.5 s")
    generator.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="demo")
    asyncio.run(run(parser.parse_args().model))
