"""Alignment: does the map, or the gradient, look like the image?"""

from __future__ import annotations

import torch
from torch import Tensor

from rbkit.tools.batch import Batch, defined
from rbkit.tools.models import in_blocks


def alignment(batch: Batch) -> Tensor:
    """|cosine| between map and image, both per location and centred: does the map look like the image?"""
    assert batch.explained is not None
    image = batch.explained.sum(1).flatten(1).double()
    maps = batch.maps.flatten(1).double()
    image, maps = (x - x.mean(1, keepdim=True) for x in (image, maps))
    sizes = image.norm(dim=1) * maps.norm(dim=1)
    return defined(sizes > 0, (image * maps).sum(1).abs() / sizes.clamp_min(1e-300))


def etmann_alignment(batch: Batch) -> Tensor:
    """|<x, g>| / |g| with g the gradient of the margin between the first two classes (Etmann et al. 2019, Def. 3),
    in [0, 1] pixels; for a linear binary model without bias the distance to the decision boundary."""
    assert batch.explained is not None

    def measure(images: Tensor) -> Tensor:
        images = images.detach().requires_grad_()
        with torch.enable_grad():
            top = batch.evaluation(images).topk(2, dim=1).values
            gradient = torch.autograd.grad((top[:, 0] - top[:, 1]).sum(), images)[0]
        inner = (images.detach() * gradient).flatten(1).double().sum(1).abs()
        size = gradient.flatten(1).double().norm(dim=1)
        return defined(size > 0, inner / size.clamp_min(1e-300))

    return in_blocks(measure, batch.explained, block=batch.evaluation.block)
