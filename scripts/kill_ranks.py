#!/usr/bin/env python3
"""Kill one of several ranks at random moments; look at how the others end, and at what lies there.

python scripts/kill_ranks.py --count 30 --seed 0

Two or three ranks that mlx.launch starts on this machine share the branches of guidance, the images of a batch or
the transformer's blocks. A random one gets SIGKILL at a random moment. Every other rank must end within 10 seconds with
an exit code that is not 0, every PNG must be whole, and a second run must make the missing images, the same as those of
one process.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SECONDS = 10.0
COMMAND = ["generate", "a fox", "--model", "tiny", "--width", "64", "--height", "64", "--steps", "20", "--cfg-scale",
           "4", "--dtype", "float32", "--seeds", "1-8", "--output", "out"]  # fmt: skip


def started(folder: Path, size: int, mode: str) -> subprocess.Popen:
    """The launcher of a command in a folder; messages go to a file."""
    # Ports of its own, or launches of others at the same time would mix with these.
    ports = ["--starting-port", str(random.SystemRandom().randrange(20_000, 60_000))]
    launch = [Path(sys.executable).with_name("mlx.launch"), "--backend", "ring", "-n", str(size), *ports, "--"]
    with (folder / "messages.txt").open("w") as messages:
        return subprocess.Popen(
            [*launch, sys.executable, "-m", "qwen_image_mlx", *COMMAND, "--parallel", mode],
            cwd=folder, stdout=messages, stderr=messages,
        )  # fmt: skip


def ranks_of(launcher: subprocess.Popen) -> list[int]:
    """The process ids of the launcher's ranks, in no particular order."""
    found = subprocess.run(["pgrep", "-P", str(launcher.pid)], capture_output=True, text=True).stdout
    return sorted(map(int, found.split()))


def codes_of(folder: Path) -> dict[int, int]:
    """The exit codes that are not 0, by rank, as the launcher reports them."""
    text = (folder / "messages.txt").read_text(errors="replace")
    return {int(rank): int(code) for rank, code in re.findall(r"rank (\d+) exited with code (-?\d+)", text)}


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
        subprocess.run([sys.executable, "-m", "qwen_image_mlx", *COMMAND], cwd=folder, check=True, capture_output=True)
        wanted = images(folder)
        for name in wanted:
            (folder / "out" / name).unlink()
        began = time.monotonic()
        started(folder, 3, "guidance").wait()
        lasts = time.monotonic() - began
        for number in range(arguments.count):
            size, mode = draw.choice((2, 3)), draw.choice(("guidance", "images", "layers"))
            moment = draw.uniform(0.2, lasts)
            for name in list(images(folder)):
                (folder / "out" / name).unlink()
            launcher = started(folder, size, mode)
            time.sleep(moment)
            ranks = ranks_of(launcher)
            alive = len(ranks) == size
            if alive:
                os.kill(draw.choice(ranks), signal.SIGKILL)
            began = time.monotonic()
            try:
                launcher.wait(SECONDS if alive else None)
            except subprocess.TimeoutExpired:
                faults.append(f"{number}: {mode}: ranks {ranks_of(launcher)} did not end")
                launcher.terminate()
                launcher.wait()
            took, codes = time.monotonic() - began, codes_of(folder)
            slowest = max(slowest, took) if alive else slowest
            left = images(folder)
            what = f"{number}: {mode}, {size} ranks, after {moment:.1f} s"
            if alive and len(codes) < size and left != wanted:  # a rank that was ready ends with 0
                faults.append(f"{what}: exit codes {codes}: {(folder / 'messages.txt').read_text()[-500:]}")
            if "Traceback" in (said := (folder / "messages.txt").read_text(errors="replace")):
                faults.append(f"{what}: {said[said.index('Traceback') :][:3000]}")
            if any(left[name] != wanted.get(name) for name in left):
                faults.append(f"{what}: a file is not whole")
            started(folder, size, mode).wait()
            if codes_of(folder) or images(folder) != wanted:
                faults.append(f"{what}: the second run: exit codes {codes_of(folder)}, {len(images(folder))} images")
            how = "ended" if alive else "was over"
            print(f"{what}: {how} in {took:.1f} s, {codes}, {len(left)} images", flush=True)
    print(f"{arguments.count} kills, {len(faults)} faults; the slowest end took {slowest:.1f} s", *faults, sep="\n")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
