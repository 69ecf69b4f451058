"""Square: a random search over square patches that needs no gradient (Andriushchenko et al. 2020, arXiv 1912.00049).

Each query changes one patch of the best image so far and is kept if the loss rises. Patches shrink on a fixed schedule.
Every draw is a function of (seed, id, number of the query): position, signs and orientation differ between examples.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from rbkit.tools import random
from rbkit.tools.norms import Norm, l2_size, per_row
from rbkit.tools.slots import Batch, Objective, Slots, assign

SHARE = 0.8  # of the pixels that the first patches cover, p of section 3.2
HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # queries of 10,000 after which the share is halved
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
    """Slots with the best image of the restart, `top`, and its value; `sides` holds the side of a patch by query."""

    STATE = (*Slots.STATE, "top", "top_value")

    def __init__(self, objective: Objective, plan: Square, like: Batch, *, block: int) -> None:
        super().__init__(objective, like, block=block)
        self.plan = plan
        shares = [covered(query, plan.queries, share=plan.share) for query in range(plan.queries + 1)]
        self.sides = torch.tensor([self.side(share) for share in shares], device=self.clean.device)
        self.top, self.top_value = self.now.clone(), torch.zeros(block, device=self.clean.device)

    @abstractmethod
    def side(self, share: float) -> int:
        """The side of a patch that covers so much of an image."""

    @abstractmethod
    def first(self, slots: Tensor) -> Tensor:
        """First perturbations of `slots`, inside the ball."""

    @abstractmethod
    def proposal(self) -> Tensor:
        """Images that the slots try next, inside the ball; the box is cut later."""

    def begin(self, slots: Tensor) -> None:
        """The first image of a restart."""
        self.now[slots] = (self.clean[slots] + self.first(slots)).clamp(0, 1)
        self.top_value[slots] = float("-inf")

    def advance(self) -> Tensor:
        """One query of every slot: keep what is better, propose the next."""
        plan = self.plan
        value, reached, _ = self.evaluate(torch.zeros_like(self.active))
        self.keep(self.improved(value, reached), self.now, value, reached)
        higher = value > self.top_value
        self.top_value = torch.where(higher, value, self.top_value)
        assign(self.top, self.now, higher)
        self.step = self.step + self.active
        ended = self.active & (self.step >= plan.queries)
        done = ended & (self.restart + 1 >= plan.restarts)
        if plan.stop:
            done = done | (self.active & reached)
        left = self.leave(done)
        if bool(self.active.any()):
            self.now = self.proposal().clamp_(0, 1)
            self.begin_again(ended & ~done)
        return left

    def query(self, count: int) -> tuple[Tensor, Tensor]:
        """For the next query of each slot: words of 32 random bits, int64 (B, count), and the side of its patches (B,)."""
        draw = self.restart * self.plan.queries + self.step
        words = random.words(self.ids, count, seed=self.plan.seed, purpose="square", draw=draw)
        # An idle slot is at any step: its patch must not widen the windows of all.
        return words, torch.where(self.active, self.sides[self.step], self.sides[-1])

    def signs(self, slots: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Signs of the first perturbation, -1 or 1, (len(slots), *shape)."""
        words = random.words(
            self.ids[slots], math.prod(shape), seed=self.plan.seed, purpose="square start", draw=self.restart[slots]
        )
        return _sign(words).reshape(len(slots), *shape)

    def corner(self, words: Tensor, side: Tensor) -> tuple[Tensor, Tensor]:
        """Row and column of the first pixel of a patch, uniform where it fits; two words each (B, 2)."""
        height, width = self.clean.shape[2:]
        return (words[:, 0] * (height - side + 1)) >> 32, (words[:, 1] * (width - side + 1)) >> 32


def _sign(words: Tensor) -> Tensor:
    """-1 or 1 by the highest of 32 bits."""
    return (words >> 31).float() * 2 - 1


class LinfSlots(SquareSlots):
    """Algorithm 2: patches take the value -eps or eps in each channel; the search begins with vertical stripes."""

    def side(self, share: float) -> int:
        """The side of a square of this share of the pixels, at least 1."""
        height, width = self.clean.shape[2:]
        return min(max(round(math.sqrt(share * height * width)), 1), height, width)

    def first(self, slots: Tensor) -> Tensor:
        """Stripes one pixel wide, with a sign per channel."""
        channels, height, width = self.clean.shape[1:]
        return self.plan.eps * self.signs(slots, (channels, 1, width)).expand(-1, -1, height, -1)

    def proposal(self) -> Tensor:
        """The best image with a patch at the edge of the ball."""
        words, side = self.query(2 + self.clean.shape[1])
        window, moved = Window.around(self.corner(words, side), side, self.clean), self.top.clone()
        edge = window.of(self.clean) + self.plan.eps * per_row(_sign(words[:, 2:]))
        window.put(moved, torch.where(window.patch, edge, window.of(moved)))
        return moved


class L2Slots(SquareSlots):
    """Algorithm 3: a patch takes over the norm of another one, and what the box has cut off."""

    def __init__(self, objective: Objective, plan: Square, like: Batch, *, block: int) -> None:
        super().__init__(objective, plan, like, block=block)
        largest = int(self.sides.max())
        table = torch.zeros(largest + 1, largest, largest)
        for side in self.sides.unique().tolist():
            table[side, :side, :side] = pyramid(side)
        self.pyramids = table.to(self.clean.device)

    def side(self, share: float) -> int:
        """The odd side of a square of this share of the pixels, at least 3 where the image has as many."""
        height, width = self.clean.shape[2:]
        wanted = max(round(math.sqrt(share * height * width)), 3)
        return min(wanted + (wanted % 2 == 0), height, width)

    def first(self, slots: Tensor) -> Tensor:
        """Tiles of the patch with a sign per tile and channel, scaled to the radius."""
        channels, height, width = self.clean.shape[1:]
        side = max(min(height, width) // TILES, 1)
        down, across = -(-height // side), -(-width // side)
        tile = pyramid(side).to(self.clean.device).repeat(down, across)
        signs = self.signs(slots, (channels, down, across)).repeat_interleave(side, 2).repeat_interleave(side, 3)
        return self.scaled((signs * tile)[:, :, :height, :width])

    def proposal(self) -> Tensor:
        """The best image with one patch emptied and another one pushed further; only their windows are computed."""
        words, side = self.query(5 + self.clean.shape[1])
        here, there = (Window.around(self.corner(w, side), side, self.clean) for w in (words, words[:, 2:]))
        moved = self.top - self.clean
        unused = (self.plan.eps**2 - moved.square().sum((1, 2, 3))).clamp_min(0)[:, None] / moved.shape[1]
        inside, emptied = here.of(moved) * here.patch, there.of(moved)
        taken = emptied * (there.patch & ~here.holds(there.rows, there.columns))
        available = (inside.square().sum((2, 3)) + taken.square().sum((2, 3)) + unused).sqrt()
        bump = self.bumps(here, side, words[:, 4] >> 31)
        pushed = _unit(per_row(_sign(words[:, 5:])) * bump + _unit(inside)) * per_row(available)
        there.put(moved, emptied * ~there.patch)
        here.put(moved, torch.where(here.patch, pushed, here.of(moved)))
        return self.scaled(moved).add_(self.clean)

    def bumps(self, window: Window, side: Tensor, turned: Tensor) -> Tensor:
        """The patch of each slot in its window, (B, 1, L, L); transposed where `turned`."""
        limit = self.pyramids.shape[1] - 1
        down = (window.rows - window.corner[0][:, None]).clamp(0, limit)[:, :, None]
        right = (window.columns - window.corner[1][:, None]).clamp(0, limit)[:, None, :]
        flip = turned.bool()[:, None, None]
        values = self.pyramids[side[:, None, None], torch.where(flip, right, down), torch.where(flip, down, right)]
        return values[:, None] * window.patch

    def scaled(self, delta: Tensor) -> Tensor:
        """Perturbations of the norm of the radius, less what rounding may add; a zero one stays."""
        return delta * per_row(self.plan.eps * (1 - 3e-7) / l2_size(delta).clamp_min(1e-30))


@dataclass(frozen=True)
class Window:
    """A part of each image, (L, L) for the widest patch of all, that holds the patch of the image.

    rows, columns: of its pixels in the image, (B, L) each; corner: first row and column of the patch, (B,) each; side: of the
    patch, (B,); width: of the image.
    """

    rows: Tensor
    columns: Tensor
    corner: tuple[Tensor, Tensor]
    side: Tensor
    width: int

    @classmethod
    def around(cls, corner: tuple[Tensor, Tensor], side: Tensor, images: Tensor) -> Window:
        """The windows of patches in images (B, C, H, W): they begin at the patch, or earlier where the image would end."""
        wide = int(side.max())
        along = torch.arange(wide, device=side.device)
        rows, columns = (
            first.clamp_max(size - wide)[:, None] + along for first, size in zip(corner, images.shape[2:], strict=True)
        )
        return cls(rows, columns, corner, side, images.shape[3])

    def holds(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Which pixels of rows and columns (B, L) are in the patch, bool (B, 1, L, L)."""
        down, right = (x - first[:, None] for x, first in zip((rows, columns), self.corner, strict=True))
        inside = [(x >= 0) & (x < self.side[:, None]) for x in (down, right)]
        return (inside[0][:, :, None] & inside[1][:, None, :])[:, None]

    @property
    def patch(self) -> Tensor:
        """Where in it the patch is, bool (B, 1, L, L)."""
        return self.holds(self.rows, self.columns)

    def of(self, images: Tensor) -> Tensor:
        """What images (B, C, H, W) hold in it, (B, C, L, L)."""
        wide = self.rows.shape[1]
        return images.flatten(2).gather(2, self._places(images)).unflatten(2, (wide, wide))

    def put(self, images: Tensor, values: Tensor) -> None:
        """Write values (B, C, L, L) into contiguous images (B, C, H, W)."""
        images.view(*images.shape[:2], -1).scatter_(2, self._places(images), values.flatten(2))

    def _places(self, images: Tensor) -> Tensor:
        places = (self.rows * self.width)[:, :, None] + self.columns[:, None, :]
        return places.flatten(1)[:, None].expand(-1, images.shape[1], -1)


def _unit(values: Tensor) -> Tensor:
    """(B, C, H, W) with norm 1 per example and channel; zeros stay."""
    size = values.square().sum((2, 3), keepdim=True).sqrt()
    return values / torch.where(size > 0, size, torch.ones_like(size))
