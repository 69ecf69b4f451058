"""Complexity: how few locations hold the relevance. Sparse maps are not thereby faithful."""

from __future__ import annotations

import torch
from torch import Tensor

from rbkit.tools.batch import Batch, defined


def gini(batch: Batch) -> Tensor:
    """Gini index of absolute relevance (Hurley and Rickard 2009; Chalasani et al. 2020): 0 constant, 1 - 1/d one-hot."""
    values = batch.maps.flatten(1).abs().double().sort(1).values
    d, total = values.shape[1], values.sum(1)
    rank = torch.arange(1, d + 1, device=values.device, dtype=torch.float64)
    index = 1 - 2 * (values / total.clamp_min(1e-300)[:, None] * (d - rank + 0.5) / d).sum(1)
    return defined(total > 0, index)


def entropy(batch: Batch) -> Tensor:
    """Entropy of the shares of absolute relevance (Bhatt et al. 2020), in nats."""
    values = batch.maps.flatten(1).abs().double()
    total = values.sum(1)
    share = values / total.clamp_min(1e-300)[:, None]
    return defined(total > 0, -torch.xlogy(share, share).sum(1))
