"""Attributions: the table of methods, and those that average gradients: gradient, input x gradient, SmoothGrad and
expected gradients (SHAP).

Each of these is a mean, over samples, of gradients of a scalar output; (image, sample) pairs of many images stream
through padded blocks, so that memory is flat in the number of samples and blocks are always full. Attributions are
unreduced and signed, (N, C, H, W), in pixel space.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rbkit.tools import random
from rbkit.tools.attribution import Explained, Saliency, accumulated, gradients, output_of, values
from rbkit.tools.gradcam import grad_cam
from rbkit.tools.guided import guided_backprop
from rbkit.tools.integrated_gradients import integrated_gradients
from rbkit.tools.models import Evaluation, in_blocks
from rbkit.tools.norms import per_row
from rbkit.tools.occlusion import occlusion
from rbkit.tools.shapley import exact_shap, permutation_shap


def gradient(
    evaluation: Evaluation, images: Tensor, target: Tensor, spec: Saliency, **unused: Tensor | None
) -> Explained:
    """The gradient of the output (Simonyan et al. 2014)."""

    def look(block: Tensor, goal: Tensor) -> tuple[Tensor, Tensor]:
        return gradients(evaluation, block, goal, spec.output)

    slope, logits = in_blocks(look, images, target, block=evaluation.block, lanes=evaluation.lanes_for(images))
    # As images are laid out: the order of the sums over a map depends on it.
    return Explained(slope.contiguous(), target, prediction=logits.argmax(1))


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
        return images.index_select(0, rows) + spec.sigma * noise, share

    total, _ = accumulated(
        evaluation, images, target, spec, points=spec.samples, point=point, lanes=evaluation.lanes_for(images)
    )
    return Explained(total, target)


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

    def draw(rows: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        chosen = random.integers(ids[rows], len(background), seed=spec.seed, purpose="shap background", draw=numbers)
        return chosen, random.uniform(ids[rows], (1,), seed=spec.seed, purpose="shap alpha", draw=numbers)[:, 0]

    def point(rows: Tensor, numbers: Tensor, chosen: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
        start, end = background.index_select(0, chosen), images.index_select(0, rows)
        return torch.lerp(start, end, per_row(alpha)), end - start

    total, square = accumulated(
        evaluation,
        images,
        target,
        spec,
        points=spec.samples,
        point=point,
        draw=draw,
        lanes=evaluation.lanes_for(images),
    )
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
