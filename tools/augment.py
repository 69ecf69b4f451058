"""Augmentation as a function of (seed, epoch, example id): the same for any batch, order or number of processes."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from rbkit.tools import random


def crop_flip(images: Tensor, ids: Tensor, *, seed: int, epoch: int, pad: int = 4, flip: bool = True) -> Tensor:
    """Zero-pad by `pad` pixels, crop at a random offset, mirror every other example on average.

    Shapes: images (N, C, H, W) to the same; ids (N,).
    """
    n, _, height, width = images.shape
    offset = random.words(ids, 3, seed=seed, purpose="augment", draw=epoch)
    top, left = ((offset[:, i] * (2 * pad + 1)) >> 32 for i in (0, 1))
    rows = top[:, None] + torch.arange(height, device=images.device)
    columns = left[:, None] + torch.arange(width, device=images.device)
    if flip:
        mirrored = (offset[:, 2] >> 31).bool()
        columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    padded = F.pad(images, (pad, pad, pad, pad)).permute(0, 2, 3, 1)
    picked = padded[torch.arange(n, device=images.device)[:, None, None], rows[:, :, None], columns[:, None, :]]
    return picked.permute(0, 3, 1, 2)


def resized(images: Tensor, ids: Tensor, *, seed: int, epoch: int, degrees: float = 20.0) -> Tensor:
    """A random part of the image at full size, mirrored every other time on average and turned by up to `degrees`.

    The part has 8 to 100 % of the area and an aspect of 3:4 to 4:3 (Szegedy et al. 2015), cut to the image; what a turn
    brings in from outside the part is black. Shapes: images (N, C, H, W) to the same; ids (N,).
    """
    height, width = images.shape[2:]
    u = random.uniform(ids, (6,), seed=seed, purpose="augment", draw=epoch).T[:, :, None, None]
    area, ratio = 0.08 + 0.92 * u[0], torch.exp(math.log(4 / 3) * (2 * u[1] - 1))
    across, down = (area * ratio).sqrt().clamp_max(1), (area / ratio).sqrt().clamp_max(1)
    angle = math.radians(degrees) * (2 * u[2] - 1)
    x = torch.arange(width, device=images.device) - (width - 1) / 2
    y = (torch.arange(height, device=images.device) - (height - 1) / 2)[:, None]
    # Where each pixel comes from in the part, whose corners are -1 and 1.
    column = (angle.cos() * x + angle.sin() * y) * (2 / width)
    row = (angle.cos() * y - angle.sin() * x) * (2 / height)
    inside = (column.abs() <= 1) & (row.abs() <= 1)
    mirror = 1 - 2 * (u[3] < 0.5).to(u.dtype)
    grid = torch.stack(
        [(1 - across) * (2 * u[4] - 1) + mirror * across * column, (1 - down) * (2 * u[5] - 1) + down * row], 3
    )
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False) * inside[:, None]
