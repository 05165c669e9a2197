"""What the server adds to generation: requests per minute with the demo model, over HTTP and without.

    python benchmarks/server.py [--jobs 40] [--rounds 5] [--json FILE]

Three ways take turns, one image after another: a bare loop over `QwenImagePipeline.generate` in a process of its own
with the model resident; a server asked through `POST /api/qwen-image/generate`; and the same server asked through
`POST /jobs`, followed to the end by its events, previews included. Every prompt is new: no encoding is reused.

Takes 3 minutes and 1 GB of memory.
"""

from __future__ import annotations

import statistics
import sys
import time
from contextlib import ExitStack
from itertools import count
from typing import Any

from common import Table, Targets, Worker, finish, parser, preload_blas, serve, serving, take_turns

_WORKER = "--worker"
_STEPS = 12
_NUMBERS = count()


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--jobs", type=int, default=40, help="images of a turn (40)")
    options.add_argument("--rounds", type=int, default=5, help="turns of each (5)")
    arguments = options.parse_args()
    preload_blas()
    import httpx

    with ExitStack() as stack:
        bare = stack.enter_context(Worker(sys.executable, "server.py", _WORKER))
        address, _ = stack.enter_context(serving("--model", "demo"))
        client = stack.enter_context(httpx.Client(base_url=address, timeout=600, trust_env=False))
        seconds = take_turns(
            {
                "bare": lambda: bare.call("generate", prompts=_prompts(arguments.jobs)),
                "request": lambda: _timed(client, _request, _prompts(arguments.jobs)),
                "job": lambda: _timed(client, _job, _prompts(arguments.jobs)),
            },
            arguments.rounds,
        )
    rows = [(name, 60 * arguments.jobs / statistics.median(taken)) for name, taken in seconds.items()]
    table = Table("images a minute, demo, 64x64, 12 steps, guided", ("", "per minute"), rows)
    table.print()
    targets = Targets()
    for name, what in (("request", "a request"), ("job", "a job with events and previews")):
        ratio = statistics.median(a / b for a, b in zip(seconds[name], seconds["bare"], strict=True))
        targets.check(f"{what} / bare", ratio, 1.05)
    finish([table, targets], arguments.json)


def _prompts(number: int) -> list[str]:
    return [f"a red circle on a blue background {next(_NUMBERS)}" for _ in range(number)]


def _timed(client: Any, generate: Any, prompts: list[str]) -> float:
    begun = time.perf_counter()
    for prompt in prompts:
        generate(client, prompt)
    return time.perf_counter() - begun


def _request(client: Any, prompt: str) -> None:
    answer = client.post("/api/qwen-image/generate", json={"prompt": prompt, "steps": _STEPS, "seed": 1})
    assert answer.json()["images"]


def _job(client: Any, prompt: str) -> None:
    answer = client.post("/jobs", json={"task": "generate", "prompt": prompt, "steps": _STEPS, "seed": 1})
    job = answer.json()["id"]
    with client.stream("GET", f"/jobs/{job}/events") as stream:
        lines = [line for line in stream.iter_lines() if line.startswith("event: ")]
    assert lines[-1] == "event: done"
    assert client.get(f"/jobs/{job}").json()["result"]["images"]


def _worker() -> None:
    from qwen_image_mlx import QwenImagePipeline

    pipeline = QwenImagePipeline.from_pretrained("demo")
    images: list[Any] = []

    def generate(prompts: list[str]) -> float:
        begun = time.perf_counter()
        for prompt in prompts:
            images[:] = pipeline.generate(
                prompt, negative_prompt=" ", num_inference_steps=_STEPS, seed=1, staged=False
            )  # fmt: skip
        return time.perf_counter() - begun

    serve({"generate": generate})


if __name__ == "__main__":
    _worker() if _WORKER in sys.argv else main()
