"""ROAD: removal by noisy linear imputation, which leaves no mask to be seen in the image (Rong et al. 2022)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from rbkit.tools import random
from rbkit.tools.batch import Batch
from rbkit.tools.faithfulness import order_of, probability, random_order, rank_of
from rbkit.tools.models import in_blocks

SHARES = (0.1, 0.3, 0.5, 0.7, 0.9)  # of the locations that are removed
NOISE = 0.01  # standard deviation, in [0, 1] pixels
TOLERANCE = 1e-4  # residual of the linear equations, relative to their right side
STEPS = 400


def _spread(images: Tensor) -> Tensor:
    """Weighted sum of the eight neighbours: 1/6 each side, 1/12 each corner, nothing from outside."""
    x = F.pad(images, (1, 1, 1, 1))
    rows = x[..., :-2] + 2 * x[..., 1:-1] + x[..., 2:]
    return (rows[..., :-2, :] + 2 * rows[..., 1:-1, :] + rows[..., 2:, :]) / 12 - images / 3


def impute(images: Tensor, removed: Tensor) -> Tensor:
    """Images whose removed locations are the weighted mean of their neighbours, removed or not (Rong et al. 2022, eq. 4).

    Shapes: images (N, C, H, W), removed bool (N, 1, H, W). Conjugate gradients per image and channel: the equations
    are symmetric and positive definite where anything is left. A row that has converged moves no more, so that its
    value does not depend on its neighbours.
    """
    weight = _spread(torch.ones_like(images))

    def total(x: Tensor) -> Tensor:
        return x.sum((2, 3), keepdim=True)

    def apply(x: Tensor) -> Tensor:
        return torch.where(removed, weight * x - _spread(x), 0)

    known = torch.where(removed, 0, images)
    goal = torch.where(removed, _spread(known), 0)
    x = torch.where(removed, total(known) / total((~removed).to(images.dtype)).clamp_min(1), 0)
    residual = goal - apply(x)
    direction, power = residual, total(residual**2)
    bar = TOLERANCE**2 * total(goal**2)
    for _ in range(STEPS):
        open_ = power > bar
        if not bool(open_.any()):
            break
        moved = apply(direction)
        step = torch.where(open_, power / total(direction * moved).clamp_min(1e-30), 0)
        x = x + step * direction
        residual = residual - step * moved
        fresh = total(residual**2)
        direction = torch.where(open_, residual + fresh / power.clamp_min(1e-30) * direction, direction)
        power = torch.where(open_, fresh, power)
    return known + x


def _curve(batch: Batch, order: Tensor) -> Tensor:
    """Mean probability of the target without the first 10 to 90 % of `order`, float64 (N,)."""
    assert batch.explained is not None
    images = batch.explained
    n, _, height, width = images.shape
    counts = (torch.tensor(SHARES, device=order.device) * height * width).round().long()
    rank = rank_of(order)
    noise = NOISE * random.normal(batch.ids, tuple(images.shape[1:]), seed=0, purpose="road")

    def look(row: Tensor, count: Tensor) -> Tensor:
        removed = (rank[row] < count[:, None]).reshape(-1, 1, height, width)
        return probability(batch, (impute(images[row], removed) + noise[row] * removed).clamp(0, 1), row)

    rows = torch.arange(n, device=order.device).repeat_interleave(len(SHARES))
    found = in_blocks(look, rows, counts.repeat(n), block=batch.evaluation.block, lanes=batch.lanes)
    return found.reshape(n, len(SHARES)).mean(1)


def _above_random(batch: Batch, *, most: bool) -> Tensor:
    by_chance = batch.once("road", lambda: _curve(batch, random_order(batch)))
    return _curve(batch, order_of(batch, most=most)) - by_chance


def road_morf(batch: Batch) -> Tensor:
    """Probability of the target without the most relevant 10 to 90 % of the locations, imputed from their neighbours
    with noise (ROAD, Rong et al. 2022), above random order; lower is better."""
    return _above_random(batch, most=True)


def road_lerf(batch: Batch) -> Tensor:
    """The same without the least relevant locations (ROAD, Rong et al. 2022); higher is better."""
    return _above_random(batch, most=False)
