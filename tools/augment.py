"""Augmentation as a function of (seed, epoch, example id): the same for any batch, order or number of processes."""

from __future__ import annotations

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
