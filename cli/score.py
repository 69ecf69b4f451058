"""rb-score: what streams are worth, recomputed from their bytes."""

from __future__ import annotations

import hashlib
import json
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rbkit.cli import _gates, _history, _io, _values
from rbkit.cli._app import program
from rbkit.cli._compute import Model, check_input, load_model, set_up, to_tensor
from rbkit.cli._errors import Input, Numbers, Usage, blame
from rbkit.cli._options import (
    BLOCK,
    DOCUMENT_LIMIT,
    ArchName,
    Block,
    Device,
    Json,
    MaxDocument,
    ModelFiles,
    NoHistory,
    Quiet,
    Shard,
    Sources,
    Threads,
)
from rbkit.cli._progress import Progress
from rbkit.formats.errors import FormatError

if TYPE_CHECKING:
    from rbkit.formats.stream import Chunk
    from rbkit.tools.metrics import Batch
    from rbkit.tools.pool import Pools

PREFIX = "score."
SHARED = 16  # chunks whose chance bands are kept for the next method
SIGNED = ("ig", "shap", "input-x-gradient")


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
        typer.Option("--metrics", metavar="A,B,...", help="Only these; default all that apply.", show_default=False),
    ] = None,
    bands: Annotated[
        bool, typer.Option("--bands/--no-bands", help="Chance values of attribution metrics from the same images.")
    ] = True,
    reduce: Annotated[
        str,
        typer.Option(
            "--reduce",
            metavar="auto|signed|abs",
            help="Channels of a map: sum, or sum of absolute values; auto: signed for ig, shap, input-x-gradient.",
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
    per_example: Annotated[
        bool, typer.Option("--per-example", help="One line per image instead: name, prediction, values.")
    ] = False,
    json_: Json = False,
    block: Block = BLOCK,
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
            help="Also keep the values per example: a stream of scores that merges by cat.",
            show_default=False,
        ),
    ] = None,
    quiet: Quiet = False,
    no_history: NoHistory = False,
) -> None:
    """Judge streams: accuracy and robustness, attributions, inversions, each number with its interval.

    A table on a terminal, JSON lines in a pipe. Nothing is believed: norms, box and predictions are computed again
    from the stored bytes. Streams of one model, attack and parameters are pooled; an input of scores needs no model.
    """
    options = dict(locals())
    _values.choice(reduce, ("auto", "signed", "abs"), option="--reduce")
    _values.block(block)
    gates = _gates.parse(expect)
    names = None if metrics is None else _metric_names(metrics)
    place = set_up(device, threads)
    archs = None if arch is None else list(arch)
    subjects = [load_model(path, archs=archs, device=place) for path in models or []]
    referee = None if judge is None else load_model(judge, archs=archs, device=place)
    run = _Run(options, names, subjects, referee, place)
    for source in sources or ["-"]:
        run.read(source)
    _finish(run, gates, options)


def _metric_names(text: str) -> list[str]:
    from rbkit.tools.metrics import METRICS

    names = text.split(",")
    for name in names:
        _values.choice(name, tuple(METRICS), option="--metrics")
    return names


class _Run:
    """A pass over the inputs: batches are judged by each model and their values pooled."""

    def __init__(
        self,
        options: dict[str, Any],
        names: list[str] | None,
        subjects: list[Model],
        referee: Model | None,
        device: Any,
    ) -> None:
        from rbkit.tools.pool import Pools

        self.options, self.names, self.device = options, names, device
        self.subjects = [(model, model.evaluation(options["block"])) for model in subjects]
        self.referee = None if referee is None else referee.evaluation(options["block"])
        self.background = self._background(options["background"])
        self.pools: Pools = Pools()
        self.lines: list[dict[str, Any]] = []
        self.shared: dict[bytes, dict[str, Any]] = {}
        self.history: list[dict[str, Any]] = []

    def _background(self, path: str | None) -> Any:
        if path is None:
            return None
        from rbkit.cli.saliency import _background

        if not self.subjects:
            raise Usage("--background needs a model")
        return _background(path, self.subjects[0][0], self.options["max_document"], self.device)

    def read(self, source: str) -> None:
        """One input."""
        part = _values.shard(self.options["shard"])
        with Progress("rb-score", total=None, unit="images", quiet=self.options["quiet"]) as progress:
            checker = _checker(self.subjects[0][0].classes if self.subjects else None)
            for chunk in _io.chunks(source, shard=part, max_document=self.options["max_document"]):
                self._take(chunk, checker)
                progress.expect(None if part else chunk.meta.get("total"))
                progress.advance(chunk.count)

    def _take(self, chunk: Chunk, checker: Any) -> None:
        if chunk.meta["kind"] == "scores":
            self._scores(chunk)
            return
        if chunk.meta["kind"] in ("model", "checkpoint"):
            raise Input(f"{chunk.place}: a {chunk.meta['kind']}, expected a stream of images; models go with -m")
        if not self.subjects:
            raise Usage("no model: give one with -m (only a stream of scores needs none)")
        with blame(Input, FormatError):
            chunk = checker(chunk)
        chunk = self._sampled(chunk)
        self.history = self.history or list(chunk.meta.get("history") or [])
        for model, evaluation in self.subjects:
            check_input(model, chunk.arrays["image"].shape[1:], place=chunk.place)
            self._judge(chunk, model, evaluation)

    def _sampled(self, chunk: Chunk) -> Chunk:
        """The rows of a nested sample of the whole stream that lie in this chunk."""
        if self.options["n"] is None:
            return chunk
        import numpy as np

        from rbkit.tools.sample import nested_sample

        total = chunk.meta.get("total")
        if not isinstance(total, int):
            raise Usage("--n needs the total number of rows, which this input does not tell")
        chosen = nested_sample(total, min(self.options["n"], total), seed=0)
        inside = np.isin(np.arange(chunk.first, chunk.first + chunk.count), chosen)
        meta = {**chunk.meta, "count": int(inside.sum())}
        return type(chunk)({k: a[inside] for k, a in chunk.arrays.items()}, meta, chunk.last, chunk.place)

    def _judge(self, chunk: Chunk, model: Model, evaluation: Any) -> None:
        from rbkit.tools.metrics import applicable, evaluate

        batch = _batch(chunk, evaluation, self)
        names = applicable(chunk.meta["kind"], batch)
        if _unlabelled(chunk):
            names = [name for name in names if name != "clean_accuracy"]  # it would be 1 by definition
        if self.names is not None:
            names = [name for name in names if name in self.names]
        if batch.saliency is not None and batch.saliency.method == "shap" and self.background is None:
            names = [name for name in names if name != "max_sensitivity"]
        self._share(batch, model)
        columns = evaluate(batch, names) | self._chance(batch, names) if chunk.count else {}
        if self.options["per_example"]:
            self.lines += _lines(chunk, model, batch, columns)
            return
        if not names:
            raise Input(f"{chunk.place}: nothing to score (no labels?); try rb-data --label, or --per-example")
        if chunk.count:
            self._pool(chunk, _about(chunk, model, batch), columns)

    def _chance(self, batch: Batch, names: list[str]) -> dict[str, Any]:
        """The chance band of the batch's metrics, from what batches of the same rows and classes share."""
        from rbkit.tools.metrics import METRICS, chance

        banded = [name for name in names if METRICS[name].band]
        if not banded or not self.options["bands"]:
            return {}
        bands = batch.shared.setdefault("bands", {})
        missing = [name for name in banded if f"{name}@random" not in bands]
        bands.update(chance(batch, missing) if missing else {})
        return {key: values for key, values in bands.items() if key.partition("@")[0] in banded}

    def _share(self, batch: Batch, model: Model) -> None:
        """Let batches of the same model, rows and classes share what does not depend on the method."""
        if batch.explained is None or batch.target is None:
            return
        key = hashlib.sha256(model.sha.encode())
        for tensor in (batch.ids, batch.target, batch.explained):
            key.update(tensor.cpu().contiguous().numpy().tobytes())
        if key.digest() not in self.shared and len(self.shared) >= SHARED:
            self.shared.pop(next(iter(self.shared)))
        batch.shared = self.shared.setdefault(key.digest(), {})

    def _pool(self, chunk: Chunk, about: dict[str, Any], columns: dict[str, Any]) -> None:
        from rbkit.formats.document import digest

        total = chunk.meta.get("total")
        # A shard and its siblings share history and total; another data set differs in one of them.
        origin = digest([chunk.meta.get("history") or chunk.meta.get("sha256"), total])
        with blame(Input, ValueError, prefix=f"{chunk.place}: "):
            pool = self.pools.of(about)
            pool.add(to_tensor(chunk.arrays["id"], "cpu"), columns, origin=origin, total=total, first=chunk.first)  # type: ignore[arg-type]

    def _scores(self, chunk: Chunk) -> None:
        """Values per example of an earlier run."""
        import torch

        described = chunk.meta.get("scores") or {}
        names = [name for name in chunk.arrays if name.startswith(PREFIX)]
        if not isinstance(described.get("about"), dict) or "id" not in chunk.arrays:
            raise Input(f"{chunk.place}: scores without id or without what they are about")
        columns = {name.removeprefix(PREFIX): torch.from_numpy(chunk.arrays[name].astype("float64")) for name in names}
        self._pool(chunk, described["about"], columns)


def _checker(classes: int | None) -> Any:
    from rbkit.formats.rows import RowChecker

    return RowChecker(classes=classes)


def _unlabelled(chunk: Chunk) -> bool:
    """Whether an attacked stream has no labels: the model's predictions on the clean images then stand in."""
    return "adversarial" in chunk.arrays and "label" not in chunk.arrays


def _batch(chunk: Chunk, evaluation: Any, run: _Run) -> Batch:
    """A chunk as what the metrics read."""
    from rbkit.tools.metrics import Batch
    from rbkit.tools.saliency import Saliency
    from rbkit.tools.train import as_float

    def tensor(name: str) -> Any:
        return to_tensor(chunk.arrays[name], run.device) if name in chunk.arrays else None

    attack, described = chunk.meta.get("attack") or {}, chunk.meta.get("saliency") or {}
    image = as_float(tensor("image"))
    spec = (
        Saliency(**{k: v for k, v in described.items() if k in Saliency.__dataclass_fields__})
        if described.get("method")
        else None
    )
    reduce = run.options["reduce"]
    signed = reduce == "signed" or (reduce == "auto" and described.get("method") in SIGNED)
    of = described.get("of", "image")
    explained = (
        None if "attribution" not in chunk.arrays else as_float(tensor(of) if of in chunk.arrays else tensor("image"))
    )
    inversion = chunk.meta.get("inversion") or {}
    label = evaluation.logits(image).argmax(1) if _unlabelled(chunk) else tensor("label")
    return Batch(
        evaluation, tensor("id"), image, label=label, adversarial=tensor("adversarial"), norm=attack.get("norm", "l2"),
        eps=attack.get("eps"), attack_target=tensor("attack_target"), attribution=tensor("attribution"), explained=explained,
        target=tensor("target"), saliency=spec, mask=tensor("mask"), completeness=tensor("completeness_error"),
        inverted=tensor("inverted"), fit=image if inversion.get("mode", "representation") == "representation" else None,
        judge=run.referee, background=run.background, signed=signed,
    )  # fmt: skip


def _about(chunk: Chunk, model: Model, batch: Batch) -> dict[str, Any]:
    """What a record is of: the model, and the attack, method or inversion with all parameters."""
    recipe = model.meta.get("recipe") or {}
    about: dict[str, Any] = {
        "kind": chunk.meta["kind"], "model_sha": model.sha, "arch": model.meta.get("arch"), "train_method": recipe.get("method"),
        "train_norm": recipe.get("norm"), "train_eps": recipe.get("eps"), "train_seed": recipe.get("seed"),
    }  # fmt: skip
    attack = chunk.meta.get("attack")
    if attack:
        about |= {
            "attack": attack["name"],
            "norm": attack["norm"],
            "eps": attack["eps"],
            "crafted_on": attack.get("model"),
        }
    for kind, key in (("attributions", "saliency"), ("inversions", "inversion"), ("adversarial", "attack")):
        if chunk.meta["kind"] == kind:
            about["params"] = {k: v for k, v in (chunk.meta.get(key) or {}).items() if k != "model"}
    if _unlabelled(chunk):
        about["label"] = "predicted"
    if "saliency" in chunk.meta:
        about |= {"method": chunk.meta["saliency"].get("method"), "reduce": "signed" if batch.signed else "abs"}
    if "inversion" in chunk.meta:
        about["mode"] = chunk.meta["inversion"].get("mode")
    return about


def _lines(chunk: Chunk, model: Model, batch: Batch, columns: dict[str, Any]) -> list[dict[str, Any]]:
    """A record per example: what the picture is called and taken for, and its values."""
    from rbkit.formats.folder import decode_names
    from rbkit.tools.statistics import finite_or_none

    names = decode_names(chunk.arrays["name"]) if "name" in chunk.arrays else [None] * chunk.count
    classes = model.meta.get("classes")
    shown = batch.clean_logits.softmax(1)
    confidence, predicted = shown.max(1)
    lines = []
    for row in range(chunk.count):
        k = int(predicted[row])
        line: dict[str, Any] = {
            "id": int(chunk.arrays["id"][row]),
            "name": names[row],
            "model_sha": model.sha,
            "predicted": k,
        }
        line |= {"class": classes[k] if classes else None, "confidence": float(confidence[row])}
        if batch.label is not None:
            line["label"] = int(batch.label[row])
        line |= {name: finite_or_none(float(values[row])) for name, values in columns.items() if "@" not in name}
        lines.append(line)
    return lines


def _finish(run: _Run, gates: list[_gates.Gate], options: dict[str, Any]) -> None:
    """Print, keep, and judge the gates."""
    if options["per_example"]:
        _print(run.lines, options["json_"])
        return
    records = run.pools.records()
    if not records:
        raise Input("no rows to score")
    if options["output"] is not None:
        _keep(run, options)
    _print(records, options["json_"])
    left = [r for r in records if r["metric"] == "ball_violation" and r["value"]]
    if gates:
        _gates.judge(gates, run.pools.records(confidence=_gates.CONFIDENCE))
    if left:
        worst = max(left, key=lambda r: r["value"])
        raise Numbers(
            f"{round(worst['value'] * worst['n'])} of {worst['n']} adversarial images lie outside the ball or the box"
        )


def _keep(run: _Run, options: dict[str, Any]) -> None:
    """The values per example, one stream per pool."""
    entry = _history.entry("rb-score", {k: v for k, v in options.items() if k not in ("judge", "background", "expect")})
    with _io.Sink(options["output"], no_history=options["no_history"]) as sink:
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
            sink.write(arrays, meta, last=True)


def _print(records: list[dict[str, Any]], json_: bool) -> None:
    if json_ or not sys.stdout.isatty():
        lines = (json.dumps(record, separators=(",", ":"), allow_nan=False) + "\n" for record in records)
        _io.write_stdout("".join(lines).encode())
        return
    from rbkit.cli._table import show

    show(records)


main = program("rb-score", score)

if __name__ == "__main__":
    sys.exit(main())
