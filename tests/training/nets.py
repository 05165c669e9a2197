"""A network to train and the reference's transformer of the same weights, in fp32."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import torch
from checkpoints import TINY
from mlx.utils import tree_flatten
from reference import make_transformer

from qwen_image_mlx.models.qwen_image.config import TransformerConfig
from qwen_image_mlx.models.qwen_image.modulation import TimeModulation
from qwen_image_mlx.models.qwen_image.rope import Segment, place_images
from qwen_image_mlx.models.qwen_image.transformer import Transformer
from qwen_image_mlx.training.network import Batch
from qwen_image_mlx.training.qwen_image.network import Network
from qwen_image_mlx.weights.loader import ComponentWeights, load_module
from qwen_image_mlx.weights.safetensors_files import component_tensors, read_header
from qwen_image_mlx.weights.synthetic import ROWS

TASKS = {
    "t2i": {},
    "edit": {"zero_cond_t": True},
    "edit, references noisy": {},
    "layered": {"use_additional_t_cond": True, "use_layer3d_rope": True},
}
GRIDS = {
    "t2i": [(4, 6)],
    "edit": [(4, 5), (3, 5), (2, 2)],
    "edit, references noisy": [(4, 5), (4, 4)],
    "layered": [(4, 3)] * 4,  # the whole image, two layers, and what they come from
}


class Twins:
    """The same random weights in both implementations, for one task."""

    def __init__(self, folder: Path, task: str):
        config = {**TINY["transformer"], **TASKS[task]}
        self.task, self.theirs = task, make_transformer(config)
        self.theirs.save_pretrained(folder)
        file = folder / "diffusion_pytorch_model.safetensors"
        self.config = TransformerConfig.from_dict({k: v for k, v in config.items() if not k.startswith("_")})
        tensors = component_tensors([file], dict.fromkeys(read_header(file)[0], file.name))
        self.weights = ComponentWeights(ROWS["transformer"], self.config, tensors, ["main", "modulation"])

    def network(self, *, full: bool, checkpointing: bool = False) -> Network:
        """Ours; its modulation is in it if it is trained whole."""
        transformer = load_module(Transformer(self.config), self.weights, "main", mx.float32)
        modulation = None
        if full:
            modulation = load_module(TimeModulation(self.config), self.weights, "modulation", mx.float32)
        return Network(transformer, self.config, modulation, checkpointing=checkpointing)

    def batch(self, size: int = 2, length: int = 7, seed: int = 0) -> Batch:
        """Random samples of the task."""
        grids, rng = GRIDS[self.task], np.random.default_rng(seed)
        segments: list[Segment] = place_images(grids, self.config.use_layer3d_rope)
        shown = {"t2i": 0, "edit": 2}.get(self.task, 1)
        split = len(grids) - shown
        counts = [sum(s.length for s in part) for part in (segments[:split], segments[split:])]
        latents, references = (mx.array(rng.standard_normal((size, n, 64), np.float32)) for n in counts)
        text = mx.array(3 * rng.standard_normal((size, length, self.config.joint_attention_dim), np.float32))
        return Batch(latents, text, tuple(segments), references if shown else None)

    def velocity(self, batch: Batch, noisy: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
        """The reference's, as its training script and its pipelines call it."""
        shown = [] if batch.references is None else [torch.from_numpy(np.array(batch.references))]
        layered = self.config.use_additional_t_cond
        return self.theirs(
            hidden_states=torch.cat([noisy, *shown], dim=1),
            encoder_hidden_states=torch.from_numpy(np.array(batch.text)),
            timestep=sigmas,
            img_shapes=[[(1, *grid) for grid in GRIDS[self.task]]] * len(batch),
            additional_t_cond=torch.zeros(len(batch), dtype=torch.long) if layered else None,
            return_dict=False,
        )[0][:, : noisy.shape[1]]


def named(network: Network) -> dict[str, str]:
    """A full network's parameters by the checkpoint's names."""
    return {name: name.partition(".")[2] for name, _ in tree_flatten(network.trainable_parameters())}


def relative(ours: mx.array, theirs: torch.Tensor) -> float:
    """The largest difference, in units of the largest value."""
    theirs = theirs.detach().numpy()
    return float(np.abs(np.array(ours) - theirs).max() / np.abs(theirs).max())
