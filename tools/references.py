"""Maps that know nothing of the model: the chance band of the metrics of attributions."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from rbkit.tools import random
from rbkit.tools.batch import Batch


def reference_maps(batch: Batch) -> dict[str, Tensor]:
    """Maps that know nothing of the model, of the same images: the chance band. `oracle` where there is a mask.

    Shapes: each (N, H, W).
    """
    assert batch.explained is not None
    n, _, height, width = batch.explained.shape
    grey = batch.explained.mean(1)
    rows = torch.linspace(-1, 1, height, device=grey.device)[:, None]
    columns = torch.linspace(-1, 1, width, device=grey.device)[None, :]
    maps = {
        "random": random.normal(batch.ids, (height, width), seed=0, purpose="random map").abs(),
        "edges": _sobel(grey),
        "magnitude": (grey - grey.mean((1, 2), keepdim=True)).abs(),
        "centre": torch.exp(-2 * (rows**2 + columns**2)).expand(n, height, width),
    }
    if batch.mask is not None:
        maps["oracle"] = batch.mask.to(grey.dtype)
    return maps


def _sobel(grey: Tensor) -> Tensor:
    kernel = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]], device=grey.device)
    weights = torch.stack([kernel, kernel.T])[:, None]
    edges = F.conv2d(F.pad(grey[:, None], (1, 1, 1, 1), mode="replicate"), weights)
    return edges.square().sum(1).sqrt()
