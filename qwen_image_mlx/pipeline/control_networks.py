"""ControlNets by reference: fetched, recognised by their tensors, opened as components; and their images, encoded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from math import isqrt
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from PIL import Image

from ..errors import CheckpointError, RequestError, some
from ..gpu import finish
from ..images.geometry import Size
from ..images.pixels import to_mask, to_pixels
from ..images.sources import open_image, open_mask
from ..lora.fetch import fetch_file
from ..registry import CLASSES, CONTROL, CONTROLS, IN_CONTEXT, LABELS, TRANSFORMER, VAE, VAE_ENCODER, Class, Component
from ..variants import DEMO_CONTROL
from ..weights.mapping import canonical_names, weights_map
from ..weights.recognize import family_of, kind_of, looks_like_a_lora, part_of, unreadable
from ..weights.safetensors_files import Tensor
from ..weights.snapshot import DEMO_ROOT, HubSnapshot, weight_file
from .autoencode import encode_mode
from .components import Components
from .control import Control
from .parameters import check_size
from .progress import ProgressCallback
from .reporter import Reporter
from .seams import ControlInput
from .working import working


def open_control(components: Components, report: Reporter, control: Control) -> str:
    """The role of a control's network, opened unless it is; its weights are checked by their headers, not loaded.

    Raises:
        RequestError: the reference leads nowhere, or the control lacks what the network needs.
        CheckpointError: the file is damaged, not a ControlNet, or made for a different model.
        HubError: it could not be fetched.
    """
    if control.in_context:
        _check_in_context(components, control)
        return IN_CONTEXT
    reference = control.reference
    opened: dict[str, str] = components.references
    if reference not in opened:
        if reference == DEMO_CONTROL:
            place = DEMO_ROOT / DEMO_CONTROL
        else:
            place = fetch_file(reference, "ControlNet", components.snapshot.offline, report.download)
        number = len(components.controls) + 1
        role = CONTROL if number == 1 else f"{CONTROL} {number}"
        entry, config = recognize(components, place)
        components.add_control(role, entry, config, place)
        opened[reference] = role
    role = opened[reference]
    _check_images(components, role, control)
    return role


def open_controls(components: Components, report: Reporter, controls: Sequence[Control]) -> tuple[str, ...]:
    """The roles of the controls that have an effect, each once; all networks are opened and all images looked at.

    Raises:
        RequestError, CheckpointError, HubError: as `open_control`; an image cannot be read.
    """
    roles = [open_control(components, report, control) for control in controls]
    for control in controls:
        control.check_images()
    pairs = zip(roles, controls, strict=True)
    return tuple(dict.fromkeys(role for role, control in pairs if control.runs and not control.in_context))


def encode_controls(
    components: Components,
    report: Reporter,
    controls: Sequence[Control],
    size: Size,
    progress: ProgressCallback | None,
) -> tuple[ControlInput, ...]:
    """The controls that have an effect, their images encoded.

    Args:
        components: the checkpoint's parts.
        report: receives progress.
        controls: as the user gave them.
        size: (width, height) of the image to be generated.
        progress: replaces the report's callback meanwhile.

    Raises:
        RequestError, CheckpointError, HubError: as `open_control`; an image cannot be read.
    """
    check_size(*size, components.latent_space.size_multiple)
    roles = [open_control(components, report, control) for control in controls]
    running = [(role, control.opened()) for role, control in zip(roles, controls, strict=True) if control.runs]
    if not running:
        return ()
    made = []
    with working(components, report, progress):
        components.load(VAE_ENCODER)
        for role, control in running:
            with report.stage("encode", "control"):
                tokens = condition_tokens(components, role, control, size)
            made.append(ControlInput(role, tokens, control.scale, control.start, control.end))
    return tuple(made)


def condition_tokens(components: Components, role: str, control: Control, size: Size) -> mx.array:
    """What a network is given of a control (1, N, condition channels), fp32, evaluated.

    The channels of a latent are, by their number, those of the control image; or those of the masked image and, where
    it is kept, 1; or all three, with zeros for what is not given. Masked pixels are -1, or in the last case 0.
    """
    space = components.latent_space
    per_latent = space.channels if control.in_context else _channels(components, role)
    rows, columns = (side // space.factor for side in reversed(size))
    zeros = mx.zeros((1, rows, columns, space.channels))
    if per_latent == space.channels:
        parts = [_encoded(components, _draw(control, size))]
    else:
        union = per_latent > space.channels + 1
        steers = union and (control.mask is None or control.source is not None)
        shown = [_encoded(components, _draw(control, size)) if steers else zeros] if union else []
        keep, masked = mx.zeros((1, rows, columns, 1)), zeros
        if control.mask is not None:
            mask = to_mask(open_mask(control.mask), size)
            keep = 1 - mx.array(np.ascontiguousarray(mask[:: space.factor, :: space.factor]))[None, :, :, None]
            image = control.image if control.source is None else control.source
            masked = _encoded(components, image, mx.array(mask)[None, :, :, None], size, 0.0 if union else -1.0)
        parts = [*shown, keep, masked] if union else [masked, keep]
    tokens = space.pack(mx.concatenate(parts, axis=-1))
    finish(tokens)
    return tokens


def _draw(control: Control, size: Size) -> Image.Image:
    """The control image of a size."""
    from ..images.control import control_image  # here: most images have no control

    assert control.image is not None  # `_check_images`
    return control_image(open_image(control.image), control.kind, size)


def _encoded(
    components: Components,
    image: Any,
    mask: mx.array | None = None,
    size: Size | None = None,
    fill: float = 0.0,
) -> mx.array:
    """The most likely normalised latents (1, h, w, z) of an RGB image, with `fill` where the mask is 1."""
    pixels = to_pixels(image, size or image.size)
    if mask is not None:
        pixels = mx.where(mask > 0.5, mx.array(fill), pixels)
    if components.latent_space.pixel_channels == 4:
        pixels = mx.concatenate([pixels, mx.ones((*pixels.shape[:3], 1))], axis=-1)
    return encode_mode(components.network(VAE_ENCODER), components.config(VAE), pixels)


def _channels(components: Components, role: str) -> int:
    """Condition channels of a latent."""
    channels: int = components.config(role).condition_channels // components.latent_space.patch**2
    return channels


def _check_in_context(components: Components, control: Control) -> None:
    """Raises RequestError where no LoRA reads a control image, or there is none."""
    model = components.snapshot.model
    if not CLASSES[components.variant.classes[TRANSFORMER]].in_context or components.variant.takes_images:
        raise RequestError(f"{model} takes no in-context control: a text-to-image model of Qwen-Image 1.x does")
    if components.adapters is None:
        raise RequestError("an in-context control needs the LoRA that reads it", cause="in-context")
    if control.image is None:
        raise RequestError("a control lacks its image", cause="control image")


def _check_images(components: Components, role: str, control: Control) -> None:
    """Raises RequestError if a control has a mask that its network does not read, or lacks one."""
    extra = _channels(components, role) - components.latent_space.channels
    if control.image is None:
        raise RequestError("a control lacks its image", cause="control image")
    if extra == 0 and control.mask is not None:
        raise RequestError(f"{control.reference} reads no mask: leave it out, or give a ControlNet that inpaints")
    if extra == 1 and control.mask is None:
        raise RequestError(f"{control.reference} inpaints, and needs a mask", cause="control mask")
    if extra <= 1 and control.source is not None:
        raise RequestError(f"{control.reference} sees one image: give the image to inpaint as its control image")


# Recognition ----------------------------------------------------------------------------------------------------------


def recognize(components: Components, place: Path) -> tuple[Class, Any]:
    """The class and config of a ControlNet's file or folder, by its tensors alone.

    Raises:
        CheckpointError: it is not a ControlNet, not one for this model, or of a different width.
    """
    tensors = part_of(CONTROL, _tensors(place))
    name = family_of(tensors)
    if name is None:
        raise CheckpointError(_what_else(place, tensors))
    entry = CONTROLS[name]
    (row,) = entry.components
    model, ours = components.snapshot.model, components.variant.classes[TRANSFORMER]
    if entry.steers != ours:
        raise CheckpointError(f"{place} is a ControlNet of {entry.title}, which does not steer {model}")
    return entry, _config(row, components.config(TRANSFORMER), tensors, place, components)


def _tensors(place: Path) -> Mapping[str, Tensor]:
    if place.is_dir():
        return HubSnapshot(place).weight_files("", weights_map(next(iter(CONTROLS)))["stem"]).tensors
    return weight_file(place).tensors


def _config(row: Component, base: Any, tensors: Mapping[str, Tensor], place: Path, components: Components) -> Any:
    """The transformer's sizes, with those that the file's tensors show."""
    if sentence := unreadable(tensors):
        raise CheckpointError(sentence)
    marks, names = weights_map(row.map)["control"], canonical_names(row, tensors)
    shape = next(tensor.shape for stored, tensor in tensors.items() if names[stored] == marks["marker"])
    layers = {name.removeprefix(f"{row.layers}.").split(".")[0] for name in names.values()
              if name.startswith(f"{row.layers}.")}  # fmt: skip
    patch = isqrt(components.latent_space.token_channels // components.latent_space.channels) ** 2
    channels = components.latent_space.channels
    if len(shape) != 2 or shape[0] != base.dim:
        width = shape[0] if shape else 0
        raise CheckpointError(
            f"{place} is made for a transformer of width {width}, but that of {components.snapshot.model} is {base.dim}"
        )
    depth = components.depth(TRANSFORMER)
    if len(layers) > depth or ("each" in marks and len(layers) < depth):
        raise CheckpointError(
            f"{place} has {len(layers)} block{'s' * (len(layers) > 1)}, but the transformer of "
            f"{components.snapshot.model} has {depth}; choose a ControlNet that was made for this model"
        )
    if shape[1] not in (channels * patch, (channels + 1) * patch, (2 * channels + 1) * patch):
        raise CheckpointError(f"{place} takes {shape[1]} values of a control image for each token, which none here has")
    same = {field.name: getattr(base, field.name) for field in fields(base)}
    own = {"num_layers": len(layers), "condition_channels": shape[1]}
    return row.config(**same | own)


def _what_else(place: Path, tensors: Mapping[str, Tensor]) -> str:
    """A sentence that says what a file is, instead of a ControlNet."""
    if looks_like_a_lora(tensors):
        return f"{place} holds a LoRA, not a ControlNet"
    kind = kind_of(tensors)
    what = LABELS[kind] if kind else f"something else ({some(list(tensors))})"
    return f"{place} holds {what}, not a ControlNet of Qwen-Image"
