"""Adam in the slots of the ascent loop: each example has moments of its own and counts its own steps.

Source: Kingma and Ba 2015 (arXiv 1412.6980), algorithm 1, with its defaults.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rbkit.tools.ascend import Climb, Plan, projected
from rbkit.tools.norms import per_row
from rbkit.tools.slots import Batch, Objective, Slots

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8


class Adam(Plan):
    """A plan whose step_size is Adam's rate: about the change of each pixel per step, in [0, 1] pixel units."""

    def slots(self, objective: Objective, like: Batch, *, block: int) -> Slots:
        """A block of slots that climb by Adam."""
        return AdamClimb(objective, self, like, block=block)


class AdamClimb(Climb):
    """State: first and second moment of the gradient, (B, C, H, W) each."""

    STATE = (*Climb.STATE, "first", "second")

    def __init__(self, objective: Objective, plan: Plan, like: Batch, *, block: int) -> None:
        super().__init__(objective, plan, like, block=block)
        self.first, self.second = torch.zeros_like(self.clean), torch.zeros_like(self.clean)

    def begin(self, slots: Tensor) -> None:
        """No memory of another example or restart."""
        self.first[slots], self.second[slots] = 0, 0

    def moved(self, gradient: Tensor) -> Tensor:
        """One step of Adam, whose bias correction follows the steps of each slot."""
        self.first = BETA1 * self.first + (1 - BETA1) * gradient
        self.second = BETA2 * self.second + (1 - BETA2) * gradient * gradient
        taken = (self.step + 1).to(gradient.dtype)
        first = self.first / per_row(1 - BETA1**taken)
        second = self.second / per_row(1 - BETA2**taken)
        return projected(self.now, self.plan.step_size * first / (second.sqrt() + EPSILON), self.clean, self.plan)
