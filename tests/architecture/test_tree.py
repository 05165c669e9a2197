"""ARCHITECTURE.md's tree of every file is what the files say of themselves."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def writer() -> ModuleType:
    """`scripts/tree.py`."""
    spec = importlib.util.spec_from_file_location("tree", ROOT / "scripts" / "tree.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_tree_is_as_the_script_writes_it(writer):
    text = writer.DOCUMENT.read_text(encoding="utf-8")
    assert text.count(writer.BEGIN) == text.count(writer.END) == 1
    assert writer.with_tree(text, writer.tree()) == text, "run scripts/tree.py"


def test_every_file_says_what_it_is(writer):
    files = [path for path in writer.PACKAGE.rglob("*.py") if not writer.summary(path)]
    assert files == []


def test_a_new_file_changes_the_tree(writer, tmp_path):
    (tmp_path / "room").mkdir()
    (tmp_path / "__init__.py").write_text('"""A package."""')
    (tmp_path / "room" / "__init__.py").write_text('"""A room."""')
    (tmp_path / "room" / "new.py").write_text('"""What is new,\nand more.\n\nThe rest."""')
    rows = [line.split(maxsplit=1) for line in writer.tree(tmp_path).splitlines()]
    assert rows[2:-1] == [["room/", "A room."], ["new.py", "What is new, and more."]]
