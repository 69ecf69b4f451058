"""What the rows of an image stream must be: the checks that every reader of images shares."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from rbkit.formats.chunk import Chunk
from rbkit.formats.errors import FormatError

IMAGE_LIKE = ("image", "adversarial", "inverted")
FINITE = ("attribution", "completeness_error", "start")
DISTANCES = ("distance",)  # may be infinite
IMAGE_DTYPES = ("uint8", "float16", "float32", "float64")


def check_pixels(array: np.ndarray, *, name: str, first: int) -> np.ndarray:
    """Pixels (N, C, H, W): uint8 as they are, floats as float32. Raises: FormatError (shape, dtype, NaN, range)."""
    if array.ndim != 4 or 0 in array.shape[1:]:
        raise FormatError(f"{name} has shape {list(array.shape)}, expected (N, C, H, W)")
    if array.dtype.name not in IMAGE_DTYPES:
        raise FormatError(f"{name} is {array.dtype}, expected uint8 or float32 in [0, 1]")
    if array.dtype == np.uint8 or not len(array):
        return array
    low, high = float(array.min()), float(array.max())
    if np.isfinite(low) and np.isfinite(high) and low >= 0 and high <= 1:
        return array.astype(np.float32, copy=False)
    flat = array.reshape(len(array), -1)
    check_finite(array, name=name, first=first)
    row = int(((flat < 0) | (flat > 1)).any(1).argmax())
    worst = max(flat[row].tolist(), key=lambda v: max(-v, v - 1))
    what = (
        "; were the images normalised? streams are always in [0, 1]"
        if low < 0
        else "; divide by 255?"
        if high > 2
        else ""
    )
    raise FormatError(f"{name}[{first + row}] holds {worst:.6g}, expected values in [0, 1]{what}")


def check_finite(array: np.ndarray, *, name: str, first: int) -> None:
    """Refuse rows with NaN or infinite values. Raises: FormatError, also where the values are no numbers at all."""
    if array.dtype.kind not in "fiu":
        raise FormatError(f"{name} is {array.dtype}, expected float32")
    wrong = ~np.isfinite(array.reshape(len(array), -1))
    if wrong.any():
        row = int(wrong.any(1).argmax())
        raise FormatError(f"{name}[{first + row}] has {int(wrong[row].sum())} values that are NaN or infinite")


def check_distances(array: np.ndarray, *, name: str, first: int) -> None:
    """Refuse distances (N,) that are NaN or below 0. Raises: FormatError."""
    if array.ndim != 1 or array.dtype.kind != "f":
        raise FormatError(f"{name} is {array.dtype} {list(array.shape)}, expected float32 (N,)")
    wrong = ~(array >= 0)
    if wrong.any():
        row = int(wrong.argmax())
        raise FormatError(f"{name}[{first + row}] is {array[row]}, expected a number from 0, or infinity")


def check_labels(array: np.ndarray, *, name: str, first: int, classes: int | None) -> np.ndarray:
    """Class numbers (N,) as int64, below `classes` where known. Raises: FormatError."""
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise FormatError(f"{name} is {array.dtype} {list(array.shape)}, expected int64 (N,)")
    high = classes if classes is not None else 2**31
    bad = (array < 0) | (array >= high)
    if bad.any():
        row = int(bad.argmax())
        raise FormatError(f"{name}[{first + row}] is {int(array[row])}, expected 0 to {high - 1}")
    return array.astype(np.int64, copy=False)


class RowChecker:
    """Checks chunk after chunk of a stream; ids must be unique within it.

    classes: number of classes where known.
    """

    def __init__(self, *, classes: int | None = None) -> None:
        self.classes = classes
        self.seen: set[int] = set()
        self.shape: tuple[int, ...] | None = None

    def __call__(self, chunk: Chunk) -> Chunk:
        """The chunk with its dtypes settled and `id` filled in. Raises: FormatError."""
        try:
            arrays = self._arrays(chunk)
        except FormatError as error:
            raise type(error)(f"{chunk.place}: {error}") from None
        if chunk.last:
            self.seen, self.shape = set(), None
        return replace(chunk, arrays=arrays)

    def _arrays(self, chunk: Chunk) -> dict[str, np.ndarray]:
        arrays = dict(chunk.arrays)
        if "image" not in arrays:
            names = ", ".join(sorted(arrays)[:5]) or "none"
            raise FormatError(f"no tensor named image (there are: {names}); expected a stream of images, try rb-data")
        for name in IMAGE_LIKE:
            if name in arrays:
                arrays[name] = check_pixels(arrays[name], name=name, first=chunk.first)
        shape = arrays["image"].shape[1:]
        for name in (*IMAGE_LIKE, "attribution"):
            if name in arrays and arrays[name].shape[1:] != shape:
                raise FormatError(f"{name} is {list(arrays[name].shape[1:])} per row, image is {list(shape)}")
        if self.shape not in (None, shape):
            raise FormatError(f"images are {list(shape)}, those before were {list(self.shape or ())}")
        self.shape = shape
        for name in ("label", "target", "attack_target"):
            if name in arrays:
                arrays[name] = check_labels(arrays[name], name=name, first=chunk.first, classes=self.classes)
        for name in FINITE:
            if name in arrays:
                check_finite(arrays[name], name=name, first=chunk.first)
        for name in DISTANCES:
            if name in arrays:
                check_distances(arrays[name], name=name, first=chunk.first)
        if "mask" in arrays and arrays["mask"].shape[1:] != shape[1:]:
            raise FormatError(f"mask is {list(arrays['mask'].shape[1:])} per row, expected {list(shape[1:])}")
        arrays["id"] = self._ids(arrays, chunk)
        return arrays

    def _ids(self, arrays: dict[str, np.ndarray], chunk: Chunk) -> np.ndarray:
        if "id" not in arrays:
            return np.arange(chunk.first, chunk.first + chunk.count, dtype=np.int64)
        ids = arrays["id"]
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise FormatError(f"id is {ids.dtype} {list(ids.shape)}, expected int64 (N,)")
        if len(ids) and int(ids.max()) >= 2**63:
            raise FormatError(f"id {int(ids.max())} does not fit int64")
        ids = ids.astype(np.int64, copy=False)
        for value in ids.tolist():
            if value in self.seen:
                raise FormatError(f"id {value} appears twice; ids must be unique within a stream")
            self.seen.add(value)
        return ids
