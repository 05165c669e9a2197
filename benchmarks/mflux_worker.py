"""Runs mflux's Qwen-Image models for the benchmarks, in mflux's own environment; answers calls, see common.Worker.

Weights arrive as a safetensors file with the checkpoint's names and pass through mflux's own mapping; inputs and
outputs are files, too. What a step does follows mflux/models/qwen/variants/txt2img/qwen_image.py (`generate_image`:
both transformer calls stand in the loop without a condition, so two passes run at any guidance).
"""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
from common import count_host_syncs, peak_resident, reset_peak_resident, resident, serve, stopwatch
from mflux.models.common.weights.mapping.weight_mapper import WeightMapper
from mflux.models.qwen.model.qwen_text_encoder.qwen_vision_transformer import VisionTransformer
from mflux.models.qwen.model.qwen_transformer.qwen_transformer import QwenTransformer
from mflux.models.qwen.model.qwen_vae.qwen_vae import QwenVAE
from mflux.models.qwen.weights.qwen_weight_mapping import QwenWeightMapping


class Transformer:
    """Blocks of its transformer, and its step."""

    def load(self, weights: str, layers: int) -> None:
        self.model = QwenTransformer(num_layers=layers)
        arrays = mx.load(weights)
        mapping = QwenWeightMapping.get_transformer_mapping()
        self.model.update(WeightMapper.apply_mapping(arrays, mapping, num_blocks=layers))
        mx.eval(self.model.parameters())

    def prepare(self, inputs: str, grid: list[int], references: int, sigmas: list[float]) -> None:
        """Inputs: latents (1, N, 64), text (1, L, 3584), and references (1, R N, 64), all of the target's grid."""
        model, arrays = self.model, mx.load(inputs)
        self.latents, self.text, self.references = arrays["latents"], arrays["text"], arrays["references"]
        self.grids = [(1, *grid)] * references or None
        self.mask = mx.ones(self.text.shape[:2])
        self.sigmas = mx.array(sigmas)
        scheduler = SimpleNamespace(sigmas=self.sigmas)
        self.config = SimpleNamespace(height=16 * grid[0], width=16 * grid[1], scheduler=scheduler)
        self.image_tokens = model.img_in(self._hidden())
        self.text_tokens = model.txt_in(model.txt_norm(self.text))
        self.time = model.time_text_embed(self.sigmas[:1], self.image_tokens)
        self.rotary = model._compute_rotary_embeddings(self.mask, model.pos_embed, self.config, self.grids)
        mx.eval(self.latents, self.text, self.mask, self.image_tokens, self.text_tokens, self.time, self.rotary)

    def velocity(self, output: str) -> None:
        mx.save_safetensors(output, {"velocity": self._predict()})

    def block(self) -> float:
        return stopwatch(self._block)

    def step(self, cfg: float) -> float:
        return stopwatch(partial(self._step, cfg))

    def _hidden(self) -> mx.array:
        return mx.concatenate([self.latents, self.references], axis=1)

    def _predict(self) -> mx.array:
        velocity = self.model(
            t=0,
            config=self.config,
            hidden_states=self._hidden(),
            encoder_hidden_states=self.text,
            encoder_hidden_states_mask=self.mask,
            cond_image_grid=self.grids,
        )
        return velocity[:, : self.latents.shape[1]]

    def _block(self) -> None:
        mx.eval(
            self.model.transformer_blocks[0](
                hidden_states=self.image_tokens,
                encoder_hidden_states=self.text_tokens,
                encoder_hidden_states_mask=self.mask,
                text_embeddings=self.time,
                image_rotary_emb=self.rotary,
                block_idx=0,
            )
        )

    def _step(self, cfg: float) -> None:
        noise, negative = self._predict(), self._predict()
        combined = negative + cfg * (noise - negative)  # as its compute_guided_noise
        norm, combined_norm = (mx.sqrt(mx.sum(v * v, axis=-1, keepdims=True) + 1e-12) for v in (noise, combined))
        change = combined * (norm / combined_norm) * (self.sigmas[1] - self.sigmas[0])
        mx.eval(self.latents + change)


class Vision:
    """Its vision tower."""

    def load(self, weights: str, depth: int, full: list[int]) -> None:
        self.tower = VisionTransformer(depth=depth, fullatt_block_indexes=full)
        mapping = QwenWeightMapping.get_text_encoder_mapping()
        arrays = WeightMapper.apply_mapping(mx.load(weights), mapping, num_blocks=depth)
        self.tower.update(arrays["encoder"]["visual"])
        mx.eval(self.tower.parameters())

    def run(self, inputs: str, grid: list[int], output: str) -> dict[str, Any]:
        """Seconds, and how often Python waited for a result, for patches (N, 1176); the features are saved."""
        patches, result = mx.load(inputs)["patches"], []
        mx.eval(patches)

        def work() -> None:
            result.append(self.tower(patches, mx.array([[1, *grid]])))
            mx.eval(result)

        with count_host_syncs() as syncs:
            seconds = stopwatch(work)
        mx.save_safetensors(output, {"features": result[0]})
        return {"seconds": seconds, "syncs": syncs()}


class VAE:
    """Its autoencoder, as its pipeline runs it by default: whole, without tiles."""

    def run(self, weights: str, what: str, inputs: str, warm_up: str, output: str) -> dict[str, Any]:
        """Decodes or encodes inputs (1, C, H, W): seconds and peaks."""
        before = resident()
        vae = QwenVAE()
        vae.update(WeightMapper.apply_mapping(mx.load(weights), QwenWeightMapping.get_vae_mapping()))
        mx.eval(vae.parameters())
        call = vae.decode if what == "decode" else vae.encode
        mx.eval(call(mx.load(warm_up)["x"]))
        x = mx.load(inputs)["x"]
        mx.eval(x)
        mx.clear_cache()
        mx.reset_peak_memory()
        reset_peak_resident()
        result = []

        def work() -> None:
            result.append(call(x))
            mx.eval(result)

        seconds = stopwatch(work)
        peaks = {"mlx_peak": mx.get_peak_memory(), "process_peak": peak_resident() - before}
        y = result[0].squeeze(2)
        mx.save_safetensors(output, {"y": mx.clip(y * 0.5 + 0.5, 0, 1) if what == "decode" else y})
        return {"seconds": seconds, **peaks}


if __name__ == "__main__":
    transformer, vision, vae = Transformer(), Vision(), VAE()
    serve(
        {
            "load": transformer.load,
            "prepare": transformer.prepare,
            "velocity": transformer.velocity,
            "block": transformer.block,
            "step": transformer.step,
            "load_vision": vision.load,
            "vision": vision.run,
            "vae": vae.run,
        }
    )
