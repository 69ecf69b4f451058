"""Streams: cut, damaged, reordered and joined ones, through files and pipes; the writers; the checks of rows."""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest
import safetensors.numpy

from rbkit.formats import document
from rbkit.formats.chunk import Chunk, split
from rbkit.formats.errors import ChecksumError, FormatError
from rbkit.formats.reader import Reader, whole
from rbkit.formats.rows import RowChecker
from rbkit.formats.writer import FileWriter, StreamWriter

SOURCES = ["file", "pipe"]


def rows(count: int, *, first: int = 0) -> dict[str, np.ndarray]:
    """`count` rows of 2 x 3 x 4 images whose values tell the row."""
    index = np.arange(first, first + count)
    image = (index[:, None, None, None] * 7 + np.arange(24).reshape(2, 3, 4)) % 251
    return {"id": index * 10, "image": image.astype(np.uint8), "label": index % 3, "mask": image[:, 0] > 100}


def meta(first: int = 0, **more: Any) -> dict[str, Any]:
    """Metadata of some image rows."""
    return {"kind": "images", "first": first, "total": 7, "history": [], **more}


def part(count: int, *, first: int = 0, index: int = 1, last: bool = True, **more: Any) -> bytes:
    """One document of a stream."""
    own = meta(first, count=count, part={"index": index, "last": last}, **more)
    return b"".join(document.encode(rows(count, first=first), own))


def stream(*counts: int) -> bytes:
    """A stream in parts of so many rows."""
    raw, first = io.BytesIO(), 0
    writer = StreamWriter(raw)
    for number, count in enumerate(counts, 1):
        writer.write(rows(count, first=first), meta(first), last=number == len(counts))
        first += count
    return raw.getvalue()


def _feed(fd: int, raw: bytes, step: int) -> None:
    with os.fdopen(fd, "wb", buffering=0) as file:
        try:
            for start in range(0, len(raw), step):
                file.write(raw[start : start + step])
        except BrokenPipeError:
            pass  # the reader refused early


@contextmanager
def opened(raw: bytes, source: str, folder: Path, *, step: int = 1000) -> Iterator[BinaryIO]:
    """The bytes as an unbuffered regular file or as a pipe that delivers `step` bytes at a time."""
    if source == "file":
        (folder / "x.rbs").write_bytes(raw)
        with (folder / "x.rbs").open("rb", buffering=0) as file:
            yield file  # type: ignore[misc]
        return
    read_end, write_end = os.pipe()
    feeder = threading.Thread(target=_feed, args=(write_end, raw, step))
    feeder.start()
    with os.fdopen(read_end, "rb", buffering=0) as file:
        yield file  # type: ignore[misc]
    feeder.join()


def read(raw: bytes, source: str, folder: Path, **options: Any) -> list[Chunk]:
    """All chunks of a stream."""
    with opened(raw, source, folder) as file:
        return list(Reader(file, name="in", **options))


def glued(chunks: list[Chunk]) -> dict[str, np.ndarray]:
    """The rows of all chunks."""
    return {name: np.concatenate([c.arrays[name] for c in chunks]) for name in chunks[0].arrays}


def assert_rows(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """Equal names, dtypes and values."""
    assert sorted(found) == sorted(expected)
    for name, array in expected.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


# --------------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("counts", [(7,), (3, 4), (1, 0, 6), (0,), (7, 0)])
@pytest.mark.parametrize("size", [1, 3, 512])
def test_chunks_are_the_rows_in_order(source: str, counts: tuple[int, ...], size: int, tmp_path: Path) -> None:
    chunks = read(stream(*counts), source, tmp_path, rows=size)
    assert_rows(glued(chunks), rows(sum(counts)))
    assert all(c.count <= size and c.count == len(c.arrays["id"]) for c in chunks)
    assert [c.first for c in chunks] == np.cumsum([0, *(c.count for c in chunks)])[:-1].tolist()
    assert [c.last for c in chunks] == [False] * (len(chunks) - 1) + [True]


def test_a_reader_starts_where_the_file_stands(tmp_path: Path) -> None:
    with opened(b"before" + stream(3, 4), "file", tmp_path) as file:
        file.seek(6)
        assert_rows(glued(list(Reader(file, name="in", rows=2))), rows(7))


@pytest.mark.parametrize("source", SOURCES)
def test_a_cut_at_any_byte_is_refused(source: str, tmp_path: Path) -> None:
    raw = stream(1, 0, 2)
    ends = [len(stream(1, 0)), len(stream(1)), len(raw)]
    header = 8 + document.parse_length(raw[:8])
    places = {0, 1, 7, 8, 9, header // 2, header - 1, header, header + 1, header + 40, len(raw) - 1}
    second = raw.index(b"__metadata__", header)
    places |= {second - 12, second - 10, second - 3, second, second + 100}
    places |= {len(part(1, last=False)), len(part(1, last=False)) + len(part(0, first=1, index=2, last=False))}
    assert ends[-1] not in places
    for place in sorted(places):
        with pytest.raises(FormatError, match=r"truncated|empty input|without its last document"):
            read(raw[:place], source, tmp_path)


@pytest.mark.parametrize("source", SOURCES)
def test_every_cut_of_a_small_document_is_refused(source: str, tmp_path: Path) -> None:
    raw = part(1)
    for place in range(0, len(raw), 1 if source == "file" else 5):
        with pytest.raises(FormatError, match=r"^in: (empty input|document 1 \(byte 0\): truncated)"):
            read(raw[:place], source, tmp_path)


@pytest.mark.parametrize("source", SOURCES)
def test_a_cut_between_documents_says_upstream_stopped(source: str, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="ended after document 2 without its last document; upstream stopped early"):
        read(part(2, last=False) + part(3, first=2, index=2, last=False), source, tmp_path)


@pytest.mark.parametrize("source", SOURCES)
def test_a_flipped_bit_of_the_data_is_caught(source: str, tmp_path: Path) -> None:
    raw = part(2)
    start = 8 + document.parse_length(raw[:8])
    for place in range(start, len(raw), 3):
        damaged = bytearray(raw)
        damaged[place] ^= 1 << (place % 8)
        with pytest.raises(ChecksumError, match=r"document 1 \(byte 0\): checksum mismatch"):
            read(bytes(damaged), source, tmp_path)


@pytest.mark.parametrize("source", SOURCES)
def test_a_checksum_is_skipped_or_reported_on_request_and_may_be_absent(source: str, tmp_path: Path) -> None:
    raw = part(2)
    damaged = raw[:-1] + bytes([raw[-1] ^ 1])
    assert len(read(damaged, source, tmp_path, verify=False)) == 1
    with opened(damaged, source, tmp_path) as file:
        reader = Reader(file, name="in", tolerant=True)
        assert len(list(reader)) == 1
    (finding,) = reader.findings
    assert finding.startswith("in: document 1 (byte 0): checksum mismatch")
    bare = {"rb": document.canonical({**meta(), "schema": 1, "count": 2, "part": {"index": 1, "last": True}})}
    assert_rows(glued(read(safetensors.numpy.save(rows(2), bare), source, tmp_path)), rows(2))


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(
    ("pieces", "words"),
    [
        ([(0, 2, 1, False), (5, 2, 3, True)], "has part 3, expected 2"),
        ([(0, 2, 1, False), (0, 2, 1, False), (2, 2, 2, True)], "has part 1, expected 2"),
        ([(2, 2, 2, True), (0, 2, 1, False)], "has part 2, expected 1"),
        ([(0, 2, 1, True), (2, 2, 2, True)], "has part 2, expected 1"),
        ([(0, 2, 1, False), (3, 2, 2, True)], "from row 3, expected images from row 2"),
    ],
    ids=["missing", "repeated", "reordered", "after the last", "hole in the rows"],
)
def test_parts_follow_one_another(source: str, pieces: list[Any], words: str, tmp_path: Path) -> None:
    raw = b"".join(part(n, first=first, index=index, last=last) for first, n, index, last in pieces)
    with pytest.raises(FormatError, match=words):
        read(raw, source, tmp_path)


@pytest.mark.parametrize("source", SOURCES)
def test_two_streams_back_to_back(source: str, tmp_path: Path) -> None:
    chunks = read(stream(2, 1) + stream(4), source, tmp_path)
    assert [(c.count, c.last) for c in chunks] == [(2, False), (1, True), (4, True)]
    assert_rows(glued(chunks[:2]), rows(3))
    assert_rows(chunks[2].arrays, rows(4))
    assert chunks[1].place.startswith("in: document 2 (byte ")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"part": None}, "valid part"),
        ({"part": {"index": True, "last": True}}, "valid part"),
        ({"part": {"index": 1, "last": 1}}, "valid part"),
        ({"part": {"index": 0, "last": True}}, "has part 0"),
        ({"first": None}, "first or count"),
        ({"first": -1}, "first or count"),
        ({"count": 2.0}, "first or count"),
        ({"count": 3}, "does not have 3 rows"),
        ({"count": 1}, "does not have 1 rows"),
        ({"first": 2**63 - 1}, "impossible"),
        ({"total": "7"}, "impossible"),
        ({"kind": "scores", "count": 3}, "does not have 3 rows"),
    ],
)
def test_impossible_metadata_is_refused(change: dict[str, Any], words: str) -> None:
    own = {"count": 2, "part": {"index": 1, "last": True}, **meta(), **change}
    raw = b"".join(document.encode(rows(2), own))
    with pytest.raises(FormatError, match=words):
        list(Reader(io.BytesIO(raw), name="in"))


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("shape", [(2, 1), ()])
def test_tensors_of_other_lengths_never_show_their_neighbours_bytes(
    source: str, shape: tuple[int, ...], tmp_path: Path
) -> None:
    arrays = {"attribution": np.zeros(shape, np.float32), "x": np.ones((3, 5), np.float32)}
    own = {**meta(), "kind": "attributions", "count": 3, "part": {"index": 1, "last": True}}
    with pytest.raises(FormatError, match=r"tensor 'attribution' of shape .* does not have 3 rows"):
        read(b"".join(document.encode(arrays, own)), source, tmp_path)


@pytest.mark.parametrize("source", SOURCES)
def test_foreign_rows_without_ids_and_labels(source: str, tmp_path: Path) -> None:
    image = rows(5)["image"].astype(np.float32) / 255
    chunks = read(safetensors.numpy.save({"image": image}, {"by": "them"}), source, tmp_path, rows=2)
    assert [(c.first, c.count, c.last) for c in chunks] == [(0, 2, False), (2, 2, False), (4, 1, True)]
    check = RowChecker()
    checked = [check(c) for c in chunks]
    assert np.concatenate([c.arrays["id"] for c in checked]).tolist() == [0, 1, 2, 3, 4]
    assert all("label" not in c.arrays for c in checked) and checked[0].meta["total"] == 5
    np.testing.assert_array_equal(np.concatenate([c.arrays["image"] for c in checked]), image)


@pytest.mark.parametrize(
    ("name", "kind"), [("adversarial", "adversarial"), ("attribution", "attributions"), ("inverted", "inversions")]
)
def test_the_kind_of_foreign_rows_is_inferred(name: str, kind: str) -> None:
    image = np.zeros((2, 1, 3, 4), np.float32)
    (chunk,) = Reader(io.BytesIO(safetensors.numpy.save({"image": image, name: image})), name="in")
    assert chunk.meta["kind"] == kind


def test_foreign_rows_of_unequal_number_are_refused() -> None:
    raw = safetensors.numpy.save({"image": np.zeros((3, 1, 2, 4), np.float32), "label": np.zeros(2, np.int64)})
    with pytest.raises(FormatError, match="rows"):
        list(Reader(io.BytesIO(raw), name="in"))


def test_split_keeps_rows_and_marks_the_final_piece() -> None:
    chunk = Chunk(rows(5), {**meta(first=10), "count": 5}, True, "in")
    pieces = list(split(chunk, 2))
    assert [(p.first, p.count, p.last) for p in pieces] == [(10, 2, False), (12, 2, False), (14, 1, True)]
    assert_rows(glued(pieces), rows(5))


def test_whole_wants_one_document() -> None:
    assert whole(io.BytesIO(stream(7)), name="in").count == 7
    with pytest.raises(FormatError, match="holds 2 documents, expected one"):
        whole(io.BytesIO(stream(3, 4)), name="in")


# Run in a process of its own: the high-water mark of this one was set long ago.
MEMORY = """
import os, re
from rbkit.formats.reader import Reader
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
read, write = os.pipe()
os.write(write, (99_000_000).to_bytes(8, "little") + b"{" * 82)
os.close(write)
before = peak()
try:
    list(Reader(os.fdopen(read, "rb", buffering=0), name="in"))
except ValueError as error:
    print("truncated" in str(error), peak() - before)
"""


def test_a_promise_of_much_reserves_no_memory() -> None:
    import subprocess
    import sys

    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    truncated, grown = done.stdout.split()
    assert truncated == "True" and int(grown) < 6_000  # kB


# --------------------------------------------------------------------------------------------------------- writing


@pytest.mark.parametrize("counts", [(7,), (3, 4), (1, 0, 6), (0,)])
def test_a_file_equals_the_encoded_whole_byte_for_byte(counts: tuple[int, ...], tmp_path: Path) -> None:
    first = 0
    with (tmp_path / "x").open("w+b") as file:
        writer = FileWriter(file)
        for number, count in enumerate(counts, 1):
            writer.write(rows(count, first=first), meta(first), last=number == len(counts))
            first += count
        writer.close()
    own = meta(count=first, part={"index": 1, "last": True})
    raw = (tmp_path / "x").read_bytes()
    assert raw == b"".join(document.encode(rows(first), own))
    assert_rows(safetensors.numpy.load(raw), rows(first))


def test_shards_that_continue_are_joined() -> None:
    joined, alone = io.BytesIO(), io.BytesIO()
    writer = FileWriter(joined)
    for first, count in ((0, 3), (3, 0), (3, 4)):
        writer.write(rows(count, first=first), meta(first), last=True)
    writer.close()
    single = FileWriter(alone)
    single.write(rows(7), meta(), last=True)
    single.close()
    assert joined.getvalue() == alone.getvalue()


@pytest.mark.parametrize(
    ("second", "own", "words"),
    [
        (rows(2, first=4), meta(4), "row 4 follows row 2"),
        (rows(2, first=2), meta(2), "row 2 follows row 2"),
        (rows(2, first=3), meta(3, attack={"eps": 1}), "do not fit one document"),
        (rows(2, first=3), meta(3, history=[{}]), "do not fit one document"),
        ({**rows(2, first=3), "x": np.zeros(2)}, meta(3), "other tensors or shapes"),
        ({**rows(2, first=3), "label": np.zeros(2, np.int32)}, meta(3), "other tensors or shapes"),
        ({**rows(2, first=3), "mask": np.zeros((2, 4, 3), bool)}, meta(3), "other tensors or shapes"),
    ],
    ids=["gap", "overlap", "attack", "history", "tensor", "dtype", "shape"],
)
def test_other_streams_are_not_joined(second: dict[str, np.ndarray], own: dict[str, Any], words: str) -> None:
    writer = FileWriter(io.BytesIO())
    writer.write(rows(3), meta(), last=True)
    with pytest.raises(FormatError, match=words):
        writer.write(second, own, last=True)


def test_an_output_without_its_last_rows_is_no_document() -> None:
    file = io.BytesIO()
    writer = FileWriter(file)
    with pytest.raises(FormatError, match="incomplete"):
        writer.close()
    writer.write(rows(3), meta(), last=False)
    with pytest.raises(FormatError, match="incomplete"):
        writer.close()
    assert file.getvalue() == b""


class _Full(io.BytesIO):
    """A file on a disk that takes only so many writes."""

    left = 0

    def write(self, piece: Any) -> int:
        if not self.left:
            raise OSError(28, "No space left on device")
        self.left -= 1
        return super().write(piece)


def test_the_length_comes_last_so_a_part_is_never_a_whole() -> None:
    for writes in range(20):
        file = _Full()
        file.left = writes
        writer = FileWriter(file)
        writer.write(rows(3), meta(), last=True)
        try:
            writer.close()
        except OSError:
            assert file.getvalue()[:8] in (b"", bytes(8))
            with pytest.raises(FormatError, match=r"empty input|unfinished document"):
                list(Reader(io.BytesIO(file.getvalue()), name="in"))
        else:
            break
    assert writes == 7  # draft, four tensors, header, length
    assert_rows(glued(list(Reader(io.BytesIO(file.getvalue()), name="in"))), rows(3))


def test_models_hold_scalars_and_do_not_join() -> None:
    arrays = {"a": np.float32(3) * np.ones(()), "w": np.zeros((2, 3), np.float32)}
    file, own = io.BytesIO(), {"kind": "model", "history": []}
    writer = FileWriter(file)
    writer.write(arrays, own, last=True)
    with pytest.raises(FormatError, match="second model"):
        writer.write(arrays, own, last=True)
    writer.close()
    (chunk,) = Reader(io.BytesIO(file.getvalue()), name="in")
    assert chunk.arrays["a"].shape == () and "count" not in document.strict_json(
        safetensors_metadata(file.getvalue()), what="rb"
    )
    out = io.BytesIO()
    StreamWriter(out).write(arrays, own, last=True)
    assert out.getvalue() == file.getvalue()


def safetensors_metadata(raw: bytes) -> bytes:
    """The text of our one metadata key."""
    header = document.strict_json(raw[8 : 8 + document.parse_length(raw[:8])], what="header")
    return header["__metadata__"]["rb"].encode()


class _Slow(io.BytesIO):
    """A raw file that takes three bytes at a time, as a pipe may."""

    def write(self, piece: Any) -> int:
        return super().write(bytes(piece[:3]))


def test_short_writes_lose_nothing() -> None:
    raw = _Slow()
    writer = StreamWriter(raw)
    writer.write(rows(3), meta(), last=False)
    writer.write(rows(4, first=3), meta(3), last=True)
    assert raw.getvalue() == stream(3, 4)


# ------------------------------------------------------------------------------------------------- checks of rows


def chunk_of(first: int = 0, last: bool = True, **arrays: Any) -> Chunk:
    """A chunk of two float images 3 x 4 x 5 with some tensors replaced (None removes one)."""
    own: dict[str, Any] = {"image": np.full((2, 3, 4, 5), 0.5, np.float32), **arrays}
    own = {name: array for name, array in own.items() if array is not None}
    return Chunk(own, {"kind": "images", "first": first, "count": 2, "history": []}, last, "in: document 1")


def with_value(value: float, dtype: Any = np.float32) -> np.ndarray:
    """Two images, the second with one strange value."""
    image = np.full((2, 3, 4, 5), 0.5, dtype)
    image[1, 2, 1, 3] = value
    return image


ZEROS = np.zeros((2, 3, 4, 5), np.float32)
REFUSED = {
    "NaN": ({"image": with_value(np.nan)}, r"image\[11\] has 1 values that are NaN or infinite"),
    "infinite": ({"image": with_value(-np.inf)}, r"image\[11\] has 1 values"),
    "NaN of the attack": ({"adversarial": with_value(np.nan)}, r"adversarial\[11\] has 1 values"),
    "NaN in float64": ({"image": with_value(np.nan, np.float64)}, r"image\[11\] has 1 values"),
    "normalised": ({"image": with_value(-2.25)}, r"image\[11\] holds -2.25, .*normalised"),
    "bytes as floats": ({"image": with_value(255)}, r"image\[11\] holds 255, .*divide by 255"),
    "just above one": ({"inverted": with_value(1.25)}, r"inverted\[11\] holds 1.25, expected values in \[0, 1\]$"),
    "dtype": ({"image": ZEROS.astype(np.int32)}, "image is int32, expected uint8 or float32"),
    "no channels": ({"image": ZEROS[:, 0]}, r"image has shape \[2, 4, 5\], expected \(N, C, H, W\)"),
    "no pixels": ({"image": ZEROS[:, :, :0]}, r"image has shape \[2, 3, 0, 5\]"),
    "no image": ({"image": None, "x": ZEROS}, r"no tensor named image \(there are: x\)"),
    "attack of another size": ({"adversarial": ZEROS[..., :4]}, r"adversarial is \[3, 4, 4\] per row, image is"),
    "attribution of another size": ({"attribution": ZEROS[:, :1]}, r"attribution is \[1, 4, 5\] per row"),
    "NaN of the attribution": ({"attribution": with_value(np.nan)}, r"attribution\[11\] has 1 values"),
    "NaN of a score": ({"completeness_error": np.array([np.inf, 0])}, r"completeness_error\[10\] has 1 values"),
    "attribution in words": ({"attribution": ZEROS.astype(bool)}, "attribution is bool, expected float32"),
    "mask of another size": ({"mask": np.zeros((2, 5, 4), bool)}, r"mask is \[5, 4\] per row, expected \[4, 5\]"),
    "label too large": ({"label": np.array([1, 7])}, r"label\[11\] is 7, expected 0 to 6"),
    "label negative": ({"label": np.array([-1, 0])}, r"label\[10\] is -1, expected 0 to 6"),
    "label no number": ({"label": np.array([0.0, 1.0])}, "label is float64"),
    "label one-hot": ({"label": np.zeros((2, 7), np.int64)}, r"label is int64 \[2, 7\]"),
    "target too large": ({"target": np.array([0, 9])}, r"target\[11\] is 9"),
    "id twice": ({"id": np.array([4, 4])}, "id 4 appears twice"),
    "id no number": ({"id": np.array([0.0, 1.0])}, "id is float64"),
    "id beyond int64": ({"id": np.array([1, 2**63], np.uint64)}, "id 9223372036854775808 does not fit"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_rows_are_named(name: str) -> None:
    arrays, words = REFUSED[name]
    with pytest.raises(FormatError, match=words) as error:
        RowChecker(classes=7)(chunk_of(first=10, **arrays))
    assert str(error.value).startswith("in: document 1: ")


def test_an_id_that_came_in_an_earlier_chunk_is_named() -> None:
    check = RowChecker()
    check(chunk_of(last=False, id=np.array([5, 6])))
    with pytest.raises(FormatError, match="id 6 appears twice"):
        check(chunk_of(first=2, id=np.array([1, 6])))


def test_ids_and_shapes_are_free_again_in_the_next_stream() -> None:
    check = RowChecker()
    check(chunk_of(last=False, id=np.array([5, 6])))
    check(chunk_of(first=2, id=np.array([7, 8])))
    check(chunk_of(image=ZEROS[..., :3], id=np.array([5, 6]), last=False))
    with pytest.raises(FormatError, match=r"images are \[3, 4, 5\], those before were \[3, 4, 3\]"):
        check(chunk_of(first=2))


def test_good_rows_pass_with_their_dtypes_settled() -> None:
    passed = RowChecker(classes=7)(
        chunk_of(
            first=4, image=with_value(1, np.float64), label=np.array([0, 6], np.uint8), mask=np.zeros((2, 4, 5), bool)
        )
    ).arrays
    assert passed["image"].dtype == np.float32 and passed["label"].dtype == np.int64
    assert passed["id"].tolist() == [4, 5] and passed["image"][1, 2, 1, 3] == 1
    empty = chunk_of(image=np.zeros((0, 3, 4, 5), np.float32))
    assert len(RowChecker()(empty).arrays["image"]) == 0
    assert RowChecker()(chunk_of(image=np.full((2, 3, 4, 5), 255, np.uint8))).arrays["image"].dtype == np.uint8
