"""Who may import whom, and what may stand where: the house rules, kept by reading the source.

Each file is parsed once; each rule is one test, which lists every place that breaks it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = "qwen_image_mlx"
# Each room may import from itself and from rooms of lower levels.
LEVELS = {
    "names": -1,
    "errors": 0,
    "options": 0.5,
    "gpu": 0.5,
    "unfinished": 0.5,
    "outside": 0.5,
    "config": 1, "variants": 1,
    "registry": 2.5,
    "models": 2, "sampling": 2, "images": 2, "text": 2,
    "weights": 3,
    "pipeline": 4,
    "runtime": 5, "training": 5,
    "settings": 5.5,
    "server": 6, "doctor": 6,
    "cli": 7,
}  # fmt: skip
ENTRANCES = {"__init__", "__main__"}
EVALUATES = {"gpu", "sampling", "weights", "pipeline", "runtime", "training", "doctor"}
EVALUATION = {"mx.eval", "mx.async_eval", "mx.synchronize"}
OUTPUT = {"print", "exit", "sys.exit", "SystemExit", "sys.stdout", "sys.stderr"}
REFERENCE_LIBRARIES = {"torch", "torchvision", "transformers", "diffusers", "accelerate", "safetensors"}
# What `models` may import in addition to itself, `config` and `errors`.
PURE = {"mlx", "__future__", "array", "collections", "dataclasses", "functools", "itertools", "math", "typing"}
FAMILIES = {path.parent.name for path in (ROOT / PACKAGE / "models").glob("*/__init__.py")}
LONGEST = 500  # lines of a file
COMPONENTS_ARE_SEEN_BY = ("runtime/session.py",)


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


@pytest.fixture(scope="module")
def sources() -> list[Source]:
    return [Source(path, ROOT / PACKAGE) for path in sorted((ROOT / PACKAGE).rglob("*.py"))]


# Rules: what of a source breaks them.


def upward_imports(source: Source) -> Iterator[str]:
    if source.room in ENTRANCES:
        return
    for name in source.imports:
        if name.startswith(f"{PACKAGE}.") and name != f"{PACKAGE}.__version__":
            there = name.split(".")[1]
            if there != source.room and LEVELS[there] >= LEVELS[source.room]:
                yield name


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
    upward_imports, reference_imports, impure_models, family_imports, mlx_by_other_names, misplaced_evaluation,
    misplaced_output, reaches_into_components, undescribed, too_long,
)  # fmt: skip


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_house_keeps_its_rules(sources, rule):
    assert [f"{source.inside}: {found}" for source in sources for found in rule(source)] == []


def test_every_room_has_its_level(sources):
    assert {source.room for source in sources} <= LEVELS.keys() | ENTRANCES


@pytest.mark.parametrize(("rule", "place", "text"), [
    (upward_imports, "images/a.py", "from ..weights.loader import x"),
    (upward_imports, "images/a.py", "if TYPE_CHECKING:\n    from ..weights.loader import x"),
    (upward_imports, "text/a.py", "def f():\n    import qwen_image_mlx.images.files"),
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
    (undescribed, "models/a.py", "x = 1"),
    (undescribed, "models/a.py", '"""A."""\nclass A:\n    """B."""\n    def c(self): ...'),
    (too_long, "models/a.py", "x = 1\n" * 501),
])  # fmt: skip
def test_what_breaks_a_rule_is_found(tmp_path, rule, place, text):
    path = tmp_path / place
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert len(list(rule(Source(path, tmp_path)))) == 1


def test_rules_pass_what_they_allow(tmp_path):
    path = tmp_path / "cli" / "a.py"
    path.parent.mkdir()
    path.write_text('"""A."""\nfrom ..weights.loader import x\nimport mlx.core as mx\nprint(x)\n')
    assert [found for rule in RULES for found in rule(Source(path, tmp_path))] == []
