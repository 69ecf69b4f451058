"""The reader of streams: documents back to back, cut streams detected, read in chunks of rows (rb-stream(5)).

A reader trusts nothing and yields `Chunk`s: whole documents of a pipe, slices of a document in a seekable file, so
that memory stays flat.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from rbkit.formats import document, png
from rbkit.formats.chunk import ROWLESS, ROWS, Chunk, spans, split
from rbkit.formats.document import Header, TensorInfo, is_count
from rbkit.formats.errors import ChecksumError, FormatError
from rbkit.formats.names import encode_names, path_id

PIECE = 1 << 20  # bytes asked for at once
EAGER = 64 << 20  # a buffer grows by at most this at once
INFERRED_KIND = {"attribution": "attributions", "adversarial": "adversarial", "inverted": "inversions"}


def read_some(file: BinaryIO, size: int) -> bytearray:
    """Up to `size` bytes; fewer only at the end of the file. Memory grows with what arrives, not with `size`."""
    buffer = bytearray()
    while len(buffer) < size:
        # As much again as has arrived: a header that promises gigabytes does not make us reserve them.
        piece = bytearray(min(size - len(buffer), max(len(buffer), PIECE), EAGER))
        filled = _fill(file, piece)
        if not buffer and filled == size:
            return piece
        buffer += memoryview(piece)[:filled]
        if filled < len(piece):
            break
    return buffer


def _fill(file: BinaryIO, buffer: bytearray) -> int:
    view, filled = memoryview(buffer), 0
    while filled < len(buffer):
        got = file.readinto(view[filled : filled + PIECE])  # type: ignore[attr-defined]
        if not got:
            break
        filled += got
    return filled


def _is_regular(file: BinaryIO) -> bool:
    try:
        return stat.S_ISREG(os.fstat(file.fileno()).st_mode)
    except (AttributeError, OSError):  # bytes in memory, a member of an archive
        return False


class _Input:
    """A byte source that counts its position and, where it is a regular file, can go back."""

    def __init__(self, file: BinaryIO, start: bytes) -> None:
        self.file = file
        self.ahead = start
        self.seekable = _is_regular(file)
        self.origin = file.tell() - len(start) if self.seekable else 0
        self.position = 0

    def take(self, size: int) -> bytearray:
        head, self.ahead = self.ahead[:size], self.ahead[size:]
        raw = bytearray(head) + read_some(self.file, size - len(head)) if head else read_some(self.file, size)
        self.position += len(raw)
        return raw

    def at(self, offset: int, size: int) -> bytearray:
        self.file.seek(self.origin + offset)
        return read_some(self.file, size)

    def resume(self, position: int) -> None:
        self.position = position
        self.file.seek(self.origin + position)

    def left(self) -> int:
        """Bytes of a regular file after the current position."""
        return os.fstat(self.file.fileno()).st_size - self.origin - self.position


@dataclass
class _Sequence:
    """Checks that parts follow one another: 1, 2, ... up to one marked last."""

    expected: int = 1
    row: int | None = None
    kind: str | None = None

    def check(self, meta: Mapping[str, Any]) -> bool:
        part = meta.get("part")
        if not isinstance(part, dict) or not is_count(part.get("index")) or not isinstance(part.get("last"), bool):
            raise FormatError("metadata lacks a valid part (index and last)")
        if part["index"] != self.expected:
            raise FormatError(f"has part {part['index']}, expected {self.expected} (missing, repeated or reordered)")
        if self.expected > 1 and (meta["kind"] != self.kind or meta["first"] != self.row):
            raise FormatError(
                f"holds {meta['kind']} from row {meta['first']}, expected {self.kind} from row {self.row}"
            )
        last = bool(part["last"])
        self.expected = 1 if last else self.expected + 1
        self.kind, self.row = meta["kind"], meta["first"] + meta["count"]
        return last

    def finish(self, number: int) -> None:
        if self.expected > 1:
            raise FormatError(f"stream ended after document {number} without its last document; upstream stopped early")


def _normal_meta(header: Header) -> dict[str, Any]:
    """Our metadata, or what a foreign file of rows amounts to."""
    lengths = {t.shape[0] if t.shape else None for t in header.tensors.values()}
    meta = header.meta
    if meta is None:
        kind = next((k for name, k in INFERRED_KIND.items() if name in header.tensors), "images")
        rows = "image" in header.tensors
        count = next(iter(lengths)) if rows and len(lengths) == 1 else 0
        meta = {"schema": 1, "kind": kind if rows else "foreign", "part": {"index": 1, "last": True}}
        meta |= {"first": 0, "count": count, "total": count, "history": []}
    if meta["kind"] in (*ROWLESS, "foreign"):
        return {**meta, "first": 0, "count": 0}
    if not is_count(meta.get("first")) or not is_count(meta.get("count")):
        raise FormatError("metadata lacks first or count")
    if not is_count(meta["first"] + meta["count"]) or not is_count(meta.get("total") or 0):
        raise FormatError("metadata holds an impossible first, count or total")
    uneven = {n: t.shape for n, t in header.tensors.items() if not t.shape or t.shape[0] != meta["count"]}
    if uneven:
        name, shape = next(iter(uneven.items()))
        raise FormatError(f"tensor {name!r} of shape {list(shape)} does not have {meta['count']} rows")
    return meta


class Reader:
    """Reads one input: a stream of documents, a foreign safetensors file, or PNG images back to back.

    `name` is what messages call the input, `path` its path where it has one (pictures are named after it); `rows` the most rows of a chunk; `verify` compares digests; `tolerant`
    leaves a wrong digest to the caller (`self.findings`).
    """

    def __init__(
        self,
        file: BinaryIO,
        *,
        name: str,
        path: str | None = None,
        rows: int = ROWS,
        verify: bool = True,
        tolerant: bool = False,
        max_document: int = document.MAX_DOCUMENT,
    ) -> None:
        self.file, self.name, self.path, self.rows = file, name, path, rows
        self.verify, self.tolerant, self.max_document = verify, tolerant, max_document
        self.number = 0
        self.findings: list[str] = []
        self.headers: list[Header] = []
        self._offset = 0
        self._sequence = _Sequence()

    def __iter__(self) -> Iterator[Chunk]:
        start = bytes(read_some(self.file, 8))
        if not start:
            raise FormatError(f"{self.name}: empty input (0 bytes); did the command before the pipe fail?")
        if start == png.SIGNATURE:
            yield from self._pngs(start)
            return
        source = _Input(self.file, start)
        while True:
            self._offset = source.position
            raw = source.take(8)
            if not raw:
                break
            self.number += 1
            try:
                yield from self._document(source, raw)
            except FormatError as error:
                raise type(error)(f"{self.place()}: {error}") from None
        try:
            self._sequence.finish(self.number)
        except FormatError as error:
            raise FormatError(f"{self.name}: {error}") from None

    def place(self) -> str:
        """Where the reader is, for messages."""
        return f"{self.name}: document {self.number} (byte {self._offset})"

    def _pngs(self, start: bytes) -> Iterator[Chunk]:
        pictures = png.read_many(self.file, name=self.name, start=start)
        yield from image_chunks(pictures, rows=self.rows, name=self.name, path=self.path)

    def _document(self, source: _Input, raw: bytearray) -> Iterator[Chunk]:
        if len(raw) < 8:
            raise FormatError(f"truncated: the length needs 8 bytes, got {len(raw)}")
        length = document.parse_length(bytes(raw))
        text = source.take(length)
        if len(text) < length:
            start = "" if text[:1] == b"{" else f"; starts with {document.describe_start(bytes(raw + text[:8]))}"
            raise FormatError(f"truncated or no safetensors: header promises {length} bytes, got {len(text)}{start}")
        header = document.parse_header(bytes(text), max_document=self.max_document)
        meta = _normal_meta(header)
        self.headers.append(header)
        last = self._sequence.check(meta)
        if source.seekable:
            yield from self._slices(source, header, meta, last)
        else:
            yield from self._whole(source, header, meta, last)

    def _whole(self, source: _Input, header: Header, meta: dict[str, Any], last: bool) -> Iterator[Chunk]:
        data = source.take(header.data_bytes)
        if len(data) < header.data_bytes:
            raise FormatError(f"truncated: header promises {header.data_bytes} data bytes, got {len(data)}")
        if self.verify and header.meta is not None:
            self._check_digest(hashlib.sha256(data).hexdigest(), meta)
        view = memoryview(data)
        arrays = {n: document.from_bytes(view[t.start : t.stop], t) for n, t in header.tensors.items()}
        chunk = Chunk(arrays, meta, last, self.place())
        yield from split(chunk, self.rows)

    def _slices(self, source: _Input, header: Header, meta: dict[str, Any], last: bool) -> Iterator[Chunk]:
        base, left = source.position, source.left()
        if left < header.data_bytes:
            raise FormatError(f"truncated: header promises {header.data_bytes} data bytes, got {left}")
        if self.verify and header.meta is not None and "sha256" in meta:
            self._check_digest(_digest_region(source, base, header.data_bytes), meta)

        def part(info: TensorInfo, start: int, stop: int) -> np.ndarray:
            raw = source.at(base + info.start + start * info.row_bytes, (stop - start) * info.row_bytes)
            return document.from_bytes(raw, info, rows=stop - start)

        for start, stop in spans(meta["count"], self.rows):
            if meta["count"]:
                arrays = {n: part(t, start, stop) for n, t in header.tensors.items()}
            else:
                whole = {n: source.at(base + t.start, t.stop - t.start) for n, t in header.tensors.items()}
                arrays = {n: document.from_bytes(raw, header.tensors[n]) for n, raw in whole.items()}
            here = {**meta, "first": meta["first"] + start, "count": stop - start}
            source.resume(base + header.data_bytes)
            yield Chunk(arrays, here, last and stop == meta["count"], self.place())
        source.resume(base + header.data_bytes)

    def _check_digest(self, found: str, meta: Mapping[str, Any]) -> None:
        if "sha256" not in meta or meta["sha256"] == found:
            return
        text = (
            f"checksum mismatch: the data section has sha256 {found[:12]}…, the header says {str(meta['sha256'])[:12]}…"
        )
        if not self.tolerant:
            raise ChecksumError(text)
        self.findings.append(f"{self.place()}: {text}")


def _digest_region(source: _Input, offset: int, size: int) -> str:
    sha, done = hashlib.sha256(), 0
    while done < size:
        piece = source.at(offset + done, min(PIECE, size - done))
        sha.update(piece)
        done += len(piece)
    return sha.hexdigest()


def image_chunks(pictures: Iterator[png.Picture], *, rows: int, name: str, path: str | None) -> Iterator[Chunk]:
    """Pictures of one size as an unlabelled image stream (one picture of look-ahead finds the last).

    Pictures of a file are named after its `path`, as rb-data png names them.
    """
    held: list[png.Picture] = []
    first = 0
    for picture in pictures:
        if held and picture.pixels.shape != held[0].pixels.shape:
            shapes = [" x ".join(map(str, p.pixels.shape)) for p in (picture, held[0])]
            raise FormatError(
                f"{name}: image {first + len(held) + 1} is {shapes[0]}, the first is {shapes[1]}; try rb-data png --size"
            )
        if len(held) == rows:
            yield _picture_chunk(held, first=first, last=False, name=name, path=path)
            first, held = first + rows, held[:0]
        held.append(picture)
    yield _picture_chunk(held, first=first, last=True, name=name, path=path)


def _picture_chunk(pictures: list[png.Picture], *, first: int, last: bool, name: str, path: str | None) -> Chunk:
    arrays = {"image": np.stack([p.pixels for p in pictures])}
    if path is not None:
        alone = first == 0 and last and len(pictures) == 1
        names = [path if alone else f"{path}#{first + i + 1}" for i in range(len(pictures))]
        arrays |= {"id": np.array([path_id(n) for n in names], np.int64), "name": encode_names(names)}
    meta = {"schema": 1, "kind": "images", "first": first, "count": len(pictures), "history": []}
    return Chunk(arrays, meta, last, name)


def whole(file: BinaryIO, *, name: str) -> Chunk:
    """The single document of a file, all rows at once. Raises: FormatError if there is none or more than one."""
    chunks = list(Reader(file, name=name, rows=2**62))
    if len(chunks) != 1:
        raise FormatError(f"{name}: holds {len(chunks)} documents, expected one; try `rb-info --join`")
    return chunks[0]
