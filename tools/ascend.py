"""The one ascent loop: step, project, keep the best iterate of each example, evaluate the last.

Attacks, inversions, class images and the inner problem of adversarial training are this loop with other objectives.
Examples live in the slots of a block of fixed size; a finished example leaves its slot to the next one, so that a
full block is computed as long as there is work. A row's numbers depend neither on its slot nor on its neighbours.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from rbkit.tools.norms import Norm

Context = Mapping[str, Tensor]
Start = Callable[[Tensor, Tensor, Tensor], Tensor]
T = TypeVar("T")


class Objective(Protocol):
    """What is maximised: (value (B,), reached bool (B,)) at images (B, C, H, W) in `context` (one row per slot)."""

    def __call__(self, images: Tensor, context: Context) -> tuple[Tensor, Tensor]: ...


class Ascent(Protocol):
    """A way to climb: it gives the block of slots in which that happens."""

    def slots(self, objective: Objective, like: Batch, *, block: int) -> Slots: ...


@dataclass(frozen=True)
class Plan:
    """How to climb with steps of a fixed length.

    norm, eps, step_size: the ball and the length of a step, in [0, 1] pixel units. steps: gradients per restart.
    start(ids, clean, restart): first iterate, None for the clean image. stop: leave as soon as the goal is reached.
    keep: `best` iterate of each row (reached before value), the `last`, or `batch`: that of the highest mean value over
    the block, as the paper's code does; its slots must be at the same step. box: clip to [0, 1].
    """

    norm: Norm
    eps: float
    step_size: float
    steps: int
    restarts: int = 1
    start: Start | None = None
    stop: bool = False
    keep: str = "best"
    box: bool = True

    def slots(self, objective: Objective, like: Batch, *, block: int) -> Slots:
        """A block of slots that climb so, for rows such as those of `like`."""
        return Climb(objective, self, like, block=block)


def counted(steps: int, last_iterate: str | None) -> int:
    """Steps that count: an iterate after the last step that is left `unjudged` is a step not taken."""
    return steps - (last_iterate == "unjudged")


@dataclass
class Batch:
    """Rows to climb from: ids int64 (N,), clean (N, C, H, W), context per row; rows in `skip` are returned as they are."""

    ids: Tensor
    clean: Tensor
    context: dict[str, Tensor]
    skip: Tensor | None = None
    tag: Any = None

    def __len__(self) -> int:
        return len(self.ids)


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


PATIENCE = 8  # evaluations of a full block that it costs to tell in which narrower ones a row's numbers are the same
PER_SLOT = ("images", "value", "reached", "forwards", "backwards", "zero_gradients")


def climb(images: Tensor, gradient: Tensor, clean: Tensor, plan: Plan) -> Tensor:
    """One step of steepest ascent from `images`, projected onto the ball around `clean` and into the box."""
    return projected(images, plan.step_size * plan.norm.step(gradient), clean, plan)


def projected(images: Tensor, move: Tensor, clean: Tensor, plan: Plan) -> Tensor:
    """`images` moved by `move`, back on the ball around `clean` and in the box."""
    delta = images + move - clean
    moved = clean + plan.norm.project(delta, plan.eps)
    return moved.clamp_(0, 1) if plan.box else moved


class Slots(ABC):
    """A block of `block` slots, each at work for one example: who sits where, and what was found so far.

    Kinds of ascent differ in `begin` and `advance`. Whatever they remember is a tensor with a row per slot, because
    slots are at different steps; a row's numbers must depend neither on its slot nor on its neighbours.
    STATE names these tensors. Shapes: ids, step, restart, active (B,); clean, now (B, C, H, W); context (B, ...) each.
    """

    STATE: tuple[str, ...] = ("ids", "clean", "now", "step", "restart", "active")

    def __init__(self, objective: Objective, like: Batch, *, block: int) -> None:
        device = like.clean.device
        self.objective, self.block = objective, block
        # Idle slots hold a real row, so that padding is ordinary arithmetic.
        self.ids = like.ids[:1].repeat(block)
        self.clean = like.clean[:1].repeat(block, 1, 1, 1)
        self.now = self.clean.clone()
        self.context = {k: v[:1].repeat(block, *[1] * (v.dim() - 1)) for k, v in like.context.items()}
        self.best = Outcome.of(Batch(self.ids, self.clean, {}))
        self.step = torch.zeros(block, dtype=torch.int64, device=device)
        self.restart = torch.zeros(block, dtype=torch.int64, device=device)
        self.active = torch.zeros(block, dtype=torch.bool, device=device)

    @abstractmethod
    def begin(self, slots: Tensor) -> None:
        """Set up the restart that `slots` (int64 indices) are at; their step is 0."""

    @abstractmethod
    def advance(self) -> Tensor:
        """One evaluation of every slot, and what follows from it; returns the slots that are done (int64 indices)."""

    def load(self, slots: Tensor, batch: Batch, rows: Tensor) -> None:
        """Put `rows` of `batch` into `slots`."""
        self.ids[slots], self.clean[slots] = batch.ids[rows], batch.clean[rows]
        for key, values in batch.context.items():
            self.context[key][slots] = values[rows]
        fresh = Outcome.of(Batch(self.ids[slots], self.clean[slots], {}))
        for name in PER_SLOT:
            getattr(self.best, name)[slots] = getattr(fresh, name)
        self.step[slots], self.restart[slots], self.active[slots] = 0, 0, True
        self._aim(slots)
        self.begin(slots)

    def take(self, slots: Tensor) -> None:
        """Go on with these slots (int64 indices) alone, in this order: a narrower block."""
        for name in self.STATE:
            setattr(self, name, getattr(self, name)[slots])
        for name in PER_SLOT:
            setattr(self.best, name, getattr(self.best, name)[slots])
        self.context = {key: values[slots] for key, values in self.context.items()}
        self.block = len(slots)

    @property
    def rounds(self) -> int:
        """Targets that each restart aims at in turn: the columns of `targets` in the context, else 1."""
        return self.context["targets"].shape[1] if "targets" in self.context else 1

    def _aim(self, slots: Tensor) -> None:
        """Let `target` of the context be the one that the restart of `slots` is for."""
        if "targets" in self.context:
            self.context["target"][slots] = self.context["targets"][slots, self.restart[slots] % self.rounds]

    def started(self, slots: Tensor, start: Start | None) -> Tensor:
        """First iterates of `slots` in the restart that they are at."""
        clean = self.clean[slots]
        return clean if start is None else start(self.ids[slots], clean, self.restart[slots])

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
            self.best.zero_gradients += climbing & (gradient.flatten(1).abs().amax(1) == 0)
        return value.detach(), reached, gradient

    def keep(self, better: Tensor, images: Tensor, value: Tensor, reached: Tensor) -> None:
        """Take these images with their values into the outcome of the slots that are `better`, bool (B,)."""
        best = self.best
        best.value = torch.where(better, value, best.value)
        best.reached = torch.where(better, reached, best.reached)
        best.images = torch.where(better[:, None, None, None], images, best.images)

    def improved(self, value: Tensor, reached: Tensor) -> Tensor:
        """Active slots whose outcome is worse than this: reaching the goal comes before a higher value."""
        higher = (value > self.best.value) & (reached == self.best.reached)
        return self.active & ((reached & ~self.best.reached) | higher)

    def begin_again(self, again: Tensor) -> None:
        """Start the next restart of the slots in `again`, bool (B,)."""
        if bool(again.any()):
            slots = again.nonzero()[:, 0]
            self.step[slots] = 0
            self.restart[slots] += 1
            self._aim(slots)
            self.begin(slots)

    def leave(self, done: Tensor) -> Tensor:
        """Free the slots in `done`, bool (B,); returns their indices."""
        self.active = self.active & ~done
        return done.nonzero()[:, 0]


class Climb(Slots):
    """Steps of a fixed length (see Plan)."""

    def __init__(self, objective: Objective, plan: Plan, like: Batch, *, block: int) -> None:
        super().__init__(objective, like, block=block)
        self.plan = plan

    def begin(self, slots: Tensor) -> None:
        """The start of the plan."""
        self.now[slots] = self.started(slots, self.plan.start)

    def advance(self) -> Tensor:
        """Evaluate every slot, keep what is better, step."""
        plan = self.plan
        climbing = self.active & (self.step < plan.steps)
        value, reached, gradient = self.evaluate(climbing)
        self.keep(self._better(value, reached), self.now, value, reached)
        ended = self.active & (self.step >= plan.steps)
        done = ended & (self.restart + 1 >= plan.restarts)
        if plan.stop:
            done = done | (self.active & reached)
        if gradient is not None:
            self._move(climbing & ~done, gradient)
        self.begin_again(ended & ~done)
        return self.leave(done)

    def _better(self, value: Tensor, reached: Tensor) -> Tensor:
        """Slots whose iterate is to be kept, bool (B,)."""
        if self.plan.keep == "last":
            return self.active
        if self.plan.keep == "batch":
            return self.active & (value[self.active].mean() > self.best.value[self.active].mean())
        return self.improved(value, reached)

    def _move(self, moving: Tensor, gradient: Tensor) -> None:
        self.now = torch.where(moving[:, None, None, None], self.moved(gradient), self.now)
        self.step = self.step + moving

    def moved(self, gradient: Tensor) -> Tensor:
        """Where a step from `now` leads, for every slot."""
        return climb(self.now, gradient, self.clean, self.plan)


@dataclass
class _Entry:
    """A batch on its way: which rows still wait for a slot and how many are not done."""

    batch: Batch
    outcome: Outcome
    waiting: deque[int] = field(default_factory=deque)
    left: int = 0


Poll = Callable[[bool], Batch | None]


def polling(batches: Iterable[Batch]) -> Poll:
    """A source that is always ready: `poll(wait)` gives the next batch, or raises StopIteration."""
    iterator = iter(batches)
    return lambda wait: next(iterator)


class Flow:
    """Rows from batches to slots and back, in order: `poll` is a source of finished batches.

    widths(images) tells narrower blocks in which such rows have the same numbers, to the last bit. The last rows of the
    input go on in these, since a full block for a few of them would be mostly padding. As it costs PATIENCE evaluations
    to tell, it is asked when so many were mostly padding: a short attack never pays for it.
    """

    def __init__(
        self,
        objective: Objective,
        plan: Ascent,
        poll: Poll,
        *,
        block: int,
        refill: bool = True,
        widths: Callable[[Tensor], tuple[int, ...]] | None = None,
    ) -> None:
        self.widths = widths if refill else None
        self.padded = 0
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
        self.entries.append(_Entry(batch, Outcome.of(batch), waiting, len(waiting)))
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
            count = min(len(free), len(entry.waiting))
            taken, free = free[:count], free[count:]
            rows = [entry.waiting.popleft() for _ in taken]
            device = slots.ids.device
            slots.load(torch.tensor(taken, device=device), entry.batch, torch.tensor(rows, device=device))
            self.owner.update({slot: (entry, row) for slot, row in zip(taken, rows, strict=True)})

    def _narrow(self, slots: Slots) -> None:
        """Once no row is waiting or can come, let those at work move together into the narrowest block that fits."""
        count = len(self.owner)
        if self.widths is None or not self.ended or 2 * count > slots.block or any(e.waiting for e in self.entries):
            return
        self.padded += 1
        if self.padded <= PATIENCE:
            return
        width = min((w for w in self.widths(slots.clean) if count <= w < slots.block), default=None)
        if width is not None:
            idle = [s for s in range(slots.block) if s not in self.owner]
            kept = (sorted(self.owner) + idle)[:width]
            slots.take(torch.tensor(kept, device=slots.ids.device))
            self.owner = {new: self.owner[old] for new, old in enumerate(kept) if old in self.owner}

    def collect(self, slots: Slots, done: Tensor) -> None:
        """Copy the results of finished slots to their rows."""
        for slot in done.tolist():
            entry, row = self.owner.pop(slot)
            for name in PER_SLOT:
                getattr(entry.outcome, name)[row] = getattr(slots.best, name)[slot]
            entry.left -= 1


def flow(
    objective: Objective, plan: Ascent, poll: Poll, *, block: int, refill: bool = True
) -> Iterator[tuple[Batch, Outcome]]:
    """Climb from every row of the batches of `poll`; batches leave in the order in which they came.

    Slots are refilled across batches that are ready (`poll(False)`); nothing waits for input while rows can climb.
    Without `refill` a block takes rows of one batch and keeps them until all are done.
    """
    yield from finished(Flow(objective, plan, poll, block=block, refill=refill).poll)


def finished(poll: Callable[[bool], T | None]) -> Iterator[T]:
    """All that a source gives, waiting for each."""
    while True:
        try:
            found = poll(True)
        except StopIteration:
            return
        if found is not None:
            yield found


def ascend(objective: Objective, plan: Plan, batch: Batch, *, block: int) -> Outcome:
    """Climb from every row of one batch."""
    return next(flow(objective, plan, polling([batch]), block=block))[1]


def drive(objective: Objective, plan: Plan, batch: Batch) -> Tensor:
    """The iterate after the last step, unjudged, for all rows at once: the inner problem of adversarial training.

    Where the plan keeps `batch`, the iterate of the highest mean value over the rows instead.
    """
    zero = torch.zeros(len(batch), dtype=torch.int64, device=batch.clean.device)
    now = batch.clean if plan.start is None else plan.start(batch.ids, batch.clean, zero)
    best, highest = now, torch.full((), float("-inf"), device=now.device)
    for _ in range(plan.steps):
        images = now.detach().requires_grad_()
        value, _ = objective(images, batch.context)
        if plan.keep == "batch":
            best, highest = _higher(images, value, best, highest)
        now = climb(images.detach(), torch.autograd.grad(value.sum(), images)[0], batch.clean, plan)
    if plan.keep != "batch":
        return now
    with torch.no_grad():
        return _higher(now, objective(now, batch.context)[0], best, highest)[0]


def _higher(images: Tensor, value: Tensor, best: Tensor, highest: Tensor) -> tuple[Tensor, Tensor]:
    """(images, their mean value) where it is above `highest`, else (best, highest); nothing waits for the device."""
    mean = value.detach().mean()
    return torch.where(mean > highest, images.detach(), best), torch.maximum(mean, highest)
