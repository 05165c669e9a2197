"""The kinds of factors a LoRA file may have (LoRA, LoHa, LoKr) and the shapes they must have. Reads no weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import CheckpointError
from ..weights.safetensors_files import Tensor

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]


@dataclass(frozen=True)
class Kind:
    """One way of writing a change of a weight.

    Attributes:
        name: for messages.
        roles: the tensors it needs; for each entry, the first complete alternative.
        misfit: given the shapes by role and the target's shape, (role, what its shape has to be) of the first tensor
            that does not fit, or None.
        rank: the number that alpha is divided by, from the shapes; None where alpha does not count.
    """

    name: str
    roles: tuple[tuple[tuple[str, ...], ...], ...]
    misfit: Callable[[Shapes, Shape], tuple[str, str] | None]
    rank: Callable[[Shapes], int | None]

    @property
    def known(self) -> set[str]:
        """All roles that belong to this kind."""
        return {role for alternatives in self.roles for roles in alternatives for role in roles}


# --- shapes ----------------------------------------------------------------------------------------------------------


def _first_misfit(
    shapes: Shapes, expected: Iterable[tuple[str, str, Callable[[Shape], bool]]]
) -> tuple[str, str] | None:
    return next(((role, shape) for role, shape, fits in expected if role in shapes and not fits(shapes[role])), None)


def _pair_misfit(first: str, second: str) -> Callable[[Shapes, Shape], tuple[str, str] | None]:
    """(out, r) @ (r, in) has to have the target's shape."""

    def misfit(shapes: Shapes, target: Shape) -> tuple[str, str] | None:
        out, width = target
        rank = shapes[second][0] if shapes[second] else 0
        expected = [
            (second, f"(rank, {width})", lambda s: len(s) == 2 and s[0] > 0 and s[1] == width),
            (first, f"({out}, {rank})", lambda s: s == (out, rank)),
        ]
        return _first_misfit(shapes, expected)

    return misfit


def _loha_misfit(shapes: Shapes, target: Shape) -> tuple[str, str] | None:
    pairs = (_pair_misfit(f"hada_w{n}_a", f"hada_w{n}_b") for n in (1, 2))
    return next((found for pair in pairs if (found := pair(shapes, target))), None)


def _lokr_misfit(shapes: Shapes, target: Shape) -> tuple[str, str] | None:
    for role, shape in shapes.items():
        if len(shape) != 2 or 0 in shape:
            return role, "two dimensions"
    sides = []
    for side in ("lokr_w1", "lokr_w2"):
        if side in shapes:
            sides.append(shapes[side])
            continue
        left, right = shapes[f"{side}_a"], shapes[f"{side}_b"]
        if left[1] != right[0]:
            return f"{side}_a", f"({left[0]}, {right[0]})"
        sides.append((left[0], right[1]))
    (a, c), (b, d) = sides
    if (a * b, c * d) != target:
        role = "lokr_w2" if "lokr_w2" in shapes else "lokr_w2_a"
        return role, f"factors of {target}, which with ({a}, {c}) is not what it has"
    return None


def _lokr_rank(shapes: Shapes) -> int | None:
    """Full factors take no alpha; of two factored sides the second counts. Source: LyCORIS, ComfyUI's LoKrAdapter."""
    return next((shapes[role][0] for role in ("lokr_w2_b", "lokr_w1_b") if role in shapes), None)


def _lokr_side(side: str) -> tuple[tuple[str, ...], ...]:
    return ((side,), (f"{side}_a", f"{side}_b"))


KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind("LoRA", ((("up", "down"),),), _pair_misfit("up", "down"), lambda shapes: shapes["down"][0]),
        Kind(
            "LoHa",
            ((("hada_w1_a", "hada_w1_b"),), (("hada_w2_a", "hada_w2_b"),)),
            _loha_misfit,
            lambda shapes: shapes["hada_w1_b"][0],
        ),
        Kind("LoKr", (_lokr_side("lokr_w1"), _lokr_side("lokr_w2")), _lokr_misfit, _lokr_rank),
    )
}


def factored_kind(path: Path, target: str, shape: Shape, tensors: Mapping[str, Tensor]) -> str | None:
    """The kind that a target's factors make up, None without factors; checks that all its tensors fit.

    Raises:
        CheckpointError: names the target, what was expected and what was found.
    """
    shapes = {role: tensor.shape for role, tensor in tensors.items()}
    found = []
    for kind in KINDS.values():
        own = {role: shapes[role] for role in shapes if role in kind.known}
        if not own:
            continue
        for alternatives in kind.roles:
            if not any(set(roles) <= own.keys() for roles in alternatives):
                absent = [role for role in alternatives[-1] if role not in own]
                present = next(tensor.name for role, tensor in tensors.items() if role in kind.known)
                raise CheckpointError(
                    f"{path} has half a {kind.name} for {target}: {present} without its {' and '.join(absent)}; "
                    "save it again with both"
                )
        if len(shape) != 2:
            raise CheckpointError(
                f"{path} has a {kind.name} for {target}, which is a vector of {shape[0]}: only .diff can change it"
            )
        if misfit := kind.misfit(own, shape):
            _raise_misfit(path, target, tensors[misfit[0]], misfit[1])
        found.append(kind.name)
    if len(found) > 1:
        raise CheckpointError(f"{path} gives {target} twice, as {' and as '.join(found)}: split it into two files")
    if "magnitude" in shapes and not found:
        raise CheckpointError(
            f"{path} has half a DoRA for {target}: {tensors['magnitude'].name} without its factors; save it again with "
            "both"
        )
    out = shape[0]
    single = "one number"
    expected = [
        ("alpha", single, lambda s: math.prod(s) == 1),
        ("up_bias", f"({out},)", lambda s: s == (out,)),
        ("bias_difference", f"({out},)", lambda s: s == (out,)),
        ("difference", str(shape), lambda s: s == shape),
        ("replacement", str(shape), lambda s: s == shape),
        ("magnitude", f"({out},), ({out}, 1) or (1, {shape[-1]})", lambda s: s in ((out,), (out, 1), (1, shape[-1]))),
    ]
    if misfit := _first_misfit(shapes, expected):
        _raise_misfit(path, target, tensors[misfit[0]], misfit[1])
    return found[0] if found else None


def _raise_misfit(path: Path, target: str, tensor: Tensor, expected: str) -> None:
    raise CheckpointError(
        f"{path} does not fit {target}: {tensor.name} should have {expected} and has {tensor.shape}; "
        "use a LoRA made for this model"
    )
