"""The processes of one run of rb-train, as torchrun or another launcher tells them by environment variables.

All have the same command line. The first one reads, writes and speaks; the others get from it what they need.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer

from rbkit.cli._compute import available_threads
from rbkit.cli._errors import Failure, Lost, Stopped, Usage

if TYPE_CHECKING:
    import torch

    from rbkit.tools.ranks import Ranks


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    if text and not text.isdecimal():
        raise Usage(
            f"the environment variable {name} is {text!r}, expected a number; a launcher such as torchrun sets it"
        )
    return int(text) if text else default


def count() -> int:
    """How many processes train together."""
    return _number("WORLD_SIZE", 1)


def index() -> int:
    """Which of them this one is, from 0."""
    return _number("RANK", 0) if count() > 1 else 0


def check_launch() -> None:
    """Raises: Usage where several processes do not know where they meet."""
    if count() > 1 and not {"MASTER_ADDR", "MASTER_PORT"} <= set(os.environ):
        raise Usage(f"WORLD_SIZE is {count()}, but MASTER_ADDR and MASTER_PORT do not tell where the processes meet")


def threads() -> int:
    """This process's share of the CPUs of its machine."""
    return max(1, available_threads() // (_number("LOCAL_WORLD_SIZE", 1) if count() > 1 else 1))


def own_device(place: torch.device) -> torch.device:
    """Of several GPUs the one of this process. Raises: Usage where there are fewer than processes."""
    import torch

    if place.type != "cuda" or count() == 1:
        return place
    local, gpus = _number("LOCAL_RANK", index()), torch.cuda.device_count()
    if local >= gpus:
        raise Usage(f"process {local} of this machine has no GPU of its own, there are {gpus}; try --device cpu")
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


@contextmanager
def told_once(*kinds: type[Failure]) -> Iterator[None]:
    """Failures that all processes share are told by the first; the others end silently, with the same status."""
    try:
        yield
    except kinds as failure:
        if index():
            raise typer.Exit(failure.status) from None
        raise


@contextmanager
def joined() -> Iterator[Ranks]:
    """This process among the others. Raises: Lost when one of them is gone, Exit when one failed, which told why itself."""
    from rbkit.tools import ranks

    try:
        with ranks.joined(index(), count()) as found, _telling(found):
            yield found
    except ranks.LostRank as error:
        raise Lost("another process of this run is gone; run the same command with --resume") from error
    except ranks.FailedRank as error:
        raise typer.Exit(error.status) from error


@contextmanager
def _telling(ranks: Ranks) -> Iterator[None]:
    """Tell the others of an error that ends this process; a stop, a loss and a failure of others they know of themselves."""
    from rbkit.tools.ranks import FailedRank, LostRank

    try:
        yield
    except (Stopped, LostRank, FailedRank):
        raise
    except Exception as error:
        if ranks.count > 1:
            ranks.fail(getattr(error, "status", 1))
        raise
