"""Slots: a block of fixed size in which examples climb, each at a step of its own.

A finished example leaves its slot to the next one (`Flow`), so that a full block is computed as long as there is work.
A row's numbers depend neither on its slot nor on its neighbours. Kinds of ascent are kinds of `Slots`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from rbkit.tools.norms import linf_size

Context = Mapping[str, Tensor]
Start = Callable[[Tensor, Tensor, Tensor], Tensor]
PER_SLOT = ("images", "value", "reached", "forwards", "backwards", "zero_gradients")  # fields of Outcome


class Objective(Protocol):
    """What is maximised: (value (B,), reached bool (B,)) at images (B, C, H, W) in `context` (one row per slot)."""

    def __call__(self, images: Tensor, context: Context) -> tuple[Tensor, Tensor]: ...


class Ascent(Protocol):
    """A way to climb: it gives the block of slots in which that happens."""

    def slots(self, objective: Objective, like: Batch, *, block: int) -> Slots: ...


@dataclass
class Batch:
    """Rows to climb from: ids int64 (N,), clean (N, C, H, W), context per row; rows in `skip` are returned as they are.

    order: int64 (N,), the rows as they are to begin (None: one after the other).
    """

    ids: Tensor
    clean: Tensor
    context: dict[str, Tensor]
    skip: Tensor | None = None
    tag: Any = None
    order: Tensor | None = None

    def __len__(self) -> int:
        return len(self.ids)


def joined(batches: Sequence[Batch]) -> Batch:
    """The rows of all, in order; none is skipped, and there is no tag."""
    ids, clean = (torch.cat([getattr(batch, name) for batch in batches]) for name in ("ids", "clean"))
    return Batch(ids, clean, {key: torch.cat([batch.context[key] for batch in batches]) for key in batches[0].context})


@dataclass
class Outcome:
    """Per row: the kept iterate, its value, whether it reached the goal, forward and backward passes, zero gradients."""

    images: Tensor
    value: Tensor
    reached: Tensor
    forwards: Tensor
    backwards: Tensor
    zero_gradients: Tensor

    @classmethod
    def of(cls, batch: Batch) -> Outcome:
        """What stands before any climbing: the clean rows."""
        n, device = len(batch), batch.clean.device
        counts = [torch.zeros(n, dtype=torch.int64, device=device) for _ in range(3)]
        value = torch.full((n,), float("-inf"), device=device)
        return cls(batch.clean.clone(), value, torch.zeros(n, dtype=torch.bool, device=device), *counts)

    def clear(self, rows: Tensor) -> None:
        """Let these rows, int64 indices, stand as before any climbing, but for their images."""
        self.value[rows], self.reached[rows] = float("-inf"), False
        self.forwards[rows] = self.backwards[rows] = self.zero_gradients[rows] = 0


def place(target: Tensor, slots: Tensor, images: Tensor) -> None:
    """Write `images` (S, C, H, W) into `slots`, int64 (S,), of `target` (B, C, H, W).

    `target` is channels last: as (B, H, W, C) its rows are written whole.
    """
    target.permute(0, 2, 3, 1).index_copy_(0, slots, images.permute(0, 2, 3, 1))


def rows_of(images: Tensor, rows: Tensor) -> Tensor:
    """Rows, int64 (S,), of images (B, C, H, W) that are channels last, as they are: indexing takes four times as long."""
    return images.permute(0, 2, 3, 1).index_select(0, rows).permute(0, 3, 1, 2)


def assign(target: Tensor, source: Tensor, chosen: Tensor) -> None:
    """Copy the rows of `source` that are `chosen`, bool (B,), into `target`: they are few where little improves.

    Both (B, C, H, W), channels last.
    """
    rows = chosen.nonzero()[:, 0]
    if len(rows):
        place(target, rows, rows_of(source, rows))


def surpasses(value: Tensor, reached: Tensor, best: Tensor, best_reached: Tensor) -> Tensor:
    """Whether a value is better than the best so far: reaching the goal comes before a higher value. All (N,)."""
    return (reached & ~best_reached) | ((value > best) & (reached == best_reached))


class Slots(ABC):
    """A block of `block` slots, each at work for one example: who sits where, and what was found so far.

    Kinds of ascent differ in `begin` and `advance`. Whatever they remember is a tensor with a row per slot, because
    slots are at different steps; a row's numbers must depend neither on its slot nor on its neighbours.
    STATE names these tensors. Shapes: ids, step, restart, active (B,); clean, now (B, C, H, W), channels last as their
    gradients are, since arithmetic between two layouts takes several times as long; context (B, ...) each.
    """

    STATE: tuple[str, ...] = ("ids", "clean", "now", "step", "restart", "active")

    def __init__(self, objective: Objective, like: Batch, *, block: int, start: Start | None = None) -> None:
        device = like.clean.device
        self.objective, self.block, self.start = objective, block, start
        # Idle slots hold a real row, so that padding is ordinary arithmetic.
        self.ids = like.ids[:1].repeat(block)
        self.clean = like.clean[:1].repeat(block, 1, 1, 1).contiguous(memory_format=torch.channels_last)
        self.now = self.clean.clone()
        self.context = {k: v[:1].repeat(block, *[1] * (v.dim() - 1)) for k, v in like.context.items()}
        self.best = Outcome.of(Batch(self.ids, self.clean, {}))
        self.step = torch.zeros(block, dtype=torch.int64, device=device)
        self.restart = torch.zeros(block, dtype=torch.int64, device=device)
        self.active = torch.zeros(block, dtype=torch.bool, device=device)

    def begin(self, slots: Tensor) -> None:
        """Forget what other restarts left in `slots` (int64 indices): `now` is where theirs begins, their step is 0."""
        return  # an iterate is all that is remembered, where a kind does not say otherwise

    @abstractmethod
    def advance(self) -> Tensor:
        """One evaluation of every slot, and what follows from it; returns the slots that are done (int64 indices)."""

    def started(self, ids: Tensor, clean: Tensor, restart: Tensor) -> Tensor:
        """Where these restarts of some rows begin, (N, C, H, W), in whatever slots: at `start`, or at the image itself."""
        return clean if self.start is None else self.start(ids, clean, restart)

    def load(self, slots: Tensor, batch: Batch, rows: Tensor, first: Tensor) -> None:
        """Put `rows` of `batch` into `slots`; their first restart begins at `first`."""
        self.ids[slots], clean = batch.ids[rows], batch.clean[rows]
        for key, values in batch.context.items():
            self.context[key][slots] = values[rows]
        for target, images in ((self.clean, clean), (self.best.images, clean), (self.now, first)):
            place(target, slots, images)
        self.best.clear(slots)
        self.step[slots], self.restart[slots], self.active[slots] = 0, 0, True
        self._aim(slots)
        self.begin(slots)

    def take(self, slots: Tensor, of: Slots) -> None:
        """Go on with these slots (int64 indices) `of` a block of the same kind, which may be this one, in this order."""
        for name in self.STATE:
            setattr(self, name, getattr(of, name)[slots])
        for name in PER_SLOT:
            setattr(self.best, name, getattr(of.best, name)[slots])
        self.context = {key: values[slots] for key, values in of.context.items()}
        self.block = len(slots)

    def join(self, other: Slots) -> None:
        """Take in the slots of another block of the same kind, behind those that are here."""
        for name in self.STATE:
            setattr(self, name, torch.cat([getattr(self, name), getattr(other, name)]))
        for name in PER_SLOT:
            setattr(self.best, name, torch.cat([getattr(self.best, name), getattr(other.best, name)]))
        self.context = {key: torch.cat([values, other.context[key]]) for key, values in self.context.items()}
        self.block += other.block

    def room(self, count: int) -> int:
        """Rows of a block, no more than there are, of which so many examples make use."""
        return count

    @property
    def rounds(self) -> int:
        """Targets that each restart aims at in turn: the columns of `targets` in the context, else 1."""
        return self.context["targets"].shape[1] if "targets" in self.context else 1

    def _aim(self, slots: Tensor) -> None:
        """Let `target` of the context be the one that the restart of `slots` is for."""
        if "targets" in self.context:
            self.context["target"][slots] = self.context["targets"][slots, self.restart[slots] % self.rounds]

    def evaluate(self, climbing: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """(value, reached, gradient) at `now`, counted; the gradient only if a slot is `climbing`, bool (B,)."""
        needed = bool(climbing.any())
        images = self.now.detach().requires_grad_(needed)
        with torch.set_grad_enabled(needed):
            value, reached = self.objective(images, self.context)
            gradient = torch.autograd.grad(value.sum(), images)[0] if needed else None
        self.best.forwards += self.active
        self.best.backwards += climbing
        if gradient is not None:
            self.best.zero_gradients += climbing & (linf_size(gradient) == 0)
        return value.detach(), reached, gradient

    def looked(self) -> Tensor:
        """The numbers that an evaluation rests on, in one row: value and gradient at `now`, not counted."""
        images = self.now.detach().requires_grad_()
        with torch.enable_grad():
            value, _ = self.objective(images, self.context)
        return torch.cat([value.detach(), torch.autograd.grad(value.sum(), images)[0].flatten()])

    def keep(self, better: Tensor, images: Tensor, value: Tensor, reached: Tensor) -> None:
        """Take these images with their values into the outcome of the slots that are `better`, bool (B,)."""
        best = self.best
        best.value = torch.where(better, value, best.value)
        best.reached = torch.where(better, reached, best.reached)
        assign(best.images, images, better)

    def improved(self, value: Tensor, reached: Tensor) -> Tensor:
        """Active slots whose outcome is worse than this."""
        return self.active & surpasses(value, reached, self.best.value, self.best.reached)

    def begin_again(self, again: Tensor) -> None:
        """Start the next restart of the slots in `again`, bool (B,)."""
        if bool(again.any()):
            slots = again.nonzero()[:, 0]
            self.step[slots] = 0
            self.restart[slots] += 1
            self._aim(slots)
            place(self.now, slots, self.started(self.ids[slots], self.clean[slots], self.restart[slots]))
            self.begin(slots)

    def leave(self, done: Tensor) -> Tensor:
        """Free the slots in `done`, bool (B,); returns their indices."""
        self.active = self.active & ~done
        return done.nonzero()[:, 0]
