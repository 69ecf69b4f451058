"""Stability: how far a map moves while the prediction stays."""

from __future__ import annotations

import torch
from torch import Tensor

from rbkit.tools.batch import Batch
from rbkit.tools.norms import NORMS

NOISE_RADIUS = 0.02  # Linf, in [0, 1] pixels: the same for all models
NOISE_DRAWS = 2


def max_sensitivity(batch: Batch) -> Tensor:
    """Largest relative change of the attribution among noisy copies that keep the prediction (Yeh et al. 2019, eq. 3).

    Noise is uniform in a Linf ball of 0.02; an example of which no copy keeps its prediction has none (M6).
    """
    assert batch.explained is not None and batch.attribution is not None
    worst = torch.full((len(batch.ids),), torch.nan, dtype=torch.float64, device=batch.ids.device)
    prediction = batch.evaluation.logits(batch.explained).argmax(1)
    size = batch.attribution.flatten(1).double().norm(dim=1)
    for draw in range(NOISE_DRAWS):
        noise = NORMS["linf"].start(batch.ids, tuple(batch.explained.shape[1:]), NOISE_RADIUS, seed=0, draw=draw)
        noisy = (batch.explained + noise).clamp(0, 1)
        kept = batch.evaluation.logits(noisy).argmax(1) == prediction
        again = batch.explain_again(noisy)
        change = (again - batch.attribution).flatten(1).double().norm(dim=1) / size.clamp_min(1e-300)
        worst = torch.where(kept & (size > 0), torch.fmax(worst, change), worst)
    return worst
