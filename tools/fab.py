"""FAB: the nearest image that the model errs on (Croce and Hein 2020, "Minimally distorted adversarial examples with a
fast adaptive boundary attack", arXiv 1907.02044), in the targeted form that looks at one other class at a time.

Each iteration projects the iterate and the clean image onto the linearised boundary within the box, steps a little past
it, and goes back towards the clean image wherever the model already errs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rbkit.tools.norms import Norm, per_row
from rbkit.tools.slots import Batch, Objective, Slots, Start

BIAS = 0.1  # largest share of the clean image's projection in a step, alpha_max of section 3.3
OVERSHOOT = 1.05  # eta: how far a step goes, as a multiple of the way to the linearised boundary
FAR = 1e30  # further than any way inside the box, yet no infinity, of which 0 times would be no number
BACK = 0.9  # beta: where to go on from a point that is broken, on the line from the clean image


@dataclass(frozen=True)
class Fab:
    """How to search: norm (l2 or linf), steps per target and restart, restarts.

    eps: radius within which a point counts as found, in [0, 1] pixels. stop: leave at the first such point; else the
    nearest one over all targets and steps is kept. start: first iterates after the first restart, which is at the image.
    """

    norm: Norm
    eps: float
    steps: int
    restarts: int = 1
    start: Start | None = None
    stop: bool = False

    def slots(self, objective: Objective, like: Batch, *, block: int) -> FabSlots:
        """A block of slots that search so; the objective is the gap that is 0 at the boundary."""
        return FabSlots(objective, self, like, block=block)


def project(images: Tensor, normal: Tensor, offset: Tensor, *, norm: str) -> Tensor:
    """The shortest way from images to the hyperplane <normal, image + d> = <normal, image> + offset inside the box.

    Where the box does not reach the plane, the way to its nearest corner in that direction. Shapes: images and normal
    (N, C, H, W), offset (N,); returns d (N, C, H, W).

    Along the shortest way each entry moves by min(t s, room), where s is |normal| (l2) or 1 (linf) and room is what the
    box leaves (section 3.1). What is gained, sum |normal| min(t s, room), is concave and piecewise linear in t, so that
    Newton's method from 0 rises to its root and ends there.
    """
    magnitude = normal.abs()
    scale = magnitude.amax((1, 2, 3))
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))  # so that no square of an entry vanishes
    sign = normal.sign() * per_row(torch.where(offset >= 0, 1.0, -1.0).to(images))
    weight = magnitude / per_row(scale)
    room = torch.where(sign > 0, 1 - images, images)
    speed = weight if norm == "l2" else (weight > 0).to(weight)
    return torch.minimum(per_row(_root(weight, speed, room, offset.abs() / scale)) * speed, room) * sign


def _root(weight: Tensor, speed: Tensor, room: Tensor, wanted: Tensor) -> Tensor:
    """t with sum weight min(t speed, room) = wanted, (N,); FAR where all the room is not enough. All else (N, C, H, W).

    A row stops where its free entries, those that have not used up their room, stay the same, and is left alone then:
    it must not depend on others.
    """
    slope, gain = weight * speed, weight * room
    free = slope.sum((1, 2, 3))
    t = (wanted / free.clamp_min(1 / FAR)).clamp_max(FAR)
    going = free > 0
    while bool(going.any()):
        reached = per_row(t) * slope
        left = torch.where(reached < gain, slope, 0).sum((1, 2, 3))
        going = going & (left < free)
        step = (wanted - torch.minimum(reached, gain).sum((1, 2, 3))).clamp_min(0) / left.clamp_min(1 / FAR)
        # Without free entries all the room is used; FAR where that is not enough.
        t = torch.where(going, torch.where(left > 0, t + step, FAR).clamp_max(FAR), t)
        free = torch.where(going, left, free)
    return t


class FabSlots(Slots):
    """Slots with the nearest broken point of an example in `best`: its value is minus the distance."""

    def __init__(self, objective: Objective, plan: Fab, like: Batch, *, block: int) -> None:
        super().__init__(objective, like, block=block, start=plan.start)
        self.plan = plan

    def started(self, ids: Tensor, clean: Tensor, restart: Tensor) -> Tensor:
        """The first restart of each target begins at the image itself, the others at random."""
        first = restart < self.rounds
        return clean if bool(first.all()) else torch.where(per_row(first), clean, super().started(ids, clean, restart))

    def advance(self) -> Tensor:
        """Look where every slot stands, go back where the model errs, then step towards the boundary."""
        plan = self.plan
        _, reached, _ = self.evaluate(torch.zeros_like(self.active))
        self._found(reached)
        back = self.clean + BACK * (self.now - self.clean)
        self.now = torch.where(per_row(reached), back, self.now)
        ended = self.active & (self.step >= plan.steps)
        done = ended & (self.restart + 1 >= plan.restarts * self.rounds)
        self.begin_again(ended & ~done)
        climbing = self.active & ~done
        value, reached, gradient = self.evaluate(climbing)
        self._found(reached)
        if plan.stop:
            done = done | (self.active & self.best.reached)
        if gradient is not None:
            self._move(climbing & ~done, value, gradient)
        return self.leave(done)

    def _found(self, broken: Tensor) -> None:
        """Take in points that are nearer than the nearest so far."""
        distance = self.plan.norm.size(self.now - self.clean)
        nearer = self.active & broken & (-distance > self.best.value)
        self.keep(nearer, self.now, -distance, distance <= self.plan.eps)

    def _move(self, moving: Tensor, value: Tensor, gradient: Tensor) -> None:
        """Equation (9): a mixture of both projections, each a little too far."""
        along = (gradient * (self.now - self.clean)).sum((1, 2, 3))
        points, normals = torch.cat([self.now, self.clean]), torch.cat([gradient, gradient])
        way = project(points, normals, torch.cat([-value, along - value]), norm=self.plan.norm.name)
        near, far = way.chunk(2)
        sizes = [self.plan.norm.size(d).clamp_min(1e-8) for d in (near, far)]
        share = per_row((sizes[0] / (sizes[0] + sizes[1])).clamp_max(BIAS))
        moved = (1 - share) * (self.now + OVERSHOOT * near) + share * (self.clean + OVERSHOOT * far)
        self.now = torch.where(per_row(moving), moved.clamp(0, 1), self.now)
        self.step = self.step + moving
