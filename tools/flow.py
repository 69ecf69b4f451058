"""The flow of rows from batches to the slots of a block and back, in order: all that climbs is fed by it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ALL_COMPLETED, FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from itertools import islice
from typing import TypeVar

import torch
from torch import Tensor

from rbkit.tools.lanes import Lanes, threads
from rbkit.tools.sameness import Narrowest
from rbkit.tools.slots import PER_SLOT, Ascent, Batch, Objective, Outcome, Slots

Poll = Callable[[bool], Batch | None]
T = TypeVar("T")
STRETCH = 16  # evaluations that a lane makes at most before it says how far it is
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


@dataclass
class _Lane:
    """A block at work: who sits in each of its slots, how much padding it has computed, and its turn if it is computed now.

    wanted: whether it is to come to rest after the evaluation that it is at.
    """

    slots: Slots
    owner: dict[int, tuple[_Entry, int]] = field(default_factory=dict)
    padded: float = 0.0
    turn: Future[Tensor] | None = None
    wanted: bool = False

    def advance(self) -> Tensor:
        """One evaluation, and more while all slots are at work, since nobody can be served then; the slots that are done."""
        for _ in range(STRETCH):
            done = self.slots.advance()
            if len(done) or self.wanted or len(self.owner) < self.slots.block:
                break
        return done

    def take(self, width: int, of: Slots, owner: dict[int, tuple[_Entry, int]]) -> None:
        """Go on in a block of `width` rows with those that sit in slots `of` a block, which may be this one."""
        idle = [s for s in range(of.block) if s not in owner]
        kept = (sorted(owner) + idle)[:width]
        kept += kept[-1:] * (width - len(kept))
        self.slots.take(torch.tensor(kept, device=of.ids.device), of)
        self.slots.active[len(owner) :] = False
        self.owner = {new: owner[old] for new, old in enumerate(kept[: len(owner)])}

    def join(self, other: _Lane) -> None:
        """Take in the slots of another block, behind those that are here."""
        self.owner |= {self.slots.block + slot: of for slot, of in other.owner.items()}
        self.padded += other.padded
        self.slots.join(other.slots)


class Flow:
    """Rows from batches to slots and back, in order: `poll` is a source of finished batches.

    Slots are refilled across batches that are ready (`poll(False)`); nothing waits for input while rows can climb.
    Without `refill` a block takes rows of one batch and keeps them until all are done.

    widths(count, images) is the narrowest block with room for so many rows in which such rows have the same numbers, to the
    last bit. The last rows of the input go on in it, since much of a full block would be padding. As it costs PATIENCE
    evaluations to tell, it is asked when padding has cost as much: a short attack never pays for it.

    With `lanes`, as many blocks are computed side by side as there are rows to fill. The last rows share narrower ones evenly, and
    go on in one as soon as it has room for all.
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
        lanes: Lanes | None = None,
    ) -> None:
        self.widths, self.lanes = (widths, lanes) if refill else (None, None)
        self.objective, self.plan, self.block = objective, plan, block
        self.source, self.refill = poll, refill
        self.entries: deque[_Entry] = deque()
        self.ended = False
        self.open: list[_Lane] = []
        self.most = lanes.count if lanes else 1
        self.turns = 0

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
            if not self.open:
                self.open.append(self._lane())
            self._spread()
            self._even()
            self._gather()
            if len(self.open) > 1:
                self._side_by_side()
            else:
                self._alone()

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
        order = torch.arange(len(batch)) if batch.order is None else batch.order.cpu()
        waiting = deque(order[~skip[order]].tolist())
        self.entries.append(_Entry(batch, Outcome.of(batch), waiting, batch.clean[:0], len(waiting)))
        return True

    def _lane(self) -> _Lane:
        return _Lane(self.plan.slots(self.objective, self.entries[0].batch, block=self.block))

    def _alone(self) -> None:
        """One evaluation of the one block, by all threads."""
        lane = self.open[0]
        with threads(self.lanes.threads if self.lanes else None):
            self._serve(lane)
            self.collect(lane, lane.slots.advance())
        self.turns += 1

    def _side_by_side(self) -> None:
        """Let every block that is at rest go on, and wait for one; after a single evaluation while more blocks may be opened."""
        assert self.lanes is not None
        count = len(self.open)
        with threads(self.lanes.each(count)):
            for lane in self.open:
                if lane.turn is None:
                    self._serve(lane)
                    if lane.owner:
                        lane.wanted = count < self.most
                        lane.turn = self.lanes.start(count, lane.advance)
            self._await(return_when=FIRST_COMPLETED)

    def _await(self, *, return_when: str) -> None:
        """Wait for blocks that are being computed, and collect what they give."""
        for lane in self.open:
            lane.wanted |= return_when == ALL_COMPLETED
        done, _ = wait([lane.turn for lane in self.open if lane.turn], return_when=return_when)
        for lane in self.open:
            if lane.turn in done:
                found, lane.turn = lane.turn.result(), None
                self.collect(lane, found)
                self.turns += 1

    @property
    def at_hand(self) -> int:
        """Rows at work or waiting for a slot."""
        return sum(len(lane.owner) for lane in self.open) + sum(len(e.waiting) for e in self.entries)

    def _spread(self) -> None:
        """Open a block for each lane, or for as many as there are rows for.

        Whether rows have the same numbers there takes some evaluations to tell, too.
        """
        lanes, slots = self.lanes, self.open[0].slots
        if lanes is None or len(self.open) >= self.most or not lanes.fit(slots.clean) or self.turns < 2 * PATIENCE:
            return
        while self.at_hand < self.most * self.block and self.ask(False):
            pass
        allowed = self._allowed(lanes.to_open(min(self.at_hand // self.block, self.most)))
        self.open += [self._lane() for _ in range(allowed - len(self.open))]

    def _even(self) -> None:
        """Open another block for the last rows where those that are open have no room for all, and give each an even share.

        They are narrower then. Rows that waited would begin when the others are done.
        """
        lanes, slots = self.lanes, self.open[0].slots
        if lanes is None or self.widths is None or not self.ended or not lanes.fit(slots.clean) or self._roomy():
            return
        count = lanes.to_open(min(-(-self.at_hand // self.block), self.most))
        if count == len(self.open) or self._allowed(count) < count or self._roomy():
            return
        with threads(lanes.each(count)):
            width = self.widths(-(-self.at_hand // count), slots.clean)
        if width < self.block:
            self._divide(count, width)
        else:
            self.most = len(self.open)

    def _roomy(self) -> bool:
        """Whether the open blocks have room for all rows."""
        return self.at_hand <= len(self.open) * self.block

    def _allowed(self, count: int) -> int:
        """How many of `count` blocks may lie side by side, no fewer than now; if it is more, all are at rest."""
        assert self.lanes is not None
        if count <= len(self.open) or self.turns < PATIENCE * count:
            return len(self.open)
        self._await(return_when=ALL_COMPLETED)
        allowed = max(self.lanes.opened(count, self.open[0].slots.looked), len(self.open))
        if allowed < count:
            self.most = allowed
        return allowed

    def _divide(self, count: int, width: int) -> None:
        """Share the rows at work among `count` blocks of `width` rows."""
        whole = self._joined()
        rows = sorted(whole.owner)
        lanes = [self._lane() for _ in range(count)]
        for number, lane in enumerate(lanes):
            lane.take(width, whole.slots, {slot: whole.owner[slot] for slot in rows[number::count]})
        self.open = lanes

    def _joined(self) -> _Lane:
        """All that is at work in one block, as wide as all are together."""
        self._await(return_when=ALL_COMPLETED)
        first, *others = self.open
        for lane in others:
            first.join(lane)
        return first

    def _gather(self) -> None:
        """Go on in one block where it has room for all the rows that there are."""
        while len(self.open) > 1 and self.at_hand <= self.block:
            assert self.lanes is not None
            with threads(self.lanes.each(len(self.open))):  # the others are at work
                if self.ask(False):
                    continue
            lane = self._joined()
            lane.take(self.block, lane.slots, lane.owner)
            self.open = [lane]

    def _serve(self, lane: _Lane) -> None:
        """Give free slots of a block to waiting rows, or close them."""
        self.fill(lane)
        self._narrow(lane)

    def fill(self, lane: _Lane) -> None:
        """Give free slots to waiting rows; another batch is taken in only if it is ready.

        Without refilling, slots are given only when all are free, and to rows of one batch.
        """
        if lane.owner and not self.refill:
            return
        slots = lane.slots
        free = [s for s in range(slots.block) if s not in lane.owner]
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
            lane.owner.update({slot: (entry, row) for slot, row in zip(taken, rows, strict=True)})

    def _draw(self, entry: _Entry, slots: Slots) -> None:
        """Where the next block of waiting rows begin: slots become free by ones and twos, for which drawing takes as long."""
        batch = entry.batch
        rows = torch.tensor(list(islice(entry.waiting, self.block)), device=batch.ids.device)
        entry.begun = slots.started(batch.ids[rows], batch.clean[rows], torch.zeros_like(rows))

    def _narrow(self, lane: _Lane) -> None:
        """Once no row is waiting or can come, let those at work move together into the narrowest block that fits."""
        slots, count = lane.slots, len(lane.owner)
        if self.widths is None or not count or not self.ended or any(e.waiting for e in self.entries):
            return
        room = slots.room(count)
        lane.padded += (slots.block - room) / self.block
        if lane.padded < PATIENCE:
            return
        lane.padded, width = 0.0, self.widths(room, slots.clean)
        if width < slots.block:
            lane.take(width, slots, lane.owner)

    def collect(self, lane: _Lane, done: Tensor) -> None:
        """Copy the results of finished slots to their rows."""
        places: dict[int, tuple[_Entry, list[int], list[int]]] = {}
        for slot in done.tolist():
            entry, row = lane.owner.pop(slot)
            _, rows, taken = places.setdefault(id(entry), (entry, [], []))
            rows.append(row)
            taken.append(slot)
        for entry, rows, taken in places.values():
            to, source = (torch.tensor(x, device=done.device) for x in (rows, taken))
            for name in PER_SLOT:
                getattr(entry.outcome, name).index_copy_(0, to, getattr(lane.slots.best, name)[source])
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
