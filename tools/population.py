"""A population of models, gathered from records of rb-score: who is a control, what each value is of.

`gather` makes one, `choose` picks what stands for robustness in it. Values are turned so that higher is better, by the
direction that each metric has had from the start.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rbkit.tools.compare import ONE_OF_ALL, ROBUSTNESS, SANITY
from rbkit.tools.correlation import Array

CONTROLS = ("noise", "gradient-penalty")  # training methods that are controls by themselves
MAIN, ALL = "main", "with controls"


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
        """Values of a subject (n,), one per model, higher being better; NaN where a model has none."""
        known, sign = self.values.get(subject, {}), self.sign(subject)
        return np.array([sign * known[m]["value"] if m in known else np.nan for m in models])

    def sign(self, subject: Subject) -> float:
        """1 where higher is better, -1 where lower is."""
        return 1.0 if self.better(subject) == "higher" else -1.0

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


def gather(
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
