"""Figures from records, by matplotlib: bytes of PNG, SVG or PDF without clock or host in them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

COLOURS = ("#2166ac", "#b2182b", "#4d9221", "#762a83", "#e08214", "#35978f")
SIZE = (5.6, 3.6)  # inches


def model_name(record: dict[str, Any]) -> str:
    """How a model is called in figures and tables."""
    method = record.get("train_method") or "model"
    eps = record.get("train_eps")
    seed = record.get("train_seed")
    text = f"{method} {record.get('train_norm')} {eps:g}" if eps else str(method)
    return text if seed in (None, 0) else f"{text}, seed {seed}"


def _figure() -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
    return figure, axes


ABOUT = {"png": "Description", "svg": "Description", "pdf": "Subject"}


def render(figure: Any, *, form: str, command: str = "") -> bytes:
    """A figure as bytes; equal figures give equal bytes. `command`, which remakes it, is kept in its metadata."""
    import matplotlib

    matplotlib.rcParams["svg.hashsalt"] = "rbkit"
    matplotlib.rcParams["svg.fonttype"] = "path"
    buffer = io.BytesIO()
    metadata: dict[str, Any] = {"png": {"Software": None}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}[form]
    if command:
        metadata[ABOUT[form]] = command
    figure.savefig(buffer, format=form, dpi=150, metadata=metadata)
    return buffer.getvalue()


def command_of(svg: bytes) -> str:
    """The command that an SVG of `render` says it was made by, or nothing. Raises: ValueError where it is no XML."""
    from xml.etree import ElementTree

    try:
        root = ElementTree.fromstring(svg)
    except ElementTree.ParseError as error:
        raise ValueError(f"no SVG: {error}") from None
    found = root.find(".//{http://purl.org/dc/elements/1.1/}description")
    return "" if found is None or found.text is None else found.text


def by_model(records: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Records grouped by model, in order of appearance."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault(str(record.get("model_sha")), []).append(record)
    return groups


def _errors(records: Sequence[dict[str, Any]]) -> list[list[float]]:
    """Distances from values to both ends of their intervals, 0 where there is none."""
    ends: list[list[float]] = [[], []]
    for record in records:
        value = record["value"]
        ends[0].append(0.0 if record.get("low") is None else max(0.0, value - record["low"]))
        ends[1].append(0.0 if record.get("high") is None else max(0.0, record["high"] - value))
    return ends


def accuracy_curves(records: Sequence[dict[str, Any]], *, form: str) -> bytes:
    """Robust accuracy against eps, one line per model, with 95 % intervals; eps 0 is the clean accuracy.

    Of several attacks or norms those of the first record are drawn. Raises: ValueError when no record is a robust accuracy.
    """
    chosen = [r for r in records if r.get("metric") == "robust_accuracy" and r.get("eps") is not None]
    if not chosen:
        raise ValueError("no robust_accuracy among the records; curves need rb-score of attacked streams")
    chosen = [r for r in chosen if (r.get("norm"), r.get("attack")) == (chosen[0].get("norm"), chosen[0].get("attack"))]
    figure, axes = _figure()
    for number, (sha, group) in enumerate(by_model(chosen).items()):
        points = {float(r["eps"]): r for r in group}
        clean = next((r for r in records if r.get("metric") == "clean_accuracy" and r.get("model_sha") == sha), None)
        if clean is not None:
            points.setdefault(0.0, clean)
        radii = sorted(points)
        shown = [points[eps] for eps in radii]
        axes.errorbar(
            radii, [r["value"] for r in shown], yerr=_errors(shown), marker="o", capsize=3,
            color=COLOURS[number % len(COLOURS)], label=model_name(group[0]),
        )  # fmt: skip
    axes.set(xlabel=f"eps ({chosen[0].get('norm')}, [0, 1] pixels)", ylabel="accuracy", ylim=(0, 1))
    axes.legend(frameon=False, fontsize=8)
    return render(figure, form=form)


def metric_bars(records: Sequence[dict[str, Any]], metric: str, *, form: str) -> bytes:
    """One attribution metric for each method and model with 95 % intervals, and the random map as chance.

    Raises: ValueError when no record has the metric.
    """
    chosen = [r for r in records if r.get("metric") == metric and r.get("value") is not None and r.get("method")]
    if not chosen:
        raise ValueError(f"no record of {metric}")
    figure, axes = _figure()
    methods = list(dict.fromkeys(r["method"] for r in chosen))
    groups = by_model(chosen)
    width = 0.8 / len(groups)
    for number, group in enumerate(groups.values()):
        for record in group:
            x = methods.index(record["method"]) + (number - (len(groups) - 1) / 2) * width
            axes.bar(
                x, record["value"], width * 0.92, yerr=_errors([record]), capsize=3, color=COLOURS[number % len(COLOURS)],
                label=model_name(record) if record is group[0] else None,
            )  # fmt: skip
            chance = (record.get("band") or {}).get("random")
            if chance is not None:
                axes.plot([x - width / 2, x + width / 2], [chance, chance], color="black", linewidth=1.2, linestyle=":")
    axes.set_xticks(range(len(methods)), methods)
    axes.set(ylabel=f"{metric} ({chosen[0]['unit']}; {chosen[0]['better']} is better)")
    axes.legend(frameon=False, fontsize=8)
    return render(figure, form=form)


CURVES: dict[str, tuple[tuple[str, str, str], ...]] = {  # (key of an epoch's record, style, word)
    "accuracy": (("val_accuracy", "-", "clean"), ("val_robust_accuracy", "--", "robust")),
    "loss": (("train_loss", ":", "training"), ("val_loss", "-", "clean")),
}


def training_curves(models: Sequence[dict[str, Any]], *, quantity: str = "accuracy", form: str) -> bytes:
    """Validation accuracy, clean (solid) and under attack (dashed), against the epoch; as `loss` that of training (dotted,
    on what was trained on) and of clean validation. Raises: ValueError without any, or for another quantity.
    """
    if quantity not in CURVES:
        raise ValueError(f"models have curves of {' and '.join(CURVES)}, not of {quantity}")
    figure, axes = _figure()
    drawn = False
    for number, meta in enumerate(models):
        epochs, recipe = meta.get("epochs") or [], meta.get("recipe") or {}
        name = model_name({f"train_{key}": recipe.get(key) for key in ("method", "norm", "eps", "seed")})
        for key, style, word in CURVES[quantity]:
            points = [(r["epoch"], r[key]) for r in epochs if key in r]
            if points:
                drawn = True
                axes.plot(
                    *zip(*points, strict=True), style, marker="o", markersize=3, color=COLOURS[number % len(COLOURS)],
                    label=f"{name}, {word}",
                )  # fmt: skip
    if not drawn:
        raise ValueError("no model has a validation record")
    axes.set(xlabel="epoch", ylabel="validation accuracy" if quantity == "accuracy" else "cross-entropy (nats)")
    axes.set_ylim(0, 1 if quantity == "accuracy" else None)
    axes.legend(frameon=False, fontsize=8)
    return render(figure, form=form)


def scatter(
    points: Sequence[tuple[dict[str, Any], dict[str, Any], str | None]],
    *,
    across: str,
    up: str,
    title: str,
    form: str,
    command: str = "",
) -> bytes:
    """One metric against another, a point per model with both 95 % intervals, coloured by the radius of training.

    points: (record across, record up, name of the control or None); controls are hollow squares. Raises: ValueError
    when there are none.
    """
    if not points:
        raise ValueError(f"no model has both {across} and {up}")
    figure, axes = _figure()
    groups: dict[tuple[str | None, float], list[tuple[dict[str, Any], dict[str, Any]]]] = {}
    for x, y, control in points:
        groups.setdefault((control, float(x.get("train_eps") or 0.0)), []).append((x, y))
    radii = sorted({eps for control, eps in groups if control is None})
    for (control, eps), group in sorted(groups.items(), key=lambda item: (item[0][0] or "", item[0][1])):
        colour = "#555555" if control is not None else COLOURS[radii.index(eps) % len(COLOURS)]
        xs, ys = ([pair[i] for pair in group] for i in (0, 1))
        axes.errorbar(
            [r["value"] for r in xs], [r["value"] for r in ys], xerr=_errors(xs), yerr=_errors(ys), linestyle="none",
            marker="o" if control is None else "s", markersize=4, markerfacecolor=colour if control is None else "none",
            color=colour, elinewidth=0.7, label=f"eps {eps:g}" if control is None else f"control: {control}",
        )  # fmt: skip
    axes.set(xlabel=across, ylabel=f"{up} ({points[0][1]['better']} is better)")
    axes.set_title(title, fontsize=8, loc="left")
    axes.legend(frameon=False, fontsize=7)
    return render(figure, form=form, command=command)


def dose_curve(
    curve: dict[str, Any], points: Sequence[tuple[float, dict[str, Any]]], *, form: str, command: str = ""
) -> bytes:
    """A metric over the radius of training: models with 95 % intervals, the monotone fit with its band, half effect.

    curve: a record of kind `dose_response` of rb-link; points: (radius, record) of each model.
    """
    figure, axes = _figure()
    axes.errorbar(
        [eps for eps, _ in points], [r["value"] for _, r in points], yerr=_errors([r for _, r in points]),
        linestyle="none", marker="o", markersize=4, elinewidth=0.7, color=COLOURS[0], label="models",
    )  # fmt: skip
    axes.plot(curve["eps"], curve["fit"], color=COLOURS[1], label="monotone fit")
    if None not in (*curve["fit_low"], *curve["fit_high"]):
        axes.fill_between(curve["eps"], curve["fit_low"], curve["fit_high"], color=COLOURS[1], alpha=0.18, linewidth=0)
    if curve["value"] is not None:
        axes.axvline(
            curve["value"], color="black", linewidth=1, linestyle=":", label=f"half effect at {curve['value']:.2g}"
        )
    axes.set(xlabel=f"eps of training ({curve['norm']}, [0, 1] pixels)", ylabel=curve["of"])
    axes.legend(frameon=False, fontsize=7)
    return render(figure, form=form, command=command)


def correlations(verdicts: Sequence[dict[str, Any]], *, form: str) -> bytes:
    """Correlation with robustness of every metric with its 95 % interval, and with clean accuracy held fixed.

    verdicts: records of kind `verdict` of rb-link, those that correlate most on top. Raises: ValueError without any.
    """
    from matplotlib.figure import Figure

    rows = sorted((r for r in verdicts if r["value"] is not None), key=lambda r: r["value"])
    if not rows:
        raise ValueError("no verdict has a correlation")
    figure = Figure(figsize=(2 * SIZE[0], 1.2 + 0.26 * len(rows)), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.axvline(0, color="black", linewidth=0.8)
    for shift, colour, name, keys in (
        (0.13, COLOURS[0], "Pearson", ("value", "low", "high")),
        (-0.13, COLOURS[1], "clean accuracy held fixed", ("partial", "partial_low", "partial_high")),
    ):
        points = [
            (y, dict(zip(("value", "low", "high"), (r[k] for k in keys), strict=True))) for y, r in enumerate(rows)
        ]
        known = [(y, point) for y, point in points if point["value"] is not None]
        axes.errorbar(
            [point["value"] for _, point in known], [y + shift for y, _ in known], xerr=_errors([p for _, p in known]),
            linestyle="none", marker="o", markersize=4, elinewidth=1, color=colour, label=name,
        )  # fmt: skip
    axes.set_yticks(range(len(rows)), [r["of"].replace("_", " ") for r in rows], fontsize=8)
    axes.set_ylim(-0.7, len(rows) - 0.3)
    axes.grid(axis="x", alpha=0.25, linewidth=0.6)
    axes.set(xlim=(-1.02, 1.02), xlabel=f"correlation with {rows[0]['robustness'].replace('_', ' ')} (95 % intervals)")
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    return render(figure, form=form)
