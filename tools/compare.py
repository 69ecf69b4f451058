"""Two models side by side: which metrics separate them beyond their intervals. Plain records in, plain records out."""

from __future__ import annotations

from typing import Any

SUBJECT = ("metric", "attack", "norm", "eps", "method", "mode", "kind")
# What says nothing of two models side by side; the scale of infidelity is that of a model's own outputs.
SANITY = ("ties", "ball_violation", "perturbation", "target_rate", "infidelity", "randomisation_floor")
ROBUSTNESS = ("clean_accuracy", "robust_accuracy", "robust_accuracy_png", "minimal_distance")


def key_of(record: dict[str, Any]) -> tuple[Any, ...]:
    """What a record is of, apart from the model. Paths refined to another error are of something else, and so are
    inversions begun elsewhere."""
    params = record.get("params") or {}
    begun = (params.get("start"), params.get("seed")) if record.get("kind") == "inversions" else ()
    return (*(record.get(name) for name in SUBJECT), params.get("tolerance"), *begun)


def is_standard(record: dict[str, Any]) -> bool:
    """Whether the record's model was trained without an attack."""
    return not record.get("train_eps")


def separated(first: dict[str, Any], second: dict[str, Any]) -> bool:
    """Whether the 95 % intervals of two records do not touch."""
    bounds = [r.get(k) for r in (first, second) for k in ("low", "high")]
    if any(b is None for b in bounds):
        return False
    low_a, high_a, low_b, high_b = bounds
    return low_a > high_b or low_b > high_a  # type: ignore[operator]


def paired(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each subject the standard and the robust record, the difference, and which model is better.

    verdict: `robust` or `standard` where the intervals do not touch, else `open`.
    """
    standard = {key_of(r): r for r in records if is_standard(r)}
    rows = []
    for record in records:
        other = standard.get(key_of(record))
        if is_standard(record) or other is None or record["value"] is None or other["value"] is None:
            continue
        difference = record["value"] - other["value"]
        gain = difference if record["better"] == "higher" else -difference
        verdict = ("robust" if gain > 0 else "standard") if separated(record, other) else "open"
        rows.append(
            {
                "metric": record["metric"],
                "standard": other,
                "robust": record,
                "difference": difference,
                "verdict": verdict,
            }
        )
    return rows


ONE_OF_ALL = ("etmann_alignment",)  # of the model and the images alone: the same for every method


def interpretability(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The pairs that are about attributions and inversions; what does not depend on the method counts once."""
    found, seen = [], set()
    for row in rows:
        name = row["metric"]
        if row["robust"].get("kind") not in ("attributions", "inversions") or name.endswith("_agreement"):
            continue
        if name in (*SANITY, *ROBUSTNESS) or name in seen:
            continue
        if name in ONE_OF_ALL:
            seen.add(name)
        found.append(row)
    return found


def by_metric(rows: list[dict[str, Any]]) -> dict[str, list[str]]:
    """Metrics by what they say over all methods and modes: `robust`, `standard`, `mixed` (they disagree) or `open`."""
    verdicts: dict[str, set[str]] = {}
    for row in rows:
        verdicts.setdefault(row["metric"], set()).add(row["verdict"])
    groups: dict[str, list[str]] = {"robust": [], "standard": [], "mixed": [], "open": []}
    for name, found in verdicts.items():
        decided = found - {"open"}
        groups["mixed" if len(decided) == 2 else next(iter(decided), "open")].append(name)
    return groups


def of_one_attack(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Robust accuracies that stand on one scale: those of the norm and the attack that come first, worst cases apart."""
    found = [r for r in records if r["metric"] == "robust_accuracy" and r.get("attack") != "worst"]
    return [r for r in found if (r.get("norm"), r.get("attack")) == (found[0].get("norm"), found[0].get("attack"))]


def accuracies(records: list[dict[str, Any]], *, standard: bool) -> dict[str, Any]:
    """Clean accuracy and robust accuracy by eps of the standard or the robust model, as records."""
    mine = [r for r in records if is_standard(r) == standard and r.get("kind") == "adversarial"]
    clean = next((r for r in mine if r["metric"] == "clean_accuracy"), None)
    robust = {float(r["eps"]): r for r in of_one_attack(mine)}
    return {"clean": clean, "robust": dict(sorted(robust.items()))}


def failings(
    records: list[dict[str, Any]], *, eps: float, clean: tuple[float, float], gap: float = 0.3, weak: float = 0.2
) -> list[str]:
    """Why a study of a standard and a robust model is worthless, if it is: one sentence per reason.

    The standard model must lie within `clean` on clean images and below `weak` under attack at eps, the robust one at
    least `gap` above it, and an interpretability metric must separate the two outside their intervals.
    """
    base, hard = accuracies(records, standard=True), accuracies(records, standard=False)
    if base["clean"] is None or eps not in base["robust"] or eps not in hard["robust"]:
        return [f"no accuracies of a standard and a robust model at eps {eps:g}"]
    value, attacked, robust = base["clean"]["value"], base["robust"][eps]["value"], hard["robust"][eps]["value"]
    found = []
    if not clean[0] <= value <= clean[1]:
        found.append(f"the standard model's clean accuracy is {value:.3f}, expected {clean[0]:g} to {clean[1]:g}")
    if attacked >= weak:
        found.append(
            f"the standard model's accuracy under attack is {attacked:.3f}, expected below {weak:g}: a weak attack?"
        )
    if robust < attacked + gap:
        found.append(
            f"the robust model's accuracy under attack is {robust:.3f}, expected at least {attacked + gap:.3f}"
        )
    if not any(row["verdict"] != "open" for row in interpretability(paired(records))):
        found.append("no interpretability metric separates the two models outside its interval")
    return found


GAIN = 0.1  # robustness that the best radius must add to standard training, for a population to say anything


def population_failings(records: list[dict[str, Any]], *, clean: tuple[float, float]) -> list[str]:
    """Why a population is worthless, if it is: its standard models have not learned, or none is more robust.

    records: those of rb-link, of which the one of kind `population` counts.
    """
    found = []
    for record in (r for r in records if r["kind"] == "population"):
        value, gain = record["value"], record["gain"]
        if value is not None and not clean[0] <= value <= clean[1]:
            found.append(f"standard models have a clean accuracy of {value:.3f}, expected {clean[0]:g} to {clean[1]:g}")
        if gain is not None and gain < GAIN:
            found.append(
                f"the best radius adds {gain:.3f} to the robustness of standard models, expected {GAIN:g} or more"
            )
    return found
