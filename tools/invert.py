"""Inversion and generation: representations, class images and units, each the ascent loop with an objective.

Sources: Engstrom et al. 2019 (arXiv 1906.00945) for inversion and the gradient through the last ReLU; Santurkar et
al. 2019 (arXiv 1906.09453) for class images. Losses are per example: a batch equals single runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rbkit.tools.adam import Adam
from rbkit.tools.ascend import Plan, ascend, counted
from rbkit.tools.fake_relu import fake_last_relu
from rbkit.tools.losses import LOSSES
from rbkit.tools.models import Evaluation, features_of, in_blocks
from rbkit.tools.norms import L2
from rbkit.tools.sameness import narrowing
from rbkit.tools.slots import Batch, Context, Objective, joined

STEP_SIZES = {"normalised": 0.5, "plain": 1.0, "adam": 0.02}  # of each optimizer, where none is asked for


@dataclass(frozen=True)
class Inversion:
    """Parameters of an inversion, as recorded.

    mode: representation, class or feature. layer: None for the features before the head. optimizer: normalised (steps
    of L2 length step_size, in [0, 1] pixels), plain (step_size times the gradient) or adam (step_size is its rate).
    tv: weight of the total variation that the image is penalised by. eps: radius around the start (1000 is no bound but
    the box). restarts: best of so many starts. objective: of class images, logit or ce. fake_relu: gradient through the
    last ReLU before what is inverted, as the paper does. keep: `best` iterate of each example, `batch` or `last`, as in Plan. last_iterate: `judged`,
    or as in the paper's code `unjudged`: the one after the last step is left out.
    """

    mode: str
    layer: str | None = None
    steps: int = 200
    step_size: float = 0.5
    eps: float = 1000.0
    restarts: int = 1
    objective: str = "ce"
    fake_relu: bool = False
    seed: int = 0
    optimizer: str = "normalised"
    tv: float = 0.0
    keep: str = "best"
    last_iterate: str = "judged"

    def plan(self) -> Plan:
        """The ascent that carries it out; starts are rows of their own, so restarts are the caller's."""
        norm = replace(L2, step=lambda gradient: gradient) if self.optimizer == "plain" else L2
        kind = Adam if self.optimizer == "adam" else Plan
        return kind(norm, self.eps, self.step_size, counted(self.steps, self.last_iterate), keep=self.keep)


def total_variation(images: Tensor) -> Tensor:
    """Sum of absolute differences of neighbouring pixels, per example: (N, C, H, W) to (N,). Rudin et al. 1992."""
    return images.diff(dim=2).abs().flatten(1).sum(1) + images.diff(dim=3).abs().flatten(1).sum(1)


def smoothed(objective: Objective, *, tv: float) -> Objective:
    """The objective less `tv` times the total variation of the image (Mahendran and Vedaldi 2015, with exponent 1)."""
    if not tv:
        return objective

    def measure(images: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        value, reached = objective(images, context)
        return value - tv * total_variation(images), reached

    return measure


def _never(images: Tensor) -> Tensor:
    return torch.zeros(len(images), dtype=torch.bool, device=images.device)


def representation_objective(evaluation: Evaluation, *, layer: str | None) -> Objective:
    """Minus |R(x) - R(x*)| / |R(x*)| per example; context: `goal` = R(x*), (N, D)."""

    def measure(images: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        goal = context["goal"]
        difference = evaluation.features(images, layer=layer).flatten(1) - goal
        return -difference.norm(dim=1) / goal.norm(dim=1).clamp_min(1e-12), _never(images)

    return measure


def class_objective(evaluation: Evaluation, *, kind: str) -> Objective:
    """The logit of the class, or minus its cross-entropy; context: `label`."""

    def measure(images: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        logits = evaluation(images)
        if kind == "ce":
            return -LOSSES["ce"](logits, context["label"]), _never(images)
        return logits.gather(1, context["label"][:, None])[:, 0], _never(images)

    return measure


def unit_objective(evaluation: Evaluation, *, layer: str | None) -> Objective:
    """The activation of a unit, averaged over space where the layer has any; context: `unit`."""

    def measure(images: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        found = unit_activations(evaluation.features(images, layer=layer))
        return found.gather(1, context["unit"][:, None])[:, 0], _never(images)

    return measure


def unit_activations(activations: Tensor) -> Tensor:
    """(N, units) of activations (N, units, ...): the mean over what follows."""
    return activations.flatten(2).mean(2) if activations.dim() > 2 else activations


def differentiable(evaluation: Evaluation, spec: Inversion, images: Tensor) -> Evaluation:
    """The evaluation through which gradients are taken: with the last ReLU before the layer open where asked for."""
    if not spec.fake_relu:
        return evaluation
    block = images[:1].expand(evaluation.block, *images.shape[1:])
    return fake_last_relu(evaluation, block, layer=spec.layer)


def _climbed(
    evaluation: Evaluation, objective: Objective, spec: Inversion, runs: list[Batch]
) -> Iterator[tuple[Tensor, Tensor]]:
    """The images (N, C, H, W) that each run reaches, and their values (N,).

    Runs lie side by side where a block has room for several, but not where its mean tells which iterate is kept.
    """
    widths, block, count = narrowing(evaluation), evaluation.block, len(runs[0])
    together = 1 if spec.keep == "batch" else max(block // max(count, 1), 1)
    for first in range(0, len(runs), together):
        batch = joined(runs[first : first + together])
        outcome = ascend(objective, spec.plan(), batch, block=block, widths=widths)
        yield from zip(outcome.images.split(count), outcome.value.split(count), strict=True)


def _best_of(
    evaluation: Evaluation,
    objective: Objective,
    spec: Inversion,
    ids: Tensor,
    starts: list[Tensor],
    context: dict[str, Tensor],
) -> tuple[Tensor, Tensor]:
    """The images (N, C, H, W) of the best restart of each example, and their values (N,) without the penalty."""
    runs = [Batch(ids, start, context) for start in starts]
    (images, value), *others = _climbed(evaluation, smoothed(objective, tv=spec.tv), spec, runs)
    for other, its in others:
        better = its > value
        images = torch.where(better[:, None, None, None], other, images)
        value = torch.where(better, its, value)
    return images, value + spec.tv * total_variation(images) if spec.tv else value


def invert(
    evaluation: Evaluation, images: Tensor, starts: list[Tensor], spec: Inversion, *, ids: Tensor
) -> tuple[Tensor, Tensor]:
    """Images whose representation is that of `images`: (inverted (N, C, H, W), relative latent error (N,)).

    starts: one (N, C, H, W) per restart. Starting from the images themselves returns them with loss 0.
    """
    goal = features_of(evaluation, images, layer=spec.layer)
    through = differentiable(evaluation, spec, images)
    objective = representation_objective(through, layer=spec.layer)
    found, value = _best_of(through, objective, spec, ids, starts, {"goal": goal})
    return found, -value


def class_images(
    evaluation: Evaluation, labels: Tensor, starts: list[Tensor], spec: Inversion, *, ids: Tensor
) -> tuple[Tensor, Tensor]:
    """Images that the model holds for typical of `labels`: (images (N, C, H, W), loss (N,))."""
    through = differentiable(evaluation, spec, starts[0])
    objective = class_objective(through, kind=spec.objective)
    found, value = _best_of(through, objective, spec, ids, starts, {"label": labels})
    return found, -value


def unit_images(evaluation: Evaluation, units: Tensor, starts: list[Tensor], spec: Inversion) -> tuple[Tensor, Tensor]:
    """Images that excite single units: (images (U, C, H, W), activation (U,))."""
    through = differentiable(evaluation, spec, starts[0])
    objective = unit_objective(through, layer=spec.layer)
    return _best_of(through, objective, spec, units, starts, {"unit": units})


def top_images(evaluation: Evaluation, images: Tensor, units: Tensor, *, layer: str | None, count: int) -> Tensor:
    """Indices of the `count` images that excite each unit most, (U, count)."""
    with torch.no_grad():
        found = in_blocks(
            lambda x: unit_activations(evaluation.features(x, layer=layer)), images, block=evaluation.block
        )
    if int(units.max()) >= found.shape[1]:
        raise ValueError(f"unit {int(units.max())}: the layer has units 0 to {found.shape[1] - 1}")
    return found[:, units].topk(min(count, len(images)), dim=0).indices.T
