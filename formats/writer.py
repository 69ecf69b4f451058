"""The writers of streams: many documents to a pipe, or one to a file (rb-stream(5)).

A writer numbers the parts; `last` is written only with the final chunk of a stream.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Mapping
from typing import Any, BinaryIO, Protocol

import numpy as np

from rbkit.formats import document
from rbkit.formats.chunk import ROWLESS, row_count
from rbkit.formats.errors import FormatError

PIECE = 1 << 20  # bytes copied from a spool at once
SPOOL = 64 << 20  # bytes a single-document writer keeps in memory per tensor
DERIVED = ("part", "count", "sha256", "schema")  # metadata that the writer owns


class Writer(Protocol):
    """What takes chunks of rows: `write` each in order with `last` on the final one of a stream, then `close`."""

    def write(self, arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any], *, last: bool) -> None: ...

    def close(self) -> None: ...


def write_all(raw: BinaryIO, piece: bytes | bytearray | memoryview) -> None:
    """Write every byte; an unbuffered file may take only part of them at a time."""
    view = memoryview(piece)
    if not view.nbytes:
        return
    view = view.cast("B")
    while view:
        view = view[raw.write(view) or 0 :]


class StreamWriter:
    """Writes each chunk as a document at once: for pipes, terminals of pipelines and `.rbs` files."""

    def __init__(self, raw: BinaryIO) -> None:
        self.raw = raw
        self.part = 0

    def write(self, arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any], *, last: bool) -> None:
        """Append one document; `last` closes the stream and the next call opens another."""
        self.part += 1
        own = {**meta, "part": {"index": self.part, "last": last}}
        if meta["kind"] not in ROWLESS:
            own["count"] = row_count(arrays)
        for piece in document.encode(arrays, own):
            write_all(self.raw, piece)
        if last:
            self.part = 0

    def close(self) -> None:
        """Nothing is held back."""


class FileWriter:
    """Writes ONE document to a seekable file, its header last, in flat memory (rows wait in spools per tensor).

    Several streams are joined if each goes on where the one before ended and agrees with it in all but its rows;
    otherwise FormatError: such outputs need a pipe or a `.rbs` file.
    """

    def __init__(self, file: BinaryIO, *, directory: str | None = None) -> None:
        self.file, self.directory = file, directory
        self.spools: dict[str, Any] = {}
        self.specs: dict[str, tuple[str, tuple[int, ...]]] = {}
        self.meta: dict[str, Any] | None = None
        self.count = 0
        self.complete = False

    def write(self, arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any], *, last: bool) -> None:
        """Append rows."""
        if self.meta is None:
            self._open(arrays, meta)
        self._check(arrays, meta)
        for name, array in arrays.items():
            self.spools[name].write(document.as_bytes(array))
        if meta["kind"] not in ROWLESS:
            self.count += row_count(arrays)
        self.complete = last

    def _open(self, arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> None:
        self.meta = {key: value for key, value in meta.items() if key not in DERIVED}
        for name, array in arrays.items():
            self.specs[name] = (document.dtype_name(array), array.shape)
            self.spools[name] = tempfile.SpooledTemporaryFile(max_size=SPOOL, dir=self.directory)  # noqa: SIM115

    def _check(self, arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> None:
        assert self.meta is not None
        fixed = {key: value for key, value in meta.items() if key not in (*DERIVED, "first", "total")}
        if fixed != {key: value for key, value in self.meta.items() if key not in ("first", "total")}:
            raise FormatError("several streams do not fit one document; try a name ending in .rbs, or a pipe")
        if meta["kind"] in ROWLESS and self.complete:
            raise FormatError("a second model does not fit one document; try a name ending in .rbs, or a pipe")
        if self.count and meta["first"] != self.meta["first"] + self.count:
            raise FormatError(
                f"row {meta['first']} follows row {self.meta['first'] + self.count - 1}: streams that do not continue "
                "one another do not fit one document; try a name ending in .rbs, or a pipe"
            )
        shapes = {name: (document.dtype_name(a), a.shape[1:]) for name, a in arrays.items()}
        if shapes != {name: (dtype, shape[1:]) for name, (dtype, shape) in self.specs.items()}:
            raise FormatError(f"rows from {meta['first']} have other tensors or shapes than those before")

    def close(self) -> None:
        """Write the document. Raises: FormatError when the final chunk never came."""
        if self.meta is None or not self.complete:
            raise FormatError("output is incomplete: the last rows never came")
        meta = {**self.meta, "schema": document.SCHEMA, "part": {"index": 1, "last": True}}
        specs = self.specs
        if meta["kind"] not in ROWLESS:
            meta["count"] = self.count
            specs = {name: (dtype, (self.count, *shape[1:])) for name, (dtype, shape) in specs.items()}
        tensors = document.layout(specs)
        draft = document.encode_header(tensors, {**meta, "sha256": "0" * 64})
        write_all(self.file, bytes(8) + draft[8:])  # the length stays 0 until all is there
        sha = hashlib.sha256()
        for name in tensors:
            self._pour(name, sha)
        header = document.encode_header(tensors, {**meta, "sha256": sha.hexdigest()})
        self.file.seek(8)
        write_all(self.file, header[8:])
        self.file.flush()
        self.file.seek(0)
        write_all(self.file, header[:8])
        self.file.flush()
        # A shell lends one position to all commands of { a; b; } > file: the next writes behind this document.
        self.file.seek(0, os.SEEK_END)

    def _pour(self, name: str, sha: Any) -> None:
        spool = self.spools[name]
        spool.seek(0)
        while piece := spool.read(PIECE):
            sha.update(piece)
            write_all(self.file, piece)
        spool.close()

    def __del__(self) -> None:
        for spool in self.spools.values():  # what a failure left; closing twice does no harm
            spool.close()
