"""What rb-report says of the records of rb-link: the answer over a population of models, its tables and figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rbkit.cli._errors import Input, blame

KINDS = ("population", "verdict", "correlation", "dose_response")
VERDICTS = ("rises", "does not rise", "only because accuracy falls", "open")
SAYING = {
    "rises": "rising with robustness, also with clean accuracy held fixed",
    "does not rise": "not rising with robustness",
    "only because accuracy falls": "rising only because clean accuracy falls",
    "open": "open",
}


def is_link(record: dict[str, Any]) -> bool:
    """Whether a record is one of rb-link."""
    return record.get("kind") in KINDS


def answer(records: list[dict[str, Any]]) -> str:
    """The population's answer in one paragraph with numbers."""
    found = [r for r in records if r["kind"] == "verdict"]
    models = max(r["n"] for r in found)
    said = []
    for verdict in VERDICTS:
        mine = [r for r in found if r["verdict"] == verdict]
        if mine:
            strongest = sorted(mine, key=lambda r: -abs(r["value"] or 0.0))
            named = [f"{r['of'].replace('_', ' ')} {r['value']:.2f}" for r in strongest if r["value"] is not None]
            said.append(
                f"{SAYING[verdict]}: {len(mine)}" + (f" ({'; '.join(named)})" if named and verdict != "open" else "")
            )
    listed = " ".join(f"{text[0].upper()}{text[1:]}." for text in said)
    return (
        f"{len(found)} interpretability metrics over {models} models. {listed} In brackets the Pearson correlation with "
        f"{found[0]['robustness'].replace('_', ' ')}, each metric turned so that higher is better; p-values are corrected "
        "over the whole family."
    )


def sections(records: list[dict[str, Any]], drawn: list[str]) -> list[str]:
    """Verdicts with their correlations, the radius of training at which half of the effect is reached, and figures."""
    from rbkit.formats import html

    parts = [html.heading("Robustness and interpretability over a population"), *_overview(records)]
    heads = [
        "metric",
        "verdict",
        "Pearson (95 %)",
        "p",
        "partial (95 %)",
        "p",
        "cluster bootstrap",
        "models",
    ]
    verdicts = sorted((r for r in records if r["kind"] == "verdict"), key=lambda r: -(r["value"] or 0))
    parts += [html.table(heads, [_verdict_row(r, records) for r in verdicts]), html.paragraph(
        "Partial: clean accuracy held fixed. The cluster bootstrap draws training runs, not images."
    )]  # fmt: skip
    parts += _elsewhere(verdicts)
    curves = [r for r in records if r["kind"] == "dose_response"]
    if curves:
        parts += [html.heading("Dose and response"), html.table(
            ["metric", "norm", "models", "half-effect radius (95 %)", "change over all radii (95 %)", "moves"],
            [_curve_row(r) for r in curves],
        )]  # fmt: skip
    return parts + _figures(drawn)


def _overview(records: list[dict[str, Any]]) -> list[str]:
    """All correlations at a glance."""
    from rbkit.formats import figures, html

    verdicts = [r for r in records if r["kind"] == "verdict"]
    try:
        raw = figures.correlations([r for r in verdicts if r["robustness"] == verdicts[0]["robustness"]], form="svg")
    except ValueError:
        return []
    return [html.picture(raw, caption="How each metric, turned so that higher is better, goes with robustness.")]


def _figures(names: list[str]) -> list[str]:
    """The figures that rb-link drew, two beside each other, below each command that drew some of them."""
    from rbkit.formats import figures, html

    drawn: dict[str, list[str]] = {}
    for name in names:
        with blame(Input, OSError, ValueError, prefix=f"{name}: "):
            raw = Path(name).read_bytes()
            command = figures.command_of(raw)
        caption = Path(name).stem.replace("-", " ").replace("_", " ")
        drawn.setdefault(command, []).append(html.picture(raw, caption=caption))
    parts = [html.heading("Figures")] if names else []
    for command, pictures in drawn.items():
        parts += [html.code(command), '<div class="pair">', *pictures, "</div>"]
    return parts


def _between(value: float | None, low: float | None, high: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.2g}" if low is None or high is None else f"{value:.2g} ({low:.2g} to {high:.2g})"


def _p(value: float | None) -> str:
    return "" if value is None else f"{value:.2g}"


def _verdict_row(record: dict[str, Any], records: list[dict[str, Any]]) -> list[str]:
    raw = next(
        r for r in records
        if r["metric"] == "pearson" and r["population"] == "main" and (r["of"], r["robustness"]) == (record["of"], record["robustness"])
    )  # fmt: skip
    return [
        record["of"].replace("_", " "), record["verdict"],
        _between(record["value"], record["low"], record["high"]), _p(record["p_adjusted"]),
        _between(record["partial"], record["partial_low"], record["partial_high"]), _p(record["partial_p_adjusted"]),
        _between(raw["value"], raw["boot_low"], raw["boot_high"]).partition(" ")[2], str(record["n"]),
    ]  # fmt: skip


def _elsewhere(verdicts: list[dict[str, Any]]) -> list[str]:
    """The verdicts that are others once the controls, or all of them but one, are counted in."""
    from rbkit.formats import html

    rows = [
        [r["of"].replace("_", " "), r["verdict"], text, ", ".join(n for n, t in r["elsewhere"].items() if t == text)]
        for r in verdicts
        for text in dict.fromkeys(r["elsewhere"].values())
        if text != r["verdict"]
    ]
    if not rows:
        return []
    heads = ["metric", "verdict", "would be", "in these populations"]
    return [html.heading("Where the controls would say something else"), html.table(heads, rows)]


def _curve_row(record: dict[str, Any]) -> list[str]:
    told = {True: "better", False: "worse", None: "not told from 0"}
    moves = told[record["improves"]] if "eps" in record else record["reason"]
    change = _between(record.get("change"), record.get("change_low"), record.get("change_high"))
    half = _between(record["value"], record["low"], record["high"])
    return [record["of"].replace("_", " "), record["norm"], str(record["n"]), half, change, str(moves)]
