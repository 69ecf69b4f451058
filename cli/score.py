"""rb-score: what streams are worth, recomputed from their bytes."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from rbkit.cli import _flags, _gates, _history, _output, _table, _values
from rbkit.cli._app import program
from rbkit.cli._compute import block_on, load_model, set_up
from rbkit.cli._errors import Failure, Input, Numbers, Usage
from rbkit.cli._judge import FEATURES, PREFIX, Judge
from rbkit.cli._log import note
from rbkit.cli._options import (
    DOCUMENT_LIMIT,
    ArchName,
    Block,
    Device,
    Json,
    MaxDocument,
    ModelFiles,
    NoClobber,
    NoHistory,
    Quiet,
    Shard,
    Sources,
    Threads,
)


def score(
    sources: Sources = None,
    models: ModelFiles = None,
    arch: ArchName = None,
    judge: Annotated[
        str | None,
        typer.Option("--judge", metavar="FILE", help="Independent model that judges inversions.", show_default=False),
    ] = None,
    background: Annotated[
        str | None,
        typer.Option(
            "--background", metavar="FILE", help="Reference images, to explain again by shap.", show_default=False
        ),
    ] = None,
    metrics: Annotated[
        str | None,
        typer.Option(
            "--metrics",
            metavar="all|A,B,...",
            help="Only these; default all that apply and are not slow.",
            show_default=False,
        ),
    ] = None,
    bands: Annotated[
        bool, typer.Option("--bands/--no-bands", help="Chance values of attribution metrics from the same images.")
    ] = True,
    reduce: Annotated[
        str,
        typer.Option(
            "--reduce",
            metavar="auto|signed|abs",
            help="Channels of a map: sum, or sum of absolute values; auto: absolute for gradient, smoothgrad and guided-backprop, else signed.",
        ),
    ] = "auto",
    n: Annotated[
        int | None,
        typer.Option(
            "--n", metavar="N", min=1, help="Judge a seeded sample of N rows of each stream.", show_default=False
        ),
    ] = None,
    expect: Annotated[
        list[str] | None,
        typer.Option(
            "--expect",
            metavar="'METRIC >= X'",
            help="Gate: status 8 if it fails, 9 if undecided; may be repeated.",
            show_default=False,
        ),
    ] = None,
    paired: Annotated[
        bool,
        typer.Option("--paired", help="Also the difference of every two models on the same images, with its p-value."),
    ] = False,
    flags: Annotated[
        bool, typer.Option("--flags", help="Red flags of masked gradients and failed attacks; status 8 if one fires.")
    ] = False,
    tag: Annotated[
        str | None,
        typer.Option(
            "--tag",
            metavar="TEXT",
            help="A word in every record, by which rb-report tells studies apart.",
            show_default=False,
        ),
    ] = None,
    per_example: Annotated[
        bool, typer.Option("--per-example", help="One line per image instead: name, prediction, values.")
    ] = False,
    json_: Json = False,
    block: Block = None,
    shard: Shard = None,
    device: Device = "auto",
    threads: Threads = None,
    max_document: MaxDocument = DOCUMENT_LIMIT,
    output: Annotated[
        str | None,
        typer.Option(
            "-o",
            "--output",
            metavar="FILE",
            help="Also keep the values per example: a stream of scores that merges by cat; - is standard output, which then has no records.",
            show_default=False,
        ),
    ] = None,
    no_clobber: NoClobber = False,
    quiet: Quiet = False,
    no_history: NoHistory = False,
) -> None:
    """Judge streams: accuracy and robustness, attributions, inversions, each number with its interval.

    A table on a terminal, JSON lines in a pipe. Nothing is believed: norms, box and predictions are computed again
    from the stored bytes. Streams of one model, attack and parameters are pooled; an input of scores needs no model.
    """
    options = dict(locals())
    _output.refuse_taken(output, no_clobber=no_clobber)
    if output is not None:
        _output.check_writable(output)
    _values.choices(options, reduce=("auto", "signed", "abs"))
    _values.block(block)
    gates = _gates.parse(expect)
    together = {"--flags": flags, "--expect": expect, "--paired": paired, "--tag": tag, "-o": output}
    if per_example and (given := [name for name, value in together.items() if value]):
        raise Usage(f"--per-example tells each row on its own; leave out {given[0]}")
    names = None if metrics is None else _metric_names(metrics)
    place = set_up(device, threads)
    options["block"] = block_on(place, block)
    archs = None if arch is None else list(arch)
    subjects = [load_model(path, archs=archs, device=place) for path in models or []]
    referee = None if judge is None else load_model(judge, archs=archs, device=place)
    run = Judge(options, names, subjects, referee, place)
    for source in sources or ["-"]:
        run.read(source)
    _finish(run, gates, options)


def _metric_names(text: str) -> list[str]:
    from rbkit.tools.metrics import METRICS, OF_SETS

    known = (*METRICS, *OF_SETS)
    names = list(known) if text == "all" else text.split(",")
    for name in names:
        _values.choice(name, known, option="--metrics")
    return names


def _finish(run: Judge, gates: list[_gates.Gate], options: dict[str, Any]) -> None:
    """Print, keep, and judge the gates."""
    if options["per_example"]:
        _table.put(run.lines, json_=options["json_"])
        return
    records = _records(run, options)
    if not records:
        raise Input("no rows to score")
    _tell_missing(records, options)
    unkept = None
    try:
        if options["output"] is not None:
            _keep(run, options)
    except Failure as failure:  # told last: the records may have taken hours
        unkept = failure
    flagged: list[dict[str, Any]] = [] if run.flags is None else run.flags.records(run.pools)
    named = {} if options["tag"] is None else {"tag": options["tag"]}
    if options["output"] != "-":
        _table.put([record | named for record in records + flagged], json_=options["json_"])
    if unkept is not None:
        raise unkept
    _flags.refuse_fired(flagged)
    left = [r for r in records if r["metric"] == "ball_violation" and r["value"]]
    if gates:
        _gates.judge(gates, _records(run, options, confidence=_gates.CONFIDENCE))
    if left:
        worst = max(left, key=lambda r: r["value"])
        raise Numbers(
            f"{round(worst['value'] * worst['n'])} of {worst['n']} adversarial images lie outside the ball or the box"
        )
    _flags.refuse_undecided(flagged)


def _tell_missing(records: list[dict[str, Any]], options: dict[str, Any]) -> None:
    """Say which metrics were asked for by name and are of no stream here."""
    if options["quiet"] or options["metrics"] in (None, "all"):
        return
    missing = set(options["metrics"].split(",")) - {record["metric"] for record in records}
    if missing:
        note("rb-score", f"--metrics {','.join(sorted(missing))}: of no stream here, by its kind and its tensors")


def _records(run: Judge, options: dict[str, Any], *, confidence: float = 0.95) -> list[dict[str, Any]]:
    """Records of all pools, and of pairs of models. Raises: Usage where no two models met the same question."""
    records = run.pools.records(confidence=confidence)
    if records and options["paired"]:
        from rbkit.tools.paired import differences

        found = differences(run.pools, confidence=confidence)
        if not found:
            raise Usage("--paired: no two models here were judged on the same images; repeat -m, or give both streams")
        records += found
    return records


def _keep(run: Judge, options: dict[str, Any]) -> None:
    """The values per example, one stream per pool."""
    entry = _history.entry(
        "rb-score", {k: v for k, v in options.items() if k not in ("judge", "background", "expect", "flags", "tag")}
    )
    with _output.Sink(options["output"], no_history=options["no_history"], no_clobber=options["no_clobber"]) as sink:
        for pool in run.pools.pools.values():
            ids, columns = pool.joined()
            totals = [t for t in pool.totals.values() if t is not None]
            meta = {
                "kind": "scores",
                "first": pool.first,
                "total": sum(totals) if totals else len(ids),
                "scores": {"about": pool.about},
            }
            meta["history"] = _history.extended(run.history, entry)
            arrays = {"id": ids.numpy(), **{PREFIX + name: values.numpy() for name, values in columns.items()}}
            arrays |= {FEATURES + name: values.numpy() for name, values in pool.joined_features().items()}
            sink.write(arrays, meta, last=True)


main = program("rb-score", score)

if __name__ == "__main__":
    sys.exit(main())
