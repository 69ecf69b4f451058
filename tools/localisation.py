"""Localisation: does the map point at the object, where a mask tells where that is?"""

from __future__ import annotations

from torch import Tensor

from rbkit.tools.batch import Batch, defined


def _usable_mask(batch: Batch) -> tuple[Tensor, Tensor]:
    """(mask bool (N, H W), rows with a mask that is neither empty nor full)."""
    assert batch.mask is not None
    inside = batch.mask.flatten(1) > 0
    return inside, inside.any(1) & ~inside.all(1)


def relevance_mass(batch: Batch) -> Tensor:
    """Share of the positive relevance inside the mask (Arras et al. 2022); NaN without positive relevance."""
    inside, valid = _usable_mask(batch)
    positive = batch.maps.flatten(1).double().clamp_min(0)
    total = positive.sum(1)
    return defined(valid & (total > 0), (positive * inside).sum(1) / total.clamp_min(1e-300))


def relevance_rank(batch: Batch) -> Tensor:
    """Share of the k highest locations that lie inside a mask of k locations (Arras et al. 2022); ties count in part."""
    inside, valid = _usable_mask(batch)
    maps = batch.maps.flatten(1)
    k = inside.sum(1)
    bar = maps.sort(1, descending=True).values.gather(1, (k - 1).clamp_min(0)[:, None])
    above, equal = maps > bar, maps == bar
    share = (k - above.sum(1)).double() / equal.sum(1).clamp_min(1)
    hits = (above & inside).sum(1) + share * (equal & inside).sum(1)
    return defined(valid, hits / k.clamp_min(1))


def pointing_game(batch: Batch) -> Tensor:
    """Whether the highest location lies in the mask (Zhang et al. 2018); ties count in part, empty masks not."""
    inside, valid = _usable_mask(batch)
    maps = batch.maps.flatten(1)
    highest = maps == maps.amax(1, keepdim=True)
    return defined(valid, (highest & inside).sum(1) / highest.sum(1))


def cue_mass(batch: Batch) -> Tensor:
    """Share of the absolute relevance that lies on a planted cue (rb-data shapes --cue); a gradient there has both signs."""
    assert batch.cue_mask is not None
    size = batch.maps.flatten(1).double().abs()
    total = size.sum(1)
    return defined(total > 0, (size * (batch.cue_mask.flatten(1) > 0)).sum(1) / total.clamp_min(1e-300))
