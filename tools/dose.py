"""Dose and response: how a quantity moves with the radius of training, without assuming more than one direction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import isotonic_regression

from rbkit.tools.correlation import FLAT, Array, bootstrap_counts, percentile_interval
from rbkit.tools.population import MAIN, Population, Subject, trained_radius
from rbkit.tools.statistics import finite_or_none

LEVELS = 3  # doses below which the half-effect dose is no more than the middle of two
DRAWS = 1000  # of the cluster bootstrap
DEFINED = 0.9  # share of bootstrap draws that must have a half-effect dose for it to get an interval


@dataclass(frozen=True)
class Dose:
    """A fitted curve over the doses, float64 (K,) each, and the dose at which half of its whole change is reached.

    mean: of the models at that dose. low, high: of the fit; NaN where no band can be told. half is None where the fit
    is flat, half_low and half_high where too few draws have one (`defined` is their share). change: of the mean from
    first to last dose, without the fit, with its interval, NaN where too few draws hold both ends.
    """

    doses: Array
    mean: Array
    fit: Array
    low: Array
    high: Array
    rises: bool
    half: float | None
    half_low: float | None
    half_high: float | None
    defined: float
    change: float
    change_low: float
    change_high: float


def level_means(dose: Array, response: Array, weights: Array) -> tuple[Array, Array, Array]:
    """(doses, means, weights) of the distinct doses that have weight. Shapes: (n,) each in, (K,) each out."""
    doses, where = np.unique(dose, return_inverse=True)
    total = np.bincount(where, weights, len(doses))
    sums = np.bincount(where, weights * response, len(doses))
    kept = total > 0
    return doses[kept], sums[kept] / total[kept], total[kept]


def monotone_fit(means: Array, weights: Array, *, rises: bool) -> Array:
    """Weighted least-squares fit (K,) that never turns back (Barlow et al. 1972; Best and Chakravarti 1990)."""
    found: Array = isotonic_regression(means, weights=weights, increasing=rises).x
    return found


def direction(means: Array, weights: Array) -> bool:
    """Whether a rising fit leaves a smaller sum of squares than a falling one, over (K,); a tie counts as rising."""
    left = [
        float((weights * (means - monotone_fit(means, weights, rises=rises)) ** 2).sum()) for rises in (True, False)
    ]
    return left[0] <= left[1]


def half_effect(doses: Array, fit: Array) -> float | None:
    """The smallest dose at which the fit, joined by lines, has made half of its change from first to last dose.

    Shapes: (K,) each, doses rising. None where the fit is flat.
    """
    change = fit[-1] - fit[0]
    if abs(change) <= FLAT * np.abs(fit).max():
        return None
    share = (fit - fit[0]) / change
    after = int(np.argmax(share >= 0.5))
    before = after - 1
    step = (0.5 - share[before]) / (share[after] - share[before])
    return float(doses[before] + step * (doses[after] - doses[before]))


def dose_response(dose: Array, response: Array, weights: Array, *, confidence: float = 0.95) -> Dose:
    """Isotonic regression of a response on a dose, with a percentile band over resampled training runs.

    Shapes: dose and response float64 (n,), one per model; weights (draws, n): how often each model is in each draw of
    the cluster bootstrap (Davison and Hinkley 1997, section 3.8). The direction is chosen once, from all models. A
    draw without the lowest or the highest dose has neither a half-effect dose nor a change. Raises: ValueError below two distinct doses.
    """
    doses, means, counts = level_means(dose, response, np.ones(len(dose)))
    if len(doses) < 2:
        raise ValueError("a dose-response curve needs two doses at least")
    rises = direction(means, counts)
    fit = monotone_fit(means, counts, rises=rises)
    curves = np.full((len(weights), len(doses)), np.nan)
    halves, changes = np.full(len(weights), np.nan), np.full(len(weights), np.nan)
    for draw, row in enumerate(weights):
        levels, drawn, total = level_means(dose, response, row)
        if not len(levels):
            continue
        curve = monotone_fit(drawn, total, rises=rises)
        curves[draw] = np.interp(doses, levels, curve)
        if levels[0] == doses[0] and levels[-1] == doses[-1]:
            found = half_effect(levels, curve)
            halves[draw] = np.nan if found is None else found
            changes[draw] = drawn[-1] - drawn[0]
    low, high = percentile_interval(curves, confidence=confidence)
    bounds = percentile_interval(halves, confidence=confidence, usable=DEFINED)
    half_low, half_high = (None if np.isnan(bound) else float(bound) for bound in bounds)
    defined = float((~np.isnan(halves)).mean())
    change_low, change_high = map(float, percentile_interval(changes, confidence=confidence, usable=DEFINED))
    return Dose(
        doses, means, fit, low, high, rises, half_effect(doses, fit), half_low, half_high, defined,
        float(means[-1] - means[0]), change_low, change_high,
    )  # fmt: skip


def dose_responses(found: Population, subjects: Sequence[Subject], *, seed: int = 0) -> list[dict[str, Any]]:
    """How each subject moves over the radius of training, controls left out: a record per norm and subject.

    value, low, high: the half-effect radius with its bootstrap interval, None where the change from the first to the
    last radius is not told from 0 (change, change_low, change_high); eps, mean, fit, fit_low, fit_high: the curve;
    improves: whether it moves in the direction that is better.
    """
    models = found.named()[MAIN]
    dosed = {m: eps for m in models if (eps := trained_radius(found.about[m])) is not None}
    norms = sorted({str(found.about[m].get("train_norm")) for m, eps in dosed.items() if eps})
    records = []
    for norm in norms:
        members = [m for m, eps in dosed.items() if not eps or str(found.about[m].get("train_norm")) == norm]
        runs = sorted({found.runs[m] for m in members})
        counts = bootstrap_counts(len(runs), draws=DRAWS, seed=seed)
        weights = counts[:, [runs.index(found.runs[m]) for m in members]]
        for subject in subjects:
            records.append(_dose_record(found, subject, members, dosed, weights) | {"norm": norm})
    return records


def _dose_record(
    found: Population, subject: Subject, members: list[str], dosed: Mapping[str, float], weights: Array
) -> dict[str, Any]:
    response = found.column(subject, members)
    known = ~np.isnan(response)
    dose = np.array([dosed[m] for m in members])[known]
    record: dict[str, Any] = {
        "metric": "half_effect_eps", "value": None, "low": None, "high": None, "n": int(known.sum()), "unit": "pixels",
        "better": "lower", "kind": "dose_response", "of": found.label(subject), "target": subject.metric,
        "method": subject.method, "mode": subject.mode,
    }  # fmt: skip
    if len(np.unique(dose)) < LEVELS:
        return record | {"reason": f"{len(np.unique(dose))} radii of training; {LEVELS} are needed"}
    curve = dose_response(dose, response[known], weights[:, known])
    return record | _curve(curve, found.sign(subject))


def _curve(curve: Dose, sign: float) -> dict[str, Any]:
    """A curve in the metric's own units as fields of a record."""
    low, high = (curve.low, curve.high) if sign > 0 else (curve.high, curve.low)
    ends = sorted((curve.change_low * sign, curve.change_high * sign))
    found: dict[str, Any] = {
        "value": curve.half, "low": curve.half_low, "high": curve.half_high, "defined": curve.defined,
        "improves": None if curve.half is None else curve.rises, "change": sign * curve.change,
        "change_low": finite_or_none(float(ends[0])), "change_high": finite_or_none(float(ends[1])), "eps": curve.doses.tolist(),
        "mean": (sign * curve.mean).tolist(), "fit": (sign * curve.fit).tolist(),
        "fit_low": [finite_or_none(float(sign * v)) for v in low], "fit_high": [finite_or_none(float(sign * v)) for v in high],
    }  # fmt: skip
    nothing = {"value": None, "low": None, "high": None, "improves": None}
    if curve.half is None:
        return found | nothing | {"reason": "the fit is flat"}
    if ends[0] <= 0 <= ends[1]:
        return found | nothing | {"reason": "the change from the first to the last radius is not told from 0"}
    if curve.half_low is None:
        found["interval_reason"] = f"only {curve.defined:.0%} of the bootstrap draws have a half-effect radius"
    return found
