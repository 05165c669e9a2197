"""What quantization costs in accuracy, and what loading and saving quantized takes.

    python benchmarks/quantization.py [--blocks 2] [--json FILE]

Errors are |out - out'| / |out| of the velocity of a transformer and of the states of a text encoder, real in every
width and short, with Gaussian weights, in fp32: quantized matrices are unpacked first, since MLX's quantized product is
slow on a CPU; that changes rounding, not numbers. Times and peaks are those of loading and of writing a pack, beside a
plain load of the same file.

Takes 25 minutes, 8 GB of memory and 6 GB of temporary files.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

from common import MIB, Table, Targets, finish, parser, preload_blas, stopwatch

SCHEMES = ("8", "mxfp8", "6", "5", "4/32", "4", "nvfp4", "mxfp4", "3")
WITHOUT_REFIT = ("8", "6", "4")
VOCABULARY = 512
TOKENS = (16, 16)  # of the image, down and across
TEXT_TOKENS = 32


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--blocks", type=int, default=2, help="transformer blocks (2)")
    arguments = options.parse_args()
    preload_blas()
    errors = accuracy(arguments.blocks)
    errors.print()
    costs, targets = cost(arguments.blocks)
    costs.print()
    finish([errors, costs, targets], arguments.json)


def accuracy(blocks: int) -> Table:
    import mlx.core as mx
    from mlx.utils import tree_flatten

    from qwen_image_mlx.models.qwen2_5_vl.text import TextEncoder
    from qwen_image_mlx.models.qwen_image.rope import place_images, rotary_tables
    from qwen_image_mlx.models.qwen_image.transformer import Transformer
    from qwen_image_mlx.pipeline.qwen_image.table import modulation_table
    from qwen_image_mlx.weights.loader import ComponentWeights, load_module
    from qwen_image_mlx.weights.mapping import expected_tensors
    from qwen_image_mlx.weights.quantize import quantize_matrix
    from qwen_image_mlx.weights.safetensors_files import component_tensors
    from qwen_image_mlx.weights.schemes import Scheme
    from qwen_image_mlx.weights.synthetic import FULL, ROWS, random_values

    configs = {
        "transformer": replace(FULL["transformer"], num_layers=blocks),
        "text_encoder": replace(FULL["text_encoder"], num_hidden_layers=1, vocab_size=VOCABULARY),
    }

    def rounded(module, specs, scheme, refits):
        """The module with every matrix as its packed form reads."""
        for name, array in tree_flatten(module.parameters()):
            if specs[name].quantized:
                packed = quantize_matrix(array, scheme, refits).dequantize()
                mx.eval(packed)
                module.load_weights([(name, packed)], strict=False)
        return module

    def error(out, exact) -> float:
        return (mx.linalg.norm(out - exact) / mx.linalg.norm(exact)).item()

    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        for component, build in (("transformer", Transformer), ("text_encoder", TextEncoder)):
            config = configs[component]
            specs = expected_tensors(ROWS[component], config)
            keys = mx.random.split(mx.random.key(0), len(specs))
            file = Path(folder) / f"{component}.safetensors"
            mx.save_safetensors(
                str(file), {s.name: random_values(s, k) for s, k in zip(specs.values(), keys, strict=True)}
            )
            parts = ("main", "modulation") if component == "transformer" else ("main",)
            weights = ComponentWeights(ROWS[component], config, component_tensors([file], None), parts)
            if component == "transformer":
                x = mx.random.normal((1, TOKENS[0] * TOKENS[1], 64), key=mx.random.key(1))
                text = mx.random.normal((1, TEXT_TOKENS, config.joint_attention_dim), key=mx.random.key(2))
                (step,) = modulation_table(weights, [0.6], mx.float32)
                tables = rotary_tables(place_images([TOKENS], False), TEXT_TOKENS, config.axes_dims_rope)

                def run(module, step=step, x=x, text=text, tables=tables):
                    return module(x, module.project_text(text), step, tables, None)
            else:
                ids = mx.arange(64)[None] * 7 % VOCABULARY
                positions = mx.broadcast_to(mx.arange(64), (3, 64))

                def run(module, ids=ids, positions=positions):
                    return module(module.embed(ids), positions)

            def fresh(build=build, config=config, weights=weights):
                return load_module(build(config), weights, "main", mx.float32)

            exact = run(fresh())
            mx.eval(exact)
            for name in SCHEMES:
                scheme = Scheme.parse(name)
                found = [error(run(rounded(fresh(), specs, scheme, 6)), exact)]
                found.append(error(run(rounded(fresh(), specs, scheme, 0)), exact) if name in WITHOUT_REFIT else "")
                if component == "transformer":
                    quantized = {
                        n: s for n, s in specs.items() if s.part == "modulation" and "_mod." in n and len(s.shape) == 2
                    }
                    found.append(
                        error(run_modulated(fresh(), weights, quantized, scheme, run), exact)
                        if name in WITHOUT_REFIT
                        else ""
                    )
                rows.setdefault(name, []).extend(found)
    columns = ("scheme", "velocity", "without refit", "modulation alone", "text states", "without refit")
    return Table("relative error of the output, by scheme", columns, [(name, *row) for name, row in rows.items()])


def run_modulated(module, weights, specs, scheme, run):
    """The output if the modulation alone were quantized, as it would be without the table."""
    import mlx.core as mx

    from qwen_image_mlx.pipeline.qwen_image.table import modulation_table
    from qwen_image_mlx.weights.quantize import quantize_matrix

    class Rounding:
        changes = staticmethod(lambda name: name in specs)

        @staticmethod
        def apply(name, value):
            return quantize_matrix(value, scheme).dequantize()

    (step,) = modulation_table(weights, [0.6], mx.float32, adapters=Rounding())
    return run(module, step=step)


def cost(blocks: int) -> tuple[Table, Targets]:
    import mlx.core as mx

    from qwen_image_mlx import Quantization, QwenImagePipeline
    from qwen_image_mlx.pipeline.quantize_checkpoint import quantize_checkpoint
    from qwen_image_mlx.weights.synthetic import FULL, TINY, write_checkpoint

    rows, targets = [], Targets()
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source"
        configs = {
            "transformer": replace(
                FULL["transformer"], num_layers=blocks, joint_attention_dim=TINY["transformer"].joint_attention_dim
            ),
            "text_encoder": TINY["text_encoder"],
            "vae": TINY["vae"],
        }
        write_checkpoint(source, configs)
        mx.clear_cache()
        size = sum(file.stat().st_size for file in (source / "transformer").glob("*.safetensors"))

        def measured(run):
            mx.clear_cache()
            mx.reset_peak_memory()
            before = mx.get_active_memory()
            return stopwatch(run), (mx.get_peak_memory() - before) / size, (mx.get_active_memory() - before) / size

        def load(model, quantize=None):
            pipeline = QwenImagePipeline.from_pretrained(model, quantize=quantize)
            result = measured(lambda: pipeline.components.network("transformer"))
            pipeline.release_transformer()
            return result

        plain = load(source)
        rows.append(("load, bf16", 1.0, *plain[1:]))
        for name in ("8", "4", "mxfp4"):
            taken = load(source, f"transformer={name}")
            rows.append((f"load --quantize {name}", taken[0] / plain[0], *taken[1:]))
            out = Path(folder) / f"pack-{name.replace('/', '-')}"
            scheme = Quantization.parse(f"transformer={name}")
            saved = measured(lambda out=out, scheme=scheme: quantize_checkpoint(source, out, scheme))
            rows.append((f"quantize --bits {name}", saved[0] / plain[0], *saved[1:]))
            packed = load(out)
            rows.append((f"load the pack of {name}", packed[0] / plain[0], *packed[1:]))
            targets.check(f"peak of loading at {name} beyond what is held / file", taken[1] - taken[2], 0.35)
    columns = ("", "time / plain load", "peak / bf16 file", "held / bf16 file")
    title = f"loading and saving a transformer of {blocks} blocks of real width; bf16 file: {size / MIB:,.0f} MiB"
    return Table(title, columns, rows), targets


if __name__ == "__main__":
    main()
