"""Writes the generated parts of the documentation: `python scripts/make_docs.py`.

A generated part stands between `<!-- generated: NAME -->` and `<!-- end -->` in README.md or docs/*.md. `PARTS` says
which function makes which part: flags come from the parser, settings from the table of options, the Python reference
from docstrings, memory figures from the planner, modelled seconds from benchmarks/README.md. `--check` writes nothing
and exits with 1 if a part is out of date. Takes about 20 seconds; needs no model and no network.
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

MARKED = re.compile(r"(<!-- generated: (.+?) -->\n).*?(<!-- end -->)", re.DOTALL)
OUR_FLAG = r"(edit )?--[a-z][\w-]+( ([A-Z0-9][\w./-]*|auto))*"  # with its values: "--lora FILE STRENGTH"
GB = 10**9


class Mac(NamedTuple):
    """A Mac of the memory tables.

    Attributes:
        gib: its memory in GiB, as Apple sells it.
        working_set: GB that Metal recommends (`max_recommended_working_set_size`) on such a machine.
        chip: whose seconds the benchmarks model; "" leaves the Mac out of the table of recommendations.
        bits: the quantization recommended for it; "" is bf16.
    """

    gib: int
    working_set: float
    chip: str = ""
    bits: str = ""


MACS = (
    Mac(8, 5.73, "M1, 8 cores", "4"),
    Mac(16, 11.45, "M4", "4"),
    Mac(18, 13.36),
    Mac(24, 17.18, "M4", "4"),
    Mac(32, 22.9, "M5", "8"),
    Mac(36, 28.99, "M4 Max", "8"),
    Mac(48, 38.65, "M4 Max", "8"),
    Mac(64, 51.54, "M1 Max", ""),
    Mac(96, 77.31),
    Mac(128, 103.08, "M5 Max", ""),
)
QUANTIZATIONS = ("", "8", "4")
SIDE, STEPS = 1328, 50
FAST_SIDE, FAST_STEPS = 1024, 8

# What docs/python.md describes, in its order; methods of QwenImagePipeline first.
METHODS = (
    "from_pretrained", "generate", "edit", "decompose", "caption_image", "encode_guidance_prompts",
    "encode_initial_image", "encode_controls", "open_controls", "generate_pixels", "output_size", "prepare",
    "set_loras", "release_text_encoder", "release_tokenizer", "release_encoders", "release_transformer", "release_vae",
    "reload_text_encoder",
    "reload_tokenizer", "is_text_encoder_loaded", "is_tokenizer_loaded", "is_transformer_loaded", "is_vae_loaded",
)  # fmt: skip
CLASSES = {
    "GenerationParameters": (), "GuidanceEncoding": ("save", "load"), "InitialImage": (), "Control": (),
    "Progress": ("cancel",), "LayeredResult": ("layers", "prompt", "psnr", "composite", "save"),
    "Quantization": ("parse",), "Preview": (),
    "HubSnapshot": (),
}  # fmt: skip
FUNCTIONS = (
    "compose",
    "to_images",
    "ignore_profiles",
    "pack_multi_layer_latents",
    "unpack_multi_layer_latents",
)
ERRORS = ("QwenImageError", "RequestError", "CheckpointError", "HubError", "OutputError", "GPUError", "Cancelled")


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table; pipes within cells are escaped."""

    def line(cells: tuple[str, ...]) -> str:
        return "| " + " | ".join(cell.replace("|", r"\|").replace("\n", " ").strip() for cell in cells) + " |"

    return "\n".join([line(head), "|" + "---|" * len(head), *map(line, rows)])


# Command line -----------------------------------------------------------------------------------------------------


def command(name: str) -> str:
    """The description, arguments and flags of a command, from its parser; `lora inspect` is one of `lora`'s."""
    from qwen_image_mlx.cli.main import build_parser

    parser: argparse.ArgumentParser = build_parser()
    for word in name.split():
        parser = _below(parser)[word]
    found = []
    if summary := " ".join((parser.description or "").split("\n\n")[0].split()):
        found.append(summary)
    for group in parser._action_groups:
        rows = [_row(action) for action in group._group_actions if action.dest != "help"]
        if rows:
            title = {"positional arguments": "argument", "options": "flag"}.get(group.title or "", group.title or "")
            found.append(table((title, "meaning", "default"), rows))
    return "\n\n".join(found)


def _below(parser: argparse.ArgumentParser) -> dict[str, Any]:
    choices: dict[str, Any] = {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            choices |= action.choices
    return choices


def _row(action: argparse.Action) -> tuple[str, ...]:
    meaning = (action.help or "") % vars(action)
    usual = ""
    if match := re.fullmatch(r"(.*?) ?\(default: (.*)\)", meaning, re.DOTALL):
        meaning, usual = match.groups()
    value = action.metavar if isinstance(action.metavar, str) else None
    if isinstance(action, argparse._SubParsersAction):
        return f"`{value}`", ", ".join(action.choices), ""
    if not value and action.nargs != 0:
        value = "|".join(map(str, action.choices)) if action.choices else action.dest.upper()
    names = [f"`{flag}`" for flag in action.option_strings] or [f"`{value}`"]
    if action.option_strings and action.nargs != 0:
        names[-1] = f"{names[-1][:-1]} {value}`"
    return ", ".join(names), meaning, usual


def settings() -> str:
    """The settings of config.toml."""
    from qwen_image_mlx.settings import SCHEMA

    rows = [(f"`{row.key}`", row.help, row.kind.allowed, row.usual) for row in SCHEMA]
    return table(("setting", "meaning", "must be", "if it is not set"), rows)


def short_names() -> str:
    """The short names of released models, a model a row."""
    from qwen_image_mlx.variants import MODEL_ALIASES

    names: dict[str, list[str]] = {}
    for alias, model in MODEL_ALIASES.items():
        names.setdefault(model, []).append(f"`{alias}`")
    return table(("model", "short names"), [(f"`{model}`", ", ".join(found)) for model, found in names.items()])


def foreign() -> str:
    """Flags of other programs and what is given here, as the command line answers them."""
    from qwen_image_mlx.cli.foreign import FOREIGN

    def here(ours: str) -> str:
        words = re.sub("^nothing: ", "leave it out: ", ours).split("`")  # every second part is code already
        ours_marked = (re.sub(OUR_FLAG, r"`\g<0>`", part) if n % 2 == 0 else part for n, part in enumerate(words))
        return "`".join(ours_marked)

    return table(("their flag", "here"), [(f"`{flag}`", here(ours)) for flag, ours in FOREIGN.items()])


# Python -----------------------------------------------------------------------------------------------------------


def reference() -> str:
    """The public names with their signatures and docstrings."""
    import qwen_image_mlx

    pipeline = qwen_image_mlx.QwenImagePipeline
    found = ["### QwenImagePipeline", prose(inspect.getdoc(pipeline) or "")]
    found += [part for name in METHODS for part in _member(pipeline, name)]
    for name, members in CLASSES.items():
        kind = getattr(qwen_image_mlx, name)
        found += [f"### {name}", _signature(name, kind), prose(inspect.getdoc(kind) or "")]
        found += [part for member in members for part in _member(kind, member)]
    for name in FUNCTIONS:
        function = getattr(qwen_image_mlx, name)
        found += [f"### {name}", _signature(name, function), prose(inspect.getdoc(function) or "")]
    errors = [(f"`{name}`", inspect.getdoc(getattr(qwen_image_mlx, name)) or "") for name in ERRORS]
    found += ["### Errors", table(("error", "raised when"), [(name, doc.split("\n\n")[0]) for name, doc in errors])]
    return "\n\n".join(part for part in found if part)


def _member(kind: type, name: str) -> list[str]:
    member = inspect.getattr_static(kind, name)
    doc = inspect.getdoc(getattr(kind, name)) or ""
    title = f"#### {name}"
    if isinstance(member, property):
        return [title, f"A property. {prose(doc)}"]
    return [title, _signature(name, getattr(kind, name)), prose(doc)]


def _signature(name: str, function: Callable[..., Any]) -> str:
    """A signature as code, one argument per line if it is long."""
    signature = inspect.signature(function)
    parameters = [p for p in signature.parameters.values() if p.name not in ("self", "cls")]
    words, starred = [], False
    for parameter in parameters:
        if parameter.kind is parameter.KEYWORD_ONLY and not starred:
            words, starred = [*words, "*"], True
        starred = starred or parameter.kind is parameter.VAR_POSITIONAL
        words.append(_parameter(parameter))
    returned = signature.return_annotation
    arrow = "" if returned in (signature.empty, None, "None") or inspect.isclass(function) else f" -> {returned}"
    line = f"{name}({', '.join(words)}){arrow}"
    if len(line) > 100:
        line = "\n".join([f"{name}(", *(f"    {word}," for word in words), f"){arrow}"])
    return f"```py\n{line}\n```"


def _parameter(parameter: inspect.Parameter) -> str:
    star = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
    kind = parameter.annotation
    text = star + parameter.name
    if kind is not parameter.empty:
        text += f": {kind if isinstance(kind, str) else kind.__name__}"
    if parameter.default is not parameter.empty:
        default = repr(parameter.default)
        text += f" = {'...' if ' object at 0x' in default or default.startswith('<') else default}"
    return text


def prose(doc: str) -> str:
    """A docstring in Google's form as Markdown: sections become bold words with lists."""
    parts = []
    for block in doc.split("\n\n"):
        head, _, rest = block.partition("\n")
        if re.fullmatch(r"(Args|Attributes|Raises|Returns|Yields):", head):
            lines = inspect.cleandoc(rest).split("\n")
            parts.append(f"**{head}**\n\n" + _list(lines))
        else:
            parts.append(" ".join(line.strip() for line in block.split("\n")))
    return "\n\n".join(parts)


def _list(lines: list[str]) -> str:
    items: list[str] = []
    for line in lines:
        if items and not re.match(r"[\w*][\w*, ]*: ", line):
            items[-1] += f" {line.strip()}"
        else:
            name, colon, rest = line.partition(": ")
            items.append(f"- `{name}`: {rest}" if colon and re.fullmatch(r"[\w*, ]+", name) else f"- {line}")
    return "\n".join(items)


# Memory -----------------------------------------------------------------------------------------------------------


@contextmanager
def on(mac: Mac) -> Iterator[int]:
    """Meanwhile plans are made as on a Mac; gives the bytes that may be used."""
    import mlx.core as mx

    from qwen_image_mlx.pipeline.limits import usable_memory
    from qwen_image_mlx.runtime import memory_plan

    facts = {"memory_size": mac.gib << 30, "max_recommended_working_set_size": int(mac.working_set * GB)}
    with ExitStack() as patched:
        enter = patched.enter_context
        enter(patch.object(mx.metal, "is_available", lambda: True))
        enter(patch.object(mx, "device_info", lambda device=None: facts if device == mx.gpu else {}))
        enter(patch.object(memory_plan, "backend", lambda: "gpu"))
        yield usable_memory()


@cache
def _components(bits: str) -> Any:
    """Components of Qwen-Image-2512 by its configs alone."""
    from qwen_image_mlx import QwenImagePipeline
    from qwen_image_mlx.weights.synthetic import FULL, write_configs

    folder = Path(tempfile.mkdtemp(prefix="make-docs-"))
    write_configs(folder, FULL)
    return QwenImagePipeline.from_pretrained(folder, quantize=bits or None).components


@cache
def _plans(mac: Mac, bits: str, side: int = SIDE, steps: int = STEPS) -> tuple[int, Any, float]:
    """(bytes that may be used, the plan that --memory auto takes, GB read again in each step)."""
    from qwen_image_mlx.runtime.memory import alternatives
    from qwen_image_mlx.runtime.memory_plan import Work

    with on(mac) as budget:
        plans = alternatives(_components(bits), Work(width=side, height=side, steps=steps), budget)
    chosen = next(plan for plan in plans if plan.peak <= budget)
    held = {plan.residency.name: plan.stages[2].resident for plan in plans}
    streams = "transformer" in chosen.residency.streamed
    return budget, chosen, (held["staged"] - held[chosen.residency.name]) / GB if streams else 0.0


def memory() -> str:
    """What --memory auto chooses, by Mac and quantization."""
    rows = []
    for mac in MACS:
        cells = []
        for bits in QUANTIZATIONS:
            budget, plan, _ = _plans(mac, bits)
            cells.append(f"{plan.residency.name} {plan.peak / GB:.1f}{' (saved)' if plan.needs_pack else ''}")
        rows.append((f"{mac.gib} GB", f"{budget / GB:.1f}", *cells))
    return table(("Mac", "may be used, GB", "bf16", "`--quantize 8`", "`--quantize 4`"), rows)


def macs() -> str:
    """One recommendation for each Mac, with modelled minutes."""
    rows = []
    for mac in (mac for mac in MACS if mac.chip):
        _, plan, read = _plans(mac, mac.bits)
        slow, fast = (_seconds(f"{SIDE}x{SIDE} guided")[mac.chip], _seconds(f"{FAST_SIDE}x{FAST_SIDE}")[mac.chip])
        weights = f"{mac.bits} bits" + (", saved" if plan.needs_pack else "") if mac.bits else "bf16"
        rows.append((
            f"{mac.gib} GB", weights, plan.residency.name, f"{plan.peak / GB:.1f}", f"{read:.1f}" if read else "",
            mac.chip, _minutes(STEPS * slow), _minutes(FAST_STEPS * fast),
        ))  # fmt: skip
    head = (
        "Mac", "weights", "`--memory`", "peak GB", "GB read each step", "chip", f"{SIDE}x{SIDE}, {STEPS} guided steps",
        f"{FAST_SIDE}x{FAST_SIDE}, `--lightning {FAST_STEPS}`",
    )  # fmt: skip
    return table(head, rows)


def short_macs() -> str:
    """The same in four columns."""
    rows = []
    for mac in (mac for mac in MACS if mac.chip):
        _, plan, _ = _plans(mac, mac.bits)
        fast = _minutes(FAST_STEPS * _seconds(f"{FAST_SIDE}x{FAST_SIDE}")[mac.chip])
        flags = f"`quantize` to {mac.bits} bits first" if plan.needs_pack else f"`--quantize {mac.bits}`"
        rows.append((f"{mac.gib} GB", flags if mac.bits else "as it is (bf16)", f"`--memory {_memory_flag(plan)}`",
                     f"{plan.peak / GB:.1f} GB", f"{fast} ({mac.chip})"))  # fmt: skip
    return table(
        ("Mac", "weights of Qwen-Image-2512", "flag", "peak memory, 1328x1328", "8-step image, 1024x1024, modelled"),
        rows,
    )


def _memory_flag(plan: Any) -> str:
    return "auto" if "," in plan.residency.name else str(plan.residency.name)


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


@cache
def _seconds(row: str) -> dict[str, float]:
    """Modelled seconds of a step, by chip, from the table in benchmarks/README.md."""
    text = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    lines = text.split("Seconds of a step of 60 blocks (modelled, within 30%):")[1].strip().split("\n")
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    values = next(found for found in cells if found[0] == row)
    return dict(zip(cells[0][1:], map(float, values[1:]), strict=True))


# All parts --------------------------------------------------------------------------------------------------------

COMMANDS = (
    "generate", "edit", "decompose", "compose", "caption", "train", "quantize", "lora inspect", "plan", "info",
    "config show", "config init", "config path", "serve", "doctor", "completion",
)  # fmt: skip
PARTS: dict[str, Callable[[], str]] = {
    **{f"flags of {name}": partial(command, name) for name in COMMANDS},
    "settings": settings,
    "short names": short_names,
    "flags of other programs": foreign,
    "Python reference": reference,
    "memory by Mac": memory,
    "recommendations": macs,
    "recommendations in short": short_macs,
}


def documents() -> list[Path]:
    """The files that may have generated parts."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def parts_of(path: Path) -> list[str]:
    """Names of the generated parts of a file."""
    return [match[2] for match in MARKED.finditer(path.read_text(encoding="utf-8"))]


def renewed(text: str, only: str | None = None) -> str:
    """A document with its generated parts, or one of them, renewed; raises KeyError for a name not in `PARTS`."""

    def part(match: re.Match[str]) -> str:
        return f"{match[1]}\n{PARTS[match[2]]()}\n\n{match[3]}" if only in (None, match[2]) else match[0]

    return MARKED.sub(part, text)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a part is out of date")
    check, stale = parser.parse_args().check, []
    for path in documents():
        text = path.read_text(encoding="utf-8")
        if (made := renewed(text)) != text:
            stale.append(str(path.relative_to(ROOT)))
            if not check:
                path.write_text(made, encoding="utf-8")
    print("\n".join(f"{'out of date' if check else 'written'}: {name}" for name in stale) or "everything is up to date")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
