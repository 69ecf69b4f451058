"""The link between robustness and interpretability over a population of models: plain records in, plain records out.

`population` gathers records of rb-score, `choose` picks what stands for robustness, `analyse` correlates it with every
interpretability metric, `dose_responses` follows each over the radius of training. Values are turned so that higher is
better before they are correlated, by the direction that each metric has had from the start.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rbkit.tools.compare import ONE_OF_ALL, ROBUSTNESS, SANITY
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
from rbkit.tools.dose import LEVELS, Dose, dose_response

CONTROLS = ("noise", "gradient-penalty")  # training methods that are controls by themselves
LEVEL = 0.05  # of the corrected p-values that verdicts rest on
NEGLIGIBLE = 0.3  # correlation below which a metric is said not to rise: Cohen's medium effect (Cohen 1988)
DOSE_DRAWS = 1000
MAIN, ALL = "main", "with controls"
RISES, NOT, ONLY, OPEN = "rises", "does not rise", "only because accuracy falls", "open"


# --------------------------------------------------------------------------------------------------- population


@dataclass(frozen=True)
class Subject:
    """What a value is of, apart from the model. params: canonical JSON, without the seed and the radius."""

    metric: str
    kind: str | None = None
    attack: str | None = None
    norm: str | None = None
    eps: float | None = None
    method: str | None = None
    mode: str | None = None
    reduce: str | None = None
    crafted_on: str | None = None
    target: str | None = None
    params: str = "{}"

    @property
    def short(self) -> str:
        """The metric and what it was measured with, such as `insertion, ig` or `robust_accuracy, pgd l2 0.5`."""
        ball = None if self.attack is None else f"{self.attack} {self.norm} {self.eps:g}"
        source = None if self.crafted_on is None else f"made on {self.crafted_on[:8]}"
        parts = (None if self.metric in ONE_OF_ALL else self.method, self.mode, ball, source)
        return ", ".join([self.metric, *(part for part in parts if part)])


def subject_of(record: Mapping[str, Any]) -> Subject:
    """What a record is of. Seeds do not count: a population may be judged with one seed per model."""
    params = {k: v for k, v in (record.get("params") or {}).items() if k not in ("seed", "eps")}
    crafted = record.get("crafted_on")
    if record["metric"] in ONE_OF_ALL:  # of the model and the images alone
        return Subject(record["metric"], record.get("kind"))
    return Subject(
        record["metric"], kind=record.get("kind"), attack=record.get("attack"), norm=record.get("norm"), eps=record.get("eps"),
        method=record.get("method"), mode=record.get("mode"), reduce=record.get("reduce"),
        crafted_on=None if crafted == record["model_sha"] else crafted, target=record.get("label"),
        params=json.dumps(params, sort_keys=True),
    )  # fmt: skip


@dataclass
class Population:
    """Models by digest, in order of it: what is known of each, its training run, its control, its values.

    about: one record of each model. runs: training runs, the clusters of the bootstrap. controls: the control that a
    model belongs to, where it does. values: records by subject and model.
    """

    about: dict[str, dict[str, Any]] = field(default_factory=dict)
    runs: dict[str, str] = field(default_factory=dict)
    controls: dict[str, str] = field(default_factory=dict)
    values: dict[Subject, dict[str, dict[str, Any]]] = field(default_factory=dict)

    def column(self, subject: Subject, models: Sequence[str]) -> Array:
        """Values of a subject, higher being better; NaN where a model has none."""
        known = self.values.get(subject, {})
        sign = 1.0 if self.better(subject) == "higher" else -1.0
        return np.array([sign * known[m]["value"] if m in known else np.nan for m in models])

    def better(self, subject: Subject) -> str:
        """The direction that the metric's records say."""
        return str(next(iter(self.values[subject].values()))["better"])

    def label(self, subject: Subject) -> str:
        """`Subject.short`, with the parameters that tell it from others that would be called the same."""
        alike = [s for s in self.values if s.short == subject.short]
        if len(alike) < 2:
            return subject.short
        facts = [json.loads(s.params) | {"reduce": s.reduce, "labels": s.target, "kind": s.kind} for s in alike]
        keys = sorted({k for f in facts for k in f if len({json.dumps(g.get(k)) for g in facts}) > 1})
        return subject.short + "".join(f", {k} {facts[alike.index(subject)].get(k)}" for k in keys)

    def named(self) -> dict[str, list[str]]:
        """The populations that are analysed: without controls, with all, and with all but one control."""
        names = sorted(set(self.controls.values()))
        everyone = list(self.about)
        found = {MAIN: [m for m in everyone if m not in self.controls]}
        if names:
            found[ALL] = everyone
        if len(names) > 1:
            found |= {f"without {name}": [m for m in everyone if self.controls.get(m) != name] for name in names}
        return found


def population(
    records: Iterable[Mapping[str, Any]],
    *,
    controls: Mapping[str, str] | None = None,
    run: str = "model_sha",
    incomplete: bool = False,
) -> Population:
    """Gather records of rb-score.

    A model is a control if `controls` names it (digest to name), its records have a field `control`, or its training
    method is one of CONTROLS. run: the field that tells training runs apart. Raises: ValueError when two records of one
    model and subject differ, when records of one metric disagree on which direction is better, and on records that are
    not complete unless `incomplete`.
    """
    found = Population()
    for record in sorted(records, key=lambda r: str(r["model_sha"])):
        sha, shown = record["model_sha"], f"{record['metric']} of model {str(record['model_sha'])[:8]}"
        if record.get("complete") is False and not incomplete:
            raise ValueError(f"{shown}: fewer rows were judged than the stream has; judge all of them")
        about = found.about.setdefault(sha, dict(record))
        name = (controls or {}).get(sha) or record.get("control")
        if name is None and about.get("train_method") in CONTROLS:
            name = about["train_method"]
        if name is not None:
            found.controls[sha] = str(name)
        found.runs.setdefault(sha, str(record.get(run)))
        if record["value"] is not None:
            _keep(found, dict(record), shown)
    return found


def _keep(found: Population, record: dict[str, Any], shown: str) -> None:
    subject = subject_of(record)
    known = found.values.setdefault(subject, {})
    other = known.get(record["model_sha"])
    if other is not None and any(other.get(k) != record.get(k) for k in ("value", "n")):
        raise ValueError(
            f"{shown} ({subject.short}): {other['value']:g} on {other['n']} rows and {record['value']:g} on {record['n']}; "
            "expected one value"
        )
    if known and record["better"] != found.better(subject):
        raise ValueError(f"{shown}: {record['better']} is better here, {found.better(subject)} in other records")
    known[record["model_sha"]] = record


def clean_accuracy(found: Population, models: Sequence[str]) -> Array:
    """Clean accuracy of each model (n,), NaN where unknown: of attacked streams before others, then of the most rows."""
    best: dict[str, tuple[bool, int, float]] = {}
    for subject, known in found.values.items():
        if subject.metric != "clean_accuracy":
            continue
        for sha, record in known.items():
            rank = (subject.kind == "adversarial", int(record["n"]), float(record["value"]))
            best[sha] = max(best.get(sha, rank), rank)
    return np.array([best[m][2] if m in best else np.nan for m in models])


def interpretability(found: Population) -> list[Subject]:
    """What is about attributions and inversions, in order of its name; agreement and sanity checks are not."""
    kept = [
        s
        for s in found.values
        if s.kind in ("attributions", "inversions")
        and s.metric not in (*SANITY, *ROBUSTNESS)
        and not s.metric.endswith("_agreement")
    ]
    return sorted(kept, key=found.label)


# ----------------------------------------------------------------------------------------------------- choosing


def choose(found: Population, text: str = "robust_accuracy") -> Subject:
    """What stands for robustness: METRIC, or METRIC@part:..., each part a norm, a radius or the name of an attack.

    Radii that most models have come first, of these the middle one (the lower of two); attack `worst` before others;
    attacks made on another model only where there are no others. Raises: ValueError when nothing fits or more than one
    thing does.
    """
    metric, _, rest = text.partition("@")
    fitting = [s for s in found.values if s.metric == metric and s.kind not in ("attributions", "inversions")]
    if not fitting:
        raise ValueError(f"no record of {metric}; there are {_metrics(found)}")
    for part in filter(None, rest.split(":")):
        kept = [s for s in fitting if _fits(s, part)]
        if not kept:
            raise ValueError(f"{text}: nothing has {part!r}; there are {_listed(found, fitting)}")
        fitting = kept
    fitting = _preferred(fitting, lambda s: s.crafted_on is None)
    if len({s.norm for s in fitting}) == 1:
        fitting = _preferred(_middle(found, fitting), lambda s: s.attack == "worst")
    if len(fitting) > 1:
        raise ValueError(f"{text} may be any of {_listed(found, fitting)}; say which, as in {metric}@l2:0.5:pgd")
    return fitting[0]


def _fits(subject: Subject, part: str) -> bool:
    try:
        return subject.eps is not None and math.isclose(subject.eps, float(part), rel_tol=1e-6)
    except ValueError:
        return part in (subject.norm, subject.attack)


def _preferred(subjects: list[Subject], wanted: Callable[[Subject], bool]) -> list[Subject]:
    return [s for s in subjects if wanted(s)] or subjects


def _middle(found: Population, subjects: list[Subject]) -> list[Subject]:
    """Those of the middle radius among the radii that most models were attacked at."""
    radii = {s.eps for s in subjects if s.eps is not None}
    if not radii:
        return subjects
    covered = {eps: len({m for s in subjects if s.eps == eps for m in found.values[s]}) for eps in radii}
    level = sorted(eps for eps in radii if covered[eps] == max(covered.values()))
    return [s for s in subjects if s.eps == level[(len(level) - 1) // 2]]


def _listed(found: Population, subjects: Sequence[Subject]) -> str:
    return "; ".join(sorted(found.label(s) for s in subjects)[:6])


def _metrics(found: Population) -> str:
    return ", ".join(sorted({s.metric for s in found.values})) or "no values at all"


# ---------------------------------------------------------------------------------------------------- analysis


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
        record |= {"p": _plain(p), "p_adjusted": _plain(corrected), "family": family, "exact": exact}
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


def _plain(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None


def _estimate(whole: Pair, kind: str, counts: Array, held: Array) -> dict[str, Any]:
    """A coefficient with both intervals."""
    pair = whole.kept(kind)
    n = len(pair.models)
    reason = _undefined(pair, kind)
    record: dict[str, Any] = {"metric": kind, "value": None, "low": None, "high": None, "n": n}
    record |= {"unit": "correlation", "better": "higher", "runs": pair.runs, "boot_low": None, "boot_high": None}
    if reason is None:
        value = coefficient(kind, pair.x, pair.y, pair.held)
        reason = None if np.isfinite(value) else "the metric or the robustness follows from clean accuracy alone"
    if reason is not None:
        return record | {"reason": reason}
    record["value"] = float(value)
    if kind == "partial":
        record["accuracy"] = float(coefficient("pearson", pair.x, pair.held))
    low, high = fisher_interval(kind, value, n)
    if pair.runs < n:
        record["interval_reason"] = "several models of one training run are not independent; see boot_low and boot_high"
    elif not np.isfinite(low):
        record["interval_reason"] = (
            f"too few models: {n}" if abs(value) < 1 - FLAT else "no interval at a correlation of 1"
        )
    else:
        record |= {"low": float(low), "high": float(high)}
    rows = counts if kind != "partial" else counts[:, ~np.isnan(held)]
    drawn = coefficient(kind, pair.x, pair.y, pair.held, rows)
    low, high = percentile_interval(drawn)
    if pair.runs < 3 or not np.isfinite(low):
        return record | {"boot_reason": f"too few training runs: {pair.runs}"}
    return record | {"boot_low": float(low), "boot_high": float(high)}


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


# ---------------------------------------------------------------------------------------------------- verdicts


def verdicts(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A verdict on each interpretability subject and robustness, from the main population; beside it, those that the
    other populations would give (`elsewhere`)."""
    grouped: dict[tuple[str, str], dict[str, dict[str, Mapping[str, Any]]]] = {}
    for record in records:
        key = (record["robustness"], record["of"])
        grouped.setdefault(key, {}).setdefault(record["population"], {})[record["metric"]] = record
    found = []
    for populations in grouped.values():
        said = {name: verdict(group["pearson"], group["partial"]) for name, group in populations.items()}
        raw, held = populations[MAIN]["pearson"], populations[MAIN]["partial"]
        text, why = said.pop(MAIN)
        found.append({
            **{k: raw[k] for k in ("value", "low", "high", "n", "unit", "better", "robustness", "of", "target", "method", "mode")},
            "metric": "verdict", "kind": "verdict", "verdict": text, "why": why, "p_adjusted": raw["p_adjusted"],
            "partial": held["value"], "partial_low": held["low"], "partial_high": held["high"],
            "partial_p_adjusted": held["p_adjusted"], "elsewhere": {name: other for name, (other, _) in said.items()},
        })  # fmt: skip
    return found


def verdict(raw: Mapping[str, Any], held: Mapping[str, Any]) -> tuple[str, str]:
    """(verdict, why) from the Pearson correlation and the partial one with clean accuracy held fixed.

    `rises`: both are positive and significant after correction. `only because accuracy falls`: the raw one is, the
    partial one is not, and clean accuracy falls with robustness. `does not rise`: the raw one is negative and significant, or its interval ends below NEGLIGIBLE.
    `open` otherwise.
    """
    if raw["value"] is None or raw["p_adjusted"] is None:
        return OPEN, str(raw.get("p_reason") or raw.get("reason"))
    if raw["p_adjusted"] < LEVEL:
        if raw["value"] < 0:
            return NOT, "it falls with robustness"
        if held["p_adjusted"] is None:
            return OPEN, f"it rises, but accuracy cannot be held fixed: {held.get('p_reason')}"
        if held["p_adjusted"] < LEVEL and held["value"] > 0:
            return RISES, "also with clean accuracy held fixed"
        if held["accuracy"] >= 0:
            return OPEN, "not with clean accuracy held fixed, but that does not fall with robustness"
        return ONLY, "with clean accuracy held fixed it is no longer significant"
    if raw["high"] is not None and raw["high"] < NEGLIGIBLE:
        return NOT, f"the interval ends below {NEGLIGIBLE:g}"
    return OPEN, "the interval holds both no and a considerable correlation"


# ----------------------------------------------------------------------------------------------- dose, response


def trained_radius(about: Mapping[str, Any]) -> float | None:
    """The radius that a model was trained in, 0 for standard training, None for a control or an unknown recipe."""
    method, eps = about.get("train_method"), about.get("train_eps")
    if method in CONTROLS or method is None:
        return None
    return float(eps or 0.0)


def summary(found: Population, robustness: Subject) -> dict[str, Any]:
    """Whether there is anything to learn from the population: a record of kind `population`, controls left out.

    value, low, high: mean, least and largest clean accuracy of the models trained without an attack (null where there are
    none); gain: how far the mean robustness at the best radius lies above theirs; best_eps: that radius.
    """
    models = found.named()[MAIN]
    radii = [trained_radius(found.about[m]) for m in models]
    clean, robust = clean_accuracy(found, models), found.column(robustness, models)
    plain = np.array([eps == 0 for eps in radii], dtype=bool)
    at = {
        eps: robust[np.array([r == eps for r in radii]) & np.isfinite(robust)]
        for eps in sorted({r for r in radii if r is not None})
    }
    means = {eps: float(values.mean()) for eps, values in at.items() if len(values)}
    known = clean[plain & np.isfinite(clean)]
    best = max(means, key=lambda eps: means[eps], default=None)
    gain = means[best] - means[0.0] if best is not None and 0.0 in means else None
    return {
        "kind": "population", "metric": "clean_accuracy", "unit": "share", "better": "higher", "n": len(models),
        "value": float(known.mean()) if len(known) else None, "low": float(known.min()) if len(known) else None,
        "high": float(known.max()) if len(known) else None, "robustness": found.label(robustness),
        "gain": gain, "best_eps": best,
        "reason": None if len(known) else "no model was trained without an attack",
    }  # fmt: skip


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
        counts = bootstrap_counts(len(runs), draws=DOSE_DRAWS, seed=seed)
        weights = counts[:, [runs.index(found.runs[m]) for m in members]]
        for subject in subjects:
            records.append(_dose_record(found, subject, members, dosed, weights) | {"norm": norm})
    return records


def _dose_record(
    found: Population, subject: Subject, members: list[str], dosed: Mapping[str, float], weights: Array
) -> dict[str, Any]:
    sign = 1.0 if found.better(subject) == "higher" else -1.0
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
    return record | _curve(curve, sign)


def _curve(curve: Dose, sign: float) -> dict[str, Any]:
    """A curve in the metric's own units as fields of a record."""
    low, high = (curve.low, curve.high) if sign > 0 else (curve.high, curve.low)
    ends = sorted((curve.change_low * sign, curve.change_high * sign))
    found: dict[str, Any] = {
        "value": curve.half, "low": curve.half_low, "high": curve.half_high, "defined": curve.defined,
        "improves": None if curve.half is None else curve.rises, "change": sign * curve.change,
        "change_low": _plain(ends[0]), "change_high": _plain(ends[1]), "eps": curve.doses.tolist(),
        "mean": (sign * curve.mean).tolist(), "fit": (sign * curve.fit).tolist(),
        "fit_low": [_plain(sign * v) for v in low], "fit_high": [_plain(sign * v) for v in high],
    }  # fmt: skip
    nothing = {"value": None, "low": None, "high": None, "improves": None}
    if curve.half is None:
        return found | nothing | {"reason": "the fit is flat"}
    if ends[0] <= 0 <= ends[1]:
        return found | nothing | {"reason": "the change from the first to the last radius is not told from 0"}
    if curve.half_low is None:
        found["interval_reason"] = f"only {curve.defined:.0%} of the bootstrap draws have a half-effect radius"
    return found
