"""Metrics of attacked images, from the stored bytes."""

from __future__ import annotations

import torch
from torch import Tensor

from rbkit.tools.batch import Batch
from rbkit.tools.losses import clearly_above, is_broken, margin
from rbkit.tools.norms import NORMS
from rbkit.tools.quantise import leaves_ball, round_inside


def clean_accuracy(batch: Batch) -> Tensor:
    """1 where the prediction on the clean image is the label."""
    assert batch.label is not None
    return (batch.clean_logits.argmax(1) == batch.label).double()


def robust_accuracy(batch: Batch) -> Tensor:
    """1 where clean and adversarial image are both classified as the label, from the stored bytes."""
    assert batch.label is not None
    return clean_accuracy(batch) * (~is_broken(batch.adversarial_logits, batch.label)).double()


def robust_accuracy_png(batch: Batch) -> Tensor:
    """The same after rounding to 8 bits inside the ball, as rb-view writes it."""
    assert batch.label is not None and batch.adversarial is not None and batch.eps is not None
    rounded = round_inside(batch.adversarial, batch.image, norm=batch.norm, eps=batch.eps)
    return clean_accuracy(batch) * (~is_broken(batch.evaluation.logits(rounded), batch.label)).double()


def ties(batch: Batch) -> Tensor:
    """1 where another class is ahead of the label by no more than the tie margin: neither broken nor safe."""
    assert batch.label is not None
    logits = batch.adversarial_logits
    ahead = margin(logits, batch.label)
    return ((ahead >= 0) & ~clearly_above(ahead, logits)).double()


def target_rate(batch: Batch) -> Tensor:
    """1 where the adversarial image is classified as the attack's target."""
    assert batch.attack_target is not None
    return (batch.adversarial_logits.argmax(1) == batch.attack_target).double()


def perturbation(batch: Batch) -> Tensor:
    """Norm of the perturbation, in [0, 1] pixels."""
    assert batch.adversarial is not None
    return NORMS[batch.norm].size(batch.adversarial.double() - batch.image.double())


def minimal_distance(batch: Batch) -> Tensor:
    """Distance to the nearest image that the model errs on, as fab-t found it; the median, infinite where none was found.

    What the stored images prove counts first: 0 for a misclassified image, at most the norm of a broken perturbation.
    """
    assert batch.label is not None and batch.distance is not None
    broken = is_broken(batch.adversarial_logits, batch.label)
    claimed = batch.distance.double().clamp_min(0)
    found = torch.where(broken, torch.minimum(claimed, perturbation(batch)), claimed)
    return torch.where(clean_accuracy(batch) > 0, found, torch.zeros_like(found))


def ball_violation(batch: Batch) -> Tensor:
    """1 where the stored image lies outside the ball or the box."""
    assert batch.adversarial is not None and batch.eps is not None
    return leaves_ball(batch.adversarial, batch.image, norm=batch.norm, eps=batch.eps).double()
