"""Correlations of one row of values with another, row by row."""

from __future__ import annotations

import scipy
import torch
from torch import Tensor

from rbkit.tools.batch import defined

TINY = 1e-300


def cosine(first: Tensor, second: Tensor) -> Tensor:
    """Cosine per row of float64 (N, D), in [-1, 1]; NaN where a row is zero."""
    sizes = first.norm(dim=1) * second.norm(dim=1)
    return defined(sizes > 0, (first * second).sum(1) / sizes.clamp_min(TINY))


def correlation(first: Tensor, second: Tensor) -> Tensor:
    """Pearson's correlation per row of float64 (N, D); NaN where a row is constant up to rounding."""
    centred = [x - x.mean(1, keepdim=True) for x in (first, second)]
    spread = [c.norm(dim=1) > 1e-9 * x.norm(dim=1) for c, x in zip(centred, (first, second), strict=True)]
    return defined(spread[0] & spread[1], cosine(centred[0], centred[1]))


def rank_correlation(first: Tensor, second: Tensor) -> Tensor:
    """Spearman's correlation per row of (N, D), ties by their mean rank; NaN where a row is constant."""
    ranks = [torch.from_numpy(scipy.stats.rankdata(x.cpu().numpy(), axis=1)).to(x.device) for x in (first, second)]
    return correlation(ranks[0], ranks[1])
