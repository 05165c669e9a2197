"""A few numbers that stand for a large array. Needs NumPy alone: `scripts/make_golden.py` runs where MLX is not."""

from __future__ import annotations

import numpy as np


def fingerprint(array: np.ndarray, values: int, parts: int) -> tuple[np.ndarray, np.ndarray]:
    """At most `values` values, evenly apart, and the Euclidean norms of equal parts of an array; fp32 both."""
    flat = np.asarray(array, np.float32).reshape(-1)
    places = np.linspace(0, flat.size - 1, min(values, flat.size)).astype(int)
    norms = [np.linalg.norm(part.astype(np.float64)) for part in np.array_split(flat, parts)]
    return flat[places], np.array(norms, np.float32)
