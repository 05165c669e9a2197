#!/usr/bin/env python3
"""Kill one of several ranks at random moments; look at how the others end, and at what lies there.

python scripts/kill_ranks.py --count 30 --seed 0

Two or three ranks on this machine, over MLX's ring backend, share the branches of guidance, the images of a batch or
the transformer's blocks. A random one gets SIGKILL at a random moment. Every other rank must end within 10 seconds with
an exit code that is not 0, every PNG must be whole, and a second run must make the missing images, the same as those of
one process.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SECONDS = 10.0
COMMAND = ["generate", "a fox", "--model", "tiny", "--width", "64", "--height", "64", "--steps", "6", "--cfg-scale",
           "4", "--dtype", "float32", "--seeds", "1-4", "--output", "out"]  # fmt: skip


def started(folder: Path, size: int, mode: str) -> list[subprocess.Popen]:
    """The ranks of a command in a folder; their messages go to files."""
    sockets = [socket.socket() for _ in range(size)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    hosts = [[f"127.0.0.1:{one.getsockname()[1]}"] for one in sockets]
    for one in sockets:
        one.close()
    (folder / "hosts.json").write_text(json.dumps(hosts))
    processes = []
    for rank in range(size):
        environment = {**os.environ, "MLX_HOSTFILE": str(folder / "hosts.json"), "MLX_RANK": str(rank)}
        with (folder / f"messages{rank}.txt").open("w") as messages:
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "qwen_image_mlx", *COMMAND, "--parallel", mode],
                    cwd=folder, env=environment, stdout=messages, stderr=messages,
                )
            )  # fmt: skip
    return processes


def images(folder: Path) -> dict[str, bytes]:
    """The files of the output folder that are not hidden."""
    return {file.name: file.read_bytes() for file in folder.glob("out/*") if not file.name.startswith(".")}


def main() -> int:
    """Kills, and says what went wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    from dataclasses import replace

    from qwen_image_mlx.weights.synthetic import TINY, write_checkpoint

    draw, faults, slowest = random.Random(arguments.seed), [], 0.0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_checkpoint(folder / "tiny", TINY | {"transformer": replace(TINY["transformer"], num_layers=3)})
        began = time.monotonic()
        subprocess.run([sys.executable, "-m", "qwen_image_mlx", *COMMAND], cwd=folder, check=True, capture_output=True)
        lasts = 2 * (time.monotonic() - began)
        wanted = images(folder)
        for number in range(arguments.count):
            size, mode = draw.choice((2, 3)), draw.choice(("guidance", "images", "layers"))
            victim, moment = draw.randrange(size), draw.uniform(0.2, lasts)
            for name in list(images(folder)):
                (folder / "out" / name).unlink()
            processes = started(folder, size, mode)
            time.sleep(moment)
            alive = all(process.poll() is None for process in processes)
            processes[victim].send_signal(signal.SIGKILL)
            began = time.monotonic()
            codes = []
            for process in processes:
                try:
                    codes.append(process.wait(max(SECONDS - (time.monotonic() - began), 0.1)))
                except subprocess.TimeoutExpired:
                    process.kill()
                    codes.append(None)
            took = time.monotonic() - began
            slowest = max(slowest, took) if alive else slowest
            left = images(folder)
            what = f"{number}: {mode}, rank {victim} of {size} after {moment:.1f} s"
            if alive and any(code in (0, None) for code in codes):
                texts = [(folder / f"messages{rank}.txt").read_text()[-300:] for rank in range(size)]
                faults.append(f"{what}: exit codes {codes}: {texts}")
            if any(left[name] != wanted.get(name) for name in left):
                faults.append(f"{what}: a file is not whole")
            again = [process.wait() for process in started(folder, size, mode)]
            if any(again) or images(folder) != wanted:
                faults.append(f"{what}: the second run: exit codes {again}, {len(images(folder))} images")
            print(
                f"{what}: {'ended' if alive else 'was over'} in {took:.1f} s, {codes}, {len(left)} images", flush=True
            )
    print(f"{arguments.count} kills, {len(faults)} faults; the slowest end took {slowest:.1f} s", *faults, sep="\n")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
