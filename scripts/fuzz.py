#!/usr/bin/env python3
"""Give damaged and hostile files to everything that reads files, and count what is not refused in one sentence.

python scripts/fuzz.py --count 2000 --seed 0 [--only lora,psd]

Each input is a sound file in which bytes or JSON values were changed. A process of its own reads it; a fault is any
exception but the package's own, a process that dies, takes more than 20 s or 2 GB, or a file that is left behind. The
same count and seed give the same inputs. Exit code 1 if there was a fault.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import random
import resource
import shutil
import struct
import sys
import tempfile
import traceback
import zipfile
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, PngImagePlugin

SECONDS, MOST_BYTES = 20, 2 << 30
_DEEP = "[" * 50_000
_NASTY: tuple[Any, ...] = (
    None, True, -1, 0, 1, 2**31, 2**63, 10**400, 1e308, -1e-308, float("nan"), float("inf"), "", "x" * 100_000,
    "\ud800", "\x1b[31m\u202e", "../../etc/passwd", "/dev/zero", "a\0b", ".", [], {}, [[]], [None], {"": None},
    [2**40] * 4,
)  # fmt: skip
_BYTES = (
    b"\0",
    b"\xff" * 8,
    b"{",
    b'"',
    b"\x80",
    b"\n",
    b"\0" * 64,
    struct.pack("<Q", 2**63),
    b"PK\3\4",
    b"<!ENTITY a 'b'>",
)


class Kind(NamedTuple):
    """Something that is read.

    Attributes:
        files: sound files below the folder that `prepare` made, one of which is damaged.
        read: reads what was damaged; given the folder's copy and the damaged file.
    """

    files: tuple[str, ...]
    read: Callable[[Path, Path], object]


# Readers; imports are inside, so that --help is quick.


def _command(*words: str) -> Callable[[Path, Path], object]:
    """The command line; FILE stands for the damaged file."""

    def read(folder: Path, file: Path) -> object:
        from qwen_image_mlx.cli.main import main

        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            return main([word.replace("FILE", str(file)) for word in words])

    return read


def _image(folder: Path, file: Path) -> object:
    from qwen_image_mlx.images.sources import open_rgba

    return open_rgba(file)


def _layers(folder: Path, file: Path) -> object:
    from qwen_image_mlx.layers.formats import load_layers

    return load_layers(file)


def _layers_of_folder(folder: Path, file: Path) -> object:
    return _layers(folder, file.parent)


def _encoding(folder: Path, file: Path) -> object:
    from qwen_image_mlx import GuidanceEncoding

    return GuidanceEncoding.load(file)


def _examples(folder: Path, file: Path) -> object:
    from qwen_image_mlx.training.examples import read_examples

    return read_examples(file, "t2i")


def _lora(folder: Path, file: Path) -> object:
    """Every number of it, and both ways of applying it."""
    from qwen_image_mlx import QwenImagePipeline
    from qwen_image_mlx.lora.file import read_lora

    targets = QwenImagePipeline.from_pretrained(folder / "tiny").components.lora_targets()
    lora = read_lora(file, targets)
    lora.check()
    return [(update.bias_delta(), update.factors()) for update in lora.updates.values()]


def _kept(folder: Path, file: Path) -> object:
    """An example that was encoded before: read as it is, or found damaged and encoded again."""
    from qwen_image_mlx.training.dataset import Dataset, _read_entry

    entry = _read_entry(file, (64, 64))
    return 2 if entry is None else Dataset([entry], 0, 1).batches(0)


def _checkpoint(folder: Path, file: Path) -> object:
    """A run's checkpoint, and the log next to it."""
    import mlx.core as mx
    import mlx.nn as nn

    from qwen_image_mlx.training.checkpoints import load_checkpoint
    from qwen_image_mlx.training.loop import Trainer
    from qwen_image_mlx.training.loss import FlowMatching
    from qwen_image_mlx.training.optimizers import Optimizer, Rate

    network = nn.Linear(3, 2)
    trainer = Trainer(network, lambda step: [], Optimizer(Rate(1e-3)), FlowMatching(), None, lambda levels: None)
    if not file.exists():
        from qwen_image_mlx.training.checkpoints import save_checkpoint

        return save_checkpoint(file.parent, trainer, _RECORD)
    load_checkpoint(file, trainer, _RECORD)
    return mx.eval(trainer.parameters)


def _settings(folder: Path, file: Path) -> object:
    from qwen_image_mlx.settings import load_settings

    return load_settings(file)


def _prompts(folder: Path, file: Path) -> object:
    """All of a batch but the generation."""
    from qwen_image_mlx.runtime import batch

    batch.generate_all = lambda *_, **__: iter(())
    return _command("generate", "--prompts-file", "FILE", "--model", "tiny", "-o", "out", "--steps", "1")(folder, file)


_RECORD = {"rank": 4, "model": "tiny"}
# A LoRA's names by dialect, for {}, a module; and the other tensors that it has; -1 is its rows.
_LORAS: dict[str, tuple[str, str, dict[str, tuple[tuple[int, ...], str]]]] = {
    "peft": ("transformer.{}.lora_A.weight", "transformer.{}.lora_B.weight", {}),
    "dotted": ("diffusion_model.{}.lora_down.weight", "diffusion_model.{}.lora_up.weight",
               {"diffusion_model.{}.alpha": ((), "float32")}),
    "flat": ("lora_unet_{_}.lora_down.weight", "lora_unet_{_}.lora_up.weight",
             {"lora_unet_{_}.alpha": ((1, 1), "float16")}),
    "counted": ("{}.lora_A.default.weight", "{}.lora_B.default.weight", {"{}.alpha": ((1,), "int32")}),
    "whole": ("_orig_mod.{}.lora.down.weight", "_orig_mod.{}.lora.up.weight",
              {"{}.diff_b": ((-1,), "bfloat16"), "{}.dora_scale": ((-1, 1), "float32")}),
    "fused": ("{qkv}.lora_A.weight", "{qkv}.lora_B.weight", {}),
    "conv": ("{}.lora_down.weight", "{}.lora_up.weight", {"{}.alpha": ((1,), "float32")}),
}  # fmt: skip
_MODEL = ("model_index.json", "transformer/config.json", "vae/config.json", "text_encoder/config.json",
          "scheduler/scheduler_config.json")  # fmt: skip
_TOKENIZER = ("tokenizer/vocab.json", "tokenizer/merges.txt", "tokenizer/added_tokens.json")
KINDS = {
    "safetensors": Kind(("tiny/transformer/diffusion_pytorch_model.safetensors",), _command("info", "FILE")),
    "gguf": Kind(("model.gguf",), _command("info", "FILE")),
    "lora": Kind(("lora.safetensors",), _command("lora", "inspect", "FILE", "--model", "tiny")),
    "loras": Kind(tuple(f"loras/{name}.safetensors" for name in _LORAS), _lora),
    "index": Kind(("sharded/transformer/diffusion_pytorch_model.safetensors.index.json",), _command("info", "sharded")),
    "configs": Kind(tuple(f"tiny/{name}" for name in _MODEL), _command("plan", "tiny", "--size", "64x64")),
    "tokenizer": Kind(tuple(f"tiny/{name}" for name in _TOKENIZER), _command(
        "generate", "a fox", "--model", "tiny", "--width", "32", "--height", "32", "--steps", "1", "-o", "out.png")),
    "psd": Kind(("layers.psd", "groups.psd", "grey.psd", "deep.psd", "flat.psd"), _layers),
    "ora": Kind(("layers.ora",), _layers),
    "zip": Kind(("layers.zip",), _layers),
    "manifest": Kind(("layers/manifest.json", "layers/layer_0.png"), _layers_of_folder),
    "record": Kind(("made.png", "made.jpg", "made.webp"), _command("info", "FILE")),
    "images": Kind(("a.png", "a.jpg", "a.webp", "a.tif", "a.gif", "a.bmp", "a.avif"), _image),
    "encoding": Kind(("encoding.safetensors",), _encoding),
    "kept": Kind(("example.safetensors",), _kept),
    "checkpoint": Kind(("run/step-000000.safetensors",), _checkpoint),
    "config": Kind(("config.toml",), _settings),
    "prompts": Kind(("prompts.txt", "prompts.jsonl"), _prompts),
    "examples": Kind(("data/metadata.jsonl", "more/metadata.csv"), _examples),
}  # fmt: skip
RESULTS = ("out", "out.png")  # what a reader may leave, where it accepts its input


def prepare(folder: Path) -> None:
    """Writes a sound file of every kind."""
    import mlx.core as mx

    from qwen_image_mlx import QwenImagePipeline
    from qwen_image_mlx.images.files import save_image
    from qwen_image_mlx.layers.formats import save_layers
    from qwen_image_mlx.layers.stack import Layer, LayerStack
    from qwen_image_mlx.pipeline.conditioning import EncodingSource, GuidanceEncoding
    from qwen_image_mlx.settings.schema import SCHEMA
    from qwen_image_mlx.weights.synthetic import TINY, write_checkpoint

    write_checkpoint(folder / "tiny", TINY)
    write_checkpoint(folder / "sharded", TINY, shard_bytes=200_000)
    targets = QwenImagePipeline.from_pretrained(folder / "tiny").components.lora_targets()
    name, (rows, columns) = next((name, shape) for name, shape in targets.items() if "to_q" in name)
    mx.save_safetensors(str(folder / "lora.safetensors"), {
        f"{name}.lora_A.weight": mx.zeros((2, columns)), f"{name}.lora_B.weight": mx.zeros((rows, 2)),
    }, {"ss_network_alpha": "2"})  # fmt: skip
    (folder / "loras").mkdir()
    for dialect, (down, up, others) in _LORAS.items():

        def spelled(pattern: str) -> str:
            return pattern.format(name, _=name.replace(".", "_"), qkv=name.replace("to_q", "to_qkv"))

        out = 3 * rows if dialect == "fused" else rows
        more = (1, 1) if dialect == "conv" else ()
        mx.save_safetensors(str(folder / f"loras/{dialect}.safetensors"), {
            spelled(down): mx.ones((2, columns, *more)), spelled(up): mx.ones((out, 2, *more)),
            **{spelled(other): mx.ones([rows if n < 0 else n for n in shape], getattr(mx, kind))
               for other, (shape, kind) in others.items()},
        }, {"lora_adapter_metadata": json.dumps({"r": 2, "lora_alpha": 2, "rank_pattern": {"to_q": 2}})}
            if dialect == "peft" else {"ss_network_alpha": "2"})  # fmt: skip
    mx.save_safetensors(str(folder / "example.safetensors"), {
        "latents": mx.zeros((1, 6, 64)), "text": mx.zeros((1, 3, 64)), "dropped": mx.zeros((1, 1, 64)),
    }, {"format": "qwen_image_mlx.example.1", "segments": "[[0, 2, 3]]"})  # fmt: skip
    _checkpoint(folder, folder / "run" / "step-000000.safetensors")
    image = Image.linear_gradient("L").resize((24, 16)).convert("RGBA")
    _psds(folder, image)
    for ending in ("png", "jpg", "webp", "tif", "gif", "bmp", "avif"):
        image.convert("RGB").save(folder / f"a.{ending}")
    for ending in ("png", "jpg", "webp"):
        said = {"prompt": "a fox", "seed": 1, "width": 24, "height": 16}
        save_image(image, folder / f"made.{ending}", said)
    save_layers(LayerStack((24, 16), (Layer(image), Layer(image.resize((8, 8))))), folder / "layers",
                ("png", "psd", "ora", "zip"))  # fmt: skip
    for file in folder.glob("layers/*.*"):
        if file.suffix in (".psd", ".ora", ".zip"):
            file.replace(folder / f"layers{file.suffix}")
    encoding = GuidanceEncoding(mx.zeros((1, 4, 8)), mx.zeros((1, 2, 8)), (), EncodingSource())
    encoding.save(folder / "encoding.safetensors")
    (folder / "config.toml").write_text(
        "[default.qwen_image]\n" + "".join(f"# {row.key}\n" for row in SCHEMA) + 'memory = "auto"\ncfg_scale = 2.5\n'
        '[default.qwen_image.generation]\nsteps = 5\nnegative_prompt = "a"\n'
    )
    (folder / "prompts.txt").write_text("a fox\n# no prompt\nan owl\n")
    (folder / "prompts.jsonl").write_text('{"prompt": "a fox", "seed": 1, "width": 64, "height": 64}\n')
    for place, text in (("data/metadata.jsonl", '{"image": "a.png", "caption": "a fox"}\n'),
                        ("more/metadata.csv", "file_name,text\na.png,a fox\n")):  # fmt: skip
        (folder / place).parent.mkdir()
        (folder / place).write_text(text)
        shutil.copy(folder / "a.png", (folder / place).parent)
    try:
        from gguf import GGUFWriter
    except ImportError:
        return
    import numpy as np

    writer = GGUFWriter(folder / "model.gguf", "qwen_image")
    writer.add_string("note", "a")
    writer.add_array("numbers", [1, 2, 3])
    writer.add_tensor("img_in.weight", np.zeros((4, 32), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _psds(folder: Path, image: Image.Image) -> None:
    """PSDs with what ours have not: groups, masks, greys, 16 bits, no layers."""
    try:
        from psd_tools import PSDImage
    except ImportError:
        return
    document = PSDImage.frompil(image)
    document.create_pixel_layer(image, name="below")
    group = document.create_group(name="group")
    group.create_pixel_layer(image.resize((9, 7)), name="b", top=-3, left=20, opacity=100)
    document.save(folder / "groups.psd")
    PSDImage.frompil(image.convert("L")).save(folder / "grey.psd")
    PSDImage.new("RGB", (8, 6), depth=16).save(folder / "deep.psd")
    PSDImage.frompil(image.convert("RGB")).save(folder / "flat.psd")


# Damage


def damaged(data: bytes, name: str, dice: random.Random) -> bytes:
    """A file's bytes with something wrong in them."""
    if dice.random() < 0.6:
        if name.endswith((".json", ".jsonl")):
            return _json(data, dice)
        if name.endswith(".safetensors"):
            length = struct.unpack("<Q", data[:8])[0]
            head = _json(data[8 : 8 + length], dice)
            return struct.pack("<Q", len(head)) + head + data[8 + length :]
        if name.endswith((".zip", ".ora")):
            return _zip(data, dice)
        if name == "made.png":
            return _png(data, dice)
    data = bytearray(data)
    for _ in range(dice.choice((1, 1, 2, 8))):
        place, length = dice.randrange(len(data) + 1), dice.choice((1, 4, 16, len(data) // 4))
        match dice.randrange(6):
            case 0:
                data[place : place + 1] = bytes([dice.randrange(256)])
            case 1:
                del data[place : place + length]
            case 2:
                data[place:place] = dice.choice(_BYTES)
            case 3:
                data = data[:place]
            case 4:
                data[place:place] = data[place : place + length]
            case 5:  # where headers are
                place = dice.randrange(min(len(data), 64) + 1)
                data[place : place + 4] = struct.pack("<I", dice.choice((0, 1, 2**31, 2**32 - 1)))
    return bytes(data)


def _json(data: bytes, dice: random.Random) -> bytes:
    """JSON, of the first line if there are several, with a value, a key or its depth changed."""
    try:
        value = json.loads(data.split(b"\n")[0] if data.count(b"\n") == 1 else data)
    except ValueError:
        return data[: dice.randrange(len(data) + 1)]
    if dice.random() < 0.05:
        return _DEEP.encode()
    places = list(_places(value))
    if not places or dice.random() < 0.05:
        value = dice.choice(_NASTY)
    else:
        inside, key = dice.choice(places)
        match dice.randrange(4):
            case 0 if isinstance(inside, dict):
                inside[dice.choice(("", "\x1b[2J", "x" * 10_000, "__proto__"))] = inside.pop(key)
            case 1:
                del inside[key]
            case 2 if isinstance(inside[key], str) and inside[key][:1] in ("{", "["):  # JSON within JSON
                inside[key] = _json(inside[key].encode(), dice).decode("utf-8", "replace")
            case _:
                inside[key] = dice.choice(_NASTY)
    return json.dumps(value).encode("utf-8", "surrogatepass")


def _zip(data: bytes, dice: random.Random) -> bytes:
    """An archive with one of its files damaged, or given another name."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        names = old.namelist()
        chosen = dice.choice(names)
        for name in names:
            content = old.read(name)
            if name == chosen and dice.random() < 0.2:
                name = dice.choice(("../" + name, "/" + name, "x" * 300, "layer_99999999.png", "a\u202eb.png"))
            elif name == chosen:
                content = damaged(content, name, dice)
            new.writestr(zipfile.ZipInfo(name), content)
    return out.getvalue()


def _png(data: bytes, dice: random.Random) -> bytes:
    """An image whose record is changed, and its checksum right."""
    image, info, out = Image.open(io.BytesIO(data)), PngImagePlugin.PngInfo(), io.BytesIO()
    for key, text in image.text.items():
        info.add_itxt(key, _json(text.encode(), dice).decode("utf-8", "replace"), zip=dice.random() < 0.5)
    image.save(out, "PNG", pnginfo=info)
    return out.getvalue()


def _places(value: Any) -> Any:
    """(container, key) of every value in a JSON value."""
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from _places(value[key])


# Running


def serve(folder: str, pipe: Connection) -> None:
    """A process that reads inputs until it is told to end."""
    from qwen_image_mlx.errors import QwenImageError

    os.environ["QWEN_IMAGE_CONFIG"] = os.devnull
    os.chdir(folder)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # warnings are not faults
    tempfile.tempdir = str(Path(folder) / "tmp")
    pipe.send(None)
    while (message := pipe.recv()) is not None:
        kind, name = message
        fault, accepted = "", True
        try:
            accepted = KINDS[kind].read(Path(folder), Path(name)) != 2  # a command's exit code for what it refuses
        except (QwenImageError, SystemExit):
            accepted = False
        except BaseException:
            fault = traceback.format_exc(limit=-4)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        pipe.send((fault, accepted, peak if sys.platform == "darwin" else peak << 10))


class Reader:
    """The process that reads; started again when it dies, hangs or has grown."""

    def __init__(self, folder: Path):
        self._folder, self._process = folder, None

    def read(self, kind: str, name: str) -> tuple[str, bool, int]:
        """(fault or "", whether it was accepted, the process's peak in bytes)."""
        if self._process is None:
            context = multiprocessing.get_context("spawn")
            self._pipe, theirs = context.Pipe()
            self._process = context.Process(target=serve, args=(str(self._folder), theirs), daemon=True)
            self._process.start()
            theirs.close()
            self._pipe.recv()
        self._pipe.send((kind, name))
        try:
            if not self._pipe.poll(SECONDS):
                self.end()
                return f"took more than {SECONDS} s", False, 0
            fault, accepted, peak = self._pipe.recv()
        except EOFError:
            self._process.join()
            fault, accepted, peak = f"the process ended with {self._process.exitcode}", False, 0
            self.end()
        if peak > MOST_BYTES:
            self.end()
            fault = fault or f"took {peak / 1e9:.1f} GB"
        return fault, accepted, peak

    def end(self, at_once: bool = True) -> None:
        """Ends the process."""
        if self._process is not None:
            if not at_once:
                self._pipe.send(None)
                self._process.join(SECONDS)
            self._process.kill()
            self._process.join()
            self._process = None


def main(argv: list[str] | None = None) -> int:
    """Runs the inputs, prints faults and a summary, and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200, help="inputs (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help=f"kinds, separated by commas: {', '.join(KINDS)}")
    arguments = parser.parse_args(argv)
    chosen = arguments.only.split(",") if arguments.only else list(KINDS)
    if unknown := set(chosen) - set(KINDS):
        parser.error(f"--only has {', '.join(sorted(unknown))}, but the kinds are {', '.join(KINDS)}")
    tried, read, faults, most = Counter(), Counter(), 0, 0
    with tempfile.TemporaryDirectory(prefix="qwen-image-fuzz-") as place:
        folder = Path(place)
        prepare(folder)
        chosen = [kind for kind in chosen if (folder / KINDS[kind].files[0]).is_file()]
        (folder / "tmp").mkdir()
        sound = set(folder.rglob("*"))
        reader = Reader(folder)
        for number in range(arguments.count):
            kind = chosen[number % len(chosen)]
            dice = random.Random(f"{arguments.seed} {number} {kind}")
            name = dice.choice(KINDS[kind].files)
            before = (folder / name).read_bytes()
            (folder / name).write_bytes(damaged(before, name, dice))
            fault, accepted, peak = reader.read(kind, name)
            (folder / name).write_bytes(before)
            for result in RESULTS:
                shutil.rmtree(folder / result, ignore_errors=True)
                (folder / result).unlink(missing_ok=True)
            left = sorted(
                p for p in folder.rglob("*") if p not in sound and not p.is_relative_to(folder / "tmp" / "mlx")
            )
            for path in reversed(left):
                path.rmdir() if path.is_dir() else path.unlink()
            if left and not fault:
                fault = f"left {', '.join(str(path.relative_to(folder)) for path in left)}"
            tried[kind] += 1
            read[kind] += accepted and not fault
            most = max(most, peak)
            if fault:
                faults += 1
                print(f"--- {kind}, input {number} ({name}): {fault.strip()}", flush=True)
        reader.end(at_once=False)
    for kind, count in tried.items():
        print(f"{kind:12} {count:5} inputs, {read[kind]} of them read")
    print(f"{tried.total()} inputs, {faults} faults; at most {most / 1e9:.2f} GB")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
