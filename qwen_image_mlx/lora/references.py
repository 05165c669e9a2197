"""Parses LoRA references: splits `REF@STRENGTH`, and finds where REF leads. Fetches nothing."""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from ..errors import RequestError
from .file import SUFFIX

_FORMS = "a file, a folder, owner/repo, owner/repo:file.safetensors, or the address of a file on huggingface.co"
_NAME = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9])?"
_REPO_ID = re.compile(rf"{_NAME}/{_NAME}")
_REPO = re.compile(rf"({_NAME}/{_NAME})(?::(.+))?")
_HUB_ADDRESS = re.compile(r"https?://(?:(?:www\.)?huggingface\.co|hf\.co)/([^?#]*)(?:[?#].*)?", re.IGNORECASE)


@dataclass(frozen=True)
class Source:
    """Where a LoRA is: on disk, or in a repository of the hub.

    Attributes:
        path: the file or folder; None for the hub.
        repo: "owner/repo"; None on disk.
        file: the file's name in the repository, folders included; None to take the only one it has.
        revision: branch, tag or commit; None for the main branch.
    """

    path: Path | None = None
    repo: str | None = None
    file: str | None = None
    revision: str | None = None


def parse_reference(text: str) -> tuple[str, float]:
    """`REF@STRENGTH` as (reference, strength); 1.0 without a strength.

    The last @ separates, if a number follows it; an existing path that contains an @ is a path.

    Raises:
        RequestError: the reference is empty, or the strength is not a finite number.
    """
    text = text.strip()
    reference, at, strength = text.rpartition("@")
    if not at or os.path.exists(os.path.expanduser(text)):
        return _nonempty(text, text), 1.0
    try:
        value = float(strength)
    except ValueError:
        if "/" in strength or strength.endswith(SUFFIX):  # the @ belongs to a path that does not exist
            return text, 1.0
        raise RequestError(f"the strength {strength!r} of the LoRA {text!r} is not a number: write REF@0.8") from None
    if not math.isfinite(value):
        raise RequestError(f"the strength {strength!r} of the LoRA {text!r} is not finite: write REF@0.8")
    return _nonempty(reference, text), value


def _nonempty(reference: str, text: str) -> str:
    if not reference:
        raise RequestError(f"the LoRA {text!r} names no file: give {_FORMS}")
    return reference


def kind_of(reference: str, what: str = "LoRA") -> Source:
    """Where a reference leads.

    What exists on disk wins over a repository of the same name; messages call the reference `what`.

    Raises:
        RequestError: it has none of the forms, or is an address of something other than a file.
    """
    path = os.path.expanduser(reference)
    if os.path.exists(path):
        return Source(path=Path(path))
    if "://" in reference:
        return _from_address(reference)
    if reference.endswith(SUFFIX) and ":" not in reference:
        raise RequestError(f"the file {reference} does not exist: give {_FORMS}")
    if match := _REPO.fullmatch(reference):
        return Source(repo=match[1], file=_inner_file(reference, match[2]) if match[2] else None)
    raise RequestError(f"the {what} {reference!r} was not found: give {_FORMS}")


def _from_address(reference: str) -> Source:
    match = _HUB_ADDRESS.fullmatch(reference)
    parts = [unquote(part) for part in match[1].strip("/").split("/")] if match else []
    repo = "/".join(parts[:2])
    if not _REPO_ID.fullmatch(repo):
        raise RequestError(f"{reference} is not an address of a file on huggingface.co: download it, or give {_FORMS}")
    if len(parts) == 2:
        return Source(repo=repo)
    if len(parts) < 5 or parts[2] not in ("blob", "resolve"):
        raise RequestError(
            f"{reference} does not lead to a file: its address looks like https://huggingface.co/{repo}/blob/main/file{SUFFIX}"
        )
    return Source(repo=repo, file=_inner_file(reference, "/".join(parts[4:])), revision=parts[3])


def _inner_file(reference: str, file: str) -> str:
    if not file.endswith(SUFFIX):
        raise RequestError(f"{reference} does not lead to a {SUFFIX} file: only these are read")
    if any(part in ("", ".", "..") for part in file.split("/")):
        raise RequestError(f"{reference} has an impossible path in its repository: give owner/repo:folder/file{SUFFIX}")
    return file
