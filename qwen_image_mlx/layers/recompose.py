"""Opens single layers, puts edited ones back, and composites a stack."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from PIL import Image

from ..errors import RequestError
from ..names import StrPath
from .folder import MANIFEST, adopt_file, layer_names
from .formats import load_layers, split_reference
from .stack import Layer, LayerStack, composite


def compose(
    layers: LayerStack | StrPath,
    *,
    hide: Iterable[int] = (),
    move: Mapping[int, tuple[int, int]] | None = None,
    scale: Mapping[int, float] | None = None,
) -> Image.Image:
    """Composites layers into an image: source over, from back to front.

    Args:
        layers: a stack, or a folder that `LayeredResult.save` wrote, its zip, a PSD or an ORA.
        hide: layers to leave out, counted from 0, the backmost.
        move: pixels to move layers by, right and down.
        scale: factors to scale layers' visible parts by, about their centres; comes before moving.

    Returns:
        RGBA, of the canvas's size.

    Raises:
        RequestError: the file cannot be read, a layer does not exist, or a number is out of range.
    """
    if not isinstance(layers, LayerStack | str | os.PathLike):
        raise RequestError(f"layers are {type(layers).__name__}, but must be a stack, or a folder or file of layers")
    stack = layers if isinstance(layers, LayerStack) else load_layers(layers)
    try:
        for index, factor in (scale or {}).items():
            stack = stack.scale(index, factor)
        for index, (dx, dy) in (move or {}).items():
            stack = stack.move(index, dx, dy)
        return composite(stack, tuple(hide))
    except (AttributeError, TypeError, ValueError) as error:
        raise RequestError(f"hide takes layers' numbers, move {{2: (40, -10)}}, scale {{2: 0.5}}: {error}") from error


def open_layer(reference: str) -> Layer:
    """The layer that DIR:N means (or a PSD, an ORA, a zip instead of DIR); raises RequestError if it does not exist."""
    path, index = split_reference(reference)
    if index is None:
        example = "FOLDER" if not reference or ":" in reference else reference
        raise RequestError(f"the layer is {reference!r:.80}; add its number, such as {example:.80}:0")
    layers = load_layers(path).layers
    if index >= len(layers):
        raise RequestError(f"{path} has no layer {index}; its layers go from 0, the backmost, to {len(layers) - 1}")
    return layers[index]


def edited_layer_path(reference: str) -> Path | None:
    """The path for an edited layer in a folder with a manifest, next to the old one; None for all other layers."""
    path, index = split_reference(reference)
    return path / f"layer_{index}-edited.png" if (path / MANIFEST).is_file() else None


def layer_file(reference: str) -> Path | None:
    """The PNG file of a layer of a folder; None for all other layers."""
    path, index = split_reference(reference)
    if not path.is_dir():
        return None
    assert index is not None
    return path / layer_names(path)[index]


def adopt_layer(reference: str, file: Path) -> None:
    """Replaces a layer with an image in its folder; the old file stays, without an entry in the manifest."""
    path, index = split_reference(reference)
    assert index is not None
    with Image.open(file) as image:
        adopt_file(path, index, file.name, image.size)
