"""rb-info: what is in a file: kind, shapes, ranges, history; checking, joining and replaying."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rbkit.cli import _history, _input, _output
from rbkit.cli._app import program
from rbkit.cli._errors import CheckFailed, Failure, Input, Usage, blame
from rbkit.cli._log import note
from rbkit.cli._options import DOCUMENT_LIMIT, Json, MaxDocument, NoClobber, Output, Sources
from rbkit.cli._rows import watched
from rbkit.formats.errors import FormatError, printable

if TYPE_CHECKING:
    from rbkit.formats.chunk import Chunk


def info(
    sources: Sources = None,
    check: Annotated[bool, typer.Option("--check", help="Say nothing if all is well; status 8 if not.")] = False,
    join: Annotated[
        bool, typer.Option("--join", help="Join shards into one document; the missing ones are named.")
    ] = False,
    replay: Annotated[bool, typer.Option("--replay", help="Print the shell lines that remake the file.")] = False,
    json_: Json = False,
    output: Output = "-",
    no_clobber: NoClobber = False,
    max_document: MaxDocument = DOCUMENT_LIMIT,
) -> None:
    """Describe streams: kind, rows, tensors with shapes and ranges, metadata and history."""
    names = sources or ["-"]
    _output.refuse_taken(output, no_clobber=no_clobber)
    if sum((check, join, replay)) > 1:
        raise Usage("--check, --join and --replay exclude each other")
    if join:
        _join(names, output, max_document, no_clobber=no_clobber)
        return
    failed = 0
    for name in names:
        if check:
            failed += not _is_whole(name, max_document)
        elif replay:
            _replay(name, max_document)
        else:
            _describe(name, max_document, json_)
    if failed:
        raise CheckFailed(f"{failed} of {len(names)} files do not hold")


def _counted(stream: Iterable[Chunk]) -> Iterator[Chunk]:
    """The chunks of a stream, for those who ask by a signal how far it is."""
    return watched(stream, tool="rb-info", quiet=True, unit="rows")


def _is_whole(name: str, max_document: int) -> bool:
    """Read everything: headers, parts, digests, rows. What does not hold is said on stderr."""
    from rbkit.formats.rows import RowChecker

    checker = RowChecker()
    try:
        with blame(Input, FormatError, OSError):
            reader = _input.reader(name, max_document=max_document)
            for chunk in _counted(reader):
                if chunk.meta["kind"] in ("images", "adversarial", "attributions", "inversions"):
                    checker(chunk)
    except Failure as failure:
        note("rb-info", str(failure))
        return False
    return True


class _Summary:
    """What is learned of one stream while its chunks pass."""

    def __init__(self, chunk: Chunk) -> None:
        self.meta, self.place = chunk.meta, chunk.place
        self.rows, self.chunks = 0, 0
        self.tensors: dict[str, dict[str, Any]] = {}

    def add(self, chunk: Chunk) -> None:
        self.rows += chunk.count
        self.chunks += 1
        for name, array in chunk.arrays.items():
            known = self.tensors.setdefault(
                name, {"dtype": str(array.dtype), "shape": list(array.shape), "low": None, "high": None}
            )
            if self.chunks > 1:
                known["shape"][0] += array.shape[0]
            if array.size:
                low, high = array.min().item(), array.max().item()
                known["low"] = low if known["low"] is None else min(known["low"], low)
                known["high"] = high if known["high"] is None else max(known["high"], high)

    def record(self, name: str) -> dict[str, Any]:
        meta = {k: v for k, v in self.meta.items() if k not in ("count", "part", "schema")}
        tensors = {n: {**t, "low": _spelled(t["low"]), "high": _spelled(t["high"])} for n, t in self.tensors.items()}
        return {"file": name, "rows": self.rows, "tensors": tensors, **meta}


def _spelled(value: Any) -> Any:
    """A number, or the name of one that JSON does not have."""
    return value if value is None or (value == value and abs(value) != float("inf")) else str(value)


def _summaries(name: str, max_document: int) -> list[_Summary]:
    found: list[_Summary] = []
    begin = True
    for chunk in _counted(_input.chunks(name, max_document=max_document)):
        if begin:
            found.append(_Summary(chunk))
        found[-1].add(chunk)
        begin = chunk.last
    return found


def _describe(name: str, max_document: int, json_: bool) -> None:
    from rbkit.formats.document import canonical

    for summary in _summaries(name, max_document):
        record = summary.record(name)
        if json_:
            _output.print_line(canonical(record))
            continue
        shown = printable(name, limit=200)
        _output.print_line(
            f"{shown}: {record['kind']}, {record['rows']} rows" if record["rows"] else f"{shown}: {record['kind']}"
        )
        for tensor, t in sorted(record["tensors"].items()):
            _output.print_line(
                f"  {printable(tensor):<22} {t['dtype']:<8} {'x'.join(map(str, t['shape'])) or 'scalar':<18} {_range(t)}"
            )
        for key, value in sorted(record.items()):
            if key not in ("file", "rows", "tensors", "kind", "history"):
                _output.print_line(f"  {key}: {printable(canonical(value), limit=160)}")
        for entry in record.get("history") or []:
            _output.print_line(f"  history: {printable(_history.command(entry), limit=400)}")


def _range(tensor: dict[str, Any]) -> str:
    if tensor["low"] is None:
        return ""
    return f"{tensor['low']:.6g} to {tensor['high']:.6g}" if not isinstance(tensor["low"], str) else "not finite"


def _replay(name: str, max_document: int) -> None:
    """A pipeline per stream: the tools of its history in order."""
    for summary in _summaries(name, max_document):
        history = summary.meta.get("history") or []
        if not history:
            raise Input(f"{name}: has no history; was it made with --no-history?")
        _output.print_line(_history.replay_lines(history))


def _join(names: list[str], output: str, max_document: int, *, no_clobber: bool) -> None:
    """Shards, in any order of the command line, as one document for each of their streams; completeness is proved first."""
    from rbkit.formats.join import order_shards

    with blame(Input, FormatError, OSError):
        parts = [
            (name, [s.record(name) | {"first": s.meta["first"]} for s in _summaries(name, max_document)])
            for name in names
        ]
        streams = order_shards(parts)
    with _output.Sink(output, no_clobber=no_clobber) as sink:
        if len(streams) > 1 and not sink.many:
            raise Usage(f"the shards hold {len(streams)} streams; write them to a name ending in .rbs, or to a pipe")
        for place, ordered in enumerate(streams):
            for number, name in enumerate(ordered, start=1):
                chunks = _nth_stream(_input.chunks(name, max_document=max_document), place)
                for chunk in _counted(chunks):
                    sink.write(chunk.arrays, chunk.meta, last=chunk.last and number == len(ordered))


def _nth_stream(chunks: Iterable[Chunk], place: int) -> Iterator[Chunk]:
    """The chunks of one of the streams that follow each other."""
    for chunk in chunks:
        if not place:
            yield chunk
        place -= chunk.last


main = program("rb-info", info)

if __name__ == "__main__":
    sys.exit(main())
