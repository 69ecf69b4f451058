"""One document: exact bytes, round trips, the safetensors library as an oracle, and what must be refused."""

from __future__ import annotations

import contextlib
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rbkit.formats import document
from rbkit.formats.chunk import Chunk
from rbkit.formats.errors import FormatError, LimitError
from rbkit.formats.reader import Reader

META = {"kind": "images", "first": 0, "count": 2, "part": {"index": 1, "last": True}}


def read(raw: bytes, **options: Any) -> list[Chunk]:
    """The chunks of a stream in memory (a source that cannot seek)."""
    return list(Reader(io.BytesIO(raw), name="in", **options))


def blob(header: Any, data: bytes = b"", *, length: int | None = None) -> bytes:
    """A safetensors blob around any header: an object is dumped as JSON, bytes are taken as they are."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(dtype: Any = "U8", shape: Any = (2,), offsets: Any = (0, 2), **more: Any) -> dict[str, Any]:
    """A tensor's entry in the header."""
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


# ------------------------------------------------------------------------------------------------ what we write


def test_exact_bytes_of_a_small_document() -> None:
    arrays = {"image": np.arange(12, dtype=np.uint8).reshape(2, 1, 2, 3), "id": np.array([7, -2])}
    header = (
        rb'{"__metadata__":{"rb":"{\"count\":2,\"first\":0,\"kind\":\"images\",\"part\":{\"index\":1,\"last\":true},'
        rb'\"schema\":1,\"sha256\":\"8b583273e7ba9c9b0ed5f59cc9440daccc67a76419fb700a9d268615f134b705\"}"},'
        rb'"id":{"data_offsets":[0,16],"dtype":"I64","shape":[2]},'
        rb'"image":{"data_offsets":[16,28],"dtype":"U8","shape":[2,1,2,3]}}'
    )
    data = b"\x07" + bytes(7) + b"\xfe" + b"\xff" * 7 + bytes(range(12))
    assert b"".join(document.encode(arrays, META)) == (320).to_bytes(8, "little") + header + data


def test_header_is_padded_to_eight_bytes_and_data_stays_aligned() -> None:
    for width in range(1, 9):
        arrays = {"a" * width: np.zeros(3, np.uint8), "b": np.zeros(3, np.float64), "c": np.zeros(3, np.int16)}
        raw = b"".join(document.encode(arrays, None))
        length = document.parse_length(raw[:8])
        header = document.parse_header(raw[8 : 8 + length])
        assert length % 8 == 0
        assert all((8 + length + t.start) % document.itemsize(t.dtype) == 0 for t in header.tensors.values())


def test_equal_contents_give_equal_bytes_in_any_order() -> None:
    a, b = np.arange(3), np.arange(6, dtype=np.float32).reshape(3, 2)
    meta = {"kind": "images", "first": 0, "count": 3}
    one = b"".join(document.encode({"x": a, "y": b}, meta))
    other = b"".join(document.encode({"y": b, "x": a}, dict(reversed(meta.items()))))
    assert one == other


def test_foreign_byte_order_and_strides_are_stored_by_value() -> None:
    base = np.arange(30, dtype=np.float32).reshape(5, 3, 2)
    for array in (base.astype(">f4"), np.asfortranarray(base), np.repeat(base, 2, axis=1)[:, ::2]):
        assert b"".join(document.encode({"x": array}, None)) == b"".join(document.encode({"x": base}, None))


@pytest.mark.parametrize("array", [np.zeros(2, complex), np.array(["a"]), np.array([None]), np.zeros(2, "M8[s]")])
def test_dtypes_that_the_format_lacks_are_refused(array: np.ndarray) -> None:
    with pytest.raises(FormatError, match="cannot be stored"):
        document.encode({"x": array}, None)


def test_metadata_never_holds_nan() -> None:
    with pytest.raises(ValueError, match="JSON"):
        document.encode({}, {"kind": "images", "value": math.nan})


# --------------------------------------------------------------------------------------------------- round trips

SHAPES = st.lists(st.integers(0, 4), max_size=4).map(tuple)
NAMES = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), min_size=1, max_size=20).filter(
    lambda name: name != "__metadata__"
)


@st.composite
def tensors(draw: st.DrawFn) -> dict[str, np.ndarray]:
    """A few arrays of any dtype and shape, among them empty ones and scalars."""
    arrays = {}
    for name in draw(st.lists(NAMES, max_size=4, unique=True)):
        dtype = draw(st.sampled_from(sorted(document.DTYPES.values(), key=str)))
        shape = draw(SHAPES)
        raw = draw(st.binary(min_size=math.prod(shape) * dtype.itemsize, max_size=math.prod(shape) * dtype.itemsize))
        arrays[name] = np.frombuffer(raw, dtype).reshape(shape) if dtype.kind != "b" else _bools(raw, shape)
    return arrays


def _bools(raw: bytes, shape: tuple[int, ...]) -> np.ndarray:
    return (np.frombuffer(raw, np.uint8) % 2 == 1).reshape(shape)


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    """Equal names, dtypes, shapes and bits (NaN included)."""
    return one.keys() == other.keys() and all(
        a.dtype == other[n].dtype and a.shape == other[n].shape and a.tobytes() == other[n].tobytes()
        for n, a in one.items()
    )


@settings(max_examples=150, deadline=None)
@given(tensors())
@example({"image": np.zeros((0, 3, 5, 4), np.float32), "id": np.zeros(0, np.int64)})
def test_round_trip_and_the_library_reads_ours(arrays: dict[str, np.ndarray]) -> None:
    meta = {"kind": "model", "part": {"index": 1, "last": True}, "note": "é\n"}
    raw = b"".join(document.encode(arrays, meta))
    (chunk,) = read(raw)
    assert chunk.last and chunk.meta["note"] == "é\n" and same(chunk.arrays, arrays)
    assert same(safetensors.numpy.load(raw), arrays)


@settings(max_examples=100, deadline=None)
@given(tensors(), st.none() | st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=3))
def test_the_library_s_files_are_one_whole_document(arrays: dict[str, np.ndarray], notes: dict | None) -> None:
    notes = {k: v for k, v in (notes or {}).items() if k != "rb"} or None
    arrays = {("x" if name == "image" else name): a for name, a in arrays.items()}
    (chunk,) = read(safetensors.numpy.save(arrays, notes))
    assert chunk.last and same(chunk.arrays, arrays)


def test_the_library_refuses_two_documents_back_to_back() -> None:
    raw = b"".join(document.encode({"image": np.zeros((2, 1, 2, 3), np.uint8)}, META))
    assert len(read(raw + raw)) == 2
    with pytest.raises(safetensors.SafetensorError):
        safetensors.numpy.load(raw + raw)


def test_bfloat16_is_read_as_float32() -> None:
    values = np.array([1.0, -2.5, 0.0, np.inf], np.float32)
    data = (values.view(np.uint32) >> 16).astype("<u2").tobytes()
    (chunk,) = read(blob({"w": entry("BF16", [2, 2], [0, 8])}, data))
    np.testing.assert_array_equal(chunk.arrays["w"], values.reshape(2, 2))
    assert chunk.arrays["w"].dtype == np.float32


def test_booleans_are_normalised() -> None:
    (chunk,) = read(blob({"b": entry("BOOL", [3], [0, 3])}, b"\x00\x02\xff"))
    assert chunk.arrays["b"].tobytes() == b"\x00\x01\x01"


# -------------------------------------------------------------------------------------------- hostile safetensors


def rb_only(**more: Any) -> bytes:
    """A document of nothing but our metadata."""
    return blob({"__metadata__": {"rb": json.dumps({"schema": 1, "kind": "images", **more})}})


GOOD = {"a": entry()}
EMPTY = entry(shape=[0], offsets=[0, 0])
# name: (bytes, words of our refusal, whether the library refuses too)
HOSTILE: dict[str, tuple[bytes, str, bool]] = {
    "empty": (b"", "empty input", True),
    "seven bytes": (b"\x01" * 7, "truncated", True),
    "zero length": (bytes(64), "unfinished", True),
    "length 2^63": (blob(GOOD, b"ab", length=2**63), "not a safetensors stream", True),
    "length 2^64-1": (blob(GOOD, b"ab", length=2**64 - 1), "not a safetensors stream", True),
    "length over the cap": (blob(GOOD, b"ab", length=100_000_001), "not a safetensors stream", True),
    "length beyond the end": (blob(GOOD, b"ab", length=99_000_000), "truncated", True),
    "list": (blob([]), "does not begin with '{'", True),
    "string": (blob(""), "does not begin with '{'", True),
    "empty header, padded": (blob(b"        "), "does not begin with '{'", True),
    "NUL padding": (blob(json.dumps(GOOD).encode() + bytes(5), b"ab"), "not valid JSON", True),
    "bad JSON": (blob(b'{"a":}'), "not valid JSON", True),
    "two values": (blob(b"{}{}"), "not valid JSON", True),
    "depth 200,000": (blob(b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}"), "JSON|dtype, shape", True),
    "5,000 digits": (blob(b'{"a":' + b"9" * 5000 + b"}"), "JSON|dtype, shape", True),
    "NaN": (blob(b'{"a":NaN}'), "NaN is not JSON", True),
    "leading space": (blob(b" " + json.dumps(GOOD).encode(), b"ab"), "does not begin with '{'", False),
    "byte order mark": (blob(b"\xef\xbb\xbf" + json.dumps(GOOD).encode(), b"ab"), "does not begin", True),
    "the same key twice": (
        blob(b'{"a":%s,"a":%s}' % ((json.dumps(entry()).encode(),) * 2), b"ab"), "duplicate key 'a'", False,
    ),
    "metadata key twice": (blob(b'{"__metadata__":{"x":"1","x":"2"}}'), "duplicate key 'x'", False),
    "metadata twice": (blob(b'{"__metadata__":{},"__metadata__":{}}'), "duplicate key '__metadata__'", True),
    "metadata of numbers": (blob({"__metadata__": {"x": 1}}), "strings to strings", True),
    "metadata a list": (blob({"__metadata__": []}), "strings to strings", True),
    "unknown field": (blob({"a": entry(extra=1)}, b"ab"), "exactly dtype, shape", False),
    "missing field": (blob({"a": {"dtype": "U8", "shape": [0]}}), "exactly dtype, shape", True),
    "entry no object": (blob({"a": 3}), "exactly dtype, shape", True),
    "overlap": (blob({"a": entry(), "b": entry(offsets=[1, 3])}, b"abc"), "overlaps", True),
    "same range twice": (blob({"a": entry(), "b": entry()}, b"ab"), "overlaps", True),
    "gap": (blob({"a": entry(), "b": entry(offsets=[3, 5])}, b"abcde"), "gap", True),
    "gap at the start": (blob({"a": entry(offsets=[1, 3])}, b"abc"), "gap", True),
    "trailing byte": (blob(GOOD, b"abc"), "truncated", True),
    "trailing zeros": (blob(GOOD, b"ab" + bytes(8)), "unfinished", True),
    "data short": (blob(GOOD, b"a"), "promises 2 data bytes, got 1", True),
    "offsets reversed": (blob({"a": entry(offsets=[2, 0])}, b"ab"), "does not fill", True),
    "size mismatch": (blob({"a": entry(shape=[3])}, b"ab"), "does not fill", True),
    "negative size": (blob({"a": entry(shape=[-2])}, b"ab"), "bad shape", True),
    "two negative sizes": (blob({"a": entry(shape=[-1, -2])}, b"ab"), "bad shape", True),
    "float size": (blob({"a": entry(shape=[2.0])}, b"ab"), "bad shape", True),
    "boolean size": (blob({"a": entry(shape=[True, 2])}, b"ab"), "bad shape", True),
    "size over 2^63": (blob({"a": entry(shape=[2**63, 0], offsets=[0, 0])}), "bad shape", False),
    "size over 2^64": (blob({"a": entry(shape=[2**64, 0], offsets=[0, 0])}), "bad shape", True),
    "overflow": (blob({"a": entry(shape=[2**32, 2**33], offsets=[0, 2])}, b"ab"), "overflows", True),
    "overflow that wraps": (blob({"a": entry(shape=[2**33, 2**31 + 1], offsets=[0, 2**33])}), "overflows", True),
    "overflow beside a zero": (blob({"a": entry(shape=[0, 2**62, 2**62], offsets=[0, 0])}), "overflows", False),
    "17 dimensions": (blob({"a": entry(shape=[1] * 17, offsets=[0, 1])}, b"a"), "bad shape", False),
    "shape no list": (blob({"a": entry(shape=2)}, b"ab"), "bad shape", True),
    "three offsets": (blob({"a": entry(offsets=[0, 2, 2])}, b"ab"), "bad data_offsets", True),
    "negative offset": (blob({"a": entry(offsets=[-2, 0])}, b"ab"), "bad data_offsets", True),
    "unknown dtype": (blob({"a": entry(dtype="U9")}, b"ab"), "not supported", True),
    "dtype no string": (blob({"a": entry(dtype=8)}, b"ab"), "not supported", True),
    "sub-byte dtype": (blob({"a": entry(dtype="F4", shape=[4])}, b"ab"), "not supported", False),
    "eight-bit float": (blob({"a": entry(dtype="F8_E4M3")}, b"ab"), "not supported", False),
    "header no UTF-8": (blob(b'{"\xff":%s}' % json.dumps(entry()).encode(), b"ab"), "not valid JSON", True),
    "lone surrogate": (blob(b'{"\\ud800":%s}' % json.dumps(entry()).encode(), b"ab"), "tensor name", True),
    "NUL in a name": (blob({"a\0": entry()}, b"ab"), "tensor name", False),
    "newline in a name": (blob({"a\nb": entry()}, b"ab"), "tensor name", False),
    "escape in a name": (blob({"\x1b[2J": entry()}, b"ab"), "tensor name", False),
    "name of 1 MB": (blob({"a" * 10**6: entry()}, b"ab"), "tensor name", False),
    "empty name": (blob({"": entry()}, b"ab"), "tensor name", False),
    "10 TB declared": (blob({"a": entry(shape=[10**13], offsets=[0, 10**13])}), "more than the limit", True),
    "rb no JSON": (blob({"__metadata__": {"rb": "{"}}), "metadata key rb", False),
    "rb no object": (blob({"__metadata__": {"rb": "[]"}}), "must be a JSON object", False),
    "rb key twice": (blob({"__metadata__": {"rb": '{"schema":1,"schema":1}'}}), "duplicate key 'schema'", False),
    "rb NaN": (blob({"__metadata__": {"rb": '{"schema":NaN}'}}), "NaN is not JSON", False),
    "schema 2": (blob({"__metadata__": {"rb": '{"schema":2,"kind":"images"}'}}), "schema 2 is not 1", False),
    "history no list": (rb_only(history={}), "history must be a list", False),
    "history without ids": (rb_only(history=[{"tool": "x"}]), "history must be a list", False),
    "kind unknown": (blob({"__metadata__": {"rb": '{"schema":1,"kind":"x\\n"}'}}), r"kind 'x\\\\n' is", False),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("seekable", [False, True], ids=["pipe", "file"])
def test_hostile_documents_are_refused(name: str, seekable: bool, tmp_path: Path) -> None:
    raw, words, library_refuses = HOSTILE[name]
    path = tmp_path / "x"
    path.write_bytes(raw)
    with path.open("rb") if seekable else io.BytesIO(raw) as file, pytest.raises(FormatError, match=words) as error:
        list(Reader(file, name="in"))
    message = str(error.value)
    assert message.startswith("in: ") and message.isprintable() and len(message) < 400
    refused = False
    try:
        safetensors.deserialize(raw)
    except safetensors.SafetensorError:
        refused = True
    assert refused == library_refuses


def test_too_many_tensors_are_a_limit() -> None:
    header = {f"{i}": EMPTY for i in range(document.MAX_TENSORS + 1)}
    with pytest.raises(LimitError, match="65537 tensors"):
        document.parse_header(json.dumps(header).encode())
    del header["0"]
    assert len(document.parse_header(json.dumps(header).encode()).tensors) == document.MAX_TENSORS


def test_the_document_limit_can_be_set() -> None:
    raw = blob(GOOD, b"ab")
    size = len(raw) - 8
    assert len(read(raw, max_document=size)) == 1
    with pytest.raises(LimitError, match="--max-document"):
        read(raw, max_document=size - 1)


@pytest.mark.parametrize(
    ("start", "words"),
    [
        (b"\x1f\x8b\x08\0abcdefg", "gzip"),
        (b"PK\x03\x04abcdefgh", "rb-model import"),
        (b"\x80\x02}q\0abcdefg", "pickle"),
        (b"\xff\xd8\xff\xe0abcdefg", "JPEG"),
        (b"label,pixel\n1,2", "text: 'label,pi'"),
    ],
)
def test_messages_say_what_was_met_instead(start: bytes, words: str) -> None:
    with pytest.raises(FormatError, match=words):
        read(start)


BASE = blob(
    {"aa": entry("I16", [3, 1], [2, 8]), "b": entry("BOOL", [2], [0, 2]), "__metadata__": {"k": "v"}}, b"\1\0abcdef"
)


@settings(max_examples=400, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, len(BASE) - 1), st.integers(0, 255)), min_size=1, max_size=3), st.integers(0, 9)
)
def test_what_the_library_refuses_is_refused(edits: list[tuple[int, int]], cut: int) -> None:
    raw = bytearray(BASE[: len(BASE) - cut])
    for place, value in edits:
        if place < len(raw):
            raw[place] = value
    ours: list[Chunk] | None = None
    with contextlib.suppress(FormatError):  # anything but a FormatError is a bug
        ours = read(bytes(raw))
    if ours is None:
        return
    theirs = dict(safetensors.deserialize(bytes(raw)))  # raises where the library refuses
    assert {n: bytes(t["data"]) for n, t in theirs.items() if t["dtype"] != "BOOL"} == {
        n: a.tobytes() for n, a in ours[0].arrays.items() if a.dtype != bool
    }
