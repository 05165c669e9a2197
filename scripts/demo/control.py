"""Trains the demo's ControlNet: outlines of shapes steer the frozen transformer of `demo`.

It is of the block-wise family, the smallest: two matrices for each block of the transformer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from PIL import Image

from qwen_image_mlx.images.control import canny
from qwen_image_mlx.models.qwen_image.config import TransformerConfig
from qwen_image_mlx.models.qwen_image.control import BlockwiseControlNet, ControlConfig
from qwen_image_mlx.models.qwen_image.modulation import TimeModulation
from qwen_image_mlx.models.qwen_image.rope import Segment, place_images
from qwen_image_mlx.models.qwen_image.transformer import Modulation, Transformer
from qwen_image_mlx.models.rotary import Rotary
from qwen_image_mlx.training.loop import LoopSettings, Trainer
from qwen_image_mlx.training.loss import FlowMatching, key_of
from qwen_image_mlx.training.network import Batch
from qwen_image_mlx.training.optimizers import Optimizer, Rate
from qwen_image_mlx.training.qwen_image.network import Network
from qwen_image_mlx.weights.safetensors_files import save_tensors

from .painter import EMA, WARM_UP
from .samples import GRID, Frame, Samples, paintings
from .scenes import SIZES, Scene, coverage, draw_scene, outline

RATE, MUON_RATE = 2e-3, 1e-2
FILE = "model.safetensors"
_CONTROL = "control."  # what its parameters' names begin with
_WIDTHS = (1.0, 2.5)  # of drawn outlines, in pixels


class SteeredNetwork(Network):
    """A frozen transformer and modulation with a ControlNet in training, which reads a batch's references.

    Args:
        config: the transformer's.
        seed: of the ControlNet's weights. It adds nothing yet.
    """

    def __init__(self, config: TransformerConfig, seed: int = 0):
        super().__init__(Transformer(config), config, TimeModulation(config))
        self.freeze()
        self.control = BlockwiseControlNet(ControlConfig(**asdict(config), condition_channels=config.in_channels))
        for path, module in self.control.named_modules():
            if path.endswith(("img_in", "input_proj")):
                shape = module.weight.shape
                module.weight = mx.random.normal(shape, key=key_of(seed, path)) / shape[-1] ** 0.5

    def load(self, transformer: Path) -> None:
        """Puts the weights of a checkpoint's file into the transformer and its modulation."""
        state = mx.load(str(transformer))
        names = [name for name, _ in tree_flatten(self.parameters()) if not name.startswith(_CONTROL)]
        weights = [(name, state[name.partition(".")[2]].astype(mx.float32)) for name in names]
        self.load_weights(weights, strict=False)

    def __call__(
        self,
        latents: mx.array,
        text: mx.array,
        sigmas: mx.array,
        rotary: Rotary,
        references: mx.array | None = None,
        rows: Modulation | None = None,
    ) -> mx.array:
        """As `Network`, where `references` is the encoded control image (B, N, C); None leaves the ControlNet out."""
        transformer, modulation = self.transformer, self.modulation(sigmas, latents.dtype)
        hints = []
        if references is not None:
            condition = self.control.project_condition(references)
            hints.append(lambda block, _, image: self.control.controlnet_blocks[block](image, condition))
        hidden = transformer.enter(latents, [transformer.project_text(text)])
        hidden = transformer.run(hidden, modulation, [rotary], hints=hints)
        return transformer.leave(hidden, modulation)[0]


@dataclass(frozen=True)
class Steered(Samples):
    """Scenes with a control image each, encoded: they are the references, which the transformer does not see."""

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The target alone."""
        return tuple(place_images([GRID], False))


def steered(frame: Frame, scenes: Sequence[Scene], seed: int | None = None) -> Steered:
    """Scenes, their captions, and the outlines of their shapes; with a seed some of them are drawn."""
    plain = paintings(frame, scenes)
    rng = None if seed is None else np.random.default_rng([seed, 3])
    edges = np.stack([outlines(scene, rng) for scene in scenes])
    return Steered(plain.latents, plain.texts, plain.prompt, plain.dropped, frame.latents(edges))


def outlines(scene: Scene, rng: np.random.Generator | None = None) -> np.ndarray:
    """The outline of a scene's thing, white on black: (SIDE, SIDE, 3), uint8; found by `canny`, or half the time drawn
    as a line, where `rng` draws lots."""
    (thing,) = scene.things
    if rng is None or rng.random() < 0.5:
        inside = Image.fromarray(np.rint(255 * coverage(thing)).astype(np.uint8))
        return np.asarray(canny(inside.convert("RGB")))
    lines = np.rint(255 * outline(thing, rng.uniform(*_WIDTHS))).astype(np.uint8)
    return np.repeat(lines[..., None], 3, axis=-1)


def draw_anywhere(count: int, seed: int, held_out: bool = False) -> list[Scene]:
    """Scenes of one thing of any size, anywhere; their captions name neither."""
    rng = np.random.default_rng([seed, 4])
    smallest, _, largest = SIZES.values()
    found = []
    for _ in range(count):
        scene = draw_scene(rng, held_out=held_out)
        radius = float(rng.uniform(smallest, largest))
        x, y = (float(place) for place in rng.uniform(radius + 0.02, 0.98 - radius, 2))
        thing = replace(scene.things[0], x=x, y=y, radius=radius, size="", place="")
        found.append(replace(scene, things=(thing,)))
    return found


def new_trainer(network: SteeredNetwork, batches: Callable[[int], Sequence[Batch]], steps: int, seed: int) -> Trainer:
    """Muon for the matrices between the transformer's tokens, AdamW for the rest."""
    optimizer = Optimizer(
        Rate(RATE, WARM_UP, "cosine", steps), weight_decay=0.0, betas=(0.9, 0.99),
        muon=lambda name, array: ".controlnet_blocks." in name and array.ndim == 2,
        muon_rate=Rate(MUON_RATE, WARM_UP, "cosine", steps),
    )  # fmt: skip
    return Trainer(network, batches, optimizer, FlowMatching("logit_normal"), LoopSettings(seed, ema=EMA))


def write_control(folder: Path, trainer: Trainer) -> None:
    """Writes the averaged weights, bf16, named as in DiffSynth's files."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name.removeprefix(_CONTROL): array.astype(mx.bfloat16) for name, array in trainer.average.items()}
    save_tensors(folder / FILE, weights, {"format": "pt"})
