"""Predicts the memory that generation takes, from configs and headers alone.

A plan has four stages. Weights are counted to the byte; the rest is a model (`pipeline/costs.py`). A
residency decides which weights are in memory in which stage.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from math import prod
from typing import TYPE_CHECKING

import mlx.core as mx

from ..images.geometry import size_of_area
from ..names import SolverName
from ..pipeline.autoencode import STRIP_PIXELS, strips_of
from ..pipeline.components import Components
from ..pipeline.costs import HALO, backend
from ..registry import FOLDERS, LANGUAGE_HEAD, MAIN, TEXT_ENCODER, TRANSFORMER, VAE, VAE_DECODER, VAE_ENCODER, VISION
from ..sampling.solvers import SOLVERS
from ..weights.mapping import TensorSpec, expected_tensors, specs_of_layers
from ..weights.schemes import Scheme
from ..weights.tensor_formats import PACKED
from .residency import DEFAULT, Residency

if TYPE_CHECKING:
    from ..models.qwen2_5_vl.config import TextEncoderConfig, VisionConfig
    from ..pipeline.pipeline import QwenImagePipeline
    from ..pipeline.request import Request
    from ..pipeline.seams import DenoiserClass


@dataclass(frozen=True)
class Work:
    """The properties of a request that memory depends on.

    Attributes:
        width, height: of an image.
        frames: images generated together: 1, or layers + 1.
        shown: (width, height) of each reference image, as the transformer sees it.
        encoded: area in pixels that the VAE encodes at once; 0 for none.
        captioned: area in pixels of the image that is captioned first; 0 for none.
        text_tokens: tokens of a prompt with its template, without its images.
        guided: whether there are two passes in each step.
        steps: denoising steps.
        images: how many are generated one after another.
        controls: names of the ControlNets' components, each once.
        solver: how velocities become steps.
        step_cache: as `GenerationParameters.step_cache`.
        keeps_prefix: whether what text and references contribute may be kept between steps.
    """

    width: int
    height: int
    frames: int = 1
    shown: tuple[tuple[int, int], ...] = ()
    encoded: int = 0
    captioned: int = 0
    text_tokens: int = 256
    guided: bool = True
    steps: int = 50
    images: int = 1
    controls: tuple[str, ...] = ()
    solver: SolverName = "euler"
    step_cache: str | None = None
    keeps_prefix: bool = True


@dataclass(frozen=True)
class Stage:
    """One stage of a plan, in bytes.

    Attributes:
        name: "encode", "load", "denoise" or "decode".
        resident: weights, and results that are kept with them.
        peak: the maximum at any moment.
    """

    name: str
    resident: int
    peak: int


@dataclass(frozen=True)
class MemoryPlan:
    """The predicted memory of one piece of work with one residency.

    Attributes:
        residency: which weights are there when.
        stages: in their order.
        disk: bytes of the files that are read.
        strip_pixels: maximum pixels decoded at once.
        needs_pack: whether the model must be saved quantized first: nothing is quantized while it streams.
    """

    residency: Residency
    stages: tuple[Stage, ...]
    disk: int
    strip_pixels: int = STRIP_PIXELS
    needs_pack: bool = False

    def fits(self, budget: int) -> bool:
        """Whether it can run within a budget in bytes."""
        return self.peak <= budget and not self.needs_pack

    @property
    def peak(self) -> int:
        """Maximum bytes in memory at any moment."""
        return max(stage.peak for stage in self.stages)

    @property
    def working(self) -> int:
        """Maximum bytes that work takes in addition to the resident ones."""
        return max(stage.peak - stage.resident for stage in self.stages)


STRIPS = tuple(STRIP_PIXELS >> n for n in range(5))  # pixels of a strip, from the fastest to the most frugal


def strips_for(work: Work) -> tuple[int, ...]:
    """Pixels of a strip to choose from; a GPU is fastest with the whole image, a CPU with what its caches hold."""
    whole = work.width * work.height
    return (whole, *STRIPS) if backend() == "gpu" and whole > STRIP_PIXELS else STRIPS


def make_plan(
    components: Components, work: Work, residency: Residency = DEFAULT, strip_pixels: int = STRIP_PIXELS
) -> MemoryPlan:
    """The memory of every stage.

    Args:
        components: an opened checkpoint; its configs are read, and of one on disk the headers of its weights.
        work: what is to be generated.
        residency: which weights are there when.
        strip_pixels: maximum pixels decoded at once.

    Raises:
        CheckpointError, HubError: a config or a header cannot be read.
    """
    return Planner(components, work, residency).plan(strip_pixels)


class Planner:
    """Counts the memory of each stage of a piece of work under a residency, in bytes."""

    def __init__(self, components: Components, work: Work, residency: Residency):
        self.components, self.work, self.residency = components, work, residency
        self.tensors = cache(self._tensors)
        self.config_json = cache(lambda name: components.sources.config(components.rows[name].home))
        self.denoiser: DenoiserClass = components.use_of(TRANSFORMER)
        self.costs = self.denoiser.costs[backend()]
        self.itemsize = components.dtype.size
        # Config fields that are corrected by the weights' names do not change memory.
        self.transformer_config = components.declared(TRANSFORMER)

    def plan(self, strip_pixels: int) -> MemoryPlan:
        """The plan, with at most `strip_pixels` pixels decoded at once."""
        before, stages = self.before_decode
        decode = self.decode(before, strip_pixels)
        return MemoryPlan(self.residency, (*stages, decode), self.disk, strip_pixels, self.needs_pack)

    @cached_property
    def before_decode(self) -> tuple[int, tuple[Stage, ...]]:
        """Bytes in memory when an image is decoded, and the stages before that."""
        shows = self.work.shown and self.components.variant.encoder_area
        vision = self.held(VISION) if shows or self.work.captioned else 0
        head = self.held(LANGUAGE_HEAD) if self.work.captioned else 0
        vae = self.count(VAE, self.network(VAE_ENCODER), mx.float32) if self.work.encoded else 0
        encode = self.encode(vision, self.held(TEXT_ENCODER) + head, vae)
        kept = 0 if self.residency.staged else encode.resident
        networks = (TRANSFORMER, *self.work.controls)
        generated = kept + self.table() + sum(map(self.held, networks))
        streams = TRANSFORMER in self.residency.streamed
        loading = generated + (0 if streams else max(self.largest(name, MAIN) for name in networks))
        beside = (self.largest(name, part) for name in networks for part in self.components.rows[name].transient)
        folding = kept + self.table() + int(self.costs.read * max(beside, default=0))
        load = Stage("load", generated, max(loading, folding))
        denoise = Stage("denoise", generated, generated + self.denoise_bytes())
        before = kept if self.residency.staged and self.work.images == 1 else generated
        return before, (encode, load, denoise)

    def encode(self, vision: int, text: int, vae: int) -> Stage:
        """Images through the vision tower, prompts through the text encoder, images through the VAE; all stay."""
        config, work = self.components.config(TEXT_ENCODER), self.work
        prompts = 2 if work.guided else 1
        thinking = int(self.costs.text(prompts * self.prompt_tokens) * _width(config) * self.itemsize)
        thinking += self.passing(TEXT_ENCODER)
        looking = self.vision_pass_bytes() if vision else 0
        reading = int(self.costs.pixel_in * self.components.config(VAE).base_dim * work.encoded)
        peaks = (vision + looking, vision + text + thinking, vision + text + vae + reading)
        return Stage("encode", vision + text + vae, max(peaks) + self.costs.base)

    @property
    def prompt_tokens(self) -> int:
        """Tokens of a prompt with its images."""
        variant, shown = self.components.variant, self.work.shown
        seen = sum(map(prod, shown)) if variant.interleaved else len(shown) * variant.encoder_area
        seen += self.work.captioned
        if not seen:
            return self.work.text_tokens
        config = self.components.config(VISION)
        return self.work.text_tokens + seen // (config.patch_size * config.spatial_merge_size) ** 2

    def vision_pass_bytes(self) -> int:
        """Bytes that the vision tower takes for an image, in addition to its weights."""
        config, variant = self.components.config(VISION), self.components.variant
        shown = max(map(prod, self.work.shown), default=0) if variant.interleaved else variant.encoder_area
        patches = max(shown, self.work.captioned) // config.patch_size**2
        return int(self.costs.patch(patches) * _width(config) * self.itemsize) + self.passing(VISION)

    def denoise_bytes(self) -> int:
        """Bytes that a step takes in addition to the transformer."""
        costs, work, config = self.costs, self.work, self.transformer_config
        tokens = self.target_tokens + self.prefix_tokens
        units = costs.image * self.target_tokens + costs.reference * self.reference_tokens
        units += costs.prompt * self.words + costs.guided * tokens * work.guided
        units += costs.queued(max(self.target_tokens, self.reference_tokens))
        queries = self.largest_image if self.components.variant.keeps_references else tokens
        scores = costs.scores * queries * tokens * config.num_attention_heads * self.itemsize
        states = units * config.dim * self.itemsize
        steering = sum(map(self.passing, work.controls)) + self.cached()
        return int(states + scores) + steering + self.passing(TRANSFORMER) + costs.base + costs.step

    def cached(self) -> int:
        """Bytes that a step cache keeps from step to step."""
        if self.work.step_cache is None:
            return 0
        from ..sampling.step_caches import method_of  # here: most runs have no step cache

        method = method_of(self.work.step_cache)
        branches = 2 if self.work.guided else 1
        space = self.components.latent_space
        width = space.token_channels if method.reuses == "velocity" else self.transformer_config.dim
        return method.kept(branches) * self.target_tokens * width * self.itemsize

    def decode(self, before: int, strip_pixels: int) -> Stage:
        """One image, in strips."""
        config, pixels = self.components.config(VAE), self.work.width * self.work.height
        held = before + self.count(VAE, self.network(VAE_DECODER), mx.float32)
        strip = -(-pixels // strips_of(pixels, strip_pixels)) + HALO * self.work.width
        strip = self.costs.pixel_out * min(pixels, strip) + self.costs.pixel_kept * pixels
        working = int(config.decoder_width * max(strip, self.costs.pixel_whole(pixels))) + self.costs.base
        return Stage("decode", held, held + working + 2 * 4 * pixels * config.input_channels)

    def held(self, name: str) -> int:
        """Bytes of a component's weights that stay loaded."""
        specs = self.specs(name, MAIN)
        if self.streams(name):
            from ..weights.streaming import held_specs  # here: the usual residency streams nothing

            specs = held_specs(self.components.rows[name], specs, lambda tensor: self.stored_dtype(name, tensor))
        return self.count(name, specs)

    @property
    def needs_pack(self) -> bool:
        """Whether a streamed component would be quantized again at each pass, because its files are not quantized."""
        names = {*self.components.quantization.components, *self.work.controls}
        return any(self.streams(name) and self.packs(name) for name in names)

    def packs(self, name: str) -> bool:
        """Whether a component's matrices are quantized while they are loaded."""
        scheme = self.scheme(name)
        return any(
            spec.is_packed_by(scheme) and self.stored_scheme(name, spec) != scheme for spec in self.specs(name, MAIN)
        )

    def streams(self, name: str) -> bool:
        """Whether a component's layers are read at each pass."""
        return (self.components.rows[name].like or name) in self.residency.streamed

    def scheme(self, name: str) -> Scheme | None:
        """The scheme that a component's matrices are quantized to while they are loaded."""
        return getattr(self.components.quantization, self.components.rows[name].like or name, None)

    def reads_headers(self, name: str) -> bool:
        """Whether a component's files are on disk; a ControlNet's always are."""
        return self.is_here or name in self.components.controls

    def stored_scheme(self, name: str, spec: TensorSpec) -> Scheme | None:
        """The scheme of a tensor that is quantized in its file."""
        return (
            self.components.weights(name).stored(spec.name).scheme
            if self.reads_headers(name)
            else self.declared_scheme(name, spec)
        )

    def passing(self, name: str) -> int:
        """Bytes of a streamed component's layers in memory: one that runs, and the next that is read."""
        if not self.streams(name):
            return 0
        from ..weights.streaming import layer_specs  # here: the usual residency streams nothing

        layers = layer_specs(self.components.rows[name], self.specs(name, MAIN))
        return max(self.moved(name, layer) + self.read(name, layer) for layer in layers)

    def table(self) -> int:
        """Bytes that the denoiser keeps from step to step."""
        prefix, branches = self.prefix_tokens if self.work.keeps_prefix else 0, 2 if self.work.guided else 1
        evaluations = SOLVERS[self.work.solver].count(self.work.steps)
        values = self.denoiser.kept_values(self.transformer_config, evaluations, prefix, branches)
        if (relay := self.components.relay) is not None:
            depth = getattr(self.transformer_config, self.components.rows[TRANSFORMER].depth)
            values = values * len(relay.blocks) // depth
        values += sum(
            self.components.control(name).kept_values(
                self.components.config(name), evaluations, self.target_tokens, branches
            )
            for name in self.work.controls
        )
        return values * self.itemsize

    def pass_flop(self) -> float:
        """Floating point operations of one pass through the transformer after the first."""
        return self.denoiser.pass_flop(self.transformer_config, self.target_tokens, self.prefix_tokens)

    @property
    def target_tokens(self) -> int:
        """Image tokens of the target."""
        return self.work.frames * self.components.latent_space.tokens(self.work.width, self.work.height)

    @property
    def reference_tokens(self) -> int:
        """Image tokens of the reference images."""
        return sum(self.components.latent_space.tokens(*size) for size in self.work.shown)

    @property
    def words(self) -> int:
        """Tokens of the prompt, as the transformer sees it; with its images' places, unless the images fill them."""
        return self.work.text_tokens if self.components.variant.interleaved else self.prompt_tokens

    @property
    def prefix_tokens(self) -> int:
        """All tokens but the target's."""
        return self.words + self.reference_tokens

    @property
    def repeated_tokens(self) -> int:
        """Tokens but the target's that run in every step: none where the denoiser keeps what they contribute."""
        return 0 if self.work.keeps_prefix and self.denoiser.keeps_prefix else self.prefix_tokens

    @property
    def largest_image(self) -> int:
        """Tokens of the largest image, the target included: these attend together."""
        return max(self.target_tokens, *(self.components.latent_space.tokens(*size) for size in self.work.shown), 0)

    def largest(self, name: str, part: str) -> int:
        """The largest tensor, as `moved`."""
        return max(self.moved(name, [spec]) for spec in self.specs(name, part))

    def moved(self, name: str, specs: Sequence[TensorSpec]) -> int:
        """Bytes of tensors as they are read, plus their cast or quantized copies where these are needed."""
        read, kept = self.read(name, specs), self.count(name, specs)
        return read if kept == read else read + kept

    # Tensors: from the headers of files on disk, else from the configs.

    def count(self, name: str, specs: Sequence[TensorSpec], dtype: mx.Dtype | None = None) -> int:
        """Bytes of tensors after loading."""
        dtype, scheme = dtype or self.components.dtype, self.scheme(name)
        if self.reads_headers(name):
            return self.components.weights(name).bytes_of(specs, dtype, scheme)
        schemes = [scheme if spec.is_packed_by(scheme) else self.declared_scheme(name, spec) for spec in specs]
        return sum(spec.loaded_bytes(dtype, form) for spec, form in zip(specs, schemes, strict=True))

    def read(self, name: str, specs: Sequence[TensorSpec]) -> int:
        """Bytes of tensors in their files."""
        if self.reads_headers(name):
            weights = self.components.weights(name)
            return sum(weights.stored(spec.name).nbytes for spec in specs)
        schemes = [self.declared_scheme(name, spec) for spec in specs]
        return sum(
            form.nbytes(spec.shape) if form else 2 * prod(spec.shape) for spec, form in zip(specs, schemes, strict=True)
        )

    def stored_dtype(self, name: str, tensor: str) -> str:
        """A tensor's dtype in its file, in safetensors' spelling; a missing file counts as quantized or bf16."""
        if self.reads_headers(name):
            return self.components.weights(name).stored(tensor).tensor.dtype
        return PACKED if self.declared_scheme(name, self.tensors(name)[tensor]) else "BF16"

    def declared_scheme(self, name: str, spec: TensorSpec) -> Scheme | None:
        """The scheme of a tensor that config.json declares, in mlx-lm's form."""
        declared = self.config_json(name).get("quantization")
        if not spec.quantized or not isinstance(declared, dict):
            return None
        own = declared.get(spec.name.removesuffix(".weight"), declared)
        if not isinstance(own, dict) or not {"bits", "group_size"} <= own.keys():
            return None
        return Scheme(own.get("mode", "affine"), own["bits"], own["group_size"])

    def specs(self, name: str, part: str) -> list[TensorSpec]:
        """A component's tensors, of one part of the weights map."""
        specs, relay = [spec for spec in self.tensors(name).values() if spec.part == part], self.components.relay
        if name == TRANSFORMER and relay is not None:
            return list(specs_of_layers(self.components.rows[name], specs, relay.blocks))
        return specs

    def network(self, name: str) -> list[TensorSpec]:
        """The tensors of one of the autoencoder's networks."""
        (part,) = (network.part for network in self.components.rows[VAE].networks if network.name == name)
        return self.specs(VAE, part)

    def _tensors(self, name: str) -> Mapping[str, TensorSpec]:
        """All of a component's tensors by name."""
        config = self.transformer_config if name == TRANSFORMER else self.components.config(name)
        return expected_tensors(self.components.rows[name], config)

    @cached_property
    def disk(self) -> int:
        """Bytes of the files of all components."""
        names = (TRANSFORMER, *self.work.controls, *self.components.encoders, VAE)
        if self.is_here:
            return sum(self.components.weights(name).nbytes for name in names)
        return sum(self.read(name, list(self.tensors(name).values())) for name in names)

    @cached_property
    def is_here(self) -> bool:
        """Whether weights are on disk, so that headers show how they are stored; a folder may hold configs only."""
        snapshot = self.components.snapshot
        return snapshot.is_local and any(
            name.endswith((".safetensors", ".gguf"))
            for folder in FOLDERS for name in snapshot.names(folder)
        )  # fmt: skip


def _width(config: TextEncoderConfig | VisionConfig) -> int:
    """Maximum numbers per token or patch inside a layer of GatedMLP and attention."""
    return 2 * config.intermediate_size + 6 * config.hidden_size


def work_of(request: Request, pipeline: QwenImagePipeline) -> Work:
    """The work of a request on a pipeline."""
    parameters, variant = request.parameters, pipeline.variant
    area = min(variant.reference_area, request.reference_pixels or variant.reference_area)
    shown = tuple(size_of_area(area, image.size) for image in request.shown) if variant.reference_area else ()
    begun = request.starts_from_canvas
    shown += ((parameters.width, parameters.height),) * sum(control.in_context for control in request.controls)
    controls = pipeline.open_controls(request.steering) if request.controls else ()
    encoded = [w * h for w, h in shown] + [parameters.width * parameters.height] * (begun or bool(controls))
    return Work(
        width=parameters.width,
        height=parameters.height,
        frames=parameters.num_layers + 1 if variant.layered and not parameters.single_layer else 1,
        shown=shown,
        encoded=max(encoded, default=0),
        captioned=(request.reference_pixels or 0) if request.writes_caption(variant) else 0,
        guided=request.guiding_prompt is not None,
        steps=parameters.num_inference_steps,
        images=len(request.seeds) * len(request.image_indices),
        controls=controls,
        solver=parameters.solver,
        step_cache=parameters.step_cache,
        keeps_prefix=not parameters.no_prefix_cache and not controls,
    )


def table_of(plans: Sequence[MemoryPlan], budget: int) -> str:
    """Plans as a table for people: GB resident / peak of every stage, and whether each fits a budget."""
    names = [stage.name for stage in plans[0].stages]
    head = ["GB resident/peak", *names, "most", "fits"]
    rows = [
        [plan.residency.name, *(f"{stage.resident / 1e9:.2f}/{stage.peak / 1e9:.2f}" for stage in plan.stages),
         f"{plan.peak / 1e9:.2f}",
         "yes" if plan.fits(budget) else "if saved quantized" if plan.peak <= budget else "no"]
        for plan in plans
    ]  # fmt: skip
    widths = [max(len(row[n]) for row in (head, *rows)) for n in range(len(head))]
    return "\n".join(
        f"{row[0]:{widths[0]}}  {'  '.join(map(str.rjust, row[1:], widths[1:]))}".rstrip() for row in (head, *rows)
    )
