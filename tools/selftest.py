"""Oracles: models and masks whose right answer is known on paper, put to the real tools."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from rbkit.tools import (
    alignment,
    attack,
    attribution,
    batch,
    faithfulness,
    flow,
    integrated_gradients,
    localisation,
    saliency,
    slots,
    stages,
)
from rbkit.tools.models import Classifier, Evaluation

TOLERANCE = 1e-5
SHAPE = (3, 5, 6)


class _Quadratic(nn.Module):
    """Logit k is the sum of a_k x**2: integrated gradients from black are a_k x**2."""

    def __init__(self, factors: Tensor) -> None:
        super().__init__()
        self.factors = nn.Parameter(factors)

    def forward(self, x: Tensor) -> Tensor:
        return (x[:, None] ** 2 * self.factors).flatten(2).sum(2)


def _draw(seed: int, *shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def _images() -> Tensor:
    """Four images (4, C, H, W) in [0.3, 0.7]: small balls around them lie inside the box."""
    return 0.3 + 0.4 * _draw(0, 4, *SHAPE)


def _linear() -> tuple[Evaluation, Tensor]:
    """Two logits W x without bias, and W (2, C, H, W)."""
    weights = _draw(1, 2, *SHAPE) - 0.5
    head = nn.Linear(weights[0].numel(), 2, bias=False)
    with torch.no_grad():
        head.weight.copy_(weights.flatten(1))
    net = nn.Sequential(nn.Flatten(), head)
    return Evaluation(Classifier(net, mean=[0.0] * 3, std=[1.0] * 3), block=32), weights


def _largest(found: Tensor, right: Tensor) -> float:
    return (found.double() - right.double()).abs().max().item()


def _pgd(norm: str) -> float:
    """The farthest point of the ball down the margin of a linear model: eps sign(g), or eps g / |g|."""
    evaluation, weights = _linear()
    images, eps = _images(), 0.05
    label = evaluation.logits(images).argmax(1)
    g = weights[1 - label] - weights[label]
    step = g.sign() if norm == "linf" else g / g.flatten(1).norm(dim=1)[:, None, None, None]
    spec = attack.pgd(norm=norm, eps=eps, steps=10, start="clean", until="end")
    rows = slots.Batch(torch.arange(len(images)), images, {"label": label})
    ((_, made),) = stages.run(evaluation, spec, flow.polling([rows]))
    return _largest(made.outcome.images, images + eps * step)


def _least(norm: str) -> float:
    """The least eps at which PGD breaks a linear model: the margin over the dual norm of its gradient."""
    evaluation, weights = _linear()
    image = _images()[:1]
    logits = evaluation.logits(image).double()
    label = logits.argmax(1)
    g = (weights[1 - label] - weights[label]).double().flatten()
    right = float((logits[0, label] - logits[0, 1 - label]) / (g.abs().sum() if norm == "linf" else g.norm()))
    low, high = 0.0, 1.7 * right
    for _ in range(24):
        eps = (low + high) / 2
        spec = attack.pgd(norm=norm, eps=eps, steps=4, start="clean")
        ((_, made),) = stages.run(
            evaluation, spec, flow.polling([slots.Batch(torch.arange(1), image, {"label": label})])
        )
        low, high = (low, eps) if bool(made.success) else (eps, high)
    return abs(high - right)


def _flipped(*, insert: bool) -> float:
    """Insertion and deletion where one location alone speaks: the curve jumps when its turn comes, first by the map,
    later in random order."""
    weights = torch.zeros(2, *SHAPE)
    weights[1, :, 2, 3] = 2.0
    head = nn.Linear(weights[0].numel(), 2, bias=False)
    with torch.no_grad():
        head.weight.copy_(weights.flatten(1))
    evaluation = Evaluation(Classifier(nn.Sequential(nn.Flatten(), head), mean=[0.1] * 3, std=[1.0] * 3), block=32)
    count, spot = 4, 2 * SHAPE[2] + 3
    images, maps = torch.full((count, *SHAPE), 0.6), torch.zeros(count, 1, *SHAPE[1:])
    maps[:, 0, 2, 3] = 1
    target = torch.ones(count, dtype=torch.int64)
    rows = batch.Batch(evaluation, torch.arange(count), images, attribution=maps, explained=images, target=target)
    shown, hidden = torch.sigmoid(torch.tensor([6 * (0.6 - 0.1), 0.0], dtype=torch.float64)).tolist()
    before, after = (hidden, shown) if insert else (shown, hidden)
    locations = SHAPE[1] * SHAPE[2]
    grid = [round(k * locations / (faithfulness.GRID - 1)) for k in range(faithfulness.GRID)]

    def area(turn: int) -> float:
        curve = [after if turn < flipped else before for flipped in grid]
        return sum((a + b) / 2 for a, b in itertools.pairwise(curve)) / (len(grid) - 1)

    turns = faithfulness.rank_of(faithfulness.random_order(rows))[:, spot].tolist()
    measure = faithfulness.insertion_mean if insert else faithfulness.deletion_mean
    return _largest(measure(rows), torch.tensor([area(0) - area(turn) for turn in turns], dtype=torch.float64))


def _integrated_gradients() -> float:
    """a x**2 per entry from black on the quadratic model, and completeness (Sundararajan et al. 2017, Prop. 1)."""
    factors, images = _draw(2, 2, *SHAPE), _images()
    evaluation = Evaluation(Classifier(_Quadratic(factors), mean=[0.0] * 3, std=[1.0] * 3), block=32)
    target = torch.tensor([0, 1, 1, 0])
    spec = attribution.Saliency("ig")
    made = integrated_gradients.integrated_gradients(evaluation, images, target, spec, ids=torch.arange(4))
    assert made.completeness_error is not None
    return max(_largest(made.attribution, factors[target] * images**2), made.completeness_error.max().item())


def _shapley() -> float:
    """w (x - b) on a linear model with one background image b (Lundberg and Lee 2017, Corollary 1)."""
    evaluation, weights = _linear()
    images, base, target = _images(), _draw(3, 1, *SHAPE), torch.tensor([0, 1, 1, 0])
    spec = attribution.Saliency("shap")
    made = saliency.expected_gradients(evaluation, images, target, spec, ids=torch.arange(4), background=base)
    return _largest(made.attribution, weights[target] * (images - base))


def _etmann() -> float:
    """The distance to the boundary of a linear model without bias, |<w, x>| / |w| (Etmann et al. 2019)."""
    evaluation, weights = _linear()
    images = _images()
    w = (weights[0] - weights[1]).double()
    right = (images.double() * w).flatten(1).sum(1).abs() / w.norm()
    rows = batch.Batch(evaluation, torch.arange(4), images, attribution=images, explained=images)
    return _largest(alignment.etmann_alignment(rows), right)


def _planted(measure: Callable[[batch.Batch], Tensor], right: float) -> float:
    """A mask of 6 locations: 3 relevances of 4 inside, the highest among them, and one of 2 outside: 12 of 14."""
    evaluation, _ = _linear()
    mask, maps = torch.zeros(1, 5, 6), torch.zeros(1, 1, 5, 6)
    mask[0, 1:3, 2:5] = 1
    maps[0, 0, 1, 2:5], maps[0, 0, 4, 5] = 4, 2
    maps[0, 0, 3, 0:2] = 1e-9
    rows = batch.Batch(evaluation, torch.arange(1), _images()[:1], attribution=maps, mask=mask)
    return _largest(measure(rows), torch.tensor([right]))


ORACLES: dict[str, Callable[[], float]] = {
    "pgd-linf-linear": lambda: _pgd("linf"),
    "pgd-l2-linear": lambda: _pgd("l2"),
    "least-linf-linear": lambda: _least("linf"),
    "least-l2-linear": lambda: _least("l2"),
    "insertion-single": lambda: _flipped(insert=True),
    "deletion-single": lambda: _flipped(insert=False),
    "ig-quadratic": _integrated_gradients,
    "shap-linear": _shapley,
    "etmann-linear": _etmann,
    "relevance-mass-planted": lambda: _planted(localisation.relevance_mass, 12 / 14),
    "relevance-rank-planted": lambda: _planted(localisation.relevance_rank, 3 / 6),
    "pointing-planted": lambda: _planted(localisation.pointing_game, 1.0),
}


def errors() -> dict[str, float]:
    """The largest error of each oracle; one fails above TOLERANCE, or where it is NaN."""
    return {name: oracle() for name, oracle in ORACLES.items()}


def holds(error: float) -> bool:
    """Whether an oracle's error is within TOLERANCE; NaN is not."""
    return error <= TOLERANCE
