"""The link between robustness and interpretability over a population of models: correlations and a verdict on each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rbkit.tools.correlation import (
    COEFFICIENTS,
    DRAWS,
    FLAT,
    SHUFFLES,
    SMALLEST,
    Array,
    bootstrap_counts,
    coefficient,
    fisher_interval,
    percentile_interval,
    shuffles,
    statistics,
    step_down,
)
from rbkit.tools.population import Population, Subject, clean_accuracy, interpretability
from rbkit.tools.statistics import finite_or_none
from rbkit.tools.verdict import verdicts


@dataclass(frozen=True)
class Pair:
    """The columns of one robustness and one interpretability subject over the models that have both."""

    models: list[str]
    x: Array
    y: Array
    held: Array
    runs: int

    def kept(self, kind: str) -> Pair:
        """The same for a coefficient: `partial` needs the clean accuracy too."""
        if kind != "partial" or not np.isnan(self.held).any():
            return self
        known = ~np.isnan(self.held)
        models = [m for m, k in zip(self.models, known, strict=True) if k]
        return Pair(models, self.x[known], self.y[known], self.held[known], self.runs - int((~known).sum()))


def analyse(
    found: Population, robustness: Sequence[Subject], *, seed: int = 0, draws: int = DRAWS, permutations: int = SHUFFLES
) -> list[dict[str, Any]]:
    """A record per population, robustness subject, interpretability subject and coefficient, then the verdicts.

    value, low, high: the coefficient and its 95 % Fisher-z interval; boot_low, boot_high: that of the cluster bootstrap;
    p, p_adjusted: of the permutation test, the family being all that is tested in the population. What cannot be told
    is None, and `reason`, `interval_reason`, `boot_reason` or `p_reason` says why.
    """
    records = []
    for name, models in found.named().items():
        records += _population_records(
            found, name, models, robustness, seed=seed, draws=draws, permutations=permutations
        )
    return records + verdicts(records)


def _population_records(
    found: Population,
    name: str,
    models: list[str],
    robustness: Sequence[Subject],
    *,
    seed: int,
    draws: int,
    permutations: int,
) -> list[dict[str, Any]]:
    targets = [s for s in interpretability(found) if s not in robustness]
    held = clean_accuracy(found, models)
    runs = [found.runs[m] for m in models]
    order = sorted(set(runs))
    counts = bootstrap_counts(len(order), draws=draws, seed=seed)[:, [order.index(r) for r in runs]] if runs else None
    records, tests = [], []
    keys, exact = shuffles(len(models), draws=permutations, seed=seed)
    for source in robustness:
        x = found.column(source, models)
        columns = np.stack([found.column(t, models) for t in targets], 1) if targets else np.empty((len(models), 0))
        tests.append(_test_all(x, columns, held, runs, keys))
        for index, target in enumerate(targets):
            known = ~np.isnan(x) & ~np.isnan(columns[:, index])
            chosen = [m for m, k in zip(models, known, strict=True) if k]
            pair = Pair(chosen, x[known], columns[known, index], held[known], len({found.runs[m] for m in chosen}))
            about = {"population": name, **_about(found, source, target)}
            weights = np.empty((0, 0)) if counts is None else counts[:, known]
            records += [_estimate(pair, kind, weights, held[known]) | about for kind in COEFFICIENTS]
    _add_tests(records, tests, exact=exact)
    return records


def _about(found: Population, source: Subject, target: Subject) -> dict[str, Any]:
    return {
        "kind": "correlation", "robustness": found.label(source), "of": found.label(target),
        "target": target.metric, "method": target.method, "mode": target.mode,
    }  # fmt: skip


def _test_all(x: Array, y: Array, held: Array, runs: list[str], keys: Array) -> tuple[Array, Array]:
    """(observed (K, M), null (B, K, M)) of all coefficients; models that lack a value are left out, column by column.

    The order that a permutation gives to the whole population orders each part of it.
    """
    shape = (len(COEFFICIENTS), y.shape[1])
    observed, null = np.full(shape, np.nan), np.full((len(keys), *shape), np.nan)
    partial = COEFFICIENTS.index("partial")
    if len(x) < SMALLEST or not y.shape[1]:
        return observed, null
    for with_held in (False, True):
        rows = np.array([partial] if with_held else [k for k in range(len(COEFFICIENTS)) if k != partial])
        known = ~np.isnan(x)[:, None] & ~np.isnan(y) & ~(np.isnan(held) & with_held)[:, None]
        for mask in np.unique(known, axis=1).T:
            columns = np.flatnonzero((known == mask[:, None]).all(0))
            kept = [run for run, k in zip(runs, mask, strict=True) if k]
            if len(kept) < SMALLEST or len(set(kept)) < len(kept):
                continue
            fixed = held[mask] if with_held else None
            here = np.arange(len(kept))[None]
            orders = keys[:, mask].argsort(1, kind="stable")
            block = np.ix_(rows, columns)
            observed[block] = statistics(x[mask], y[mask][:, columns], fixed, here)[0][rows]
            null[:, rows[:, None], columns[None]] = statistics(x[mask], y[mask][:, columns], fixed, orders)[:, rows]
    return observed, null


def _add_tests(records: list[dict[str, Any]], tests: list[tuple[Array, Array]], *, exact: bool) -> None:
    """Put the corrected p-values of the family, all tests together, into its records, which are in the same order."""
    if not records:
        return
    observed = np.concatenate([o.T.ravel() for o, _ in tests])
    null = np.concatenate([n.transpose(0, 2, 1).reshape(len(n), -1) for _, n in tests], 1)
    raw, adjusted = step_down(observed, null, exact=exact)
    family = int((~np.isnan(raw)).sum())
    for record, p, corrected in zip(records, raw, adjusted, strict=True):
        record |= {
            "p": finite_or_none(float(p)),
            "p_adjusted": finite_or_none(float(corrected)),
            "family": family,
            "exact": exact,
        }
        if record["p"] is None:
            record["p_reason"] = _untested(record)


def _untested(record: dict[str, Any]) -> str:
    if record["value"] is None:
        return str(record["reason"])
    if record["n"] < SMALLEST:
        return f"{record['n']} models: fewer than {SMALLEST} have too few orders for a p-value below 0.05"
    if record["runs"] < record["n"]:
        return "several models of one training run are not independent"
    return "not defined under permutation"


def _estimate(whole: Pair, kind: str, counts: Array, held: Array) -> dict[str, Any]:
    """A coefficient with both intervals."""
    pair = whole.kept(kind)
    record: dict[str, Any] = {"metric": kind, "value": None, "low": None, "high": None, "n": len(pair.models)}
    record |= {"unit": "correlation", "better": "higher", "runs": pair.runs, "boot_low": None, "boot_high": None}
    reason = _undefined(pair, kind)
    if reason is not None:
        return record | {"reason": reason}
    value = coefficient(kind, pair.x, pair.y, pair.held)
    if not np.isfinite(value):
        return record | {"reason": "the metric or the robustness follows from clean accuracy alone"}
    record["value"] = float(value)
    if kind == "partial":
        record["accuracy"] = float(coefficient("pearson", pair.x, pair.held))
        counts = counts[:, ~np.isnan(held)]
    return record | _over_models(pair, kind, value) | _over_runs(pair, kind, counts)


def _over_models(pair: Pair, kind: str, value: Array) -> dict[str, Any]:
    """Fisher's interval, which takes models for independent."""
    n = len(pair.models)
    low, high = fisher_interval(kind, value, n)
    if pair.runs < n:
        return {"interval_reason": "several models of one training run are not independent; see boot_low and boot_high"}
    if np.isfinite(low):
        return {"low": float(low), "high": float(high)}
    few = f"too few models: {n}"
    return {"interval_reason": few if abs(value) < 1 - FLAT else "no interval at a correlation of 1"}


def _over_runs(pair: Pair, kind: str, counts: Array) -> dict[str, Any]:
    """The interval of the cluster bootstrap; counts (draws, n): how often each model is in each draw."""
    low, high = percentile_interval(coefficient(kind, pair.x, pair.y, pair.held, counts))
    if pair.runs < 3 or not np.isfinite(low):
        return {"boot_reason": f"too few training runs: {pair.runs}"}
    return {"boot_low": float(low), "boot_high": float(high)}


def _undefined(pair: Pair, kind: str) -> str | None:
    """Why a coefficient has no value, or None."""
    least = 4 if kind == "partial" else 3
    if kind == "partial" and not len(pair.models):
        return "the clean accuracy is not known"
    if len(pair.models) < least:
        return f"{len(pair.models)} models have both values; {least} are needed"
    sides = [("robustness", pair.x), ("the metric", pair.y), ("clean accuracy", pair.held)]
    for name, values in sides[: 3 if kind == "partial" else 2]:
        if np.isnan(coefficient("pearson", values, values)):
            return f"{name} is the same for all models"
    return None
