"""Who may import whom, and what may stand where: the house rules, kept by reading the source."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "qwen_image_mlx"
# Each room may import from itself and from rooms of lower levels.
LEVELS = {
    "errors": 0,
    "gpu": 0.5,
    "unfinished": 0.5,
    "outside": 0.5,
    "config": 1, "settings": 1, "variants": 1,
    "models": 2, "sampling": 2, "images": 2, "text": 2,
    "weights": 3,
    "pipeline": 4,
    "runtime": 5, "training": 5,
    "server": 6, "doctor": 6,
    "cli": 7,
}  # fmt: skip
ENTRANCES = ("__init__", "__main__")
EVALUATES = {"gpu", "sampling", "weights", "pipeline", "runtime", "training", "doctor"}
REFERENCE_LIBRARIES = {"torch", "torchvision", "transformers", "diffusers", "accelerate", "safetensors"}
MODULES = sorted(PACKAGE.rglob("*.py"))


def room(path: Path) -> str:
    inside = path.relative_to(PACKAGE)
    return inside.parts[0] if len(inside.parts) > 1 else inside.stem


def runtime_nodes(tree: ast.AST):
    """All nodes but those under `if TYPE_CHECKING`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            continue
        yield node
        yield from runtime_nodes(node)


def imported(path: Path):
    """(absolute module names) of everything a module imports at run time."""
    package = ("qwen_image_mlx", *path.relative_to(PACKAGE).parts[:-1])
    for node in runtime_nodes(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, *([node.module] if node.module else [])))
            yield from (f"{module}.{alias.name}" for alias in node.names)


every_module = pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))


def test_every_room_has_its_level():
    assert {room(path) for path in MODULES} <= {*LEVELS, *ENTRANCES}


@every_module
def test_imports_go_one_way(path):
    here = room(path)
    if here in ENTRANCES:
        return
    for name in imported(path):
        if not name.startswith("qwen_image_mlx.") or name == "qwen_image_mlx.__version__":
            continue
        there = name.split(".")[1]
        assert there == here or LEVELS[there] < LEVELS[here], f"{path.name} imports {name}"


@every_module
def test_nothing_imports_the_reference_libraries(path):
    assert not [name for name in imported(path) if name.split(".")[0] in REFERENCE_LIBRARIES]


@pytest.mark.parametrize("path", sorted((PACKAGE / "models").rglob("*.py")), ids=lambda p: p.name)
def test_models_know_mlx_config_and_each_other_only(path):
    allowed = ("mlx", "__future__", "array", "collections", "dataclasses", "functools", "itertools", "math", "typing")
    for name in imported(path):
        ours = name.startswith(("qwen_image_mlx.config", "qwen_image_mlx.models"))
        assert ours or name.split(".")[0] in allowed, name


def used(path: Path) -> set[str]:
    """Every name a module mentions, called or passed on: `print`, `mx.eval`, `array.item`."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return {ast.unparse(node) for node in nodes if isinstance(node, ast.Name | ast.Attribute)}


@every_module
def test_mlx_goes_by_one_name(path):
    """The rule below looks for `mx.eval`, which another name would hide."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert all(alias.asname == "mx" for alias in node.names if alias.name == "mlx.core")
        elif isinstance(node, ast.ImportFrom):
            assert node.module != "mlx.core"
            assert node.module != "mlx" or not any(alias.name == "core" for alias in node.names)


@every_module
def test_evaluation_and_output_stay_in_their_rooms(path):
    here, names = room(path), used(path)
    if here not in EVALUATES:
        assert not names & {"mx.eval", "mx.async_eval", "mx.synchronize"}
    if here == "models":
        assert not [name for name in names if name.endswith((".item", ".tolist"))]
    if here not in ("cli", "__main__"):
        assert not names & {"print", "exit", "sys.exit", "SystemExit", "sys.stdout", "sys.stderr"}


@every_module
def test_public_things_are_described(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), "a module begins with its contract"
    for scope in (tree, *(n for n in tree.body if isinstance(n, ast.ClassDef) and not n.name.startswith("_"))):
        for node in scope.body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not node.name.startswith(
                "_"
            ):
                assert ast.get_docstring(node), f"{node.name} has no docstring"


@every_module
def test_files_stay_readable(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 500
