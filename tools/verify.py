"""Rechecks of adversarial images from their bytes: each check says which rows fail it, and by how much."""

from __future__ import annotations

import torch
from torch import Tensor

from rbkit.tools.attack import is_broken
from rbkit.tools.norms import NORMS
from rbkit.tools.quantise import leaves_ball


def not_finite(images: Tensor) -> Tensor:
    """Rows of images (N, C, H, W) that hold a NaN or an infinity, bool (N,)."""
    return ~images.isfinite().flatten(1).all(1)


def box_excess(images: Tensor) -> Tensor:
    """How far each row of images (N, C, H, W) leaves [0, 1], float64 (N,); entries that are not finite do not count."""
    values = torch.where(images.isfinite(), images, 0).double()
    return torch.maximum(values - 1, -values).clamp_min(0).flatten(1).amax(1)


def off_ball(adversarial: Tensor, clean: Tensor, *, norm: str, eps: float) -> tuple[Tensor, Tensor]:
    """Rows outside the ball alone, bool (N,), and their norm less eps, float64 (N,).

    The box and finiteness have checks of their own: both images are cut to the box first, where one fault
    would otherwise be reported under two names, and rows that are not finite never count.
    """
    inside, origin = adversarial.clamp(0, 1), clean.clamp(0, 1)
    measurable = ~(not_finite(adversarial) | not_finite(clean))
    size = NORMS[norm].size(inside.double() - origin.double())
    excess = torch.where(measurable, size - eps, torch.zeros_like(size))
    return leaves_ball(inside, origin, norm=norm, eps=eps) & measurable, excess


def out_of_range(labels: Tensor, classes: int) -> Tensor:
    """Labels (N,) that are no class of the model, bool (N,)."""
    return (labels < 0) | (labels >= classes)


def success_differs(success: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """Rows whose stored success, bool (N,), is not what logits (N, K) say; labels out of range never count."""
    usable = ~out_of_range(labels, logits.shape[1])
    broken = is_broken(logits, labels.clamp(0, logits.shape[1] - 1))
    return (success.bool() != broken) & usable
