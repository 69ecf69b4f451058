"""What rb-report says of one standard and one robust model: the answer, accuracy, red flags, maps, and the positive control."""

from __future__ import annotations

from typing import Any

from rbkit.cli._output import Folder
from rbkit.cli._study import Study

ACCURACIES = ("clean_accuracy", "robust_accuracy", "robust_accuracy_png")
BARS = ("insertion", "deletion", "relevance_mass", "pointing_game", "gini", "alignment", "max_sensitivity")
WORDS = {
    "insertion": "insertion curves", "deletion": "deletion curves", "relevance_mass": "relevance inside the object",
    "relevance_rank": "ranked relevance inside the object", "pointing_game": "the pointing game", "gini": "sparsity (Gini)",
    "entropy": "entropy of the maps", "alignment": "alignment of maps with the image", "etmann_alignment": "Etmann alignment",
    "completeness_error": "completeness error", "completeness_error_median": "completeness error, median",
    "max_sensitivity": "stability under noise", "latent_error": "latent error of inversion",
    "pixel_error": "pixel error of inversion", "low_frequency_error": "low-frequency error of inversion", "ssim": "structural similarity of inversion",
    "own_accuracy": "own recognition of made images", "judge_accuracy": "recognition of made images by a judge",
}  # fmt: skip
MODES = {"representation": "inversion", "class": "class image", "feature": "unit"}


def answer(study: Study) -> str:
    """The study's answer in one paragraph with numbers."""
    from rbkit.tools.compare import accuracies, by_metric, interpretability, paired

    base, hard = (accuracies(study.records, standard=s) for s in (True, False))
    rows = interpretability(paired(study.records))
    count = {v: sum(r["verdict"] == v for r in rows) for v in ("robust", "standard", "open")}
    eps = study.eps
    text = (
        f"At radius {eps:g} the standard model keeps {_share(base['robust'].get(eps))} of its images right "
        f"(clean {_share(base['clean'])}), the robust one {_share(hard['robust'].get(eps))} (clean {_share(hard['clean'])}). "
        f"Of {len(rows)} interpretability comparisons the robust model is better in {count['robust']}, the standard one in "
        f"{count['standard']}, and {count['open']} stay open. "
    )
    intros = {
        "robust": "Wherever they decide, these favour the robust model",
        "standard": "these favour the standard one",
        "mixed": "the method decides for",
        "open": "open are",
    }
    groups = by_metric(rows)
    said = [
        f"{intros[v]}: {', '.join(WORDS.get(n, n.replace('_', ' ')) for n in groups[v])}" for v in intros if groups[v]
    ]
    return (
        text
        + "; ".join(said)
        + ". Two models cannot show that robustness is the cause: that takes a population of models."
    )


def sections(study: Study, bounds: dict[str, Any], folder: Folder | None) -> list[str]:
    """One standard and one robust model: the answer, accuracy and maps."""
    from rbkit.formats import html

    parts = [] if study.tag is None else [html.heading(study.titled("The two models"))]
    parts.append(html.paragraph("One standard and one adversarially trained model.", kind="sub"))
    parts.append(html.paragraph(answer(study), kind="answer"))
    parts += html.alarm("This study decides nothing", study.pair_failings(bounds))
    return parts + _accuracy_section(study, folder) + _flag_section(study) + _map_section(study, folder)


def _accuracy_section(study: Study, folder: Folder | None) -> list[str]:
    """Accuracy of both models in the ball and outside, as a table and as curves, and how they were trained."""
    from rbkit.formats import figures, html

    heads = ["model", "metric", "attack", "accuracy (95 %)", "n"]
    parts = [html.heading(study.titled("Accuracy")), html.table(heads, _accuracy_rows(study)), '<div class="pair">']
    files, names = " ".join(study.files), " ".join(name for name, _ in study.models)
    trained = [meta for _, meta in study.models]
    parts += _figure(lambda form: figures.accuracy_curves(study.records, form=form), "accuracy", folder,
                     "Accuracy under PGD against the radius.", f"rb-view {files} -o accuracy.png")  # fmt: skip
    parts += _figure(lambda form: figures.training_curves(trained, form=form), "training", folder,
                     "Validation accuracy during training.", f"rb-view {names} -o training.png")  # fmt: skip
    parts += _figure(lambda form: figures.training_curves(trained, quantity="loss", form=form), "loss", folder,
                     "Loss during training.", f"rb-view --metric loss {names} -o loss.png")  # fmt: skip
    return [*parts, "</div>"]


def _accuracy_rows(study: Study) -> list[list[str]]:
    """Each accuracy once; the clean one, which is of no attack, once per model."""
    from rbkit.formats import figures

    rows: dict[tuple[str, ...], list[str]] = {}
    for record in study.records:
        if record.get("kind") != "adversarial" or record["metric"] not in ACCURACIES:
            continue
        clean = record["metric"] == "clean_accuracy"
        attack = "none" if clean else f"{record.get('attack')} {record['norm']} {record['eps']:.4g}"
        named = [figures.model_name(record), record["metric"].replace("_", " ")]
        row = [*named, attack, _share(record), str(record["n"])]
        rows.setdefault(tuple(named if clean else row), row)
    return list(rows.values())


def _flag_section(study: Study) -> list[str]:
    """Signs of gradient masking and of failed attacks, where rb-score --flags looked for them; those that fire first."""
    from rbkit.formats import figures, html

    found = sorted((r for r in study.records if "flag" in r), key=lambda r: not r["fires"])
    if not found:
        return []
    fired = sum(bool(r["fires"]) for r in found)
    rows = [
        [figures.model_name(r), r["flag"].replace("_", " "), f"{r['norm']} {r['eps']:g}", _number(r), f"{r['limit']:g}",
         "undecided" if r["fires"] is None else "fires" if r["fires"] else "quiet", r.get("detail") or ""]
        for r in found
    ]  # fmt: skip
    said = f"{fired} of {len(found)} checks fire." if fired else f"None of {len(found)} checks fires."
    heads = ["model", "flag", "attack", "value", "limit", "", "found"]
    return [html.heading(study.titled("Red flags")), html.paragraph(said), html.table(heads, rows)]


def _map_section(study: Study, folder: Folder | None) -> list[str]:
    """Every interpretability metric of both models with its verdict, and bars of the main ones."""
    from rbkit.formats import figures, html
    from rbkit.tools.compare import interpretability, paired

    rows = []
    for row in interpretability(paired(study.records)):
        robust, standard = row["robust"], row["standard"]
        chance = (robust.get("band") or {}).get("random", robust.get("floor"))
        rows.append([
            row["metric"].replace("_", " "), _of(robust), _number(standard), _number(robust),
            "" if chance is None else f"{chance:.3g}", robust["better"], str(robust["n"]), row["verdict"],
        ])  # fmt: skip
    heads = ["metric", "of", "standard (95 %)", "robust (95 %)", "chance", "better", "n", "verdict"]
    parts = [html.heading(study.titled("Interpretability")), html.table(heads, rows, marked=7)]
    parts.append(
        html.paragraph(
            "Chance is a random map on the same images, and for the Frechet distance the images begun with. A verdict is given "
            "only where the two intervals do not touch."
        )
    )
    files = " ".join(study.files)
    parts.append('<div class="pair">')
    for metric in BARS:
        caption = f"{WORDS[metric][0].upper()}{WORDS[metric][1:]}, by method; dotted: a random map on the same images."
        parts += _figure(lambda form, m=metric: figures.metric_bars(study.records, m, form=form), metric, folder, caption,
                         f"rb-view --metric {metric} {files} -o {metric}.png")  # fmt: skip
    return [*parts, "</div>"]


def control_section(records: list[dict[str, Any]]) -> list[str]:
    """Whether each metric tells a model that leans on a planted cue from one that does not."""
    from rbkit.formats import html
    from rbkit.tools.control import control_failings, swap_losses, validated

    if not records:
        return []
    lost, reasons = swap_losses(records), control_failings(records)
    parts = [html.heading("The positive control")]
    if len(lost) == 2:
        parts.append(html.paragraph(
            f"A faint cue of L2 norm {records[0]['cue']:g} is planted in the images. When it is swapped for that of another "
            f"class, the standard model loses {100 * lost['standard']:.1f} points of accuracy, the robust one {100 * lost['robust']:.1f}: "
            "so much does each lean on it. A metric that is worth its name prefers the model that looks at the object."
        ))  # fmt: skip
    if reasons:
        return parts + html.alarm("The control does not count", reasons)
    rows = [
        [row["metric"].replace("_", " "), str(row["robust"].get("method")), _number(row["standard"]), _number(row["robust"]),
         row["robust"]["better"], str(row["robust"]["n"]), row["tells"]]
        for row in validated(records)
    ]  # fmt: skip
    heads = ["metric", "of", "standard (95 %)", "robust (95 %)", "better", "n", "tells them apart"]
    return [*parts, html.table(heads, rows)]


def _figure(make: Any, name: str, folder: Folder | None, caption: str, command: str) -> list[str]:
    """A figure embedded as SVG and, where asked for, kept as files; nothing where there is no data for it."""
    from rbkit.formats import html

    try:
        raw = make("svg")
    except ValueError:
        return []
    if folder is not None:
        for form in ("png", "svg", "pdf"):
            folder.write(f"{name}.{form}", make(form))
    return [html.picture(raw, caption=caption, command=command)]


def _share(record: dict[str, Any] | None) -> str:
    if record is None or record["value"] is None:
        return "not measured"
    interval = "" if record["low"] is None else f" ({100 * record['low']:.1f} to {100 * record['high']:.1f})"
    return f"{100 * record['value']:.1f} %{interval}"


def _number(record: dict[str, Any]) -> str:
    if record["value"] is None:
        return record.get("reason", "not measured")
    interval = "" if record["low"] is None else f" ({record['low']:.3g} to {record['high']:.3g})"
    return f"{record['value']:.3g}{interval}"


def _of(record: dict[str, Any]) -> str:
    """The method of a map, or the mode of an inversion and where it began."""
    if record.get("method"):
        return str(record["method"])
    mode, params = str(record.get("mode")), record.get("params") or {}
    begun = [str(params["start"])] if "start" in params else []
    again = [f"seed {params['seed']}"] if params.get("seed") else []
    return ", ".join([MODES.get(mode, mode), *begun, *again])
