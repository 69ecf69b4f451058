"""Pooling: values per example, gathered over streams, become records with intervals and chance bands.

A pool holds what agrees in kind, model, attack or method and parameters. Merging is joining: any partition of the
examples gives the same records, because sums do not depend on order beyond rounding and bootstrap weights are keyed
by example.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import scipy
import torch
from torch import Tensor

from rbkit.tools.frechet import extrapolated, frechet
from rbkit.tools.metrics import METRICS, OF_SETS
from rbkit.tools.statistics import Interval, bootstrap_means, bootstrap_median, wilson, z_score

AGREEMENTS = {  # between two ways to remove a pixel
    "insertion_agreement": ("insertion", "insertion_mean"),
    "deletion_agreement": ("deletion", "deletion_mean"),
    "road_agreement": ("deletion", "road_morf"),
}


class Column:
    """Rows that come in parts, (N, ...) of one dtype on the CPU, in one piece of memory that grows.

    Small pieces that stay, between large blocks that come and go, leave holes that no block fits into again: of 64,000
    rows judged, 2 GiB. A view of what was read would keep all of its document.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype, self.data = dtype, bytearray()
        self.shape: tuple[int, ...] = ()

    def add(self, rows: Tensor) -> None:
        """More rows, all of one shape."""
        self.shape = tuple(rows.shape[1:])
        self.data += rows.to("cpu", self.dtype).contiguous().numpy().tobytes()

    def tensor(self) -> Tensor:
        """All rows in order of arrival, copied."""
        rows = torch.frombuffer(self.data, dtype=self.dtype) if self.data else torch.empty(0, dtype=self.dtype)
        return rows.reshape(-1, *self.shape).clone()


@dataclass
class Pool:
    """Values of one subject: `about` says what they are of; `columns` (N,) float64 by metric, `metric@reference`.

    `features` (N, D) float32 are of sets of images: `generated`, `real`, `start`.
    """

    about: dict[str, Any]
    ids: Column = field(default_factory=lambda: Column(torch.int64))
    columns: dict[str, Column] = field(default_factory=dict)
    features: dict[str, Column] = field(default_factory=dict)
    totals: dict[str, int | None] = field(default_factory=dict)
    seen: set[int] = field(default_factory=set)
    first: int = 0

    def add(
        self,
        ids: Tensor,
        columns: dict[str, Tensor],
        *,
        origin: str,
        total: int | None,
        first: int,
        features: dict[str, Tensor] | None = None,
    ) -> None:
        """More examples. Raises: ValueError when an id is already here, or other metrics are given than before."""
        fresh = set(ids.tolist())
        twice = fresh & self.seen
        if twice or len(fresh) != len(ids):
            shown = min(twice) if twice else "one"
            raise ValueError(f"id {shown} appears twice among rows of the same model, attack and parameters")
        given, known = {*columns, *(features or {})}, {*self.columns, *self.features}
        if self.totals and given != known:
            odd = sorted(given ^ known)
            raise ValueError(
                f"streams of one pool differ in what can be scored ({', '.join(odd[:3])}); score them apart"
            )
        if not self.totals:
            self.first = first
        self.seen |= fresh
        self.ids.add(ids)
        for name, values in columns.items():
            self.columns.setdefault(name, Column(torch.float64)).add(values)
        for name, values in (features or {}).items():
            self.features.setdefault(name, Column(torch.float32)).add(values)
        self.totals[origin] = total

    @property
    def complete(self) -> bool:
        """Whether all rows that the streams announce are here; unknown totals count as complete."""
        known = [t for t in self.totals.values() if t is not None]
        return len(self.seen) >= sum(known)

    def joined(self) -> tuple[Tensor, dict[str, Tensor]]:
        """(ids, columns) with rows in order of id, so that records do not depend on the order of arrival.

        Columns are in order of name, in which a stream of scores holds them.
        """
        ids = self.ids.tensor()
        order = ids.argsort()
        return ids[order], {name: column.tensor()[order] for name, column in sorted(self.columns.items())}

    def joined_features(self) -> dict[str, Tensor]:
        """Features of the sets with rows in order of id."""
        order = self.ids.tensor().argsort()
        return {name: column.tensor()[order] for name, column in self.features.items()}

    def records(self, *, confidence: float = 0.95) -> list[dict[str, Any]]:
        """A record per metric."""
        if not self.columns:
            return self._distances()
        ids, columns = self.joined()
        names = [name for name in METRICS if name in columns]
        means = dict(
            zip(
                columns,
                bootstrap_means(ids, torch.stack([_finite(*c) for c in columns.items()], 1), confidence=confidence),
                strict=True,
            )
        )
        found = []
        for name in names:
            interval = means[name]
            if METRICS[name].share:
                values = columns[name][~columns[name].isnan()]
                interval = wilson(int(values.sum()), len(values), confidence=confidence)
            if METRICS[name].median:
                interval = bootstrap_median(ids, columns[name], confidence=confidence)
            found.append(self._record(name, interval, columns) | _band(name, columns, means))
        agreements = [r for name in AGREEMENTS if (r := self._agreement(name, columns)) is not None]
        return found + agreements + self._distances()

    def _distances(self) -> list[dict[str, Any]]:
        """The Fréchet distance of generated to real images, and as its `floor` that of the images begun with."""
        if not self.features:
            return []
        entry, sets = OF_SETS["frechet_distance"], self.joined_features()
        made, real = sets["generated"], sets["real"]
        n, size = made.shape
        record: dict[str, Any] = {
            "metric": "frechet_distance", "value": None, "low": None, "high": None, "n": n, "unit": entry.unit,
            "better": entry.better, "source": entry.source, "complete": self.complete, "dimensions": size,
            "rank_deficient": n <= size, "floor": None, "extrapolated": None, "extractor": self.about.get("judge"), **self.about,
        }  # fmt: skip
        if n < 2:
            return [record | {"reason": "fewer than 2 examples"}]
        floor = frechet(sets["start"], real) if "start" in sets else None
        ids = self.ids.tensor().sort().values
        return [record | {"value": frechet(made, real), "floor": floor, "extrapolated": extrapolated(ids, made, real)}]

    def _record(self, name: str, interval: Interval, columns: dict[str, Tensor]) -> dict[str, Any]:
        entry = METRICS[name]
        excluded = int(columns[name].isnan().sum())
        record: dict[str, Any] = {
            "metric": name, "value": interval.value, "low": interval.low, "high": interval.high, "n": interval.n,
            "unit": entry.unit, "better": entry.better, "excluded": excluded, "source": entry.source,
            "complete": self.complete, **self.about,
        }  # fmt: skip
        if entry.median:
            record["statistic"] = "median"
        if interval.value is None:
            record["reason"] = "not defined for any example" if interval.n == 0 else "infinite"
        return record

    def _agreement(self, name: str, columns: dict[str, Tensor]) -> dict[str, Any] | None:
        """Rank correlation over examples between two imputations of the same curve."""
        pair = AGREEMENTS[name]
        if not set(pair) <= set(columns):
            return None
        both = torch.stack([columns[key] for key in pair], 1)
        both = both[~both.isnan().any(1)]
        value = (
            float(scipy.stats.spearmanr(both[:, 0], both[:, 1]).statistic)
            if len(both) > 2 and bool((both.std(0) > 0).all())
            else None
        )
        record = {
            "metric": name, "value": value, "low": None, "high": None, "n": len(both),
            "unit": "rank correlation", "better": "higher", "source": "Tomsett et al. 2020", "complete": self.complete, **self.about,
        }  # fmt: skip
        return record if value is not None else record | {"reason": "too few or constant values"}


def _finite(name: str, values: Tensor) -> Tensor:
    """Values to be averaged; those of a metric that is pooled by its median may be infinite and are not."""
    return torch.where(values.isinf(), torch.nan, values) if METRICS[name.partition("@")[0]].median else values


def _band(name: str, columns: dict[str, Tensor], means: dict[str, Interval]) -> dict[str, Any]:
    """Chance values from the same images, and how far from the random map: z and win rate, paired by example."""
    references = {key.partition("@")[2]: key for key in columns if key.startswith(f"{name}@")}
    if not references:
        return {}
    band = {short: means[key].value for short, key in references.items()}
    sign = 1.0 if METRICS[name].better == "higher" else -1.0
    gain = sign * (columns[name] - columns[references["random"]])
    gain = gain[~gain.isnan()]
    if len(gain) < 2:
        return {"band": band, "z": None, "win_rate": None}
    wins = ((gain > 0).double() + 0.5 * (gain == 0).double()).mean()
    error = float(gain.std()) / len(gain) ** 0.5
    return {"band": band, "z": z_score(float(gain.mean()), 0.0, error), "win_rate": float(wins)}


class Pools:
    """Pools by what they are about."""

    def __init__(self) -> None:
        self.pools: dict[str, Pool] = {}

    def of(self, about: dict[str, Any]) -> Pool:
        """The pool for `about`, made where there is none."""
        return self.pools.setdefault(json.dumps(about, sort_keys=True), Pool(dict(sorted(about.items()))))

    def records(self, *, confidence: float = 0.95) -> list[dict[str, Any]]:
        """Records of all pools, then those of the worst case over attacks of the same ball."""
        own = [record for pool in self.pools.values() for record in pool.records(confidence=confidence)]
        return own + [
            r for pool in self._worst() for r in pool.records(confidence=confidence) if r["metric"] == "robust_accuracy"
        ]

    def _worst(self) -> list[Pool]:
        """The pointwise worst case over attacks on the same model, norm and eps."""
        families: dict[str, list[Pool]] = {}
        for pool in self.pools.values():
            if "robust_accuracy" in pool.columns:
                key = json.dumps([pool.about.get(k) for k in ("model_sha", "norm", "eps")])
                families.setdefault(key, []).append(pool)
        return [_pointwise(family) for family in families.values() if len(family) > 1 and _same_rows(family)]


def _same_rows(family: list[Pool]) -> bool:
    return all(pool.seen == family[0].seen for pool in family)


def _pointwise(family: list[Pool]) -> Pool:
    about = {
        **family[0].about,
        "attack": "worst",
        "params": {"over": sorted(str(p.about.get("attack")) for p in family)},
    }
    joined = [pool.joined() for pool in family]
    worst = torch.stack([columns["robust_accuracy"] for _, columns in joined]).amin(0)
    pool = Pool(about, first=family[0].first)
    total = None if any(None in p.totals.values() for p in family) else sum(t or 0 for t in family[0].totals.values())
    pool.add(joined[0][0], {"robust_accuracy": worst}, origin="worst", total=total, first=family[0].first)
    return pool
