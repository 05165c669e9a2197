"""The one table of options for generating images. Importable without MLX.

The command line, config.toml, the server's bodies, files of prompts, records in PNGs and the page's form are made from
it. An option of sampling is a field of `GenerationParameters`, one of the model a field of `OpenOptions`; the rest
is here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import RequestError
from ..names import Dtype, LoRAMode, Parallel
from ..options import (
    Choice,
    Config,
    Group,
    ImageFile,
    Integer,
    Option,
    Parsed,
    Several,
    Switch,
    Text,
    by_name,
    option,
    options_of,
)
from ..pipeline.control import Control
from ..pipeline.parameters import (
    CANVAS,
    DTYPES,
    GENERATION,
    IMAGE_COMMANDS,
    IMAGE_INDEX,
    NUM_IMAGES,
    REFERENCE_PIXELS,
    SEED,
    SIDE,
    TASKS,
    WORDS,
    GenerationParameters,
)
from ..pipeline.presets import PRESETS
from ..variants import (
    ASPECT_SIZES,
    CAPTION_TEMPLATES,
    DEFAULT_EDIT_MODEL,
    DEFAULT_LAYERED_MODEL,
    DEFAULT_MODEL,
    LAYERED_RESOLUTIONS,
    LORA_MODES,
    full_name,
)
from ..weights.schemes import NONE, SCHEMES, Quantization
from .residency import read_memory

_READS = (*IMAGE_COMMANDS, "caption", "train")  # commands that open a model
SHARED = ("generate", "edit", "decompose")  # commands whose work several ranks share
PARALLEL: tuple[Parallel, ...] = ("auto", "guidance", "images", "layers", "none")  # how
LAYER_SIZES = ("source", "bucket")


def _name(text: str) -> None:
    if not text.strip():
        raise RequestError("a name is empty")


def _model(key: str, usual: str, help: str, *commands: str) -> Config:
    return Config(key=key, commands=commands, help=help, usual=usual, example=usual)


_QUANTIZATION = Parsed(
    f"one of {', '.join(SCHEMES)}, {NONE}, or in quotes as transformer=4,text_encoder=8", Quantization.parse, (str, int)
)
_CONTROLS = Several(Group(Control), f"a list of tables, each with {', '.join(row.name for row in options_of(Control))}")
_FILE = {"kind": Text(), "group": "model", "flags": (), "metavar": "FILE", "record": "always", "place": True,
         "of_model": True}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class OpenOptions:
    """How a model is opened; each field carries its `Option`.

    Attributes:
        model: a directory or a Hugging Face id.
        revision: branch, tag or commit on the hub.
        dtype: dtype of the text encoder and the transformer.
        quantize: a string for `Quantization.parse`; None leaves weights as they are stored.
        group_size: columns that share a scale; None is the default of the mode.
        loras: references with their strengths.
        lora_mode: one of `LORA_MODES`.
        lightning: steps of the model's official distilled LoRA, which is added.
        text_encoder, transformer, vae: files that stand in for the model's own.
        zero_cond_t: "on" or "off", which overrides the checkpoint's flag.
    """

    model: str = option(
        kind=Parsed("a directory or a Hugging Face id, in quotes", _name), group="model", record="always", place=True,
        help="a local directory or a Hugging Face id", commands=(*_READS, "plan"), flags=("--model", "-m"),
        config=(
            _model("model_path", DEFAULT_MODEL, "model to generate with: a directory or a Hugging Face id",
                   "generate", "plan", "train --task t2i"),
            _model("edit_model_path", DEFAULT_EDIT_MODEL, "model to edit with: a directory or a Hugging Face id",
                   "edit", "train --task edit"),
            _model("layered_model_path", DEFAULT_LAYERED_MODEL, "layered model: a directory or a Hugging Face id",
                   "decompose", "caption", "train --task layered"),
        ), usual=DEFAULT_MODEL,
        but={"edit": {"usual": DEFAULT_EDIT_MODEL}, "compose": {"usual": DEFAULT_EDIT_MODEL},
             "decompose": {"usual": DEFAULT_LAYERED_MODEL}, "caption": {"usual": DEFAULT_LAYERED_MODEL},
             "plan": {"flags": (), "nargs": "?", "metavar": "MODEL"}},
    )  # fmt: skip
    revision: str | None = option(
        None, kind=Text(), help="branch, tag or commit of a Hugging Face model", group="model", record="always",
        commands=(*_READS, "plan"), flags=("--revision",), of_model=True,
    )  # fmt: skip
    dtype: Dtype = option(
        DTYPES[0], kind=Choice(DTYPES), help="dtype of the text encoder and the transformer", usual=DTYPES[0],
        group="model",
        commands=(*_READS, "plan"), flags=("--dtype",), record="always",
    )  # fmt: skip
    quantize: str | None = option(
        None, kind=_QUANTIZATION, group="model", commands=(*_READS, "plan", "serve"), flags=("--quantize", "-q"),
        help="quantize weights while loading: 3, 4, 5, 6, 8, mxfp4, mxfp8 or nvfp4 (the transformer's; the text "
        "encoder's take 8), or transformer=4,text_encoder=8,vision=8", metavar="Q", record="always",
        config=(Config(commands=(*TASKS, "caption", "plan"), help="quantize weights while loading",
                       usual="as they are stored", example=4),),
        but={"plan": {"help": "quantize weights while loading, as in generate"},
             "serve": {"help": "quantize weights while loading, as in generate"}},
    )  # fmt: skip
    group_size: int | None = option(
        None, kind=Integer(1), group="model", commands=(*_READS, "plan"), flags=("--group-size",), metavar="G",
        help="columns that share a scale: 32, 64 or 128 (default: 64); the microscaling formats have their own",
    )  # fmt: skip
    text_encoder: str | None = option(
        None, **_FILE | {"flags": ("--text-encoder",)}, commands=_READS, help="a .safetensors file (or a folder) to "
        "use instead of the model's own text encoder and vision tower, in the form of other programs",
    )  # fmt: skip
    loras: tuple[str, ...] = option(
        (), kind=Several(Parsed("a reference", _name), 'a list of strings such as ["style.safetensors@0.8"]'),
        group="model", commands=IMAGE_COMMANDS, flags=("--lora",), nargs="append", metavar="REF[@S]", record="always",
        place=True, help="a LoRA and its strength: a file, a folder, owner/repo, owner/repo:file or a file's address "
        "on the hub; repeat for more",
        config=(Config(commands=TASKS, help="LoRAs of the models named here, with their strengths; another --model "
                       "goes without", usual="none", example=["fox-style.safetensors@0.8"], of_model=True),),
    )  # fmt: skip
    lora_mode: LoRAMode = option(
        LORA_MODES[0], kind=Choice(LORA_MODES), group="model", commands=IMAGE_COMMANDS, flags=("--lora-mode",),
        help="merge LoRAs into the weights, or run them unmerged", record="given",
        usual="auto, which merges unless the weights are quantized or too coarse",
    )  # fmt: skip
    transformer: str | None = option(
        None, **_FILE | {"flags": ("--transformer",)}, commands=IMAGE_COMMANDS,
        help="a .safetensors or .gguf file (or a folder) to use instead of the model's own",
    )  # fmt: skip
    vae: str | None = option(
        None, **_FILE | {"flags": ("--vae",)}, commands=IMAGE_COMMANDS, help="the same for the autoencoder"
    )
    lightning: int | None = option(
        None, kind=Choice((4, 8)), group="model", commands=IMAGE_COMMANDS, flags=("--lightning",),
        help="add the model's official LoRA for 4 or 8 steps",
    )  # fmt: skip
    zero_cond_t: str | None = option(
        None, kind=Choice(("on", "off")), group="model", commands=("edit",), flags=("--zero-cond-t",), record="given",
        help="override the transformer's flag of this name, for files that lost it",
    )  # fmt: skip

    @classmethod
    def from_options(cls, options: Mapping[str, Any], default_model: str) -> OpenOptions:
        """The opening options among a request's options, keyed by name; raises RequestError."""
        values = {row.field: options[row.name] for row in options_of(cls) if options.get(row.name) is not None}
        model = full_name(values.get("model", default_model))
        return cls(**values | {"model": model, "loras": tuple(values.get("loras", ()))})


# Options of neither the model nor sampling, in the order of help and messages.
_OTHERS = (
    Option(
        name="prompt", kind=Text(), help="what to generate; may be empty", group="image",
        commands=(*CANVAS, "decompose"), nargs="?", metavar="PROMPT", tasks=TASKS, default=..., line=True,
        instead=("--prompt", "-p"), record="always",
        but={"edit": {"metavar": "INSTRUCTION", "help": "what to change; may be empty"},
             "decompose": {"flags": ("--prompt", "-p"), "nargs": None, "metavar": None,
                           "usual": "the model's own caption", "help": "what the whole image shows"},
             "/decompose": {"default": ""}},
    ),
    Option(
        name="images", kind=Several(ImageFile()), help="start from this image", group="image", commands=CANVAS,
        flags=("--image", "--image-path"), nargs="append", metavar="IMAGE", tasks=("edit",), record="given", place=True,
        but={"edit": {"flags": ("--image", "-i", "--image-path"),
                      "help": "image to edit; repeat for more, in the order of the prompt"}},
    ),
    Option(
        name="image", kind=ImageFile(), group="image", commands=("decompose", "caption"), nargs="?", metavar="PHOTO",
        help="the image to decompose", tasks=(*TASKS, "caption"),
        but={"caption": {"nargs": None, "metavar": "IMAGE", "help": "the image to caption"},
             "/decompose": {"default": ...}, "/caption": {"default": ...}},
    ),
    Option(
        name="layer", kind=Text(), group="image", commands=("edit", "decompose"), flags=("--layer",), metavar="DIR:N",
        help="instead of an image, layer N of a folder that decompose wrote, a PSD or an ORA; the result replaces the "
        "layer in a folder, unless --output is given", record="given", place=True,
        but={"decompose": {"help": "instead of an image, layer N of a folder, a PSD or an ORA"}},
    ),
    Option(
        name="negative_prompt", kind=Text(), help="what to avoid", usual="as the model's card says", group="sampling",
        commands=IMAGE_COMMANDS, flags=("--negative-prompt", "-n"), metavar="N", tasks=TASKS,
        line=True, record="always",
        config=(Config(commands=TASKS, table=GENERATION, example="blurry"),), but={"decompose": {"usual": '" "'}},
    ),
    Option(
        name="seed", kind=SEED, help="one image per seed; -1 draws a random seed", usual="random", group="sampling",
        commands=(*IMAGE_COMMANDS, "caption"), flags=("--seed", "-s"), nargs="+", metavar="N",
        tasks=(*TASKS, "caption"), line=True, record="always",
        config=(Config(commands=TASKS, table=GENERATION, help="noise seed", example=42),),
        but={"decompose": {"nargs": None, "help": "noise seed; -1 draws a random seed"},
             "caption": {"nargs": None, "help": "sampling seed, if the checkpoint samples captions", "usual": "0"},
             "/caption": {"default": 0}},
    ),
    Option(
        name="num_images", kind=NUM_IMAGES, help="images per seed", usual="1", group="sampling", commands=WORDS,
        flags=("--num-images",), metavar="N", tasks=CANVAS, default=1, line=True,
    ),
    Option(name="image_index", kind=IMAGE_INDEX, record="always"),
    Option(
        name="preset", kind=Choice(PRESETS), group="sampling", commands=IMAGE_COMMANDS, flags=("--preset",),
        tasks=TASKS, line=True,
        help="steps, solver and step cache together, as the model allows: a draft in a quarter of the passes, the same "
        "image, nearly, in about half, or the model's own way; other flags override it",
        config=(Config(commands=TASKS, example="balanced"),),
    ),
    Option(
        name="aspect", kind=Choice(tuple(ASPECT_SIZES)), group="size", commands=("generate",), flags=("--aspect",),
        help="an official size: " + ", ".join(f"{name} {w}x{h}" for name, (w, h) in ASPECT_SIZES.items())
        + "; Qwen-Image-2.1 has larger ones",
        usual=next(iter(ASPECT_SIZES)), tasks=("generate",), line=True,
        config=(Config(commands=("generate",), table=GENERATION, help="aspect ratio of an image from a prompt alone",
                       example="16:9"),),
    ),
    Option(
        name="mask", kind=ImageFile(), group="image to image", commands=CANVAS, flags=("--mask",), metavar="IMAGE",
        help="white is inpainted; all other pixels come back bit for bit", tasks=CANVAS, record="given",
        place=True, needs=("images",),
    ),
    Option(
        name="outpaint", kind=Text(r"^[0-9]{1,5}(,[0-9]{1,5}){3}$"), group="image to image", commands=CANVAS,
        flags=("--outpaint",), metavar="L,T,R,B", tasks=CANVAS, record="given", needs=("images",),
        help="extend the image by these pixels to the left, above, to the right and below; all of its own pixels come "
        "back bit for bit",
    ),
    Option(
        name="controls", kind=Several(Group(Control)), group="control", commands=CANVAS, flags=("--controlnet",),
        tasks=CANVAS, line=True, record="always", place=True, of_model=True,
        config=(Config(commands=CANVAS, kind=_CONTROLS, usual="none", of_model=True,
                       help="ControlNets with their images, for the models named here; another --model goes without",
                       example=[{"controlnet": "edges.safetensors", "image": "edges.png"}]),),
    ),
    Option(
        name="size", kind=Text(r"^(1mp|source|[0-9]{2,5}x[0-9]{2,5})$"), group="size",
        commands=(*CANVAS, "decompose", "plan"), flags=("--size",), metavar="1mp|source|WxH",
        help="with --image, size of the result: about 1 MP at its aspect, the same resized to its size, or an explicit "
        "one", usual="1mp; source with a mask", tasks=("edit", "decompose"), record="given", needs=("images",),
        but={"decompose": {"metavar": "|".join(LAYER_SIZES), "needs": (), "usual": LAYER_SIZES[0],
                           "help": "size of the layers: the image's or the model's"},
             "/decompose": {"kind": Choice(LAYER_SIZES)},
             "plan": {"metavar": "WxH", "needs": (), "help": "size of the image", "usual": "the model's own"}},
    ),
    Option(
        name="mask_padding", kind=Integer(0), group="image to image", commands=CANVAS, flags=("--mask-padding",),
        metavar="N", help="generate only the mask and N pixels around it", tasks=("edit",), record="given",
        needs=("images", "mask"),
    ),
    Option(
        name="no_composite", kind=Switch(), group="image to image", commands=CANVAS, flags=("--no-composite",),
        help="with a mask, save the model's own image, not composited", record="given", needs=("mask",),
    ),
    Option(
        name="reference_pixels", kind=REFERENCE_PIXELS, group="image", commands=("edit",),
        flags=("--reference-pixels",), metavar="N", usual="about 1 MP", tasks=("edit",),
        help="maximum pixels of each reference image that the model sees",
        record="given",
    ),
    Option(
        name="transparent", kind=Switch(), group="image", commands=CANVAS, flags=("--transparent",), tasks=CANVAS,
        help="word the prompt as Qwen-Image-2.1 wants it for a transparent background", default=False,
    ),
    Option(
        name="keep_alpha", kind=Switch(), group="image", commands=("edit",), flags=("--keep-alpha",), tasks=("edit",),
        help="give the result the image's transparency", default=False, record="given",
    ),
    Option(
        name="ignore_profile", kind=Switch(), group="image", commands=(*_READS, "serve"), flags=("--ignore-profile",),
        help="ignore the colour profiles of images and read their values as sRGB, as diffusers does", record="given",
    ),
    Option(
        name="resolution", kind=SIDE, group="layers", commands=("decompose", "caption"), flags=("--resolution",),
        metavar="|".join(map(str, LAYERED_RESOLUTIONS)), usual=str(LAYERED_RESOLUTIONS[0]),
        help="side in pixels of the square whose area the model works at",
        tasks=("decompose", "caption"),
        config=(Config(commands=("decompose",), usual="the model's own", example=640,
                       help="side in pixels of the square whose area the model works at"),),
        but={"caption": {"kind": Choice(LAYERED_RESOLUTIONS), "metavar": None,
                         "help": "side in pixels of the square whose area the image is shown at"}},
    ),
    Option(
        name="layer_prompt", kind=Text(), group="layers", commands=("decompose",), flags=("--layer-prompt",),
        metavar="TEXT", tasks=("decompose",),
        help="make one layer, of what the text says, with a model that takes layers by name (Layered-Control)",
    ),
    Option(
        name="layer_mask", kind=ImageFile(), group="layers", commands=("decompose",), flags=("--layer-mask",),
        metavar="IMAGE", tasks=("decompose",),
        help="make one layer, of what is white in a mask of the same size (Layered-Control-V2)",
    ),
    Option(
        name="caption_language", kind=Choice(tuple(CAPTION_TEMPLATES)), group="layers", commands=("decompose",),
        flags=("--caption-language",), help="language of the model's own caption", usual=next(iter(CAPTION_TEMPLATES)),
        tasks=("decompose",),
    ),
    Option(
        name="language", kind=Choice(tuple(CAPTION_TEMPLATES)), group="image", commands=("caption",),
        flags=("--language",), usual=next(iter(CAPTION_TEMPLATES)), tasks=("caption",),
        default=next(iter(CAPTION_TEMPLATES)),
    ),
    Option(
        name="memory", kind=Parsed(
            'like "16GB" (256MiB to 1 PB), "auto", "resident", "staged" or "streamed"', read_memory, (str, int)
        ), group="memory", commands=(*IMAGE_COMMANDS, "plan", "serve"), flags=("--memory",), metavar="M",
        usual="staged",
        help="memory limit, such as 16GB, or auto for this machine's; weights stay loaded, are loaded stage by stage "
        "or are streamed from the files to fit it; or choose: resident, staged, streamed",
        config=(Config(commands=(*TASKS, "plan"), help="memory limit, or how weights are kept", example="16GB"),),
        but={"plan": {"help": "memory limit, such as 16GB; auto is this machine's", "usual": "auto"},
             "serve": {"help": "memory limit, as in generate",
                       "usual": "auto, which keeps a model loaded if it fits"}},
    ),
    Option(
        name="parallel", kind=Choice(PARALLEL), group="memory", commands=(*SHARED, "serve"), flags=("--parallel",),
        usual="auto",
        help="how the processes that mlx.launch started share the work: the branches of guidance, the images, the "
        "transformer's blocks, or not at all",
        config=(Config(commands=TASKS, help="how the processes that mlx.launch started share the work",
                       example="guidance"),),
    ),
)  # fmt: skip

OPTIONS = by_name([*options_of(OpenOptions), *_OTHERS, *options_of(GenerationParameters)])


def of_task(task: str) -> list[Option]:
    """The options that are fields of the body of a server's task, with what differs for it."""
    return [row.of(f"/{task}") for row in OPTIONS.values() if task in row.tasks]


def recorded(*kinds: str) -> list[Option]:
    """The options in a PNG's record whose `Option.record` is one of `kinds`."""
    return [row for row in OPTIONS.values() if row.record in kinds]
