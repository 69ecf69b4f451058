"""Rows of images as the commands take them: checked against the format's rules and against the model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rbkit.cli import _input
from rbkit.cli._compute import Model, to_tensor
from rbkit.cli._errors import Input, blame
from rbkit.cli._progress import Progress
from rbkit.formats.errors import FormatError, printable

if TYPE_CHECKING:
    import torch

    from rbkit.formats.chunk import Chunk


NUMBERED = ("label", "target", "attack_target")  # tensors that hold numbers of classes


def size_of(shape: Sequence[int]) -> str:
    """The shape of an image as messages show it."""
    return "x".join(map(str, shape))


def check_input(model: Model, chunk: Chunk) -> None:
    """Refuse images that the model does not take, or not run on, and classes that it numbers otherwise; nothing is resized,
    repeated or numbered anew in silence. Raises: Input."""
    shape, expected = chunk.arrays["image"].shape[1:], model.meta.get("input")
    if expected is not None and list(shape) != list(expected):
        raise Input(
            f"{chunk.place}: the model expects images of {size_of(expected)}, got {size_of(shape)}; "
            "try rb-data --size, --grey or --rgb"
        )
    if any(name in chunk.arrays for name in NUMBERED):
        hint = f"rb-data --classes-of {model.path}"
        check_numbering(chunk.meta, model.meta, place=chunk.place, other=model.path, hint=hint)
    with blame(Input, ValueError, prefix=f"{model.path}: "):
        model.check_runs(shape)


def check_numbering(meta: dict[str, Any], known: dict[str, Any], *, place: str, other: str, hint: str) -> None:
    """Refuse classes that are known elsewhere by the same names, or by some or more of them, but at other numbers: a label would
    mean another class there.

    meta, known: metadata, of which either may name its classes. Raises: Input.
    """
    here, there = class_names(meta), class_names(known)
    if not (set(here) <= set(there) or set(there) <= set(here)):
        return
    for number, (one, another) in enumerate(zip(here, there, strict=False)):
        if one != another:
            raise Input(
                f"{place}: class {number} is {printable(one)}, and {printable(another)} in {other}: "
                f"the same names at other numbers; try {hint}"
            )


def class_names(meta: dict[str, Any]) -> list[str]:
    """Names of the classes by number; none where the metadata, which may be anybody's, holds no such list."""
    names = meta.get("classes")
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else []


def checked(stream: Iterable[Chunk], model: Model | None) -> Iterator[Chunk]:
    """The chunks of a stream, each with sound rows of a size that the model takes. Raises: Input."""
    from rbkit.formats.rows import RowChecker

    checker = RowChecker(classes=None if model is None else model.classes)
    for chunk in stream:
        with blame(Input, FormatError):
            chunk = checker(chunk)
        if model is not None:
            check_input(model, chunk)
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
