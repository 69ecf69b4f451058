"""The gradient of a batch, micro-batch by micro-batch, by one process or by many with the same result.

The loss, the gradient and the BatchNorm statistics of a micro-batch are functions of its rows and of the weights and buffers
at the beginning of the step; the step takes their means in the order of the micro-batches. So it does not matter which
process computes which.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from rbkit.tools.ranks import Ranks


@dataclass(frozen=True)
class Tally:
    """What a micro-batch tells: the mean loss of its rows, how many were right (scalars), and how many they are."""

    loss: Tensor
    right: Tensor
    rows: int


def mean_gradient(
    model: nn.Module, sizes: Sequence[int], measure: Callable[[int], tuple[Tensor, Tensor]], ranks: Ranks
) -> list[Tally]:
    """Leave the gradient of the mean loss over a batch in the parameters, and mean statistics in the buffers.

    sizes: rows of each micro-batch. measure(index) computes one of them: (mean loss, number of right predictions).
    Buffers that are no floating-point numbers count steps, and move as in one micro-batch.
    """
    if ranks.count == len(sizes) == 1:  # nothing to take a mean of
        model.zero_grad(set_to_none=True)
        loss, right = measure(0)
        loss.backward()
        return [Tally(loss.detach(), right, sizes[0])]
    before = [b.clone() for b in model.buffers()]
    tallies: list[Tally] = []
    mean: list[Tensor] = []
    for first in range(0, len(sizes), ranks.count):
        # Where the last round has fewer micro-batches than processes, the others repeat its last, which is not counted.
        found = _one(model, before, partial(measure, min(first + ranks.index, len(sizes) - 1)))
        for rows, (told, *values) in zip(sizes[first:], ranks.gather(found), strict=False):
            tallies.append(Tally(told[0], told[1], rows))
            weight = rows / sum(t.rows for t in tallies)
            mean = [old.lerp_(new, weight) for old, new in zip(mean, values, strict=True)] if mean else values
    _keep(model, mean)
    return tallies


def _one(model: nn.Module, before: list[Tensor], measure: Callable[[], tuple[Tensor, Tensor]]) -> list[Tensor]:
    """One micro-batch from the buffers `before`: (loss, right), which parameters it reached, gradients, buffers."""
    for buffer, value in zip(model.buffers(), before, strict=True):
        buffer.copy_(value)
    model.zero_grad(set_to_none=True)
    loss, right = measure()
    loss.backward()
    reached = torch.tensor([float(p.grad is not None) for p in model.parameters()], device=loss.device)
    filled = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return [
        torch.stack([loss.detach(), right.to(loss.dtype)]),
        reached,
        *filled,
        *(b.clone() for b in _averaged(model)),
    ]


def _averaged(model: nn.Module) -> list[Tensor]:
    return [b for b in model.buffers() if b.is_floating_point()]


def _keep(model: nn.Module, mean: list[Tensor]) -> None:
    """Put means where the optimiser and the network look for them; a parameter that nothing reached has no gradient."""
    parameters = list(model.parameters())
    reached, gradients, buffers = mean[0].tolist(), mean[1 : 1 + len(parameters)], mean[1 + len(parameters) :]
    for parameter, used, gradient in zip(parameters, reached, gradients, strict=True):
        parameter.grad = gradient if used else None
    for buffer, value in zip(_averaged(model), buffers, strict=True):
        buffer.copy_(value)
