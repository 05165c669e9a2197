"""Several ranks on one machine: bytes against the model, what the exchange adds to a step, and a simulated connection.

python benchmarks/ranks.py                 # all; 2 minutes
python benchmarks/ranks.py --only link     # the simulated connection alone; 1 minute
python benchmarks/ranks.py --only blocks --blocks 4

"blocks": two blocks, or `--blocks`, of the real width in fp32 and random weights, two ranks over MLX's ring backend;
every process has one thread for products, so that each rank has a core of two. Bytes are counted, and a step of one
process is compared. The exchange alone is what ranks add to a step: the same arrays without the blocks, the median
of 20.

"link": the exchanges of a step of 1024x1024 with delays around them, as of a connection of 1, 10 and 40 Gbit/s, and
pauses in place of the blocks; against `runtime/traffic.py`. Arrays have a tenth of their bytes and the connection a
tenth of its rate. Where the loopback of a busy machine is slower than that, its measured rate is simulated.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from common import Table

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from ranked import OneBlock, finish, start

GBIT = 1e9 / 8
LATENCY = 0.0005
MODES = ("guidance", "layers")


def worker(part: str, folder: Path) -> None:
    """One rank."""
    from qwen_image_mlx.runtime.ranks import current

    found = {"blocks": blocks, "link": link}[part](folder, current())
    current().wait()
    everyone = current().gather_values(found)
    if current().leads:
        (folder / "found.json").write_text(json.dumps(everyone))


def blocks(folder: Path, ranks: Any) -> dict[str, Any]:
    """Steps of real blocks in each mode, and what is read and exchanged."""
    import mlx.core as mx

    from qwen_image_mlx.registry import TRANSFORMER
    from qwen_image_mlx.runtime.memory_plan import Planner, work_of
    from qwen_image_mlx.runtime.ranks import Ranks
    from qwen_image_mlx.runtime.residency import DEFAULT
    from qwen_image_mlx.runtime.session import Session
    from qwen_image_mlx.runtime.traffic import traffic_of
    from qwen_image_mlx.weights.loader import ComponentWeights

    read: dict[str, int] = {}
    gathered, opened = [0], ComponentWeights.open
    whole_gathered = Ranks.gathered

    def counting(self: Any, spec: Any, reader: Any) -> Any:
        if self.component.role == TRANSFORMER:
            read[spec.name] = self.stored(spec.name).nbytes
        return opened(self, spec, reader)

    def counted(self: Any, array: Any) -> Any:
        if array.ndim == 3:  # latents
            gathered[0] += array.nbytes * (self.size - 1)
        return whole_gathered(self, array)

    ComponentWeights.open, Ranks.gathered = counting, counted
    found: dict[str, Any] = {}
    for mode in MODES if ranks.size > 1 else ("none",):
        read.clear()
        gathered[0] = 0
        mx.reset_peak_memory()
        times: list[float] = []
        options = {"model": str(folder / "model"), "prompt": "a fox", "seed": [1], "dtype": "float32", "steps": 3,
                   "cfg_scale": 4.0, "parallel": mode}  # fmt: skip
        session = Session.open(options, "", lambda p, t=times: p.stage == "denoise" and t.append(time.perf_counter()))
        request = session.request(options, (256, 256))
        with session.plan(request):
            encoding = session.encode(request)
            session.pipeline.release_encoders()
            session.pipeline.denoise_latents(request.parameters, encoding, seed=1)
        steps = [b - a for a, b in pairwise(times[1:])]
        found[mode] = {"step": min(steps), "read": dict(read), "peak": mx.get_peak_memory()}
        if ranks.size > 1:
            relay, count = session.pipeline.relay, request.parameters.num_inference_steps
            tokens = encoding.positive.shape[1]
            with session.pipeline.components.unconnected():
                work = replace(work_of(request, session.pipeline), text_tokens=tokens)
                planner = Planner(session.pipeline.components, work, DEFAULT)
                traffic = traffic_of(planner, mode, ranks.size)
            sent = (0 if relay is None else relay.sent) + encoding_gap(relay, encoding, request, ranks)
            found[mode] |= {"exchanged": (sent + gathered[0]) / count, "model": traffic.nbytes}
            stream = mx.zeros((1, 256 + tokens, 3072))  # of one branch
            mx.eval(stream)
            step = stepper(ranks, mode, mx.zeros((1, 256, 64)), stream, 0.0)
            found[mode]["exchange"] = median(step(number) for number in range(20))
        session.pipeline.release()
        del session
        mx.clear_cache()
    return found


def encoding_gap(relay: Any, encoding: Any, request: Any, ranks: Any) -> int:
    """Bytes that the model counts in addition, because it takes both prompts to be as long as the first."""
    if relay is None or ranks.rank:
        return 0
    shorter = encoding.positive.shape[1] - encoding.negative.shape[1]
    return shorter * 3072 * 4 * request.parameters.num_inference_steps


def stepper(ranks: Any, mode: str, latents: Any, stream: Any, alone: float) -> Callable[[int], float]:
    """A function that takes a step and returns its seconds: its exchanges are real, pauses stand for the blocks.

    Args:
        ranks: of this run.
        mode: how they share the work.
        latents, stream: what is exchanged.
        alone: seconds of both branches on one rank.
    """
    import mlx.core as mx

    from qwen_image_mlx.runtime import shared_denoiser as shared

    relay = shared.RankRelay(ranks, range(ranks.rank, ranks.rank + 1))

    def run(targets: list[mx.array], *rest: Any) -> list[mx.array]:
        for _ in targets:
            received = relay.receive(ranks.rank, [stream]) if mode == "layers" else [stream]
            time.sleep(alone / 2 / (ranks.size if mode == "layers" else 1))
            if mode == "layers":
                relay.send(ranks.rank + 1, received)
        return targets

    denoiser = (
        shared.LayersDenoiser(ranks, OneBlock(run, 2), relay)
        if mode == "layers" else shared.GuidanceDenoiser(ranks, OneBlock(run), 2)
    )  # fmt: skip

    def step(number: int) -> float:
        ranks.wait()
        began = time.perf_counter()
        mx.eval(denoiser.velocities(latents, number))
        return time.perf_counter() - began

    return step


def link(folder: Path, ranks: Any) -> dict[str, Any]:
    """Steps of pauses and of real exchanges with delays, at three rates."""
    import mlx.core as mx

    from qwen_image_mlx.runtime import ranks as transport
    from qwen_image_mlx.runtime import shared_denoiser as shared
    from qwen_image_mlx.runtime.ranks import Link
    from qwen_image_mlx.runtime.traffic import Traffic

    latents, stream = mx.zeros((1, 410, 64), mx.bfloat16), mx.zeros((1, 435, 3072), mx.bfloat16)
    alone, found, arrive = 1.6, {}, transport.arrive  # seconds of both branches on one rank
    mx.eval(latents, stream)
    for gbit in (1, 10, 40):
        # A pause cannot make loopback faster than it is beside other work: then it is what is simulated.
        own = transport.measured_link(ranks, stream.nbytes)
        slow = Link(max(LATENCY, own.latency), min(gbit * GBIT / 10, own.bandwidth))

        def delayed(*arrays: mx.array, slow: Link = slow, own: Link = own) -> None:
            arrive(*arrays)
            for array in arrays:
                if array.size % stream.size == 0 and ranks.rank == 0:
                    continue  # what is sent is delayed where it is received
                received = array.nbytes if array.size == stream.size else array.nbytes * (ranks.size - 1) // ranks.size
                time.sleep(max(slow.seconds(received) - own.seconds(received), 0))

        transport.arrive = shared.arrive = delayed
        for mode in MODES:
            step = stepper(ranks, mode, latents, stream, alone)
            times = [step(number) for number in range(4)]
            latent_bytes = (ranks.size - 1) * latents.nbytes * (2 if mode == "layers" else 1)
            traffic = Traffic(latent_bytes, stream.nbytes if mode == "layers" else 0, 2, ranks.size)
            found[f"{mode} {gbit}"] = [
                slow.bandwidth * 10 / GBIT, traffic.turns() * alone + traffic.seconds(slow), min(times)
            ]  # fmt: skip
        transport.arrive = shared.arrive = arrive
    return found


def launched(part: str, size: int, folder: Path) -> list[dict[str, Any]]:
    """What each of some ranks found."""
    # Not by mlx.launch, which keeps a core busy while its ranks run.
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    ended = finish(start(size, folder, part, str(folder), script=(str(Path(__file__).absolute()), "--worker")))
    if failed := [said for code, _, said in ended if code]:
        raise SystemExit("\n".join(failed))
    found: list[dict[str, Any]] = json.loads((folder / "found.json").read_text())
    return found


def measure_blocks(folder: Path, count: int) -> list[Table]:
    """Bytes and seconds of some real blocks."""
    from qwen_image_mlx.weights.synthetic import FULL, TINY, write_checkpoint

    transformer = replace(FULL["transformer"], num_layers=count, joint_attention_dim=64)
    write_checkpoint(folder / "model", TINY | {"transformer": transformer})
    (alone,), both = launched("blocks", 1, folder), launched("blocks", 2, folder)
    columns = ["", "rank", "MB read", "of its share", "peak GB", "of its share and what is not shared", "MB a step",
               "of the model", "step s", "exchange alone, s", "of a step in one process"]  # fmt: skip
    table = Table(f"two ranks, {count} real blocks, 256x256, fp32, guidance", columns)
    whole = alone["none"]
    total = sum(whole["read"].values())
    table.rows.append(["one process", 0, total / 1e6, 1.0, whole["peak"] / 1e9, 1.0, 0.0, "", whole["step"], 0.0, ""])
    for mode in MODES:
        for rank, found in enumerate(both):
            one, share = found[mode], total
            if mode == "layers":  # its blocks as one process reads them, and half of what belongs to none
                own = [name for name in one["read"] if name.startswith("transformer_blocks.")]
                others = sum(n for name, n in whole["read"].items() if not name.startswith("transformer_blocks."))
                share = sum(whole["read"][name] for name in own) + others / len(both)
            # The first rank relays to the second, which receives; both gather.
            ratio = one["exchanged"] / one["model"] if mode == "guidance" or rank == 0 else ""
            read = sum(one["read"].values())
            table.rows.append([mode, rank, read / 1e6, read / share, one["peak"] / 1e9,
                               one["peak"] / (whole["peak"] - total + share), one["exchanged"] / 1e6, ratio,
                               one["step"], one["exchange"], one["exchange"] / whole["step"]])  # fmt: skip
    return [table]


def measure_link(folder: Path) -> list[Table]:
    """Steps over a simulated connection."""
    found = launched("link", 2, folder)[0]
    columns = ["", "Gbit/s", "of them simulated", "modelled s", "measured s", "measured / modelled"]
    table = Table("a step over a simulated connection, two ranks, 1.6 s of computing on one", columns)
    for name, (simulated, modelled, measured) in found.items():
        mode, gbit = name.split()
        table.rows.append([mode, int(gbit), simulated, modelled, measured, measured / modelled])
    return [table]


def main() -> int:
    """Measures, and prints tables."""
    if sys.argv[1:2] == ["--worker"]:
        worker(sys.argv[2], Path(sys.argv[3]))
        return 0
    only = sys.argv[sys.argv.index("--only") + 1] if "--only" in sys.argv else ""
    count = int(sys.argv[sys.argv.index("--blocks") + 1]) if "--blocks" in sys.argv else 2
    with tempfile.TemporaryDirectory() as temporary:
        for name, measure in {"link": measure_link, "blocks": partial(measure_blocks, count=count)}.items():
            if only in ("", name):
                for table in measure(Path(temporary)):
                    table.print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
