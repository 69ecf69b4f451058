"""Does a row have the same numbers, to the last bit, in another slot of its block, or in a narrower block? Tried, not trusted."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rbkit.tools.losses import cross_entropy
from rbkit.tools.models import Evaluation

Narrowest = Callable[[int, Tensor], int]  # see Widths.narrowest
COARSE, FINE = 4, 16  # narrower blocks are multiples of 4 rows, from 16 on of 2: others have other last bits where seen


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


class Widths:
    """In which narrower blocks a row has the logits and input gradients of the full one, to the last bit.

    Tried on the first images that are given, and a width only once it is wanted: how a sum is ordered depends on shapes,
    not on values, and on how many threads there are. Each width gets rows from all over the full block, so that their places
    differ too.
    """

    def __init__(self, evaluation: Evaluation) -> None:
        self.evaluation = evaluation
        self.same: dict[tuple[int, int], bool] = {}
        self.rows: tuple[Tensor, Tensor] | None = None
        self.whole: tuple[Tensor, ...] = ()

    def narrowest(self, count: int, images: Tensor) -> int:
        """The narrowest of these widths with room for `count` rows; the block where there is none.

        images (B, C, H, W): any that the model takes, of a block.
        """
        for width in (*range(COARSE, FINE, COARSE), *range(FINE, self.evaluation.block, 2)):
            if count <= width < self.evaluation.block and self._is_same(width, images):
                return width
        return self.evaluation.block

    def _is_same(self, width: int, images: Tensor) -> bool:
        if self.rows is None:
            rows = torch.arange(self.evaluation.block, device=images.device) % len(images)
            self.rows = images[rows], torch.zeros_like(rows)
            self.whole = _probe(self.evaluation, *self.rows)
        key = (torch.get_num_threads(), width)
        if key not in self.same:
            places = torch.arange(1, width + 1, device=images.device) * self.evaluation.block // width - 1
            part = _probe(self.evaluation, *(r[places] for r in self.rows))
            self.same[key] = all(torch.equal(p, w[places]) for p, w in zip(part, self.whole, strict=True))
        return self.same[key]


def narrowing(evaluation: Evaluation) -> Narrowest | None:
    """What tells the narrowest of these widths (see Widths.narrowest); None on a GPU, where a narrower block hardly takes
    less time and has other last bits."""
    return None if evaluation.device.type == "cuda" else Widths(evaluation).narrowest


def _probe(evaluation: Evaluation, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, the gradient of their cross-entropy by the images (zero where the network has none), and the logits without
    gradients."""
    images = images.detach().requires_grad_()
    logits = evaluation(images)
    loss, gradient = cross_entropy(logits, labels).sum(), torch.zeros_like(images)
    if loss.requires_grad:
        gradient = torch.autograd.grad(loss, images)[0]
    with torch.no_grad():
        plain = evaluation(images)
    return logits.detach(), gradient, plain
