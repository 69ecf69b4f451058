"""Chunks: some rows of a stream, on their way from a reader to a writer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

ROWS = 512  # examples per chunk: 6 MB of float32 at 3 x 32 x 32
ROWLESS = ("model", "checkpoint")  # kinds whose tensors are no rows


@dataclass(frozen=True)
class Chunk:
    """Some rows of a stream.

    `arrays` share their first dimension (models and checkpoints aside), `meta` is the document's metadata with
    `first` and `count` of these rows, `last` marks the final chunk of a stream, `place` names it in messages.
    """

    arrays: dict[str, np.ndarray]
    meta: dict[str, Any]
    last: bool
    place: str

    @property
    def count(self) -> int:
        """Rows in this chunk."""
        return int(self.meta["count"])

    @property
    def first(self) -> int:
        """Global index of the first row."""
        return int(self.meta["first"])

    def rows(self, start: int, stop: int, *, last: bool) -> Chunk:
        """The rows from `start` to `stop` (local indices) as a chunk of their own."""
        meta = {**self.meta, "first": self.first + start, "count": stop - start}
        return replace(self, arrays={k: a[start:stop] for k, a in self.arrays.items()}, meta=meta, last=last)


def row_count(arrays: Mapping[str, np.ndarray]) -> int:
    """Rows of a chunk: the common first dimension."""
    return len(next(iter(arrays.values()))) if arrays else 0


def spans(count: int, rows: int) -> Iterator[tuple[int, int]]:
    """Consecutive (start, stop) of at most `rows`; one empty span where there are no rows."""
    for start in range(0, max(count, 1), rows):
        yield start, min(start + rows, count)


def split(chunk: Chunk, rows: int) -> Iterator[Chunk]:
    """A chunk in pieces of at most `rows` rows; `last` stays with the final piece."""
    if chunk.count <= rows:
        yield chunk
        return
    for start, stop in spans(chunk.count, rows):
        yield chunk.rows(start, stop, last=chunk.last and stop == chunk.count)
