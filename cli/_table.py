"""Records on standard output: a table for people, JSON lines for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

from rbkit.cli import _output


def put(
    records: list[dict[str, Any]], *, json_: bool, table: Callable[[list[dict[str, Any]]], None] | None = None
) -> None:
    """Print records: JSON lines in a pipe or where asked for, else by `table` (default: `show`)."""
    if json_ or not sys.stdout.isatty():
        lines = (json.dumps(record, separators=(",", ":"), allow_nan=False) + "\n" for record in records)
        _output.write_stdout("".join(lines).encode())
        return
    (table or show)(records)


def show(records: list[dict[str, Any]]) -> None:
    """Print records to standard output: scores as a table by subject, other records as they are."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if records and "metric" not in records[0]:
        table = Table(*records[0], box=None)
        for record in records:
            table.add_row(*(_cell(v) for v in record.values()))
        console.print(table)
        return
    subjects: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        subjects.setdefault(_subject(record), []).append(record)
    for subject, rows in subjects.items():
        table = Table(
            "metric", "value", "95 % interval", "n", "chance", "z", title=subject, title_justify="left", box=None
        )
        for r in rows:
            interval = "" if r["low"] is None else f"{r['low']:.4f} to {r['high']:.4f}"
            if "fires" in r:
                interval = f"limit {r['limit']:.4g}" + {True: ", fires", False: "", None: ", undecided"}[r["fires"]]
            chance = _cell((r.get("band") or {}).get("random"))
            arrow = "↑" if r["better"] == "higher" else "↓"
            table.add_row(f"{r['metric']} {arrow}", _cell(r["value"]), interval, str(r["n"]), chance, _cell(r.get("z")))
        console.print(table)


def _subject(record: dict[str, Any]) -> str:
    trained = record.get("train_method") or "model"
    if record.get("train_eps"):
        trained += f" {record.get('train_norm')} {record['train_eps']:g}"
    parts = [f"{record['model_sha'][:8]} ({trained})"]
    if record.get("attack"):
        parts.append(f"{record['attack']} {record['norm']} {record['eps']:g}")
    parts += [str(record[key]) for key in ("method", "mode") if record.get(key)]
    return ", ".join(parts)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4f}" if isinstance(value, float) else str(value)
