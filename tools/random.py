"""Random tensors keyed by (seed, purpose, example id, draw): the same in any order, batch, shard or device.

Uniform numbers are bit-equal everywhere; normal ones agree to 1e-6 (they pass through log and cos in float64).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from rbkit.tools.philox import MASK, key_of, philox

SHARED = 1 << 15  # counters: torch shares as many and more among its threads, and is faster than numpy only then


def words(ids: Tensor, count: int, *, seed: int, purpose: str, draw: int | Tensor = 0) -> Tensor:
    """32-bit words as int64 (N, count): row i is a function of (seed, purpose, ids[i], draw).

    Shapes: ids (N,) int64; draw an int below 2**32 or (N,) int64.
    """
    blocks = -(-count // 4)
    position = torch.arange(blocks, device=ids.device)
    # Filled, not copied: a copy to a GPU would wait for all that it has to do.
    number = draw if isinstance(draw, Tensor) else torch.full((1,), draw, dtype=torch.int64, device=ids.device)
    number = number.to(ids.device, torch.int64).expand(len(ids))[:, None]
    low, high = (ids & MASK)[:, None], ((ids >> 32) & MASK)[:, None]
    c0, c1, c2, c3 = (c.expand(len(ids), blocks) for c in (position, number, low, high))
    key = key_of(seed, purpose)
    shared = len(ids) * blocks >= SHARED and torch.get_num_threads() > 1
    if ids.device.type == "cpu" and not shared:
        out = torch.from_numpy(np.stack(philox((c0.numpy(), c1.numpy(), c2.numpy(), c3.numpy()), key), axis=2))
    else:
        out = torch.stack(philox((c0, c1, c2, c3), key), dim=2)
    return out.reshape(len(ids), 4 * blocks)[:, :count]


def uniform(ids: Tensor, shape: Sequence[int], *, seed: int, purpose: str, draw: int | Tensor = 0) -> Tensor:
    """Uniform numbers in [0, 1) with 24 bits, float32 (N, *shape)."""
    bits = words(ids, math.prod(shape), seed=seed, purpose=purpose, draw=draw)
    return ((bits >> 8).to(torch.float32) * 2.0**-24).reshape(len(ids), *shape)


def normal(ids: Tensor, shape: Sequence[int], *, seed: int, purpose: str, draw: int | Tensor = 0) -> Tensor:
    """Standard normal numbers, float32 (N, *shape), by Box and Muller (1958) on two words each."""
    count = math.prod(shape)
    pairs = -(-count // 2)
    bits = words(ids, 2 * pairs, seed=seed, purpose=purpose, draw=draw)
    radius = bits[:, :pairs].to(torch.float64).add_(0.5).mul_(2.0**-32).log_().mul_(-2.0).sqrt_()
    angle = bits[:, pairs:].to(torch.float64).mul_(2.0 * math.pi * 2.0**-32)
    both = torch.cat([radius * torch.cos(angle), radius.mul_(angle.sin_())], dim=1)
    return both[:, :count].to(torch.float32).reshape(len(ids), *shape)


def integers(ids: Tensor, high: int, *, seed: int, purpose: str, draw: int | Tensor = 0) -> Tensor:
    """One integer in [0, high) per id, int64 (N,); `high` up to 2**20, where the bias is below 2**-12."""
    bits = words(ids, 1, seed=seed, purpose=purpose, draw=draw)[:, 0]
    return (bits * high) >> 32


def order(ids: Tensor, count: int, *, seed: int, purpose: str, draw: int | Tensor = 0) -> Tensor:
    """A random order of range(count) for each id, int64 (N, count): rising by uniform numbers of 24 bits, equal ones as they come."""
    bits = words(ids, count, seed=seed, purpose=purpose, draw=draw) >> 8
    keys = (bits << 32) | torch.arange(count, device=ids.device)
    if ids.device.type == "cpu":  # where numpy sorts ten times as fast as torch
        return torch.from_numpy(np.sort(keys.numpy(), axis=1)) & MASK
    return keys.sort(dim=1).values & MASK


def permutation(count: int, *, seed: int, purpose: str, draw: int = 0) -> Tensor:
    """A permutation of range(count), int64 (count,), as a function of (seed, purpose, draw)."""
    ids = torch.arange(count)
    bits = words(ids, 2, seed=seed, purpose=purpose, draw=draw)
    return torch.argsort((bits[:, 0] << 31) | (bits[:, 1] >> 1), stable=True)
