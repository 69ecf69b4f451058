"""Faithfulness: does the output follow what the map calls important?"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from rbkit.tools import random
from rbkit.tools.batch import Batch
from rbkit.tools.masking import blurred, shown
from rbkit.tools.models import in_blocks

GRID = 11  # points of a flipping curve, both ends included


def _flip_curve(batch: Batch, order: Tensor, *, insert: bool, imputation: str) -> Tensor:
    """Probability of the target while locations are removed (or inserted) in `order`, float64 (N, GRID).

    order (N, H W): location indices, first to be flipped first. All channels of a location flip together.
    """
    assert batch.explained is not None
    n, _, height, width = batch.explained.shape
    whole, gone = batch.explained, _fill(batch, imputation)
    base, other = (gone, whole) if insert else (whole, gone)
    block, rank = batch.evaluation.block, rank_of(order)
    counts = torch.linspace(0, height * width, GRID, device=order.device).round().long()[1:-1]
    rows = torch.arange(n, device=order.device)

    def look(row: Tensor, count: Tensor) -> Tensor:
        flipped = (rank.index_select(0, row) < count[:, None]).reshape(-1, 1, height, width)
        return probability(batch, shown(other.index_select(0, row), base.index_select(0, row), flipped), row)

    def end(images: Tensor) -> Tensor:
        return in_blocks(lambda row: probability(batch, images[row], row), rows, block=block)[:, None]

    between = in_blocks(
        look, rows.repeat_interleave(GRID - 2), counts.repeat(n), block=block, lanes=batch.lanes
    ).reshape(n, GRID - 2)
    # No order changes the ends: all methods and reference maps share them.
    at_whole, at_gone = batch.once("whole", lambda: end(whole)), batch.once(f"gone {imputation}", lambda: end(gone))
    first, last = (at_gone, at_whole) if insert else (at_whole, at_gone)
    return torch.cat([first, between, last], dim=1)


def _area(curve: Tensor) -> Tensor:
    """Mean height of a curve by the trapezoid rule, (N,)."""
    return ((curve[:, 1:] + curve[:, :-1]) / 2).mean(1)


def random_order(batch: Batch) -> Tensor:
    """Locations in random order, keyed by id, (N, H W)."""

    def drawn() -> Tensor:
        size = batch.image[0, 0].numel()
        return random.order(batch.ids, size, seed=0, purpose="random order")

    return batch.once("random order", drawn)


def order_of(batch: Batch, *, most: bool = True) -> Tensor:
    """Locations (N, H W) from the most relevant on, or from the least.

    Ties are broken by the random order, so that a constant map equals it exactly.
    """
    shuffle = random_order(batch)
    maps = batch.maps.flatten(1).gather(1, shuffle)
    return shuffle.gather(1, maps.argsort(dim=1, descending=most, stable=True))


def rank_of(order: Tensor) -> Tensor:
    """When each location has its turn, (N, H W): the inverse of an order."""
    turns = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, turns)


def probability(batch: Batch, images: Tensor, rows: Tensor) -> Tensor:
    """Probability of the targets of `rows` on one padded block of images, float64 (B,)."""
    assert batch.target is not None
    with torch.no_grad():
        scores = F.softmax(batch.evaluation(images).double(), dim=1)
    return scores.gather(1, batch.target[rows][:, None])[:, 0]


def _fill(batch: Batch, imputation: str) -> Tensor:
    assert batch.explained is not None
    if imputation == "mean":
        return batch.evaluation.model.mean.clamp(0, 1).expand_as(batch.explained)
    return blurred(batch.explained)


def _flipping(batch: Batch, *, insert: bool, imputation: str) -> Tensor:
    """Area under the curve minus that of a random order on the same image and model."""

    def area(order: Tensor) -> Tensor:
        return _area(_flip_curve(batch, order, insert=insert, imputation=imputation))

    by_chance = batch.once(f"random {insert} {imputation}", lambda: area(random_order(batch)))
    return area(order_of(batch)) - by_chance


def insertion(batch: Batch) -> Tensor:
    """Insertion into the blurred image (Petsiuk et al. 2018), above random order."""
    return _flipping(batch, insert=True, imputation="blur")


def deletion(batch: Batch) -> Tensor:
    """Deletion to the blurred image (Petsiuk et al. 2018), above random order; lower is better."""
    return _flipping(batch, insert=False, imputation="blur")


def insertion_mean(batch: Batch) -> Tensor:
    """Insertion into the mean colour: the second imputation."""
    return _flipping(batch, insert=True, imputation="mean")


def deletion_mean(batch: Batch) -> Tensor:
    """Deletion to the mean colour: the second imputation."""
    return _flipping(batch, insert=False, imputation="mean")


def completeness_error(batch: Batch) -> Tensor:
    """|sum of attributions - change of output|, as stored by the method."""
    assert batch.completeness is not None
    return batch.completeness.double()


def completeness_error_median(batch: Batch) -> Tensor:
    """The completeness error, pooled by its median: a few images with a large error count no more than others."""
    return completeness_error(batch)
