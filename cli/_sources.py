"""The sources of rb-data: each as a data set of the rows of one split, before sampling and sharding."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rbkit.cli import _input, _output, _values
from rbkit.cli._compute import model_chunk
from rbkit.cli._errors import Input, Usage, blame
from rbkit.cli._rows import class_names
from rbkit.formats.errors import printable

if TYPE_CHECKING:
    import numpy as np

    from rbkit.formats.dataset import DataSet

FASHION_ROOT = "/usr/share/datasets/fashion-mnist"
SHAPES_ROWS = 1000


def open_source(options: dict[str, Any]) -> DataSet:
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
    if kind == "imagenet-subset":
        return _imagenet_subset(options)
    if kind == "folder":
        from rbkit.formats.folder import image_folder

        return image_folder(
            _folder(options),
            split=split,
            size=options["size"],
            channels=_channels(options),
            max_pixels=options["max_pixels"],
        )
    return _pngs(options)


def numbered_as(source: DataSet, model: str) -> DataSet:
    """The same images, each labelled by the number that its class has in a model. Raises: Usage, Input."""
    import numpy as np

    if not source.classes:
        raise Usage("--classes-of needs a source that names its classes")
    names = class_names(model_chunk(model).meta)
    if not names:
        raise Input(f"{model}: names no classes; try rb-model import --classes A,B,...")
    for name in source.classes:
        if names.count(name) != 1:
            found = "twice or more" if name in names else "not"
            raise Input(f"{model}: class {printable(name)} is {found} among its {len(names)}, expected once")
    numbers = np.array([names.index(name) for name in source.classes])

    def fetch(indices: np.ndarray) -> dict[str, np.ndarray]:
        rows = source.fetch(indices)
        return {**rows, "label": numbers[rows["label"]]}

    return replace(source, fetch=fetch, classes=names)


def _channels(options: dict[str, Any]) -> int | None:
    return 1 if options["grey"] else 3 if options["rgb"] else None


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


def _folder(options: dict[str, Any]) -> Path:
    """The folder of pictures, a path or --root."""
    return Path(options["paths"][0] if options["paths"] else options["root"])


def _imagenet_subset(options: dict[str, Any]) -> DataSet:
    """Classes of a tree of pictures, and pictures of each, drawn as functions of (seed, name)."""
    import numpy as np

    from rbkit.formats import folder
    from rbkit.formats.names import path_ids
    from rbkit.tools.sample import drawn, splits

    seed, split, counts = options["seed"], options["split"], _values.counts(options["per_class"], option="--per-class")
    root = folder.class_root(_folder(options))
    known = folder.class_folders(root)
    with blame(Input, ValueError, prefix=f"{root}: "):
        chosen = drawn(path_ids(known), options["classes"], seed=seed, purpose="classes")
    classes = [known[i] for i in chosen.tolist()]
    wanted = ("train", "val") if split == "trainval" else (split,)
    names: list[str] = []
    labels: list[int] = []
    for label, class_ in enumerate(classes):
        pictures = folder.pictures_of(root, class_)
        with blame(Input, ValueError, prefix=f"{root / class_}: "):
            parts = splits(path_ids(pictures), counts, seed=seed)
        rows = np.sort(np.concatenate([parts[name] for name in wanted]))
        names += [pictures[i] for i in rows.tolist()]
        labels += [label] * len(rows)
    return folder.files(
        [root / name for name in names], names, labels=np.array(labels, np.int64), classes=classes,
        size=options["size"], channels=_channels(options), max_pixels=options["max_pixels"],
    )  # fmt: skip


class Manifest:
    """Digests and names of the files that a stream was made of, in the format of sha256sum."""

    def __init__(self, path: str, options: dict[str, Any]) -> None:
        from rbkit.formats.folder import class_root

        self.path, self.root = path, class_root(_folder(options))
        self.no_clobber = options["no_clobber"]
        self.lines: list[bytes] = []

    def add(self, names: np.ndarray) -> None:
        """The files of more rows; names uint8 (N, longest)."""
        from rbkit.formats.folder import digest_line
        from rbkit.formats.names import decode_names

        self.lines += [digest_line(self.root, name) for name in decode_names(names)]

    def write(self) -> None:
        """All lines, once the stream is complete."""
        _output.write_file(self.path, b"".join(self.lines), no_clobber=self.no_clobber)


def _pngs(options: dict[str, Any]) -> DataSet:
    import numpy as np

    from rbkit.formats.folder import files

    paths = options["paths"]
    if paths == ["-"]:
        return _piped_pngs(options)
    given = next((path for path in paths if Path(path).is_dir()), None)
    if given is not None and not options["keep_going"]:
        raise Input(f"{given}: is a folder, expected pictures; try {given.rstrip('/')}/*.png")
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

    file, name = _input.open_bytes("-")
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
