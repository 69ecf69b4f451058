"""Lanes: blocks that are computed side by side on a CPU, each on threads of its own.

All threads together take a block of small images in many short steps and wait for each other after each of them. Where
other programs want the same processors, as in a pipe, these waits are long.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

from rbkit.tools.models import Evaluation
from rbkit.tools.sameness import probe

MOST = 8  # more would wait for the interpreter, which one thread has at a time, and take more memory
SMALL = 3 * 64 * 64  # values of an image: larger ones keep all threads busy, and a block of them takes gigabytes
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

    def __init__(self, evaluation: Evaluation, *, most: int) -> None:
        self.evaluation, self.threads = evaluation, torch.get_num_threads()
        self.count = min(most, MOST, self.threads)
        self.each = self.threads // self.count
        self.pool = ThreadPoolExecutor(self.count, initializer=torch.set_num_threads, initargs=(self.each,))
        self.same: bool | None = None

    def start(self, task: Callable[[], T]) -> Future[T]:
        """Carry out a task in a lane, once one is free."""
        return self.pool.submit(task)

    def fit(self, images: Tensor) -> bool:
        """Whether there are several, for images (B, C, H, W) of this size."""
        return self.count > 1 and self.same is not False and not images.is_cuda and images[0].numel() <= SMALL

    def agree(self, images: Tensor) -> bool:
        """Whether images (B, C, H, W) of a block have the same numbers in a lane as by all threads, to the last bit. Tried
        once: it takes as long as some count + 1 evaluations."""
        if self.same is None:
            labels = torch.zeros(len(images), dtype=torch.int64, device=images.device)
            with threads(self.threads):
                whole = probe(self.evaluation, images, labels)
            with threads(self.each):
                part = probe(self.evaluation, images, labels)
            self.same = all(torch.equal(w, p) for w, p in zip(whole, part, strict=True))
        return self.same
