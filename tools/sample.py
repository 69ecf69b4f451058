"""Which rows: seeded nested samples, validation splits and shards, all as functions of the index or id."""

from __future__ import annotations

import numpy as np

from rbkit.tools.philox import uniform_rows

VALIDATION = 0.1


def nested_sample(total: int, count: int | None, *, seed: int) -> np.ndarray:
    """`count` of `total` indices in rising order, int64 (count,); None: all of them. A smaller sample lies within a larger one of the same seed.

    Raises: ValueError when more rows are asked for than there are.
    """
    if count is None:
        return np.arange(total)
    if count > total:
        raise ValueError(f"asked for {count} rows of {total}")
    rank = uniform_rows(np.arange(total, dtype=np.int64), seed=seed, purpose="sample")
    return np.sort(np.argsort(rank, kind="stable")[:count])


def ranked(ids: np.ndarray, *, seed: int, purpose: str) -> np.ndarray:
    """Indices of ids (N,) in an order that each id's own draw gives it, whatever the others are and how they are listed."""
    return np.lexsort((ids, uniform_rows(ids, seed=seed, purpose=purpose)))


def drawn(ids: np.ndarray, count: int, *, seed: int, purpose: str) -> np.ndarray:
    """`count` indices of ids (N,) in rising order; a smaller draw lies within a larger one of the same seed.

    Raises: ValueError when more are asked for than there are.
    """
    if count > len(ids):
        raise ValueError(f"{len(ids)} {purpose}, expected at least {count}; ask for fewer")
    return np.sort(ranked(ids, seed=seed, purpose=purpose)[:count])


def splits(ids: np.ndarray, counts: tuple[int, int, int], *, seed: int) -> dict[str, np.ndarray]:
    """Indices of disjoint rows `train`, `val` and `test`, as many as `counts` says, of ids (N,).

    Test rows are the first in the order of their draws, validation rows follow, training rows are the last: fewer of
    one kind lie within more of it, for validation rows with as many test rows. Raises: ValueError with too few ids.
    """
    train, val, test = counts
    if train + val + test > len(ids):
        raise ValueError(
            f"{len(ids)} pictures, expected at least {train + val + test} ({train} + {val} + {test}); ask for fewer"
        )
    order = ranked(ids, seed=seed, purpose="splits")
    return {"train": order[len(ids) - train :], "val": order[test : test + val], "test": order[:test]}


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
