"""Published numbers beside ours: which record answers which number, and what its interval says. Plain records in, plain
rows out.

A published number is an object with `what`, `value`, `unit`, `table`, `source`, and how it is found again: `match`, the
fields that our record must have (`model` is standard or robust; a dot leads into parameters), or null with a `reason`;
`instead` matches a record of something else that is told beside a number that cannot be measured.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rbkit.tools.compare import is_standard, separated

CURVES = ("train_accuracy", "val_accuracy", "val_robust_accuracy")
NEEDED = ("id", "table", "what", "value", "unit", "source", "match")


def _field(record: Mapping[str, Any], path: str) -> Any:
    """A field of a record; a dot leads into an object."""
    head, _, rest = path.partition(".")
    found = record.get(head)
    return _field(found, rest) if rest and isinstance(found, Mapping) else found


def answers(record: Mapping[str, Any], match: Mapping[str, Any]) -> bool:
    """Whether a record has all fields of `match`."""
    plain = {key: value for key, value in match.items() if key != "model"}
    model = match.get("model")
    fits = model is None or is_standard(dict(record)) == (model == "standard")
    return fits and all(_field(record, key) == value for key, value in plain.items())


def _found(records: Iterable[dict[str, Any]], match: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The first record that answers and has a value."""
    if match is None:
        return None
    return next((r for r in records if r.get("value") is not None and answers(r, match)), None)


def verdict(published: float | None, record: Mapping[str, Any] | None) -> str:
    """Where the 95 % interval of our number lies: `inside` if it holds the published one, else `above` or `below` it."""
    if record is None:
        return "not measured"
    if published is None:
        return "not published"
    if record.get("low") is None or record.get("high") is None:
        return "no interval"
    if record["low"] > published:
        return "above"
    return "below" if record["high"] < published else "inside"


def compared(published: Sequence[dict[str, Any]], records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each published number with `ours` (a record or None), `other` (the record told instead) and the `verdict`."""
    rows = []
    for line in published:
        ours = _found(records, line["match"])
        other = None if ours is not None else _found(records, line.get("instead"))
        rows.append({**line, "ours": ours, "other": other, "verdict": verdict(line["value"], ours)})
    return rows


def changes(first: Sequence[dict[str, Any]], second: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Numbers that both of two studies have, rows of `compared` in one order: `first`, `second`, `difference` and
    `verdict`: `higher` or `lower` in the second where the intervals do not touch, `open` where they do, or `no interval`."""
    rows = []
    for one, two in zip(first, second, strict=True):
        pair = (one["ours"], two["ours"]) if one["ours"] and two["ours"] else (one["other"], two["other"])
        if pair[0] is None or pair[1] is None:
            continue
        difference = pair[1]["value"] - pair[0]["value"]
        told = ("higher" if difference > 0 else "lower") if separated(*pair) else "open"
        if any(record.get(end) is None for record in pair for end in ("low", "high")):
            told = "no interval"
        rows.append({**one, "first": pair[0], "second": pair[1], "difference": difference, "verdict": told})
    return rows


def training_records(model: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The `best`, its `best_epoch` and the `last` value of each curve of a training, as records without intervals.

    model: the metadata of its file.
    """
    about = {"kind": "training", "train_eps": (model.get("recipe") or {}).get("eps"), "low": None, "high": None}
    found = []
    for metric in CURVES:
        points = [(record["epoch"], record[metric]) for record in model.get("epochs") or [] if metric in record]
        if not points:
            continue
        epoch, best = max(points, key=lambda point: point[1])
        for statistic, value in (("best", best), ("best_epoch", epoch), ("last", points[-1][1])):
            found.append({**about, "metric": metric, "statistic": statistic, "value": value})
    return found
