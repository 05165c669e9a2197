"""A transformer block and a whole step at real width (3072, 24 heads), fp32, in one run.

    python benchmarks/transformer.py [--rounds 7] [--blocks 2] [--tokens 256 1024]

Ours against diffusers on torch, against mflux 0.24.0, and against the floor: the same matrix products and attention in
MLX with nothing else. All share the same random weights; the relative difference of the outputs is printed. mflux runs
two passes per step whatever the guidance (mflux/models/qwen/variants/txt2img/qwen_image.py).
"""

from __future__ import annotations

import argparse
from types import SimpleNamespace

from common import add_mflux, preload_blas, print_table, take_turns, verdict

TEXT_TOKENS = 64
GRIDS = {256: (16, 16), 1024: (32, 32)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--tokens", nargs="+", type=int, choices=GRIDS, default=list(GRIDS))
    arguments = parser.parse_args()
    preload_blas()
    with_mflux = add_mflux()

    import mlx.core as mx
    import numpy as np
    import torch

    torch.set_num_threads(2)
    config, weights = random_weights(arguments.blocks)
    sides = [Ours(config, weights), Diffusers(config, weights)]
    if with_mflux:
        sides.append(Mflux(config, weights))
    targets = []
    for tokens in arguments.tokens:
        grid = GRIDS[tokens]
        rng = np.random.default_rng(0)
        latents = rng.standard_normal((1, tokens, 64)).astype(np.float32)
        text = rng.standard_normal((1, TEXT_TOKENS, 3584)).astype(np.float32)
        for side in sides:
            side.prepare(latents, text, grid)
        reference = sides[1].velocity()
        scale = np.abs(reference).max()
        for side in sides:
            print(f"{side.name}: differs from diffusers by {np.abs(side.velocity() - reference).max() / scale:.1e}")
        floor = Floor(weights, tokens)
        blocks = take_turns({"floor": floor.block, **{s.name: s.block for s in sides}}, arguments.rounds)
        steps = take_turns(
            {f"{s.name} cfg {cfg:g}": lambda s=s, cfg=cfg: s.step(cfg) for s in sides for cfg in (1.0, 4.0)},
            max(3, arguments.rounds // 2),
        )
        print_table(
            f"{tokens} image tokens: one block", ("", "ms", "ratio to the floor"),
            [(name, 1e3 * t, t / blocks["floor"]) for name, t in blocks.items()],
        )  # fmt: skip
        base = steps["mflux cfg 1" if with_mflux else "diffusers cfg 1"]
        print_table(
            f"{tokens} image tokens: a step of {arguments.blocks} blocks",
            ("", "ms", f"ratio to {'mflux' if with_mflux else 'diffusers'} at cfg 1"),
            [(name, 1e3 * t, t / base) for name, t in steps.items()],
        )
        if tokens == 256:
            targets.append(verdict("block / floor, 256 tokens", blocks["ours"] / blocks["floor"], 1.2))
            if with_mflux:
                targets.append(verdict("step at cfg 1 / mflux", steps["ours cfg 1"] / steps["mflux cfg 1"], 0.45))
                targets.append(verdict("step at cfg 4 / mflux", steps["ours cfg 4"] / steps["mflux cfg 4"], 0.9))
    print_table("Targets", ("", "measured", "at most", ""), targets)
    print(f"\nmlx {mx.__version__}, torch {torch.__version__}")


def random_weights(blocks: int):
    """(config, tensors under the checkpoint's names)."""
    import mlx.core as mx

    from qwen_image_mlx.config import TransformerConfig
    from qwen_image_mlx.weights.mapping import expected_tensors
    from qwen_image_mlx.weights.synthetic import random_values

    config = TransformerConfig(num_layers=blocks)
    specs = list(expected_tensors("transformer", config).values())
    keys = mx.random.split(mx.random.key(0), len(specs))
    weights = {spec.name: random_values(spec, keys[n]) for n, spec in enumerate(specs)}
    mx.eval(weights)
    return config, weights


class Ours:
    name = "ours"

    def __init__(self, config, weights):
        from mlx.utils import tree_flatten

        from qwen_image_mlx.models.transformer import Transformer

        self.config, self.weights = config, weights
        self.model = Transformer(config)
        names = [name for name, _ in tree_flatten(self.model.parameters())]
        self.model.load_weights([(name, weights[name]) for name in names], strict=True)

    def prepare(self, latents, text, grid):
        import mlx.core as mx
        import numpy as np

        from qwen_image_mlx.models.rope import Segment, rotary_tables
        from qwen_image_mlx.sampling.schedule import Schedule
        from qwen_image_mlx.weights.modulation import modulation_table

        # The modulation weights as the loader would hand them over.
        source = SimpleNamespace(component="transformer", read=lambda part: dict(self.weights))
        self.schedule = Schedule(np.array([0.6, 0.5], np.float32))
        self.table = modulation_table(source, self.schedule.timesteps, mx.float32)
        self.latents = mx.array(latents)
        self.text = self.model.project_text(mx.array(text))
        self.rotary = rotary_tables([Segment(0, *grid)], text.shape[1], self.config.axes_dims_rope)
        self.img = self.model.img_in(self.latents)
        mx.eval(self.text, self.rotary, self.img)

    def _predict(self, latents, step, branch):
        return self.model(latents, self.text, self.table[step], self.rotary)

    def velocity(self):
        import numpy as np

        return np.array(self._predict(self.latents, 0, 0))

    def step(self, cfg):
        from qwen_image_mlx.sampling.denoise import Guidance, denoise

        denoise(self._predict, self.latents, self.schedule, Guidance(cfg, True) if cfg > 1 else None)

    def block(self):
        import mlx.core as mx

        mx.eval(self.model.transformer_blocks[0]([self.img], self.text, self.table[0].blocks[0], self.rotary))


class Diffusers:
    name = "diffusers"

    def __init__(self, config, weights):
        import numpy as np
        import torch
        from diffusers import QwenImageTransformer2DModel

        with torch.device("meta"):
            self.model = QwenImageTransformer2DModel(num_layers=config.num_layers)
        state = {name: torch.from_numpy(np.array(w)) for name, w in weights.items()}
        self.model.load_state_dict(state, strict=True, assign=True)
        self.model.eval()
        from diffusers.models.transformers.transformer_qwenimage import QwenEmbedRope

        self.model.pos_embed = QwenEmbedRope(10000, [16, 56, 56], scale_rope=True)

    def prepare(self, latents, text, grid):
        import torch

        self.latents, self.text, self.grid = torch.from_numpy(latents), torch.from_numpy(text), grid
        with torch.no_grad():
            self.img = self.model.img_in(self.latents)
            self.txt = self.model.txt_in(self.model.txt_norm(self.text))
            self.temb = self.model.time_text_embed(torch.tensor([0.6]), self.img)
            self.rotary = self.model.pos_embed([[(1, *grid)]], device="cpu", max_txt_seq_len=TEXT_TOKENS)

    def _predict(self):
        import torch

        with torch.no_grad():
            return self.model(
                hidden_states=self.latents, encoder_hidden_states=self.text, timestep=torch.tensor([0.6]),
                img_shapes=[[(1, *self.grid)]], return_dict=False,
            )[0]  # fmt: skip

    def velocity(self):
        return self._predict().numpy()

    def step(self, cfg):
        import torch

        velocity = self._predict()
        if cfg > 1:
            negative = self._predict()
            combined = negative + cfg * (velocity - negative)
            norms = (torch.norm(v, dim=-1, keepdim=True) for v in (velocity, combined))
            velocity = combined * (next(norms) / next(norms))
        return self.latents - 0.1 * velocity

    def block(self):
        import torch

        with torch.no_grad():
            self.model.transformer_blocks[0](
                hidden_states=self.img, encoder_hidden_states=self.txt, encoder_hidden_states_mask=None,
                temb=self.temb, image_rotary_emb=self.rotary,
            )  # fmt: skip


class Mflux:
    name = "mflux"

    RENAMED = (
        ("img_mod.1", "img_mod_linear"), ("txt_mod.1", "txt_mod_linear"), ("img_mlp.net.0.proj", "img_ff.mlp_in"),
        ("img_mlp.net.2", "img_ff.mlp_out"), ("txt_mlp.net.0.proj", "txt_ff.mlp_in"),
        ("txt_mlp.net.2", "txt_ff.mlp_out"), ("attn.to_out.0", "attn.attn_to_out.0"),
    )  # fmt: skip

    def __init__(self, config, weights):
        from mflux.models.qwen.model.qwen_transformer.qwen_transformer import QwenTransformer

        self.model = QwenTransformer(num_layers=config.num_layers)
        renamed = []
        for name, array in weights.items():
            for old, new in self.RENAMED:
                name = name.replace(old, new)
            renamed.append((name, array))
        self.model.load_weights(renamed, strict=True)

    def prepare(self, latents, text, grid):
        import mlx.core as mx

        self.latents, self.text = mx.array(latents), mx.array(text)
        self.mask = mx.ones((1, TEXT_TOKENS))
        self.config = SimpleNamespace(
            height=16 * grid[0], width=16 * grid[1], scheduler=SimpleNamespace(sigmas=mx.array([0.6, 0.5]))
        )
        model = self.model
        self.img = model.img_in(self.latents)
        self.txt = model.txt_in(model.txt_norm(self.text))
        self.temb = model.time_text_embed(mx.array([0.6]), self.img)
        self.rotary = model._compute_rotary_embeddings(self.mask, model.pos_embed, self.config, None)
        mx.eval(self.img, self.txt, self.temb, self.rotary)

    def _predict(self):
        return self.model(
            t=0, config=self.config, hidden_states=self.latents, encoder_hidden_states=self.text,
            encoder_hidden_states_mask=self.mask,
        )  # fmt: skip

    def velocity(self):
        import numpy as np

        return np.array(self._predict())

    def step(self, cfg):
        """Its loop's body; two passes at any guidance."""
        import mlx.core as mx

        noise, negative = self._predict(), self._predict()
        combined = negative + cfg * (noise - negative)
        norms = (mx.sqrt(mx.sum(v * v, axis=-1, keepdims=True) + 1e-12) for v in (noise, combined))
        mx.eval(self.latents - 0.1 * combined * (next(norms) / next(norms)))

    def block(self):
        import mlx.core as mx

        mx.eval(
            self.model.transformer_blocks[0](
                hidden_states=self.img, encoder_hidden_states=self.txt, encoder_hidden_states_mask=self.mask,
                text_embeddings=self.temb, image_rotary_emb=self.rotary, block_idx=0,
            )
        )  # fmt: skip


class Floor:
    """One block's matrix products and attention, and nothing else."""

    def __init__(self, weights, tokens):
        import mlx.core as mx

        prefix = "transformer_blocks.0."
        self.image = [weights[f"{prefix}attn.{n}.weight"] for n in ("to_q", "to_k", "to_v", "to_out.0")]
        self.text = [
            weights[f"{prefix}attn.{n}.weight"] for n in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
        ]
        self.image += [weights[f"{prefix}img_mlp.net.{n}.weight"] for n in ("0.proj", "2")]
        self.text += [weights[f"{prefix}txt_mlp.net.{n}.weight"] for n in ("0.proj", "2")]
        self.img, self.txt = (mx.random.normal((1, n, 3072), key=mx.random.key(n)) for n in (tokens, TEXT_TOKENS))
        self.joint = mx.random.normal((1, 24, tokens + TEXT_TOKENS, 128), key=mx.random.key(1))
        mx.eval(self.img, self.txt, self.joint)

    def block(self):
        import mlx.core as mx

        outs = []
        for x, (q, k, v, out, up, down) in ((self.img, self.image), (self.txt, self.text)):
            outs += [x @ w.T for w in (q, k, v, out)]
            outs.append((x @ up.T) @ down.T)
        outs.append(mx.fast.scaled_dot_product_attention(self.joint, self.joint, self.joint, scale=128**-0.5))
        mx.eval(outs)


if __name__ == "__main__":
    main()
