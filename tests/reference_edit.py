"""Runs of the reference's pipelines that work on images: Edit, Edit-Plus, image to image, inpainting, Layered.

Like `reference.py`, made with torch, diffusers and transformers alone. Qwen2VLProcessor wants torchvision, so
a stand-in does its work with transformers' own PIL image processor and tokenizer. diffusers 0.42 forgets to pass
`mm_token_type_ids` on, without which transformers 5 numbers the tokens of an image one by one
(huggingface/diffusers#14194); the text encoder is wrapped to put them back.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from checkpoints import Config
from diffusers import (
    DiffusionPipeline,
    QwenImageEditInpaintPipeline,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    QwenImageImg2ImgPipeline,
    QwenImageInpaintPipeline,
    QwenImageLayeredPipeline,
)
from reference import load_reference, to_numpy
from transformers import BatchFeature
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

IMAGE_TOKEN = "<|image_pad|>"
EDIT_CLASSES = {"edit": QwenImageEditPipeline, "edit_plus": QwenImageEditPlusPipeline,
                "edit_inpaint": QwenImageEditInpaintPipeline, "layered": QwenImageLayeredPipeline}  # fmt: skip
TEXT_CLASSES = {"img2img": QwenImageImg2ImgPipeline, "inpaint": QwenImageInpaintPipeline}


class Processor:
    """What Qwen2VLProcessor does, without torchvision."""

    def __init__(self, tokenizer: Any, config: Config, gives_types: bool):
        self.tokenizer = tokenizer
        self.gives_types = gives_types
        limits = {"shortest_edge": config["min_pixels"], "longest_edge": config["max_pixels"]}
        self.image_processor = Qwen2VLImageProcessorPil(size=limits)

    def __call__(self, text: str | list[str], images: Any, padding: bool, return_tensors: str) -> BatchFeature:
        text = [text] if isinstance(text, str) else text
        pictures = images if isinstance(images, list) else [images]
        prepared = self.image_processor(images=pictures, return_tensors="pt")
        counts = iter((prepared["image_grid_thw"].prod(dim=1) // 4).tolist() * len(text))
        expanded = []
        for line in text:
            head, *tails = line.split(IMAGE_TOKEN)
            expanded.append(head + "".join(IMAGE_TOKEN * next(counts) + tail for tail in tails))
        tokens = self.tokenizer(expanded, padding=padding, return_tensors=return_tensors)
        types = (tokens["input_ids"] == self.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)).int()
        return BatchFeature({**tokens, **prepared, **({"mm_token_type_ids": types} if self.gives_types else {})})

    def batch_decode(self, *args: Any, **kwargs: Any) -> list[str]:
        return self.tokenizer.batch_decode(*args, **kwargs)


def load_edit_reference(directory: Path, kind: str, *, sequential_positions: bool = False) -> DiffusionPipeline:
    """The reference's pipeline of a checkpoint, fp32 on the CPU; `kind` is a key of one of the tables above."""
    parts = load_reference_parts(directory)
    if kind in TEXT_CLASSES:
        pipeline = TEXT_CLASSES[kind](**parts)
    else:
        (file,) = (directory / "processor").iterdir()
        config = json.loads(file.read_text())
        if "image_processor" in config:
            limits = config["image_processor"]["size"]
            config = {"min_pixels": limits["shortest_edge"], "max_pixels": limits["longest_edge"]}
        if not sequential_positions and kind != "layered":
            _pass_token_types(parts["text_encoder"], parts["tokenizer"].convert_tokens_to_ids(IMAGE_TOKEN))
        cls = EDIT_CLASSES[kind]
        # The constructor wants a registered class for every part; a stand-in is put in afterwards.
        pipeline = cls(**parts, processor=None)
        pipeline.processor = pipeline.vl_processor = Processor(parts["tokenizer"], config, kind == "layered")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load_reference_parts(directory: Path) -> dict[str, Any]:
    """The models of a checkpoint, whatever its pipeline class."""
    index = directory / "model_index.json"
    original = index.read_text()
    index.write_text(
        json.dumps({**{k: v for k, v in json.loads(original).items() if k != "processor"},
                    "_class_name": "QwenImagePipeline"})
    )  # fmt: skip
    try:
        return dict(load_reference(directory).components)
    finally:
        index.write_text(original)


def _pass_token_types(text_encoder: Any, image_token: int) -> None:
    forward = text_encoder.forward

    def with_types(*args: Any, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        return forward(*args, input_ids=input_ids, mm_token_type_ids=(input_ids == image_token).int(), **kwargs)

    text_encoder.forward = with_types


@torch.no_grad()
def run_edit_reference(pipe: DiffusionPipeline, *, steps: int, cfg_scale: float, seed: int, **request: Any) -> Any:
    """(latents after every step, packed and fp32; images)."""
    latents: list[np.ndarray] = []

    def keep(_pipe: Any, _step: int, _time: torch.Tensor, state: Config) -> Config:
        latents.append(to_numpy(state["latents"]))
        return {}

    output = pipe(
        **request,
        num_inference_steps=steps,
        true_cfg_scale=cfg_scale,
        generator=torch.Generator("cpu").manual_seed(seed),
        callback_on_step_end=keep,
    )
    return latents, output.images
