"""The flow of rows from batches to the slots of a block and back, in order: all that climbs is fed by it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

import torch
from torch import Tensor

from rbkit.tools.slots import PER_SLOT, Ascent, Batch, Objective, Outcome, Slots

Poll = Callable[[bool], Batch | None]
Narrowest = Callable[[int, Tensor], int]  # see Flow
T = TypeVar("T")
PATIENCE = 3  # evaluations of a full block that it costs to tell whether a row's numbers are the same in a narrower one


@dataclass
class _Entry:
    """A batch on its way: which rows still wait for a slot, where the next of them begin, and how many are not done."""

    batch: Batch
    outcome: Outcome
    waiting: deque[int]
    begun: Tensor
    left: int


def polling(batches: Iterable[Batch]) -> Poll:
    """A source that is always ready: `poll(wait)` gives the next batch, or raises StopIteration."""
    iterator = iter(batches)
    return lambda wait: next(iterator)


class Flow:
    """Rows from batches to slots and back, in order: `poll` is a source of finished batches.

    Slots are refilled across batches that are ready (`poll(False)`); nothing waits for input while rows can climb.
    Without `refill` a block takes rows of one batch and keeps them until all are done.

    widths(count, images) is the narrowest block with room for so many rows in which such rows have the same numbers, to the
    last bit. The last rows of the input go on in it, since much of a full block would be padding. As it costs PATIENCE
    evaluations to tell, it is asked when padding has cost as much: a short attack never pays for it.
    """

    def __init__(
        self,
        objective: Objective,
        plan: Ascent,
        poll: Poll,
        *,
        block: int,
        refill: bool = True,
        widths: Narrowest | None = None,
    ) -> None:
        self.widths = widths if refill else None
        self.padded = 0.0
        self.objective, self.plan, self.block = objective, plan, block
        self.source, self.refill = poll, refill
        self.entries: deque[_Entry] = deque()
        self.ended = False
        self.owner: dict[int, tuple[_Entry, int]] = {}
        self.slots: Slots | None = None

    def poll(self, wait: bool) -> tuple[Batch, Outcome] | None:
        """The next finished batch, or None where nothing can be done without waiting. Raises StopIteration at the end."""
        while True:
            if not self.entries and not self.ask(wait):
                if self.ended:
                    raise StopIteration
                return None
            if not self.entries[0].left:
                entry = self.entries.popleft()
                return entry.batch, entry.outcome
            if self.slots is None:
                self.slots = self.plan.slots(self.objective, self.entries[0].batch, block=self.block)
            self.fill(self.slots)
            self._narrow(self.slots)
            self.collect(self.slots, self.slots.advance())

    def ask(self, wait: bool) -> bool:
        """Take in one more batch; False when none is ready."""
        if self.ended:
            return False
        try:
            batch = self.source(wait)
        except StopIteration:
            self.ended = True
            return False
        if batch is None:
            return False
        skip = torch.zeros(len(batch), dtype=torch.bool) if batch.skip is None else batch.skip.cpu()
        waiting = deque((~skip).nonzero()[:, 0].tolist())
        self.entries.append(_Entry(batch, Outcome.of(batch), waiting, batch.clean[:0], len(waiting)))
        return True

    def fill(self, slots: Slots) -> None:
        """Give free slots to waiting rows; another batch is taken in only if it is ready.

        Without refilling, slots are given only when all are free, and to rows of one batch.
        """
        if self.owner and not self.refill:
            return
        free = [s for s in range(slots.block) if s not in self.owner]
        while free:
            entry = next((e for e in self.entries if e.waiting), None)
            if entry is None:
                if self.refill and self.ask(False):
                    continue
                return
            if not len(entry.begun):
                self._draw(entry, slots)
            count = min(len(free), len(entry.begun))
            taken, free = free[:count], free[count:]
            first, entry.begun = entry.begun[:count], entry.begun[count:]
            rows = [entry.waiting.popleft() for _ in taken]
            device = slots.ids.device
            slots.load(torch.tensor(taken, device=device), entry.batch, torch.tensor(rows, device=device), first)
            self.owner.update({slot: (entry, row) for slot, row in zip(taken, rows, strict=True)})

    def _draw(self, entry: _Entry, slots: Slots) -> None:
        """Where the next block of waiting rows begin: slots become free by ones and twos, for which drawing takes as long."""
        batch = entry.batch
        rows = torch.tensor(list(islice(entry.waiting, self.block)), device=batch.ids.device)
        entry.begun = slots.started(batch.ids[rows], batch.clean[rows], torch.zeros_like(rows))

    def _narrow(self, slots: Slots) -> None:
        """Once no row is waiting or can come, let those at work move together into the narrowest block that fits."""
        count = len(self.owner)
        if self.widths is None or not self.ended or any(e.waiting for e in self.entries):
            return
        room = slots.room(count)
        self.padded += (slots.block - room) / self.block
        if self.padded < PATIENCE:
            return
        self.padded, width = 0.0, self.widths(room, slots.clean)
        if width < slots.block:
            idle = [s for s in range(slots.block) if s not in self.owner]
            kept = (sorted(self.owner) + idle)[:width]
            slots.take(torch.tensor(kept, device=slots.ids.device))
            self.owner = {new: self.owner[old] for new, old in enumerate(kept) if old in self.owner}

    def collect(self, slots: Slots, done: Tensor) -> None:
        """Copy the results of finished slots to their rows."""
        places: dict[int, tuple[_Entry, list[int], list[int]]] = {}
        for slot in done.tolist():
            entry, row = self.owner.pop(slot)
            _, rows, taken = places.setdefault(id(entry), (entry, [], []))
            rows.append(row)
            taken.append(slot)
        for entry, rows, taken in places.values():
            to, source = (torch.tensor(x, device=done.device) for x in (rows, taken))
            for name in PER_SLOT:
                getattr(entry.outcome, name).index_copy_(0, to, getattr(slots.best, name)[source])
            entry.left -= len(rows)


def finished(poll: Callable[[bool], T | None]) -> Iterator[T]:
    """All that a source gives, waiting for each."""
    while True:
        try:
            found = poll(True)
        except StopIteration:
            return
        if found is not None:
            yield found
