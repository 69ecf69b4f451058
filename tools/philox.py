"""Philox4x32-10, the counter-based generator (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").

Written with the operators that numpy and torch integers share, so that the same numbers come out with and without
torch, on a CPU or a GPU. Words are 32-bit values held in int64; products wrap modulo 2**64, which keeps their bits.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

MASK = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10


def key_of(seed: int, purpose: str) -> tuple[int, int]:
    """The two key words of a (seed, purpose)."""
    raw = hashlib.sha256(f"{seed}:{purpose}".encode()).digest()
    return int.from_bytes(raw[:4], "little"), int.from_bytes(raw[4:8], "little")


def philox(counter: tuple[Any, Any, Any, Any], key: tuple[int, int]) -> tuple[Any, Any, Any, Any]:
    """Four 32-bit words for each counter of four 32-bit words (int64 arrays or tensors that broadcast)."""
    c0, c1, c2, c3 = (c + 0 for c in counter)  # copies, which the rounds may write to
    k0, k1 = key
    for _ in range(ROUNDS):
        c0 *= MULTIPLIERS[0]
        c2 *= MULTIPLIERS[1]
        high0, high2 = c0 >> 32, c2 >> 32
        high2 ^= c1
        high0 ^= c3
        high2 ^= k0
        high0 ^= k1
        high2 &= MASK
        high0 &= MASK
        c0, c1, c2, c3 = high2, c2, high0, c0  # of c1 and c3 the lower 32 bits count
        k0, k1 = (k0 + WEYL[0]) & MASK, (k1 + WEYL[1]) & MASK
    c1 &= MASK
    c3 &= MASK
    return c0, c1, c2, c3


def uniform_rows(ids: np.ndarray, *, seed: int, purpose: str) -> np.ndarray:
    """One uniform number in [0, 1) per id, float64 (N,) with 53 bits; the numpy side for commands without torch."""
    with np.errstate(over="ignore"):
        zero = np.zeros_like(ids)
        w0, w1, _, _ = philox((zero, zero, ids & MASK, (ids >> 32) & MASK), key_of(seed, purpose))
    return ((w0 >> 5) * 67108864.0 + (w1 >> 6)) / 9007199254740992.0
