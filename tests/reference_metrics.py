"""Slow float64 re-implementations of the metrics of attributions, from the papers' equations, one image at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Output = Callable[[Array], float]


def infidelity(contribution: Array, image: Array, fill: Array, output: Output, masks: Sequence[Array]) -> float:
    """Yeh et al. 2019, equation 1, for removals of locations: contribution (H, W), image and fill (C, H, W)."""
    total = 0.0
    for mask in masks:
        left = image.copy()
        left[:, mask] = fill[:, mask]
        total += (float(contribution[mask].sum()) - (output(image) - output(left))) ** 2
    return total / len(masks)


def infidelity_scaled(sums: Sequence[float], changes: Sequence[float]) -> float:
    """The least share of the mean square change that a factor of at least 0 leaves, by trial over factors."""
    best = math.inf
    top = 2 * max(map(abs, changes)) / max(max(map(abs, sums)), 1e-12)
    low, high = 0.0, top * len(sums)
    for _ in range(60):  # golden mean: the error is a parabola
        thirds = [low + (high - low) * share for share in (1 / 3, 2 / 3)]
        errors = [sum((f * s - c) ** 2 for s, c in zip(sums, changes, strict=True)) for f in thirds]
        best = min(best, *errors)
        low, high = (low, thirds[1]) if errors[0] < errors[1] else (thirds[0], high)
    return min(best, sum(c**2 for c in changes)) / sum(c**2 for c in changes)


def correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Pearson's correlation, by its definition."""
    a, b = ([v - sum(x) / len(x) for v in x] for x in (first, second))
    return sum(p * q for p, q in zip(a, b, strict=True)) / math.sqrt(sum(p * p for p in a) * sum(q * q for q in b))


def impute(image: Array, removed: Array) -> Array:
    """Rong et al. 2022, section 4.2: one dense system of equations; image (C, H, W), removed bool (H, W)."""
    _, height, width = image.shape
    places = [(int(y), int(x)) for y, x in np.argwhere(removed)]
    number = {place: i for i, place in enumerate(places)}
    matrix = np.zeros((len(places), len(places)))
    right = np.zeros((len(places), image.shape[0]))
    for (y, x), i in number.items():
        for dy in (-1, 0, 1):
            for dx in (-1, 0, 1):
                other = (y + dy, x + dx)
                if (dy, dx) == (0, 0) or not (0 <= other[0] < height and 0 <= other[1] < width):
                    continue
                weight = 1 / 6 if 0 in (dy, dx) else 1 / 12
                matrix[i, i] += weight
                if other in number:
                    matrix[i, number[other]] -= weight
                else:
                    right[i] += weight * image[:, other[0], other[1]]
    found = image.copy()
    for (y, x), value in zip(places, np.linalg.solve(matrix, right), strict=True):
        found[:, y, x] = value
    return found
