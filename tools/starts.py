"""Starts of inversions: grey noise, and the Gaussian seeds of class images, fitted to training images.

Source: Santurkar et al. 2019 (arXiv 1906.09453) for the seeds.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from rbkit.tools import random

SEED_GRID = 4  # side of the blocks that class seeds are averaged over
RIDGE = 1e-4  # added to the seeds' covariance


def grey_noise(ids: Tensor, shape: tuple[int, ...], *, seed: int, draw: int = 0) -> Tensor:
    """The paper's grey start (N, *shape): 0.5 plus uniform noise in [0, 1/20), in [0, 1] pixels, keyed by id."""
    return 0.5 + random.uniform(ids, shape, seed=seed, purpose="grey noise", draw=draw) / 20


@dataclass(frozen=True)
class ClassSeeds:
    """Gaussians of block-averaged images, one per class: mean (K, D), factor (K, D, D) lower triangular."""

    mean: Tensor
    factor: Tensor
    shape: tuple[int, int, int]
    grid: int


def fit_seeds(images: Tensor, labels: Tensor, classes: int, *, grid: int = SEED_GRID) -> ClassSeeds:
    """Fit class-conditional Gaussians to training images averaged over grid x grid pixels.

    Shapes: images (N, C, H, W), H and W multiples of `grid`. Raises: ValueError for other sizes or an absent class.
    """
    _, channels, height, width = images.shape
    if height % grid or width % grid:
        raise ValueError(f"images of {height} x {width} do not divide into blocks of {grid}")
    small = F.avg_pool2d(images, grid).flatten(1).double()
    means, factors = [], []
    for label in range(classes):
        rows = small[labels == label]
        if not len(rows):
            raise ValueError(f"no training image of class {label} to fit seeds on")
        centred = rows - rows.mean(0)
        covariance = centred.T @ centred / max(len(rows) - 1, 1)
        covariance += RIDGE * torch.eye(small.shape[1], dtype=torch.float64, device=images.device)
        means.append(rows.mean(0))
        factors.append(torch.linalg.cholesky(covariance))
    return ClassSeeds(torch.stack(means), torch.stack(factors), (channels, height, width), grid)


def draw_seeds(seeds: ClassSeeds, labels: Tensor, *, ids: Tensor, seed: int, draw: int = 0) -> Tensor:
    """A seed image per label, nearest-upsampled to full size and cut to [0, 1], keyed by id (N, C, H, W)."""
    channels, height, width = seeds.shape
    size = seeds.mean.shape[1]
    noise = random.normal(ids, (size,), seed=seed, purpose="class seed", draw=draw).double()
    small = seeds.mean[labels] + torch.einsum("nij,nj->ni", seeds.factor[labels], noise)
    low = small.reshape(-1, channels, height // seeds.grid, width // seeds.grid).clamp(0, 1)
    return low.repeat_interleave(seeds.grid, 2).repeat_interleave(seeds.grid, 3).to(torch.float32)
