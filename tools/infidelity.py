"""Faithfulness by removal: do the attributions of what is removed add up to the change of the output?

Removed locations take the model's mean colour, all channels together. What is explained (logit, probability, ...) is
what is measured. The changes belong to image and model, so that all methods and reference maps share them.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from rbkit.tools import random
from rbkit.tools.attribution import output_of, values
from rbkit.tools.batch import Batch, defined
from rbkit.tools.masking import shown
from rbkit.tools.models import in_blocks
from rbkit.tools.rowwise import TINY, correlation

# They say how the output changes per pixel value; other methods, by how much.
GRADIENTS = ("gradient", "smoothgrad", "guided-backprop")
SQUARES = 32
SUBSETS = 32  # per size
SHARES = (1 / 32, 1 / 8, 1 / 2)  # of the locations, the n of sensitivity-n


def contributions(batch: Batch) -> Tensor:
    """What each location adds to the output over the mean colour, as the attribution has it, float64 (N, H W).

    Signed. A gradient counts times the difference to the mean colour, as Yeh et al. 2019 have it.
    """
    assert batch.attribution is not None and batch.explained is not None
    found = batch.attribution.double()
    if batch.saliency is None or batch.saliency.method in GRADIENTS:
        found = found * (batch.explained.double() - _mean(batch).double())
    return found.sum(1).flatten(1)


def _mean(batch: Batch) -> Tensor:
    return batch.evaluation.model.mean.clamp(0, 1)


def _changes(batch: Batch, removed: Tensor) -> Tensor:
    """Output of the image minus that without the locations of `removed` (N, D, H W) bool, float64 (N, D)."""
    assert batch.explained is not None and batch.target is not None
    images, target, mean = batch.explained, batch.target, _mean(batch)
    n, draws, _ = removed.shape
    rows = torch.arange(n, device=removed.device).repeat_interleave(draws)

    def look(row: Tensor, gone: Tensor) -> Tensor:
        left = shown(mean, images.index_select(0, row), gone.reshape(-1, 1, *images.shape[2:]))
        with torch.no_grad():
            return output_of(batch.evaluation(left), target[row], batch.output).double()

    found = in_blocks(look, rows, removed.flatten(0, 1), block=batch.evaluation.block, lanes=batch.lanes).reshape(
        n, draws
    )
    return values(batch.evaluation, images, target, batch.output)[:, None] - found


def squares(ids: Tensor, height: int, width: int) -> Tensor:
    """Random squares, up to half the shorter side wide, keyed by id: bool (N, SQUARES, H W)."""
    sizes = max(1, min(height, width) // 2)
    u = random.uniform(ids, (SQUARES, 3), seed=0, purpose="squares")
    side = 1 + (u[..., 0] * sizes).long()
    top, left = (u[..., 1] * (height - side + 1)).long(), (u[..., 2] * (width - side + 1)).long()
    y = torch.arange(height, device=ids.device).reshape(1, 1, -1, 1) - top[..., None, None]
    x = torch.arange(width, device=ids.device).reshape(1, 1, 1, -1) - left[..., None, None]
    side = side[..., None, None]
    return ((y >= 0) & (y < side) & (x >= 0) & (x < side)).flatten(2)


def subsets(ids: Tensor, locations: int, size: int) -> Tensor:
    """Random sets of `size` locations, keyed by id: bool (N, SUBSETS, H W)."""
    u = random.uniform(ids, (SUBSETS, locations), seed=0, purpose="subsets", draw=size)
    return u.argsort(dim=2, stable=True).argsort(dim=2, stable=True) < size


def _square_sums(batch: Batch) -> tuple[Tensor, Tensor]:
    """(sum of contributions, change of output) for each random square, float64 (N, SQUARES)."""
    assert batch.explained is not None
    removed = squares(batch.ids, *batch.explained.shape[2:])
    changes = batch.once(f"squares {batch.output}", lambda: _changes(batch, removed))
    return (removed * contributions(batch)[:, None]).sum(2), changes


def infidelity(batch: Batch) -> Tensor:
    """Mean square of (sum of contributions - change of output) over random squares (Yeh et al. 2019, eq. 1).

    Its unit is that of the output squared, so that only maps of one scale compare.
    """
    sums, changes = _square_sums(batch)
    return (sums - changes).square().mean(1)


def infidelity_scaled(batch: Batch) -> Tensor:
    """Infidelity of the map times its best factor, as a share of the mean square change: 0 exact, 1 no better than zero.

    The factor is the optimum of Yeh et al. 2019, not below 0: a map of the wrong sign is no good map.
    """
    sums, changes = _square_sums(batch)
    power = changes.square().sum(1)
    factor = ((sums * changes).sum(1) / sums.square().sum(1).clamp_min(TINY)).clamp_min(0)
    error = (factor[:, None] * sums - changes).square().sum(1)
    return defined(power > 0, error / power.clamp_min(TINY))


def sensitivity_n(batch: Batch) -> Tensor:
    """Correlation, over random sets of n locations, of summed contributions and change of output (Ancona et al. 2018).

    The mean over n of 1/32, 1/8 and 1/2 of the locations, per example; sizes at which either side is constant
    do not count.
    """
    assert batch.explained is not None
    locations = batch.explained[0, 0].numel()
    found = []
    for size in sorted({max(1, round(share * locations)) for share in SHARES}):
        removed = subsets(batch.ids, locations, size)
        changes = batch.once(f"subsets {size} {batch.output}", partial(_changes, batch, removed))
        found.append(correlation((removed * contributions(batch)[:, None]).sum(2), changes))
    return torch.stack(found, 1).nanmean(1)
