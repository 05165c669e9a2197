"""Writes the tree of every file, each with the summary of its docstring, into ARCHITECTURE.md.

`python scripts/tree.py`; a test compares what it would write with what stands there.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "qwen_image_mlx"
DOCUMENT = ROOT / "ARCHITECTURE.md"
BEGIN, END = "<!-- tree: written by scripts/tree.py -->\n", "<!-- end of the tree -->\n"


def summary(path: Path) -> str:
    """The first paragraph of a module's docstring, on one line; empty without one."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(text.partition("\n\n")[0].split())


def tree(package: Path = PACKAGE) -> str:
    """One line for every module: its name and what it is, in a folder's order, files before folders."""

    def rows(folder: Path, depth: int) -> Iterator[tuple[str, str]]:
        files = sorted(path for path in folder.glob("*.py") if path.name != "__init__.py")
        yield from (("  " * depth + path.name, summary(path)) for path in files)
        for inner in sorted(path.parent for path in folder.glob("*/__init__.py")):
            yield "  " * depth + f"{inner.name}/", summary(inner / "__init__.py")
            yield from rows(inner, depth + 1)

    lines = [(f"{package.name}/", summary(package / "__init__.py")), *rows(package, 1)]
    width = max(len(name) for name, _ in lines) + 2
    return "```\n" + "".join(f"{name:{width}}{what}".rstrip() + "\n" for name, what in lines) + "```\n"


def with_tree(text: str, tree: str) -> str:
    """A document with the tree between its two marks."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}{tree}{END}{after}"


if __name__ == "__main__":
    DOCUMENT.write_text(with_tree(DOCUMENT.read_text(encoding="utf-8"), tree()), encoding="utf-8")
