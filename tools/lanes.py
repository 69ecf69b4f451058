"""Lanes: blocks that are computed side by side on a CPU, each on threads of its own.

All threads together take a block of small images in many short steps and wait for each other after each of them. Where
other programs want the same processors, as in a pipe, these waits are long.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

MOST = 8  # each takes memory, and one thread serves them all
ROOM = 1 << 30  # bytes that all passes keep for gradients; with resnet18 a process grows by 1.6 to 3 times as much
SMALL = 3 * 64 * 64  # values of an image: what passes without gradients take is not told, and grows with the area
ENOUGH = 4  # blocks for each lane: fewer are not worth the trial
FADING = 0.99  # what is left of the time of the slower way with each turn of the faster one, so that it is tried again
T = TypeVar("T")
Found = TypeVar("Found", Tensor, tuple[Tensor, ...])


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Compute on so many threads in here; None leaves them as they are."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def kept_bytes() -> Iterator[dict[int, int]]:
    """Sizes, by address, of what passes in here keep in memory for their gradients, beside weights, which they share."""
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        if not tensor.is_leaf:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        yield kept


def shared(threads: int, most: int) -> int:
    """How many lanes, `most` or fewer: the most of those numbers that leave the fewest threads without work."""
    return max(range(1, min(most, threads) + 1), key=lambda count: (count * (threads // count), count))


class Pace:
    """Which way blocks are faster, side by side or one at a time by all threads: seconds of a block either way, as last seen.

    It depends on the network, the processor, and what else runs there.
    """

    def __init__(self) -> None:
        self.seconds: dict[bool, float] = {}  # by whether they are side by side
        self.last = True

    def plan(self, left: int, *, stretch: int) -> tuple[bool, int]:
        """Whether the next of the blocks that are left go side by side, and how many of them: a stretch where that is a trial."""
        if len(self.seconds) < 2:
            return not self.seconds, stretch if left >= 2 * stretch else left
        faster = min(self.seconds, key=self.seconds.__getitem__)
        return faster, left if faster == self.last else min(stretch, left)

    def note(self, abreast: bool, seconds: float) -> None:
        """What a block took."""
        self.seconds[abreast], self.last = seconds, abreast
        if (other := not abreast) in self.seconds:
            self.seconds[other] *= FADING


class Lanes:
    """Up to `most` lanes, which share the threads that torch has now; `count` of them where there is work for all.

    The network's code is run by several threads at once and must bear it: it may not keep anything of a pass in itself.
    """

    def __init__(self, most: int = MOST) -> None:
        self.most, self.threads = most, torch.get_num_threads()
        self.count = shared(self.threads, min(most, MOST))
        self.pool = ThreadPoolExecutor(self.count)
        self.tried: dict[tuple[str, int], int] = {}
        self.paces: dict[tuple[str, int], Pace] = {}

    def __reduce__(self) -> tuple[type[Lanes], tuple[int]]:
        """In another process, lanes of its own."""
        return Lanes, (self.most,)

    def __deepcopy__(self, memo: dict[int, Any]) -> Lanes:
        """The same lanes: a copy of a model shares the threads with it."""
        return self

    def to_open(self, blocks: int) -> int:
        """How many lanes so many blocks can keep at work."""
        return shared(self.threads, max(min(blocks, self.count), 1))

    def each(self, count: int) -> int:
        """Threads of a lane where `count` of them are open."""
        return self.threads // count

    def start(self, count: int, task: Callable[..., T], *given: Any) -> Future[T]:
        """Carry out a task in one of `count` lanes, once it is free; gradients are on or off in it as they are here."""

        def carried_out(enabled: bool) -> T:
            with torch.set_grad_enabled(enabled), threads(self.each(count)):
                return task(*given)

        return self.pool.submit(carried_out, torch.is_grad_enabled())

    def fit(self, images: Tensor) -> bool:
        """Whether there are several, for images (B, C, H, W) of this size."""
        return self.count > 1 and not images.is_cuda and images[0].numel() <= SMALL

    def opened(self, count: int, look: Callable[..., Found], *given: Any) -> int:
        """How many of `count` lanes may be open for `look`: no more than there is room for, and one if the numbers in a lane
        are not those by all threads, to the last bit.

        Tried once, which takes as long as some count + 1 calls.
        """
        trial = look.__qualname__, count
        if trial not in self.tried:
            with threads(self.threads), kept_bytes() as kept:
                whole = look(*given)
            fitting = self.to_open(min(count, ROOM // max(sum(kept.values()), 1)))
            alike = fitting > 1 and _same(whole, self.start(fitting, look, *given).result())
            self.tried[trial] = fitting if alike else 1
        return self.tried[trial]

    def map(self, look: Callable[..., Found], items: Sequence[Sequence[Any]]) -> Iterator[Found]:
        """`look` at each of `items`, its arguments, in order, side by side where that makes no difference but in time."""
        count = self.to_open(len(items) // ENOUGH)
        if count == 1 or (count := self.opened(count, look, *items[0])) == 1:
            yield from (look(*item) for item in items)
            return
        pace, done = self.paces.setdefault((look.__qualname__, count), Pace()), 0
        while done < len(items):
            abreast, number = pace.plan(len(items) - done, stretch=ENOUGH * count)
            part, begin = items[done : done + number], time.perf_counter()
            yield from self._abreast(count, look, part) if abreast else (look(*item) for item in part)
            pace.note(abreast, (time.perf_counter() - begin) / number)
            done += number

    def _abreast(self, count: int, look: Callable[..., Found], items: Sequence[Sequence[Any]]) -> Iterator[Found]:
        """`look` at each of `items` in `count` lanes."""
        turns: deque[Future[Found]] = deque()
        with threads(self.each(count)):
            for item in items:
                turns.append(self.start(count, look, *item))
                if len(turns) > count:  # one waits, so that no lane does
                    yield turns.popleft().result()
            while turns:
                yield turns.popleft().result()


def _same(one: Found, other: Found) -> bool:
    """Whether two tensors, or two tuples of them, are equal to the last bit."""
    pairs = zip(*((found,) if isinstance(found, Tensor) else found for found in (one, other)), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def computed(look: Callable[..., Found], items: Sequence[Sequence[Any]], *, lanes: Lanes | None) -> Iterator[Found]:
    """`look` at each of `items`, its arguments, in order; in lanes where there are any."""
    return (look(*item) for item in items) if lanes is None else lanes.map(look, items)
