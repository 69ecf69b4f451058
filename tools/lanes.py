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


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Compute on so many threads in here; None leaves them as they are."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Lanes:
    """Up to `most` lanes, which share the threads that torch has now: `count` lanes of `each` threads.

    The network's code is run by several threads at once and must bear it: it may not keep anything of a pass in itself.
    """

    def __init__(self, most: int = MOST) -> None:
        self.most, self.threads = most, torch.get_num_threads()
        self.count = min(most, MOST, self.threads)
        self.each = self.threads // self.count
        self.pool = ThreadPoolExecutor(self.count, initializer=torch.set_num_threads, initargs=(self.each,))
        self.tried: dict[str, bool] = {}

    def __reduce__(self) -> tuple[type[Lanes], tuple[int]]:
        """In another process, lanes of its own."""
        return Lanes, (self.most,)

    def __deepcopy__(self, memo: dict[int, Any]) -> Lanes:
        """The same lanes: a copy of a model shares the threads with it."""
        return self

    def start(self, task: Callable[..., T], *given: Any) -> Future[T]:
        """Carry out a task in a lane, once one is free; gradients are on or off in it as they are here."""

        def carried_out(enabled: bool) -> T:
            with torch.set_grad_enabled(enabled):
                return task(*given)

        return self.pool.submit(carried_out, torch.is_grad_enabled())

    def fit(self, images: Tensor) -> bool:
        """Whether there are several, for images (B, C, H, W) of this size."""
        return self.count > 1 and not images.is_cuda and images[0].numel() <= SMALL

    def alike(self, look: Callable[..., Tensor], *given: Any) -> bool:
        """Whether `look` gives the same numbers in a lane as by all threads, to the last bit: tried once for each function.

        It takes as long as some count + 1 calls.
        """
        name = look.__qualname__
        if name not in self.tried:
            with threads(self.threads):
                whole = look(*given)
            self.tried[name] = torch.equal(whole, self.start(look, *given).result())
        return self.tried[name]

    def map(self, look: Callable[..., Tensor], items: Sequence[Sequence[Any]]) -> Iterator[Tensor]:
        """`look` at each of `items`, its arguments, in order, side by side where that makes no difference."""
        if len(items) < ENOUGH * self.count or not self.alike(look, *items[0]):
            yield from (look(*item) for item in items)
            return
        turns: deque[Future[Tensor]] = deque()
        with threads(self.each):
            for item in items:
                turns.append(self.start(look, *item))
                if len(turns) > self.count:  # one waits, so that no lane does
                    yield turns.popleft().result()
            while turns:
                yield turns.popleft().result()


def computed(look: Callable[..., Tensor], items: Sequence[Sequence[Any]], *, lanes: Lanes | None) -> Iterator[Tensor]:
    """`look` at each of `items`, its arguments, in order; in lanes where there are any."""
    return (look(*item) for item in items) if lanes is None else lanes.map(look, items)
