"""The parts of one checkpoint: each is loaded when first needed, released when told, and comes back by itself."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx

from ..config import GenerationConfig, ImageProcessorConfig, SchedulerConfig
from ..errors import CheckpointError, RequestError
from ..gpu import Pace
from ..models import nn
from ..models.layers import SideBranch
from ..models.qwen2_5_vl.config import TextEncoderConfig, VisionConfig
from ..models.qwen2_5_vl.text import LanguageHead, TextEncoder
from ..models.qwen2_5_vl.vision import VisionTower
from ..models.qwen_image.config import TransformerConfig, VAEConfig
from ..models.qwen_image.transformer import Transformer
from ..models.qwen_image.vae import Decoder, Encoder
from ..names import StrPath
from ..text.tokenizer import QwenTokenizer
from ..variants import Variant, variant_of
from ..weights.adapters import Adapters, Branch, Placement
from ..weights.loader import ComponentWeights, load_module, put_beside
from ..weights.mapping import canonical_names, matrix_shapes, needs_tensor, shown_settings
from ..weights.schemes import Quantization
from ..weights.snapshot import HubSnapshot, WeightFiles, vision_beside
from ..weights.streaming import STREAMABLE, stream_module
from .sources import Sources

logger: logging.Logger = logging.getLogger(__name__)

T = TypeVar("T")
M = TypeVar("M", bound=nn.Module)
C = TypeVar("C", TransformerConfig, TextEncoderConfig, VisionConfig, ImageProcessorConfig, VAEConfig, SchedulerConfig)

TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json", "added_tokens.json")
# The parts of each component that are read (see the weights map).
PARTS: dict[str, tuple[str, ...]] = {
    "transformer": ("main", "modulation"),
    "text_encoder": ("main",),
    "vision": ("main",),
    "language_head": ("main",),
    "vae": ("encoder", "decoder"),
}
ADDITION = "time_text_embed.addition_t_embedding.weight"  # in layered models alone
_DEPTHS = {"transformer": "num_layers", "text_encoder": "num_hidden_layers", "vision": "depth"}
CLASS_NAMES = {
    "transformer": "QwenImageTransformer2DModel",
    "vae": "AutoencoderKLQwenImage",
    "scheduler": "FlowMatchEulerDiscreteScheduler",
}


class Components:
    """Lazily loaded parts of a checkpoint.

    Args:
        snapshot: where the files are.
        dtype: of the text encoder and the transformer; the VAE always computes in fp32, as Metal's fast convolutions
            are too coarse in bf16.
        loading: given a component's name, a context to load it in.
        zero_cond_t: overrides the transformer's flag; None obeys the checkpoint.
        quantization: what matrices are packed into while they are loaded; None leaves them as they are stored.
        read_loras: given the transformer's modules and their weights' shapes, the LoRAs for them; called once.
        replaced: files that stand in for the checkpoint's own, as in `Sources`.
        streamed: of `STREAMABLE`, those whose layers are read from their files at each pass instead of held.
        on_layer: told of each layer that a model runs: component, layer, layers; what it raises ends the work.

    Attributes:
        placement: what became of the LoRAs when the transformer was loaded last; None without any.
    """

    def __init__(
        self,
        snapshot: HubSnapshot,
        dtype: mx.Dtype,
        loading: Callable[[str], AbstractContextManager[object]] = nullcontext,
        *,
        zero_cond_t: bool | None = None,
        quantization: Quantization | None = None,
        read_loras: Callable[[Mapping[str, tuple[int, ...]]], Adapters] | None = None,
        replaced: Mapping[str, StrPath] | None = None,
        streamed: Collection[str] = (),
        on_layer: Callable[[str, int, int], None] = lambda name, layer, layers: None,
    ):
        self.snapshot = snapshot
        self.dtype = dtype
        self._loading, self._on_layer = loading, on_layer
        self._zero_cond_t = zero_cond_t
        self.quantization: Quantization = quantization or Quantization()
        self.streamed: frozenset[str] = frozenset(streamed)
        if odd := sorted(map(str, self.streamed - STREAMABLE)):
            raise RequestError(f"{', '.join(odd)} cannot be streamed; {', '.join(sorted(STREAMABLE))} can")
        self._read_loras = read_loras
        self.placement: Placement | None = None
        self._loaded: dict[str, Any] = {}
        self._weights: dict[str, ComponentWeights] = {}
        self.sources: Sources = Sources(snapshot, replaced)
        self.variant: Variant = variant_of(self.sources.index, snapshot.model)
        for name in self.quantization.components:
            if name not in ("transformer", *self.encoders):
                raise RequestError(f"{snapshot.model} has no {name} that could be quantized")

    @cached_property
    def declared_transformer_config(self) -> TransformerConfig:
        """transformer/config.json as it is; read without the weights."""
        return self._parsed(TransformerConfig, "transformer")

    @cached_property
    def transformer_config(self) -> TransformerConfig:
        """transformer/config.json, corrected by what the weights' names show."""
        config = self.declared_transformer_config
        names = self.sources.names("transformer")
        layered = ADDITION in canonical_names("transformer", names).values()
        if names and layered != config.use_additional_t_cond:
            kinds = {True: "a layered model", False: "a model that is not layered"}
            raise CheckpointError(
                f"the transformer's weights are those of {kinds[layered]}, but its config is that of "
                f"{kinds[not layered]}: give a transformer and a model of one kind"
            )
        shown = shown_settings("transformer", names)
        if self._zero_cond_t is not None:
            shown["zero_cond_t"] = self._zero_cond_t
        return replace(config, **shown)

    @cached_property
    def adapters(self) -> Adapters | None:
        """The LoRAs for the transformer."""
        return self._read_loras(self.lora_targets()) if self._read_loras else None

    def lora_targets(self) -> dict[str, tuple[int, ...]]:
        """The transformer's modules that have a weight, with its shape."""
        return matrix_shapes("transformer", self.transformer_config)

    def _check_adapters(self, adapters: Adapters | None) -> None:
        if adapters is not None:
            adapters.check({path for path, is_packed in self._resident_modules().items() if is_packed})

    def _resident_modules(self) -> dict[str, bool]:
        """The transformer's modules that stay in memory, and whether their weights are packed in the files."""
        weights = self.weights("transformer")
        names = [spec.name for spec in weights.specs("main") if spec.name.endswith(".weight")]
        return {name.removesuffix(".weight"): weights.is_packed(name) for name in names}

    def replace_adapters(self, adapters: Adapters | None) -> None:
        """Other LoRAs from now on; a loaded transformer is kept where all of them, old and new, run beside it."""
        self._check_adapters(adapters)
        transformer, branches = self._loaded.get("transformer"), None
        streams = "transformer" in self.streamed
        if transformer is not None and not streams and not (self.placement and self.placement.altered):
            branches = self._branches(adapters)
        self.adapters = adapters
        if branches is None or transformer is None:
            self.release("transformer")
            return
        there = {path for path, module in transformer.named_modules() if isinstance(module, SideBranch)}
        for path in there | branches.keys():
            put_beside(transformer, path, branches.get(path))
        if branches:
            logger.info("running beside %d matrices", len(branches))

    def _branches(self, adapters: Adapters | None) -> dict[str, Branch] | None:
        """What LoRAs put beside the resident weights; None if they are merged into some."""
        if adapters is None:
            return {}
        resident = self._resident_modules()
        paths = adapters.paths & resident.keys()
        beside = adapters.mode == "side" or (adapters.mode == "auto" and all(resident[path] for path in paths))
        if not beside or not all(map(adapters.can_run_beside, paths)):
            return None
        branches = {path: adapters.branch(path, self.dtype) for path in paths}
        return {path: branch for path, branch in branches.items() if branch is not None}

    @cached_property
    def text_encoder_config(self) -> TextEncoderConfig:
        """text_encoder/config.json."""
        return self._parsed(TextEncoderConfig, "text_encoder")

    @cached_property
    def vision_config(self) -> VisionConfig:
        """The vision tower's part of text_encoder/config.json."""
        return self._parsed(VisionConfig, "text_encoder")

    @cached_property
    def image_processor(self) -> ImageProcessorConfig:
        """How pictures are prepared for the vision tower."""
        return self._parsed(ImageProcessorConfig, "processor", "preprocessor_config.json")

    @cached_property
    def language_head_config(self) -> TextEncoderConfig:
        """That of the language model it belongs to."""
        return self.text_encoder_config

    @cached_property
    def generation_config(self) -> GenerationConfig:
        """text_encoder/generation_config.json: how the language model writes; its class's defaults without one."""
        name = "text_encoder/generation_config.json"
        return GenerationConfig.from_dict(self.snapshot.read_json(name) if self.snapshot.exists(name) else {})

    @cached_property
    def vae_config(self) -> VAEConfig:
        """vae/config.json; where it does not say how many channels a picture has, its tensors do."""
        data = self._config("vae")
        config = self._parsed(VAEConfig, "vae")
        if "input_channels" not in data and self.variant.layered:
            tensors = self._files("vae").tensors
            names = canonical_names("vae", tensors)
            last = next((t for name, t in tensors.items() if names[name] == "decoder.conv_out.bias"), None)
            config = config if last is None else replace(config, input_channels=last.shape[0])
        return config

    @cached_property
    def scheduler_config(self) -> SchedulerConfig:
        """scheduler/scheduler_config.json."""
        return self._parsed(SchedulerConfig, "scheduler", "scheduler_config.json")

    @property
    def tokenizer(self) -> QwenTokenizer:
        """The tokenizer."""
        return self._ensure("tokenizer", lambda: QwenTokenizer.from_files(self._tokenizer_files()))

    @property
    def text_encoder(self) -> TextEncoder:
        """The language model, resident."""
        config = self.text_encoder_config
        return self._ensure("text_encoder", lambda: self._load("text_encoder", "main", TextEncoder(config), self.dtype))

    @property
    def vision(self) -> VisionTower:
        """The vision tower, resident."""
        config = self.vision_config
        return self._ensure("vision", lambda: self._load("vision", "main", VisionTower(config), self.dtype))

    @property
    def language_head(self) -> LanguageHead:
        """What turns the language model's states into tokens, resident."""
        config = self.language_head_config
        return self._ensure(
            "language_head", lambda: self._load("language_head", "main", LanguageHead(config), self.dtype)
        )

    @property
    def transformer(self) -> Transformer:
        """The transformer without its modulation, resident."""
        config = self.transformer_config

        def load() -> Transformer:
            self._check_adapters(self.adapters)
            return self._load("transformer", "main", Transformer(config), self.dtype, self.adapters)

        return self._ensure("transformer", load)

    @property
    def vae_encoder(self) -> Encoder:
        """Pixels to latents, resident."""
        config = self.vae_config
        return self._ensure("vae_encoder", lambda: self._load("vae", "encoder", Encoder(config), mx.float32))

    @property
    def vae_decoder(self) -> Decoder:
        """Latents to pixels, resident."""
        config = self.vae_config
        return self._ensure("vae_decoder", lambda: self._load("vae", "decoder", Decoder(config), mx.float32))

    @contextmanager
    def passing(self, name: str) -> Iterator[Pace]:
        """One or many passes through a component, layer by layer; of streamed layers one runs and one is read.

        Yields:
            What its model takes as `on_layer`.

        Raises:
            CheckpointError: a file of streamed layers was changed or removed meanwhile, so that what came of them is
                worth nothing.
        """
        streams, layers = name in self.streamed, getattr(getattr(self, f"{name}_config"), _DEPTHS[name])
        yield Pace(lambda count: self._on_layer(name, (count - 1) % layers + 1, layers), 1 if streams else 2)
        if streams:
            self.weights(name).check_unchanged()

    @property
    def loaded(self) -> tuple[str, ...]:
        """Names of the components in memory."""
        return tuple(self._loaded)

    def is_loaded(self, name: str) -> bool:
        """Whether a component is in memory."""
        return name in self._loaded

    def release(self, *names: str) -> None:
        """Gives the memory of components back; those not loaded are passed over."""
        if [self._loaded.pop(name) for name in names if name in self._loaded]:
            mx.clear_cache()

    def stream(self, streamed: Collection[str]) -> None:
        """Says which components' layers are read from their files; those that are loaded otherwise are released."""
        self.release(*(self.streamed ^ frozenset(streamed)))
        self.streamed = frozenset(streamed)

    def release_all(self) -> None:
        """Gives the memory of all components back."""
        self.release(*self.loaded)

    @property
    def encoders(self) -> tuple[str, ...]:
        """What of the text encoder's folder this kind of checkpoint uses."""
        vision = ("vision",) if self.variant.encoder_area or self.variant.captions else ()
        return ("text_encoder", *vision, *(("language_head",) if self.variant.captions else ()))

    def prepare(self) -> None:
        """Fetches all that painting needs and checks it by its headers, so that no work is lost to a damaged file."""
        _ = self.scheduler_config, self.adapters
        self._tokenizer_files()
        shown = self.variant.encoder_area > 0
        if shown:
            _ = self.image_processor
        for component in ("transformer", "text_encoder", *(["vision"] if shown else []), "vae"):
            self.weights(component)
        self._check_adapters(self.adapters)

    def prepare_captions(self) -> None:
        """The same for what writing captions needs."""
        if not self._writes():
            raise CheckpointError(
                f"{self.snapshot.model} cannot write captions: it comes without what does it (lm_head.weight of its "
                "text encoder, and processor/); say what the image shows, or use another model such as "
                "Qwen/Qwen-Image-Layered"
            )
        _ = self.image_processor, self.generation_config
        self._tokenizer_files()
        for component in ("text_encoder", "vision", "language_head"):
            self.weights(component)

    def _writes(self) -> bool:
        """Whether the checkpoint has a captioner at all."""
        heads = canonical_names("language_head", self._files("language_head").tensors).values()
        prepares = not self.snapshot.is_local or bool(self.snapshot.names("processor"))
        return "lm_head.weight" in heads and prepares

    @property
    def fingerprint(self) -> str:
        """Tells apart what encodes: the commit, or a directory's files by name, size and time."""
        parts, files = ("text_encoder", "vae", "tokenizer", "processor"), []
        if self.snapshot.is_local:
            files = [self.snapshot.file(name) for part in parts for name in self.snapshot.names(part)]
        for place in (path for name, path in self.sources.replaced.items() if name in parts):
            files += place.glob("*") if place.is_dir() else [place, *filter(None, [vision_beside([place])])]
        commit = f"{self.snapshot.model}@{self.snapshot.revision}" if self.snapshot.revision else ""
        found = sorted({file.resolve() for file in files})
        return commit + repr([(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in found])

    def weights(self, component: str) -> ComponentWeights:
        """A component's tensors, fetched and checked once, not read."""
        if component not in self._weights:
            config = getattr(self, f"{component}_config")
            self._weights[component] = ComponentWeights(
                component, config, self._files(component).tensors, PARTS[component]
            )
        return self._weights[component]

    def _files(self, component: str) -> WeightFiles:
        return self.sources.weights(component, keep=lambda name: needs_tensor(component, name, PARTS[component]))

    def _ensure(self, name: str, load: Callable[[], T]) -> T:
        if name not in self._loaded:
            with self._loading(name):
                self._loaded[name] = load()
        loaded: T = self._loaded[name]
        return loaded

    def _load(self, component: str, part: str, module: M, dtype: mx.Dtype, adapters: Adapters | None = None) -> M:
        scheme, weights = getattr(self.quantization, component, None), self.weights(component)
        if component in self.streamed:
            return stream_module(module, weights, part, dtype, scheme, adapters)
        placement = Placement(adapters) if adapters else None
        if component == "transformer":
            self.placement = placement
        return load_module(module, weights, part, dtype, scheme, placement)

    def _tokenizer_files(self) -> dict[str, Path]:
        names = [name for name in TOKENIZER_FILES if self.snapshot.exists(f"tokenizer/{name}")]
        return {name: self.snapshot.file(f"tokenizer/{name}") for name in names}

    def _parsed(self, cls: type[C], component: str, name: str = "config.json") -> C:
        """A component's config; whatever is impossible in it is a CheckpointError."""
        try:
            return cls.from_dict(self._config(component, name))
        except (AttributeError, ArithmeticError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{component}/{name} holds impossible values ({error}); download it again") from error

    def _config(self, component: str, name: str = "config.json") -> dict[str, Any]:
        image_processor = component == "processor"  # which has two spellings
        config = self.sources.image_processor() if image_processor else self.sources.config(component, name)
        found, expected = config.get("_class_name"), CLASS_NAMES.get(component)
        if expected and found not in (None, expected):
            raise CheckpointError(f"{component}/{name} is that of a {found}, not of a {expected}")
        return config
