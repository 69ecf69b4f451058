"""Attributions: the table of methods, and those that average gradients: gradient, input x gradient, integrated
gradients, SmoothGrad and expected gradients (SHAP).

Each of these is a mean, over path points or samples, of gradients of a scalar output; (image, point) pairs of many
images stream through padded blocks, so that memory is flat in the number of steps and blocks are always full.
Attributions are unreduced and signed, (N, C, H, W), in pixel space.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rbkit.tools import random
from rbkit.tools.attribution import Explained, Saliency, accumulated, output_of, values
from rbkit.tools.gradcam import grad_cam
from rbkit.tools.guided import guided_backprop
from rbkit.tools.masking import filler
from rbkit.tools.models import Evaluation
from rbkit.tools.norms import per_row
from rbkit.tools.occlusion import occlusion
from rbkit.tools.shapley import exact_shap, permutation_shap

BASELINES = ("black", "white", "mean", "blur", "uniform", "data")


def gradient(
    evaluation: Evaluation, images: Tensor, target: Tensor, spec: Saliency, **unused: Tensor | None
) -> Explained:
    """The gradient of the output (Simonyan et al. 2014)."""
    one = torch.ones((), device=images.device)
    total, _ = accumulated(evaluation, images, target, spec, points=1, point=lambda rows, numbers: (images[rows], one))
    return Explained(total, target)


def input_x_gradient(
    evaluation: Evaluation, images: Tensor, target: Tensor, spec: Saliency, **unused: Tensor | None
) -> Explained:
    """Image times gradient (Shrikumar et al. 2016); its completeness error is that of a path from black."""
    explained = gradient(evaluation, images, target, spec)
    explained.attribution = explained.attribution * images
    black = torch.zeros_like(images)
    change = values(evaluation, images, target, spec.output) - values(evaluation, black, target, spec.output)
    explained.output_change = change
    explained.completeness_error = (explained.attribution.flatten(1).double().sum(1) - change).abs()
    return explained


def smoothgrad(
    evaluation: Evaluation, images: Tensor, target: Tensor, spec: Saliency, *, ids: Tensor, **unused: Tensor | None
) -> Explained:
    """Mean gradient under Gaussian noise of `sigma` (Smilkov et al. 2017); noise is keyed by (seed, id, draw)."""
    shape = tuple(images.shape[1:])
    share = torch.tensor(1.0 / spec.samples, device=images.device)

    def point(rows: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        noise = random.normal(ids[rows], shape, seed=spec.seed, purpose="smoothgrad", draw=numbers)
        return images[rows] + spec.sigma * noise, share

    total, _ = accumulated(evaluation, images, target, spec, points=spec.samples, point=point)
    return Explained(total, target)


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
        return torch.lerp(base[rows], images[rows], per_row(alphas[numbers])), per_row(weights[numbers])

    total, _ = accumulated(evaluation, images, target, spec, points=len(alphas), point=point)
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


def expected_gradients(
    evaluation: Evaluation,
    images: Tensor,
    target: Tensor,
    spec: Saliency,
    *,
    ids: Tensor,
    background: Tensor | None = None,
) -> Explained:
    """SHAP values by expected gradients (Erion et al. 2021; Lundberg's GradientExplainer).

    `samples` draws of a background image and a point on the path to it, keyed by (seed, id, draw), so that an image's
    map depends on no other image. Stores the standard error of the attributions' sum.
    Raises: ValueError without background.
    """
    if background is None or not len(background):
        raise ValueError("shap needs background images; try --background FILE")

    def point(rows: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        chosen = random.integers(ids[rows], len(background), seed=spec.seed, purpose="shap background", draw=numbers)
        alpha = random.uniform(ids[rows], (1,), seed=spec.seed, purpose="shap alpha", draw=numbers)[:, 0]
        base = background[chosen]
        return torch.lerp(base, images[rows], per_row(alpha)), images[rows] - base

    total, square = accumulated(evaluation, images, target, spec, points=spec.samples, point=point)
    mean = total / spec.samples
    summed = mean.flatten(1).double().sum(1)
    variance = (square / spec.samples - summed**2).clamp_min(0) / max(spec.samples - 1, 1)
    logits = evaluation.logits(background)
    base = torch.stack([output_of(logits, t.expand(len(background)), spec.output).double().mean() for t in target])
    change = values(evaluation, images, target, spec.output) - base
    return Explained(mean, target, (summed - change).abs(), change, standard_error=variance.sqrt())


METHODS: dict[str, Callable[..., Explained]] = {
    "gradient": gradient,
    "input-x-gradient": input_x_gradient,
    "ig": integrated_gradients,
    "smoothgrad": smoothgrad,
    "shap": expected_gradients,
    "occlusion": occlusion,
    "grad-cam": grad_cam,
    "guided-backprop": guided_backprop,
    "permutation-shap": permutation_shap,
    "exact-shap": exact_shap,
}


def explain(
    evaluation: Evaluation,
    images: Tensor,
    target: Tensor,
    spec: Saliency,
    *,
    ids: Tensor,
    background: Tensor | None = None,
) -> Explained:
    """Attributions of `images` for `target` by the method of `spec`. Shapes: images (N, C, H, W), target and ids (N,)."""
    return METHODS[spec.method](evaluation, images, target, spec, ids=ids, background=background)
