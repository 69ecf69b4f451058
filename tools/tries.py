"""Queries of a random search that are computed together (where slots are few, several of each, of which the first that is
kept makes the later ones void), and the random words of those that come next."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rbkit.tools import random

DEPTH = 32  # queries of a slot whose words are drawn together: most of the time of a small draw is that of its many operations


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


class Deck:
    """The random words of a search, `count` for each query of an example, drawn for many queries of every slot at once."""

    def __init__(self, count: int, *, seed: int, purpose: str) -> None:
        self.count, self.seed, self.purpose = count, seed, purpose
        self.ids: Tensor | None = None

    def deal(self, tries: Tries, ids: Tensor, draw: Tensor) -> Tensor:
        """The words of these tries, int64 (R, count), a function of (seed, purpose, id, draw): slots hold `ids`, and the next
        query of each has the number `draw`, int64 (B,) both."""
        if self.ids is None or not torch.equal(ids, self.ids) or self._spent(draw, tries.ahead):
            self._draw(ids, draw, depth=DEPTH + tries.ahead)
        return self.words[tries.owner, (draw - self.since)[tries.owner] + tries.later]

    def _spent(self, draw: Tensor, ahead: int) -> bool:
        """Whether some slot asks for what has not been drawn."""
        place = draw - self.since
        return bool(((place < 0) | (place + ahead > self.words.shape[1])).any())

    def _draw(self, ids: Tensor, draw: Tensor, *, depth: int) -> None:
        numbers = draw[:, None] + torch.arange(depth, device=draw.device)
        rows = ids.repeat_interleave(depth)
        words = random.words(rows, self.count, seed=self.seed, purpose=self.purpose, draw=numbers.flatten())
        self.ids, self.since, self.words = ids.clone(), draw, words.reshape(len(ids), depth, self.count)
