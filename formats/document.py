"""One document: a safetensors blob whose `__metadata__` holds a single key, `rb` (man page rb-stream(5)).

Layout: 8 bytes little-endian header length, a JSON header, the data section. The header is canonical (sorted keys,
no spaces, ASCII, padded with spaces to a multiple of 8), so equal contents give equal bytes; the safetensors library
writes metadata in random order and is used only as an oracle in the tests.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rbkit.formats.errors import FormatError, LimitError, printable

SCHEMA = 1
MAX_HEADER = 100_000_000  # the library's own cap
MAX_DOCUMENT = 16 << 30
MAX_TENSORS = 65_536
MAX_NAME = 256
KINDS = ("images", "adversarial", "attributions", "inversions", "scores", "model", "checkpoint")

DTYPES = {
    "BOOL": np.dtype("?"),
    "U8": np.dtype("u1"),
    "I8": np.dtype("i1"),
    "I16": np.dtype("<i2"),
    "U16": np.dtype("<u2"),
    "I32": np.dtype("<i4"),
    "U32": np.dtype("<u4"),
    "I64": np.dtype("<i8"),
    "U64": np.dtype("<u8"),
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
}
BF16 = "BF16"  # numpy has no such type: read as float32, never written
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies in the data section (byte offsets from its start)."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def row_bytes(self) -> int:
        """Bytes per entry of the first dimension."""
        return itemsize(self.dtype) * math.prod(self.shape[1:])


@dataclass(frozen=True)
class Header:
    """A checked header: tensors by name, our metadata (None for files of others) and the size of the data section in bytes."""

    tensors: dict[str, TensorInfo]
    meta: dict[str, Any] | None
    data_bytes: int
    foreign: dict[str, str] = field(default_factory=dict)


def itemsize(dtype: str) -> int:
    """Bytes per element of a safetensors dtype name."""
    return 2 if dtype == BF16 else DTYPES[dtype].itemsize


def canonical(value: Any) -> str:
    """JSON with sorted keys, no spaces, ASCII only and no NaN: the one spelling of a value."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def digest(value: Any) -> str:
    """sha256 (hex) of the canonical JSON of `value`."""
    return hashlib.sha256(canonical(value).encode("ascii")).hexdigest()


def describe_start(raw: bytes) -> str:
    """What a reader most likely met instead of a stream, from its first bytes."""
    if raw.startswith(b"\x1f\x8b"):
        return "gzip data; try `gzip -d` first"
    if raw.startswith(b"PK\x03\x04"):
        return "a zip file (a PyTorch checkpoint?); rbkit never unpickles: try `rb-model import`"
    if raw.startswith(b"\x80") and raw[1:2] in b"\x02\x03\x04\x05":
        return "a pickle; rbkit never unpickles: try `rb-model import`"
    if raw.startswith(b"\xff\xd8\xff"):
        return "a JPEG image; try `rb-data folder`"
    text = raw[:16]
    if text and all(32 <= b < 127 or b in b"\t\r\n" for b in text):
        return f"text: {printable(text.decode('ascii'))!r}"
    return f"bytes {raw[:8].hex(' ')}"


def parse_length(raw: bytes, *, max_header: int = MAX_HEADER) -> int:
    """Header length in bytes from the first 8 bytes of a document.

    Raises: FormatError for a zero or implausible length, LimitError above `max_header`.
    """
    length = int.from_bytes(raw, "little")
    if length == 0:
        raise FormatError("unfinished document: its header was never written (the writer stopped early)")
    if length > max_header:
        kind = LimitError if length <= MAX_HEADER else FormatError
        raise kind(f"not a safetensors stream: starts with {describe_start(raw)} (header length {length})")
    return length


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    for key, value in pairs:
        if key in seen:
            raise FormatError(f"duplicate key {printable(key)!r} in the header")
        seen[key] = value
    return seen


def _reject_constant(text: str) -> Any:
    raise FormatError(f"{text} is not JSON")


def strict_json(raw: bytes, *, what: str) -> Any:
    """Parse JSON that must be UTF-8, shallow, without duplicate keys and without NaN."""
    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=_no_duplicates, parse_constant=_reject_constant)
    except FormatError as error:
        raise FormatError(f"{what}: {error}") from None
    except (UnicodeDecodeError, RecursionError, ValueError) as error:
        raise FormatError(f"{what} is not valid JSON ({type(error).__name__})") from None


def is_count(value: Any) -> bool:
    """Whether a value of JSON is a number of bytes or rows: whole, not negative, below 2**63."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _tensor(name: str, entry: Any) -> TensorInfo:
    shown = printable(name)
    if len(name) > MAX_NAME or re.search(r"[\x00-\x1f\x7f\ud800-\udfff]", name) or not name:
        raise FormatError(f"tensor name {shown!r} is empty, too long or holds control characters")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise FormatError(f"tensor {shown!r}: expected exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or (dtype not in DTYPES and dtype != BF16):
        raise FormatError(f"tensor {shown!r}: dtype {printable(str(dtype))!r} is not supported")
    if not isinstance(shape, list) or len(shape) > 16 or not all(map(is_count, shape)):
        raise FormatError(f"tensor {shown!r}: bad shape")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(is_count, offsets)):
        raise FormatError(f"tensor {shown!r}: bad data_offsets")
    # The product over non-zero dimensions guards against [0, 2**62, 2**62], which numpy cannot hold.
    if math.prod(d for d in shape if d) * itemsize(dtype) >= 2**63:
        raise FormatError(f"tensor {shown!r}: shape {shape} overflows")
    start, stop = offsets
    if stop - start != math.prod(shape) * itemsize(dtype):
        raise FormatError(f"tensor {shown!r}: shape {shape} of {dtype} does not fill bytes {start} to {stop}")
    return TensorInfo(dtype, tuple(shape), start, stop)


def _check_cover(tensors: Mapping[str, TensorInfo]) -> int:
    """Size of the data section; tensors must tile it without gap or overlap."""
    end = 0
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
        if info.start != end:
            word = "overlaps the one before" if info.start < end else "leaves a gap before it"
            raise FormatError(f"tensor {printable(name)!r} {word} (starts at {info.start}, expected {end})")
        end = info.stop
    return end


def _metadata(raw: Any) -> tuple[dict[str, Any] | None, dict[str, str]]:
    if not isinstance(raw, dict) or not all(isinstance(v, str) for v in raw.values()):
        raise FormatError("__metadata__ must map strings to strings")
    foreign = {key: value for key, value in raw.items() if key != "rb"}
    if "rb" not in raw:
        return None, foreign
    meta = strict_json(raw["rb"].encode("utf-8", "surrogatepass"), what="metadata key rb")
    if not isinstance(meta, dict):
        raise FormatError("metadata key rb must be a JSON object")
    if meta.get("schema") != SCHEMA:
        raise FormatError(
            f"schema {printable(str(meta.get('schema')))} is not {SCHEMA}: made by another version of rbkit"
        )
    if meta.get("kind") not in KINDS:
        raise FormatError(f"kind {printable(str(meta.get('kind')))!r} is unknown; expected one of {', '.join(KINDS)}")
    history = meta.get("history", [])
    if not isinstance(history, list) or not all(isinstance(e, dict) and isinstance(e.get("id"), str) for e in history):
        raise FormatError("history must be a list of objects with an id")
    return meta, foreign


def parse_header(raw: bytes, *, max_document: int = MAX_DOCUMENT) -> Header:
    """Check a JSON header and return it; `raw` is the header alone, without the 8 bytes of length.

    Raises: FormatError, LimitError (document larger than `max_document` bytes).
    """
    if raw[:1] != b"{":
        raise FormatError("the header does not begin with '{'")
    entries = strict_json(raw, what="header")
    if len(entries) > MAX_TENSORS:
        raise LimitError(f"{len(entries)} tensors, more than {MAX_TENSORS}")
    meta, foreign = _metadata(entries.pop("__metadata__", {}))
    tensors = {name: _tensor(name, entry) for name, entry in entries.items()}
    size = _check_cover(tensors)
    if size + len(raw) > max_document:
        raise LimitError(f"document of {size} bytes, more than the limit of {max_document}; try --max-document")
    return Header(tensors, meta, size, foreign)


def layout(specs: Mapping[str, tuple[str, tuple[int, ...]]]) -> dict[str, TensorInfo]:
    """Place tensors one after the other: widest dtype first, then by name, so that all stay aligned."""
    placed: dict[str, TensorInfo] = {}
    position = 0
    for name in sorted(specs, key=lambda n: (-itemsize(specs[n][0]), n)):
        dtype, shape = specs[name]
        size = math.prod(shape) * itemsize(dtype)
        placed[name] = TensorInfo(dtype, shape, position, position + size)
        position += size
    return placed


def encode_header(tensors: Mapping[str, TensorInfo], meta: Mapping[str, Any] | None) -> bytes:
    """The 8 length bytes and the canonical header."""
    entries: dict[str, Any] = {
        name: {"dtype": t.dtype, "shape": list(t.shape), "data_offsets": [t.start, t.stop]}
        for name, t in tensors.items()
    }
    if meta is not None:
        entries["__metadata__"] = {"rb": canonical(meta)}
    text = canonical(entries).encode("ascii")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def dtype_name(array: np.ndarray) -> str:
    """The safetensors name of an array's dtype. Raises: FormatError for a dtype that the format lacks."""
    dtype = array.dtype.newbyteorder("<")
    if dtype not in NAMES:
        raise FormatError(f"dtype {array.dtype} cannot be stored")
    return NAMES[dtype]


def as_bytes(array: np.ndarray) -> memoryview:
    """The array's bytes, little-endian and contiguous, without a copy where none is needed."""
    flat = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
    return flat.reshape(-1).view(np.uint8).data


def from_bytes(raw: bytes | bytearray | memoryview, info: TensorInfo, *, rows: int | None = None) -> np.ndarray:
    """Bytes to an array (a view); `rows` replaces the first dimension when only part was read."""
    shape = info.shape if rows is None else (rows, *info.shape[1:])
    if info.dtype == BF16:
        wide = np.frombuffer(raw, "<u2").astype("<u4") << np.uint32(16)
        return wide.view("<f4").reshape(shape)
    if info.dtype == "BOOL":
        return (np.frombuffer(raw, np.uint8) != 0).reshape(shape)
    return np.frombuffer(raw, DTYPES[info.dtype]).reshape(shape)


def encode(arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any] | None) -> list[bytes | memoryview]:
    """A whole document as pieces to write in order; `meta` gains the digest of the data section."""
    tensors = layout({name: (dtype_name(a), a.shape) for name, a in arrays.items()})
    pieces = [as_bytes(arrays[name]) for name in tensors]
    sha = hashlib.sha256()
    for piece in pieces:
        sha.update(piece)
    full = None if meta is None else {**meta, "schema": SCHEMA, "sha256": sha.hexdigest()}
    return [encode_header(tensors, full), *pieces]
