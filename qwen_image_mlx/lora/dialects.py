"""What the names and shapes in a LoRA file mean: which module, which factor, which scale. Reads no weights.

The spellings are data, `weights_map/lora.json`: prefixes, suffixes by dialect, what is refused, and how other models'
files are known. A new dialect is a line there. Sources of the dialects: diffusers' loaders and its
`_convert_non_diffusers_qwen_lora_to_diffusers`, PEFT's state dicts, LyCORIS' modules, ComfyUI's key maps.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, some
from ..outside import why_not_read
from ..weights.mapping import weights_map
from ..weights.safetensors_files import Tensor

_PEFT_METADATA = "lora_adapter_metadata"
_PEFT_WEIGHTS, _PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
_MOST_SETTINGS = 4_000_000  # bytes
_DTYPES = ("F32", "F16", "BF16", "F64", "F8_E4M3", "F8_E5M2")
_ALPHA_DTYPES = (*_DTYPES, "I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64")

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]


@dataclass(frozen=True)
class Kind:
    """One way of writing a change of a weight.

    Attributes:
        name: what people call it.
        roles: the tensors it takes; of each entry, the first alternative that is complete.
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


@dataclass(frozen=True)
class PeftConfig:
    """The settings of PEFT that a scale follows from.

    Source: `update_layer` of PEFT's LoraLayer, LoHaLayer and LoKrLayer, `get_pattern_key` of peft.utils.
    """

    rank: int
    alpha: float
    ranks: tuple[tuple[re.Pattern[str], Any], ...] = ()
    alphas: tuple[tuple[re.Pattern[str], Any], ...] = ()
    rank_stabilized: bool = False
    decomposed: bool = False

    def rank_of(self, target: str) -> int:
        """The rank of a target: the first pattern that fits the end of its name, else the common one."""
        return next((rank for pattern, rank in self.ranks if pattern.match(target)), self.rank)

    def scale_of(self, target: str) -> float:
        """alpha / rank, or alpha / sqrt(rank) for rank-stabilized LoRA."""
        alpha = next((alpha for pattern, alpha in self.alphas if pattern.match(target)), self.alpha)
        rank = self.rank_of(target)
        return alpha / (math.sqrt(rank) if self.rank_stabilized else rank)


@dataclass(frozen=True)
class Binding:
    """A file's tensors by what they belong to.

    Attributes:
        tensors: target -> role -> tensor.
        dialects: the dialects of the names that were bound, most frequent first.
        unmatched: names that belong to no target.
    """

    tensors: Mapping[str, Mapping[str, Tensor]]
    dialects: tuple[str, ...]
    unmatched: tuple[str, ...]


_BIAS_ROLES = ("up_bias", "bias_difference")


def bind(path: Path, tensors: Mapping[str, Tensor], targets: Shapes) -> Binding:
    """Finds the target and the role of every tensor of a file.

    Raises:
        CheckpointError: nothing binds, the file was made for another model, it says something twice, or it uses a
            method that is not read.
    """
    pieces = _pieces(targets)
    flat = {place.replace(".", "_"): place for place in pieces}
    bound: dict[str, dict[str, Tensor]] = {}
    counts: dict[str, int] = {}
    unmatched = []
    for name, tensor in tensors.items():
        for place, suffix in _readings(name, pieces, flat):
            _refuse(path, name, suffix)
            if meaning := _meaning(suffix):
                dialect, role = meaning
                if role in _BIAS_ROLES and len(targets[pieces[place][0]]) == 1:
                    continue  # norms have no bias
                for target, part in _parts(path, place, pieces[place], role, tensor, targets):
                    twin = bound.setdefault(target, {}).setdefault(role, part)
                    if twin is not part:
                        raise CheckpointError(
                            f"{path} gives {target} twice, as {twin.name} and {name}: "
                            "split its adapters into files of their own"
                        )
                if role != "alpha":  # every dialect spells it so
                    counts[dialect] = counts.get(dialect, 0) + 1
                break
        else:
            unmatched.append(name)
    for target in [target for target, roles in bound.items() if roles.keys() == {"alpha"}]:
        unmatched.append(bound.pop(target)["alpha"].name)  # harmless: nothing to scale
    _check_model(path, list(tensors), unmatched, len(targets))
    return Binding(bound, tuple(sorted(counts, key=lambda dialect: -counts[dialect])), tuple(unmatched))


def _pieces(targets: Shapes) -> dict[str, tuple[str, ...]]:
    """A module a file may name -> the targets its rows belong to: itself, or those some tools lay one upon another."""
    pieces = {target: (target,) for target in targets}
    for fused, parts in weights_map("lora")["fused"].items():
        for target in targets:
            if target.endswith(f".{parts[0]}"):
                stem = target.removesuffix(parts[0])
                if all(f"{stem}{part}" in targets for part in parts):
                    pieces.setdefault(f"{stem}{fused}", tuple(f"{stem}{part}" for part in parts))
    return pieces


@dataclass(frozen=True)
class Rows(Tensor):
    """Some rows of a tensor.

    Attributes:
        first: the first of them; `shape` says how many.
    """

    first: int = 0


# Roles whose rows are the module's outputs; all others are the same for each part of a fused module.
_BY_ROW = ("up", "up_bias", "hada_w1_a", "hada_w2_a", "magnitude", "difference", "bias_difference", "replacement")


def _parts(
    path: Path, place: str, pieces: tuple[str, ...], role: str, tensor: Tensor, targets: Shapes
) -> Iterator[tuple[str, Tensor]]:
    """(target, what of a tensor belongs to it), 1x1 convolutions as matrices."""
    if len(tensor.shape) > 2 and set(tensor.shape[2:]) == {1} and role != "alpha":
        tensor = replace(tensor, shape=tensor.shape[:2])
    if len(pieces) == 1:
        yield pieces[0], tensor
        return
    if role.startswith("lokr"):
        raise CheckpointError(
            f"{path} has a LoKr for {place}, {len(pieces)} matrices in one ({tensor.name}): save it for each of them"
        )
    total, first = sum(targets[target][0] for target in pieces), 0
    for target in pieces:
        rows = targets[target][0]
        part = tensor
        if role in _BY_ROW and tensor.shape[:1] == (total,):
            own = {field.name: getattr(tensor, field.name) for field in fields(Tensor)}
            part = Rows(**own | {"shape": (rows, *tensor.shape[1:])}, first=first)
        yield target, part
        first += rows


def _readings(name: str, places: Mapping[str, Any], flat: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Every (module, suffix) that a name can be read as."""
    spellings = weights_map("lora")
    for wrapper in spellings["wrappers"]:
        name = f".{name}".replace(f".{wrapper}.", ".").replace(f"{wrapper}_", "")[1:]
    bare = _without(name, spellings["prefixes"])
    parts = bare.split(".")
    for end in range(len(parts) - 1, 0, -1):
        if (place := ".".join(parts[:end])) in places:
            yield place, ".".join(parts[end:])
    if name.startswith(tuple(spellings["flattened_prefixes"])):
        module, _, suffix = _without(name, spellings["flattened_prefixes"]).partition(".")
        if module in flat:
            yield flat[module], suffix


def _without(name: str, prefixes: Iterable[str]) -> str:
    """A name without any of some prefixes, in whatever order programs put them before one another."""
    while prefix := next((prefix for prefix in prefixes if name.startswith(prefix)), None):
        name = name[len(prefix) :]
    return name


@cache
def _meaning(suffix: str) -> tuple[str, str] | None:
    """(dialect, role) of what follows a module's name."""
    for dialect, roles in weights_map("lora")["dialects"].items():
        for pattern, role in roles.items():
            if _wildcard(pattern).fullmatch(suffix):
                return dialect, role
    return None


@cache
def _wildcard(pattern: str) -> re.Pattern[str]:
    return re.compile(re.escape(pattern).replace(r"\*", ".+"))


def _refuse(path: Path, name: str, suffix: str) -> None:
    for method, patterns in weights_map("lora")["refused"].items():
        if any(_wildcard(pattern).fullmatch(suffix) for pattern in patterns):
            raise CheckpointError(
                f"{path} uses {method} ({name}): LoRA, LoHa, LoKr, DoRA and full differences are read, "
                "so convert it to one of them"
            )


def _check_model(path: Path, names: list[str], unmatched: list[str], targets: int) -> None:
    """Refuses a file that does not fit the model, saying which model it seems to be for."""
    rules = weights_map("lora")
    encoders = re.compile(rules["text_encoders"])
    foreign = [name for name in unmatched if not encoders.search(name)]
    hits = ((model, name) for pattern, model in rules["other_models"] for name in foreign if re.search(pattern, name))
    model, sample = next(hits, (None, None))
    if len(unmatched) < len(names):
        if model:  # blocks of another model are often named, and sometimes shaped, like ours
            raise CheckpointError(
                f"{path} was made for {model}, although some of its names fit: it also has {sample}; "
                "use a LoRA made for Qwen-Image"
            )
        return
    if not names:
        raise CheckpointError(f"{path} holds no tensors: give a LoRA that was saved with some")
    shown = f"none of its {len(names)} tensors belongs to one of the {targets} modules ({some(names)})"
    if model:
        raise CheckpointError(f"{path} was made for {model}: {shown}; use a LoRA made for Qwen-Image")
    if not foreign:
        raise CheckpointError(
            f"{path} changes only a text encoder: {shown}; Qwen-Image takes LoRAs of its transformer alone"
        )
    if not any(re.search(r"lora|lokr|hada|\.diff|\.alpha$|dora_scale", name) for name in names):
        raise CheckpointError(f"{path} is not a LoRA: {shown}; a whole model is loaded with --model")
    raise CheckpointError(f"{path} was made for another model: {shown}; use a LoRA made for Qwen-Image")


# --- shapes ----------------------------------------------------------------------------------------------------------


def _first_misfit(shapes: Shapes, wanted: Iterable[tuple[str, str, Callable[[Shape], bool]]]) -> tuple[str, str] | None:
    return next(((role, shape) for role, shape, fits in wanted if role in shapes and not fits(shapes[role])), None)


def _pair_misfit(first: str, second: str) -> Callable[[Shapes, Shape], tuple[str, str] | None]:
    """(out, r) @ (r, in) has to have the target's shape."""

    def misfit(shapes: Shapes, target: Shape) -> tuple[str, str] | None:
        out, width = target
        rank = shapes[second][0] if shapes[second] else 0
        wanted = [
            (second, f"(rank, {width})", lambda s: len(s) == 2 and s[0] > 0 and s[1] == width),
            (first, f"({out}, {rank})", lambda s: s == (out, rank)),
        ]
        return _first_misfit(shapes, wanted)

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
    wanted = [
        ("alpha", single, lambda s: math.prod(s) == 1),
        ("up_bias", f"({out},)", lambda s: s == (out,)),
        ("bias_difference", f"({out},)", lambda s: s == (out,)),
        ("difference", str(shape), lambda s: s == shape),
        ("replacement", str(shape), lambda s: s == shape),
        ("magnitude", f"({out},), ({out}, 1) or (1, {shape[-1]})", lambda s: s in ((out,), (out, 1), (1, shape[-1]))),
    ]
    if misfit := _first_misfit(shapes, wanted):
        _raise_misfit(path, target, tensors[misfit[0]], misfit[1])
    return found[0] if found else None


def _raise_misfit(path: Path, target: str, tensor: Tensor, wanted: str) -> None:
    raise CheckpointError(
        f"{path} does not fit {target}: {tensor.name} should have {wanted} and has {tensor.shape}; "
        "use a LoRA made for this model"
    )


def check_dtypes(path: Path, tensors: Mapping[str, Tensor], binding: Binding) -> None:
    """Raises CheckpointError for a tensor stored in a type that is not read."""
    roles = {tensor.name: role for found in binding.tensors.values() for role, tensor in found.items()}
    for name, tensor in tensors.items():
        role = roles.get(name)  # what belongs to no module is never read
        if role is not None and tensor.dtype not in (_ALPHA_DTYPES if role == "alpha" else _DTYPES):
            raise CheckpointError(
                f"{path} stores {name} as {tensor.dtype}: {', '.join(_DTYPES)} are read, so save it as one of them"
            )


# --- PEFT's settings -------------------------------------------------------------------------------------------------


def peft_config(path: Path, metadata: Mapping[str, str]) -> PeftConfig | None:
    """PEFT's settings: those diffusers writes into the file's header, else the adapter_config.json PEFT writes beside.

    Raises:
        CheckpointError: they cannot be read, or miss what a scale follows from.
    """
    if _PEFT_METADATA in metadata:
        settings = _json_object(f"the {_PEFT_METADATA} of {path}", metadata[_PEFT_METADATA])
        own = {key.removeprefix("transformer."): value for key, value in settings.items() if _is_transformer(key)}
        # `save_lora_adapter` writes the settings of one model, `save_lora_weights` those of each by its name.
        settings = own or {key: value for key, value in settings.items() if "." not in key}
        where = f"the {_PEFT_METADATA} of {path}"
    elif path.name == _PEFT_WEIGHTS and (beside := path.with_name(_PEFT_CONFIG)).is_file():
        try:
            if why := why_not_read(beside, _MOST_SETTINGS):
                raise CheckpointError(f"{beside} cannot be read, {why}: remove it, or save the LoRA again")
            settings = _json_object(str(beside), beside.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{beside} cannot be read ({error}): download it again") from error
        where = str(beside)
    else:
        return None
    return _config(where, settings) if settings else None


def _is_transformer(key: str) -> bool:
    return key.startswith("transformer.")


def _json_object(where: str, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is not JSON ({error}): save the LoRA again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{where} is not a JSON object: save the LoRA again")
    return value


def _config(where: str, settings: Mapping[str, Any]) -> PeftConfig:
    rank = settings.get("r")
    alpha = settings.get("lora_alpha", settings.get("alpha"))  # LoHa's and LoKr's word is alpha
    if not _is_positive_int(rank):
        raise CheckpointError(f"{where} gives the rank r as {rank!r:.80}, not a whole number above 0: correct it")
    if not _is_number(alpha):
        raise CheckpointError(f"{where} gives lora_alpha as {alpha!r:.80}, not a number: correct it")
    return PeftConfig(
        rank,
        alpha,
        _patterns(where, "rank_pattern", settings, _is_positive_int),
        _patterns(where, "alpha_pattern", settings, _is_number),
        bool(settings.get("use_rslora")),
        bool(settings.get("use_dora")),
    )


# What a file's pattern may be made of, so that matching it takes no time to speak of: nothing repeats what repeats.
_PATTERN = re.compile(r"\^?(?:(?:\\[.d_-]|[\w.-]|\[[\w.-]+\])[*+?]?|\((?:\?:)?[\w.|-]+\))*\$?")
_PATTERN_LENGTH, _REPEATING = 200, 16
_REPEATS = re.compile(r"(?<!\()[*+?]")


def _patterns(
    where: str, field: str, settings: Mapping[str, Any], fits: Callable[[Any], bool]
) -> tuple[tuple[re.Pattern[str], Any], ...]:
    patterns = settings.get(field) or {}
    if not isinstance(patterns, dict) or not all(fits(value) for value in patterns.values()):
        raise CheckpointError(f"{where} has a {field} that does not map names to numbers: correct it")
    for pattern in patterns:
        if len(pattern) > _PATTERN_LENGTH or not _PATTERN.fullmatch(pattern) or len(_REPEATS.findall(pattern)) > 2:
            raise CheckpointError(
                f"{where} has an impossible pattern in {field}, {pattern!r:.80}: names may have '.', '\\.', '\\d', "
                "[a-z], (a|b) and at most two of * + ?"
            )
    if sum(bool(_REPEATS.search(pattern)) for pattern in patterns) > _REPEATING:
        raise CheckpointError(f"{where} has more than {_REPEATING} patterns with * + ? in {field}: write names instead")
    try:
        return tuple((re.compile(rf"(.*\.)?({pattern})$"), value) for pattern, value in patterns.items())
    except re.error as error:
        raise CheckpointError(f"{where} has an impossible pattern in {field} ({error}): correct it") from error


def _is_positive_int(value: Any) -> bool:
    return type(value) is int and value > 0


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)
