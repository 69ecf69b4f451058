"""Losses of the logits that attacks raise, and when a prediction counts as broken."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

TIE = 1e-5  # of the logit range: below it a prediction may differ between equal computations


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy per row (N,), from logits by log-sum-exp."""
    return F.cross_entropy(logits, labels, reduction="none")


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """Largest other logit minus the label's, (N,): positive where the prediction is wrong."""
    others = logits.scatter(1, labels[:, None], float("-inf")).amax(1)
    return others - logits.gather(1, labels[:, None])[:, 0]


def dlr(logits: Tensor, labels: Tensor) -> Tensor:
    """Difference of logits ratio (Croce and Hein 2020, eq. 6): the margin over the gap of first to third logit.

    Raises: ValueError with fewer than 3 classes, where it is not defined.
    """
    if logits.shape[1] < 3:
        raise ValueError(f"the dlr loss needs at least 3 classes, got {logits.shape[1]}; try --loss margin")
    top = logits.topk(3, dim=1).values
    return margin(logits, labels) / (top[:, 0] - top[:, 2] + 1e-12)


def targeted_margin(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """The target's logit minus the label's, (N,)."""
    return (logits.gather(1, targets[:, None]) - logits.gather(1, labels[:, None]))[:, 0]


def targeted_dlr(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """Targeted difference of logits ratio (Croce and Hein 2020, eq. 7), positive where the target is ahead of the label.

    Raises: ValueError with fewer than 4 classes, where it is not defined.
    """
    if logits.shape[1] < 4:
        raise ValueError(f"the targeted dlr loss needs at least 4 classes, got {logits.shape[1]}")
    top = logits.topk(4, dim=1).values
    return targeted_margin(logits, labels, targets) / (top[:, 0] - (top[:, 2] + top[:, 3]) / 2 + 1e-12)


def fitting_loss(loss: str, classes: int, *, aimed: bool) -> str:
    """The loss, or `margin` where dlr is not defined: below 3 classes, and below 4 where it is `aimed` at a target."""
    return "margin" if loss == "dlr" and classes < (4 if aimed else 3) else loss


AIMED: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"margin": targeted_margin, "dlr": targeted_dlr}
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"ce": cross_entropy, "margin": margin, "dlr": dlr}


def tie(logits: Tensor) -> Tensor:
    """The logit difference up to which two classes count as equal, (N,)."""
    return TIE * (logits.amax(1) - logits.amin(1))


def clearly_above(difference: Tensor, logits: Tensor) -> Tensor:
    """Whether a logit difference exceeds the tie margin, bool (N,)."""
    return difference > tie(logits)


def is_broken(logits: Tensor, labels: Tensor) -> Tensor:
    """Rows whose prediction is clearly not the label, bool (N,)."""
    return clearly_above(margin(logits, labels), logits)
