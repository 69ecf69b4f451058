"""Eight-bit images that stay inside the ball: rounding to nearest, corrected where it would leave."""

from __future__ import annotations

import torch
from torch import Tensor

from rbkit.tools.norms import NORMS


def round_inside(adversarial: Tensor, clean: Tensor, *, norm: str, eps: float) -> Tensor:
    """Adversarial images on the lattice of k / 255, no further than eps from clean where clean lies on it.

    Each entry goes to the nearest level; entries are then moved to the next level towards the clean image, those that
    shrink the norm most first, until the image lies in the ball. Shapes: (N, C, H, W), values in [0, 1].
    """
    scaled = adversarial.double() * 255
    nearest = scaled.round()
    origin = clean.double() * 255
    inward = torch.where(scaled > origin, scaled.floor(), scaled.ceil())
    inward = torch.where((nearest - origin).abs() <= (inward - origin).abs(), nearest, inward)
    radius = eps * 255 * (1 + 1e-9)
    if norm == "linf":
        chosen = torch.where((nearest - origin).abs() > radius, inward, nearest)
    else:
        chosen = _shrink(nearest, inward, origin, radius)
    return (chosen.clamp(0, 255) / 255).to(torch.float32)


def _shrink(nearest: Tensor, inward: Tensor, origin: Tensor, radius: float) -> Tensor:
    far, near = ((x - origin).flatten(1) ** 2 for x in (nearest, inward))
    gain, order = (far - near).sort(dim=1, descending=True, stable=True)
    needed = (far.sum(1) - radius**2).clamp_min(0)
    before = gain.cumsum(1) - gain
    move = (before < needed[:, None]) & (gain > 0)
    mask = torch.zeros_like(move).scatter(1, order, move).reshape(nearest.shape)
    return torch.where(mask, inward, nearest)


def leaves_ball(adversarial: Tensor, clean: Tensor, *, norm: str, eps: float) -> Tensor:
    """Rows outside the ball or the box by more than rounding, bool (N,), measured in float64."""
    delta = adversarial.double() - clean.double()
    size = NORMS[norm].size(delta)
    outside = (adversarial < 0) | (adversarial > 1)
    return (size > eps * (1 + 1e-6) + 1e-7) | outside.flatten(1).any(1) | ~size.isfinite()
