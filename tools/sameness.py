"""Does a row have the same numbers, to the last bit, in another slot of its block, or in a narrower block? Tried, not trusted."""

from __future__ import annotations

import torch
from torch import Tensor

from rbkit.tools.losses import cross_entropy
from rbkit.tools.models import Evaluation

NARROWEST = 4  # rows of a block that the last ones go on in


def slots_matter(evaluation: Evaluation, images: Tensor, labels: Tensor) -> bool:
    """Whether a row's logits or input gradient depend, to the last bit, on its slot or on its neighbours.

    One block of `images` is computed as it is, in reverse order, and with every other row replaced by the first.
    """
    block = evaluation.block
    rows = torch.arange(block, device=images.device) % len(images)
    images, labels = images[rows], labels[rows]
    value, gradient, _ = _probe(evaluation, images, labels)
    reverse = _probe(evaluation, images.flip(0), labels.flip(0))
    lonely, targets = images.clone(), labels.clone()
    lonely[1::2], targets[1::2] = images[0], labels[0]
    alone = _probe(evaluation, lonely, targets)
    same = torch.equal(value, reverse[0].flip(0)) and torch.equal(gradient, reverse[1].flip(0))
    return not (same and torch.equal(value[::2], alone[0][::2]) and torch.equal(gradient[::2], alone[1][::2]))


def equal_widths(evaluation: Evaluation, images: Tensor) -> tuple[int, ...]:
    """Halves of the block, down to NARROWEST, in which rows have the logits and input gradients of the full block.

    They are tried on `images`, to the last bit: how a sum is ordered depends on shapes, not on values. Each width is given
    rows from all over the full block, so that their places differ too. Empty for a model whose numbers depend on the width.
    """
    block = evaluation.block
    rows = torch.arange(block, device=images.device) % max(len(images), 1)
    images, found = images[rows], []
    labels = torch.zeros(block, dtype=torch.int64, device=images.device)
    whole, width = _probe(evaluation, images, labels), block // 2
    while width >= NARROWEST and block % width == 0:
        apart = slice(block // width - 1, None, block // width)
        part = _probe(evaluation, images[apart], labels[apart])
        if not all(torch.equal(p, w[apart]) for p, w in zip(part, whole, strict=True)):
            break
        found.append(width)
        width //= 2
    return tuple(found)


class Widths:
    """`equal_widths` of a model, found once for all attacks of a sequence."""

    def __init__(self, evaluation: Evaluation) -> None:
        self.evaluation = evaluation
        self.found: tuple[int, ...] | None = None

    def __call__(self, images: Tensor) -> tuple[int, ...]:
        if self.found is None:
            self.found = equal_widths(self.evaluation, images)
        return self.found


def _probe(evaluation: Evaluation, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, the gradient of their cross-entropy by the images, and the logits without gradients."""
    images = images.detach().requires_grad_()
    logits = evaluation(images)
    gradient = torch.autograd.grad(cross_entropy(logits, labels).sum(), images)[0]
    with torch.no_grad():
        plain = evaluation(images)
    return logits.detach(), gradient, plain
