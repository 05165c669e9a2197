"""What a class of a checkpoint leads to: its config, its networks, its weights map, what is streamed, what stays.

`_class_name` of a config.json, or the class that `variants.py` names for a pipeline, finds a row here, and everything
else reads the row. Networks and configs are named, not imported: this file is importable without MLX.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from typing import Any, NamedTuple

# What a component is for: the name of its folder, and of what else lies in the text encoder's.
TRANSFORMER = "transformer"
TEXT_ENCODER = "text_encoder"
VISION = "vision"
LANGUAGE_HEAD = "language_head"
VAE = "vae"
CONTROL = "controlnet"
IN_CONTEXT = "in-context"  # a control without a network: a LoRA reads its image as a reference
# Networks that are loaded by themselves, where a component has several; else they are called as the component is.
VAE_ENCODER = "vae_encoder"
VAE_DECODER = "vae_decoder"
# What is not a network.
TOKENIZER = "tokenizer"
SCHEDULER = "scheduler"
PROCESSOR = "processor"

FOLDERS = (TRANSFORMER, TEXT_ENCODER, VAE)  # those with weights; a file may stand in for each
LABELS = {TRANSFORMER: "a transformer", TEXT_ENCODER: "a text encoder", VAE: "an autoencoder"}
ENCODING = (TEXT_ENCODER, VISION, LANGUAGE_HEAD)  # released together; a model may lack some
MAIN = "main"


class Network(NamedTuple):
    """A network of a component.

    Attributes:
        name: its name for callers.
        part: of the weights map, its tensors.
        place: its class, as "module:name" below `models/`.
    """

    name: str
    part: str
    place: str

    def build(self, config: Any) -> Any:
        """The network of a config, its parameters zeros."""
        return resolve(f"models.{self.place}")(config)


@dataclass(frozen=True, kw_only=True, eq=False)
class Component:
    """What of a class is loaded, checked and counted as one.

    Attributes:
        role: what it is for, such as `TRANSFORMER`; how messages and options call it.
        map: its file in `weights_map/`, without the ending.
        settings: the dataclass that reads its config.json, as "module:name" below `models/`.
        networks: what its weights are loaded into.
        folder: where its files lie, if it is not its role.
        label: how sentences call it, where it shares its folder.
        transient: parts of the weights map that are read and never become resident.
        layers: the path of its network's list of layers, which can be read again at each pass; "" if it has none.
        depth: the config's field that says how many there are.
        rows: the embedding of which, streamed, only the rows that are used are read; "" if it has none.
        full_precision: computes in fp32, whatever the dtype of the others, and is never quantized.
        like: the role whose quantization and streaming it shares, and with which it is released; "" has its own.
        released_settings: what the released models have set, where it is not the dataclass's default.
    """

    role: str
    map: str
    settings: str
    networks: tuple[Network, ...]
    folder: str = ""
    label: str = ""
    transient: tuple[str, ...] = ()
    layers: str = ""
    depth: str = ""
    rows: str = ""
    full_precision: bool = False
    like: str = ""
    released_settings: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def config(self) -> Any:
        """The dataclass that reads its config.json."""
        return resolve(f"models.{self.settings}")

    @cached_property
    def released(self) -> Any:
        """The config of the released models."""
        return self.config(**self.released_settings)

    @property
    def home(self) -> str:
        """The folder of its files."""
        return self.folder or self.role

    @property
    def resident(self) -> tuple[str, ...]:
        """The parts of its weights that become resident."""
        return tuple(network.part for network in self.networks)

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts of its weights that are read."""
        return (*self.resident, *self.transient)


@dataclass(frozen=True, kw_only=True, eq=False)
class Class:
    """A class of a checkpoint's model_index.json.

    Attributes:
        library: where it is from.
        components: what is in its folder.
        use: what works with it, as "module:name" of this package: of a transformer a `Denoiser`, of a text encoder a
            `ConditionEncoder`, of a ControlNet a `ControlBranch` (`pipeline/seams.py`).
        title: how sentences call it; "" for what nobody gives by itself.
        steers: the class of transformer that a ControlNet is made for.
        in_context: what a prompt begins with for a LoRA that reads a control image as a reference; "" without one.
        training: of a transformer that can be trained, its `Trainable` (`training/seam.py`), alike.
    """

    library: str = "diffusers"
    components: tuple[Component, ...] = ()
    use: str = ""
    title: str = ""
    steers: str = ""
    in_context: str = ""
    training: str = ""


CLASSES: dict[str, Class] = {
    "QwenImageTransformer2DModel": Class(
        components=(
            Component(
                role=TRANSFORMER,
                map="QwenImageTransformer2DModel",
                settings="qwen_image.config:TransformerConfig",
                networks=(Network(TRANSFORMER, MAIN, "qwen_image.transformer:Transformer"),),
                transient=("modulation",),
                layers="transformer_blocks",
                depth="num_layers",
            ),
        ),
        use="pipeline.qwen_image.denoiser:QwenImageDenoiser",
        in_context="Context_Control. ",
        training="training.qwen_image.seam:QwenImageTraining",
    ),
    "Qwen2_5_VLForConditionalGeneration": Class(
        library="transformers",
        components=(
            Component(
                role=TEXT_ENCODER,
                map="Qwen2_5_VLForConditionalGeneration",
                settings="qwen2_5_vl.config:TextEncoderConfig",
                networks=(Network(TEXT_ENCODER, MAIN, "qwen2_5_vl.text:TextEncoder"),),
                label="the language model",
                layers="model.layers",
                depth="num_hidden_layers",
                rows="model.embed_tokens.weight",
                released_settings={"rms_norm_eps": 1e-6},
            ),
            Component(
                role=VISION,
                map="Qwen2_5_VLForConditionalGeneration.vision",
                settings="qwen2_5_vl.config:VisionConfig",
                networks=(Network(VISION, MAIN, "qwen2_5_vl.vision:VisionTower"),),
                folder=TEXT_ENCODER,
                label="a vision tower",
                layers="visual.blocks",
                depth="depth",
            ),
            Component(
                role=LANGUAGE_HEAD,
                map="Qwen2_5_VLForConditionalGeneration.language_head",
                settings="qwen2_5_vl.config:TextEncoderConfig",
                networks=(Network(LANGUAGE_HEAD, MAIN, "qwen2_5_vl.text:LanguageHead"),),
                folder=TEXT_ENCODER,
                label="a language head",
                released_settings={"rms_norm_eps": 1e-6},
            ),
        ),
        use="pipeline.qwen_image.encoder:QwenImageEncoder",
    ),
    "AutoencoderKLQwenImage": Class(
        components=(
            Component(
                role=VAE,
                map="AutoencoderKLQwenImage",
                settings="qwen_image.config:VAEConfig",
                networks=(
                    Network(VAE_ENCODER, "encoder", "qwen_image.vae:Encoder"),
                    Network(VAE_DECODER, "decoder", "qwen_image.vae:Decoder"),
                ),
                full_precision=True,
            ),
        ),
    ),
    "QwenImage21Transformer2DModel": Class(
        components=(
            Component(
                role=TRANSFORMER,
                map="QwenImage21Transformer2DModel",
                settings="qwen_image_21.config:TransformerConfig",
                networks=(Network(TRANSFORMER, MAIN, "qwen_image_21.transformer:Transformer"),),
                transient=("modulation",),
                layers="transformer_blocks",
                depth="num_layers",
            ),
        ),
        use="pipeline.qwen_image_21.denoiser:QwenImage21Denoiser",
        training="training.qwen_image_21.seam:QwenImage21Training",
    ),
    "Qwen3VLForConditionalGeneration": Class(
        library="transformers",
        components=(
            Component(
                role=TEXT_ENCODER,
                map="Qwen3VLForConditionalGeneration",
                settings="qwen3_vl.config:TextEncoderConfig",
                networks=(Network(TEXT_ENCODER, MAIN, "qwen3_vl.text:TextEncoder"),),
                label="the language model",
                layers="model.language_model.layers",
                depth="num_hidden_layers",
                rows="model.language_model.embed_tokens.weight",
            ),
            Component(
                role=VISION,
                map="Qwen3VLForConditionalGeneration.vision",
                settings="qwen3_vl.config:VisionConfig",
                networks=(Network(VISION, MAIN, "qwen3_vl.vision:VisionTower"),),
                folder=TEXT_ENCODER,
                label="a vision tower",
                layers="model.visual.blocks",
                depth="depth",
            ),
            Component(
                role=LANGUAGE_HEAD,
                map="Qwen3VLForConditionalGeneration.language_head",
                settings="qwen3_vl.config:TextEncoderConfig",
                networks=(Network(LANGUAGE_HEAD, MAIN, "qwen3_vl.text:LanguageHead"),),
                folder=TEXT_ENCODER,
                label="a language head",
            ),
        ),
        use="pipeline.qwen_image_21.encoder:QwenImage21Encoder",
    ),
    "AutoencoderKLQwenImage21": Class(
        components=(
            Component(
                role=VAE,
                map="AutoencoderKLQwenImage21",
                settings="qwen_image_21.config:VAEConfig",
                networks=(
                    Network(VAE_ENCODER, "encoder", "qwen_image_21.vae:Encoder"),
                    Network(VAE_DECODER, "decoder", "qwen_image_21.vae:Decoder"),
                ),
                full_precision=True,
            ),
        ),
    ),
    "FlowMatchEulerDiscreteScheduler": Class(),
    "Qwen2Tokenizer": Class(library="transformers"),
    "Qwen3VLProcessor": Class(library="transformers"),
}


def _control(name: str, place: str, layers: str, use: str, title: str, steers: str, *transient: str) -> Class:
    """The row of a class of ControlNet: one component, with a list of layers and a weights map of that name."""
    family, network = place.split(":")
    component = Component(
        role=CONTROL,
        map=name,
        settings=f"{family}:ControlConfig",
        networks=(Network(CONTROL, MAIN, f"{family}:{network}"),),
        transient=transient,
        layers=layers,
        depth="num_layers",
        like=TRANSFORMER,
    )
    return Class(components=(component,), use=use, title=title, steers=steers)


# What steers a transformer: given by itself, by file or folder, and told by its tensors.
CONTROLS: dict[str, Class] = {
    name: _control(name, *row)
    for name, *row in (
        ("QwenImageControlNetModel", "qwen_image.control:ControlNet", "transformer_blocks",
         "pipeline.qwen_image.control:ResidualBranch", "InstantX's kind for Qwen-Image",
         "QwenImageTransformer2DModel", "modulation"),
        ("QwenImageFunControlNet", "qwen_image.control:FunControlNet", "control_blocks",
         "pipeline.qwen_image.control:FunBranch", "the Fun kind for Qwen-Image",
         "QwenImageTransformer2DModel", "modulation"),
        ("QwenImageBlockWiseControlNet", "qwen_image.control:BlockwiseControlNet", "controlnet_blocks",
         "pipeline.qwen_image.control:BlockwiseBranch", "DiffSynth's block-wise kind for Qwen-Image",
         "QwenImageTransformer2DModel"),
        ("QwenImage21FunControlNet", "qwen_image_21.control:FunControlNet", "control_blocks",
         "pipeline.qwen_image_21.control:FunBranch", "the Fun kind for Qwen-Image-2.1",
         "QwenImage21Transformer2DModel"),
    )
}  # fmt: skip

STREAMABLE = frozenset(row.role for entry in CLASSES.values() for row in entry.components if row.layers)


def components_of(classes: Mapping[str, str]) -> dict[str, Component]:
    """The components of a pipeline by role, from its classes by folder."""
    return {row.role: row for folder in FOLDERS for row in CLASSES[classes[folder]].components}


def component_of(map_name: str) -> Component:
    """The component whose weights map has that name."""
    return next(row for row in all_components() if row.map == map_name)


def component_for(role: str, config: object) -> Component:
    """The component of a role that a config is one of."""
    return next(row for row in all_components(role) if type(config) is row.config)


def all_components(*roles: str) -> Iterator[Component]:
    """The components of all classes; with roles those alone."""
    for entry in CLASSES.values():
        yield from (row for row in entry.components if not roles or row.role in roles)


def resolve(place: str) -> Any:
    """What stands at "module:name" below this package."""
    module, name = place.split(":")
    return getattr(import_module(f"{__package__}.{module}"), name)
