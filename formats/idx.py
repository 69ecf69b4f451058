"""IDX files (MNIST, Fashion-MNIST): a magic number, the dimensions, then bytes; optionally gzipped."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np

from rbkit.formats.dataset import DataSet, in_memory
from rbkit.formats.errors import FormatError

FASHION_CLASSES = ["T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot"]
FILES = {"train": "train", "test": "t10k"}


def read(path: str | Path) -> np.ndarray:
    """The uint8 array of one IDX file, gzipped or not. Raises: FormatError, OSError."""
    raw = Path(path).read_bytes()
    if raw[:2] == b"\x1f\x8b":
        try:
            raw = gzip.decompress(raw)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise FormatError(f"{path}: damaged gzip data ({error})") from None
    if len(raw) < 4 or raw[:3] != b"\0\0\x08" or not 1 <= raw[3] <= 4:
        raise FormatError(f"{path}: not an IDX file of bytes (starts with {raw[:4].hex(' ') or 'nothing'})")
    start = 4 + 4 * raw[3]
    shape = [int.from_bytes(raw[i : i + 4], "big") for i in range(4, start, 4)]
    if len(raw) - start != math.prod(shape):
        raise FormatError(f"{path}: shape {shape} needs {math.prod(shape)} bytes, the file has {len(raw) - start}")
    try:
        return np.frombuffer(raw, np.uint8, offset=start).reshape(shape)
    except ValueError:  # no bytes, in dimensions that numpy cannot count
        raise FormatError(f"{path}: shape {shape} is too large for an array") from None


def read_images(path: str | Path) -> np.ndarray:
    """Grey images (N, 1, H, W) uint8 of an IDX file with three dimensions."""
    images = read(path)
    if images.ndim != 3:
        raise FormatError(f"{path}: shape {list(images.shape)} is no (N, H, W); are images and labels swapped?")
    return images[:, None]


def pair(images: str | Path, labels: str | Path | None) -> DataSet:
    """A data set of an image file and, where there is one, its label file."""
    label = None if labels is None else read(labels)
    if label is not None and label.ndim != 1:
        raise FormatError(f"{labels}: shape {list(label.shape)} is no (N,)")
    return in_memory(read_images(images), label)


def fashion_mnist(root: Path, *, split: str) -> DataSet:
    """Fashion-MNIST's `train` or `test` from a folder of its four IDX files. Raises: FormatError, OSError."""
    stem = FILES[split]
    found = {}
    for part in ("images-idx3", "labels-idx1"):
        names = [root / f"{stem}-{part}-ubyte{suffix}" for suffix in ("", ".gz")]
        found[part] = next((path for path in names if path.exists()), None)
        if found[part] is None:
            raise FormatError(f"{root}: no {names[0].name}[.gz]; is this the folder of Fashion-MNIST?")
    images, labels = read_images(found["images-idx3"]), read(found["labels-idx1"])  # type: ignore[arg-type]
    return in_memory(images, labels, classes=FASHION_CLASSES, carved=True)
