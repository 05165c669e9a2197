"""What step caches know of a model: numbers that a user calibrated, else those of the released models.

A calibration is a small JSON file in the user's data folder, named after the model and its LoRAs.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import OutputError
from ..files import atomic_file
from ..sampling.step_caches import RELEASED, CacheFacts, TeaFacts
from .components import Components

logger: logging.Logger = logging.getLogger(__name__)

_MAX_BYTES = 100_000


def data_folder() -> Path:
    """`qwen-image-mlx/step-caches` in the user's data folder (XDG_DATA_HOME, else ~/.local/share)."""
    home = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(home) / "qwen-image-mlx" / "step-caches"


def facts_of(components: Components) -> CacheFacts:
    """The facts of a checkpoint: calibrated with its LoRAs, else without them, else those of the released model."""
    model = components.snapshot.model
    for some in dict.fromkeys([loras_of(components), ()]):
        facts = read_facts(path_of(model, some))
        if facts is not None:
            return facts
    return RELEASED.get(str(model), CacheFacts())


def loras_of(components: Components) -> tuple[str, ...]:
    """The references of a checkpoint's LoRAs, with their strengths."""
    return components.adapters.references if components.adapters else ()


def path_of(model: str, loras: Sequence[str]) -> Path:
    """The file of a model's calibration; a local folder counts by its full path."""
    place = str(Path(model).resolve()) if Path(model).exists() else str(model)
    name = hashlib.sha256(json.dumps([place, *loras]).encode()).hexdigest()[:16]
    return data_folder() / f"{name}.json"


def read_facts(path: Path) -> CacheFacts | None:
    """The facts in a file; None if there is none, or, with a warning, if it is damaged."""
    try:
        if not path.is_file():
            return None
        if path.stat().st_size > _MAX_BYTES:
            raise ValueError("it is too large")
        stored = json.loads(path.read_text(encoding="utf-8"))
        tea = stored["teacache"]
        polynomial = _numbers(tea["polynomial"])
        low, high, threshold = _numbers([tea["low"], tea["high"], tea["threshold"]])
        return CacheFacts(TeaFacts(polynomial, low, high, threshold), _numbers(stored["magcache"]["ratios"]))
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        logger.warning("a calibration is damaged and is ignored: %s: %s", path, error)
        return None


def _numbers(values: Any) -> tuple[float, ...]:
    """The finite numbers of a list that is not empty; raises ValueError."""
    numbers = tuple(map(float, values))
    if not numbers or not all(abs(number) < 1e6 for number in numbers):
        raise ValueError("it has no numbers or numbers out of range")
    return numbers


def write_facts(facts: CacheFacts, model: str, loras: Sequence[str]) -> Path:
    """Writes a calibration where `facts_of` finds it, and returns its path; raises OutputError."""
    assert facts.tea is not None
    stored = {
        "model": model,
        "loras": list(loras),
        "teacache": facts.tea._asdict(),
        "magcache": {"ratios": list(facts.ratios or ())},
    }
    path = path_of(model, loras)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as partial:
            partial.write_text(json.dumps(stored, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}") from error
    return path
