"""What our work would take on Metal, modelled: kernels, bytes, memory, seconds. Runs anywhere, in a minute or two.

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

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple
from unittest.mock import patch

from common import Table, finish, parser, preload_blas


class Shape(NamedTuple):
    """An image's work in the transformer, in tokens."""

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
IMAGES = (512, 1024, 1328, 2048)
PLANNED = (512, 640, 704, 768, 1024, 1328, 1536, 2048)
TEXTS = (200, 20)  # tokens of a prompt and of the one that guides
EDIT = 1024  # side of an image that is edited, and of each reference
REFERENCES = (1, 2, 3)
BLOCKS = 60
CACHE_GIB = (0.5, 1, 1.5, 2, 4)
GB = 1e9


def main() -> None:
    arguments = parser(__doc__).parse_args()
    preload_blas()

    tables = []
    for make in (blocks, forwards, seconds, autoencoder, encoders, plans):
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
    columns += ["Winograd off: s, M1 Max", "peak GB", "s off / on", "peak off / on"]
    table = Table("The autoencoder, fp32 (modelled)", columns)
    graphs = [(f"decode {side}x{side}", work.decode(side, side)) for side in IMAGES]
    graphs += [(f"decode {side}x{side}, one strip", work.decode(side, side, 1)) for side in IMAGES[1:]]
    for name, graph in [*graphs, ("encode 1024x1024", work.encode(1024, 1024))]:
        result, direct = replay(graph, Machine()), replay(graph, Machine(winograd=False))
        times = [replay(graph, chip).seconds for chip in MACHINES[:2]]
        table.rows.append(
            (name, result.kernels.total(), result.bytes.total() / GB, *times, result.peak / GB, direct.seconds,
             direct.peak / GB, direct.seconds / result.seconds, direct.peak / result.peak)
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


def plans() -> Table:
    """What memory plans for a GPU count beside the weights, against the model; least and largest ratio last."""
    from qwen_image_mlx.runtime import memory_plan

    table = Table(
        "Plan and model, bf16: memory beside the weights (modelled)", ["", "model GB", "plan GB", "plan / model"]
    )
    with TemporaryDirectory() as folder, patch.object(memory_plan, "backend", lambda: "gpu"):
        for name, stage, graph in _planned(Path(folder)):
            model, plan = _peak(graph), stage.peak - stage.resident
            table.rows.append((name, model / GB, plan / GB, plan / model))
    ordered = sorted(table.rows, key=lambda row: row[-1])
    for word, (name, _, _, ratio) in (("least", ordered[0]), ("largest", ordered[-1])):
        table.rows.append((f"{word} of {len(ordered)}: {name}", "", "", ratio))
    return table


def _planned(folder: Path) -> Iterator[tuple[str, Any, Any]]:
    """Steps and decodings: their name, their stage of a plan, and their graph; configs are written to `folder`."""
    from metal_backend import work

    from qwen_image_mlx.pipeline.autoencode import STRIP_PIXELS, strips_of
    from qwen_image_mlx.runtime.memory_plan import Work, make_plan

    components = _components("QwenImagePipeline", folder / "image")
    for side in PLANNED:
        for texts in (TEXTS[:1], TEXTS):
            planned = Work(width=side, height=side, text_tokens=texts[0], guided=len(texts) > 1)
            denoise = make_plan(components, planned).stages[2]
            name = f"step {side}x{side}{', guided' * planned.guided}"
            yield name, denoise, work.forward(planned.target_tokens, texts)
        for strip in dict.fromkeys((STRIP_PIXELS, side * side)):
            decode = make_plan(components, planned, strip_pixels=strip).stages[-1]
            strips = strips_of(side * side, strip)
            yield (
                f"decode {side}x{side}, strips: {strips}, planned for {strip} pixels",
                decode,
                work.decode(side, side, strips),
            )
    components = _components("QwenImageEditPlusPipeline", folder / "edit")
    for count in REFERENCES:
        for guided in (False, True):
            planned = Work(EDIT, EDIT, shown=((EDIT, EDIT),) * count, encoded=EDIT * EDIT, guided=guided)
            text = planned.text_tokens + count * components.variant.encoder_area // 28**2
            texts = (text, text - 60)[: 1 + guided]  # an edit's negative prompt sees the images too
            denoise = make_plan(components, planned).stages[2]
            name = f"step of an edit, references: {count}{', guided' * guided}"
            yield name, denoise, work.forward(planned.target_tokens, texts, planned.reference_tokens)


def _components(pipeline: str, folder: Path) -> Any:
    """Components of a released model, of which `folder` gets the configs alone."""
    from qwen_image_mlx import QwenImagePipeline
    from qwen_image_mlx.weights.synthetic import FULL, write_configs

    write_configs(folder, FULL, pipeline=pipeline)
    return QwenImagePipeline.from_pretrained(folder).components


def _peak(graph: Any) -> int:
    """The most bytes, whichever the chip's command buffers."""
    from metal_backend.machine import Machine
    from metal_backend.replay import replay

    return max(replay(graph, replace(Machine(), **limits)).peak for limits in ({}, MAX))


MAX = {"ops": 50, "elements": 50 << 20}


def _main(amounts: Any) -> Any:
    """Those of products and attention."""
    return type(amounts)({kind: amount for kind, amount in amounts.items() if kind in ("product", "attention")})


def _steady(fresh_after: Sequence[int], first: int = 4, last: int = 8) -> float:
    """Fresh bytes a block, by blocks `first` to `last`; each is an evaluation and a wait."""
    return (fresh_after[2 * last - 1] - fresh_after[2 * first - 1]) / (last - first)


if __name__ == "__main__":
    main()
