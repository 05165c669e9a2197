"""A real model against a golden file that diffusers wrote (`scripts/make_golden.py`), stage by stage.

The file holds fingerprints of the prompts' states, of the noise and of the latents after chosen steps, the image at
most 64 pixels wide or high, and in its metadata all that made them. The first stage that differs tells where to look.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from ..errors import CheckpointError, RequestError
from ..images.pixels import to_images
from ..pipeline.parameters import GenerationParameters
from ..pipeline.pipeline import QwenImagePipeline
from ..pipeline.progress import Progress
from ..pipeline.request import Request
from ..runtime.session import Session
from ..weights.safetensors_files import load_tensors
from .fingerprint import fingerprint
from .measure import GARBAGE, numbers, relative_error
from .outcome import Outcome

FORMAT = "qwen_image_mlx.golden.1"
VALUES, PARTS, THUMBNAIL = 4096, 16, 64  # of a fingerprint; longest side of the image
_FACTS: dict[str, type | tuple[type, ...]] = {
    "model": str, "dtype": str, "prompt": str, "negative_prompt": (str, type(None)), "seed": int, "width": int,
    "height": int, "steps": int, "kept_steps": list, "cfg_scale": (int, float), "versions": dict, "transformer": dict,
}  # fmt: skip
_CONFIG = ("num_layers", "num_attention_heads", "attention_head_dim", "joint_attention_dim", "in_channels")


class Tolerance(NamedTuple):
    """Maximum differences of correct implementations in a dtype: relative errors; of the image, levels of 255 (rms).

    Those of fp32 come from the tests on tiny models. In 16 bits a different order of rounding grows from step to step:
    these are estimates, until real runs are measured.
    """

    text: float
    noise: float
    latents: float
    image: float


TOLERANCES = {
    "float32": Tolerance(1e-4, 1e-5, 1e-3, 1.5),
    "bfloat16": Tolerance(5e-2, 5e-3, 1e-1, 12.0),
    "float16": Tolerance(1e-2, 1e-3, 5e-2, 8.0),
}


class Golden(NamedTuple):
    """A golden file.

    Attributes:
        arrays: by name: "STAGE.values", "STAGE.norms", "image".
        facts: the parameters they were made with.
    """

    arrays: Mapping[str, np.ndarray]
    facts: Mapping[str, Any]


def run(options: Mapping[str, Any]) -> Outcome:
    """Runs the model as the file's maker did, and compares."""
    golden = read_golden(Path(options["golden"]))
    facts = golden.facts
    pipeline = QwenImagePipeline.from_pretrained(options["model"], dtype=facts["dtype"])
    check_model(pipeline, facts)
    ours = stages(pipeline, facts)
    outcome, allowed = Outcome(), TOLERANCES[facts["dtype"]]
    for name, result in ours.items():
        error = _error(name, result, golden)
        kind = name.partition("-")[0]
        limit = getattr(allowed, kind)
        unit = "levels" if kind == "image" else "error"
        outcome.figures[f"{name}_{unit}"] = error
        if error > limit:
            far = f"by {error:.1f} of 255 levels" if kind == "image" else f"by {error:.1e}"
            departs = f"{name} departs from the reference {far}, where {limit:g} is allowed"
            if outcome.findings:  # the first stage is the verdict; later ones may follow from it
                outcome.find("wrong", f"{departs}; this may follow from the first departure")
            else:
                outcome.find("wrong", f"{options['model']}: first departure: {departs}; {_CURES[kind]}")
    worst = max(value for name, value in outcome.figures.items() if name.endswith("_error"))
    outcome.summary = (
        f"{len(ours)} stages of {facts['model']} agree with diffusers {facts['versions'].get('diffusers', '')} in "
        f"{facts['dtype']}, within {worst:.1e}"
    )
    outcome.figures["golden"] = dict(facts)
    return outcome


_CURES = {
    "text": "check the text encoder's files and the tokenizer, then run `doctor --only probe,parity`",
    "noise": "seed, size or dtype are not what the file says, or this is a fault of this program: report it",
    "latents": "check the transformer's files, then run `doctor --only probe,parity`",
    "image": "check the autoencoder's files, then run `doctor --only probe,parity,picture`",
}


def read_golden(path: Path) -> Golden:
    """Reads and checks a golden file.

    Raises:
        CheckpointError: it cannot be read, is not a golden file, or is damaged.
    """
    cure = "make one with scripts/make_golden.py"
    try:
        arrays, metadata = load_tensors(path)
    except (OSError, RuntimeError, ValueError) as error:
        why = "it is not there" if not path.exists() else "it is not a whole safetensors file"
        raise CheckpointError(f"the golden file {path} cannot be read, {why}; {cure}") from error
    if metadata.get("format") != FORMAT:
        raise CheckpointError(f"the file is not a golden file; {cure}")
    try:
        facts = json.loads(metadata["golden"])
        sound = all(isinstance(facts[name], kinds) for name, kinds in _FACTS.items())
        if not sound or facts["dtype"] not in TOLERANCES or not all(type(n) is int for n in facts["kept_steps"]):
            raise ValueError
        names = {"image", *(f"{name}.{kind}" for name in _stage_names(facts) for kind in ("values", "norms"))}
        if names - arrays.keys():
            raise ValueError
        return Golden({name: np.array(array.astype(mx.float32)) for name, array in arrays.items()}, facts)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"the golden file is damaged; {cure}") from error


def _stage_names(facts: Mapping[str, Any]) -> list[str]:
    texts = ["text"] if facts["negative_prompt"] is None else ["text", "text-negative"]
    return [*texts, "noise", *(f"latents-{step}" for step in facts["kept_steps"])]


def check_model(pipeline: QwenImagePipeline, facts: Mapping[str, Any]) -> None:
    """Raises CheckpointError unless the model is of the kind the file was made with."""
    config = pipeline.transformer_config
    ours = {
        "class": pipeline.class_name,
        **{name: getattr(config, name) for name in _CONFIG},
    }
    theirs = {"class": facts.get("class"), **facts["transformer"]}
    for name, value in ours.items():
        if theirs.get(name) != value:
            raise CheckpointError(
                f"the golden file is from a different model: {name} is {theirs.get(name)} there and {value} here; "
                "give the model it names"
            )


def stages(pipeline: QwenImagePipeline, facts: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Our pipeline's arrays at each stage in the file."""
    try:
        parameters = GenerationParameters(
            width=facts["width"],
            height=facts["height"],
            num_inference_steps=facts["steps"],
            cfg_scale=facts["cfg_scale"],
        )
        request = Request(
            prompt=facts["prompt"],
            negative_prompt=facts["negative_prompt"],
            parameters=parameters,
            seeds=(facts["seed"],),
        )
    except (KeyError, RequestError) as error:
        raise CheckpointError(f"the golden file is damaged ({error}); make one with scripts/make_golden.py") from error
    kept: dict[str, np.ndarray] = {}

    def keep(progress: Progress) -> None:
        if progress.stage == "denoise" and (progress.step in facts["kept_steps"] or not progress.step):
            kept["noise" if not progress.step else f"latents-{progress.step}"] = numbers(progress.latents)

    with Session(pipeline, {"memory": "auto"}).plan(request):
        encoding = pipeline.encode_guidance_prompts(request.prompt, request.guiding_prompt)
        pipeline.release_encoders()
        kept["text"] = numbers(encoding.positive)
        if encoding.negative is not None:
            kept["text-negative"] = numbers(encoding.negative)
        latents = pipeline.denoise_latents(parameters, encoding, seed=facts["seed"], progress=keep)
        pipeline.release_transformer()
        (pixels,) = pipeline.decode_frames(parameters, latents)
    image = to_images(pixels[None])[0]
    kept["image"] = np.asarray(image.reduce(reduction(image.width, image.height)), np.float32)
    return kept


def reduction(width: int, height: int) -> int:
    """The factor that reduces an image to at most `THUMBNAIL` pixels wide and high."""
    return max(1, -(-max(width, height) // THUMBNAIL))


def _error(name: str, result: np.ndarray, golden: Golden) -> float:
    if name == "image":
        theirs = golden.arrays["image"]
        if theirs.shape != result.shape:
            raise CheckpointError("the golden file is damaged: its image's size differs from its record")
        error = float(np.sqrt(np.mean((result - theirs) ** 2)))
        return error if math.isfinite(error) else GARBAGE
    ours = dict(zip(("values", "norms"), fingerprint(result, VALUES, PARTS), strict=True))
    if any(ours[kind].shape != golden.arrays[f"{name}.{kind}"].shape for kind in ours):
        return GARBAGE  # a different number of tokens
    return max(relative_error(ours[kind], golden.arrays[f"{name}.{kind}"]) for kind in ours)
