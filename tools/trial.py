"""A trial of a model: attacks on a small sample of its rows, for the checks of `flags` to compare."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rbkit.tools import random
from rbkit.tools.ascend import Plan, ascend, climb
from rbkit.tools.attack import Attack, fgsm, objective, pgd, random_start
from rbkit.tools.models import Evaluation, in_blocks
from rbkit.tools.norms import NORMS
from rbkit.tools.slots import Batch, Objective

SIZE = 64  # rows of the sample
STEPS, DRAWS, QUERIES = 20, 20, 200  # of the default attack, of noise, of the random search


@dataclass(frozen=True)
class Sample:
    """Rows of an attacked stream: ids int64 (N,), clean and stored images (N, C, H, W), label (N,), target (N,) where
    the attack was targeted."""

    ids: Tensor
    clean: Tensor
    stored: Tensor
    label: Tensor
    target: Tensor | None = None

    def take(self, rows: Tensor) -> Sample:
        """Some rows, by int64 indices or a bool mask."""
        target = None if self.target is None else self.target[rows]
        return Sample(self.ids[rows], self.clean[rows], self.stored[rows], self.label[rows], target)

    def joined(self, other: Sample) -> Sample:
        """The rows of both. Raises: ValueError where only one has targets."""
        if (self.target is None) != (other.target is None):
            raise ValueError("targeted and untargeted rows in one pool")
        target = None if self.target is None or other.target is None else torch.cat([self.target, other.target])
        ids, clean, stored = (
            torch.cat(p) for p in ((self.ids, other.ids), (self.clean, other.clean), (self.stored, other.stored))
        )
        return Sample(ids, clean, stored, torch.cat([self.label, other.label]), target)

    def drawn(self, size: int = SIZE) -> Sample:
        """The `size` rows of lowest keyed rank, in that order: the same however the rows came, and in pieces or not."""
        bits = random.words(self.ids, 2, seed=0, purpose="flags")
        order = ((bits[:, 0] << 31) | (bits[:, 1] >> 1)).argsort(stable=True)
        return self.take(order[:size])

    @property
    def context(self) -> dict[str, Tensor]:
        """What the objective of an attack reads."""
        return {"label": self.label} if self.target is None else {"label": self.label, "target": self.target}


class Trial:
    """The rows that stand before any attack, and attacks on them; masks are bool (N,): which rows are broken."""

    def __init__(self, evaluation: Evaluation, sample: Sample, norm: str, eps: float, seed: int) -> None:
        self.evaluation, self.norm, self.eps, self.seed = evaluation, norm, eps, seed
        self.targeted = sample.target is not None
        self.goal = self._goal("ce")
        with torch.no_grad():
            self.rows = sample.take(~self._reached(sample, sample.clean))
            self.stored = self._reached(self.rows, self.rows.stored)
        # Loss, largest gradient entry, and success at each iterate of the default attack, (N, 3, STEPS + 1).
        self.path = self._path(self.pgd(steps=STEPS).plan())
        self.default = self.path[:, 2].bool().any(1)

    def _goal(self, loss: str, scale: float = 1.0) -> Objective:
        def scaled(images: Tensor) -> Tensor:
            # Zero times the images: a network that cannot be differentiated has a gradient of zero, and is found out.
            return self.evaluation(images) * scale + 0 * images.flatten(1).sum(1, keepdim=True)

        return objective(scaled, loss, targeted=self.targeted)

    def _reached(self, rows: Sample, images: Tensor) -> Tensor:
        names = list(rows.context)
        return in_blocks(
            lambda x, *values: self.goal(x, dict(zip(names, values, strict=True)))[1],
            images, *rows.context.values(), block=self.evaluation.block,
        )  # fmt: skip

    def pgd(self, **options: Any) -> Attack:
        """The default attack, but for `options`."""
        usual: dict[str, Any] = {"norm": self.norm, "eps": self.eps, "seed": self.seed, "targeted": self.targeted}
        return pgd(**usual | options)

    def fgsm(self) -> Attack:
        """One step."""
        return fgsm(norm=self.norm, eps=self.eps, seed=self.seed, targeted=self.targeted)

    @property
    def diameter(self) -> float:
        """The radius of a ball around any image that holds the whole box."""
        return 1.0 if self.norm == "linf" else math.sqrt(self.rows.clean[0].numel() if len(self.rows.ids) else 1)

    def broken(self, plan: Plan, *, scale: float = 1.0) -> Tensor:
        """Rows that an attack by gradients of the cross-entropy breaks; `scale` multiplies the logits."""
        if not len(self.rows.ids):
            return self.stored
        batch = Batch(self.rows.ids, self.rows.clean, self.rows.context)
        return ascend(self._goal("ce", scale), plan, batch, block=self.evaluation.block).reached

    def noisy(self) -> Tensor:
        """Rows that one of DRAWS points of the ball breaks."""
        start = random_start(NORMS[self.norm], self.eps, seed=self.seed + 1)  # not the starts of the attacks
        return self.broken(Plan(NORMS[self.norm], self.eps, 0.0, 0, DRAWS, start=start, stop=True))

    def _path(self, plan: Plan) -> Tensor:
        names = list(self.rows.context)

        def climbed(ids: Tensor, clean: Tensor, *values: Tensor) -> Tensor:
            context = dict(zip(names, values, strict=True))
            assert plan.start is not None
            now, seen = plan.start(ids, clean, torch.zeros_like(ids)), []
            for _ in range(plan.steps + 1):
                images = now.detach().requires_grad_()
                value, reached = self.goal(images, context)
                gradient = torch.autograd.grad(value.sum(), images)[0]
                seen.append(torch.stack([value.detach(), gradient.flatten(1).abs().amax(1), reached.float()], 1))
                now = climb(images.detach(), gradient, clean, plan)
            return torch.stack(seen, 2)

        rows = self.rows
        return in_blocks(climbed, rows.ids, rows.clean, *rows.context.values(), block=self.evaluation.block)

    @torch.no_grad()
    def searched(self) -> Tensor:
        """Rows that a random search by scores alone breaks: squares of changed pixels, kept where the margin grows.

        After Andriushchenko et al. 2020 (Square Attack), with one square per query and its side shrinking.
        """
        norm, rows, goal = NORMS[self.norm], self.rows, self._goal("margin")
        names, block = list(rows.context), self.evaluation.block

        def measured(x: Tensor, *values: Tensor) -> Tensor:
            return torch.stack([v.float() for v in goal(x, dict(zip(names, values, strict=True)))], 1)

        def asked(images: Tensor) -> Tensor:
            return in_blocks(measured, images, *rows.context.values(), block=block)

        now = rows.clean
        best = asked(now)
        broken = self.stored & False
        for query in range(QUERIES):
            change = _square(rows.ids, now - rows.clean, self.eps, norm.name, query, seed=self.seed)
            images = norm.project_(change, self.eps).add_(rows.clean).clamp_(0, 1)
            scores = asked(images)
            better = scores[:, 0] > best[:, 0]
            now = torch.where(better[:, None, None, None], images, now)
            best = torch.where(better[:, None], scores, best)
            broken = broken | scores[:, 1].bool()
            if bool(broken.all()):
                break
        return broken


def _square(ids: Tensor, delta: Tensor, eps: float, norm: str, query: int, *, seed: int) -> Tensor:
    """A change with a square of one sign per channel: set to eps (linf), or added with half of eps in all (l2)."""
    channels, height, width = delta.shape[1:]
    u = random.uniform(ids, (3 + channels,), seed=seed, purpose="black box", draw=query)
    share = 0.5 * 0.02 ** (query / QUERIES)  # of the area
    side = max(1, min(height, width, round(math.sqrt(share * height * width))))
    top, left = (u[:, 0] * (height - side + 1)).long(), (u[:, 1] * (width - side + 1)).long()
    y, x = torch.arange(height, device=ids.device), torch.arange(width, device=ids.device)
    inside = ((y >= top[:, None]) & (y < top[:, None] + side))[:, :, None] & (
        (x >= left[:, None]) & (x < left[:, None] + side)
    )[:, None, :]
    sign = torch.where(u[:, 3:] < 0.5, -1.0, 1.0)[:, :, None, None]
    if norm == "linf":
        return torch.where(inside[:, None], sign * eps, delta)
    return delta + inside[:, None] * sign * (eps / 2 / math.sqrt(channels) / side)
