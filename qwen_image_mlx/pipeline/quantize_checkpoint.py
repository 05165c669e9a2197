"""Saves a copy of a checkpoint with quantized weights, in a folder that loads like any other model.

It is written as OUT.partial and renamed when all is there, so that an incomplete copy never has its name; an
interrupted run continues where it stopped.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import median

import mlx.core as mx

from .._version import __version__
from ..errors import OutputError, QwenImageError, RequestError, some
from ..files import claim, is_from_macos, sweep
from ..licences import Licence
from ..names import StrPath
from ..outside import why_not_read
from ..registry import FOLDERS, MAIN, PROCESSOR, SCHEDULER, TOKENIZER, TRANSFORMER
from ..weights.loader import say_what_does_not_fit
from ..weights.pack import Part, quantization_config, write_component
from ..weights.schemes import Quantization
from ..weights.snapshot import HubSnapshot
from ..weights.tensor_formats import FLOATS
from .components import Components
from .progress import Progress, ProgressCallback
from .reporter import Reporter
from .sources import INDEX

logger: logging.Logger = logging.getLogger(__name__)

SHARD_BYTES = 2 << 30
REPORT = "quantization_report.json"
_PLAN = ".qwen-image-mlx-plan"
_CARD = "README.md"
_MAX_CARD = 1 << 16  # characters; the first lines state the licence
# Files at the root of a checkpoint that go where its weights go: LICENSE, LICENCE.txt, Notice.md, USE_POLICY.md.
_LEGAL = re.compile(r"(licen[cs]e|notice|copying|copyright|patents|use[-_]policy)([-_. ].*)?", re.IGNORECASE)
_MAX_LEGAL = 1 << 20  # bytes of such a file
# The files that are copied; other weights at the root are not part of the layout.
_COPIED = (SCHEDULER, TOKENIZER, PROCESSOR, *reversed(FOLDERS))
_COPIED_SUFFIXES = (".json", ".txt", ".jinja", ".safetensors")
_MARGIN = 1 << 26
_EXAMPLES = {
    "generate": '"A red fox"',
    "edit": '"Make the coat green" --image portrait.jpg',
    "decompose": "lake.png",
}  # the arguments of the command on the card
# The networks of each folder that is quantized.
Folders = Mapping[str, list[Part]]


def quantize_checkpoint(
    model: StrPath,
    out: StrPath,
    quantization: Quantization,
    *,
    revision: str | None = None,
    offline: bool = False,
    shard_bytes: int = SHARD_BYTES,
    progress: ProgressCallback | None = None,
) -> Path:
    """Writes a model with quantized weights.

    The transformer's modulation, its input and output layers, norms and the VAE are copied unchanged; the README of the
    result lists the errors of matrices.

    Args:
        model: a local directory in the Hugging Face layout, or a repository id.
        out: a folder that does not exist yet.
        quantization: the scheme of each component.
        revision, offline: as in `QwenImagePipeline.from_pretrained`.
        shard_bytes: maximum bytes of a file, and of memory in addition to the largest layer.
        progress: called for downloads and bytes written; can cancel.

    Returns:
        `out`.

    Raises:
        RequestError: the quantization names no component, or OUT.partial belongs to a different run or to none.
        CheckpointError, HubError: the model is damaged or cannot be fetched.
        OutputError: `out` exists, or could not be written; an interrupted run continues when it is repeated.
    """
    out, report = Path(out).expanduser(), Reporter(progress)
    if quantization == Quantization():
        raise RequestError("nothing is to be quantized; name a component and its bits")
    if os.path.lexists(out) and not (out / _PLAN).is_file():
        raise OutputError(f"{out} exists already; name a new folder")
    snapshot = HubSnapshot(
        model,
        revision=revision,
        offline=offline,
        progress=lambda name, done, total: report(Progress("download", done, total, name)),
    )
    components = Components(snapshot, mx.bfloat16, quantization=quantization)
    components.prepare()
    folders = _folders(components)
    forms = {form for parts in folders.values() for part in parts for form in part.weights.forms}
    if packed := sorted(forms - set(FLOATS)):
        logger.warning(
            "%s is %s already; that loss stays, and errors are relative to it: start from the full model",
            model, some(packed),
        )  # fmt: skip
    partial = out.with_name(f"{out.name}.partial")
    plan = repr((components.fingerprint, str(quantization), shard_bytes, __version__))
    try:
        if os.path.lexists(out):  # complete, except for the last step of a run that was killed
            if (out / _PLAN).read_text() != plan:
                raise OutputError(f"{out} exists already; name a new folder")
            (out / _PLAN).unlink()
            return out
        _require_space(partial, folders)
        with _lock_folder(partial, plan):
            _write(components, partial, out.name, folders, shard_bytes, report)
            os.replace(partial, out)
            (out / _PLAN).unlink()
    except OSError as error:
        reason = error if isinstance(error, OutputError) else f"{out} could not be written: {error.strerror or error}"
        raise OutputError(f"{reason}; run again to continue") from error
    return out


def _write(
    components: Components, partial: Path, name: str, folders: Folders, shard_bytes: int, report: Reporter
) -> None:
    """Fills the folder."""
    copy_unwritten(components, partial, set(folders))
    errors: dict[str, dict[str, float]] = {}
    for folder, parts in folders.items():
        (partial / folder).mkdir(exist_ok=True)
        errors[folder] = write_component(
            partial / folder, parts, shard_bytes=shard_bytes, progress=_telling(report, folder)
        )
        config = components.sources.config(folder)
        config = {key: value for key, value in config.items() if key not in ("quantization", "quantization_config")}
        if declared := quantization_config(parts):
            config["quantization"] = declared
        (partial / folder / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False))
    (partial / REPORT).write_text(json.dumps(errors, indent=2))
    (partial / _CARD).write_text(_card(components, name, errors), encoding="utf-8")


def _telling(report: Reporter, folder: str) -> Callable[[int, int], None]:
    return lambda done, total: report(Progress("quantize", done, total, folder))


@contextmanager
def _lock_folder(partial: Path, plan: str) -> Iterator[None]:
    """Locks the folder for this run; it is new, or has files of an earlier run with the same plan."""
    partial.mkdir(parents=True, exist_ok=True)
    try:
        with claim(partial):
            _take_over(partial, plan)
            yield
    except BlockingIOError:
        raise RequestError(f"{partial} is being written by another run; wait for it or name another folder") from None


def _take_over(partial: Path, plan: str) -> None:
    """Keeps the files of an earlier run with the same plan, and removes those of any other plan."""
    found = partial / _PLAN
    there = {path.name for path in partial.iterdir() if not is_from_macos(path.name)}
    strangers = {name for name in there - {_PLAN, INDEX, REPORT, _CARD, *_COPIED} if not _LEGAL.fullmatch(name)}
    if strangers or (there and not found.is_file()):
        raise RequestError(f"{partial} was not written by an earlier run; remove it or name another folder")
    if found.is_file() and found.read_text() != plan:
        for path in partial.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    found.write_text(plan)
    for folder in (partial, *(path for path in partial.rglob("*") if path.is_dir())):
        sweep(folder, alone=True)


def _folders(components: Components) -> Folders:
    folders: dict[str, list[Part]] = {}
    for name in (TRANSFORMER, *components.encoders):
        weights, scheme = components.weights(name), getattr(components.quantization, name, None)
        if scheme:
            say_what_does_not_fit(name, weights.specs(MAIN), scheme)
        folders.setdefault(weights.component.home, []).append(Part(weights, scheme))
    return folders


def copy_unwritten(components: Components, partial: Path, written: set[str]) -> None:
    """Copies the rest of a checkpoint: files other than weights, and the weights of folders that are not quantized.

    What states its licence is copied too.
    """
    snapshot = components.snapshot
    for name in snapshot.names(""):
        if _LEGAL.fullmatch(name) and not why_not_read(snapshot.file(name), _MAX_LEGAL):
            shutil.copyfile(snapshot.file(name), partial / name)
    if snapshot.exists(INDEX):
        shutil.copyfile(snapshot.file(INDEX), partial / INDEX)
    for folder in _COPIED:
        for name in snapshot.names(folder):
            is_weight = name.endswith((".safetensors", ".safetensors.index.json"))
            if not name.endswith(_COPIED_SUFFIXES) or (is_weight and folder in written):
                continue
            source, target = snapshot.file(name), partial / name
            target.parent.mkdir(exist_ok=True)
            if not target.is_file() or target.stat().st_size != source.stat().st_size:
                shutil.copyfile(source, target)
    for path, value in components.sources.stand_ins().items():
        (partial / path).parent.mkdir(exist_ok=True)
        (partial / path).write_text(json.dumps(value, indent=2))


def _require_space(partial: Path, folders: Folders) -> None:
    parts = [part for parts in folders.values() for part in parts]
    needed = sum(part.nbytes(spec) for part in parts for specs in part.weights.layers() for spec in specs)
    there = sum(file.stat().st_size for file in partial.rglob("*") if file.is_file())
    free = shutil.disk_usage(next(place for place in (partial, *partial.absolute().parents) if place.is_dir())).free
    if free + there < needed + _MARGIN:
        raise OutputError(
            f"{partial.parent} has {free / 1e6:,.0f} MB left, but the result takes {(needed + _MARGIN) / 1e6:,.0f} MB; "
            "free some space"
        )


def _card(components: Components, name: str, errors: Mapping[str, Mapping[str, float]]) -> str:
    """The README of the quantized model."""
    source = components.snapshot
    origin = f"{source.model} at commit {source.revision}" if source.revision else Path(source.model).name
    rows = [
        f"| {folder} | {kind} | {len(values)} | {median(values):.2%} | {max(values):.2%} |"
        for folder, layers in errors.items()
        for kind, values in _by_kind(layers).items()
    ]
    forms = sorted({form for part in (TRANSFORMER, *components.encoders) for form in components.weights(part).forms})
    base = f"base_model: {source.model}\n" if source.revision else ""
    licence = "".join(f"{line}\n" for line in _licence(source, components.variant.licence))
    weights = f"Licence of the released weights: {components.variant.licence}."
    return f"""---
library_name: mlx
tags: [mlx, qwen-image, quantized]
{base}{licence}---
# {name}

{origin} ({", ".join(forms)}), with quantized weights ({components.quantization}), written by
qwen_image_mlx {__version__}, which runs the Qwen-Image family on Macs. {weights} It loads like any other model:

```sh
qwen-image-mlx {components.variant.task} {_EXAMPLES[components.variant.task]} --model ./{name}
```

Matrices are in MLX's quantized form: `x.weight` holds packed elements (uint32), `x.scales` and `x.biases` one number
for each group of columns; `quantization` in each `config.json` gives bits, group size and mode, and `false` for
unchanged ones. Scales are bf16, refitted by least squares. Norms, what enters and leaves the transformer, its
modulation (which never stays in memory) and the VAE are as in the source.

## Error of each kind of matrix

|w - w'| / |w|, in the Frobenius norm; each single matrix's is in [{REPORT}]({REPORT}).

| folder | matrices | how many | median error | largest error |
|---|---|---|---|---|
{chr(10).join(rows)}
"""


def _licence(source: HubSnapshot, released: Licence) -> list[str]:
    """The lines of a card on the licence: those of the model's own, else of the licence that it must be under, or none.

    Args:
        source: the model.
        released: the licence of the released weights of its kind.
    """
    head = None
    with suppress(QwenImageError, OSError), open(source.file(_CARD), encoding="utf-8", errors="replace") as file:
        head = re.match(r"---\s*\n(.*?)\n---", file.read(_MAX_CARD), re.DOTALL)
    declared = re.findall(r"^license(?:_name|_link)?:[ \t]*\S.*", head[1] if head else "", re.MULTILINE)
    lines = [line.rstrip()[:200] for line in declared if line.rstrip().isprintable()]
    if lines or not released.key:
        return lines
    return ["license: other", f"license_name: {released.key}", f"license_link: {released.link}"]


def _by_kind(layers: Mapping[str, float]) -> dict[str, list[float]]:
    """Errors by the layers' names without their numbers."""
    kinds: dict[str, list[float]] = {}
    for name, error in layers.items():
        kind = ".".join("*" if part.isdigit() and n < 3 else part for n, part in enumerate(name.split(".")))
        kinds.setdefault(kind, []).append(error)
    return kinds
