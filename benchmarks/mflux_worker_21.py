"""Runs mflux's Qwen-Image-2.1 transformer for transformer_21.py, in mflux's own environment; see common.Worker.

A step is what stands in its `generate_image` (models/qwen21/variants/txt2img/qwen_image_21.py): inside
`inference_projections`, which pack q, k and v and the gated MLP's halves, the transformer called with its cache of the
text, compiled, and the step of the scheduler.
"""

from __future__ import annotations

from contextlib import ExitStack
from types import SimpleNamespace

import mlx.core as mx
from common import serve, stopwatch
from mflux.models.common.weights.mapping.weight_mapper import WeightMapper
from mflux.models.qwen21.model.qwen21_transformer.qwen21_transformer import Qwen21Transformer
from mflux.models.qwen21.weights.qwen21_weight_mapping import Qwen21WeightMapping


class Transformer:
    """Blocks of its transformer, and its step from text alone."""

    def load(self, weights: str, layers: int) -> None:
        self.model = Qwen21Transformer(num_layers=layers)
        mapping = Qwen21WeightMapping.get_transformer_mapping()
        self.model.update(WeightMapper.apply_mapping(mx.load(weights), mapping, num_blocks=layers))
        mx.eval(self.model.parameters())

    def prepare(self, inputs: str, grid: list[int], sigmas: list[float]) -> None:
        """Inputs: latents (1, N, 64) and text (1, L, 4096)."""
        arrays = mx.load(inputs)
        self.latents, self.text, self.sigmas = arrays["latents"], arrays["text"], mx.array(sigmas)
        self.mask = mx.ones(self.text.shape[:2])
        scheduler = SimpleNamespace(sigmas=self.sigmas)
        self.config = SimpleNamespace(height=16 * grid[0], width=16 * grid[1], scheduler=scheduler)
        mx.eval(self.latents, self.text, self.mask, self.sigmas)
        self.packed = ExitStack()
        self.packed.enter_context(self.model.inference_projections())

    def velocity(self, output: str) -> None:
        mx.save_safetensors(output, {"velocity": self._predict()})

    def step(self) -> float:
        return stopwatch(lambda: mx.eval(self.latents + self._predict() * (self.sigmas[1] - self.sigmas[0])))

    def _predict(self) -> mx.array:
        return self.model(0, self.config, self.latents, self.text, self.mask)


if __name__ == "__main__":
    transformer = Transformer()
    serve(
        {
            "load": transformer.load,
            "prepare": transformer.prepare,
            "velocity": transformer.velocity,
            "step": transformer.step,
        }
    )
