"""The results of encoding, which guide the generation and do not depend on the encoders any more."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import mlx.core as mx

from ..errors import CheckpointError
from ..names import StrPath
from ..weights.safetensors_files import load_tensors, save_tensors

if TYPE_CHECKING:
    from ..variants import Variant
    from ..weights.schemes import Quantization
    from .request import Request

_FORMAT = "qwen_image_mlx.guidance_encoding.1"


@dataclass(frozen=True)
class EncodingSource:
    """The origin of an encoding; kept for the record, never used for a decision."""

    model: str = ""
    revision: str | None = None
    prompt: str = ""
    negative_prompt: str | None = None


@dataclass(frozen=True)
class Reference:
    """An encoded reference image, an input of the transformer.

    Attributes:
        latents: packed, normalised latents (1, height * width, C), fp32.
        height, width: its grid of tokens.
        start: the row of the prompt's states where its places begin; None where the transformer is shown it apart.
    """

    latents: mx.array
    height: int
    width: int
    start: int | None = None

    @property
    def grid(self) -> tuple[int, ...]:
        """All but the latents: what is saved beside them."""
        whole = (self.height, self.width, self.start)
        return tuple(number for number in whole if number is not None)


@dataclass(frozen=True)
class GuidanceEncoding:
    """Encoded prompts and images, evaluated: everything that `generate_pixels` needs of them.

    Attributes:
        positive: encoder states of the prompt (1, L, C).
        negative: encoder states of the negative prompt (1, M, C), or None for generating without guidance.
        references: the images an editing model works on, in order.
        source: the model and prompts it was made from.
    """

    positive: mx.array
    negative: mx.array | None = None
    references: tuple[Reference, ...] = ()
    source: EncodingSource = field(default_factory=EncodingSource)

    @property
    def nbytes(self) -> int:
        """Bytes of its arrays."""
        arrays = [self.positive, self.negative, *(reference.latents for reference in self.references)]
        return sum(array.nbytes for array in arrays if array is not None)

    def save(self, path: StrPath) -> None:
        """Writes a safetensors file, atomically; raises OutputError if it cannot."""
        arrays = {"positive": self.positive}
        if self.negative is not None:
            arrays["negative"] = self.negative
        arrays |= {f"reference.{n}": reference.latents for n, reference in enumerate(self.references)}
        metadata = {
            "format": _FORMAT,
            "source": json.dumps(asdict(self.source), ensure_ascii=False),
            "grids": json.dumps([reference.grid for reference in self.references]),
        }
        save_tensors(Path(path), arrays, metadata)

    @classmethod
    def load(cls, path: StrPath) -> GuidanceEncoding:
        """Reads a file that `save` wrote, evaluated; raises CheckpointError for any other file."""
        try:
            arrays, metadata = load_tensors(Path(path))
        except (OSError, RuntimeError, ValueError) as error:
            raise CheckpointError(f"{path} is not a readable encoding: {error}") from error
        if metadata.get("format") != _FORMAT:
            raise CheckpointError(f"{path} is not an encoding saved by GuidanceEncoding.save")
        known = {f.name for f in fields(EncodingSource)}
        try:
            source = {k: v for k, v in json.loads(metadata["source"]).items() if k in known}
            grids = json.loads(metadata["grids"])
            references = tuple(Reference(arrays[f"reference.{n}"], *grid) for n, grid in enumerate(grids))
            odd = [r for r in references if r.latents.shape[:2] != (1, r.height * r.width)]
            if odd or any(not mx.issubdtype(array.dtype, mx.floating) for array in arrays.values()):
                raise ValueError("shapes or dtypes do not fit")
            return cls(arrays["positive"], arrays.get("negative"), references, EncodingSource(**source))
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{path} is a damaged encoding ({error}); encode again") from error


@dataclass(frozen=True)
class InitialImage:
    """An encoded image that generation starts from, instead of from noise alone.

    Attributes:
        mean, std: of its latents (1, h, w, z), as the autoencoder sees them, fp32.
        mask: (1, h, w, 1), fp32, 1 where it is regenerated and 0 where it is kept; None regenerates everything.
    """

    mean: mx.array
    std: mx.array
    mask: mx.array | None = None


class EncodingModel(Protocol):
    """Everything an encoding depends on besides the request; `QwenImagePipeline` is one."""

    @property
    def fingerprint(self) -> str:
        """Identifies the checkpoint's files."""

    @property
    def dtype(self) -> mx.Dtype:
        """Dtype of the text encoder."""

    @property
    def quantization(self) -> Quantization:
        """The schemes matrices are quantized to while loading."""

    @property
    def variant(self) -> Variant:
        """What the checkpoint's pipeline class implies."""


class Encodings(Protocol):
    """Stored encodings, keyed by request."""

    def get(self, pipeline: EncodingModel, request: Request) -> GuidanceEncoding | None:
        """The encoding of an equal request, or None."""

    def put(self, pipeline: EncodingModel, request: Request, encoding: GuidanceEncoding) -> None:
        """Stores an encoding."""
