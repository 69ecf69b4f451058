"""rb-report: records, models and sheets to one page."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from rbkit.cli import _history, _link_page, _output, _pair_page, _published_page, _values
from rbkit.cli._app import program
from rbkit.cli._errors import CheckFailed, Input, Usage, blame
from rbkit.cli._options import NoClobber, Quiet
from rbkit.cli._options import Output as OutputFile
from rbkit.cli._study import Study
from rbkit.formats.errors import FormatError

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
    "dose": "Class images begun alike, by models of one seed that were trained at rising radius.",
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
    folder = _output.figures_folder(figures, no_clobber=no_clobber)
    low, _, high = clean.partition(":")
    bounds = {
        "clean": (_values.number(low, option="--clean"), _values.number(high or "1", option="--clean")),
        "gap": gap,
    }
    if output == "-" and sys.stdout.isatty():
        raise Usage("a page is too long for a terminal; use -o report.html")
    _output.check_writable(output)
    if table is not None and published is None:
        raise Usage("--table goes with --published FILE")
    study, said = Study(sources), note or ""
    numbers = [] if published is None else _published_page.read_published(published, table=table)
    compared = _compared(study, numbers, ours=ours, note=said) if numbers else []
    if table is None:
        page = _page(study, title, bounds, folder, note=said, compared=compared)
    else:
        page = _framed(title, [*_noted(said), *compared])
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
            *html.alarm("This population decides nothing", study.population_failings(bounds)),
            *_link_page.sections(study.link, study.drawn),
        ]
    parts += compared
    for part in study.parts():
        own = folder if folder is None or part.tag is None else folder.inside(part.tag)
        parts += _pair_page.sections(part, bounds, own)
    shown = [_sheet_section(part, part.sheets) for part in study.parts()]
    rest = [name for name in study.sheets if all(name not in part.sheets for part in study.parts())]
    sheets = [line for section in [*shown, _sheet_section(study, rest)] for line in section]
    return _framed(title, parts + _pair_page.control_section(study.control) + sheets + _made_section(study))


def _sheet_section(study: Study, sheets: list[str]) -> list[str]:
    """Sheets with the commands that remake them of the streams beside the study's models."""
    from rbkit.formats import html

    parts = [html.heading(study.titled("Pictures"))] if sheets else []
    for name in sheets:
        kind = Path(name).stem.removeprefix("sheet-")
        with blame(Input, OSError):
            raw = Path(name).read_bytes()
        stems = [Path(m).with_suffix("") for m, _ in study.models]
        ending = "rbs" if kind == "attacked" else "safetensors"
        made = _sheet_made(name)
        files = [str(Path(name).parent / file) for file in made.get("files", [])]
        sources = " ".join(files or [f"{stem}.{kind}.{ending}" for stem in stems])
        command = f"rb-view {sources} {_sheet_options(made)}-o {Path(name).name}"
        parts.append(html.picture(raw, caption=SHEETS.get(kind, kind), command=command))
    return parts


def _sheet_made(name: str) -> dict[str, Any]:
    """How a sheet was drawn, as it says itself: rows, spread, and the files of a sheet of several."""
    from rbkit.formats import png

    with blame(Input, FormatError, OSError):
        return png.open_picture(name).text.get("sheet") or {}


def _sheet_options(made: dict[str, Any]) -> str:
    rows = f"--rows {made['rows']} " if "rows" in made else ""
    return rows + ("--spread " if made.get("spread") else "")


def _made_section(study: Study) -> list[str]:
    from rbkit.formats import html

    parts = [html.heading("How it was made")] if study.models else []
    for name, meta in study.models:
        parts += [html.paragraph(name), html.code(_history.replay_lines(meta.get("history") or []))]
    return parts


main = program("rb-report", report)

if __name__ == "__main__":
    sys.exit(main())
