"""rb-verify: anybody's adversarial stream, rechecked from its bytes."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rbkit.cli import _history, _input, _table, _values
from rbkit.cli._app import program
from rbkit.cli._compute import Model, block_on, load_model, set_up, to_tensor
from rbkit.cli._errors import CheckFailed, Input, Usage, blame
from rbkit.cli._options import (
    DOCUMENT_LIMIT,
    ArchName,
    Block,
    Device,
    Json,
    MaxDocument,
    Quiet,
    Sources,
    Threads,
)
from rbkit.cli._progress import Progress
from rbkit.cli._rows import check_input, checked
from rbkit.formats.errors import FormatError

if TYPE_CHECKING:
    import torch

    from rbkit.formats.chunk import Chunk
    from rbkit.tools.verify import Check, Clean, Recheck


def verify(
    sources: Sources = None,
    model: Annotated[
        str | None,
        typer.Option("-m", "--model", metavar="FILE", help="The model that was attacked.", show_default=False),
    ] = None,
    clean: Annotated[
        str | None,
        typer.Option(
            "--clean", metavar="FILE", help="The images that were attacked, matched by id.", show_default=False
        ),
    ] = None,
    norm: Annotated[
        str | None, typer.Option("--norm", metavar="l2|linf", help="Where the stream does not say.", show_default=False)
    ] = None,
    eps: Annotated[
        str | None,
        typer.Option(
            "--eps", metavar="X", help="Where the stream does not say; 8/255 is accepted.", show_default=False
        ),
    ] = None,
    selftest: Annotated[
        bool, typer.Option("--selftest", help="Put rbkit's own tools to oracles whose answer is known on paper.")
    ] = False,
    json_: Json = False,
    block: Block = None,
    arch: ArchName = None,
    device: Device = "auto",
    threads: Threads = None,
    max_document: MaxDocument = DOCUMENT_LIMIT,
    quiet: Quiet = False,
) -> None:
    """Recheck adversarial streams, also those of other tools, and believe nothing that they say.

    One record per check: a table on a terminal, JSON lines in a pipe. Status 8 if one does not hold; only bytes that
    are no stream at all are status 3.
    """
    options = dict(locals())
    _values.block(block)
    if selftest:
        if sources or model or clean:
            raise Usage("--selftest takes no stream and no model")
        set_up(device, threads)
        _finish(_selftest(), json_)
        return
    if model is None:
        raise Usage("no model: give the attacked one with -m")
    _values.choices(options, norm=_values.NORMS)
    options["eps"] = None if eps is None else _values.number(eps, option="--eps")
    place = set_up(device, threads)
    options["block"] = block_on(place, block)
    subject = load_model(model, archs=arch, device=place)
    counterpart = None if clean is None else _counterpart(clean, subject, place, max_document)
    run = _Run(options, subject, counterpart, place)
    for source in sources or ["-"]:
        run.read(source)
    _finish(run.records, json_)


def _counterpart(path: str, subject: Model, device: torch.device, max_document: int) -> Clean:
    from rbkit.tools.examples import as_float
    from rbkit.tools.verify import Clean

    found = Clean()
    for chunk in checked(_input.chunks(path, max_document=max_document), subject):
        arrays = {
            name: to_tensor(chunk.arrays[name], device) for name in ("id", "image", "label") if name in chunk.arrays
        }
        found.add(arrays["id"], as_float(arrays["image"]), arrays.get("label"))
    return found


class _Run:
    """A pass over the inputs, one `Recheck` per attacked stream."""

    def __init__(self, options: dict[str, Any], subject: Model, clean: Clean | None, device: torch.device) -> None:
        self.options, self.subject, self.clean, self.device = options, subject, clean, device
        self.evaluation = subject.evaluation(options["block"])
        self.records: list[dict[str, Any]] = []

    def read(self, source: str) -> None:
        """One input, read tolerantly: a wrong digest is a finding."""
        current: Recheck | None = None
        with (
            blame(Input, FormatError, OSError),
            Progress("rb-verify", total=None, unit="images", quiet=self.options["quiet"]) as progress,
        ):
            reader = _input.reader(source, tolerant=True, max_document=self.options["max_document"])
            for chunk in reader:
                current = current or self._begin(chunk)
                current.add(self._rows(chunk))
                progress.expect(chunk.meta.get("total"))
                progress.advance(chunk.count)
                if chunk.last:
                    self._end(source, chunk, current, reader.findings)
                    current, reader.findings = None, []

    def _begin(self, chunk: Chunk) -> Recheck:
        from rbkit.tools.verify import Recheck

        if "adversarial" not in chunk.arrays or "image" not in chunk.arrays:
            names = ", ".join(sorted(chunk.arrays)[:5]) or "none"
            raise Input(f"{chunk.place}: no attacked images (tensors: {names}); expected image and adversarial")
        said = self._said(chunk)
        norm, eps = (self.options[key] if said[key] is None else said[key] for key in ("norm", "eps"))
        if norm is None or eps is None:
            raise Usage(f"{chunk.place}: the stream does not say its norm and eps; try --norm l2 --eps 0.5")
        return Recheck(self.evaluation, classes=self.subject.classes, norm=norm, eps=eps, clean=self.clean)

    def _said(self, chunk: Chunk) -> dict[str, Any]:
        """Norm and eps as the stream gives them; None where it does not, or gives what is none."""
        attack = chunk.meta.get("attack")
        attack = attack if isinstance(attack, dict) else {}
        eps = attack.get("eps")
        sound = isinstance(eps, int | float) and not isinstance(eps, bool) and 0 <= eps < float("inf")
        norm = attack.get("norm")
        return {"norm": norm if norm in _values.NORMS else None, "eps": float(eps) if sound else None}  # type: ignore[arg-type]

    def _rows(self, chunk: Chunk) -> Any:
        """The rows as tensors, whatever their values are. Raises: Input for what cannot be computed with."""
        import numpy as np

        from rbkit.formats.rows import IMAGE_DTYPES
        from rbkit.tools.examples import as_float
        from rbkit.tools.verify import Rows

        arrays = chunk.arrays
        check_input(self.subject, chunk)
        for name in ("image", "adversarial"):
            if arrays[name].dtype.name not in IMAGE_DTYPES or arrays[name].shape != arrays["image"].shape:
                raise Input(
                    f"{chunk.place}: {name} is {arrays[name].dtype} {list(arrays[name].shape)}, expected float32 like image"
                )
        for name in ("id", "label", "success"):
            if name in arrays and (arrays[name].ndim != 1 or arrays[name].dtype.kind not in "iub"):
                raise Input(
                    f"{chunk.place}: {name} is {arrays[name].dtype} {list(arrays[name].shape)}, expected int64 (N,)"
                )
        ids = arrays.get("id", np.arange(chunk.first, chunk.first + chunk.count))
        whole = {
            name: to_tensor(arrays[name].astype(np.int64), self.device)
            for name in ("label", "success")
            if name in arrays
        }
        return Rows(
            to_tensor(ids.astype(np.int64), self.device), as_float(to_tensor(arrays["image"], self.device)),
            as_float(to_tensor(arrays["adversarial"], self.device)), **whole,
        )  # fmt: skip

    def _end(self, source: str, chunk: Chunk, recheck: Recheck, findings: list[str]) -> None:
        rows = len(recheck.seen)
        about = {
            "stream": source, "attack": (chunk.meta.get("attack") or {}).get("name"), "norm": recheck.norm,
            "eps": recheck.eps, "model_sha": self.subject.sha,
        }  # fmt: skip
        found = [_record(c.name, c.failed == 0, c.rows, c.failed, c.ids, _detail(c)) for c in recheck.checks.values()]
        found.append(_whole("checksum", rows, findings[0] if findings else None))
        found.append(_whole("history", rows, _history.broken_link(chunk.meta.get("history") or [])))
        found.append(_whole("declared", rows, self._contradiction(chunk)))
        found.append(self._complete(chunk, recheck))
        crafted = (chunk.meta.get("attack") or {}).get("model")
        note = "" if crafted in (None, self.subject.sha) else f"; made on another model ({str(crafted)[:8]})"
        found.append(_record("predictions", True, rows, 0, [], f"{recheck.broken} of {rows} are broken{note}"))
        self.records += [record | about for record in found]

    def _contradiction(self, chunk: Chunk) -> str | None:
        """Options that say something else than the stream."""
        said = self._said(chunk)
        norm, eps = self.options["norm"], self.options["eps"]
        if norm is not None and said["norm"] not in (None, norm):
            return f"the stream says norm {said['norm']}, --norm {norm}"
        if eps is not None and said["eps"] not in (None, eps):
            return f"the stream says eps {said['eps']:g}, --eps {eps:g}"
        return None

    def _complete(self, chunk: Chunk, recheck: Recheck) -> dict[str, Any]:
        """Whether all rows are here that the stream announces and that the clean counterpart has."""
        lost, total = recheck.missing(), chunk.meta.get("total")
        if lost:
            return _record(
                "complete", False, len(recheck.seen), len(lost), lost[:5], f"{len(lost)} clean images have no row"
            )
        short = isinstance(total, int) and len(recheck.seen) < total
        return _whole("complete", len(recheck.seen), f"{len(recheck.seen)} of {total} rows" if short else None)


def _record(check: str, holds: bool, rows: int, failed: int, ids: list[int], detail: str | None) -> dict[str, Any]:
    return {"check": check, "holds": holds, "rows": rows, "failed": failed, "ids": ids, "detail": detail}


def _whole(check: str, rows: int, fault: str | None) -> dict[str, Any]:
    """A check of the stream as a whole."""
    return _record(check, fault is None, rows, 0 if fault is None else 1, [], fault)


def _detail(check: Check) -> str | None:
    if check.rows == 0:
        return "nothing to look at"
    return None if check.excess is None else f"by up to {check.excess:.3g}"


def _selftest() -> list[dict[str, Any]]:
    from rbkit.tools.selftest import TOLERANCE, errors, holds

    return [
        {"oracle": name, "holds": holds(error), "error": error if error == error else None, "tolerance": TOLERANCE}
        for name, error in errors().items()
    ]


def _finish(records: list[dict[str, Any]], json_: bool) -> None:
    _table.put(records, json_=json_)
    failed = [r for r in records if not r["holds"]]
    if failed:
        raise CheckFailed(
            f"{len(failed)} of {len(records)} checks do not hold: {', '.join(_said(r) for r in failed[:6])}"
        )


def _said(record: dict[str, Any]) -> str:
    if "oracle" in record:
        return f"{record['oracle']} (error {record['error']})"
    ids = f", id {', '.join(map(str, record['ids']))}" if record["ids"] else ""
    return (
        f"{record['check']} ({record['failed']} of {record['rows']}{ids})"
        if record["ids"]
        else f"{record['check']} ({record['detail']})"
    )


main = program("rb-verify", verify)

if __name__ == "__main__":
    sys.exit(main())
