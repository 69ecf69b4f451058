"""rb-data: any source to an image stream."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rbkit.cli import _history, _output, _sources, _values
from rbkit.cli._app import program
from rbkit.cli._compute import side_digest
from rbkit.cli._errors import Input, Partial, Usage, blame, reason
from rbkit.cli._log import note
from rbkit.cli._options import NoClobber, NoHistory, Output, Quiet, Seed, Shard
from rbkit.cli._progress import Progress

if TYPE_CHECKING:
    from rbkit.formats.dataset import DataSet

SOURCES = ("shapes", "fashion-mnist", "cifar10", "imagenet-subset", "folder", "png", "npz", "idx")
SPLITS = ("train", "val", "test", "trainval", "all")
FOLDERS = ("imagenet-subset", "folder")  # DIR may be a path or --root
TAKES = {  # options that not every source has, and those that have them
    "classes": ("imagenet-subset",),
    "per_class": ("imagenet-subset",),
    "manifest": ("imagenet-subset",),
    "cue": ("shapes",),
    "keep_going": ("folder", "png"),
    "label": ("png",),
    "layout": ("npz",),
    "size": ("imagenet-subset", "folder", "png"),
    "grey": ("imagenet-subset", "folder", "png"),
    "rgb": ("imagenet-subset", "folder", "png"),
}
SUBSET_CLASSES, SUBSET_COUNTS, SUBSET_SIZE = 150, "600,50,60", 128
MAX_PIXELS = 1 << 24


def data(
    kind: Annotated[str, typer.Argument(metavar="SOURCE", help=f"One of {', '.join(SOURCES)}.")],
    paths: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[PATH]...",
            help="imagenet-subset, folder: DIR; png: FILE... or -; npz: FILE; idx: IMAGES [LABELS].",
        ),
    ] = None,
    split: Annotated[
        str,
        typer.Option(
            "--split",
            metavar="|".join(SPLITS),
            help="train and val share one source and no row; all: DIR/CLASS/PICTURE.",
        ),
    ] = "test",
    n: Annotated[
        int | None,
        typer.Option(
            "--n",
            metavar="N",
            min=0,
            help="A seeded sample of N rows in index order; default all (shapes: 1000).",
            show_default=False,
        ),
    ] = None,
    seed: Seed = 0,
    root: Annotated[
        str | None,
        typer.Option("--root", metavar="DIR", help="Where the files of the data set are.", show_default=False),
    ] = None,
    download: Annotated[
        bool, typer.Option("--download", help="Fetch the data set to --root if it is not there.")
    ] = False,
    label: Annotated[
        int | None, typer.Option("--label", metavar="K", min=0, help="png: label of all pictures.", show_default=False)
    ] = None,
    size: Annotated[
        int | None,
        typer.Option(
            "--size",
            metavar="N",
            min=1,
            help="folder, png: shorter side to N pixels, centre cropped to N x N; imagenet-subset: 128 unless given.",
            show_default=False,
        ),
    ] = None,
    classes: Annotated[
        int | None,
        typer.Option(
            "--classes", metavar="N", min=1, help="imagenet-subset: classes drawn; default 150.", show_default=False
        ),
    ] = None,
    per_class: Annotated[
        str | None,
        typer.Option(
            "--per-class",
            metavar="TRAIN,VAL,TEST",
            help="imagenet-subset: pictures drawn of each class; default 600,50,60.",
            show_default=False,
        ),
    ] = None,
    manifest: Annotated[
        str | None,
        typer.Option(
            "--manifest",
            metavar="FILE",
            help="imagenet-subset: digests and names of the files written, which sha256sum -c checks.",
            show_default=False,
        ),
    ] = None,
    grey: Annotated[bool, typer.Option("--grey", help="folder, png: one channel (luma).")] = False,
    rgb: Annotated[bool, typer.Option("--rgb", help="folder, png: three channels (grey is repeated).")] = False,
    cue: Annotated[
        float | None,
        typer.Option(
            "--cue", metavar="L2", min=0.01, help="shapes: plant a faint shortcut of this norm.", show_default=False
        ),
    ] = None,
    cue_shift: Annotated[
        int | None,
        typer.Option(
            "--cue-shift",
            metavar="K",
            min=0,
            max=7,
            help="Plant the cue of the K-th next class instead.",
            show_default=False,
        ),
    ] = None,
    shuffle_labels: Annotated[
        bool | None,
        typer.Option(
            "--shuffle-labels", help="Labels drawn at random, a control: nothing tells them.", show_default=False
        ),
    ] = None,
    classes_of: Annotated[
        str | None,
        typer.Option(
            "--classes-of",
            metavar="MODEL",
            help="Labels by the numbers that a model gives to classes of these names.",
            show_default=False,
        ),
    ] = None,
    layout: Annotated[
        str | None,
        typer.Option("--layout", metavar="nchw|nhwc", help="npz: where the channels are.", show_default=False),
    ] = None,
    max_pixels: Annotated[
        int, typer.Option("--max-pixels", metavar="N", min=1, help="Refuse larger pictures.")
    ] = MAX_PIXELS,
    keep_going: Annotated[
        bool | None,
        typer.Option(
            "--keep-going",
            help="folder, png: leave out files that cannot be read, name them, and end with status 7.",
            show_default=False,
        ),
    ] = None,
    shard: Shard = None,
    output: Output = "-",
    no_clobber: NoClobber = False,
    quiet: Quiet = False,
    no_history: NoHistory = False,
) -> None:
    """Turn a source of images into a stream.

    shapes is built in; fashion-mnist and cifar10 are read from --root; folder takes DIR/SPLIT/CLASS/PICTURE, and
    imagenet-subset draws classes and pictures from DIR/train/CLASS/PICTURE, as the paper's Small ImageNet 150;
    png takes files, or - for pictures back to back on standard input; npz and idx take the arrays of other tools.
    """
    options = dict(locals())
    _output.refuse_taken(output, manifest, no_clobber=no_clobber)
    _check_options(options)
    with blame(Input, ValueError, OSError):
        source = _sources.open_source(options)
    if shuffle_labels:
        source = _shuffled(source, seed)
    if classes_of is not None:
        source = _sources.numbered_as(source, classes_of)
    rows, unread = _select(source, options)
    part = _values.shard(shard)
    meta = _meta(source, options, total=len(rows), unread=unread)
    if source.lossy and not quiet:
        note("rb-data", "the pictures are lossy (JPEG or WebP); recorded as such")
    if source.unused and not quiet:
        more = ", …" if len(source.unused) > 4 else ""
        note("rb-data", f"not taken: {', '.join(source.unused[:4])}{more}")
    listed = None if manifest is None else _sources.Manifest(manifest, options)
    with _output.Sink(output, no_history=no_history, no_clobber=no_clobber) as sink:
        _write(sink, source, rows, meta, part, listed)
    if unread:
        raise Partial(f"{unread} files could not be read and were left out")


def _check_options(options: dict[str, Any]) -> None:
    kind, paths = _values.choice(options["kind"], SOURCES, option="SOURCE"), options["paths"] or []
    _values.choices(options, split=SPLITS, layout=("nchw", "nhwc"))
    if options["split"] == "all" and kind != "folder":
        raise Usage(f"--split all goes with folder, not with {kind}")
    if options["grey"] and options["rgb"]:
        raise Usage("--grey and --rgb exclude each other")
    for name, takers in TAKES.items():
        given = options[name] is not None and options[name] is not False  # 0 is a label
        if given and kind not in takers:
            raise Usage(f"--{name.replace('_', '-')} goes with {', '.join(takers)}, not with {kind}")
    if kind == "imagenet-subset":
        options["classes"] = options["classes"] or SUBSET_CLASSES
        options["per_class"] = options["per_class"] or SUBSET_COUNTS
        options["size"] = options["size"] or SUBSET_SIZE
        options["rgb"] = not options["grey"]
    if options["manifest"] == "-" == options["output"]:
        raise Usage("--manifest - needs -o FILE: standard output is taken by the stream")
    if options["manifest"] not in (None, "-"):
        _output.check_writable(options["manifest"])
    if options["cue_shift"] and not options["cue"]:
        raise Usage("--cue-shift needs --cue L2")
    wanted = {**dict.fromkeys(FOLDERS, (0, 1)), "png": (1, 10**9), "npz": (1, 1), "idx": (1, 2)}.get(kind, (0, 0))
    if not wanted[0] <= len(paths) <= wanted[1] or (kind in FOLDERS and not (paths or options["root"])):
        raise Usage(f"{kind}: got {len(paths)} paths; see rb-data --help")


def _select(source: DataSet, options: dict[str, Any]) -> tuple[Any, int]:
    """Indices of the chosen rows, the split and then a nested sample of it, and how many files could not be read."""
    import numpy as np

    from rbkit.tools.sample import in_validation, nested_sample

    rows = np.arange(source.count)
    if options["kind"] == "shapes":
        return rows, 0
    if source.carved and options["split"] in ("train", "val"):
        rows = rows[in_validation(source.ids) == (options["split"] == "val")]
    readable = _readable(source, rows) if options["keep_going"] else rows
    with blame(Usage, ValueError):
        chosen = nested_sample(len(readable), options["n"], seed=options["seed"])
    return readable[chosen], len(rows) - len(readable)


def _readable(source: DataSet, rows: Any) -> Any:
    """Those of the rows that can be fetched; each other one is told, and treated as if its file were not there.

    All are tried before the first is written, so that samples, shards and totals agree; each file is read twice.
    """
    import numpy as np

    good = np.ones(len(rows), bool)
    for number in range(len(rows)):
        try:
            source.fetch(rows[number : number + 1])
        except (ValueError, OSError) as error:
            good[number] = False
            note("rb-data", f"left out: {reason(error)}")
    if not good.any():
        raise Input(f"none of the {len(rows)} files can be read")
    return rows[good]


def _shuffled(source: DataSet, seed: int) -> DataSet:
    """The same images, each with a class drawn as a function of (seed, id)."""
    import torch

    from rbkit.tools import random

    if not source.classes:
        raise Usage("--shuffle-labels needs a source that names its classes")
    classes = len(source.classes)

    def fetch(indices: Any) -> dict[str, Any]:
        ids = torch.from_numpy(source.ids[indices])
        drawn = random.integers(ids, classes, seed=seed, purpose="shuffled labels")
        return {**source.fetch(indices), "label": drawn.numpy()}

    return replace(source, fetch=fetch)


def _meta(source: DataSet, options: dict[str, Any], *, total: int, unread: int) -> dict[str, Any]:
    described = {"source": options["kind"], "split": options["split"], "lossy": source.lossy}
    if options["cue"]:
        described |= {"cue": options["cue"], "cue_shift": options["cue_shift"] or 0}
    if unread:
        described["left_out"] = unread
    model = options["classes_of"]
    entry = _history.entry("rb-data", options, inputs={} if model is None else {"classes_of": side_digest(model)})
    meta: dict[str, Any] = {"kind": "images", "total": total, "data": described, "history": [entry]}
    if source.classes is not None:
        meta["classes"] = source.classes
    return meta


def _write(
    sink: _output.Sink,
    source: DataSet,
    rows: Any,
    meta: dict[str, Any],
    shard: tuple[int, int] | None,
    listed: _sources.Manifest | None,
) -> None:
    from rbkit.formats.chunk import ROWS
    from rbkit.tools.sample import shard_range

    begin, end = (0, len(rows)) if shard is None else shard_range(len(rows), *shard)
    progress = Progress("rb-data", total=end - begin, unit="rows", quiet=True)  # counted for those who ask
    for start in range(begin, max(end, begin + 1), ROWS):
        stop = min(start + ROWS, end)
        with blame(Input, ValueError, OSError):
            arrays = source.fetch(rows[start:stop])
            if listed is not None:
                listed.add(arrays["name"])
        arrays["id"] = source.ids[rows[start:stop]]
        sink.write(arrays, {**meta, "first": start}, last=stop == end)
        progress.advance(stop - start)
    if listed is not None:
        listed.write()


main = program("rb-data", data)

if __name__ == "__main__":
    sys.exit(main())
