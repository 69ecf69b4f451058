"""What rb-train trains on: labelled rows of streams, in memory, and those that it holds out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rbkit.cli import _input
from rbkit.cli._errors import Input, blame
from rbkit.cli._rows import check_numbering, size_of
from rbkit.formats.errors import FormatError

if TYPE_CHECKING:
    import numpy as np
    import torch

    from rbkit.tools.examples import Data
    from rbkit.tools.ranks import Ranks

COLUMNS = ("image", "label", "id")


def is_share(text: str) -> bool:
    """Whether --val is a share of the rows, not a file."""
    try:
        return 0 <= float(text) < 1
    except ValueError:
        return False


def read(source: str, max_document: int, device: torch.device, ranks: Ranks) -> tuple[Data, dict[str, Any]]:
    """A whole labelled stream, in memory on the device, and the metadata of its first document.

    The first process reads it; the others have it from there.
    """
    import torch

    from rbkit.tools.examples import Data

    arrays, meta = _read(source, max_document) if ranks.index == 0 else ({}, {})
    tensors, meta = ranks.share({name: torch.from_numpy(array) for name, array in arrays.items()}, meta)
    return Data(*(tensors[name].to(device) for name in COLUMNS)), meta


def _read(source: str, max_document: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    import numpy as np

    from rbkit.formats.rows import RowChecker

    checker, parts = RowChecker(), []
    meta: dict[str, Any] = {}
    for chunk in _input.chunks(source, max_document=max_document):
        with blame(Input, FormatError):
            chunk = checker(chunk)
        if "label" not in chunk.arrays:
            raise Input(f"{chunk.place}: no labels, which training needs; try rb-data folder, or rb-data --label")
        hint = "streams of the same numbering"
        check_numbering(chunk.meta, meta, place=chunk.place, other="the rows before them", hint=hint)
        meta = meta or chunk.meta
        parts.append({name: chunk.arrays[name] for name in COLUMNS})
    joined = {name: np.concatenate([p[name] for p in parts]) for name in COLUMNS}
    if not len(joined["id"]):
        raise Input(f"{source}: no rows to train on")
    return joined, meta


def hold_out(
    options: dict[str, Any], data: Data, meta: dict[str, Any], device: torch.device, ranks: Ranks
) -> tuple[Data, Data | None]:
    """(training rows, held-out rows): a share of the rows by id, or another stream that shares no image with them."""
    import torch

    from rbkit.tools.sample import in_validation

    if not is_share(options["val"]):
        held, known = read(options["val"], options["max_document"], device, ranks)
        hint = "streams of the same numbering"
        check_numbering(known, meta, place=options["val"], other="the rows to train on", hint=hint)
        if held.image.shape[1:] != data.image.shape[1:]:
            got, want = (size_of(rows.image.shape[1:]) for rows in (held, data))
            raise Input(f"{options['val']}: images of {got}, those to train on are {want}; try rb-data --size")
        return data, held
    share = float(options["val"])
    chosen = torch.from_numpy(
        in_validation(data.ids.cpu().numpy(), fraction=share, seed=options["seed"], purpose="held out")
    ).to(device)
    if not bool((~chosen).any()):
        raise Input("no rows are left to train on after --val; try --val 0")
    return data.rows(~chosen), (data.rows(chosen) if bool(chosen.any()) else None)


def class_count(data: Data, meta: dict[str, Any]) -> int:
    """Number of classes: that of the stream's names, else one more than the largest label."""
    found = int(data.label.max()) + 1
    names = meta.get("classes")
    if names is not None and found > len(names):
        raise Input(f"labels go up to {found - 1}, but the stream names {len(names)} classes (0 to {len(names) - 1})")
    return len(names) if names is not None else max(found, 2)
