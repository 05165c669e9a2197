"""Starts several ranks on this machine; as a program, what each of them runs.

`python tests/ranked.py CASES FOLDER` runs every case of a JSON file. It saves the latents of each image, on rank 0, to
FOLDER/NAME.npy, and on every rank, to FOLDER/NAME.RANK.json, the bytes it read of the transformer, those it sent to the
next rank, the passes that a step cache left out of the last image, and what was loaded at the end.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).parent.parent
SECONDS = 300  # of a run, on a machine with other work


def free_ports(count: int) -> list[int]:
    """Ports of this machine that nobody listens on."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def environments(size: int, folder: Path) -> list[dict[str, str]]:
    """The environment of each rank, as mlx.launch sets it for its ring backend."""
    hosts = [[f"127.0.0.1:{port}"] for port in free_ports(size)]
    file = folder / "hosts.json"
    file.write_text(json.dumps(hosts))
    return [{**os.environ, "MLX_HOSTFILE": str(file), "MLX_RANK": str(rank)} for rank in range(size)]


def start(
    size: int, folder: Path, *arguments: str, script: Sequence[str] = ("-m", "qwen_image_mlx"),
    configs: Sequence[Path | None] = (),
) -> list:  # fmt: skip
    """Starts ranks of a command in a folder, their pipes open; some may have a config.toml of their own."""
    before = ["nice", "-n", "5", sys.executable, *script]
    variables = environments(size, folder)
    for environment, config in zip(variables, configs, strict=False):
        environment |= {} if config is None else {"QWEN_IMAGE_CONFIG": str(config)}
    return [
        subprocess.Popen(
            [*before, *arguments], cwd=folder, env=environment, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, stdin=subprocess.DEVNULL,
        )
        for environment in variables
    ]  # fmt: skip


def finish(processes: Sequence[subprocess.Popen], seconds: float = SECONDS) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of each rank; kills those that do not end in time."""
    try:
        texts = [process.communicate(timeout=seconds) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *text) for process, text in zip(processes, texts, strict=True)]


def run(size: int, folder: Path, *arguments: str) -> list[tuple[int, str, str]]:
    """Runs a command on some ranks; asserts that all succeed, and that only the first prints results."""
    ended = finish(start(size, folder, *arguments))
    assert [code for code, _, _ in ended] == [0] * size, ended
    assert not any(out for _, out, _ in ended[1:]), ended
    return ended


class OneBlock:
    """A `DividedDenoiser` of some branches and one block, a function of (targets, evaluation, on_layer)."""

    def __init__(self, block: Callable[..., list], branches: int = 1):
        self._block, self._branches = block, branches

    def enter(self, latents: Any, evaluation: int, branches: int | None = None) -> SimpleNamespace:
        return SimpleNamespace(targets=[latents] * (branches or self._branches))

    def run(self, hidden: Any, evaluation: int, blocks: slice, on_layer: Any = None) -> SimpleNamespace:
        return SimpleNamespace(targets=self._block(hidden.targets, evaluation, on_layer))

    def leave(self, hidden: Any, evaluation: int) -> list:
        return hidden.targets


def latents_of(size: int, folder: Path, cases: Sequence[dict[str, Any]]) -> None:
    """Runs cases on some ranks; 1 is a single process."""
    (folder / "cases.json").write_text(json.dumps(cases))
    script = (str(Path(__file__)), "cases.json", ".")
    if size == 1:
        subprocess.run([sys.executable, *script], cwd=folder, check=True, timeout=SECONDS)
        return
    ended = finish(start(size, folder, script=script))
    assert [code for code, _, _ in ended] == [0] * size, ended


def _run_case(case: dict[str, Any], folder: Path, mode: str, rank: int) -> None:
    import mlx.core as mx
    import numpy as np
    from control_files import half_mask
    from PIL import Image

    from qwen_image_mlx.pipeline.conductor import encode_canvas, encode_controls
    from qwen_image_mlx.runtime.session import Session
    from qwen_image_mlx.weights.loader import ComponentWeights

    read, opened = {}, ComponentWeights.open

    def counting(self: ComponentWeights, spec: Any, reader: Any) -> Any:
        if self.component.role == "transformer":
            read[spec.name] = self.stored(spec.name).nbytes
        return opened(self, spec, reader)

    ComponentWeights.open = counting
    try:
        options = {"prompt": "a fox", "seed": [7], "dtype": "float32", "parallel": mode, **case["options"]}
        session = Session.open(options, "none")
        layered = session.pipeline.variant.layered
        mode_of = "RGBA" if session.shows_alpha or layered else "RGB"
        images = [Image.linear_gradient("L").resize((64, 48)).convert(mode_of) for _ in range(case.get("images", 0))]
        mask = half_mask(64, 48) if case.get("mask") else None
        request = session.request(options, None if layered else (64, 64), images, mask)
        with session.plan(request):
            if session.works:
                encoding, initial = session.encode(request), encode_canvas(session.pipeline, request)
                controls = encode_controls(session.pipeline, request)
                made = [
                    session.pipeline.denoise_latents(
                        request.parameters, encoding, seed=7, image_index=index, initial=initial, controls=controls
                    )
                    for index in request.image_indices
                ]
            else:
                session.attend()
    finally:
        ComponentWeights.open = opened
    if rank == 0:
        np.save(folder / f"{case['name']}.npy", np.stack([np.array(one.astype(mx.float32)) for one in made]))
    components = session.pipeline.components
    facts = {"read": read, "skipped": components.passes.skipped, "sent": getattr(components.relay, "sent", 0),
             "loaded": components.loaded}  # fmt: skip
    (folder / f"{case['name']}.{rank}.json").write_text(json.dumps(facts))


def main() -> int:
    """Runs the cases of a file; waits for the other ranks at the end."""
    from qwen_image_mlx.runtime.ranks import current

    cases, folder = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    ranks = current()
    for case in cases:
        for mode in case["modes"]:
            if ranks.size > 1:
                place = folder / f"{mode}{ranks.size}"
                place.mkdir(exist_ok=True)
                _run_case(case, place, mode, ranks.rank)
        if ranks.size == 1:
            _run_case(case, folder, "none", 0)
    ranks.wait()
    return 0


if __name__ == "__main__":
    sys.exit(main())
