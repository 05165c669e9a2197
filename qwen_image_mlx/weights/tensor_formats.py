"""How a weight is stored in its file: as floats, as fp8 or int8 with a scale, packed by MLX, or in GGUF's blocks.

Other tools store what belongs to a weight as further tensors of the same path: `x.weight`, `x.scales`, `x.biases`,
`x.weight_scale`. Here these become one `Stored` weight with the shape of the dense matrix, which opens lazily.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..errors import CheckpointError
from ..gpu import gpu_error
from . import int8
from .packed import Packed
from .safetensors_files import LazyTensors, Tensor
from .schemes import Scheme

FLOATS = ("F32", "F16", "BF16", "F64")
FP8 = ("F8_E4M3", "F8_E5M2")
PACKED = "U32"
# The last part of the names of a weight's companions. The scales of activations are not used.
COMPANIONS = ("scales", "biases", "weight_scale", "scale_weight", "input_scale", "scale_input", "comfy_quant")
# The GGUF types whose blocks MLX can use as they are.
_GGUF_SCHEMES = {"Q4_0": Scheme("affine", 4, 32), "Q4_1": Scheme("affine", 4, 32), "Q8_0": Scheme("affine", 8, 32)}
_AFFINE_BITS, _AFFINE_GROUPS = (1, 2, 3, 4, 5, 6, 8), (32, 64, 128)  # of what has biases: those MLX computes with
_MODES = {(4, 32): "mxfp4", (8, 32): "mxfp8", (4, 16): "nvfp4"}  # of what has no biases, by bits and group size


@dataclass(frozen=True)
class Stored:
    """One weight as stored in its file or files.

    Attributes:
        tensor: the weight's own entry.
        companions: the tensors that belong to it, by the last part of their names.
        shape: of the dense weight, as the weights map gives it.
        scheme: of a weight that MLX can use as it is packed; None for all others.
        problem: why it cannot be read, or None.
        rotation: columns of an int8 weight that were rotated together; 0 for all others.
        part: (index, number of parts), where the file has several weights of equal rows as one.
    """

    tensor: Tensor
    companions: Mapping[str, Tensor]
    shape: tuple[int, ...]
    scheme: Scheme | None = None
    problem: str | None = None
    rotation: int = 0
    part: tuple[int, int] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes in the file, companions included; of a part its share."""
        whole = self.tensor.nbytes + sum(tensor.nbytes for tensor in self.companions.values())
        return whole // self.part[1] if self.part else whole

    @property
    def form(self) -> str:
        """The name of the form: "BF16", "F8_E4M3", "Q4_K", "packed 4 bit" or "int8_convrot"."""
        if self.tensor.dtype == int8.DTYPE:
            return int8.CONVROT if self.rotation else int8.TENSORWISE
        return f"packed {self.scheme}" if self.tensor.dtype == PACKED else self.tensor.dtype

    @property
    def files(self) -> set[Path]:
        """The files of the weight and its companions."""
        return {self.tensor.file, *(tensor.file for tensor in self.companions.values())}


@dataclass(frozen=True)
class Joined(Tensor):
    """A tensor stored in its file as several.

    Attributes:
        pieces: the stored tensors.
        axis: along which they are joined.
        stacked: whether that axis is new (stack) or one of theirs (concatenate).
    """

    pieces: tuple[Tensor, ...] = ()
    axis: int = 0
    stacked: bool = False


def join(tensors: Mapping[str, Tensor], rules: Mapping[str, Any]) -> dict[str, Tensor]:
    """A component's entries by canonical name, with those that its map joins made one."""
    whole = dict(tensors)
    for rule in rules.get("joined", ()):
        for name in tensors:
            stem = name.removesuffix(rule["of"][0])
            names = [stem + ending for ending in rule["of"]]
            if stem == name or not all(piece in tensors for piece in names):
                continue
            pieces = tuple(whole.pop(piece) for piece in names)
            axis, stacked, shape = rule["axis"], rule.get("stacked", False), list(pieces[0].shape)
            if stacked:
                shape.insert(axis, len(pieces))
            elif len(shape) > axis:
                shape[axis] = sum(piece.shape[axis] for piece in pieces if len(piece.shape) > axis)
            first = pieces[0]
            whole[stem + rule["as"]] = Joined(
                stem + rule["as"], first.dtype, tuple(shape), first.file, sum(piece.nbytes for piece in pieces),
                first.offset, pieces, axis, stacked,
            )  # fmt: skip
    return whole


def stored_weights(
    tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], rules: Mapping[str, Any]
) -> dict[str, Stored]:
    """Every weight of a component by canonical name, its companions gathered, and those stored as one split.

    Args:
        tensors: entries by canonical name.
        shapes: what the weights map expects, by canonical name; gives bits and group size of packed weights.
        rules: the weights map, which says what is stored as one (`split`).
    """
    stored = {}
    for name, tensor in tensors.items():
        path, _, last = name.rpartition(".")
        if last in COMPANIONS and f"{path}.weight" in tensors:
            continue
        places = {word: f"{path}.{word}" for word in COMPANIONS} if last == "weight" else {}
        companions = {word: tensors[place] for word, place in places.items() if place in tensors}
        parts = _parts(name, rules)
        expected = shapes.get(parts[0] if parts else name, tensor.shape)
        found = _gather(tensor, companions, expected)
        if parts and found.shape and found.shape[0] % len(parts) == 0 and tensors.keys().isdisjoint(parts):
            shape = (found.shape[0] // len(parts), *found.shape[1:])
            stored |= {part: replace(found, shape=shape, part=(n, len(parts))) for n, part in enumerate(parts)}
        else:
            stored[name] = found
    return stored


def _parts(name: str, rules: Mapping[str, Any]) -> list[str]:
    """The weights whose rows a tensor of that name has, one after another; [] if it is one weight."""
    for rule in rules.get("split", ()):
        if name.endswith(f".{rule['of']}"):
            return [name.removesuffix(rule["of"]) + ending for ending in rule["as"]]
    return []


def _gather(tensor: Tensor, companions: Mapping[str, Tensor], expected: tuple[int, ...]) -> Stored:
    if isinstance(tensor, Joined):
        problems = [found.problem for piece in tensor.pieces if (found := _gather(piece, {}, piece.shape)).problem]
        return Stored(tensor, {}, tensor.shape, problem=next(iter(problems), None))
    if tensor.container == "gguf":
        from .gguf_blocks import DECODED  # here: most checkpoints have no GGUF file

        scheme = _GGUF_SCHEMES.get(tensor.dtype) if len(tensor.shape) == 2 else None
        return Stored(tensor, {}, tensor.shape, scheme, None if tensor.dtype in DECODED else tensor.dtype)
    if tensor.dtype in FLOATS:
        return Stored(tensor, {}, tensor.shape)
    if tensor.dtype == int8.DTYPE:
        form = int8.form_of(tensor, companions)
        scales = {word: companions[word] for word in int8.SCALES if word in companions}
        return Stored(tensor, scales, tensor.shape, problem=form.problem, rotation=form.group)
    if tensor.dtype in FP8:
        scales = {word: companions[word] for word in ("weight_scale", "scale_weight") if word in companions}
        rows = tensor.shape[:1]
        odd = [word for word, scale in scales.items() if scale.shape not in ((), (1,), rows, (*rows, 1))]
        return Stored(
            tensor, scales, tensor.shape, problem=f"{odd[0]} of shape {scales[odd[0]].shape}" if odd else None
        )
    if tensor.dtype != PACKED or len(expected) != 2:
        return Stored(tensor, {}, tensor.shape, problem=tensor.dtype)
    if "scales" not in companions:
        return Stored(tensor, {}, tensor.shape, problem="packed, without scales")
    kept = {word: companions[word] for word in ("scales", "biases") if word in companions}
    if any(len(part.shape) != 2 or part.shape[0] != tensor.shape[0] for part in (tensor, *kept.values())):
        return Stored(tensor, kept, tensor.shape, problem="packed, in parts that do not belong together")
    bits, rest = divmod(32 * tensor.shape[1], expected[1])
    group, more = divmod(expected[1], kept["scales"].shape[1] or 1)
    if rest or more:
        return Stored(tensor, kept, tensor.shape, problem="packed, but not in whole bits and groups")
    scheme, problem = _scheme(bits, group, **kept)
    return Stored(tensor, kept, tensor.shape if problem else (tensor.shape[0], expected[1]), scheme, problem)


def _scheme(bits: int, group: int, scales: Tensor, biases: Tensor | None = None) -> tuple[Scheme | None, str | None]:
    """(scheme, None) of a packed weight, or (None, why MLX cannot use it)."""
    if biases is None:
        mode = _MODES.get((bits, group)) if scales.dtype == "U8" else None
        return (Scheme(mode, bits, group), None) if mode else (None, "packed without biases")
    if biases.shape != scales.shape or not {scales.dtype, biases.dtype} <= set(FLOATS):
        return None, "packed, with scales and biases that do not belong together"
    if bits not in _AFFINE_BITS or group not in _AFFINE_GROUPS:
        return None, f"packed in {bits} bits and groups of {group}"
    return Scheme("affine", bits, group), None


def _is_computed(tensor: Tensor) -> bool:
    """Whether a weight is computed from its file, not read by MLX as it is."""
    return isinstance(tensor, Joined) or tensor.container == "gguf"


@contextmanager
def reading(component: str) -> Iterator[None]:
    """Turns MLX's errors while a component's files are read into CheckpointError."""
    try:
        yield
    except RuntimeError as error:
        raise gpu_error(error) or CheckpointError(
            f"the {component}'s files could not be read while loading: they were changed or removed meanwhile, so "
            "start again"
        ) from error


class Reader:
    """Opens each file once and hands out its tensors; a tensor that was handed out is no longer held.

    A tensor of a file is evaluated by itself, before any operation uses it: otherwise the GPU would wait for the disk
    inside the operation, and macOS ends a process whose GPU waits for seconds.

    Args:
        component: named in the message when a file cannot be read.
    """

    def __init__(self, component: str):
        self._component = component
        self._files: dict[Path, LazyTensors] = {}
        self._read: dict[tuple[Path, str], mx.array] = {}
        self._wholes: dict[tuple[Path, str], tuple[mx.array | Packed, int]] = {}  # and how many parts are still to come

    def read(self, weights: Iterable[Stored]) -> None:
        """Reads several weights at once, for `open` to hand out.

        Raises:
            CheckpointError: a file cannot be read.
        """
        plain = [stored for stored in weights if not _is_computed(stored.tensor) and not self._holds(stored)]
        tensors = {(t.file, t.name): t for stored in plain for t in (stored.tensor, *stored.companions.values())}
        found = {place: self._lazy(tensor) for place, tensor in tensors.items() if place not in self._read}
        with reading(self._component):
            mx.eval(found)
        self._read |= found

    def _holds(self, stored: Stored) -> bool:
        """Whether it is a part of a weight that has been read."""
        return stored.part is not None and (stored.tensor.file, stored.tensor.name) in self._wholes

    def open(self, stored: Stored) -> mx.array | Packed:
        """A weight, packed if it is stored packed; in the file's layout and dtype, fp8 and int8 scaled, as fp32.

        Floats and packed weights are evaluated; what has to be computed from them is not.

        Raises:
            CheckpointError: its file cannot be read.
        """
        if stored.part is not None:
            return self._open_part(stored, *stored.part)
        if isinstance(stored.tensor, Joined):
            pieces = [self.open(Stored(piece, {}, piece.shape)) for piece in stored.tensor.pieces]
            pieces = [piece.dequantize() if isinstance(piece, Packed) else piece for piece in pieces]
            join = mx.stack if stored.tensor.stacked else mx.concatenate
            return join(pieces, axis=stored.tensor.axis)
        if stored.tensor.container == "gguf":
            from . import gguf_blocks  # here: most checkpoints have no GGUF file

            return gguf_blocks.packed(stored.tensor) or gguf_blocks.decode(stored.tensor)
        self.read([stored])
        companions = {word: self._read.pop((tensor.file, tensor.name)) for word, tensor in stored.companions.items()}
        array = self._read.pop((stored.tensor.file, stored.tensor.name))
        if stored.scheme is not None:
            scheme = stored.scheme
            return Packed(
                array, companions["scales"], companions.get("biases"), scheme.group_size, scheme.bits, scheme.mode
            )
        if stored.tensor.dtype == int8.DTYPE:
            (scale,) = companions.values()
            return int8.dense(array, scale, stored.rotation)
        if stored.tensor.dtype in FP8:
            array = array.astype(mx.float32) if array.dtype == mx.float16 else mx.from_fp8(array, dtype=mx.float32)
            for scale in companions.values():
                array = array * scale.astype(mx.float32).reshape(-1, *(1,) * (array.ndim - 1))
        return array

    def _open_part(self, stored: Stored, index: int, count: int) -> mx.array | Packed:
        """A part of what its file has as one, which is read once and held until its last part is handed out."""
        place, rows = (stored.tensor.file, stored.tensor.name), stored.shape[0]
        whole, left = self._wholes.pop(place, None) or (self.open(replace(stored, part=None)), count)
        if left > 1:
            self._wholes[place] = whole, left - 1
        if isinstance(whole, Packed):
            packed = whole.of_rows(index * rows, rows)
            mx.eval(packed.arrays)
            return packed
        part = mx.contiguous(whole[index * rows : (index + 1) * rows])  # a view would keep the whole
        mx.eval(part)
        return part

    def _lazy(self, tensor: Tensor) -> mx.array:
        try:
            if tensor.file not in self._files:
                self._files[tensor.file] = LazyTensors(tensor.file)
            return self._files[tensor.file].take(tensor)
        except (OSError, RuntimeError, ValueError, KeyError, CheckpointError) as error:
            raise CheckpointError(
                f"the {self._component}'s file {tensor.file} could not be opened: it was changed or removed meanwhile, "
                "so start again"
            ) from error
