"""Which rows: seeded nested samples, validation splits and shards, all as functions of the index or id."""

from __future__ import annotations

import numpy as np

from rbkit.tools.philox import uniform_rows

VALIDATION = 0.1


def nested_sample(total: int, count: int | None, *, seed: int) -> np.ndarray:
    """`count` of `total` indices in rising order; a smaller sample lies within a larger one of the same seed.

    Raises: ValueError when more rows are asked for than there are.
    """
    if count is None:
        return np.arange(total)
    if count > total:
        raise ValueError(f"asked for {count} rows of {total}")
    rank = uniform_rows(np.arange(total, dtype=np.int64), seed=seed, purpose="sample")
    return np.sort(np.argsort(rank, kind="stable")[:count])


def in_validation(
    ids: np.ndarray, *, fraction: float = VALIDATION, seed: int = 0, purpose: str = "validation"
) -> np.ndarray:
    """Which ids belong to the validation part: bool (N,), each with probability `fraction`, whatever the others are.

    `purpose` keeps choices apart: rows that were carved away by one choice would all be missing from the same choice.
    """
    return uniform_rows(ids.astype(np.int64), seed=seed, purpose=purpose) < fraction


def shard_range(total: int, shard: int, shards: int) -> tuple[int, int]:
    """First row and end of shard `shard` of `shards` (from 1): floor((k - 1) T / n) to floor(k T / n)."""
    if not 1 <= shard <= shards:
        raise ValueError(f"shard {shard}/{shards}: expected 1/{shards} to {shards}/{shards}")
    return (shard - 1) * total // shards, shard * total // shards
