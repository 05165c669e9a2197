"""What our work would take on Metal, modelled: kernels, bytes, memory, seconds. Runs anywhere, in half a minute.

    python benchmarks/metal_model.py [--json FILE]

NOTHING OF THIS WAS RUN ON METAL. Our own code is traced at the released models' shapes, without evaluating it, and
its graph is replayed by the rules of MLX 0.32.4's Metal backend: order of evaluation, donation, buffer cache, command
buffers (11 in flight; a commit after more than 40 kernels or 40 Mi elements), cache limit, memory limit. The modules
in `metal_backend/` hold the model; tests bound our graphs by it.

- Exact, as far as the graph is: which kernels run, and the bytes and FLOP of each. How many kernels a compiled
  function is, MLX says itself; of one that falls into several, the bytes between them are a guess (fp32, in the
  result's shape).
- A model: memory within 15%; seconds within 30%. A kernel takes max(bytes / 80% of the bandwidth, FLOP / 60 to 80% of
  the chip's rate) + 4 us, one after another. Rates are public figures; M5's are what its products were seen to reach.
  Max and Ultra chips commit after 50 kernels or 50 Mi elements, which takes more memory: in a column of its own.
- The rules must be read again at each minor version of MLX.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from common import Table, finish, parser, preload_blas


class Shape(NamedTuple):
    """A picture's work in the transformer, in tokens."""

    name: str
    image: int
    texts: tuple[int, ...]
    references: int = 0


SHAPES = (
    Shape("512x512 guided", 1024, (200, 20)),
    Shape("1024x1024", 4096, (200,)),
    Shape("1024x1024 guided", 4096, (200, 20)),
    Shape("1328x1328 guided", 6889, (200, 20)),
    Shape("edit of 1 MP, 1 reference, guided", 4096, (1400, 1340), 4096),
    Shape("edit of 1 MP, 2 references, guided", 4096, (2700, 2640), 8192),
)
PICTURES = (512, 1024, 1328, 2048)
BLOCKS = 60
CACHE_GIB = (0.5, 1, 1.5, 2, 4)
GB = 1e9


def main() -> None:
    arguments = parser(__doc__).parse_args()
    preload_blas()

    tables = []
    for make in (blocks, forwards, seconds, autoencoder, encoders):
        if tables:
            tables[-1].print()
        tables.append(make())
    finish(tables, arguments.json)


def blocks() -> Table:
    """Kernels and bytes of one block with the first text."""
    from metal_backend import work
    from metal_backend.machine import Machine
    from metal_backend.replay import replay

    columns = ["", "products", "attention", "other kernels", "GB", "GB of others", "x 60", "which others"]
    table = Table("One block, bf16 (modelled; kernels and bytes counted)", columns)
    for name, image, texts, references in SHAPES:
        result = replay(work.block(image, texts[0], references), Machine())
        others = result.kernels - _main(result.kernels)
        moved = result.bytes.total() - _main(result.bytes).total()
        kinds = ", ".join(f"{count} {kind}" for kind, count in others.most_common())
        table.rows.append(
            (name, result.kernels["product"], result.kernels["attention"], others.total(), result.bytes.total() / GB,
             moved / GB, BLOCKS * moved / GB, kinds)
        )  # fmt: skip
    return table


def forwards() -> Table:
    """Memory of a step, block by block, and what it asks of macOS anew at a cache limit."""
    from metal_backend import work
    from metal_backend.machine import GIB, Machine
    from metal_backend.replay import replay

    fresh = [f"fresh GB a block, cache {limit:g} GiB" for limit in CACHE_GIB]
    table = Table(
        "A step evaluated block by block: memory beyond the weights (modelled)",
        ["", "peak GB", "in tokens x 3072 x 2 bytes", "peak GB, Max and Ultra", *fresh],
    )
    for name, image, texts, references in SHAPES:
        graph = work.forward(image, texts, references, blocks=10)
        unit = (image + max(texts) + references) * 3072 * 2
        peak, larger = (replay(graph, replace(Machine(), **limits)).peak for limits in ({}, MAX))
        steady = [
            _steady(replay(graph, replace(Machine(), cache_limit=limit * GIB)).fresh_after) for limit in CACHE_GIB
        ]
        table.rows.append((name, peak / GB, peak / unit, larger / GB, *(amount / GB for amount in steady)))
    return table


def seconds() -> Table:
    """Seconds of all blocks of one step on several chips."""
    from metal_backend import work
    from metal_backend.machine import MACHINES
    from metal_backend.replay import replay

    table = Table("Seconds of a step of 60 blocks (modelled, within 30%)", ["", *(chip.name for chip in MACHINES)])
    for name, image, texts, references in SHAPES:
        graphs = [work.block(image, text, references) for text in texts]
        table.rows.append((name, *(BLOCKS * sum(replay(graph, chip).seconds for graph in graphs) for chip in MACHINES)))
    return table


def autoencoder() -> Table:
    """Decoding in the default strips and in one, and encoding."""
    from metal_backend import work
    from metal_backend.machine import MACHINES, Machine
    from metal_backend.replay import replay

    columns = ["", "kernels", "GB", *(f"s, {chip.name}" for chip in MACHINES[:2]), "peak GB"]
    columns += ["Winograd off: s, M1 Max", "peak GB"]
    table = Table("The autoencoder, fp32 (modelled)", columns)
    graphs = [(f"decode {side}x{side}", work.decode(side, side)) for side in PICTURES]
    graphs += [(f"decode {side}x{side}, one strip", work.decode(side, side, 1)) for side in PICTURES[1:]]
    for name, graph in [*graphs, ("encode 1024x1024", work.encode(1024, 1024))]:
        result, direct = replay(graph, Machine()), replay(graph, Machine(winograd=False))
        times = [replay(graph, chip).seconds for chip in MACHINES[:2]]
        table.rows.append(
            (name, result.kernels.total(), result.bytes.total() / GB, *times, result.peak / GB, direct.seconds,
             direct.peak / GB)
        )  # fmt: skip
    return table


def encoders() -> Table:
    """Layers of the text encoder and the vision tower, and the memory of all of them one by one."""
    from metal_backend import work
    from metal_backend.machine import Machine
    from metal_backend.replay import replay

    table = Table(
        "Layers of the encoders, bf16 (modelled)",
        ["", "kernels", "GB", "GB but for products and attention", "ms, M1 Max", "peak GB of all layers"],
    )
    cases: Sequence[tuple[str, Any, Any]] = (
        ("text, 300 tokens", work.language_layer(300), work.language([300])),
        ("text, 1400 tokens", work.language_layer(1400), work.language([1400])),
        ("text, 1400 tokens, two prompts", work.language_layer(1400), work.language([1400, 1340])),
        ("vision, 74x74 patches, all", work.vision_block(74, 74, False), work.tower(74, 74)),
        ("vision, 74x74 patches, windows", work.vision_block(74, 74, True), work.tower(74, 74)),
    )
    for name, layer, whole in cases:
        result = replay(layer, Machine())
        moved = result.bytes.total()
        others = moved - _main(result.bytes).total()
        peak = replay(whole, Machine()).peak
        table.rows.append(
            (name, result.kernels.total(), moved / GB, others / GB, 1e3 * result.seconds, peak / GB)
        )  # fmt: skip
    return table


MAX = {"ops": 50, "elements": 50 << 20}


def _main(amounts: Any) -> Any:
    """Those of products and attention."""
    return type(amounts)({kind: amount for kind, amount in amounts.items() if kind in ("product", "attention")})


def _steady(fresh_after: Sequence[int], first: int = 4, last: int = 8) -> float:
    """Fresh bytes a block, by blocks `first` to `last`; each is an evaluation and a wait."""
    return (fresh_after[2 * last - 1] - fresh_after[2 * first - 1]) / (last - first)


if __name__ == "__main__":
    main()
