"""Alignment: does the map, or the gradient, look like the image?"""

from __future__ import annotations

import torch
from torch import Tensor

from rbkit.tools.batch import Batch, defined
from rbkit.tools.models import in_blocks
from rbkit.tools.rowwise import cosine

CUT_OFF = 1 / 8  # cycles per pixel: what is below has a period of more than 8 pixels


def _image_and_maps(batch: Batch) -> tuple[Tensor, Tensor]:
    """Image, channels summed, and map, float64 (N, H W) each."""
    assert batch.explained is not None
    return batch.explained.sum(1).flatten(1).double(), batch.maps.flatten(1).double()


def alignment(batch: Batch) -> Tensor:
    """|cosine| between map and image, both per location and centred: does the map look like the image?"""
    image, maps = (x - x.mean(1, keepdim=True) for x in _image_and_maps(batch))
    return cosine(image, maps).abs()


def alignment_uncentred(batch: Batch) -> Tensor:
    """|cosine| between map and image per location, in [0, 1] pixels without centring; also that of a constant is high."""
    image, maps = _image_and_maps(batch)
    return cosine(image, maps).abs()


def low_frequency_energy(batch: Batch) -> Tensor:
    """Share of the spectral energy of the map, its mean left out, below 1/8 cycles per pixel: are gradients made of
    shapes or of noise (perceptual alignment)?"""
    maps = batch.maps.double()
    energy = torch.fft.fft2(maps - maps.mean((1, 2), keepdim=True)).abs().square()
    rows, columns = (torch.fft.fftfreq(size, device=maps.device, dtype=maps.dtype) for size in maps.shape[1:])
    low = (rows[:, None] ** 2 + columns[None, :] ** 2).sqrt() < CUT_OFF
    total = energy.sum((1, 2))
    # Rounding alone leaves a constant map some energy.
    spread = total > 1e-18 * maps.square().sum((1, 2)) * maps[0].numel()
    return defined(spread, (energy * low).sum((1, 2)) / total.clamp_min(1e-300))


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
