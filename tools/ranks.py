"""The processes that train one model together, and what they tell each other.

Explicit collectives of torch.distributed, always joined in the order of the ranks, so that a result is a function of what was
computed and not of how many processes shared the work. Gradients of GPUs go by NCCL; all else goes by gloo, on the CPU.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

PATIENCE = timedelta(minutes=10)  # how long a process waits for another: more than reading data or a checkpoint takes


class LostRank(RuntimeError):
    """Raised where another process of the run has ended, or is silent for longer than the patience."""


class FailedRank(RuntimeError):
    """Raised where another process could not go on, and said so: `status` is what it ends with."""

    def __init__(self, status: int) -> None:
        super().__init__(f"another process failed with status {status}")
        self.status = status


@dataclass(frozen=True)
class Ranks:
    """One process of `count`, and which: the first, of index 0, is the one that reads, writes and speaks.

    Before each exchange all agree that none has failed, so that nobody waits for what will not come, nor takes a process
    that met an error for one that was killed.
    """

    index: int = 0
    count: int = 1

    def gather(self, tensors: Sequence[Tensor]) -> list[Sequence[Tensor]]:
        """The tensors of every process in the order of ranks; shapes, dtypes and layouts are those of `tensors`."""
        if self.count == 1:
            return [tensors]
        flat = torch.cat([t.reshape(-1) for t in tensors])
        parts = [torch.empty_like(flat) for _ in range(self.count)]
        self._agree()
        with _company():
            dist.all_gather(parts, flat)
        return [_split(part, tensors) for part in parts]

    def sums(self, numbers: Sequence[int]) -> list[int]:
        """The sums of integers over all processes."""
        return self._reduce(numbers, "SUM")

    def largest(self, number: int) -> int:
        """The largest of an integer over all processes."""
        return self._reduce([number], "MAX")[0]

    def _reduce(self, numbers: Sequence[int], operation: str) -> list[int]:
        if self.count == 1:
            return list(numbers)
        self._agree()
        return _reduced(numbers, operation)

    def fail(self, status: int) -> None:
        """Tell the others, at their next exchange, that this process ends with `status`, not 0, and so must they."""
        with suppress(LostRank):  # who has ended need not be told
            _reduced([status], "MAX")

    def _agree(self) -> None:
        (status,) = _reduced([0], "MAX")
        if status:
            raise FailedRank(status)

    def share(self, tensors: Mapping[str, Tensor], value: Any) -> tuple[dict[str, Tensor], Any]:
        """The named tensors, on the CPU, and the JSON value of the first process, whatever the others gave."""
        if self.count == 1:
            return dict(tensors), value
        layout = [[name, str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in tensors.items()]
        text = torch.frombuffer(bytearray(json.dumps([layout, value]).encode()), dtype=torch.uint8)
        length = self._first(torch.tensor([len(text)]))
        text = self._first(text if self.index == 0 else torch.empty(int(length), dtype=torch.uint8))
        layout, value = json.loads(text.numpy().tobytes())
        empty = {name: torch.empty(shape, dtype=getattr(torch, dtype)) for name, dtype, shape in layout}
        return {name: self._first(tensors[name] if self.index == 0 else t) for name, t in empty.items()}, value

    def _first(self, tensor: Tensor) -> Tensor:
        """The tensor of the first process, in one of the same shape."""
        received = tensor.detach().cpu().contiguous()
        self._agree()
        with _company():
            dist.broadcast(received, src=0)
        return received


ALONE = Ranks()


@contextmanager
def joined(index: int, count: int, *, patience: timedelta = PATIENCE) -> Iterator[Ranks]:
    """This process as one of `count`, which meet at MASTER_ADDR and MASTER_PORT. Raises: LostRank if they do not."""
    if count == 1:
        yield ALONE
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    with _company():
        dist.init_process_group(backend, rank=index, world_size=count, timeout=patience)
    yield Ranks(index, count)
    dist.destroy_process_group()  # not after an error: it would wait for those who are gone


def _reduced(numbers: Sequence[int], operation: str) -> list[int]:
    found = torch.tensor(numbers, dtype=torch.int64)
    with _company():
        dist.all_reduce(found, getattr(dist.ReduceOp, operation))
    return found.tolist()


@contextmanager
def _company() -> Iterator[None]:
    """Tell a process that is gone from other errors: the collectives raise plain RuntimeErrors."""
    try:
        yield
    except RuntimeError as error:
        raise LostRank(str(error)) from error


def _split(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The pieces of a flat tensor in the shapes and, so that sums agree bit by bit, the layouts of `like`."""
    pieces = flat.split([t.numel() for t in like])
    return [torch.empty_like(t).copy_(piece.view(t.shape)) for t, piece in zip(like, pieces, strict=True)]
