"""The hook of mkdocs.yml: the site also has the documents and examples that lie outside `docs/`.

Pages link to `../README.md`, `../benchmarks/README.md` or `../examples/sweep.py`, which GitHub resolves and a site made
of `docs/` alone does not. These files become pages under `repository/`, and links lead there. Hooks are described at
https://www.mkdocs.org/user-guide/configuration/#hooks.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.structure.files import Files  # type: ignore[import-not-found]  # only the extra [docs] has it

ROOT = Path(__file__).parents[1]
FOLDER = "repository"
OUTSIDE = (
    "README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md", "weights_map/README.md",
    "examples/README.md", *sorted(f"examples/{path.name}" for path in (ROOT / "examples").glob("*.py")),
)  # fmt: skip
_LINK = re.compile(r"(\]\()([^)\s#:]+)((?:#[^)\s]*)?\))")


def site_path(path: str) -> str | None:
    """Where a file of the repository is on the site; None if it is not there. A folder is its README."""
    path = posixpath.join(path, "README.md") if (ROOT / path).is_dir() else path
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return f"{FOLDER}/{path}" if path in OUTSIDE else None


def moved(text: str, path: str) -> str:
    """A document's text with links for the site; `path` is its place in the repository. Code stays as it is."""
    here = posixpath.dirname(site_path(path) or path)

    def link(match: re.Match[str]) -> str:
        place = site_path(posixpath.normpath(posixpath.join(posixpath.dirname(path), match[2])))
        return f"{match[1]}{posixpath.relpath(place, here or '.')}{match[3]}" if place else match[0]

    parts = re.split(r"(```.*?```|`[^`\n]*`)", text, flags=re.DOTALL)
    # A link's words may be code, as in [`a`](b): what follows is then a part that begins with "](".
    return "".join(part if number % 2 else _LINK.sub(link, part) for number, part in enumerate(parts))


def on_files(files: Files, *, config: Any) -> Files:
    """Adds the files outside `docs/`; mkdocs calls it."""
    from mkdocs.structure.files import File

    for path in OUTSIDE:
        files.append(File.generated(config, f"{FOLDER}/{path}", abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Rewrites a page's links; mkdocs calls it."""
    uri = page.file.src_uri
    return moved(markdown, uri.removeprefix(f"{FOLDER}/") if uri.startswith(f"{FOLDER}/") else f"docs/{uri}")
