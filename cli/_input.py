"""Where bytes come from: files and pipes, as chunks of a stream. Nothing here knows what a tool computes."""

from __future__ import annotations

import contextlib
import fcntl
import os
import queue
import stat
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from rbkit.cli._errors import Input, Usage, blame
from rbkit.formats.errors import FormatError

if TYPE_CHECKING:
    from rbkit.formats.chunk import Chunk
    from rbkit.formats.reader import Reader

PIPE_BYTES = 1 << 20
F_SETPIPE_SZ = 1031
STDIN = "standard input"


def widen(fd: int) -> None:
    """A pipe of 1 MiB: three times the throughput of the default between two Python processes."""
    with contextlib.suppress(OSError):
        if stat.S_ISFIFO(os.fstat(fd).st_mode):
            fcntl.fcntl(fd, F_SETPIPE_SZ, PIPE_BYTES)


def open_bytes(source: str) -> tuple[BinaryIO, str]:
    """(file, name for messages) of a path or `-`. A terminal is refused."""
    if source != "-":
        with blame(Input, OSError):
            if Path(source).is_dir():
                raise Input(f"{source}: is a folder, expected a file; try rb-data folder {source}")
            return Path(source).open("rb", buffering=0), source
    if os.isatty(0):
        raise Usage("standard input is a terminal; give a file, or pipe a stream in")
    if fcntl.fcntl(0, fcntl.F_GETFL) & os.O_ACCMODE == os.O_WRONLY:  # closed by the caller (_app.py), or `0> file`
        raise Input("standard input is closed; give a file, or pipe a stream in")
    widen(0)
    return open(0, "rb", buffering=0, closefd=False), STDIN


def reader(source: str, **options: Any) -> Reader:
    """A stream reader of a path or `-`."""
    from rbkit.formats.reader import Reader

    file, name = open_bytes(source)
    return Reader(file, name=name, path=None if source == "-" else source, **options)


def chunks(source: str, *, shard: tuple[int, int] | None = None, **options: Any) -> Iterator[Chunk]:
    """The chunks of an input, cut to a shard of the whole; format errors become input failures."""
    with blame(Input, FormatError, OSError):
        stream: Iterable[Chunk] = reader(source, **options)
        if shard is not None:
            stream = _only_shard(stream, shard)
        yield from stream


def _only_shard(stream: Iterable[Chunk], shard: tuple[int, int]) -> Iterator[Chunk]:
    """The rows of one shard; the rest is read all the same, so that a cut input is noticed."""
    from rbkit.tools.sample import shard_range

    emitted = False
    for chunk in stream:
        total = chunk.meta.get("total")
        if not isinstance(total, int):
            raise Usage("--shard needs the total number of rows, which this input does not tell; try a file")
        begin, end = shard_range(total, *shard)
        start, stop = (min(max(bound - chunk.first, 0), chunk.count) for bound in (begin, end))
        last_row = chunk.first + stop >= end or chunk.last
        if start < stop:
            emitted = True
            yield chunk.rows(start, stop, last=last_row)
        elif chunk.last and not emitted:
            yield _empty(chunk, begin)
        if chunk.last:
            emitted = False


def _empty(chunk: Chunk, first: int) -> Chunk:
    cut = chunk.rows(0, 0, last=True)
    cut.meta["first"] = first
    return cut


class ReadAhead:
    """Chunks read by a thread, so that a tool can ask for one without waiting: `poll(wait)`."""

    DEPTH = 2

    def __init__(self, source: Iterable[Chunk]) -> None:
        self.queue: queue.Queue[Any] = queue.Queue(self.DEPTH)
        self.ended = False
        threading.Thread(target=self._read, args=(source,), daemon=True).start()

    def _read(self, source: Iterable[Chunk]) -> None:
        try:
            for chunk in source:
                self.queue.put(chunk)
            self.queue.put(StopIteration())
        except BaseException as error:  # handed to the thread that works, which reports it
            self.queue.put(error)

    def poll(self, wait: bool) -> Chunk | None:
        """The next chunk, or None where none is ready and `wait` is false. Raises StopIteration at the end."""
        if self.ended:
            raise StopIteration
        try:
            item = self.queue.get(block=wait)
        except queue.Empty:
            return None
        if isinstance(item, BaseException):
            self.ended = True
            raise item
        return item
