"""Other libraries in a process of their own, which has the allocator of their users.

rbkit has the C library keep the memory that a block frees (`cli._compute.keep_freed_memory`). Peers in the same process
would share that, which their users do not have: alone in a process, torchattacks' PGD took two thirds of its time with it.
"""

from __future__ import annotations

import multiprocessing
import pickle
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch


class Peers:
    """The process: to be begun before this one keeps memory or starts threads, neither of which may be inherited."""

    def __init__(self, *, threads: int) -> None:
        context = multiprocessing.get_context("fork")
        self.line, end = context.Pipe()
        # No daemon, which could have no children, and the paper's trainer loads its data by some.
        self.process = context.Process(target=_serve, args=(end, self.line, threads))
        self.process.start()
        end.close()

    def __enter__(self) -> Peers:
        return self

    def __exit__(self, *_: object) -> None:
        self.line.close()
        self.process.join()

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What a function of a module gives there. Raises: what it raises."""
        self.line.send_bytes(pickle.dumps((function, arguments)))
        fine, found = pickle.loads(self.line.recv_bytes())
        if not fine:
            raise found
        return found


def _serve(line: Connection, other: Connection, threads: int) -> None:
    """Answer calls until the other end is closed."""
    other.close()
    torch.set_num_threads(threads)
    while True:
        try:
            function, arguments = pickle.loads(line.recv_bytes())
        except EOFError:
            return
        try:
            answer = True, function(*arguments)
        except Exception as error:
            answer = False, RuntimeError(f"{type(error).__name__}: {error}")
        line.send_bytes(pickle.dumps(answer))
