"""Who may import whom, and what may stand where: the house rules, kept by reading the source.

Each file is parsed once; each rule is one test, which lists every place that breaks it.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = "qwen_image_mlx"
# Each room may import from itself and from rooms of lower levels.
LEVELS = {
    "_version": -1,
    "names": -1,
    "licences": -1,
    "errors": 0,
    "options": 0.5,
    "gpu": 0.5,
    "files": 0.5,
    "outside": 0.5,
    "config": 1, "variants": 1,
    "facts": 0.5,  # of a family of networks: data, which the table of variants reads
    "registry": 2.5,
    "models": 2, "sampling": 2, "images": 2, "text": 2,
    "layers": 2.5,
    "weights": 3,
    "lora": 3.5,
    "pipeline": 4,
    "runtime": 5, "training": 5,
    "settings": 5.5,
    "server": 6, "doctor": 6,
    "cli": 7,
}  # fmt: skip
ENTRANCES = {"__init__", "__main__"}
EVALUATES = {"gpu", "sampling", "weights", "lora", "pipeline", "runtime", "training", "doctor"}
EVALUATION = {"mx.eval", "mx.async_eval", "mx.synchronize"}
OUTPUT = {"print", "exit", "sys.exit", "SystemExit", "sys.stdout", "sys.stderr"}
REFERENCE_LIBRARIES = {"torch", "torchvision", "transformers", "diffusers", "accelerate", "safetensors"}
# What `models` may import in addition to itself, `config` and `errors`.
PURE = {"mlx", "__future__", "array", "collections", "dataclasses", "functools", "itertools", "math", "typing"}
FAMILIES = {path.parent.name for path in (ROOT / PACKAGE / "models").glob("*/__init__.py")}
LONGEST = 500  # lines of a file
COMPONENTS_ARE_SEEN_BY = ("runtime/session.py", "runtime/shared.py")
# Where a text may name a flag: the command line, what is started with flags, and config.toml, which stands for flags.
NAMES_FLAGS = ("cli", "server", "doctor", "settings")
# The tables of options, whose help is the command line's; and the card of a model, which says how it is run.
NAMES_FLAGS_TOO = (
    "runtime/options.py",
    "pipeline/parameters.py",
    "pipeline/control.py",
    "pipeline/quantize_checkpoint.py",
)
FLAG = re.compile(r"(?<![\w-])--(?!out\b)[a-z]")  # `sips --out` is another program's


class Source:
    """One file of the package, parsed once.

    Args:
        path: its place.
        package: the folder of the package.
    """

    def __init__(self, path: Path, package: Path):
        self.inside = path.relative_to(package)
        self.text = path.read_text(encoding="utf-8")
        self.tree = ast.parse(self.text)
        self.room = self.inside.parts[0] if len(self.inside.parts) > 1 else path.stem

    @cached_property
    def nodes(self) -> list[ast.AST]:
        return list(ast.walk(self.tree))

    @cached_property
    def imports(self) -> list[str]:
        """Absolute names of everything it imports, for types alone too."""
        package, found = (PACKAGE, *self.inside.parts[:-1]), []
        for node in self.nodes:
            if isinstance(node, ast.Import):
                found += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                base = package[: len(package) - node.level + 1] if node.level else ()
                module = ".".join((*base, *([node.module] if node.module else [])))
                found += [f"{module}.{alias.name}" for alias in node.names]
        return found

    @cached_property
    def names(self) -> set[str]:
        """Every name it mentions, called or passed on: `print`, `mx.eval`, `array.item`."""
        return {ast.unparse(node) for node in self.nodes if isinstance(node, ast.Name | ast.Attribute)}

    @cached_property
    def texts(self) -> list[str]:
        """Every text it has, but docstrings."""
        documents = {id(node.value) for node in self.nodes if isinstance(node, ast.Expr)}
        texts = (node for node in self.nodes if isinstance(node, ast.Constant) and id(node) not in documents)
        return [node.value for node in texts if isinstance(node.value, str)]


@pytest.fixture(scope="module")
def sources() -> list[Source]:
    return [Source(path, ROOT / PACKAGE) for path in sorted((ROOT / PACKAGE).rglob("*.py"))]


# Rules: what of a source breaks them.


def upward_imports(source: Source) -> Iterator[str]:
    if source.room in ENTRANCES:
        return
    for name in source.imports:
        if name.startswith(f"{PACKAGE}."):
            there = room_of(name)
            if there != source.room and LEVELS[there] >= LEVELS[source.room]:
                yield name


def room_of(name: str) -> str:
    """The room that an absolute name lies in; a family's facts are one of their own."""
    parts = name.split(".")
    return "facts" if parts[1] == "models" and "facts" in parts[3:] else parts[1]


def knowing_facts(source: Source) -> Iterator[str]:
    """A family's facts are data: they import nothing of the package."""
    if source.inside.name == "facts.py":
        yield from (name for name in source.imports if name.startswith(PACKAGE))


def reference_imports(source: Source) -> Iterator[str]:
    yield from (name for name in source.imports if name.split(".")[0] in REFERENCE_LIBRARIES)


def impure_models(source: Source) -> Iterator[str]:
    ours = (f"{PACKAGE}.config", f"{PACKAGE}.errors", f"{PACKAGE}.models")
    if source.room == "models":
        yield from (n for n in source.imports if n.split(".")[0] not in PURE and not n.startswith(ours))


def family_imports(source: Source) -> Iterator[str]:
    """A family of networks knows its own files and what all share, never another family's."""
    family = source.inside.parts[1:-1]
    if source.room == "models":
        for name in source.imports:
            parts = name.split(".")
            if parts[:2] == [PACKAGE, "models"] and len(parts) > 3 and parts[2] in FAMILIES and (parts[2],) != family:
                yield name


def mlx_by_other_names(source: Source) -> Iterator[str]:
    """The rule of evaluation looks for `mx.eval`, which another name would hide."""
    for node in source.nodes:
        if isinstance(node, ast.Import):
            yield from (ast.unparse(node) for a in node.names if a.name == "mlx.core" and a.asname != "mx")
        elif isinstance(node, ast.ImportFrom) and node.module in ("mlx", "mlx.core"):
            yield from (ast.unparse(node) for a in node.names if node.module == "mlx.core" or a.name == "core")


def misplaced_evaluation(source: Source) -> Iterator[str]:
    if source.room not in EVALUATES:
        yield from source.names & EVALUATION
    if source.room == "models":
        yield from (name for name in source.names if name.endswith((".item", ".tolist")))


def misplaced_output(source: Source) -> Iterator[str]:
    if source.room not in ("cli", "__main__"):
        yield from source.names & OUTPUT


def reaches_into_components(source: Source) -> Iterator[str]:
    """What a pipeline is made of is its own affair, and that of planning and of training, which work on it."""
    if source.room not in ("pipeline", "training") and str(source.inside) not in COMPONENTS_ARE_SEEN_BY:
        yield from (name for name in source.names if name.endswith("pipeline.components"))


def flags_below_the_command_line(source: Source) -> Iterator[str]:
    """Other rooms say what is wrong in plain words, with a cause for which `cli/hints.py` knows the flag."""
    if source.room not in NAMES_FLAGS and str(source.inside) not in NAMES_FLAGS_TOO:
        yield from (text for text in source.texts if FLAG.search(text))


def undescribed(source: Source) -> Iterator[str]:
    if not ast.get_docstring(source.tree):
        yield "the module"
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    classes = (n for n in source.tree.body if isinstance(n, ast.ClassDef) and not n.name.startswith("_"))
    for scope in (source.tree, *classes):
        for node in scope.body:
            if isinstance(node, kinds) and not node.name.startswith("_") and not ast.get_docstring(node):
                yield node.name


def too_long(source: Source) -> Iterator[str]:
    if (lines := len(source.text.splitlines())) > LONGEST:
        yield f"{lines} lines"


RULES = (
    upward_imports, knowing_facts, reference_imports, impure_models, family_imports, mlx_by_other_names,
    misplaced_evaluation, misplaced_output, reaches_into_components, flags_below_the_command_line, undescribed,
    too_long,
)  # fmt: skip


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_house_keeps_its_rules(sources, rule):
    assert [f"{source.inside}: {found}" for source in sources for found in rule(source)] == []


def imported_files(source: Source, files: set[str]) -> set[str]:
    """The files of the package that one imports, for types alone and inside functions too, by their dotted names."""
    found = set()
    for name in source.imports:
        inside = name.removeprefix(f"{PACKAGE}.") if name.startswith(f"{PACKAGE}.") else ""
        found |= {inside, inside.rpartition(".")[0]} & files
    return found


def cycles(sources: list[Source]) -> list[list[str]]:
    """Files that import themselves by way of others, with those that they do it by way of."""
    named = {".".join(source.inside.with_suffix("").parts): source for source in sources}
    arrows = {name: imported_files(source, named.keys() - {"__init__"}) for name, source in named.items()}
    reached = {name: set(there) for name, there in arrows.items()}
    while True:
        further = {name: there.union(*(reached[other] for other in there)) for name, there in reached.items()}
        if further == reached:
            break
        reached = further
    mutual = {frozenset(o for o in there if name in reached[o]) for name, there in reached.items() if name in there}
    return sorted(map(sorted, mutual))


def test_no_file_imports_itself_by_way_of_others(sources):
    assert cycles(sources) == []


def test_a_cycle_is_found(tmp_path):
    for name, text in {
        "a": "from .b import x",
        "b": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .c import y",
        "c": "def f():\n    from . import a",
        "d": "from .a import z",
    }.items():
        (tmp_path / f"{name}.py").write_text(text)
    sources = [Source(path, tmp_path) for path in sorted(tmp_path.glob("*.py"))]
    assert cycles(sources) == [["a", "b", "c"]]


def test_every_room_has_its_level(sources):
    assert {source.room for source in sources} <= LEVELS.keys() | ENTRANCES


@pytest.mark.parametrize(("rule", "place", "text"), [
    (upward_imports, "images/a.py", "from ..weights.loader import x"),
    (upward_imports, "images/a.py", "if TYPE_CHECKING:\n    from ..weights.loader import x"),
    (upward_imports, "text/a.py", "def f():\n    import qwen_image_mlx.images.files"),
    (upward_imports, "variants.py", "from .models.qwen_image_21.config import x"),
    (knowing_facts, "models/qwen_image_21/facts.py", "from .config import x"),
    (reference_imports, "cli/a.py", "import torch.nn"),
    (impure_models, "models/a.py", "import numpy"),
    (family_imports, "models/qwen2_5_vl/a.py", "from ..qwen_image.vae import x"),
    (family_imports, "models/a.py", "from .qwen_image.vae import x"),
    (mlx_by_other_names, "models/a.py", "import mlx.core as core"),
    (mlx_by_other_names, "models/a.py", "from mlx import core"),
    (mlx_by_other_names, "models/a.py", "from mlx.core import eval"),
    (misplaced_evaluation, "images/a.py", "mx.eval(a)"),
    (misplaced_evaluation, "models/a.py", "a.item()"),
    (misplaced_output, "pipeline/a.py", "print(a)"),
    (reaches_into_components, "server/a.py", "x = warm.pipeline.components.loaded"),
    (flags_below_the_command_line, "lora/a.py", 'raise E(f"{x}: give --model")'),
    (undescribed, "models/a.py", "x = 1"),
    (undescribed, "models/a.py", '"""A."""\nclass A:\n    """B."""\n    def c(self): ...'),
    (too_long, "models/a.py", "x = 1\n" * 501),
])  # fmt: skip
def test_what_breaks_a_rule_is_found(tmp_path, rule, place, text):
    path = tmp_path / place
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    assert len(list(rule(Source(path, tmp_path)))) == 1


def test_rules_pass_what_they_allow(tmp_path):
    path = tmp_path / "cli" / "a.py"
    path.parent.mkdir()
    path.write_text('"""A."""\nfrom ..weights.loader import x\nimport mlx.core as mx\nprint(x)\n')
    assert [found for rule in RULES for found in rule(Source(path, tmp_path))] == []
