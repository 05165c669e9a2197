#!/usr/bin/env python3
"""Train the models that the package ships, from nothing.

python scripts/train_demo.py vae --out build/demo
"""

import argparse
import json
import time
from pathlib import Path

from demo import autoencoder

from qwen_image_mlx.config import VAEConfig


def train_autoencoder(folder: Path, channels: int, arguments: argparse.Namespace) -> None:
    """Trains, measures and saves at regular steps; goes on where a run ended."""
    folder.mkdir(parents=True, exist_ok=True)
    trainer = autoencoder.Trainer(
        VAEConfig(base_dim=arguments.base_dim, input_channels=channels), arguments.steps, seed=arguments.seed
    )
    state = folder / "state.safetensors"
    if state.exists():
        trainer.restore(state)
    while trainer.step < trainer.steps:
        begin = time.monotonic()
        first = trainer.step
        loss = trainer.run(min(trainer.steps, (trainer.step // arguments.every + 1) * arguments.every))
        seconds = (time.monotonic() - begin) / (trainer.step - first)
        trainer.save(state)
        line = {"step": trainer.step, "loss": loss, "seconds_per_step": round(seconds, 3)}
        report(folder, line | autoencoder.judge(trainer.averaged(), channels))


def report(folder: Path, line: dict) -> None:
    """Adds a line to the stage's log and shows it."""
    text = json.dumps({k: round(v, 5) if isinstance(v, float) else v for k, v in line.items()})
    with (folder / "log.jsonl").open("a", encoding="utf-8") as log:
        log.write(text + "\n")
    print(text, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["vae"])
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints and logs")
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--every", type=int, default=500, help="steps between two saved states: %(default)s")
    parser.add_argument("--base-dim", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.stage == "vae":
        train_autoencoder(arguments.out / "vae-training", 3, arguments)


if __name__ == "__main__":
    main()
