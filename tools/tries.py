"""Queries of a random search that are computed together (where slots are few, several of each, of which the first that is
kept makes the later ones void), and what those that come next draw."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from rbkit.tools import random

DEPTH = 32  # queries of a slot, at most, that are drawn together
PIXELS = 1 << 20  # of all patches, at most, that are drawn together
Cards = tuple[Tensor, ...]


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
    """What the next queries of a search draw, made for many queries of every slot at once: most of the time that small tensors
    take is that of their many operations. Deeper each time that it is used up, and shallow again when slots change.

    sides: int64 (queries + 1,), of the patch by query. make(words, side): tensors with a row for each of some queries whose patches
    have that side, of `count` words of 32 random bits each, int64 (P, count).
    """

    def __init__(self, sides: Tensor, count: int, *, seed: int, purpose: str) -> None:
        self.sides, self.count, self.seed, self.purpose = sides, count, seed, purpose
        self.forget()

    def forget(self) -> None:
        """Draw anew, since slots have changed, or one is at another restart."""
        self.ids, self.depth = self.sides[:0], 0

    def deal(
        self, make: Callable[[Tensor, int], Cards], tries: Tries, ids: Tensor, step: Tensor, draw: Tensor
    ) -> Iterator[tuple[Tensor, Cards]]:
        """Rows of `tries` whose patches have one side, int64 (G,), and what was made for them: a function of (seed, purpose, id, draw).

        Slots hold `ids`, and the next query of each has the number `step` in its restart and `draw` in all, int64 (B,) each. One side
        at a time, so that how the sums of a row are ordered does not depend on where its neighbours are.
        """
        if not torch.equal(ids, self.ids):
            self.forget()
        if not self.depth or self._spent(draw, tries.ahead):
            self._draw(make, ids, step, draw, ahead=tries.ahead)
        query = tries.owner * self.depth + (draw - self.since)[tries.owner] + tries.later
        if len(self.hands) == 1:
            yield torch.arange(len(query), device=query.device), _picked(self.hands[0], query)
            return
        hand, place = self.hand[query], self.place[query]
        for number, cards in enumerate(self.hands):
            rows = (hand == number).nonzero()[:, 0]
            if len(rows):
                yield rows, _picked(cards, place[rows])

    def _spent(self, draw: Tensor, ahead: int) -> bool:
        """Whether some slot asks for what has not been drawn."""
        place = draw - self.since
        return bool(((place < 0) | (place + ahead > self.depth)).any())

    def _draw(
        self, make: Callable[[Tensor, int], Cards], ids: Tensor, step: Tensor, draw: Tensor, *, ahead: int
    ) -> None:
        room = PIXELS // (len(ids) * int(self.sides[step].max()) ** 2)
        self.ids, self.since, self.depth = ids.clone(), draw, max(min(2 * self.depth, DEPTH, room), ahead)
        along = torch.arange(self.depth, device=ids.device)
        numbers, rows = (draw[:, None] + along).flatten(), ids.repeat_interleave(self.depth)
        words = random.words(rows, self.count, seed=self.seed, purpose=self.purpose, draw=numbers)
        # Queries beyond a restart are forgotten.
        sides = self.sides[(step[:, None] + along).clamp_max(len(self.sides) - 1)].flatten()
        kinds, self.hand = sides.unique(return_inverse=True)
        self.place, self.hands = torch.empty_like(self.hand), []
        for number, side in enumerate(kinds.tolist()):
            of = (self.hand == number).nonzero()[:, 0]
            self.place[of] = torch.arange(len(of), device=of.device)
            self.hands.append(make(words[of], side))


def _picked(cards: Cards, rows: Tensor) -> Cards:
    """What was made for some queries."""
    return tuple(of.index_select(0, rows) for of in cards)
