"""Whether a metric rises with robustness: a verdict from the correlations of `link`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rbkit.tools.population import MAIN

LEVEL = 0.05  # of the corrected p-values that verdicts rest on
NEGLIGIBLE = 0.3  # correlation below which a metric is said not to rise: Cohen's medium effect (Cohen 1988)
RISES, NOT, ONLY, OPEN = "rises", "does not rise", "only because accuracy falls", "open"


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
