"""Accuracy on held-out rows, clean and under the attack of the training ball."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from rbkit.tools.ascend import ascend
from rbkit.tools.attack import Attack, objective, pgd
from rbkit.tools.examples import Data, as_float
from rbkit.tools.models import Classifier, Evaluation
from rbkit.tools.ranks import ALONE, Ranks
from rbkit.tools.recipe import ROBUST, Recipe
from rbkit.tools.risk import NumericError
from rbkit.tools.slots import Batch


def validation_attack(recipe: Recipe) -> Attack | None:
    """The attack that a model is validated under: PGD-10 of the training ball."""
    if recipe.method not in ROBUST or recipe.eps == 0:
        return None
    return pgd(norm=recipe.norm, eps=recipe.eps, steps=10, seed=recipe.seed)


def validate(classifier: Classifier, data: Data, recipe: Recipe, ranks: Ranks = ALONE) -> dict[str, float]:
    """Clean and (for robust recipes) adversarial accuracy on held-out rows, each row counted once, by one of the ranks.

    Raises: NumericError when a logit is not finite: the last step of an epoch has no later loss that would tell.
    """
    evaluation = Evaluation(classifier)
    part = data.rows(torch.arange(ranks.index, len(data), ranks.count, device=data.label.device))
    images = as_float(part.image)
    logits = evaluation.logits(images)
    right = logits.argmax(1) == part.label
    losses = F.cross_entropy(logits, part.label, reduction="none").double()
    # Integers add up to the same whoever holds which rows: the loss goes in millionths.
    millionths = (losses.nan_to_num(0, 0, 0) * 1e6).round().sum()
    lost, clean, loss = ranks.sums([int((~torch.isfinite(logits)).sum()), int(right.sum()), int(millionths)])
    if lost:
        raise NumericError("the model gives NaN or infinite logits on held-out rows; try a smaller --lr")
    result = {"val_loss": loss / 1e6 / len(data), "val_accuracy": clean / len(data)}
    spec = validation_attack(recipe)
    if spec is not None:
        batch = Batch(part.ids, images, {"label": part.label}, skip=~right)
        outcome = ascend(objective(evaluation), spec.plan(), batch, block=evaluation.block)
        result["val_robust_accuracy"] = ranks.sums([int((right & ~outcome.reached).sum())])[0] / len(data)
    return result
