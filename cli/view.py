"""rb-view: any stream to pictures, and records of scores to curves."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from rbkit.cli import _input, _output
from rbkit.cli._app import program
from rbkit.cli._errors import Input, Output, Usage, blame
from rbkit.cli._options import DOCUMENT_LIMIT, MaxDocument, NoClobber, Quiet, Sources
from rbkit.cli._options import Output as OutputFile
from rbkit.cli._rows import watched
from rbkit.formats.errors import FormatError


def view(
    sources: Sources = None,
    rows: Annotated[int, typer.Option("--rows", metavar="N", min=1, help="The most rows of a contact sheet.")] = 24,
    spread: Annotated[
        bool, typer.Option("--spread", help="Rows of a contact sheet at even distances, instead of the first.")
    ] = False,
    metric: Annotated[
        str | None,
        typer.Option(
            "--metric",
            metavar="NAME",
            help="Records: bars of this metric instead of accuracy curves; models: accuracy (default) or loss.",
            show_default=False,
        ),
    ] = None,
    output: OutputFile = "-",
    no_clobber: NoClobber = False,
    max_document: MaxDocument = DOCUMENT_LIMIT,
    quiet: Quiet = False,
) -> None:
    """Show streams: a contact sheet (-o x.png), or one PNG per example (-o folder/, or - for PNGs back to back).

    Several streams of the same images stand side by side, paired by id. Single pictures keep what they show: heat maps
    are palette PNGs with vmin and vmax, adversarial images are rounded to 8 bits inside their ball. JSON lines of
    rb-score become curves of accuracy against eps, or bars of a --metric; models become curves of their training.
    """
    names = sources or ["-"]
    _output.refuse_taken(output, no_clobber=no_clobber)
    if output == "-":
        _output.refuse_terminal()
    elif not (output.endswith("/") or output.lower().endswith(".png")):
        raise Usage(f"-o {output}: expected a name ending in .png, or a folder ending in /")
    if all(_is_text(name) for name in names):
        _output.write_file(output, _curves(names, output, metric), no_clobber=no_clobber)
        return
    if names != ["-"] and output.lower().endswith(".png") and all(map(_is_model, names)):
        _output.write_file(output, _training(names, metric or "accuracy"), no_clobber=no_clobber)
        return
    from rbkit.cli._pictures import PictureWriter, names_of
    from rbkit.formats.rows import RowChecker

    with blame(Output, OSError):
        writer = PictureWriter(output, rows=rows, spread=spread, no_clobber=no_clobber)
    writer.files = [Path(name).name for name in names]
    for name, shown in zip(names, names_of(names), strict=True):
        checker = RowChecker()
        writer.source = shown if len(names) > 1 else ""
        for chunk in watched(_input.chunks(name, max_document=max_document), tool="rb-view", quiet=True, unit="rows"):
            if chunk.meta["kind"] not in ("model", "checkpoint", "scores"):
                with blame(Input, FormatError):
                    chunk = checker(chunk)
            writer.write(chunk.arrays, chunk.meta, last=chunk.last)
    writer.close()


def _is_text(name: str) -> bool:
    """Whether a file holds JSON lines; standard input is taken as a stream."""
    if name == "-":
        return False
    with blame(Input, OSError), Path(name).open("rb") as file:
        start = file.read(9)
    # A stream has its header's brace at byte 8, after the length.
    return start[:1] == b"{" and start[:8].isascii() and b"\0" not in start[:8]


def _curves(names: list[str], output: str, metric: str | None) -> bytes:
    from rbkit.formats.figures import accuracy_curves, metric_bars
    from rbkit.formats.table import read_records

    if output.endswith("/"):
        raise Usage("curves are one picture; expected -o NAME.png")
    records: list[dict[str, Any]] = []
    for name in names:
        with blame(Input, FormatError, OSError):
            records += read_records(Path(name))
    with blame(Input, ValueError):
        return accuracy_curves(records, form="png") if metric is None else metric_bars(records, metric, form="png")


def _is_model(name: str) -> bool:
    with blame(Input, FormatError, OSError):
        return next(iter(_input.reader(name))).meta["kind"] == "model"


def _training(names: list[str], quantity: str) -> bytes:
    from rbkit.cli._compute import model_chunk
    from rbkit.formats.figures import training_curves

    with blame(Input, ValueError):
        return training_curves([model_chunk(name).meta for name in names], quantity=quantity, form="png")


main = program("rb-view", view)

if __name__ == "__main__":
    sys.exit(main())
