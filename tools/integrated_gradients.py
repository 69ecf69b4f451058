"""Integrated gradients (Sundararajan et al. 2017): gradients along the straight path from a baseline to the image.

(image, path point) pairs of many images stream through padded blocks, so that memory is flat in the number of steps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rbkit.tools import random
from rbkit.tools.attribution import Explained, Saliency, accumulated, values
from rbkit.tools.masking import filler
from rbkit.tools.models import Evaluation
from rbkit.tools.norms import per_row

BASELINES = ("black", "white", "mean", "blur", "uniform", "data")


def baseline_of(
    spec: Saliency, evaluation: Evaluation, images: Tensor, *, ids: Tensor, draw: int, background: Tensor | None
) -> Tensor:
    """The start of the path for each image, in pixel space (N, C, H, W).

    black, white, mean (the model's mean colour), blur (sigma 4 pixels), uniform noise, or data: a background image
    per id. Raises: ValueError for `data` without background.
    """
    if spec.baseline == "white":
        return torch.ones_like(images)
    if spec.baseline == "uniform":
        return random.uniform(ids, tuple(images.shape[1:]), seed=spec.seed, purpose="baseline", draw=draw)
    if spec.baseline == "data":
        if background is None:
            raise ValueError("baseline data needs background images; try --background FILE")
        return background[random.integers(ids, len(background), seed=spec.seed, purpose="baseline", draw=draw)]
    return filler(spec.baseline, evaluation, images)


def _path_sum(
    evaluation: Evaluation,
    images: Tensor,
    base: Tensor,
    target: Tensor,
    spec: Saliency,
    alphas: Tensor,
    weights: Tensor,
) -> Tensor:
    """Sum of weight x gradient along the straight path from `base`, times the whole step."""

    def point(rows: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        # index_select takes whole rows at a time, several times faster than indexing does.
        start, end = base.index_select(0, rows), images.index_select(0, rows)
        return torch.lerp(start, end, per_row(alphas[numbers])), per_row(weights[numbers])

    total, _ = accumulated(
        evaluation, images, target, spec, points=len(alphas), point=point, lanes=evaluation.lanes_for(images)
    )
    return total * (images - base)


def _trapezoid(steps: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Points and weights of the trapezoid rule with `steps` intervals."""
    alphas = torch.linspace(0, 1, steps + 1, device=device)
    weights = torch.full((steps + 1,), 1.0 / steps, device=device)
    weights[0] = weights[-1] = 0.5 / steps
    return alphas, weights


def _open(part: Tensor, difference: Tensor, tolerance: float) -> Tensor:
    """Which completeness errors are above the tolerance times the change of output, bool (N,)."""
    error = (part.flatten(1).double().sum(1) - difference).abs()
    return error > tolerance * difference.abs().clamp_min(1e-3)


def _refine(
    evaluation: Evaluation, images: Tensor, base: Tensor, target: Tensor, spec: Saliency, total: Tensor, change: Tensor
) -> tuple[Tensor, Tensor]:
    """Double the steps of every image whose completeness error is above the tolerance; old points are reused.

    The trapezoid rule of 2 s steps is the mean of that of s steps and the midpoint rule of s steps.
    """
    assert spec.tolerance is not None
    used = torch.full((len(images),), spec.steps, device=images.device)
    steps = spec.steps
    while 2 * steps <= spec.max_steps:
        open_ = _open(total, change, spec.tolerance).nonzero()[:, 0]
        if not len(open_):
            break
        middles = (torch.arange(steps, device=images.device) + 0.5) / steps
        weights = torch.full((steps,), 1.0 / steps, device=images.device)
        more = _path_sum(evaluation, images[open_], base[open_], target[open_], spec, middles, weights)
        total[open_] = (total[open_] + more) / 2
        steps *= 2
        used[open_] = steps
    return total, used


def integrated_gradients(
    evaluation: Evaluation,
    images: Tensor,
    target: Tensor,
    spec: Saliency,
    *,
    ids: Tensor,
    background: Tensor | None = None,
) -> Explained:
    """Integrated gradients (Sundararajan et al. 2017, eq. 1) by the trapezoid rule, averaged over baselines.

    The completeness error is the mean over baselines of |sum of attributions - (F(x) - F(baseline))|; with a tolerance,
    `missed` says where that of some baseline stayed above it.
    """
    top = values(evaluation, images, target, spec.output)
    total, error, change = torch.zeros_like(images), torch.zeros_like(top), torch.zeros_like(top)
    used = torch.zeros(len(images), dtype=torch.int64, device=images.device)
    missed = torch.zeros_like(used, dtype=torch.bool)
    alphas, weights = _trapezoid(spec.steps, images.device)
    for draw in range(spec.baselines):
        base = baseline_of(spec, evaluation, images, ids=ids, draw=draw, background=background)
        difference = top - values(evaluation, base, target, spec.output)
        part = _path_sum(evaluation, images, base, target, spec, alphas, weights)
        steps = torch.full_like(used, spec.steps)
        if spec.tolerance is not None:
            part, steps = _refine(evaluation, images, base, target, spec, part, difference)
            missed |= _open(part, difference, spec.tolerance)
        total += part / spec.baselines
        error += (part.flatten(1).double().sum(1) - difference).abs() / spec.baselines
        change += difference / spec.baselines
        used = torch.maximum(used, steps)
    return Explained(total, target, error, change, used, missed=None if spec.tolerance is None else missed)
