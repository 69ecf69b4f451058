"""Lanes: blocks that are computed side by side on a CPU, each on threads of its own.

All threads together take a block of small images in many short steps and wait for each other after each of them. Where
other programs want the same processors, as in a pipe, these waits are long.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

MOST = 8  # each takes memory, and one thread serves them all
SMALL = 3 * 64 * 64  # values of an image: a block of 32 x 32 takes resnet18 0.45 GiB, and memory grows with the area
ENOUGH = 4  # blocks for each lane: fewer are not worth the trial
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


def shared(threads: int, most: int) -> int:
    """How many lanes, `most` or fewer: the most of those numbers that leave the fewest threads without work."""
    return max(range(1, min(most, threads) + 1), key=lambda count: (count * (threads // count), count))


class Lanes:
    """Up to `most` lanes, which share the threads that torch has now; `count` of them where there is work for all.

    The network's code is run by several threads at once and must bear it: it may not keep anything of a pass in itself.
    """

    def __init__(self, most: int = MOST) -> None:
        self.most, self.threads = most, torch.get_num_threads()
        self.count = shared(self.threads, min(most, MOST))
        self.pool = ThreadPoolExecutor(self.count)
        self.tried: dict[tuple[str, int], bool] = {}

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

    def alike(self, count: int, look: Callable[..., Found], *given: Any) -> bool:
        """Whether `look` gives the same numbers in one of `count` lanes as by all threads, to the last bit: tried once.

        It takes as long as some count + 1 calls.
        """
        trial = look.__qualname__, count
        if trial not in self.tried:
            with threads(self.threads):
                whole = look(*given)
            self.tried[trial] = _same(whole, self.start(count, look, *given).result())
        return self.tried[trial]

    def map(self, look: Callable[..., Found], items: Sequence[Sequence[Any]]) -> Iterator[Found]:
        """`look` at each of `items`, its arguments, in order, side by side where that makes no difference."""
        count = self.to_open(len(items) // ENOUGH)
        if count == 1 or not self.alike(count, look, *items[0]):
            yield from (look(*item) for item in items)
            return
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
