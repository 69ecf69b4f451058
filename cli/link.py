"""rb-link: does interpretability go with robustness, over a population of models?"""

from __future__ import annotations

import math
import re
import shlex
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rbkit.cli import _output, _table
from rbkit.cli._app import program
from rbkit.cli._errors import Input, Usage, blame
from rbkit.cli._log import note
from rbkit.cli._options import Json, NoClobber, Quiet, Seed
from rbkit.formats.errors import FormatError

if TYPE_CHECKING:
    from rbkit.tools.population import Population, Subject

NEEDED = {"metric": str, "model_sha": str, "n": int}
FORMS = ("png", "svg", "pdf")


def link(
    sources: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[FILE]...",
            help="Records of rb-score, as JSON lines, of all models; none or - is standard input.",
        ),
    ] = None,
    robustness: Annotated[
        list[str] | None,
        typer.Option(
            "--robustness",
            metavar="METRIC",
            help="What stands for robustness, also as METRIC@part:part; default robust_accuracy; may be repeated.",
            show_default=False,
        ),
    ] = None,
    controls: Annotated[
        list[str] | None,
        typer.Option(
            "--controls",
            metavar="FILE",
            help="Records of models that are a control, also as NAME=FILE; may be repeated.",
            show_default=False,
        ),
    ] = None,
    run: Annotated[
        str,
        typer.Option("--run", metavar="FIELD", help="Field of the records that tells training runs apart."),
    ] = "model_sha",
    allow_incomplete: Annotated[
        bool, typer.Option("--allow-incomplete", help="Take records of fewer rows than their stream has.")
    ] = False,
    figures: Annotated[
        str | None,
        typer.Option(
            "--figures", metavar="DIR/", help="Write scatter plots and curves as PNG, SVG and PDF.", show_default=False
        ),
    ] = None,
    no_clobber: NoClobber = False,
    seed: Seed = 0,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Correlate robustness with every interpretability metric over a population of models.

    Pearson, Spearman and Kendall, and the partial correlation with clean accuracy held fixed, each with two intervals
    and a p-value corrected over the whole family; how each metric moves with the radius of training; and a verdict.
    A table on a terminal, JSON lines in a pipe.
    """
    _output.refuse_taken(figures, no_clobber=no_clobber)
    folder = _output.figures_folder(figures, no_clobber=no_clobber)
    records, named = _gather(sources or ["-"], controls or [])
    found = _population(records, named, run, incomplete=allow_incomplete)
    picked = _chosen(found, robustness)
    from rbkit.tools.dose import dose_responses
    from rbkit.tools.link import analyse
    from rbkit.tools.population import interpretability, summary

    targets = interpretability(found)
    if not targets:
        raise Input("no interpretability metric; give records of attributions or inversions too")
    if not quiet and len(found.named()["main"]) < 5:
        note("rb-link", f"{len(found.named()['main'])} models besides controls: no p-value, 5 are needed")
    about = summary(found, picked[0])
    rows = analyse(found, picked, seed=seed)
    curves = dose_responses(found, [*picked, *(t for t in targets if t not in picked)], seed=seed)
    _table.put([about, *rows, *curves], json_=json_, table=lambda _: _show(rows, curves))
    if folder is not None:  # last: where figures cannot be written, the records are out
        _draw(found, picked, rows, curves, folder, command=_command(sources, controls, robustness))


# ------------------------------------------------------------------------------------------------------ reading


def _gather(sources: list[str], controls: list[str]) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """All records, and the control that models belong to by the file that they stand in."""
    records = [record for name in sources for record in _read(name)]
    named: dict[str, str] = {}
    for text in controls:
        name, path = _control(text)
        own = _read(path)
        for record in own:
            other = named.setdefault(record["model_sha"], name)
            if other != name:
                raise Usage(f"--controls: model {record['model_sha'][:8]} is given as {other} and as {name}")
        records += own
    if not records:
        raise Input("no records; give .jsonl files of rb-score")
    return records, named


def _control(text: str) -> tuple[str, str]:
    """(name, file) of NAME=FILE or FILE: noise-3.jsonl holds a control called noise."""
    name, given, path = text.partition("=")
    if given and name and "/" not in name:
        return name, path
    stem = Path(text).name.partition(".")[0]
    return re.sub(r"-\d+$", "", stem) or stem, text


def _read(name: str) -> list[dict[str, Any]]:
    from rbkit.formats.table import read_records

    path = Path("/dev/stdin" if name == "-" else name)
    with blame(Input, FormatError, OSError):
        records = read_records(path)
    for number, record in enumerate(records, 1):
        _check(record, f"{name}: record {number}")
    return records


def _check(record: dict[str, Any], place: str) -> None:
    """Refuse what rb-score would not write."""
    for key, kind in NEEDED.items():
        if not isinstance(record.get(key), kind) or isinstance(record[key], bool):
            raise Input(f"{place}: no {key}; expected records of rb-score (not of --per-example)")
    if record.get("better") not in ("higher", "lower"):
        raise Input(f"{place}: better is {record.get('better')!r}, expected higher or lower")
    for key in ("value", "low", "high", "eps", "train_eps"):
        value = record.setdefault(key, None)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not _finite(value)):
            raise Input(f"{place}: {key} is {str(value)[:40]!r}, expected a finite number or null")
    for key in ("kind", "attack", "norm", "method", "mode", "reduce", "crafted_on", "train_method", "train_norm"):
        if not isinstance(record.get(key), str | None):
            raise Input(f"{place}: {key} is {str(record[key])[:40]!r}, expected a text or null")
    if not isinstance(record.get("params"), dict | None):
        raise Input(f"{place}: params is {str(record['params'])[:40]!r}, expected an object")


def _finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _population(records: list[dict[str, Any]], controls: dict[str, str], run: str, *, incomplete: bool) -> Population:
    from rbkit.tools.population import gather

    if not any(run in record for record in records):
        raise Usage(f"--run {run}: no record has that field")
    short = next((r for r in records if r.get("complete") is False), None)
    if short is not None and not incomplete:
        raise Input(
            f"{short['metric']} of model {short['model_sha'][:8]}: judged on {short['n']} rows, fewer than its stream has; "
            "score all of them, or try --allow-incomplete"
        )
    with blame(Input, ValueError):
        return gather(records, controls=controls, run=run, incomplete=incomplete)


def _chosen(found: Population, texts: list[str] | None) -> list[Subject]:
    from rbkit.tools.population import choose

    with blame(Usage if texts else Input, ValueError, prefix="--robustness: " if texts else ""):
        picked = [choose(found, text) for text in texts or ["robust_accuracy"]]
    return list(dict.fromkeys(picked))


# ------------------------------------------------------------------------------------------------------ showing


def _show(rows: list[dict[str, Any]], curves: list[dict[str, Any]]) -> None:
    """Tables for people: verdicts with their numbers, all coefficients, then half-effect radii."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    verdicts = [r for r in rows if r["kind"] == "verdict"]
    for name in dict.fromkeys(r["robustness"] for r in verdicts):
        mine = [r for r in rows if r["robustness"] == name]
        table = Table("metric", "n", "Pearson", "Spearman", "Kendall", "partial", "verdict",
                      title=f"with {name} (95 % intervals; * p < 0.05, corrected)", title_justify="left", box=None)  # fmt: skip
        for found in (r for r in mine if r["kind"] == "verdict"):
            cells = [_cell(r) for r in mine if r.get("population") == "main" and r["of"] == found["of"]]
            table.add_row(found["of"], str(found["n"]), *cells, _said(found))
        console.print(table)
    for norm in dict.fromkeys(c["norm"] for c in curves):
        table = Table("metric", "n", "half effect", "moves", title=f"over the radius of training ({norm})",
                      title_justify="left", box=None)  # fmt: skip
        for c in (c for c in curves if c["norm"] == norm):
            moves = {True: "better", False: "worse"}.get(c.get("improves"), c.get("reason", ""))  # type: ignore[arg-type]
            table.add_row(c["of"], str(c["n"]), _interval(c), moves)
        console.print(table)


def _interval(record: dict[str, Any]) -> str:
    if record["value"] is None:
        return ""
    value = f"{record['value']:.2f}"
    return value if record["low"] is None else f"{value} ({record['low']:.2f} to {record['high']:.2f})"


def _cell(record: dict[str, Any]) -> str:
    star = "*" if record["p_adjusted"] is not None and record["p_adjusted"] < 0.05 else ""
    return _interval(record) + star


def _said(record: dict[str, Any]) -> str:
    """The verdict, and what it would be in the other populations where that differs."""
    other = [f"{name}: {text}" for name, text in record["elsewhere"].items() if text != record["verdict"]]
    reason = f" ({record['why']})" if record["value"] is None or record["p_adjusted"] is None else ""
    return "; ".join([record["verdict"] + reason, *other])


# ------------------------------------------------------------------------------------------------------ drawing


def _command(sources: list[str] | None, controls: list[str] | None, robustness: list[str] | None) -> str:
    """What remakes the figures, for a shell; wherever they are put, their bytes are the same."""
    options = [("--controls", c) for c in controls or []] + [("--robustness", r) for r in robustness or []]
    return shlex.join(
        ["rb-link", *(sources or ["-"]), *(word for pair in options for word in pair), "--figures", "figures/"]
    )


def _draw(
    found: Population,
    picked: list[Subject],
    rows: list[dict[str, Any]],
    curves: list[dict[str, Any]],
    folder: _output.Folder,
    *,
    command: str,
) -> None:
    from rbkit.formats import figures

    subjects = {found.label(s): s for s in found.values}
    for row in (r for r in rows if r["kind"] == "verdict"):
        across, up = (found.values[subjects[row[key]]] for key in ("robustness", "of"))
        points = [(across[m], up[m], found.controls.get(m)) for m in found.about if m in across and m in up]
        stem = _slug(*(["scatter"] if len(picked) == 1 else ["scatter", row["robustness"]]), row["of"])
        title = f"Pearson {_interval(row)}, partial {_interval(_partial(row))}: {row['verdict']}"
        if points:
            draw = partial(figures.scatter, points, across=row["robustness"], up=row["of"], title=title)
            _write(folder, stem, draw, command)
    for curve in (c for c in curves if "eps" in c):
        known = found.values[subjects[curve["of"]]]
        doses = [(record.get("train_eps") or 0.0, record) for m, record in known.items() if _dosed(found, m, curve)]
        _write(folder, _slug("dose", curve["norm"], curve["of"]), partial(figures.dose_curve, curve, doses), command)


def _partial(row: dict[str, Any]) -> dict[str, Any]:
    return {"value": row["partial"], "low": row["partial_low"], "high": row["partial_high"]}


def _dosed(found: Population, model: str, curve: dict[str, Any]) -> bool:
    from rbkit.tools.population import trained_radius

    eps = trained_radius(found.about[model])
    return model not in found.controls and eps is not None and (
        eps == 0 or found.about[model].get("train_norm") == curve["norm"]
    )  # fmt: skip


def _slug(*parts: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", "-".join(parts)).strip("-")


def _write(folder: _output.Folder, stem: str, make: Any, command: str) -> None:
    for form in FORMS:
        folder.write(f"{stem}.{form}", make(form=form, command=command))


main = program("rb-link", link)

if __name__ == "__main__":
    sys.exit(main())
