"""A norm is a few small functions: a unit step of steepest ascent, a projection onto the ball, a random start, a size.

Shapes: deltas and gradients (N, C, H, W); eps a number or (N,). All are per example and keep dtype and device. Names that end
in an underscore write over what they get and return it, as in torch: a tensor that lies in a far cache costs more than the
arithmetic on it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rbkit.tools import random


@dataclass(frozen=True)
class Norm:
    """The geometry of an attack: `step(gradient)` has norm 1, `project_(delta, eps)` lies in the ball of radius eps,
    `start(ids, shape, eps, ...)` is uniform in it, `size(delta)` is the norm per example."""

    name: str
    step: Callable[[Tensor], Tensor]
    project_: Callable[[Tensor, float], Tensor]
    start: Callable[..., Tensor]
    size: Callable[[Tensor], Tensor]


def per_row(values: Tensor) -> Tensor:
    """Values per example (N,), or per example and channel (N, C), as (N, 1 or C, 1, 1), which multiply images."""
    return values.reshape(*values.shape, *[1] * (4 - values.dim()))


def l2_size(delta: Tensor) -> Tensor:
    """Euclidean norm per example, (N,).

    Added up in float64: of equal values, as patches have them, a sum in float32 is up to 4e-5 off at 224 x 224 pixels, and
    what is scaled by it leaves the ball.
    """
    return torch.linalg.vector_norm(delta, dim=(1, 2, 3), dtype=torch.float64).to(delta.dtype)


def l2_step(gradient: Tensor) -> Tensor:
    """The gradient with norm 1, also where its entries are too small to be squared in float32; a zero gradient stays zero."""
    size = l2_size(gradient)
    return gradient / per_row(torch.where(size > 0, size, torch.ones_like(size)))


def l2_project_(delta: Tensor, eps: float) -> Tensor:
    """Delta scaled back to the ball where it lies outside."""
    # One part in 10 million inside, so that rounding of image + delta cannot leave the ball.
    return delta.mul_(per_row(torch.clamp(eps * (1 - 1e-7) / l2_size(delta).clamp_min(1e-30), max=1.0)))


def l2_start(ids: Tensor, shape: tuple[int, ...], eps: float, *, seed: int, draw: int | Tensor = 0) -> Tensor:
    """Uniform in the ball, (N, *shape): a uniform direction, radius eps u**(1/d) with d entries and u uniform in [0, 1)."""
    direction = l2_step(random.normal(ids, shape, seed=seed, purpose="start l2", draw=draw))
    u = random.uniform(ids, (1,), seed=seed, purpose="start radius", draw=draw)[:, 0]
    return direction.mul_(per_row(eps * u ** (1.0 / math.prod(shape))))


def linf_size(delta: Tensor) -> Tensor:
    """Largest absolute entry per example, (N,)."""
    return delta.abs().amax(dim=(1, 2, 3))


def linf_project_(delta: Tensor, eps: float) -> Tensor:
    """Delta clipped to [-eps, eps]."""
    return delta.clamp_(-eps, eps)


def linf_start(ids: Tensor, shape: tuple[int, ...], eps: float, *, seed: int, draw: int | Tensor = 0) -> Tensor:
    """Uniform in [-eps, eps] per coordinate, (N, *shape)."""
    return (2 * random.uniform(ids, shape, seed=seed, purpose="start linf", draw=draw) - 1) * eps


L2 = Norm("l2", l2_step, l2_project_, l2_start, l2_size)
LINF = Norm("linf", torch.sign, linf_project_, linf_start, linf_size)
NORMS = {norm.name: norm for norm in (L2, LINF)}
