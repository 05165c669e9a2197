"""The components of one checkpoint: each is loaded when it is needed, and can be released at any time."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import mlx.core as mx

from ..config import GenerationConfig, ImageProcessorConfig, SchedulerConfig
from ..errors import CheckpointError, RequestError
from ..gpu import Pace
from ..models import nn
from ..models.layers import Relay, here
from ..names import StrPath
from ..registry import (
    CLASSES,
    LANGUAGE_HEAD,
    MAIN,
    PROCESSOR,
    SCHEDULER,
    STREAMABLE,
    TEXT_ENCODER,
    TOKENIZER,
    TRANSFORMER,
    VAE,
    VISION,
    Class,
    Component,
    Network,
    components_of,
    resolve,
)
from ..sampling.latents import LatentSpace
from ..text.tokenizer import QwenTokenizer
from ..variants import Variant, variant_of
from ..weights.loader import ComponentWeights, load_module
from ..weights.mapping import canonical_names, matrix_shapes, needs_tensor, settings_of_names, weights_map
from ..weights.recognize import holds
from ..weights.schemes import Quantization
from ..weights.snapshot import HubSnapshot, WeightFiles, sibling_vision_file
from .progress import Passes
from .sources import CONFIG, Sources

if TYPE_CHECKING:
    from ..lora.adapters import Adapters, Placement
    from ..weights.changes import Branch

logger: logging.Logger = logging.getLogger(__name__)

T = TypeVar("T")
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json", "added_tokens.json")


class Components:
    """The lazily loaded components of a checkpoint.

    Args:
        snapshot: where the files are.
        dtype: that of the text encoder and the transformer; the VAE always computes in fp32: Metal's fast convolutions
            are too coarse in bf16.
        loading: given a component's name, a context to load it in.
        zero_cond_t: overrides the transformer's flag; None obeys the checkpoint.
        quantization: the scheme matrices are quantized to while loading; None leaves them as they are stored.
        read_loras: given the transformer's modules and their weights' shapes, the LoRAs for them; called once.
        replaced: files that replace the checkpoint's own, keyed by folder.
        streamed: of `STREAMABLE`, those whose layers are read from their files at each pass and not kept.
        on_layer: called for each layer that a model runs: component, layer, layers; an exception from it ends the work.

    Attributes:
        variant: the variant of its pipeline class.
        rows: the registry's rows of its classes, by role.
        controls: the classes of the ControlNets that were opened, by role.
        references: the roles of the ControlNets that were opened, by reference.
        kept: results of a denoiser for later images with the same conditions; released with the transformer.
        passes: the passes of the last image.
        placement: which LoRAs were merged when the transformer was last loaded; None without LoRAs.
        relay: what connects the transformer's blocks here with those that run elsewhere; None if all run here.
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
        self.relay: Relay | None = None
        self._loaded: dict[str, Any] = {}
        self.kept: dict[str, Any] = {}
        self.passes: Passes = Passes()
        self._weights: dict[str, ComponentWeights] = {}
        self.sources: Sources = Sources(snapshot, replaced)
        self.variant: Variant = variant_of(self.sources.index, snapshot.model)
        self.rows: dict[str, Component] = components_of(self.variant.classes)
        self._networks = {net.name: (row, net) for row in self.rows.values() for net in row.networks}
        self._configs: dict[str, Any] = {}
        self.controls: dict[str, Class] = {}
        self.references: dict[str, str] = {}
        for name in self.quantization.components:
            if name not in (TRANSFORMER, *self.encoders):
                raise RequestError(f"{snapshot.model} has no {name} that could be quantized")

    # Configs -----------------------------------------------------------------------------------------------------

    def declared(self, role: str) -> Any:
        """A component's config.json, uncorrected; read without the weights."""
        row = self.rows[role]
        return self._parsed(row.config, row.home, expected=self.variant.classes[row.home])

    def config(self, role: str) -> Any:
        """A component's config, corrected by the names and shapes of its weights."""
        if role not in self._configs:
            row = self.rows[role]
            self._configs[role] = self._correct(row, self.declared(role))
        return self._configs[role]

    def _correct(self, row: Component, config: Any) -> Any:
        rules = weights_map(row.map)
        if "shows" in rules or "markers" in rules:
            names = self.sources.names(row)
            held = canonical_names(row, names).values()
            for tensor, marks in rules.get("shows", {}).items():
                if names and (tensor in held) != getattr(config, marks["field"]):
                    here, there = ("there", "absent") if tensor in held else ("absent", "there")
                    raise CheckpointError(
                        f"the {row.role}'s weights are those of {marks[here]}, but its config is that of "
                        f"{marks[there]}: give a {row.role} and a model of one kind"
                    )
            config = replace(config, **settings_of_names(row, names))
        if self.variant.layered:
            config = self._fill_sizes(row, config, rules.get("sized", {}))
        if row.role == TRANSFORMER and self._zero_cond_t is not None:
            if not hasattr(config, "zero_cond_t"):
                raise RequestError(f"{self.snapshot.model} has no zero_cond_t that could be set: leave it out")
            config = replace(config, zero_cond_t=self._zero_cond_t)
        return config

    def _fill_sizes(self, row: Component, config: Any, sized: Mapping[str, str]) -> Any:
        """A config whose missing sizes are filled in from the tensors' shapes."""
        marks = self.sources.config(row.home, CONFIG)
        for tensor, name in sized.items():
            if name not in marks:
                tensors = self._files(row).tensors
                names = canonical_names(row, tensors)
                found = next((t for stored, t in tensors.items() if names[stored] == tensor), None)
                config = config if found is None else replace(config, **{name: found.shape[0]})
        return config

    def use_of(self, folder: str) -> Any:
        """The code that works with the class of a folder: `registry.Class.use`."""
        return resolve(CLASSES[self.variant.classes[folder]].use)

    def add_control(self, role: str, entry: Class, config: Any, place: Path) -> None:
        """Adds a ControlNet as a component; a fault leaves nothing of it.

        Args:
            role: its name from now on.
            entry: its class.
            config: its config.
            place: its file or folder.

        Raises:
            CheckpointError: the weights do not fit the config.
        """
        (row,) = entry.components
        row = replace(row, role=role, networks=tuple(net._replace(name=role) for net in row.networks))
        self.sources.add(role, place)
        self._weights[role] = ComponentWeights(row, config, self._files(row).tensors, row.parts)
        self.rows[role], self._configs[role], self.controls[role] = row, config, entry
        self._networks |= {net.name: (row, net) for net in row.networks}

    def control(self, role: str) -> Any:
        """The code that works with a ControlNet: `registry.Class.use`."""
        return resolve(self.controls[role].use)

    def streams(self, role: str) -> bool:
        """Whether a component's layers are read at each pass."""
        return (self.rows[role].like or role) in self.streamed

    def pace(self, role: str) -> Pace:
        """The `on_layer` argument of a network that runs inside another one's pass."""
        return Pace(unfinished=1 if self.streams(role) else 2)

    def depth(self, role: str) -> int:
        """How many layers a component has, be they all here or not."""
        depth: int = getattr(self.config(role), self.rows[role].depth)
        return depth

    @cached_property
    def latent_space(self) -> LatentSpace:
        """The space of its latents, from the configs alone."""
        vae, transformer = self.config(VAE), self.declared(TRANSFORMER)
        return LatentSpace(
            vae.z_dim, vae.spatial_factor, transformer.patch_size, self.variant.size_multiple, vae.input_channels
        )

    @cached_property
    def image_processor(self) -> ImageProcessorConfig:
        """How images are prepared for the vision tower."""
        config: ImageProcessorConfig = self._parsed(ImageProcessorConfig, PROCESSOR, "preprocessor_config.json")
        return config

    @cached_property
    def generation_config(self) -> GenerationConfig:
        """The language model's sampling, from generation_config.json; its class's defaults if there is none."""
        name = f"{TEXT_ENCODER}/generation_config.json"
        return GenerationConfig.from_dict(self.snapshot.read_json(name) if self.snapshot.exists(name) else {})

    @cached_property
    def scheduler_config(self) -> SchedulerConfig:
        """scheduler/scheduler_config.json."""
        expected = self.variant.classes[SCHEDULER]
        config: SchedulerConfig = self._parsed(SchedulerConfig, SCHEDULER, "scheduler_config.json", expected)
        return config

    # LoRAs ----------------------------------------------------------------------------------------------------------

    @cached_property
    def adapters(self) -> Adapters | None:
        """The LoRAs for the transformer."""
        return self._read_loras(self.lora_targets()) if self._read_loras else None

    def lora_targets(self) -> dict[str, tuple[int, ...]]:
        """The transformer's modules that have a weight, with its shape."""
        return matrix_shapes(self.rows[TRANSFORMER], self.config(TRANSFORMER))

    def _check_adapters(self, adapters: Adapters | None) -> None:
        if adapters is not None:
            adapters.check({path for path, is_packed in self._resident_modules().items() if is_packed})

    def _resident_modules(self) -> dict[str, bool]:
        """The transformer's modules that stay in memory, and whether their weights are quantized in the files."""
        weights = self.weights(TRANSFORMER)
        names = [spec.name for spec in weights.specs(MAIN) if spec.name.endswith(".weight")]
        return {name.removesuffix(".weight"): weights.is_packed(name) for name in names}

    def replace_adapters(self, adapters: Adapters | None) -> None:
        """Replaces the LoRAs; a loaded transformer is kept if all of them, old and new, are unmerged."""
        self._check_adapters(adapters)
        self.kept.clear()
        transformer, branches = self._loaded.get(TRANSFORMER), None
        streams = TRANSFORMER in self.streamed
        if transformer is not None and not streams and not (self.placement and self.placement.altered):
            branches = self._branches(adapters)
        self.adapters = adapters
        if branches is None or transformer is None:
            self.release(TRANSFORMER)
            return
        from ..lora.branch import SideBranch, attach_branch  # here: most runs have no LoRA

        there = {path for path, module in transformer.named_modules() if isinstance(module, SideBranch)}
        for path in there | branches.keys():
            attach_branch(transformer, path, branches.get(path))
        if branches:
            logger.info("unmerged at %d matrices", len(branches))

    def _branches(self, adapters: Adapters | None) -> dict[str, Branch] | None:
        """The branches of unmerged LoRAs by module; None if some LoRA is merged."""
        if adapters is None:
            return {}
        resident = self._resident_modules()
        paths = adapters.paths & resident.keys()
        unmerged = adapters.mode == "side" or (adapters.mode == "auto" and all(resident[path] for path in paths))
        if not unmerged or not all(map(adapters.can_run_unmerged, paths)):
            return None
        branches = {path: adapters.branch(path, self.dtype) for path in paths}
        return {path: branch for path, branch in branches.items() if branch is not None}

    # Networks --------------------------------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> QwenTokenizer:
        """The tokenizer."""
        return self._ensure(TOKENIZER, lambda: QwenTokenizer.from_files(self._tokenizer_files()))

    def network(self, name: str) -> Any:
        """A network by its name in the registry; loads it if necessary."""
        row, network = self._networks[name]
        return self._ensure(name, lambda: self._load(row, network))

    def load(self, *names: str) -> None:
        """Loads networks, or the tokenizer, in this order, unless they are loaded."""
        for name in names:
            _ = self.tokenizer if name == TOKENIZER else self.network(name)

    @contextmanager
    def passing(self, name: str) -> Iterator[Pace]:
        """A context for passes through a component, layer by layer; streaming reads one layer while another runs.

        Yields:
            The `on_layer` argument of its model.

        Raises:
            CheckpointError: a file of streamed layers was changed or removed meanwhile, so that the results are
                worthless.
        """
        streams, layers = name in self.streamed, len(here(range(self.depth(name)), self._relay_of(name)))
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
        """Frees the memory of components; those not loaded are skipped."""
        if TRANSFORMER in names:
            self.kept.clear()
            names = (*names, *self.controls)
        if [self._loaded.pop(name) for name in names if name in self._loaded]:
            mx.clear_cache()

    def stream(self, streamed: Collection[str]) -> None:
        """Sets which components are streamed; those that were loaded in a different way are released."""
        self.release(*(self.streamed ^ frozenset(streamed)))
        self.streamed = frozenset(streamed)

    def connect(self, relay: Relay | None) -> None:
        """Sets which of the transformer's blocks run here; if it was loaded with others, it is released."""
        if (relay and relay.blocks) != (self.relay and self.relay.blocks):
            self.release(TRANSFORMER)
        elif self.is_loaded(TRANSFORMER):
            self.network(TRANSFORMER).relay = relay
        self.relay = relay

    @contextmanager
    def unconnected(self) -> Iterator[None]:
        """Inside the block, configs and plans are those of a transformer whose blocks all run here; loads nothing."""
        relay, self.relay = self.relay, None
        try:
            yield
        finally:
            self.relay = relay

    def release_all(self) -> None:
        """Frees the memory of all components."""
        self.release(TRANSFORMER, *self.loaded)

    @property
    def encoders(self) -> tuple[str, ...]:
        """The networks of the text encoder's folder that this kind of checkpoint uses."""
        vision = (VISION,) if self.variant.encoder_area or self.variant.captions else ()
        return (TEXT_ENCODER, *vision, *((LANGUAGE_HEAD,) if self.variant.captions else ()))

    def prepare(self) -> None:
        """Fetches all files that generation needs and checks their headers, so no work is lost to a damaged file."""
        _ = self.scheduler_config, self.adapters
        self._tokenizer_files()
        shown = self.variant.encoder_area > 0
        if shown:
            _ = self.image_processor
        for component in (TRANSFORMER, TEXT_ENCODER, *([VISION] if shown else []), VAE):
            self.weights(component)
        self._check_adapters(self.adapters)

    def prepare_captions(self) -> None:
        """Fetches all files that captions need and checks their headers; raises CheckpointError without a captioner."""
        if not self._writes():
            raise CheckpointError(
                f"{self.snapshot.model} cannot write captions: it lacks the files for them (lm_head.weight of its "
                "text encoder, and processor/); describe the image in the prompt, or use a different model such as "
                "Qwen/Qwen-Image-Layered"
            )
        _ = self.image_processor, self.generation_config
        self._tokenizer_files()
        for component in (TEXT_ENCODER, VISION, LANGUAGE_HEAD):
            self.weights(component)

    def _writes(self) -> bool:
        """Whether the checkpoint has a captioner."""
        row = self.rows[LANGUAGE_HEAD]
        prepares = not self.snapshot.is_local or bool(self.snapshot.names(PROCESSOR))
        return holds(row, self._files(row).tensors) and prepares

    @property
    def fingerprint(self) -> str:
        """Identifies the files an encoding depends on: the commit, or a directory's files by name, size and time."""
        parts, files = (TEXT_ENCODER, VAE, TOKENIZER, PROCESSOR), []
        if self.snapshot.is_local:
            files = [self.snapshot.file(name) for part in parts for name in self.snapshot.names(part)]
        for place in (path for name, path in self.sources.replaced.items() if name in parts):
            files += place.glob("*") if place.is_dir() else [place, *filter(None, [sibling_vision_file([place])])]
        commit = f"{self.snapshot.model}@{self.snapshot.revision}" if self.snapshot.revision else ""
        found = sorted({file.resolve() for file in files})
        return commit + repr([(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in found])

    def weights(self, role: str) -> ComponentWeights:
        """A component's tensors, fetched and checked once, not yet read; of the transformer's blocks those here."""
        if role not in self._weights:
            row = self.rows[role]
            self._weights[role] = ComponentWeights(row, self.config(role), self._files(row).tensors, row.parts)
        weights = self._weights[role]
        relay = self._relay_of(role)
        return weights if relay is None else weights.of_layers(relay.blocks)

    def _relay_of(self, role: str) -> Relay | None:
        """What connects a component's layers here with others; None where all are here."""
        return self.relay if role == TRANSFORMER else None

    def _files(self, row: Component) -> WeightFiles:
        return self.sources.weights(row, keep=lambda name: needs_tensor(row, name, row.parts))

    def _ensure(self, name: str, load: Callable[[], T]) -> T:
        if name not in self._loaded:
            with self._loading(name):
                self._loaded[name] = load()
        loaded: T = self._loaded[name]
        return loaded

    def _load(self, row: Component, network: Network) -> Any:
        adapters = None
        module, dtype = network.build(self.config(row.role)), mx.float32 if row.full_precision else self.dtype
        if row.role == TRANSFORMER:
            self._check_adapters(self.adapters)
            adapters = self.adapters
        scheme, weights = getattr(self.quantization, row.like or row.role, None), self.weights(row.role)
        if (relay := self._relay_of(row.role)) is not None:
            layers = getattr(module, row.layers)
            layers[:] = [layer if n in relay.blocks else nn.Identity() for n, layer in enumerate(layers)]
            module.relay = relay
        if self.streams(row.role):
            from ..weights.streaming import stream_module  # here: most runs stream nothing

            return stream_module(module, weights, network.part, dtype, scheme, adapters)
        placement = adapters.placement() if adapters else None
        if row.role == TRANSFORMER:
            self.placement = placement
        return load_module(module, weights, network.part, dtype, scheme, placement)

    def _tokenizer_files(self) -> dict[str, Path]:
        folder = TOKENIZER if TOKENIZER in self.variant.classes else PROCESSOR
        names = [name for name in TOKENIZER_FILES if self.snapshot.exists(f"{folder}/{name}")]
        return {name: self.snapshot.file(f"{folder}/{name}") for name in names}

    def _parsed(self, cls: Any, folder: str, name: str = CONFIG, expected: str | None = None) -> Any:
        """A component's config; raises CheckpointError for impossible values.

        Args:
            cls: its dataclass.
            folder, name: the file's place.
            expected: the class that the file must name, if it names one.
        """
        reads_processor = folder == PROCESSOR  # which has two spellings
        data = self.sources.image_processor() if reads_processor else self.sources.config(folder, name)
        if expected is not None and data.get("_class_name") not in (None, expected):
            raise CheckpointError(f"{folder}/{name} is that of a {data['_class_name']}, not of a {expected}")
        try:
            return cls.from_dict(data)
        except (AttributeError, ArithmeticError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{folder}/{name} holds impossible values ({error}); download it again") from error
