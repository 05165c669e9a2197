#!/usr/bin/env python3
"""Train the models that the package ships, from nothing, stage by stage; a stage that was cut goes on where it was.

python scripts/train_demo.py vae rgba-vae text-encoder t2i-edit polish layered layered-alone layered-polish pack \
    control --out build/demo
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from demo import autoencoder, checkpoint, control, judge, painter, preview, samples

from qwen_image_mlx.models.qwen_image.config import VAEConfig
from qwen_image_mlx.training.checkpoints import last_checkpoint, load_checkpoint, save_checkpoint
from qwen_image_mlx.training.loop import Trainer
from qwen_image_mlx.training.qwen_image.network import Network
from qwen_image_mlx.variants import DEMO_CONTROL
from qwen_image_mlx.weights.snapshot import DEMO_ROOT

VAE = VAEConfig(base_dim=8)
STEPS = {
    "vae": 3000, "rgba-vae": 1000, "t2i-edit": 3000, "polish": 2500,
    "layered": 1500, "layered-alone": 800, "layered-polish": 3500,
    "control": 1000,
}  # fmt: skip
# Steps that learning rates fall over, where a stage stops before: its average is good enough by then.
SCHEDULES = {
    **STEPS, "vae": 5000, "rgba-vae": 2500, "t2i-edit": 8000, "polish": 6000, "layered": 5000, "layered-alone": 4000,
    "control": 2000,
}  # fmt: skip
SAMPLES = {"images": 30000, "edits": 16000, "layered": 5000, "layered-polish": 4000, "control": 6000}
LAYERS = (2, 3, 4)
BATCH = 64
SIZES = {
    "t2i-edit": (32, 32),
    "polish": (56, 8),
    "layered": (21, 21, 21),
    "layered-alone": (12, 16, 32),
    "layered-polish": (8, 12, 28, 12),
    "control": (BATCH,),
}  # of a step's batches
DROPS = {"layered-alone": 0.6, "layered-polish": 0.6}  # prompts left away: mostly nobody says what an image shows
JUDGED = 100  # held-out scenes
HELD_OUT_SEED = 11
SCALES = {"demo": 3.0, "demo-edit": 2.0, "demo-layered": 1.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="+", choices=STAGES)
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints, logs and models")
    parser.add_argument("--every", type=int, default=500, help="steps between two saved states (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    for stage in arguments.stages:
        STAGES[stage](arguments.out, arguments.every, arguments.seed)


def train_vae(out: Path, every: int, seed: int) -> None:
    """The autoencoder of images."""
    trainer = autoencoder.Trainer(VAE, SCHEDULES["vae"], seed=seed)
    _train_autoencoder(out / "vae", trainer, every)


def train_rgba_vae(out: Path, every: int, seed: int) -> None:
    """The autoencoder of layers, from that of images."""
    config = VAEConfig(base_dim=VAE.base_dim, input_channels=4)
    weights = autoencoder.averaged_weights(out / "vae" / "state.safetensors")
    trainer = autoencoder.Trainer(config, SCHEDULES["rgba-vae"], seed=seed, weights=weights)
    _train_autoencoder(out / "rgba-vae", trainer, every)


def write_frames(out: Path, every: int, seed: int) -> None:
    """Tokenizers, text encoders and autoencoders of all models whose autoencoder is trained."""
    for model in checkpoint.PIPELINES:
        layered = checkpoint.transformer_config(model).use_layer3d_rope
        folder = out / ("rgba-vae" if layered else "vae")
        state, target = folder / "state.safetensors", out / "models" / model
        written = target / "model_index.json"
        if not state.exists() or (written.exists() and written.stat().st_mtime > state.stat().st_mtime):
            continue
        config = VAEConfig(base_dim=VAE.base_dim, input_channels=4 if layered else 3)
        trained = autoencoder.load_averaged(config, state)
        config = autoencoder.with_statistics(trained, config)
        checkpoint.write_frame(target, model, config, autoencoder.module_weights(trained), seed)


def train_t2i_edit(out: Path, every: int, seed: int) -> None:
    """The transformer that generates and edits."""
    _train_t2i_edit(out, out / "t2i-edit", every, seed)


def polish(out: Path, every: int, seed: int) -> None:
    """The same, on, with scenes that are as their captions tell: edits are learned by then, shapes are not."""
    _train_t2i_edit(out, out / "polish", every, seed, last_checkpoint(out / "t2i-edit"))


def _train_t2i_edit(out: Path, folder: Path, every: int, seed: int, start: Path | None = None) -> None:
    frames = {model: samples.Frame(out / "models" / model) for model in ("demo", "demo-edit")}
    as_told = start is not None
    scenes = samples.draw_scenes(JUDGED, HELD_OUT_SEED, most_things=1, held_out=True, as_told=as_told)
    pairs = samples.draw_edits(JUDGED, HELD_OUT_SEED, held_out=True)
    asked = {"demo": samples.paintings(frames["demo"], scenes), "demo-edit": samples.edits(frames["demo-edit"], pairs)}
    kinds = [
        _kept(folder / "images.npz", lambda: samples.paintings(
            frames["demo"], samples.draw_scenes(SAMPLES["images"], seed, as_told=as_told))),
        _kept(out / "t2i-edit" / "edits.npz", lambda: samples.edits(
            frames["demo-edit"], samples.draw_edits(SAMPLES["edits"], seed))),
    ]  # fmt: skip

    def judged(network: Network) -> dict[str, float]:
        generated = {
            model: frames[model].images(painter.generate(network, asked[model], 12, SCALES[model])) for model in asked
        }
        found = {
            "t2i": judge.judge_paintings(generated["demo"], scenes),
            "edit": judge.judge_edits(generated["demo-edit"], [p.before for p in pairs], [p.after for p in pairs]),
        }
        return {f"{task} {name}": value for task, values in found.items() for name, value in values.items()}

    _train_painter(folder, "demo-edit", kinds, every, seed, judged,
                   [out / "models" / model for model in asked], start)  # fmt: skip


def train_layered(out: Path, every: int, seed: int) -> None:
    """The transformer that decomposes images."""
    _train_layered(out, out / "layered", every, seed)


def train_layered_alone(out: Path, every: int, seed: int) -> None:
    """The same, on, mostly without prompts."""
    _train_layered(out, out / "layered-alone", every, seed, last_checkpoint(out / "layered"))


def polish_layered(out: Path, every: int, seed: int) -> None:
    """The same, on, with scenes that are as their captions tell."""
    _train_layered(out, out / "layered-polish", every, seed, last_checkpoint(out / "layered-alone"), as_told=True)


def _train_layered(
    out: Path, folder: Path, every: int, seed: int, start: Path | None = None, as_told: bool = False
) -> None:
    frame = samples.Frame(out / "models" / "demo-layered")
    scenes = samples.draw_scenes(JUDGED, HELD_OUT_SEED, held_out=True, as_told=as_told)
    said = samples.decompositions(frame, scenes, LAYERS[-1])
    asked = {"said": said, "alone": replace(said, prompt=said.dropped[:, 0])}

    def kept(layers: int, stage: str, as_told: bool) -> samples.Samples:
        drawn = partial(samples.draw_scenes, SAMPLES[stage], seed + layers, layers - 1, as_told=as_told)
        return _kept(out / stage / f"{layers}.npz", lambda: samples.decompositions(frame, drawn(), layers))

    kinds = [kept(layers, folder.name if as_told else "layered", as_told) for layers in LAYERS]
    if as_told:
        kinds.append(kept(LAYERS[-1], "layered", False))  # lest it forget all others

    def judged(network: Network) -> dict[str, float]:
        found = {}
        for how, wanted in asked.items():
            tokens = painter.generate(network, wanted, 12, SCALES["demo-layered"])
            images = frame.images(tokens.reshape(JUDGED * (LAYERS[-1] + 1), -1, tokens.shape[-1]))
            stacks = images.reshape(JUDGED, -1, *images.shape[1:])[:, 1:]
            found |= {f"{how} {name}": value for name, value in judge.judge_layers(stacks, scenes).items()}
        return found

    _train_painter(folder, "demo-layered", kinds, every, seed, judged, [out / "models" / "demo-layered"], start)


def pack(out: Path, every: int, seed: int) -> None:
    """Lays the models into the package, with what they share only once, and says how their latents are shown."""
    for model in checkpoint.PIPELINES:
        frame = samples.Frame(out / "models" / model)
        channels = 4 if checkpoint.transformer_config(model).use_layer3d_rope else 3
        checkpoint.write_preview(out / "models" / model, preview.fit_preview(frame, channels))
    checkpoint.pack(out / "models", DEMO_ROOT)


def train_control(out: Path, every: int, seed: int) -> None:
    """The ControlNet of the packed `demo`, which goes into the package too."""
    folder, frame = out / "control", samples.Frame("demo")
    scenes = control.draw_anywhere(JUDGED, HELD_OUT_SEED, held_out=True)
    outlined = control.steered(frame, scenes)
    kind = _kept(folder / "scenes.npz", lambda: control.steered(
        frame, control.draw_anywhere(SAMPLES["control"], seed), seed), control.Steered)  # fmt: skip
    network = control.SteeredNetwork(checkpoint.transformer_config("demo"), seed)
    network.load(DEMO_ROOT / "shared" / "transformer" / checkpoint.WEIGHTS)
    batches = painter.draw_batches([kind], SIZES["control"], seed, 0.1)

    def judged(network: Network) -> dict[str, float]:
        images = frame.images(painter.generate(network, outlined, 12, SCALES["demo"]))
        return judge.judge_places(images, scenes) | judge.judge_paintings(images, scenes)

    trainer = control.new_trainer(network, batches, SCHEDULES["control"], seed)
    _train(folder, trainer, every, seed, judged, lambda: control.write_control(DEMO_ROOT / DEMO_CONTROL, trainer))


STAGES = {
    "vae": train_vae, "rgba-vae": train_rgba_vae, "text-encoder": write_frames, "t2i-edit": train_t2i_edit,
    "polish": polish, "layered": train_layered, "layered-alone": train_layered_alone,
    "layered-polish": polish_layered, "pack": pack, "control": train_control,
}  # fmt: skip


def _train_autoencoder(folder: Path, trainer: autoencoder.Trainer, every: int) -> None:
    state, steps = folder / "state.safetensors", STEPS[folder.name]
    folder.mkdir(parents=True, exist_ok=True)
    if state.exists():
        trainer.restore(state)
    while trainer.step < steps:
        first, begin = trainer.step, time.monotonic()
        loss = trainer.run(min(steps, (first // every + 1) * every))
        seconds = (time.monotonic() - begin) / (trainer.step - first)
        trainer.save(state)
        found = autoencoder.judge(trainer.averaged(), trainer.config.input_channels)
        _report(folder, trainer.step, seconds, {"loss": loss} | found)


def _train_painter(
    folder: Path,
    model: str,
    kinds: Sequence[samples.Samples],
    every: int,
    seed: int,
    judged: Callable[[Network], dict[str, float]],
    models: Sequence[Path],
    start: Path | None = None,
) -> None:
    config = checkpoint.transformer_config(model)
    network = painter.new_network(config, seed)
    batches = painter.draw_batches(kinds, SIZES[folder.name], seed, DROPS.get(folder.name, 0.1))
    if start is not None:
        painter.put_average(network, start)
    trainer = painter.new_trainer(network, batches, SCHEDULES[folder.name], seed)

    def write() -> None:
        for target in models:
            checkpoint.write_component(target, "transformer", config, painter.file_weights(trainer))

    _train(folder, trainer, every, seed, judged, write)


def _train(
    folder: Path,
    trainer: Trainer,
    every: int,
    seed: int,
    judged: Callable[[Network], dict[str, float]],
    write: Callable[[], None],
) -> None:
    """Takes a stage's steps; after each `every` of them it is saved, judged, reported and written."""
    steps = STEPS[folder.name]
    record = {"stage": folder.name, "steps": SCHEDULES[folder.name], "seed": seed, "batch": BATCH}
    last = last_checkpoint(folder)
    if last is not None:
        load_checkpoint(last, trainer, record)
    while trainer.step < steps:
        first, begin = trainer.step, time.monotonic()
        losses = [trainer.take_step().loss for _ in range(min(every - first % every, steps - first))]
        seconds = (time.monotonic() - begin) / (trainer.step - first)
        save_checkpoint(folder, trainer, record)
        with trainer.weights() as network:
            found = judged(network)
        _report(folder, trainer.step, seconds, {"loss": float(np.mean(losses))} | found)
        write()


def _kept(
    path: Path, make: Callable[[], samples.Samples], of: type[samples.Samples] = samples.Samples
) -> samples.Samples:
    """Samples of a class from a file, made if it is not there."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        make().save(path)
    return of.load(path)


def _report(folder: Path, step: int, seconds: float, found: dict[str, float]) -> None:
    """Adds a line to the stage's log and shows it."""
    line = {"step": step, "seconds_per_step": seconds} | found
    text = json.dumps({name: round(value, 4) for name, value in line.items()})
    with (folder / "log.jsonl").open("a", encoding="utf-8") as log:
        log.write(text + "\n")
    print(text, flush=True)


if __name__ == "__main__":
    main()
