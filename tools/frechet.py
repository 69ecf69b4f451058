"""The Fréchet distance between two sets of features (Heusel et al. 2017): a number of a set, not a mean of examples.

Called FID only with the features of the standard Inception network; here the features are those of the judge model.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rbkit.tools import random


def frechet(first: Tensor, second: Tensor) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of the Gaussians fitted to features (N, D) and (M, D), in float64.

    tr (C1 C2)^(1/2) is the sum of the singular values of R1 R2', where C = R' R / (n - 1): no root of a matrix, so that
    it is exact also where a covariance is singular (n <= D). Raises: ValueError for fewer than 2 rows.
    """
    if min(len(first), len(second)) < 2:
        raise ValueError(f"{min(len(first), len(second))} rows have no covariance; expected 2 or more")
    means, roots = [], []
    for features in (first.double(), second.double()):
        mean = features.mean(0)
        means.append(mean)
        roots.append(torch.linalg.qr(features - mean, mode="r").R / (len(features) - 1) ** 0.5)
    cross = torch.linalg.svdvals(roots[0] @ roots[1].T).sum()
    spread = roots[0].square().sum() + roots[1].square().sum() - 2 * cross
    return float((means[0] - means[1]).square().sum() + spread.clamp_min(0))


def extrapolated(ids: Tensor, first: Tensor, second: Tensor) -> float | None:
    """The distance for n to infinity, if its bias falls as 1 / n (Chong and Forsyth 2020): 2 F(n) - F(n / 2).

    F(n / 2) is the mean over two halves drawn by id. None where a half has too few rows for a covariance of full rank.
    """
    order = random.uniform(ids, (1,), seed=0, purpose="halves")[:, 0].argsort(stable=True)
    size = len(ids) // 2
    if size <= first.shape[1]:
        return None
    halves = (order[:size], order[size : 2 * size])
    return 2 * frechet(first, second) - sum(frechet(first[half], second[half]) for half in halves) / 2
