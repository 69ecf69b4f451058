"""Two models on the same images: the difference of every metric, paired by example."""

from __future__ import annotations

import itertools
import json
from typing import Any

import scipy
import torch
from torch import Tensor

from rbkit.tools.metrics import METRICS
from rbkit.tools.pool import Pool, Pools
from rbkit.tools.statistics import bootstrap_means, mcnemar

# What a record says of its model; two pools that differ in nothing else are of the same images and the same question.
OF_MODEL = ("model_sha", "arch", "train_method", "train_norm", "train_eps", "train_seed", "crafted_on")


def _question(pool: Pool) -> str:
    return json.dumps({k: v for k, v in pool.about.items() if k not in OF_MODEL}, sort_keys=True)


def _comparable(first: Pool, second: Pool) -> bool:
    """Two models that met the same adversarial images, or each its own."""
    a, b = first.about, second.about
    if a["model_sha"] == b["model_sha"]:
        return False
    own = all(p.get("crafted_on") == p["model_sha"] for p in (a, b))
    return own or a.get("crafted_on") == b.get("crafted_on")


def differences(pools: Pools, *, confidence: float = 0.95) -> list[dict[str, Any]]:
    """A record per metric and pair of models: second minus first, over the images that both have a value for.

    The interval is a bootstrap of the paired differences. p is McNemar's exact test for shares, else Wilcoxon's
    signed-rank test, which is null where no example differs.
    """
    questions: dict[str, list[Pool]] = {}
    for pool in pools.pools.values():
        questions.setdefault(_question(pool), []).append(pool)
    return [
        record
        for same in questions.values()
        for first, second in itertools.combinations(same, 2)
        if _comparable(first, second)
        for record in _compare(first, second, confidence=confidence)
    ]


def _compare(first: Pool, second: Pool, *, confidence: float) -> list[dict[str, Any]]:
    (ids_a, columns_a), (ids_b, columns_b) = first.joined(), second.joined()
    shared = ids_a[torch.isin(ids_a, ids_b)]
    rows_a, rows_b = torch.searchsorted(ids_a, shared), torch.searchsorted(ids_b, shared)
    names = [name for name in METRICS if name in columns_a and name in columns_b]
    return [
        _record(name, shared, columns_a[name][rows_a], columns_b[name][rows_b], first, second, confidence=confidence)
        for name in names
    ]


def _record(
    name: str, ids: Tensor, a: Tensor, b: Tensor, first: Pool, second: Pool, *, confidence: float
) -> dict[str, Any]:
    known = a.isfinite() & b.isfinite()
    ids, a, b = ids[known], a[known], b[known]
    interval = bootstrap_means(ids, (b - a)[:, None], confidence=confidence)[0]
    test, p = (
        ("McNemar 1947", mcnemar(a > 0.5, b > 0.5)) if METRICS[name].share else ("Wilcoxon 1945", _wilcoxon(b - a))
    )
    record: dict[str, Any] = {
        "metric": f"{name}_difference", "value": interval.value, "low": interval.low, "high": interval.high,
        "n": interval.n, "unit": METRICS[name].unit, "better": METRICS[name].better, "p": p, "source": test,
        "complete": first.complete and second.complete, **second.about, "against": first.about["model_sha"],
    }  # fmt: skip
    return record if interval.value is not None else record | {"reason": "no image has a value under both models"}


def _wilcoxon(difference: Tensor) -> float | None:
    """Two-sided p-value that paired differences (N,) lie around 0; None where all of them are 0."""
    moved = difference[difference != 0]
    return float(scipy.stats.wilcoxon(moved.numpy()).pvalue) if len(moved) else None
