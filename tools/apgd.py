"""APGD: gradient ascent with momentum whose step size is halved where it stops paying (Croce and Hein 2020, algorithm 1).

The paper is arXiv 2003.01690. It has no parameter but the number of steps: the step begins at twice the radius, and at
checkpoints that come ever more often it is halved, and the ascent goes back to its best point, if too few steps rose.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rbkit.tools.norms import Norm, per_row
from rbkit.tools.slots import Batch, Objective, Slots, Start, assign

MOMENTUM = 0.75  # share of the new direction in a step, alpha of section 3.1
RISING = 0.75  # share of steps that must rise between two checkpoints, rho of section 3.2
FIRST, SHORTER, SHORTEST = 0.22, 0.03, 0.06  # first checkpoint, and how the distance of the next ones shrinks


@dataclass(frozen=True)
class Apgd:
    """How to climb: norm and eps of the ball in [0, 1] pixels, steps (gradients) per restart, restarts per target.

    start(ids, clean, restart): first iterate, None for the clean image. stop: leave as soon as the goal is reached.
    """

    norm: Norm
    eps: float
    steps: int
    restarts: int = 1
    start: Start | None = None
    stop: bool = False

    def slots(self, objective: Objective, like: Batch, *, block: int) -> ApgdSlots:
        """A block of slots that climb so."""
        return ApgdSlots(objective, self, like, block=block)


def checkpoints(steps: int) -> list[int]:
    """The steps after which the step size is reconsidered (section 3.2): ceil(p_j steps), where p_0 = 0, p_1 = 0.22 and
    p_{j+1} = p_j + max(p_j - p_{j-1} - 0.03, 0.06)."""
    before, at, found = 0.0, FIRST, []
    while math.ceil(at * steps - 1e-9) < steps:
        found.append(math.ceil(at * steps - 1e-9))
        before, at = at, at + max(at - before - SHORTER, SHORTEST)
    return sorted(set(found))


def _spans(steps: int) -> list[int]:
    """For each step the number of steps since the checkpoint before it, 0 where it is no checkpoint."""
    spans, before = [0] * (steps + 1), 0
    for at in checkpoints(steps):
        spans[at], before = at - before, at
    return spans


class ApgdSlots(Slots):
    """Slots with a step size, a best point and counters of their own.

    Per restart: before, the iterate before `now`; top*, the best point, its value and gradient; size, the step size;
    rises, steps since the last checkpoint that rose; seen and halved, top's value and whether the step was halved there.
    """

    STATE = (
        *Slots.STATE, "before", "top", "top_gradient", "top_value", "value", "seen", "size", "rises", "halved",
    )  # fmt: skip

    def __init__(self, objective: Objective, plan: Apgd, like: Batch, *, block: int) -> None:
        super().__init__(objective, like, block=block, start=plan.start)
        self.plan = plan
        self.spans = torch.tensor(_spans(plan.steps), device=self.clean.device)
        number = torch.zeros(block, device=self.clean.device)
        self.before, self.top, self.top_gradient = self.now.clone(), self.now.clone(), torch.zeros_like(self.now)
        self.top_value, self.value, self.seen, self.size = (number.clone() for _ in range(4))
        self.rises, self.halved = torch.zeros_like(self.step), torch.zeros_like(self.active)

    def begin(self, slots: Tensor) -> None:
        """No momentum, and the first step size."""
        self.before[slots] = self.now[slots]
        self.top_value[slots] = self.value[slots] = self.seen[slots] = float("-inf")
        self.size[slots], self.rises[slots], self.halved[slots] = 2 * self.plan.eps, 0, False

    def advance(self) -> Tensor:
        """Evaluate every slot, keep what is better, reconsider the step size, step."""
        plan = self.plan
        climbing = self.active & (self.step < plan.steps)
        value, reached, gradient = self.evaluate(climbing)
        self.keep(self.improved(value, reached), self.now, value, reached)
        ended = self.active & (self.step >= plan.steps)
        done = ended & (self.restart + 1 >= plan.restarts * self.rounds)
        if plan.stop:
            done = done | (self.active & reached)
        if gradient is not None:
            self._record(value, gradient)
            self._reconsider(gradient)
            self._move(climbing & ~done, gradient)
        self.begin_again(ended & ~done)
        return self.leave(done)

    def _record(self, value: Tensor, gradient: Tensor) -> None:
        """The best point of the restart, and whether this step rose. A slot's first value is no rise."""
        higher = (value > self.top_value) | (self.step == 0)
        self.rises = self.rises + ((value > self.value) & (self.step > 0))
        self.value = value
        self.top_value = torch.where(higher, value, self.top_value)
        self.top = torch.where(per_row(higher), self.now, self.top)
        self.top_gradient = torch.where(per_row(higher), gradient, self.top_gradient)

    def _reconsider(self, gradient: Tensor) -> None:
        """At checkpoints: halve the step and go back to the best point if fewer than RISING of the steps rose, or if
        neither step size nor best value changed since the checkpoint before. `gradient` stays that at `now`."""
        span = self.spans[self.step]
        here = span > 0
        if not bool(here.any()):
            return
        stuck = ~self.halved & (self.top_value <= self.seen)
        halve = here & ((self.rises < RISING * span) | stuck)
        # `before` stays: the momentum of the next step is the way from there to the best point, as in the algorithm.
        assign(self.now, self.top, halve)
        assign(gradient, self.top_gradient, halve)
        self.value = torch.where(halve, self.top_value, self.value)
        self.size = torch.where(halve, self.size / 2, self.size)
        self.seen = torch.where(here, self.top_value, self.seen)
        self.halved = torch.where(here, halve, self.halved)
        self.rises = torch.where(here, torch.zeros_like(self.rises), self.rises)

    def _move(self, moving: Tensor, gradient: Tensor) -> None:
        """Equation (1) of the paper: a projected step, mixed with the last movement."""
        aim = self._inside(self.plan.norm.step(gradient).mul_(per_row(self.size)).add_(self.now))
        mixed = (aim - self.now).mul_(MOMENTUM).add_(self.now).add_((self.now - self.before).mul_(1 - MOMENTUM))
        moved = self._inside(mixed)
        assign(moved, aim, self.step == 0)
        assign(moved, self.now, ~moving)
        self.before = self.now  # of those that do not move as well, which start again or leave
        self.now = moved
        self.step = self.step + moving

    def _inside(self, images: Tensor) -> Tensor:
        """Projected onto the ball and cut to the box; `images` are written over."""
        return self.plan.norm.project_(images.sub_(self.clean), self.plan.eps).add_(self.clean).clamp_(0, 1)
