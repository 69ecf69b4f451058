"""rb-report: records, models and sheets to one page."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from rbkit.cli import _link_page, _output, _published_page, _values
from rbkit.cli._app import program
from rbkit.cli._errors import CheckFailed, Input, Usage, blame
from rbkit.cli._options import NoClobber, Quiet
from rbkit.cli._options import Output as OutputFile
from rbkit.cli._study import Study
from rbkit.formats.errors import FormatError

BARS = ("insertion", "deletion", "relevance_mass", "pointing_game", "gini", "alignment", "max_sensitivity")
WORDS = {
    "insertion": "insertion curves", "deletion": "deletion curves", "relevance_mass": "relevance inside the object",
    "relevance_rank": "ranked relevance inside the object", "pointing_game": "the pointing game", "gini": "sparsity (Gini)",
    "entropy": "entropy of the maps", "alignment": "alignment of maps with the image", "etmann_alignment": "Etmann alignment",
    "completeness_error": "completeness error", "max_sensitivity": "stability under noise", "latent_error": "latent error of inversion",
    "pixel_error": "pixel error of inversion", "low_frequency_error": "low-frequency error of inversion", "ssim": "structural similarity of inversion",
    "own_accuracy": "own recognition of made images", "judge_accuracy": "recognition of made images by a judge",
}  # fmt: skip
MODES = {"representation": "inversion", "class": "class image", "feature": "unit"}
SHEETS = {
    "attacked": "Adversarial images: clean image, then for each radius the attacked image and the difference; first the standard, then the robust model.",
    "gradient": "Gradients of the predicted logit: standard, then robust model.",
    "ig": "Integrated gradients: standard, then robust model.",
    "smoothgrad": "SmoothGrad: standard, then robust model.",
    "shap": "Expected gradients (SHAP): standard, then robust model.",
    "inverted": "Inverted representations: the image, then start and inversion for the standard and the robust model.",
    "classes": "Class images grown from Gaussian seeds: seed and result for the standard and the robust model.",
    "inverted-1": "Inverted representations, begun at another test image.",
    "inverted-2": "Inverted representations, begun at a second other image.",
    "units": "Units before the head: the most exciting test image, then what excites the unit most, for both models.",
}


def report(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="FILE...",
            help="Records (.jsonl of rb-score and rb-link), models, sheets (.png of rb-view), figures (.svg of rb-link).",
        ),
    ],
    title: Annotated[str, typer.Option("--title", metavar="TEXT", help="What the study is of.")] = "study",
    require: Annotated[
        bool,
        typer.Option(
            "--require", help="Status 8 where the study would be worthless; the page is written all the same."
        ),
    ] = False,
    clean: Annotated[
        str,
        typer.Option("--clean", metavar="LOW:HIGH", help="--require: bounds of the standard model's clean accuracy."),
    ] = "0.5:1",
    gap: Annotated[
        float,
        typer.Option(
            "--gap", metavar="X", min=0, max=1, help="--require: how far the robust model must be ahead under attack."
        ),
    ] = 0.3,
    figures: Annotated[
        str | None,
        typer.Option("--figures", metavar="DIR/", help="Keep the figures as PNG, SVG and PDF too.", show_default=False),
    ] = None,
    published: Annotated[
        str | None,
        typer.Option(
            "--published",
            metavar="FILE",
            help="Published numbers to stand beside ours, as JSON lines.",
            show_default=False,
        ),
    ] = None,
    table: Annotated[
        str | None,
        typer.Option(
            "--table", metavar="NAME", help="--published: this table alone, and nothing else.", show_default=False
        ),
    ] = None,
    note: Annotated[
        str | None,
        typer.Option(
            "--note",
            metavar="TEXT",
            help="What a reader must know of the numbers; said with each table.",
            show_default=False,
        ),
    ] = None,
    ours: Annotated[str, typer.Option("--ours", metavar="TEXT", help="--published: head of our column.")] = "ours",
    output: OutputFile = "-",
    no_clobber: NoClobber = False,
    quiet: Quiet = False,
) -> None:
    """Write one self-contained page: the answer, figures, tables with intervals, and the commands that made them."""
    _output.refuse_taken(output, figures, no_clobber=no_clobber)
    low, _, high = clean.partition(":")
    bounds = {
        "clean": (_values.number(low, option="--clean"), _values.number(high or "1", option="--clean")),
        "gap": gap,
    }
    if table is not None and published is None:
        raise Usage("--table goes with --published FILE")
    study, said = Study(sources), note or ""
    numbers = [] if published is None else _published_page.read_published(published, table=table)
    compared = _compared(study, numbers, ours=ours, note=said) if numbers else []
    if table is None:
        folder = None if figures is None else _output.Folder(figures, no_clobber=no_clobber)
        page = _page(study, title, bounds, folder, note=said, compared=compared)
    else:
        page = _framed(title, [*_noted(said), *compared])
    if output == "-" and sys.stdout.isatty():
        raise Usage("a page is too long for a terminal; use -o report.html")
    _output.write_file(output, page, no_clobber=no_clobber)
    if require:
        reasons = study.failings(bounds)
        if reasons:
            raise CheckFailed("; ".join(reasons))


def _compared(study: Study, numbers: list[dict[str, Any]], *, ours: str, note: str) -> list[str]:
    """Published numbers beside those of each part of the study."""
    from rbkit.tools.published import compared, training_records

    parts = []
    for part in study.parts():
        trained = [record for _, meta in part.models for record in training_records(meta)]
        parts.append((part.tag, compared(numbers, part.records + trained)))
    return _published_page.sections(parts, ours=ours, note=note)


def _noted(note: str) -> list[str]:
    from rbkit.formats import html

    return [html.paragraph(note, kind="answer alarm")] if note else []


def _framed(title: str, parts: list[str]) -> bytes:
    """A page under the question that it is about."""
    from rbkit.formats import html

    head = html.heading("Does robust training make a classifier more interpretable?", level=1)
    return html.page(f"rbkit: {title}", [head, html.paragraph(f"{title}; every interval is 95 %.", kind="sub"), *parts])


def _page(
    study: Study, title: str, bounds: dict[str, Any], folder: _output.Folder | None, *, note: str, compared: list[str]
) -> bytes:
    from rbkit.formats import html

    parts = _noted(note)
    if study.link:
        parts += [
            html.paragraph("A population of models.", kind="sub"),
            html.paragraph(_link_page.answer(study.link), kind="answer"),
            *_alarm("This population decides nothing", study.population_failings(bounds)),
            *_link_page.sections(study.link, study.drawn),
        ]
    parts += compared
    for part in study.parts():
        own = folder if folder is None or part.tag is None else folder.inside(part.tag)
        parts += _pair_sections(part, bounds, own)
    shown = [_sheet_section(part, part.sheets) for part in study.parts()]
    rest = [name for name in study.sheets if all(name not in part.sheets for part in study.parts())]
    sheets = [line for section in [*shown, _sheet_section(study, rest)] for line in section]
    return _framed(title, parts + _control_section(study) + sheets + _made_section(study))


def _headed(study: Study, text: str) -> str:
    """A heading that says which of several studies it is about."""
    from rbkit.formats import html

    return html.heading(text if study.tag is None else f"{text}: {study.tag}")


def _pair_sections(study: Study, bounds: dict[str, Any], folder: _output.Folder | None) -> list[str]:
    """One standard and one robust model: the answer, accuracy and maps."""
    from rbkit.formats import html

    parts = [] if study.tag is None else [_headed(study, "The two models")]
    parts.append(html.paragraph("One standard and one adversarially trained model.", kind="sub"))
    parts.append(html.paragraph(answer(study), kind="answer"))
    parts += _alarm("This study decides nothing", study.pair_failings(bounds))
    return parts + _accuracy_section(study, folder) + _flag_section(study) + _map_section(study, folder)


def _alarm(what: str, reasons: list[str]) -> list[str]:
    """A paragraph that says why numbers must not be trusted, where there is a reason."""
    from rbkit.formats import html

    return [html.paragraph(f"{what}: " + "; ".join(reasons) + ".", kind="answer alarm")] if reasons else []


def _share(record: dict[str, Any] | None) -> str:
    if record is None or record["value"] is None:
        return "not measured"
    interval = "" if record["low"] is None else f" ({100 * record['low']:.1f} to {100 * record['high']:.1f})"
    return f"{100 * record['value']:.1f} %{interval}"


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


def _accuracy_section(study: Study, folder: _output.Folder | None) -> list[str]:
    from rbkit.formats import figures, html

    rows = [
        [
            figures.model_name(r),
            r["metric"].replace("_", " "),
            f"{r.get('attack')} {r['norm']} {r['eps']:.4g}",
            _share(r),
            str(r["n"]),
        ]
        for r in study.records
        if r.get("kind") == "adversarial"
        and r["metric"] in ("clean_accuracy", "robust_accuracy", "robust_accuracy_png")
    ]
    parts = [
        _headed(study, "Accuracy"),
        html.table(["model", "metric", "attack", "accuracy (95 %)", "n"], _unique(rows)),
    ]
    files = " ".join(study.files)
    parts.append('<div class="pair">')
    parts += _figure(lambda form: figures.accuracy_curves(study.records, form=form), "accuracy", folder,
                     "Accuracy under PGD against the radius.", f"rb-view {files} -o accuracy.png")  # fmt: skip
    names = " ".join(name for name, _ in study.models)
    parts += _figure(lambda form: figures.training_curves([m for _, m in study.models], form=form), "training", folder,
                     "Validation accuracy during training.", f"rb-view {names} -o training.png")  # fmt: skip
    parts += _figure(lambda form: figures.training_curves([m for _, m in study.models], quantity="loss", form=form), "loss",
                     folder, "Loss during training.", f"rb-view --metric loss {names} -o loss.png")  # fmt: skip
    return [*parts, "</div>"]


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
    return [_headed(study, "Red flags"), html.paragraph(said), html.table(heads, rows)]


def _unique(rows: list[list[str]]) -> list[list[str]]:
    seen: dict[tuple[str, ...], list[str]] = {}
    for row in rows:
        key = tuple(row) if row[1] != "clean accuracy" else (row[0], row[1])
        seen.setdefault(key, row if row[1] != "clean accuracy" else [row[0], row[1], "none", *row[3:]])
    return list(seen.values())


def _figure(make: Any, name: str, folder: _output.Folder | None, caption: str, command: str) -> list[str]:
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


def _map_section(study: Study, folder: _output.Folder | None) -> list[str]:
    from rbkit.formats import figures, html
    from rbkit.tools.compare import interpretability, paired

    rows = []
    for row in interpretability(paired(study.records)):
        robust, standard = row["robust"], row["standard"]
        chance = (robust.get("band") or {}).get("random", robust.get("floor"))
        arrow = "higher" if robust["better"] == "higher" else "lower"
        rows.append([
            row["metric"].replace("_", " "), _of(robust), _number(standard), _number(robust),
            "" if chance is None else f"{chance:.3g}", arrow, str(robust["n"]), row["verdict"],
        ])  # fmt: skip
    heads = ["metric", "of", "standard (95 %)", "robust (95 %)", "chance", "better", "n", "verdict"]
    parts = [_headed(study, "Interpretability"), html.table(heads, rows, marked=7)]
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


def _control_section(study: Study) -> list[str]:
    """Whether each metric tells a model that leans on a planted cue from one that does not."""
    from rbkit.formats import html
    from rbkit.tools.compare import control_failings, swap_losses, validated

    if not study.control:
        return []
    lost, reasons = swap_losses(study.control), control_failings(study.control)
    parts = [html.heading("The positive control")]
    if len(lost) == 2:
        parts.append(html.paragraph(
            f"A faint cue of L2 norm {study.control[0]['cue']:g} is planted in the images. When it is swapped for that of another "
            f"class, the standard model loses {100 * lost['standard']:.1f} points of accuracy, the robust one {100 * lost['robust']:.1f}: "
            "so much does each lean on it. A metric that is worth its name prefers the model that looks at the object."
        ))  # fmt: skip
    if reasons:
        return parts + _alarm("The control does not count", reasons)
    rows = [
        [row["metric"].replace("_", " "), str(row["robust"].get("method")), _number(row["standard"]), _number(row["robust"]),
         row["robust"]["better"], str(row["robust"]["n"]), row["tells"]]
        for row in validated(study.control)
    ]  # fmt: skip
    heads = ["metric", "of", "standard (95 %)", "robust (95 %)", "better", "n", "tells them apart"]
    return [*parts, html.table(heads, rows)]


def _sheet_section(study: Study, sheets: list[str]) -> list[str]:
    """Sheets with the commands that remake them of the streams beside the study's models."""
    from rbkit.formats import html

    parts = [_headed(study, "Pictures")] if sheets else []
    for name in sheets:
        kind = Path(name).stem.removeprefix("sheet-")
        with blame(Input, OSError):
            raw = Path(name).read_bytes()
        stems = [Path(m).with_suffix("") for m, _ in study.models]
        ending = "rbs" if kind == "attacked" else "safetensors"
        sources = " ".join(f"{stem}.{kind}.{ending}" for stem in stems)
        command = f"rb-view {sources} {_sheet_options(name)}-o {Path(name).name}"
        parts.append(html.picture(raw, caption=SHEETS.get(kind, kind), command=command))
    return parts


def _sheet_options(name: str) -> str:
    """The options that a sheet was drawn with, as it says itself."""
    from rbkit.formats import png

    with blame(Input, FormatError, OSError):
        drawn = png.open_picture(name).text.get("sheet") or {}
    rows = f"--rows {drawn['rows']} " if "rows" in drawn else ""
    return rows + ("--spread " if drawn.get("spread") else "")


def _made_section(study: Study) -> list[str]:
    from rbkit.cli.info import replay_lines
    from rbkit.formats import html

    parts = [html.heading("How it was made")] if study.models else []
    for name, meta in study.models:
        parts += [html.paragraph(name), html.code(replay_lines(meta.get("history") or []))]
    return parts


main = program("rb-report", report)

if __name__ == "__main__":
    sys.exit(main())
