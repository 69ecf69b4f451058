"""Names of pictures: relative paths as ids, and as the bytes of a column."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence

import numpy as np


def path_id(name: str) -> int:
    """A stable id of a relative path: 63 bits of its sha256, so that one new file renames nothing."""
    return int.from_bytes(hashlib.sha256(os.fsencode(name)).digest()[:8], "big") >> 1


def path_ids(names: Sequence[str]) -> np.ndarray:
    """`path_id` of each name, int64 (N,)."""
    return np.array([path_id(name) for name in names], np.int64)


def encode_names(names: Sequence[str]) -> np.ndarray:
    """Names as UTF-8 bytes, uint8 (N, longest), padded with zeros."""
    raw = [os.fsencode(name) for name in names]
    out = np.zeros((len(raw), max(map(len, raw), default=0)), np.uint8)
    for row, name in zip(out, raw, strict=True):
        row[: len(name)] = np.frombuffer(name, np.uint8)
    return out


def decode_names(rows: np.ndarray) -> list[str]:
    """The inverse of `encode_names`."""
    return [os.fsdecode(bytes(row).rstrip(b"\0")) for row in rows]
