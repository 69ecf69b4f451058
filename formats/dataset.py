"""A data set as rbkit sees it: so many rows, fetched by index."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from rbkit.formats.errors import FormatError


@dataclass(frozen=True)
class DataSet:
    """Rows of one split.

    `fetch(indices)` gives arrays with one row per index: `image` uint8 or float32 (N, C, H, W), optional `label`
    int64, `mask`, `name`. `ids` int64 are stable identities. `lossy` marks pixels that passed through JPEG or the like.
    `carved` tells that the source has no validation split of its own, so that one is carved from `train`; `unused` names what
    else the source holds.
    """

    ids: np.ndarray
    fetch: Callable[[np.ndarray], dict[str, np.ndarray]]
    classes: list[str] | None = None
    lossy: bool = False
    carved: bool = False
    unused: tuple[str, ...] = ()

    @property
    def count(self) -> int:
        """Number of rows."""
        return len(self.ids)


def in_memory(
    image: np.ndarray, label: np.ndarray | None, *, classes: list[str] | None = None, carved: bool = False
) -> DataSet:
    """A data set of arrays that are already here. Raises: FormatError when labels and images differ in number."""
    if label is not None and len(label) != len(image):
        raise FormatError(f"{len(label)} labels for {len(image)} images")

    def fetch(indices: np.ndarray) -> dict[str, np.ndarray]:
        rows = {"image": image[indices]}
        if label is not None:
            rows["label"] = label[indices].astype(np.int64)
        return rows

    return DataSet(np.arange(len(image), dtype=np.int64), fetch, classes, carved=carved)
