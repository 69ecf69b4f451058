"""CIFAR-10 from its binary batches, or from its Python batches without trusting a pickle."""

from __future__ import annotations

import io
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np

from rbkit.formats.dataset import DataSet, in_memory
from rbkit.formats.errors import FormatError, printable

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
ROW = 1 + 3 * 32 * 32
FILES = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}
DAMAGED = (
    pickle.UnpicklingError, struct.error, EOFError, LookupError, TypeError, ValueError, AttributeError,
    ArithmeticError, MemoryError,
)  # fmt: skip
FOLDERS = ("cifar-10-batches-bin", "cifar-10-batches-py", "")


class _Array:
    """What a pickled array says of itself. numpy's own constructors trust what they are given."""

    shape: Any
    dtype: Any
    data: Any

    def __setstate__(self, state: Any) -> None:
        _, self.shape, self.dtype, _, self.data = state

    def pixels(self) -> np.ndarray:
        """The array, if it is uint8 (N, 3072). Raises: ValueError."""
        count = len(self.data) // (ROW - 1)
        named = isinstance(self.dtype, _Dtype) and self.dtype.name in ("u1", b"u1")
        if not named or not isinstance(self.data, bytes) or self.shape != (count, ROW - 1):
            raise ValueError("no uint8 (N, 3072)")
        return np.frombuffer(self.data, np.uint8).reshape(self.shape)


class _Dtype:
    """The dtype of a pickled array, by its name."""

    def __init__(self, name: Any, *_: Any) -> None:
        self.name = name

    def __setstate__(self, state: Any) -> None: ...


# In Python, not in C: that one reserves memory for whatever index a pickle names.
class _ArraysOnly(pickle._Unpickler):
    """An unpickler that can build descriptions of arrays and plain containers, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return lambda *_: _Array()
        if module == "numpy" and name in ("ndarray", "dtype"):
            return _Array if name == "ndarray" else _Dtype
        if module == "_codecs" and name == "encode":  # how Python 3 pickles bytes under protocol 2
            return _latin1_bytes
        raise FormatError(f"a pickle that asks for {printable(module)}.{printable(name)} is not a CIFAR-10 batch")


def _latin1_bytes(text: str, encoding: str = "latin1") -> bytes:
    return text.encode("latin1")


def read_binary(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """(images uint8 (N, 3, 32, 32), labels uint8 (N,)) of one binary batch."""
    raw = np.fromfile(path, np.uint8)
    if not len(raw) or len(raw) % ROW:
        raise FormatError(f"{path}: {len(raw)} bytes are no whole number of CIFAR-10 rows of {ROW} bytes")
    rows = raw.reshape(-1, ROW)
    return rows[:, 1:].reshape(-1, 3, 32, 32), rows[:, 0]


def read_python(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """The same of one Python batch. Raises: FormatError for a pickle that holds anything but arrays."""
    try:
        batch = _ArraysOnly(io.BytesIO(path.read_bytes()), encoding="bytes").load()
        data, labels = batch[b"data"], batch[b"labels"]
    except FormatError as error:
        raise FormatError(f"{path}: {error}") from None
    except DAMAGED as error:
        raise FormatError(f"{path}: not a CIFAR-10 batch ({type(error).__name__})") from None
    if not isinstance(labels, list) or not all(type(label) is int and abs(label) < 1000 for label in labels):
        raise FormatError(f"{path}: not a CIFAR-10 batch (labels are no list of small numbers)")
    try:
        images = data.pixels()
    except (ValueError, TypeError, AttributeError):
        raise FormatError(f"{path}: not a CIFAR-10 batch (data is no uint8 (N, 3072))") from None
    if len(images) != len(labels):
        raise FormatError(f"{path}: not a CIFAR-10 batch ({len(labels)} labels for {len(images)} images)")
    return images.reshape(-1, 3, 32, 32), np.array(labels)


def _batches(root: Path, names: list[str]) -> list[tuple[np.ndarray, np.ndarray]] | None:
    for folder in FOLDERS:
        for suffix, reader in ((".bin", read_binary), ("", read_python)):
            paths = [root / folder / (name + suffix) for name in names]
            if all(path.is_file() for path in paths):
                return [reader(path) for path in paths]
    return None


def cifar10(root: Path, *, split: str) -> DataSet:
    """CIFAR-10's `train` or `test` below `root`. Raises: FormatError, OSError."""
    parts = _batches(root, FILES[split])
    if parts is None:
        raise FormatError(
            f"{root}: no {FILES[split][0]}[.bin] here or in {FOLDERS[0]}/ or {FOLDERS[1]}/; pictures go with rb-data folder"
        )
    images = np.concatenate([images for images, _ in parts])
    labels = np.concatenate([labels for _, labels in parts])
    if labels.min() < 0 or labels.max() > 9:
        wrong = labels[(labels < 0) | (labels > 9)][0]
        raise FormatError(f"{root}: label {int(wrong)} is not one of CIFAR-10's 0 to 9")
    return in_memory(images, labels, classes=CLASSES, carved=True)
