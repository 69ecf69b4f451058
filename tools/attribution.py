"""What every attribution is made of: its parameters, its result, the explained output and its gradient in padded blocks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from rbkit.tools.lanes import Lanes, computed
from rbkit.tools.models import Evaluation

OUTPUTS = ("logit", "probability", "log-probability")


@dataclass(frozen=True)
class Saliency:
    """Parameters of an attribution, as recorded.

    output: what is explained, of the `target` class. steps: points of a path; samples: noise draws or background
    images. sigma: SmoothGrad's noise, in [0, 1] pixels. baseline: one of BASELINES; `baselines` uniform draws are
    averaged. tolerance: refine steps until the completeness error is below it times the change of output.
    masker: what hidden pixels take, a key of MASKERS. window, stride: side and step of the square that occlusion moves,
    in pixels (None: a quarter of the shorter side, half of the window). layer: whose feature map grad-cam takes (None:
    the last before the head); signed: grad-cam keeps negative values. players: blocks of pixels down, and across unless
    players_across says (None: 8 per side over permutations, 3 for exact values).
    """

    method: str
    output: str = "logit"
    steps: int = 50
    samples: int = 50
    sigma: float = 0.1
    baseline: str = "black"
    baselines: int = 1
    tolerance: float | None = None
    max_steps: int = 1600
    seed: int = 0
    masker: str = "mean"
    window: int | None = None
    stride: int | None = None
    layer: str | None = None
    signed: bool = False
    players: int | None = None
    players_across: int | None = None

    @property
    def needs_background(self) -> bool:
        """Whether the method draws on background images."""
        shapley = self.method in ("permutation-shap", "exact-shap") and self.masker == "data"
        return shapley or self.method == "shap" or (self.method == "ig" and self.baseline == "data")


@dataclass
class Explained:
    """Attribution (N, C, H, W); per row the target, completeness error |sum - (F(x) - F(baseline))|, steps used,
    the standard error of the attribution's sum, and those of the values of blocks of pixels (N, down, across); whether the
    error stayed above the tolerance; the class that the model gives the image, where the method runs it on that image anyway;
    None where a method has no such thing."""

    attribution: Tensor
    target: Tensor
    completeness_error: Tensor | None = None
    output_change: Tensor | None = None
    steps: Tensor | None = None
    standard_error: Tensor | None = None
    block_standard_error: Tensor | None = None
    missed: Tensor | None = None
    prediction: Tensor | None = None


def output_of(logits: Tensor, target: Tensor, output: str) -> Tensor:
    """The explained scalar per row, (N,)."""
    if output == "probability":
        logits = F.softmax(logits, dim=1)
    elif output == "log-probability":
        logits = F.log_softmax(logits, dim=1)
    return logits.gather(1, target[:, None])[:, 0]


def values(evaluation: Evaluation, images: Tensor, target: Tensor, output: str) -> Tensor:
    """The explained output of images (N, C, H, W), float64 (N,)."""
    return output_of(evaluation.logits(images), target, output).double()


def gradients(evaluation: Evaluation, images: Tensor, target: Tensor, output: str) -> tuple[Tensor, Tensor]:
    """Gradient of the output of one padded block with respect to its images, (B, C, H, W), and its logits (B, K)."""
    images = images.detach().requires_grad_()
    with torch.enable_grad():
        logits = evaluation(images)
        total = output_of(logits, target, output).sum()
    return torch.autograd.grad(total, images)[0], logits.detach()


Point = Callable[..., tuple[Tensor, Tensor]]
Draw = Callable[[Tensor, Tensor], tuple[Tensor, ...]]
STRETCH = 256  # blocks that are drawn for at once: one by one each would wait for some hundred short operations


def nothing(rows: Tensor, numbers: Tensor) -> tuple[Tensor, ...]:
    """The draw of what is not random."""
    return ()


def accumulated(
    evaluation: Evaluation,
    images: Tensor,
    target: Tensor,
    spec: Saliency,
    *,
    points: int,
    point: Point,
    draw: Draw = nothing,
    lanes: Lanes | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum over `points` of factor x gradient for each image, in blocks of (image, point) pairs.

    point(rows, numbers, *drawn) gives the images at which to differentiate (B, C, H, W) and the factors that broadcast to
    them; draw(rows, numbers) what is random about pairs, in tensors with a row for each, from which `point` makes what is
    too large to be kept for many. Returns the sum (N, C, H, W) and the sum of squares of the pairs' totals, float64 (N,).
    Pairs are added one by one in the order of their numbers, so that the result does not depend on where blocks begin.
    """
    block, pairs = evaluation.block, len(images) * points
    total = torch.zeros_like(images)
    square = torch.zeros(len(images), dtype=torch.float64, device=images.device)

    def look(rows: Tensor, numbers: Tensor, *drawn: Tensor) -> Tensor:
        at, factor = point(rows, numbers, *drawn)
        return factor * gradients(evaluation, at, target[rows], spec.output)[0]

    for first in range(0, pairs, STRETCH * block):
        left = min(pairs - first, STRETCH * block)
        padded = -(-left // block) * block
        index = torch.arange(first, first + padded, device=images.device).clamp_max(pairs - 1)
        stretch = index // points, index % points
        blocks = list(zip(*(given.split(block) for given in (*stretch, *draw(*stretch))), strict=True))
        for (rows, *_), found in zip(blocks, computed(look, blocks, lanes=lanes), strict=True):
            rows, real = rows[:left], found[:left]
            total.index_add_(0, rows, real)
            square.index_add_(0, rows, real.sum((1, 2, 3), dtype=torch.float64) ** 2)
            left -= block
    return total, square
