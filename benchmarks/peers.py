"""Other libraries, each contender in a process of its own, as in a script of its user.

rbkit has the C library keep the memory that a block frees (`cli._compute.keep_freed_memory`). Peers in the same process
would share that, which their users do not have: alone in a process, torchattacks' PGD took two thirds of its time with it.
Nor do they share a process with each other: larger pieces of memory that one frees have the library keep more for the next.
"""

from __future__ import annotations

import multiprocessing
import pickle
import tempfile
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch


class Peers:
    """Where processes come from: each is a copy of one that has imported torch and done nothing else."""

    def __init__(self, *, threads: int) -> None:
        self.threads = threads
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["torch"])

    def begin(self) -> Peer:
        """A new process."""
        line, end = self.context.Pipe()
        # No daemon, which could have no children: the paper's trainer loads its data by some.
        process = self.context.Process(target=_serve, args=(end, self.threads))
        process.start()
        end.close()
        return Peer(line, process)


class Peer:
    """A process that calls functions for us, one at a time, until it is left."""

    def __init__(self, line: Connection, process: multiprocessing.process.BaseProcess) -> None:
        self.line, self.process = line, process

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self.line.close()
        self.process.join()

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What a function of a module gives there. Raises: what it raises.

        Tensors come to it from a file, as they would to a script: a message that is freed would have memory kept.
        """
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "call"
            torch.save((function, arguments), path)
            self.line.send(path)
            fine, found = self.line.recv()
        if not fine:
            raise found
        return found


def _serve(line: Connection, threads: int) -> None:
    """Answer calls until the other end is closed."""
    torch.set_num_threads(threads)
    multiprocessing.set_start_method("fork", force=True)  # of its own children, as in a script
    while True:
        try:
            path = line.recv()
        except EOFError:
            return
        try:
            function, arguments = torch.load(path, mmap=True, weights_only=False)
            answer = True, function(*arguments)
        except Exception as error:
            answer = False, RuntimeError(f"{type(error).__name__}: {error}")
        line.send_bytes(pickle.dumps(answer))
