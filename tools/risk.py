"""What training minimises: the loss of some rows under each method, and the inner attack of the robust ones."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from rbkit.tools import random
from rbkit.tools.ascend import Plan, counted, first, follow
from rbkit.tools.attack import objective, random_start
from rbkit.tools.examples import Data
from rbkit.tools.gpu import Recorded
from rbkit.tools.models import Classifier, Evaluation, twice_differentiable
from rbkit.tools.norms import NORMS
from rbkit.tools.recipe import Recipe
from rbkit.tools.slots import Batch, Context, Objective


class NumericError(ArithmeticError):
    """Raised when a loss or a logit is NaN or infinite; carries what to report."""


def _kl_objective(model: Callable[[Tensor], Tensor]) -> Objective:
    """TRADES' inner objective: KL divergence from the clean prediction (context `clean_log_probability`)."""

    def measure(images: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        log_p = F.log_softmax(model(images), dim=1)
        value = F.kl_div(log_p, context["log_p"], reduction="none", log_target=True).sum(1)
        return value, torch.zeros(len(images), dtype=torch.bool, device=images.device)

    return measure


class Inner:
    """The inner attack of a step: a model in eval mode with folded, frozen weights, or the live one in train mode."""

    def __init__(self, classifier: Classifier, recipe: Recipe) -> None:
        self.recipe, self.classifier = recipe, classifier
        self.folded = Evaluation(classifier)
        self.recorded = Recorded(self._search(self._plan(0, 1.0)), touched=list(classifier.buffers()))

    def _plan(self, epoch: int, done: float) -> Plan:
        recipe = self.recipe
        norm = NORMS[recipe.norm]
        size = min(1.0, done / recipe.eps_ramp) if recipe.eps_ramp else 1.0
        # A fresh start every epoch: the epoch is part of the seed's purpose through the draw.
        begin_at = random_start(norm, size * recipe.eps, seed=recipe.seed)

        def start(ids: Tensor, clean: Tensor, restart: Tensor) -> Tensor:
            return begin_at(ids, clean, restart + epoch)

        return Plan(
            norm, size * recipe.eps, size * recipe.step_size, counted(recipe.steps, recipe.last_iterate),
            start=start if recipe.attack_start == "random" else None, keep=recipe.attack_keep,
        )  # fmt: skip

    def __call__(self, images: Tensor, data: Data, *, epoch: int, done: float) -> Tensor:
        """Adversarial images of a batch (N, C, H, W); `done` is the share of all steps before this one."""
        plan = self._plan(epoch, done)
        begin = first(plan, Batch(data.ids, images, {}))
        if images.is_cuda and done >= self.recipe.eps_ramp:
            return self.recorded(begin, images, data.label)
        return self._search(plan)(begin, images, data.label)

    def _search(self, plan: Plan) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """The attack as a function of (first iterates, images, labels) and of the weights as they are."""

        def search(begin: Tensor, images: Tensor, label: Tensor) -> Tensor:
            # Without the cache: a record would go on with the bfloat16 weights of its first step.
            with torch.autocast(images.device.type, torch.bfloat16, enabled=self.recipe.amp, cache_enabled=False):
                goal, context = self._goal(images, label)
                return follow(goal, plan, begin, images, context)

        return search

    def _goal(self, images: Tensor, label: Tensor) -> tuple[Objective, dict[str, Tensor]]:
        """What the attack maximises on the weights as they are, and what that knows of each row."""
        model: Callable[[Tensor], Tensor] = self.classifier
        if self.recipe.attack_bn == "eval":
            self.folded.refresh(self.classifier)
            model = self.folded
        if self.recipe.method != "trades":
            return objective(model), {"label": label}
        with torch.no_grad():
            return _kl_objective(model), {"log_p": F.log_softmax(model(images), dim=1)}


def noisy(images: Tensor, data: Data, recipe: Recipe, *, epoch: int) -> Tensor:
    """Images (N, C, H, W) with Gaussian noise of `sigma`, cut to the box."""
    shape = tuple(images.shape[1:])
    noise = random.normal(data.ids, shape, seed=recipe.seed, purpose="training noise", draw=epoch)
    return (images + recipe.sigma * noise).clamp(0, 1)


def penalised(classifier: Classifier, images: Tensor, label: Tensor, *, weight: float) -> tuple[Tensor, Tensor]:
    """(mean cross-entropy plus `weight` times the mean squared L2 norm of its input gradient, logits).

    Shapes: images (N, C, H, W), label (N,); a scalar and (N, K).
    Source: Drucker and Le Cun 1992; Ross and Doshi-Velez 2018, equation 4, without the log.
    """
    images = images.detach().requires_grad_()
    with twice_differentiable():
        logits = classifier(images)
    losses = F.cross_entropy(logits, label, reduction="none")
    gradient = torch.autograd.grad(losses.sum(), images, create_graph=True)[0]
    return losses.mean() + weight * gradient.flatten(1).square().sum(1).mean(), logits


def loss_of(
    classifier: Classifier, inner: Inner | None, images: Tensor, data: Data, recipe: Recipe, *, epoch: int, done: float
) -> tuple[Tensor, Tensor]:
    """(mean loss, logits on what was trained on) of one batch, by the method of the recipe.

    Shapes: images (N, C, H, W); a scalar and (N, K). done: the share of all steps that is behind.
    """
    smoothing = recipe.smoothing or 0.0
    if recipe.method == "gradient-penalty":
        return penalised(classifier, images, data.label, weight=recipe.beta)
    if inner is None:
        logits = classifier(noisy(images, data, recipe, epoch=epoch) if recipe.method == "noise" else images)
        return F.cross_entropy(logits, data.label, label_smoothing=smoothing), logits
    attacked = inner(images, data, epoch=epoch, done=done)
    if recipe.method != "trades":
        logits = classifier(attacked)
        return F.cross_entropy(logits, data.label, label_smoothing=smoothing), logits
    both = classifier(torch.cat([images, attacked]))
    clean, moved = both.chunk(2)
    divergence = F.kl_div(F.log_softmax(moved, 1), F.log_softmax(clean, 1), reduction="batchmean", log_target=True)
    return F.cross_entropy(clean, data.label, label_smoothing=smoothing) + recipe.beta * divergence, moved
