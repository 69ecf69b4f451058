"""What rb-report says of published numbers: a table of them beside ours, and what another way of doing it changes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rbkit.cli._errors import Input, blame
from rbkit.formats.errors import FormatError

TABLES = {
    "accuracy": "Accuracy", "curves": "Training curves", "completeness": "Completeness of integrated gradients",
    "inversion": "Inverted representations", "distance": "Distances of features", "fid": "Class images",
}  # fmt: skip
MEASURES = {"feature_distance": "distance", "frechet_distance": "Frechet distance"}
VERDICTS = ("inside", "above", "below", "no interval")


def read_published(path: str, *, table: str | None) -> list[dict[str, Any]]:
    """The numbers of a file, of one table or of all. Raises: Input where a line lacks a field, or no number is left."""
    from rbkit.formats.table import read_records
    from rbkit.tools.published import NEEDED

    with blame(Input, FormatError, OSError):
        found = read_records(Path(path))
    for number, line in enumerate(found, 1):
        lacking = [name for name in NEEDED if name not in line]
        if lacking:
            raise Input(f"{path}: number {number} has no {', '.join(lacking)}; expected {', '.join(NEEDED)}")
    kept = [line for line in found if table in (None, line["table"])]
    if not kept:
        known = ", ".join(dict.fromkeys(str(line["table"]) for line in found)) or "none"
        raise Input(f"{path}: no numbers of table {table}; it has {known}")
    return kept


def sections(parts: Sequence[tuple[str | None, list[dict[str, Any]]]], *, ours: str, note: str) -> list[str]:
    """A table for each study, (name or None, rows of `compared`), and the difference between two of them."""
    from rbkit.formats import html

    found: list[str] = []
    for name, rows in parts:
        found += [
            html.heading("Published and ours" + (f": {name}" if name else "")),
            html.paragraph(_summary(rows, note)),
        ]
        for table in dict.fromkeys(row["table"] for row in rows):
            found.append(html.heading(TABLES.get(table, table), level=3))
            found.append(_table([row for row in rows if row["table"] == table], ours))
    return found + (_changes(parts[0], parts[1], note) if len(parts) == 2 else [])


def _summary(rows: list[dict[str, Any]], note: str) -> str:
    counts = {verdict: sum(row["verdict"] == verdict for row in rows) for verdict in VERDICTS}
    measured = sum(counts.values())
    told = (
        f"{len(rows)} published numbers, {measured} of them measured: the published one lies inside our 95 % interval for "
        f"{counts['inside']}; ours lies above it for {counts['above']} and below it for {counts['below']}; "
        f"{counts['no interval']} have no interval."
    )
    return f"{note} {told}".strip()


def _table(rows: list[dict[str, Any]], ours: str) -> str:
    from rbkit.formats import html

    cells = [
        [row["what"], _amount(row["value"], row["unit"]), _ours(row), _interval(row["ours"], row["unit"]), row["verdict"],
         row["source"]]
        for row in rows
    ]  # fmt: skip
    return html.table(["number", "published", ours, "95 % interval", "verdict", "source"], cells, marked=4)


def _amount(value: float | None, unit: str) -> str:
    if value is None:
        return "not published"
    if unit == "share":
        return f"{100 * value:.{1 if value >= 0.01 else 2}f} %"
    return f"{value:.4g}"


def _ours(row: dict[str, Any]) -> str:
    """Our number; where it cannot be measured, what can be, by its own name."""
    if row["ours"] is not None:
        return _amount(row["ours"]["value"], row["unit"])
    other = row["other"]
    beside = "" if other is None else f"; {_named(row, other)}"
    return f"not measured ({row['reason']}){beside}" if row.get("reason") else f"not measured{beside}"


def _named(row: dict[str, Any], record: dict[str, Any]) -> str:
    """A record that stands in for another quantity, with the extractor it is measured in."""
    name = MEASURES.get(record["metric"], record["metric"].replace("_", " "))
    return f"{name} in the features of {row['extractor']}: {record['value']:.3g} (n {record['n']})"


def _interval(record: dict[str, Any] | None, unit: str) -> str:
    if record is None or record.get("low") is None or record.get("high") is None:
        return ""
    return f"{_amount(record['low'], unit)} to {_amount(record['high'], unit)} (n {record['n']})"


def _changes(
    first: tuple[str | None, list[dict[str, Any]]], second: tuple[str | None, list[dict[str, Any]]], note: str
) -> list[str]:
    """What the second study measures otherwise than the first, as a result of its own."""
    from rbkit.formats import html
    from rbkit.tools.published import changes

    rows = changes(first[1], second[1])
    known = [row for row in rows if row["verdict"] != "no interval"]
    told = [row for row in known if row["verdict"] != "open"]
    said = (
        f"{note} Of {len(known)} numbers with intervals that both have, {len(told)} differ beyond these from {first[0]} to "
        f"{second[0]}. A difference is that of the whole protocol: recipe, selection and measurement together."
    )
    cells = [
        [_subject(row), _whole(row, row["first"]), _whole(row, row["second"]), _difference(row), row["verdict"]]
        for row in rows
    ]
    heads = ["number", f"{first[0]} (95 %)", f"{second[0]} (95 %)", "difference", f"in {second[0]}"]
    title = f"What changes from {first[0]} to {second[0]}"
    return [html.heading(title), html.paragraph(said.strip()), html.table(heads, cells, marked=4)]


def _subject(row: dict[str, Any]) -> str:
    """What two records are of: the published number, or what is told instead of it."""
    if row["ours"] is not None:
        return str(row["what"])
    name = MEASURES.get(row["first"]["metric"], row["first"]["metric"])
    return f"{row['what'].partition(',')[0]}, {name} in the features of {row['extractor']}"


def _whole(row: dict[str, Any], record: dict[str, Any]) -> str:
    unit = row["unit"] if row["ours"] is not None else "features"
    interval = _interval(record, unit).partition(" (n")[0]
    return _amount(record["value"], unit) + (f" ({interval})" if interval else "")


def _difference(row: dict[str, Any]) -> str:
    if row["unit"] == "share":
        return f"{100 * row['difference']:+.1f} points"
    return f"{row['difference']:+.3g}"
