"""The registry: every row is whole, and nothing else knows a class or a role by its name."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

from qwen_image_mlx import registry
from qwen_image_mlx.registry import CLASSES, FOLDERS, STREAMABLE, TEXT_ENCODER, TRANSFORMER, all_components, resolve
from qwen_image_mlx.variants import VARIANTS
from qwen_image_mlx.weights.mapping import UNUSED, expected_tensors, needs_tensor, weights_map

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "qwen_image_mlx"
ROWS = list(all_components())

# Names of classes, of pipelines' classes and of roles, which are for the registry, for the table of variants and for
# the folders of a generation.
ROLES = {row.role for row in ROWS} | {net.name for row in ROWS for net in row.networks}
NAMES = ROLES | set(CLASSES) | set(VARIANTS)
FOR_THEM = (
    *("registry.py", "variants.py", "models/qwen_image/", "models/qwen2_5_vl/", "pipeline/qwen_image/"),
    *("models/qwen_image_21/", "models/qwen3_vl/", "pipeline/qwen_image_21/"),
    *("training/qwen_image/", "training/qwen_image_21/"),
)
# Who else may say which of them, and why.
EXCEPTIONS = {
    "names.py": {TRANSFORMER, TEXT_ENCODER, "vision"},  # a type's words, compared with the registry's by test_types
    "__init__.py": {"QwenImagePipeline"},  # the public class, which has the name of a released one
    "weights/synthetic.py": {"QwenImagePipeline"},  # the default kind of a made-up checkpoint
    # The doctor measures and plans a released model of each generation.
    "doctor/": {*FOLDERS, "vision", "QwenImagePipeline", "QwenImage21Pipeline"},
}


def literals(path: Path) -> set[str]:
    """The strings of a file but its docstrings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    parents = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docs = {id(n.body[0].value) for n in ast.walk(tree) if isinstance(n, parents) and n.body
            and isinstance(n.body[0], ast.Expr)}  # fmt: skip
    strings = (n for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str))
    return {node.value for node in strings if id(node) not in docs}


def strangers(package: Path) -> list[str]:
    """Names that stand where they should not, as "file: name"."""
    found = []
    for path in sorted(package.rglob("*.py")):
        place = path.relative_to(package).as_posix()
        if not place.startswith(FOR_THEM):
            allowed = {name for where, names in EXCEPTIONS.items() if place.startswith(where) for name in names}
            found += [f"{place}: {name}" for name in sorted(literals(path) & NAMES - allowed)]
    return found


def test_no_other_file_says_a_role_or_a_class():
    assert strangers(PACKAGE) == []


def test_a_stranger_is_found(tmp_path):
    (tmp_path / "runtime").mkdir()
    (tmp_path / "runtime" / "a.py").write_text('"""transformer"""\nx = ["transformer", "AutoencoderKLQwenImage"]\n')
    (tmp_path / "registry.py").write_text('x = "transformer"\n')
    assert strangers(tmp_path) == ["runtime/a.py: AutoencoderKLQwenImage", "runtime/a.py: transformer"]


def test_exceptions_are_needed():
    for where, names in EXCEPTIONS.items():
        files = [PACKAGE / where] if where.endswith(".py") else (PACKAGE / where).rglob("*.py")
        assert names == {name for path in files for name in literals(path)} & NAMES, where


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.map)
def test_every_row_is_whole(row):
    rules, config = weights_map(row.map), row.released
    assert type(config) is row.config
    assert rules["stem"]
    assert rules["dialects"]
    assert row.home in FOLDERS
    assert bool(row.layers) == bool(row.depth) == (row.role in STREAMABLE)
    specs = expected_tensors(row, config)
    assert {spec.part for spec in specs.values()} - {UNUSED} == set(row.parts)
    if row.layers:
        numbers = {name.removeprefix(f"{row.layers}.").split(".")[0] for name in specs if name.startswith(row.layers)}
        assert numbers == {str(n) for n in range(getattr(config, row.depth))}
    if row.rows:
        assert row.rows in specs
    for tensor, said in rules.get("shows", {}).items():
        assert isinstance(getattr(config, said["field"]), bool), tensor
    for tensor, field in rules.get("sized", {}).items():
        assert specs[tensor].shape == (getattr(config, field),)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.map)
def test_networks_are_where_the_registry_says(row):
    for network in row.networks:
        assert isinstance(resolve(f"models.{network.place}"), type)


def test_roles_and_networks_are_told_apart():
    for variant in VARIANTS.values():
        rows = registry.components_of(variant.classes)
        names = [network.name for row in rows.values() for network in row.networks]
        assert len(names) == len(set(names))
        assert set(variant.classes) >= {*FOLDERS, registry.SCHEDULER}
        assert set(variant.classes) & {registry.TOKENIZER, registry.PROCESSOR}
    assert {entry.map for entry in ROWS} <= {path.stem for path in (ROOT / "weights_map").glob("*.json")}
    assert len({entry.map for entry in ROWS}) == len(ROWS)


def test_what_works_with_a_class_has_the_seam_s_methods():
    for entry in CLASSES.values():
        for row in entry.components:
            if row.role == TRANSFORMER:
                made = resolve(entry.use)
                assert all(callable(getattr(made, name)) for name in ("velocities", "check", "kept_values"))
                trained = resolve(entry.training)
                methods = ("segments", "network", "modulation", "table", "denoisers")
                assert all(callable(getattr(trained, name)) for name in methods)
            if row.role == TEXT_ENCODER:
                assert all(callable(getattr(resolve(entry.use), name)) for name in ("encode", "caption"))


def test_what_tells_folders_without_configs_names_rows():
    packs = json.loads((ROOT / "weights_map" / "packs.json").read_text(encoding="utf-8"))
    for guess in packs["guessed"]:
        assert registry.component_of(guess["component"]) in ROWS
        assert guess["class"] in VARIANTS


@pytest.mark.parametrize("row", [row for row in all_components() if "other_parts" in weights_map(row.map)],
                         ids=lambda row: row.map)  # fmt: skip
def test_of_a_shared_folder_s_files_a_component_needs_its_own(row):
    """As an index lists them, before any file is opened: a sharded model's vision tower is found."""
    mine = expected_tensors(row, row.released)
    needed = [spec.name for spec in mine.values() if spec.part in row.parts]
    assert all(needs_tensor(row, name, row.parts) for name in needed)
    family = row.map.split(".")[0]
    for other in all_components():
        if other.map.split(".")[0] == family and other is not row:
            names = expected_tensors(other, other.released).keys() - mine.keys()
            assert not [name for name in names if needs_tensor(row, name, row.parts)], other.map
