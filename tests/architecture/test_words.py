"""The words of the house: docstrings, comments, help, messages, the page and the documents use the field's own.

The glossary stands in CONTRIBUTING.md; this holds what it forbids. A text may keep a forbidden word where it is the
right one there: such places are listed, and each must still be needed.
"""

from __future__ import annotations

import io
import re
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "qwen_image_mlx"

# What is not written, and what is written instead.
FORBIDDEN = {
    r"\bpictures?\b": "image",
    r"\b(un|re)?paint(s|ed|er|ers|ing|ings)?\b": "generate, edit, inpaint",
    r"\b(take|takes|taken|taking|took)\b[^.;:,]{0,30}\bapart\b": "decompose",
    r"\btells?\b[^.;:,]{0,20}\bapart\b": "identify, distinguish",
    r"\b(is|are|was|were) no\b(?! (longer|more|larger|smaller|wider|lower|higher|other))": "is not a",
    r"\bbeside\b": "unmerged, next to, in addition to",
    r"\bso (many|much|long)\b(?! (as|that|for))": "the number itself",
    r"\banew\b": "again",
    r"\b(the|at) hungry\b": "memory",
    r"\bis asked for\b|\bwhat is asked\b|\basked for\b": "requested, the options",
    r"\bpassed over\b": "skipped",
    r"\bat the (?:very )?most\b": "at most",
    r"\bfor want of\b": "without",
    r"\bthe (most|least) (of|that|it|they|which)\b": "the maximum, the minimum",
    r"(?<!at )\b(most|least) \w+ (that|which|of a|in a|at once)\b": "maximum, minimum",
    r"\bwords? of (ones|one's|his|its) own\b": "own text",
}
# Where the ordinary word is the right one: a pattern of the line, and why.
ALLOWED = {
    r"(oil|watercolou?r|digital) painting": "a kind of image that a prompt names",
    r"[Pp]icture \d|Picture \{": "the models' own templates",
    r"--only \S*picture|doctor.*picture|\"picture\"|`picture`|pictures?\.py": "a group of the doctor, and files",
    r"beside between around": "the vocabulary of the demo models",
}


def texts(path: Path) -> Iterator[tuple[int, str]]:
    """Lines of prose with their numbers: comments and strings of Python; all of the rest."""
    source = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        if path.name == "CONTRIBUTING.md":  # its glossary lists the forbidden words
            source = re.sub(r"(?ms)^## Words$.*?(?=^## )", lambda match: "\n" * match[0].count("\n"), source)
        yield from enumerate(source.splitlines(), 1)
        return
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in (tokenize.COMMENT, tokenize.STRING):
            yield from enumerate(token.string.splitlines(), token.start[0])


@cache
def offences() -> dict[str, list[str]]:
    """For each forbidden pattern, where it stands."""
    found: dict[str, list[str]] = {pattern: [] for pattern in FORBIDDEN}
    for path in files():
        for number, line in texts(path):
            left = line
            for allowed in ALLOWED:
                left = re.sub(allowed, "", left)
            for pattern in FORBIDDEN:
                if re.search(pattern, left, re.IGNORECASE):
                    found[pattern].append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:120]}")
    return found


def files() -> list[Path]:
    """What is read by people."""
    page = [path for kind in ("*.html", "*.js") for path in (PACKAGE / "server" / "page").glob(kind)]
    documents = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "ARCHITECTURE.md", *(ROOT / "docs").glob("*.md")]
    return sorted([*PACKAGE.rglob("*.py"), *(ROOT / "scripts").rglob("*.py"), *page, *documents])


@pytest.mark.parametrize("pattern", FORBIDDEN)
def test_a_forbidden_word_stands_nowhere(pattern):
    places = offences()[pattern]
    assert not places, f"write {FORBIDDEN[pattern]!r} instead:\n" + "\n".join(places)


def test_every_exception_is_needed():
    lines = [line for path in files() for _, line in texts(path)]
    assert [allowed for allowed in ALLOWED if not any(re.search(allowed, line) for line in lines)] == []
