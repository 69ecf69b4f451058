"""Square: a random search over square patches that needs no gradient (Andriushchenko et al. 2020, arXiv 1912.00049).

Each query changes one patch of the best image so far and is kept if the loss rises. Patches shrink on a fixed schedule.
Every draw is a function of (seed, id, number of the query): position, signs and orientation differ between examples.
Few queries are kept, so that where examples are few, each has several of its next queries tried at once; those after the
first that is kept are forgotten, and all is as if they had been tried one by one.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rbkit.tools import random
from rbkit.tools.norms import Norm, l2_size, per_row
from rbkit.tools.patch import Squares, read, write_
from rbkit.tools.slots import Batch, Objective, Slots, assign, place, rows_of, surpasses
from rbkit.tools.tries import Cards, Deck, Tries

SHARE = 0.8  # of the pixels that the first patches cover, p of section 3.2
HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # queries of 10,000 after which the share is halved
AHEAD = 4  # queries of an example in a block: more of them are often in vain, fewer leave the block too narrow
FEW = 16  # rows hardly take longer than fewer
TILES = 5  # per side, of the first perturbation in L2 (section 3.4)


@dataclass(frozen=True)
class Square:
    """How to search: norm (l2 or linf) and eps of the ball in [0, 1] pixels, queries (forward passes) per restart.

    stop: leave as soon as the goal is reached. share: of the pixels that the first patches cover.
    """

    norm: Norm
    eps: float
    queries: int
    seed: int = 0
    restarts: int = 1
    stop: bool = False
    share: float = SHARE

    def slots(self, objective: Objective, like: Batch, *, block: int) -> SquareSlots:
        """A block of slots that search so."""
        kind = {"l2": L2Slots, "linf": LinfSlots}[self.norm.name]
        return kind(objective, self, like, block=block)


def covered(query: int, queries: int, *, share: float = SHARE) -> float:
    """The share of the pixels that a patch covers at a query (section 5, "p schedule", scaled to `queries`)."""
    at = int(query / queries * 10000)
    return share / 2 ** sum(at > edge for edge in HALVINGS)


def pyramid(side: int) -> Tensor:
    """The patch of L2 (eq. 2), (side, side): two bumps side by side, one up and one down, of norm 1."""
    left = side // 2
    both = torch.cat([_bump(side, left), -_bump(side, side - left)], 1)
    return (both / both.norm()).float()


def _bump(height: int, width: int) -> Tensor:
    """A bump that falls off in rings around the middle: a ring further out adds 1 / k**2 with a higher k. Float64."""
    half = height // 2
    rows = (torch.arange(1, height + 1) - half - 1).abs()
    columns = (torch.arange(1, width + 1) - width // 2 - 1).abs()
    depth = half - torch.maximum(rows[:, None], columns[None])
    sums = torch.cumsum(1.0 / (half + 1 - torch.arange(half + 1)).double() ** 2, 0)
    return sums[depth]


class SquareSlots(Slots):
    """Slots with the best image of the restart, `top`, and its value; `sides` holds the side of a patch by query.

    `now` is the next query of each slot, and `tries` what is computed next.
    """

    STATE = (*Slots.STATE, "top", "top_value")
    WORDS: int  # for a query, beside a sign per channel

    def __init__(self, objective: Objective, plan: Square, like: Batch, *, block: int) -> None:
        super().__init__(objective, like, block=block)
        self.plan = plan
        shares = [covered(query, plan.queries, share=plan.share) for query in range(plan.queries + 1)]
        self.sides = torch.tensor([self.side(share) for share in shares], device=self.clean.device)
        self.top, self.top_value = self.now.clone(), torch.zeros(block, device=self.clean.device)
        self.tries: Tries | None = None
        words = self.WORDS + self.clean.shape[1]
        self.deck = Deck(self.sides, words, seed=plan.seed, purpose="square")

    @abstractmethod
    def cards(self, words: Tensor, side: int) -> Cards:
        """What queries draw whose patches have this side, of words of 32 random bits, int64 (P, WORDS + C)."""

    @abstractmethod
    def side(self, share: float) -> int:
        """The side of a patch that covers so much of an image."""

    @abstractmethod
    def first(self, ids: Tensor, restart: Tensor) -> Tensor:
        """First perturbations of rows, inside the ball, (N, C, H, W)."""

    @abstractmethod
    def proposal(self, tries: Tries) -> Tensor:
        """Images of the rows of `tries`, inside the ball; the box is cut later."""

    def started(self, ids: Tensor, clean: Tensor, restart: Tensor) -> Tensor:
        """Images with their first perturbation."""
        return (clean + self.first(ids, restart)).clamp(0, 1)

    def begin(self, slots: Tensor) -> None:
        """No best image yet."""
        self.top_value[slots] = float("-inf")
        self.tries = None
        self.deck.forget()

    def room(self, count: int) -> int:
        """Several queries of each example are computed at once, where they fit."""
        return min(max(count * min(self.block // count, AHEAD), FEW), self.block)

    def take(self, slots: Tensor, of: Slots) -> None:
        """Go on with these slots alone."""
        super().take(slots, of)
        self.tries = None

    def advance(self) -> Tensor:
        """One query of every slot, or several: keep what is better, propose the next."""
        plan = self.plan
        images, value, reached, used = self._tried(self.tries or Tries.single(self.now))
        self.best.forwards += used
        self.keep(self.improved(value, reached), images, value, reached)
        higher = value > self.top_value
        self.top_value = torch.where(higher, value, self.top_value)
        assign(self.top, images, higher)
        self.step = self.step + used
        ended = self.active & (self.step >= plan.queries)
        done = ended & (self.restart + 1 >= plan.restarts)
        if plan.stop:
            done = done | (self.active & reached)
        left, self.tries = self.leave(done), None
        if bool(self.active.any()):
            self._propose()
            self.begin_again(ended & ~done)
        return left

    @torch.no_grad()
    def looked(self) -> Tensor:
        """Values alone."""
        return self.objective(self.now, self.context)[0]

    @torch.no_grad()
    def _tried(self, tries: Tries) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(images, value, reached, queries used) per slot: of the first of its queries to be kept, or else of the last."""
        if tries.ahead == 1:
            value, reached = self.objective(tries.images, self.context)
            return tries.images, value, reached, self.active.long()
        value, reached = self.objective(tries.images, {name: of[tries.owner] for name, of in self.context.items()})
        best, best_reached, top = (of[tries.owner] for of in (self.best.value, self.best.reached, self.top_value))
        last = self.step[tries.owner] + tries.later + 1 >= self.plan.queries
        first = tries.first((value > top) | surpasses(value, reached, best, best_reached) | last)
        rows = torch.arange(len(first), device=first.device) * tries.ahead + first
        images, used = self.now.clone(), torch.zeros_like(self.step)
        place(images, tries.slots, rows_of(tries.images, rows))
        used[tries.slots] = first + 1
        values, goals = torch.full_like(self.top_value, float("-inf")), torch.zeros_like(self.active)
        values[tries.slots], goals[tries.slots] = value[rows], reached[rows]
        return images, values, goals, used

    def _propose(self) -> None:
        """The next queries."""
        tries = Tries.of(self.active, self.now)
        self.tries = replace(tries, images=self.proposal(tries).clamp_(0, 1))
        if tries.ahead == 1:
            self.now = self.tries.images
        else:
            self.now[tries.slots] = self.tries.images[: len(tries.slots) * tries.ahead : tries.ahead]

    def signs(self, ids: Tensor, restart: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Signs of first perturbations, -1 or 1, (N, *shape)."""
        words = random.words(ids, math.prod(shape), seed=self.plan.seed, purpose="square start", draw=restart)
        return _sign(words).reshape(len(ids), *shape)

    def dealt(self, tries: Tries) -> Iterator[tuple[Tensor, Cards]]:
        """Rows of `tries` whose patches have one side, int64 (G,), and what their queries draw."""
        draw = self.restart * self.plan.queries + self.step
        return self.deck.deal(self.cards, tries, self.ids, self.step, draw)


def _sign(words: Tensor) -> Tensor:
    """-1 or 1 by the highest of 32 bits."""
    return (words >> 31).float() * 2 - 1


class LinfSlots(SquareSlots):
    """Algorithm 2: patches take the value -eps or eps in each channel; the search begins with vertical stripes."""

    WORDS = 2  # where the patch is

    def side(self, share: float) -> int:
        """The side of a square of this share of the pixels, at least 1."""
        height, width = self.clean.shape[2:]
        return min(max(round(math.sqrt(share * height * width)), 1), height, width)

    def first(self, ids: Tensor, restart: Tensor) -> Tensor:
        """Stripes one pixel wide, with a sign per channel."""
        channels, height, width = self.clean.shape[1:]
        return self.plan.eps * self.signs(ids, restart, (channels, 1, width)).expand(-1, -1, height, -1)

    def cards(self, words: Tensor, side: int) -> Cards:
        """The pixels of the patch, int64 (P, side, side), and its signs, (P, C)."""
        height, width = self.clean.shape[2:]
        squares = Squares.anywhere(words, side, height=height, width=width)
        return squares.places(width), _sign(words[:, 2:])

    def proposal(self, tries: Tries) -> Tensor:
        """The best image with a patch at the edge of the ball."""
        moved = rows_of(self.top, tries.owner)
        for rows, (places, signs) in self.dealt(tries):
            clean = read(self.clean, tries.owner[rows], places)
            write_(moved, rows, places, clean + self.plan.eps * per_row(signs))
        return moved


class L2Slots(SquareSlots):
    """Algorithm 3: a patch takes over the norm of another one, and what the box has cut off."""

    WORDS = 5  # where both are, and whether it is turned

    def __init__(self, objective: Objective, plan: Square, like: Batch, *, block: int) -> None:
        super().__init__(objective, plan, like, block=block)
        self.pyramids = {side: pyramid(side).to(self.clean.device) for side in self.sides.unique().tolist()}

    def side(self, share: float) -> int:
        """The odd side of a square of this share of the pixels, at least 3 where the image has as many."""
        height, width = self.clean.shape[2:]
        wanted = max(round(math.sqrt(share * height * width)), 3)
        return min(wanted + (wanted % 2 == 0), height, width)

    def first(self, ids: Tensor, restart: Tensor) -> Tensor:
        """Tiles of the patch with a sign per tile and channel, scaled to the radius."""
        channels, height, width = self.clean.shape[1:]
        side = max(min(height, width) // TILES, 1)
        down, across = -(-height // side), -(-width // side)
        tile = pyramid(side).to(self.clean.device).repeat(down, across)
        signs = self.signs(ids, restart, (channels, down, across)).repeat_interleave(side, 2).repeat_interleave(side, 3)
        return self.scaled((signs * tile)[:, :, :height, :width])

    def cards(self, words: Tensor, side: int) -> Cards:
        """The pixels of both patches, int64 (P, side, side); 1 where the second does not meet the first, else 0, (P, 1, side, side);
        what is added to the first, (P, C, side, side)."""
        height, width = self.clean.shape[2:]
        here, there = (Squares.anywhere(words[:, at:], side, height=height, width=width) for at in (0, 2))
        bump, turned = self.pyramids[side], (words[:, 4] >> 31).bool()[:, None, None, None]
        pushed = per_row(_sign(words[:, 5:])) * torch.where(turned, bump.T, bump)
        apart = (~there.meet(here)).float()[:, None]
        return here.places(width), there.places(width), apart, pushed

    def proposal(self, tries: Tries) -> Tensor:
        """The best image with one patch emptied and another one pushed further."""
        moved, clean = rows_of(self.top - self.clean, tries.owner), rows_of(self.clean, tries.owner)
        unused = (self.plan.eps**2 - moved.square().sum((1, 2, 3))).clamp_min(0)[:, None] / moved.shape[1]
        for rows, (here, there, apart, bump) in self.dealt(tries):
            inside, taken = read(moved, rows, here), read(moved, rows, there) * apart
            energy = _energy(inside)
            available = (energy + _energy(taken) + unused[rows]).sqrt()
            pushed = bump + _unit(inside, energy)
            write_(moved, rows, there, torch.zeros((), device=moved.device))
            write_(moved, rows, here, _unit(pushed, _energy(pushed)) * per_row(available))
        return self.scaled(moved).add_(clean)

    def scaled(self, delta: Tensor) -> Tensor:
        """Perturbations of the norm of the radius, less what rounding may add; a zero one stays."""
        return delta * per_row(self.plan.eps * (1 - 3e-7) / l2_size(delta).clamp_min(1e-30))


def _energy(values: Tensor) -> Tensor:
    """The sum of squares of (B, C, H, W) per example and channel, (B, C)."""
    return values.square().sum((2, 3))


def _unit(values: Tensor, energy: Tensor) -> Tensor:
    """(B, C, H, W) with norm 1 per example and channel, of which this is the sum of squares; zeros stay."""
    size = energy.sqrt()
    return values / per_row(torch.where(size > 0, size, torch.ones_like(size)))
