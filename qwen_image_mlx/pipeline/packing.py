"""A checkpoint written anew with quantized weights: a folder that loads like any other model.

It is written as OUT.partial and renamed when all is there, so that there is never half of a pack; a run that was cut
goes on where it stopped.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from statistics import median

import mlx.core as mx

from .. import __version__
from ..errors import OutputError, RequestError
from ..weights.loader import say_what_does_not_fit
from ..weights.pack import Part, quantization_config, write_component
from ..weights.quantize import Quantization
from ..weights.snapshot import HubSnapshot
from .components import Components
from .progress import Progress, ProgressCallback, Reporter
from .sources import INDEX

logger = logging.getLogger(__name__)

SHARD_BYTES = 2 << 30
REPORT = "quantization_report.json"
_PLAN = "plan.txt"
# What of a checkpoint is copied; other weights that may lie at its root are not of this layout.
_COPIED = ("scheduler", "tokenizer", "processor", "vae", "text_encoder", "transformer")
_COPIED_SUFFIXES = (".json", ".txt", ".jinja", ".safetensors")
_MARGIN = 1 << 26


def quantize_checkpoint(
    model: str | Path,
    out: str | Path,
    quantization: Quantization,
    *,
    revision: str | None = None,
    offline: bool = False,
    shard_bytes: int = SHARD_BYTES,
    progress: ProgressCallback | None = None,
) -> Path:
    """Writes a model with quantized weights.

    The transformer's modulation, whatever enters and leaves it, norms and the VAE are copied as they are; the README of
    the result lists every matrix's error.

    Args:
        model: a local directory in the Hugging Face layout, or a repository id.
        out: a folder that does not exist yet.
        quantization: the scheme of each component.
        revision, offline: as in `QwenImagePipeline.from_pretrained`.
        shard_bytes: most bytes of a file, and of memory beside the largest layer.
        progress: told of downloads and of bytes written; it can cancel.

    Returns:
        `out`.

    Raises:
        RequestError: nothing is to be quantized.
        CheckpointError, HubError: the model is damaged or cannot be fetched.
        OutputError: `out` exists, or could not be written; run again to go on.
    """
    out, report = Path(out).expanduser(), Reporter(progress)
    if quantization == Quantization():
        raise RequestError("nothing is to be quantized; name a component and its bits")
    if os.path.lexists(out):
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
    partial = out.with_name(f"{out.name}.partial")
    try:
        _begin(partial, repr((components.fingerprint, str(quantization), shard_bytes, __version__)))
        _require_space(partial, folders)
        _copy(snapshot, partial, set(folders))
        for path, value in components.sources.stand_ins().items():
            (partial / path).parent.mkdir(exist_ok=True)
            (partial / path).write_text(json.dumps(value, indent=2))
        errors: dict[str, dict[str, float]] = {}
        for name, (stem, parts) in folders.items():
            (partial / name).mkdir(exist_ok=True)
            errors[name] = write_component(
                partial / name, stem, parts, shard_bytes=shard_bytes,
                progress=lambda done, total, name=name: report(Progress("quantize", done, total, name)),
            )  # fmt: skip
            config = components.sources.config(name)
            config = {key: value for key, value in config.items() if key not in ("quantization", "quantization_config")}
            if said := quantization_config(parts):
                config["quantization"] = said
            (partial / name / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False))
        (partial / REPORT).write_text(json.dumps(errors, indent=2))
        (partial / "README.md").write_text(_card(components, out.name, errors), encoding="utf-8")
        (partial / _PLAN).unlink()
        os.replace(partial, out)
    except OSError as error:
        raise OutputError(f"{out} could not be written: {error.strerror or error}; run again to go on") from error
    return out


def _begin(partial: Path, plan: str) -> None:
    """Makes the folder, or goes on with what an earlier run of the same plan left in it."""
    if partial.is_dir() and any(partial.iterdir()):
        if not (partial / _PLAN).is_file():
            raise OutputError(f"{partial} is not what an earlier run left there; remove it or name another folder")
        if (partial / _PLAN).read_text() == plan:
            return
        shutil.rmtree(partial)
    partial.mkdir(parents=True, exist_ok=True)
    (partial / _PLAN).write_text(plan)


def _folders(components: Components) -> dict[str, tuple[str, list[Part]]]:
    """For each folder that is written anew, its files' stem and what goes into them."""
    variant, quantization = components.variant, components.quantization
    wanted = {"transformer": ["transformer"], "text_encoder": ["text_encoder"]}
    if variant.encoder_area or variant.layered:
        wanted["text_encoder"].append("vision")
    if variant.layered:
        wanted["text_encoder"].append("language_head")
    stems = {"transformer": "diffusion_pytorch_model", "text_encoder": "model"}
    present = [name for names in wanted.values() for name in names]
    for field in fields(quantization):
        if getattr(quantization, field.name) and field.name not in present:
            raise RequestError(f"{components.snapshot.model} has no {field.name} that could be quantized")
    for name in present:
        if scheme := getattr(quantization, name, None):
            say_what_does_not_fit(name, components.weights(name).specs("main"), scheme)
    return {
        folder: (stems[folder], [Part(components.weights(n), getattr(quantization, n, None)) for n in names])
        for folder, names in wanted.items()
    }


def _copy(snapshot: HubSnapshot, partial: Path, written: set[str]) -> None:
    """Copies what is no weight, and the weights of folders that are not written anew."""
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


def _require_space(partial: Path, folders: Mapping[str, tuple[str, list[Part]]]) -> None:
    parts = [part for _, parts in folders.values() for part in parts]
    needed = sum(part.nbytes(spec) for part in parts for specs in part.weights.layers() for spec in specs)
    there = sum(file.stat().st_size for file in partial.rglob("*") if file.is_file())
    free = shutil.disk_usage(partial).free
    if free + there < needed + _MARGIN:
        raise OutputError(
            f"{partial.parent} has {free / 1e9:.1f} GB left, but the pack takes {needed / 1e9:.1f} GB; free some space"
        )


def _card(components: Components, name: str, errors: Mapping[str, Mapping[str, float]]) -> str:
    """The pack's README."""
    source = components.snapshot
    origin = f"{source.model} at commit {source.revision}" if source.revision else Path(source.model).name
    rows = [
        f"| {folder} | {kind} | {len(values)} | {median(values):.2%} | {max(values):.2%} |"
        for folder, layers in errors.items()
        for kind, values in _by_kind(layers).items()
    ]
    base = f"base_model: {source.model}\n" if source.revision else ""
    licence = "license: apache-2.0\n" if source.revision else ""
    return f"""---
library_name: mlx
tags: [mlx, qwen-image, quantized]
{base}{licence}---
# {name}

{origin}, with quantized weights ({components.quantization}), written by
[qwen_image_mlx](https://pypi.org/project/qwen-image-mlx/) {__version__}. It loads like any other model:

```sh
pip install qwen-image-mlx
qwen-image-mlx {components.variant.task} --model {name} --help
```

Matrices are in MLX's quantized form: `x.weight` holds packed elements (uint32), `x.scales` and `x.biases` one number
for each group of columns; `quantization` in each `config.json` gives bits, group size and mode, and `false` for what
stays as it was. Scales are bf16, refitted by least squares. Norms, what enters and leaves the transformer, its
modulation (which never stays in memory) and the VAE are as in the source.

## Error of each kind of matrix

|w - w'| / |w|, in the Frobenius norm; each single matrix's is in [{REPORT}]({REPORT}).

| folder | matrices | how many | median error | largest error |
|---|---|---|---|---|
{chr(10).join(rows)}
"""


def _by_kind(layers: Mapping[str, float]) -> dict[str, list[float]]:
    """Errors by the layers' names without their numbers."""
    kinds: dict[str, list[float]] = {}
    for name, error in layers.items():
        kind = ".".join("*" if part.isdigit() and n < 3 else part for n, part in enumerate(name.split(".")))
        kinds.setdefault(kind, []).append(error)
    return kinds
