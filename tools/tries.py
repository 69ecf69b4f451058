"""Queries of a random search that are computed together: where slots are few, several of each, of which the first that is
kept makes the later ones void."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tries:
    """The next queries of some slots: `ahead` of each in their order, slot after slot, one row of the block each.

    slots: int64 (A,). owner, later: int64 (B,): the slot of each row, and how many queries after its next one.
    images (B, C, H, W).
    """

    slots: Tensor
    ahead: int
    owner: Tensor
    later: Tensor
    images: Tensor

    @classmethod
    def single(cls, images: Tensor) -> Tries:
        """One query of every slot: what stands in `images`."""
        every = torch.arange(len(images), device=images.device)
        return cls(every, 1, every, torch.zeros_like(every), images)

    @classmethod
    def of(cls, active: Tensor, like: Tensor) -> Tries:
        """As many of each active slot as there are rows, none filled in yet."""
        slots, block = active.nonzero()[:, 0], len(active)
        ahead = block // len(slots)
        if ahead < 2:
            return cls.single(like)
        row = torch.arange(block, device=active.device).clamp_max(len(slots) * ahead - 1)
        return cls(slots, ahead, slots[row // ahead], row % ahead, like)

    def first(self, event: Tensor) -> Tensor:
        """Per slot, the place of the first of its queries where `event`, bool (B,), is true; the last one where it never is."""
        none_yet = (~event[: len(self.slots) * self.ahead]).reshape(-1, self.ahead).cumprod(1)
        return none_yet.sum(1).clamp_max(self.ahead - 1)
