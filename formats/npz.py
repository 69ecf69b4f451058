"""NPZ archives of other tools: arrays of images and labels, read without pickle."""

from __future__ import annotations

import lzma
import math
import os
import tokenize
import zipfile
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.lib import format as formats

from rbkit.formats.dataset import DataSet, in_memory
from rbkit.formats.errors import FormatError, printable

IMAGE_KEYS = ("image", "images", "x", "x_test", "data", "arr_0")
DAMAGED = (
    ValueError, zipfile.BadZipFile, zlib.error, EOFError, AttributeError, TypeError, KeyError, RuntimeError,
    SyntaxError, tokenize.TokenError, lzma.LZMAError, OSError,
)  # fmt: skip
LABEL_KEYS = ("label", "labels", "y", "y_test", "arr_1")


def to_nchw(array: np.ndarray, *, layout: str | None, name: str) -> np.ndarray:
    """Images (N, C, H, W) from (N, H, W), `nchw` or `nhwc` arrays; a layout that two readings fit must be named.

    Raises: FormatError.
    """
    if array.ndim == 3:
        return array[:, None]
    if array.ndim != 4:
        raise FormatError(
            f"{name}: images have shape {list(array.shape)}, expected (N, H, W), (N, C, H, W) or (N, H, W, C)"
        )
    fits = [key for key, axis in (("nchw", 1), ("nhwc", 3)) if array.shape[axis] in (1, 3)]
    if layout is None and len(fits) != 1:
        raise FormatError(
            f"{name}: shape {list(array.shape)} does not tell where the channels are; try --layout nchw or nhwc"
        )
    chosen = layout or fits[0]
    return array if chosen == "nchw" else np.ascontiguousarray(array.transpose(0, 3, 1, 2))


def _array(archive: zipfile.ZipFile, keys: tuple[str, ...], *, size: int) -> np.ndarray | None:
    """The first array of those names. Headers are believed only as far as there are bytes for what they claim.

    size: of the whole file; zipfile would reserve memory for a member that says it is larger.
    """
    name = next((f"{key}.npy" for key in keys if f"{key}.npy" in archive.namelist()), None)
    if name is None:
        return None
    if archive.getinfo(name).compress_size > size:
        raise ValueError(f"{name} is said to be larger than the file")
    with archive.open(name) as member:
        header = {(1, 0): formats.read_array_header_1_0, (2, 0): formats.read_array_header_2_0}
        shape, by_columns, dtype = header[formats.read_magic(member)](member)
        raw = member.read()
    if dtype.kind not in "biuf" or len(raw) != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{len(raw)} bytes are no {dtype} of shape {shape}")
    return np.frombuffer(raw, dtype).reshape(shape, order="F" if by_columns else "C")


def read(path: str | Path, *, layout: str | None = None) -> DataSet:
    """The images (and labels, if any) of an NPZ file. Raises: FormatError, OSError."""
    shown = printable(str(path), limit=200)
    with Path(path).open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        try:
            with zipfile.ZipFile(file) as archive:
                image, label = (_array(archive, keys, size=size) for keys in (IMAGE_KEYS, LABEL_KEYS))
                keys = [name.removesuffix(".npy") for name in archive.namelist()]
        except DAMAGED as error:
            raise FormatError(f"{shown}: not a readable NPZ archive ({type(error).__name__})") from None
    if image is None:
        raise FormatError(f"{shown}: no array named {' or '.join(IMAGE_KEYS)}; it has {', '.join(keys) or 'none'}")
    if label is not None and label.dtype.kind not in "iu":
        raise FormatError(f"{shown}: labels are {label.dtype}, expected whole numbers")
    if image.dtype.kind == "f":
        image = image.astype(np.float32)
    found = in_memory(to_nchw(image, layout=layout, name=shown), None if label is None else label.reshape(-1))
    taken = [next((key for key in group if key in keys), None) for group in (IMAGE_KEYS, LABEL_KEYS)]
    return replace(found, unused=tuple(printable(key, limit=40) for key in keys if key not in taken))
