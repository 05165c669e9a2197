"""A control of an image: a ControlNet, the image that it sees, and how much it says. Importable without MLX."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..errors import RequestError
from ..names import ControlKind, StrPath
from ..options import Choice, ImageFile, Number, Text, option, options_of
from ..registry import IN_CONTEXT

if TYPE_CHECKING:
    from ..images.sources import ImageSource

CONTROL_KINDS: tuple[ControlKind, ...] = ("image", "canny", "gray", "blur", "lineart", "tile")
MAX_CONTROLS = 8
_PART = Number(0, 1)


@dataclass(frozen=True)
class Control:
    """One ControlNet's part in an image. Each field carries its `Option`.

    Attributes:
        controlnet: a file, a folder, `owner/repo`, `owner/repo:file` or the address of a file on the hub; or
            "in-context", for a LoRA that reads the image as a reference; or "demo-control", the one in this package.
        image: what steers the image; resized to its size. With a mask, and a network that inpaints, what is inpainted.
            None takes what the request itself inpaints, with its mask.
        scale: factor of what the ControlNet adds; 0 runs nothing.
        start, end: the part of the steps, from 0 to 1, in which it runs.
        mask: white is inpainted by a ControlNet that is made for it; None needs another kind.
        source: the image to inpaint, where the ControlNet takes one in addition to its control image.
        kind: how the control image is made from `image`: "image" takes it as it is.

    Raises:
        RequestError: a value is out of range.
    """

    controlnet: StrPath = option(
        kind=Text(), flags=("--controlnet",), metavar="REF", place=True,
        help="steer the image with this ControlNet: a file, a folder, owner/repo, owner/repo:file or a file's address "
        "on the hub; or in-context, for a LoRA that reads the control image; or demo-control, for the model demo; "
        "repeat for more, each followed by its own flags",
    )  # fmt: skip
    image: ImageSource | None = option(
        None, kind=ImageFile(), flags=("--control-image",), metavar="IMAGE", place=True,
        help="the image that the ControlNet sees, resized to the result's size; one that inpaints may go without: it "
        "is shown the image and the mask of --image with --mask or --outpaint",
    )  # fmt: skip
    scale: float = option(
        1.0, kind=Number(-10, 10), flags=("--control-scale",), metavar="S", usual="1.0",
        help="factor of what the ControlNet adds; 0 runs nothing",
    )  # fmt: skip
    start: float = option(
        0.0, kind=_PART, flags=("--control-start",), metavar="A", usual="0.0",
        help="where in the steps, from 0 to 1, the ControlNet begins",
    )  # fmt: skip
    end: float = option(
        1.0, kind=_PART, flags=("--control-end",), metavar="B", usual="1.0", help="where in the steps it ends"
    )
    mask: ImageSource | None = option(
        None, kind=ImageFile(), flags=("--control-mask",), metavar="IMAGE", place=True,
        help="white is inpainted, by a ControlNet that is made for it",
    )  # fmt: skip
    source: ImageSource | None = option(
        None, kind=ImageFile(), flags=("--control-source",), metavar="IMAGE", place=True,
        help="the image to inpaint, for a ControlNet that also sees a control image",
    )  # fmt: skip
    kind: ControlKind = option(
        "image", kind=Choice(CONTROL_KINDS), flags=("--control-kind",), usual="image",
        help="how the control image is made from the image; depth and poses are given as images",
    )  # fmt: skip

    def __post_init__(self) -> None:
        for row in options_of(Control):
            value = getattr(self, row.field)
            if not isinstance(row.kind, ImageFile | Text):
                object.__setattr__(self, row.field, row.kind.check(f"the control's {row.name}", value))
        if not self.controlnet or not isinstance(self.controlnet, str | os.PathLike):
            raise RequestError(f"the control's controlnet is {self.controlnet!r:.80}, but must be a reference")
        if self.start > self.end:
            raise RequestError(
                f"the control starts at {self.start:g}, after its end at {self.end:g}: give a start of at most the end"
            )
        if self.source is not None and self.mask is None:
            raise RequestError(
                "the control has a source to inpaint, but no mask: add the control's mask, white where it is inpainted"
            )
        if self.in_context and (self.scale, self.start, self.end, self.mask) != (1.0, 0.0, 1.0, None):
            raise RequestError(
                "an in-context control has no scale, start, end or mask: leave them out, and set the LoRA's strength"
            )
        if self.image is None and self.mask is not None:
            raise RequestError(
                "the control has a mask, but no image: add the image to inpaint, or leave the mask out",
                cause="control image",
            )

    @property
    def reference(self) -> str:
        """The ControlNet's reference as text."""
        return str(self.controlnet)

    @property
    def in_context(self) -> bool:
        """Whether a LoRA reads its image as a reference, and no ControlNet."""
        return self.controlnet == IN_CONTEXT

    @property
    def runs(self) -> bool:
        """Whether it can have an effect."""
        return self.scale != 0 and self.start < self.end

    def check_images(self) -> None:
        """Raises RequestError if one of its images cannot be read."""
        from ..images.sources import open_rgba  # here: most images have no control

        for image in (self.image, self.mask, self.source):
            if image is not None:
                open_rgba(image)

    def opened(self) -> Control:
        """The same with its images opened, upright; raises RequestError if one cannot be read."""
        from ..images.sources import open_image, open_mask  # here: most images have no control

        return replace(
            self,
            image=None if self.image is None else open_image(self.image),
            mask=None if self.mask is None else open_mask(self.mask),
            source=None if self.source is None else open_image(self.source),
        )

    def recorded(self) -> dict[str, Any]:
        """The fields for an image's record: those that are set; images by the names of their files."""
        values = [(row, getattr(self, row.field)) for row in options_of(Control)]
        return {
            row.name: str(value) if isinstance(row.kind, ImageFile | Text) else value
            for row, value in values
            if value is not None
            and (not isinstance(row.kind, ImageFile) or isinstance(value, str | os.PathLike))
            and value != getattr(Control, row.field, None)  # last: an array is not compared
        }  # fmt: skip


def in_window(start: float, end: float, evaluation: int, evaluations: int) -> bool:
    """Whether a control from `start` to `end` acts in an evaluation. Source: diffusers' `controlnet_keep`."""
    return start <= evaluation / evaluations and (evaluation + 1) / evaluations <= end


def controls_of(controls: Sequence[Control | Mapping[str, Any]] | None) -> tuple[Control, ...]:
    """Controls from the objects of a request, a file of prompts or a record, or from `Control`s themselves.

    Raises:
        RequestError: a field is unknown or missing, a value is out of range, or there are too many.
    """
    if not isinstance(controls, list | tuple | None):
        raise RequestError(
            f"controls are {controls!r:.80}, but must be a list of controls, such as "
            '[{"controlnet": "edges.safetensors", "image": "edges.png"}]'
        )
    made = []
    names = {row.name for row in options_of(Control)}
    for one in controls or ():
        if isinstance(one, Mapping):
            if odd := one.keys() - names:
                raise RequestError(f"a control has {min(odd)!r:.40}, but its fields are {', '.join(sorted(names))}")
            if one.get("controlnet") is None:
                raise RequestError("a control lacks its controlnet: name a file, a folder or owner/repo")
            one = Control(**{name: value for name, value in one.items() if value is not None})
        if not isinstance(one, Control):
            raise RequestError(
                f"a control is {one!r:.80}, but must be a Control, or an object with {', '.join(sorted(names))}"
            )
        made.append(one)
    if len(made) > MAX_CONTROLS:
        raise RequestError(f"there are {len(made)} controls; at most {MAX_CONTROLS} work")
    return tuple(made)
