"""Steepest ascent, in steps of a fixed length: step, project, keep the best iterate of each example, evaluate the last.

Attacks, inversions, class images and the inner problem of adversarial training are this loop with other objectives.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rbkit.tools.flow import Flow, finished, polling
from rbkit.tools.norms import Norm
from rbkit.tools.sameness import Narrowest
from rbkit.tools.slots import Ascent, Batch, Context, Objective, Outcome, Slots, Start, assign


@dataclass(frozen=True)
class Plan:
    """How to climb with steps of a fixed length.

    norm, eps, step_size: the ball and the length of a step, in [0, 1] pixel units. steps: gradients per restart.
    start(ids, clean, restart): first iterate, None for the clean image. stop: leave as soon as the goal is reached.
    keep: `best` iterate of each row (reached before value), the `last`, or `batch`: that of the highest mean value over
    the block, as the paper's code does; its slots must be at the same step. box: clip to [0, 1].
    """

    norm: Norm
    eps: float
    step_size: float
    steps: int
    restarts: int = 1
    start: Start | None = None
    stop: bool = False
    keep: str = "best"
    box: bool = True

    def slots(self, objective: Objective, like: Batch, *, block: int) -> Slots:
        """A block of slots that climb so, for rows such as those of `like`."""
        return Climb(objective, self, like, block=block)


def counted(steps: int, last_iterate: str | None) -> int:
    """Steps that count: an iterate after the last step that is left `unjudged` is a step not taken."""
    return steps - (last_iterate == "unjudged")


def climb(images: Tensor, gradient: Tensor, clean: Tensor, plan: Plan) -> Tensor:
    """One step of steepest ascent from `images`, projected onto the ball around `clean` and into the box.

    Shapes: all (N, C, H, W). Source: Madry et al. 2018, section 2.1.
    """
    return projected(images, plan.norm.step(gradient).mul_(plan.step_size), clean, plan)


def projected(images: Tensor, move: Tensor, clean: Tensor, plan: Plan) -> Tensor:
    """`images` moved by `move`, which is written over, back on the ball around `clean` and in the box; all (N, C, H, W)."""
    delta = move.add_(images).sub_(clean)
    moved = plan.norm.project_(delta, plan.eps).add_(clean)
    return moved.clamp_(0, 1) if plan.box else moved


class Climb(Slots):
    """Steps of a fixed length (see Plan)."""

    def __init__(self, objective: Objective, plan: Plan, like: Batch, *, block: int) -> None:
        super().__init__(objective, like, block=block, start=plan.start)
        self.plan = plan

    def advance(self) -> Tensor:
        """Evaluate every slot, keep what is better, step."""
        plan = self.plan
        climbing = self.active & (self.step < plan.steps)
        value, reached, gradient = self.evaluate(climbing)
        self.keep(self._better(value, reached), self.now, value, reached)
        ended = self.active & (self.step >= plan.steps)
        done = ended & (self.restart + 1 >= plan.restarts)
        if plan.stop:
            done = done | (self.active & reached)
        if gradient is not None:
            self._move(climbing & ~done, gradient)
        self.begin_again(ended & ~done)
        return self.leave(done)

    def _better(self, value: Tensor, reached: Tensor) -> Tensor:
        """Slots whose iterate is to be kept, bool (B,)."""
        if self.plan.keep == "last":
            return self.active
        if self.plan.keep == "batch":
            return self.active & (value[self.active].mean() > self.best.value[self.active].mean())
        return self.improved(value, reached)

    def _move(self, moving: Tensor, gradient: Tensor) -> None:
        moved = self.moved(gradient)
        assign(moved, self.now, ~moving)
        self.now = moved
        self.step = self.step + moving

    def moved(self, gradient: Tensor) -> Tensor:
        """Where a step from `now` leads, for every slot."""
        return climb(self.now, gradient, self.clean, self.plan)


def ascend(objective: Objective, plan: Ascent, batch: Batch, *, block: int, widths: Narrowest | None = None) -> Outcome:
    """Climb from every row of one batch; the last ones in a narrower block where `widths` (see Flow) says so."""
    return next(finished(Flow(objective, plan, polling([batch]), block=block, widths=widths).poll))[1]


def drive(objective: Objective, plan: Plan, batch: Batch) -> Tensor:
    """The iterate after the last step, unjudged, for all rows at once, (N, C, H, W): the inner problem of adversarial
    training (Madry et al. 2018, equation 2.1).

    Where the plan keeps `batch`, the iterate of the highest mean value over the rows instead.
    """
    return follow(objective, plan, first(plan, batch), batch.clean, batch.context)


def first(plan: Plan, batch: Batch) -> Tensor:
    """Where the first restart begins, for all rows at once, (N, C, H, W)."""
    zero = torch.zeros(len(batch), dtype=torch.int64, device=batch.clean.device)
    return batch.clean if plan.start is None else plan.start(batch.ids, batch.clean, zero)


def follow(objective: Objective, plan: Plan, now: Tensor, clean: Tensor, context: Context) -> Tensor:
    """`drive` from the iterate `now`; all (N, C, H, W), with a row of context each."""
    best, highest = now, torch.full((), float("-inf"), device=now.device)
    for _ in range(plan.steps):
        images = now.detach().requires_grad_()
        value, _ = objective(images, context)
        if plan.keep == "batch":
            best, highest = _higher(images, value, best, highest)
        now = climb(images.detach(), torch.autograd.grad(value.sum(), images)[0], clean, plan)
    if plan.keep != "batch":
        return now
    with torch.no_grad():
        return _higher(now, objective(now, context)[0], best, highest)[0]


def _higher(images: Tensor, value: Tensor, best: Tensor, highest: Tensor) -> tuple[Tensor, Tensor]:
    """(images, their mean value) where it is above `highest`, else (best, highest); nothing waits for the device."""
    mean = value.detach().mean()
    return torch.where(mean > highest, images.detach(), best), torch.maximum(mean, highest)
