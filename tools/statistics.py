"""Intervals and tests: Wilson for shares, a Poisson bootstrap keyed by example for means.

What every score needs comes from torch.special: loading scipy.stats takes longer than judging a block.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import scipy
import torch
from torch import Tensor

from rbkit.tools import random

DRAWS = 1000
CHUNK = 512


@dataclass(frozen=True)
class Interval:
    """An estimate with its confidence interval; low and high are None where no interval can be told."""

    value: float | None
    low: float | None
    high: float | None
    n: int


def normal_quantile(share: float) -> float:
    """The point of the standard normal distribution below which this share lies."""
    return float(torch.special.ndtri(torch.tensor(share, dtype=torch.float64)))


def wilson(successes: int, n: int, *, confidence: float = 0.95) -> Interval:
    """Wilson's score interval of a share (Wilson 1927)."""
    if n == 0:
        return Interval(None, None, None, 0)
    reach, share = normal_quantile(0.5 + confidence / 2), successes / n
    middle = share + reach**2 / (2 * n)
    half = reach * math.sqrt(share * (1 - share) / n + reach**2 / (4 * n**2))
    low, high = ((middle + side * half) / (1 + reach**2 / n) for side in (-1, 1))
    return Interval(share, max(0.0, low) if successes else 0.0, 1.0 if successes == n else min(1.0, high), n)


def _poisson_edges() -> Tensor:
    """Cumulative probabilities of Poisson(1), scaled to 32-bit words."""
    below = torch.special.gammaincc(torch.arange(1, 14, dtype=torch.float64), torch.ones((), dtype=torch.float64))
    return torch.tensor([int(share * 2**32) for share in below.tolist()])


def poisson_weights(ids: Tensor, draws: int, *, seed: int = 0) -> Tensor:
    """Bootstrap weights (N, draws) float64, Poisson(1), a function of (seed, id, draw): any partition of the examples
    has the same ones (Chamandy et al. 2012)."""
    bits = random.words(ids, draws, seed=seed, purpose="bootstrap")
    return torch.bucketize(bits.contiguous(), _poisson_edges(), right=True).double()


def bootstrap_means(ids: Tensor, values: Tensor, *, draws: int = DRAWS, confidence: float = 0.95) -> list[Interval]:
    """Means of columns with bootstrap percentile intervals; NaN entries are left out, column by column.

    Shapes: ids (N,), values (N, M) float64. Fewer than 2 values give no interval.
    """
    known = ~values.isnan()
    filled = torch.where(known, values, torch.zeros_like(values))
    sums = torch.zeros(draws, values.shape[1], dtype=torch.float64)
    counts = torch.zeros_like(sums)
    for start in range(0, len(ids), CHUNK):
        part = slice(start, start + CHUNK)
        weights = poisson_weights(ids[part], draws)
        sums += weights.T @ filled[part]
        counts += weights.T @ known[part].double()
    tail = (1 - confidence) / 2
    n = known.sum(0)
    found = []
    for column in range(values.shape[1]):
        count = int(n[column])
        value = float(filled[:, column].sum() / count) if count else None
        usable = counts[:, column] > 0
        if count < 2 or not bool(usable.any()):
            found.append(Interval(value, None, None, count))
            continue
        means = (sums[usable, column] / counts[usable, column]).sort().values
        low, high = torch.quantile(means, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
        found.append(Interval(value, low, high, count))
    return found


def bootstrap_median(ids: Tensor, values: Tensor, *, draws: int = DRAWS, confidence: float = 0.95) -> Interval:
    """Median of values (N,) float64, which may be infinite, with a bootstrap percentile interval; NaN entries are left
    out. Of an even number the mean of the middle two; what is infinite is told as None."""
    known = ~values.isnan()
    order = values[known].argsort(stable=True)
    ids, values = ids[known][order], values[known][order]
    n = len(values)
    if n == 0:
        return Interval(None, None, None, 0)
    value = finite_or_none(float((values[(n - 1) // 2] + values[n // 2]) / 2))
    if n < 2:
        return Interval(value, None, None, n)
    tail = (1 - confidence) / 2
    ranked = values[_middle(ids, draws)].sort().values
    low, high = (ranked[min(int(share * len(ranked)), len(ranked) - 1)] for share in (tail, 1 - tail))
    return Interval(value, finite_or_none(float(low)), finite_or_none(float(high)), n)


def _middle(ids: Tensor, draws: int) -> Tensor:
    """Of each bootstrap draw with any weight the row at which half of the weight is reached, int64 (draws or fewer,).

    Only the parts in which a middle lies are drawn again, so that weights of all rows are never held at once.
    """
    parts = ids.split(CHUNK)
    weight = torch.stack([poisson_weights(part, draws).sum(0) for part in parts])
    reached = weight.cumsum(0)
    total = reached[-1]
    home = (2 * reached >= total).to(torch.uint8).argmax(0)
    middle = torch.empty(draws, dtype=torch.int64)
    for number in home.unique().tolist():
        here = home == number
        inside = reached[number] - weight[number] + poisson_weights(parts[number], draws).cumsum(0)
        middle[here] = number * CHUNK + (2 * inside >= total).to(torch.uint8).argmax(0)[here]
    return middle[total > 0]


def z_score(value: float, reference: float, spread: float) -> float | None:
    """How many standard errors `value` lies above `reference`; None where the spread is 0."""
    return (value - reference) / spread if spread > 0 else None


def mcnemar(first: Tensor, second: Tensor) -> float:
    """Exact two-sided p-value that two models are right equally often on the same examples (McNemar 1947).

    Shapes: bool (N,) each, paired.
    """
    only_first, only_second = int((first & ~second).sum()), int((~first & second).sum())
    if only_first + only_second == 0:
        return 1.0
    return float(scipy.stats.binomtest(only_first, only_first + only_second, 0.5).pvalue)


def finite_or_none(value: float | None) -> float | None:
    """JSON has no NaN: None instead."""
    return value if value is not None and math.isfinite(value) else None
