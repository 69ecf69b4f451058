"""Rows of images as the commands take them: checked against the format's rules and against the model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from rbkit.cli import _input
from rbkit.cli._compute import Model, to_tensor
from rbkit.cli._errors import Input, blame
from rbkit.cli._progress import Progress
from rbkit.formats.errors import FormatError

if TYPE_CHECKING:
    import torch

    from rbkit.formats.chunk import Chunk


def size_of(shape: Sequence[int]) -> str:
    """The shape of an image as messages show it."""
    return "x".join(map(str, shape))


def check_input(model: Model, shape: Sequence[int], *, place: str) -> None:
    """Refuse images that the model does not take, or not run on; nothing is resized or repeated in silence. Raises: Input."""
    expected = model.meta.get("input")
    if expected is not None and list(shape) != list(expected):
        raise Input(
            f"{place}: the model expects images of {size_of(expected)}, got {size_of(shape)}; "
            "try rb-data --size, --grey or --rgb"
        )
    with blame(Input, ValueError, prefix=f"{model.path}: "):
        model.check_runs(shape)


def checked(stream: Iterable[Chunk], model: Model | None) -> Iterator[Chunk]:
    """The chunks of a stream, each with sound rows of a size that the model takes. Raises: Input."""
    from rbkit.formats.rows import RowChecker

    checker = RowChecker(classes=None if model is None else model.classes)
    for chunk in stream:
        with blame(Input, FormatError):
            chunk = checker(chunk)
        if model is not None:
            check_input(model, chunk.arrays["image"].shape[1:], place=chunk.place)
        yield chunk


def watched(
    stream: Iterable[Chunk], *, tool: str, quiet: bool, shard: str | None = None, unit: str = "images"
) -> Iterator[Chunk]:
    """The chunks, with a progress bar that moves on once the caller is done with each."""
    with Progress(tool, total=None, unit=unit, quiet=quiet) as progress:
        for chunk in stream:
            progress.expect(None if shard else chunk.meta.get("total"))
            yield chunk
            progress.advance(chunk.count)


def load_images(
    path: str, model: Model, device: torch.device, *, max_document: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(images float32, ids, labels or None) of a whole side input. Raises: Input, also where it has no rows."""
    import torch

    from rbkit.tools.examples import as_float

    images, ids, labels = [], [], []
    for chunk in checked(_input.chunks(path, max_document=max_document), model):
        images.append(as_float(to_tensor(chunk.arrays["image"], device)))
        ids.append(to_tensor(chunk.arrays["id"], device))
        if "label" in chunk.arrays:
            labels.append(to_tensor(chunk.arrays["label"], device))
    if not sum(map(len, images)):
        raise Input(f"{path}: no rows, expected at least one image")
    return torch.cat(images), torch.cat(ids), torch.cat(labels) if labels else None
