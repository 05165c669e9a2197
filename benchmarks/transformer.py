"""A block and a step of the transformer at real width (3072, 24 heads), fp32, with random weights.

    python benchmarks/transformer.py [--tokens 256 1024] [--references 0] [--layers 2] [--rounds 7] [--json FILE]

Ours, diffusers on torch, mflux, and the floor: a block's matrix products and attention in MLX and nothing else. All
have the same weights and inputs; how far the predicted velocities are apart is printed. Ours has modulation and rotary
tables ready, as its pipeline does; a step is what happens between two evaluated latents, each library's way: one pass
at guidance 1 for ours and diffusers, always two for mflux (mflux_worker.py says where). `--references 1` makes it the
step of an edit: an image of the target's size beside the target.

Needs the extra [test], and for mflux the environment that mflux_env.py makes. The default takes 10 to 15 minutes on two
cores and 8 GB.
"""

from __future__ import annotations

import tempfile
from argparse import Namespace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Protocol

from common import Seconds, Table, Targets, Worker, finish, median_ratio, parser, preload_blas, stopwatch, take_turns
from mflux_env import MFLUX, add_option, mflux_python

TEXT_TOKENS = 64
SIGMAS = (0.6, 0.5)
GUIDANCES = (1.0, 4.0)


class Side(Protocol):
    """One library: every method but `prepare` and `velocity` returns the seconds its work took."""

    name: str

    def prepare(self, inputs: str, grid: tuple[int, int], references: int) -> None: ...
    def velocity(self) -> Any: ...
    def block(self) -> float: ...
    def step(self, cfg: float) -> float: ...


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--layers", type=int, default=2, help="blocks of a step (2)")
    options.add_argument("--rounds", type=int, default=7, help="rounds the medians are taken of (7)")
    options.add_argument("--tokens", type=int, nargs="+", default=[256, 1024], help="image tokens, square numbers")
    options.add_argument("--references", type=int, default=0, help="images beside the target, of its size (0)")
    add_option(options)
    arguments = options.parse_args()
    preload_blas()
    with tempfile.TemporaryDirectory() as folder:
        weights = str(Path(folder, "transformer.safetensors"))
        write_weights(weights, arguments.layers)
        sides: list[Side] = [Ours(weights, arguments.layers), Diffusers(weights, arguments.layers)]
        python = mflux_python(arguments.mflux)
        if python:
            sides.append(Mflux(python, weights, arguments.layers))
        targets = Targets()
        tables = []
        for tokens in arguments.tokens:
            tables += compare(sides, weights, tokens, arguments, Path(folder), targets)
    finish([*tables, targets], arguments.json)


def compare(
    sides: list[Side], weights: str, tokens: int, options: Namespace, folder: Path, targets: Targets
) -> list[Table]:
    """The tables of one size."""
    rounds, references = options.rounds, options.references
    inputs = str(folder / f"{tokens}.safetensors")
    side = round(tokens**0.5)
    write_inputs(inputs, tokens, references)
    for candidate in sides:
        candidate.prepare(inputs, (side, side), references)
    size = f"{tokens} image tokens" + (f", {references} reference" if references else "")
    tables = [differences(sides, size)]

    blocks = take_turns(
        {"floor": Floor(weights, tokens * (1 + references)).block, **{s.name: s.block for s in sides}}, rounds
    )
    tables.append(ratios(f"One block, {size}", blocks, "floor"))
    runs = {f"{s.name}, guidance {cfg:g}": partial(s.step, cfg) for cfg in GUIDANCES for s in sides[:2]}
    runs |= {f"{s.name}, any guidance": partial(s.step, GUIDANCES[1]) for s in sides[2:]}
    steps = take_turns(runs, rounds)
    peer = list(steps)[-1]  # mflux, or without it diffusers
    tables.append(ratios(f"One step, {size}", steps, peer))
    for table in tables:
        table.print()

    if tokens == 256 and not references:
        targets.check("block / floor, 256 tokens", median_ratio(blocks, "ours", "floor"), 1.2)
        if peer.startswith("mflux"):
            for cfg, limit in zip(GUIDANCES, (0.45, 0.9), strict=True):
                name = f"step / {MFLUX}, guidance {cfg:g}, 256 tokens"
                targets.check(name, median_ratio(steps, f"ours, guidance {cfg:g}", peer), limit)
    return tables


def ratios(title: str, seconds: Seconds, base: str) -> Table:
    """Medians, and ratios to one candidate."""
    rows = [(name, 1e3 * median(times), median_ratio(seconds, name, base)) for name, times in seconds.items()]
    return Table(title, ["", "ms", f"ratio to {base}"], rows)


def differences(sides: list[Side], size: str) -> Table:
    """Largest difference to diffusers, relative to its largest value: the same work is done."""
    import numpy as np

    velocities = {side.name: side.velocity() for side in sides}
    reference = velocities.pop("diffusers")
    rows = [(name, f"{np.abs(v - reference).max() / np.abs(reference).max():.1e}") for name, v in velocities.items()]
    return Table(f"Velocity, {size}", ["", "relative difference to diffusers"], rows)


def write_weights(file: str, layers: int) -> None:
    """A transformer of this many blocks, under the checkpoint's names."""
    import mlx.core as mx

    from qwen_image_mlx.models.qwen_image.config import TransformerConfig
    from qwen_image_mlx.weights.mapping import expected_tensors
    from qwen_image_mlx.weights.synthetic import ROWS, random_values

    specs = list(expected_tensors(ROWS["transformer"], TransformerConfig(num_layers=layers)).values())
    keys = mx.random.split(mx.random.key(0), len(specs))
    mx.save_safetensors(file, {spec.name: random_values(spec, keys[n]) for n, spec in enumerate(specs)})
    mx.clear_cache()


def write_inputs(file: str, tokens: int, references: int) -> None:
    """Latents of the target and of the references, and encoder states."""
    import mlx.core as mx

    latents = mx.random.normal((1, tokens, 64), key=mx.random.key(1))
    text = mx.random.normal((1, TEXT_TOKENS, 3584), key=mx.random.key(2))
    shown = mx.random.normal((1, references * tokens, 64), key=mx.random.key(3))
    mx.save_safetensors(file, {"latents": latents, "text": text, "references": shown})


class Ours:
    """This package."""

    name = "ours"

    def __init__(self, weights: str, layers: int):
        import mlx.core as mx

        from qwen_image_mlx.models.qwen_image.config import TransformerConfig
        from qwen_image_mlx.models.qwen_image.transformer import Transformer
        from qwen_image_mlx.weights.loader import ComponentWeights, load_module
        from qwen_image_mlx.weights.safetensors_files import component_tensors
        from qwen_image_mlx.weights.synthetic import ROWS

        self.config = TransformerConfig(num_layers=layers)
        tensors = component_tensors((Path(weights),), None)
        self.weights = ComponentWeights(ROWS["transformer"], self.config, tensors, ("main", "modulation"))
        self.model = load_module(Transformer(self.config), self.weights, "main", mx.float32)

    def prepare(self, inputs: str, grid: tuple[int, int], references: int) -> None:
        import mlx.core as mx
        import numpy as np

        from qwen_image_mlx.models.qwen_image.rope import Segment, rotary_tables
        from qwen_image_mlx.pipeline.qwen_image.table import modulation_table
        from qwen_image_mlx.sampling.schedule import Schedule

        arrays = mx.load(inputs)
        self.latents = arrays["latents"]
        self.schedule = Schedule(np.array(SIGMAS, np.float32))
        self.table = modulation_table(self.weights, self.schedule.timesteps, mx.float32)
        self.text = self.model.project_text(arrays["text"])
        segments = [Segment(n, *grid) for n in range(1 + references)]
        self.rotary = rotary_tables(segments, TEXT_TOKENS, self.config.axes_dims_rope)
        self.shown = self.model.project_references(arrays["references"]) if references else None
        self.images = [self.model.img_in(self.latents), *([self.shown] if references else [])]
        mx.eval(self.latents, self.text, self.rotary, self.images)

    def velocity(self) -> Any:
        import numpy as np

        return np.array(self._predict(self.latents, 0)[0])

    def block(self) -> float:
        import mlx.core as mx

        block, rows = self.model.transformer_blocks[0], self.table[0].blocks[0]
        return stopwatch(lambda: mx.eval(block(self.images, self.text, rows, self.rotary)))

    def step(self, cfg: float) -> float:
        from qwen_image_mlx.sampling.denoise import denoise
        from qwen_image_mlx.sampling.guidance import Guidance

        guidance = Guidance(cfg, renormalize=True) if cfg > 1 else None
        return stopwatch(lambda: denoise(self._predict, self.latents, self.schedule, guidance))

    def _predict(self, latents: Any, step: int, branches: int) -> Any:
        texts, tables = [self.text] * branches, [self.rotary] * branches
        return self.model.velocities(latents, texts, self.table[step], tables, self.shown)


class Diffusers:
    """The reference, on torch."""

    name = "diffusers"

    def __init__(self, weights: str, layers: int):
        import torch
        from diffusers import QwenImageTransformer2DModel
        from diffusers.models.transformers.transformer_qwenimage import QwenEmbedRope
        from safetensors.torch import load_file

        with torch.device("meta"):
            self.model = QwenImageTransformer2DModel(num_layers=layers)
        self.model.load_state_dict(load_file(weights), assign=True)
        self.model.pos_embed = QwenEmbedRope(10000, [16, 56, 56], scale_rope=True)  # its tables are not parameters
        self.model.eval()

    def prepare(self, inputs: str, grid: tuple[int, int], references: int) -> None:
        import torch
        from safetensors.torch import load_file

        arrays = load_file(inputs)
        self.latents, self.text, self.references = arrays["latents"], arrays["text"], arrays["references"]
        self.shapes = [[(1, *grid)] * (1 + references)]
        self.timestep = torch.tensor(SIGMAS[:1])
        with torch.no_grad():
            image = self.model.img_in(torch.cat([self.latents, self.references], dim=1))
            self.streams = {
                "hidden_states": image,
                "encoder_hidden_states": self.model.txt_in(self.model.txt_norm(self.text)),
                "encoder_hidden_states_mask": None,
                "temb": self.model.time_text_embed(self.timestep, image),
                "image_rotary_emb": self.model.pos_embed(self.shapes, device="cpu", max_txt_seq_len=TEXT_TOKENS),
            }

    def velocity(self) -> Any:
        return self._predict().numpy()

    def block(self) -> float:
        return stopwatch(self._block)

    def step(self, cfg: float) -> float:
        return stopwatch(partial(self._step, cfg))

    def _predict(self) -> Any:
        import torch

        with torch.no_grad():
            return self.model(
                hidden_states=torch.cat([self.latents, self.references], dim=1),
                encoder_hidden_states=self.text,
                timestep=self.timestep,
                img_shapes=self.shapes,
                return_dict=False,
            )[0][:, : self.latents.shape[1]]

    def _block(self) -> None:
        import torch

        with torch.no_grad():
            self.model.transformer_blocks[0](**self.streams)

    def _step(self, cfg: float) -> Any:
        import torch

        velocity = self._predict()
        if cfg > 1:
            negative = self._predict()
            combined = negative + cfg * (velocity - negative)
            velocity = combined * (velocity.norm(dim=-1, keepdim=True) / combined.norm(dim=-1, keepdim=True))
        dt = torch.tensor(SIGMAS[1]) - torch.tensor(SIGMAS[0])
        return self.latents + dt * velocity


class Mflux:
    """mflux, in its own environment and process; its seconds are measured there."""

    name = "mflux"

    def __init__(self, python: Path, weights: str, layers: int):
        self.worker = Worker(python, "mflux_worker.py")
        self.worker.call("load", weights=weights, layers=layers)

    def prepare(self, inputs: str, grid: tuple[int, int], references: int) -> None:
        self.output = inputs.replace(".safetensors", ".mflux.safetensors")
        self.worker.call("prepare", inputs=inputs, grid=grid, references=references, sigmas=SIGMAS)

    def velocity(self) -> Any:
        from safetensors.numpy import load_file

        self.worker.call("velocity", output=self.output)
        return load_file(self.output)["velocity"]

    def block(self) -> float:
        return self.worker.call("block")

    def step(self, cfg: float) -> float:
        return self.worker.call("step", cfg=cfg)


class Floor:
    """A block's matrix products and attention, and nothing else: no bias, norm, rotation, activation or gate."""

    def __init__(self, weights: str, tokens: int):
        import mlx.core as mx

        arrays = mx.load(weights)
        image = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "img_mlp.net.0.proj", "img_mlp.net.2")
        text = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out", "txt_mlp.net.0.proj",
                "txt_mlp.net.2")  # fmt: skip
        self.streams = []
        for length, names in ((tokens, image), (TEXT_TOKENS, text)):
            x = mx.random.normal((1, length, 3072), key=mx.random.key(length))
            self.streams.append((x, [arrays[f"transformer_blocks.0.{name}.weight"] for name in names]))
        self.joint = mx.random.normal((3, 1, 24, tokens + TEXT_TOKENS, 128), key=mx.random.key(1))
        mx.eval(self.streams, self.joint)

    def block(self) -> float:
        return stopwatch(self._block)

    def _block(self) -> None:
        import mlx.core as mx

        outs = []
        for x, (q, k, v, out, up, down) in self.streams:
            outs += [*(x @ w.T for w in (q, k, v, out)), (x @ up.T) @ down.T]
        outs.append(mx.fast.scaled_dot_product_attention(*self.joint, scale=128**-0.5))
        mx.eval(outs)


if __name__ == "__main__":
    main()
