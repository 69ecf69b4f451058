"""rb-data: any source to an image stream."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rbkit.cli import _history, _io, _values
from rbkit.cli._app import note, program
from rbkit.cli._errors import Input, Usage, blame
from rbkit.cli._options import NoClobber, NoHistory, Output, Quiet, Seed, Shard
from rbkit.cli._progress import Progress

if TYPE_CHECKING:
    from rbkit.formats.dataset import DataSet

SOURCES = ("shapes", "fashion-mnist", "cifar10", "folder", "png", "npz", "idx")
SPLITS = ("train", "val", "test", "trainval")
FASHION_ROOT = "/usr/share/datasets/fashion-mnist"
SHAPES_ROWS = 1000
MAX_PIXELS = 1 << 24


def data(
    kind: Annotated[str, typer.Argument(metavar="SOURCE", help=f"One of {', '.join(SOURCES)}.")],
    paths: Annotated[
        list[str] | None,
        typer.Argument(metavar="[PATH]...", help="folder: DIR; png: FILE... or -; npz: FILE; idx: IMAGES [LABELS]."),
    ] = None,
    split: Annotated[
        str, typer.Option("--split", metavar="|".join(SPLITS), help="train and val share one source and no row.")
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
            help="folder, png: shorter side to N pixels, centre cropped to N x N.",
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
    layout: Annotated[
        str | None,
        typer.Option("--layout", metavar="nchw|nhwc", help="npz: where the channels are.", show_default=False),
    ] = None,
    max_pixels: Annotated[
        int, typer.Option("--max-pixels", metavar="N", min=1, help="Refuse larger pictures.")
    ] = MAX_PIXELS,
    shard: Shard = None,
    output: Output = "-",
    no_clobber: NoClobber = False,
    quiet: Quiet = False,
    no_history: NoHistory = False,
) -> None:
    """Turn a source of images into a stream.

    shapes is built in; fashion-mnist and cifar10 are read from --root; folder takes DIR/SPLIT/CLASS/PICTURE;
    png takes files, or - for pictures back to back on standard input; npz and idx take the arrays of other tools.
    """
    options = dict(locals())
    _io.refuse_taken(output, no_clobber=no_clobber)
    _check_options(options)
    with blame(Input, ValueError, OSError):
        source = _open_source(options)
    if shuffle_labels:
        source = _shuffled(source, seed)
    rows = _select(source, kind, split=split, n=n, seed=seed)
    part = _values.shard(shard)
    meta = _meta(source, options, total=len(rows))
    if source.lossy and not quiet:
        note("rb-data", "the pictures are lossy (JPEG or WebP); recorded as such")
    with _io.Sink(output, no_history=no_history, no_clobber=no_clobber) as sink:
        _write(sink, source, rows, meta, part)


def _check_options(options: dict[str, Any]) -> None:
    kind, paths = _values.choice(options["kind"], SOURCES, option="SOURCE"), options["paths"] or []
    _values.choice(options["split"], SPLITS, option="--split")
    if options["layout"] is not None:
        _values.choice(options["layout"], ("nchw", "nhwc"), option="--layout")
    if options["grey"] and options["rgb"]:
        raise Usage("--grey and --rgb exclude each other")
    if options["cue"] and kind != "shapes":
        raise Usage(f"--cue goes with shapes, not with {kind}")
    if options["cue_shift"] and not options["cue"]:
        raise Usage("--cue-shift needs --cue L2")
    wanted = {"folder": (0, 1), "png": (1, 10**9), "npz": (1, 1), "idx": (1, 2)}.get(kind, (0, 0))
    if not wanted[0] <= len(paths) <= wanted[1] or (kind == "folder" and not (paths or options["root"])):
        raise Usage(f"{kind}: got {len(paths)} paths; see rb-data --help")


def _channels(options: dict[str, Any]) -> int | None:
    return 1 if options["grey"] else 3 if options["rgb"] else None


def _open_source(options: dict[str, Any]) -> DataSet:
    """The data set of the chosen source, before sampling and sharding."""
    kind, paths, split, root = options["kind"], options["paths"] or [], options["split"], options["root"]
    base = "test" if split == "test" else "train"
    if kind == "shapes":
        return _shapes(options)
    if kind == "fashion-mnist":
        from rbkit.formats.idx import fashion_mnist

        return fashion_mnist(_fashion_root(root, download=options["download"]), split=base)
    if kind == "cifar10":
        from rbkit.formats.cifar import cifar10

        return cifar10(_cifar_root(root, download=options["download"]), split=base)
    if kind == "npz":
        from rbkit.formats.npz import read

        return read(paths[0], layout=options["layout"])
    if kind == "idx":
        from rbkit.formats.idx import pair

        return pair(paths[0], paths[1] if len(paths) > 1 else None)
    if kind == "folder":
        from rbkit.formats.folder import image_folder

        folder = Path(paths[0] if paths else root)
        return image_folder(
            folder, split=split, size=options["size"], channels=_channels(options), max_pixels=options["max_pixels"]
        )
    return _pngs(options)


def _shapes(options: dict[str, Any]) -> DataSet:
    import numpy as np

    from rbkit.formats.dataset import DataSet
    from rbkit.tools import shapes

    seed, split = options["seed"], options["split"]
    cue = shapes.Cue(options["cue"], options["cue_shift"] or 0) if options["cue"] else None

    def fetch(indices: np.ndarray) -> dict[str, np.ndarray]:
        import torch

        columns = shapes.generate(torch.from_numpy(indices.astype(np.int64)), seed=seed, split=split, cue=cue)
        return {name: tensor.numpy() for name, tensor in columns.items()}

    count = SHAPES_ROWS if options["n"] is None else options["n"]
    return DataSet(np.arange(count, dtype=np.int64), fetch, list(shapes.CLASSES))


def _fashion_root(root: str | None, *, download: bool) -> Path:
    if root is not None and not download:
        return Path(root)
    if root is None and Path(FASHION_ROOT).is_dir():
        return Path(FASHION_ROOT)
    if not download:
        raise Input(
            f"no {FASHION_ROOT}; install the package dataset-fashion-mnist, give --root, or add --download --root DIR"
        )
    from torchvision.datasets import FashionMNIST

    target = Path(root or "data")
    with blame(Input, RuntimeError, OSError, prefix="download failed: "):
        FashionMNIST(str(target), download=True)
    return target / "FashionMNIST" / "raw"


def _cifar_root(root: str | None, *, download: bool) -> Path:
    if root is None:
        raise Usage("cifar10 needs --root DIR with its binary or Python batches; --download fetches them there")
    if download and not list(Path(root).rglob("test_batch*")):
        from torchvision.datasets import CIFAR10
        from torchvision.datasets.utils import download_and_extract_archive

        with blame(Input, RuntimeError, OSError, prefix="download failed: "):
            download_and_extract_archive(CIFAR10.url, root, filename=CIFAR10.filename, md5=CIFAR10.tgz_md5)
    return Path(root)


def _pngs(options: dict[str, Any]) -> DataSet:
    import numpy as np

    from rbkit.formats.folder import files

    paths = options["paths"]
    if paths == ["-"]:
        return _piped_pngs(options)
    labels = None if options["label"] is None else np.full(len(paths), options["label"], np.int64)
    return files(
        [Path(p) for p in paths], paths, labels=labels, size=options["size"], channels=_channels(options),
        max_pixels=options["max_pixels"],
    )  # fmt: skip


def _piped_pngs(options: dict[str, Any]) -> DataSet:
    """Pictures back to back on standard input; their ids are their numbers, from 0."""
    import numpy as np
    from PIL import Image

    from rbkit.formats import folder, png
    from rbkit.formats.dataset import in_memory

    file, name = _io.open_bytes("-")
    start = file.read(8)
    if not start:
        raise Input(f"{name}: empty input (0 bytes); did the command before the pipe fail?")
    pictures = []
    for picture in png.read_many(file, name=name, start=start, max_pixels=options["max_pixels"]):
        pixels = picture.pixels
        if options["size"]:
            picture_ = Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0))
            pixels = png.to_pixels(folder.fit(picture_, options["size"]))
        pictures.append(folder.recolour(pixels, _channels(options)))
    image = folder.stack(pictures, [f"{name}: image {i + 1}" for i in range(len(pictures))])
    label = None if options["label"] is None else np.full(len(image), options["label"])
    return in_memory(image, label)


def _select(source: DataSet, kind: str, *, split: str, n: int | None, seed: int) -> Any:
    """Indices of the chosen rows: the split, then a nested sample of it."""
    import numpy as np

    from rbkit.tools.sample import in_validation, nested_sample

    if kind == "shapes":
        return np.arange(source.count)
    rows = np.arange(source.count)
    if source.carved and split in ("train", "val"):
        rows = rows[in_validation(source.ids) == (split == "val")]
    return rows[_io.guarded(lambda: nested_sample(len(rows), n, seed=seed))]


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


def _meta(source: DataSet, options: dict[str, Any], *, total: int) -> dict[str, Any]:
    described = {"source": options["kind"], "split": options["split"], "lossy": source.lossy}
    if options["cue"]:
        described |= {"cue": options["cue"], "cue_shift": options["cue_shift"] or 0}
    entry = _history.entry("rb-data", options)
    meta: dict[str, Any] = {"kind": "images", "total": total, "data": described, "history": [entry]}
    if source.classes is not None:
        meta["classes"] = source.classes
    return meta


def _write(sink: _io.Sink, source: DataSet, rows: Any, meta: dict[str, Any], shard: tuple[int, int] | None) -> None:
    from rbkit.formats.stream import ROWS
    from rbkit.tools.sample import shard_range

    begin, end = (0, len(rows)) if shard is None else shard_range(len(rows), *shard)
    progress = Progress("rb-data", total=end - begin, unit="rows", quiet=True)  # counted for those who ask
    for start in range(begin, max(end, begin + 1), ROWS):
        stop = min(start + ROWS, end)
        with blame(Input, ValueError, OSError):
            arrays = source.fetch(rows[start:stop])
        arrays["id"] = source.ids[rows[start:stop]]
        sink.write(arrays, {**meta, "first": start}, last=stop == end)
        progress.advance(stop - start)


main = program("rb-data", data)

if __name__ == "__main__":
    sys.exit(main())
