"""Folders and lists of picture files, decoded one chunk at a time."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from rbkit.formats import png
from rbkit.formats.dataset import DataSet
from rbkit.formats.errors import FormatError, LimitError, printable
from rbkit.formats.names import encode_names, path_ids

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff")
LOSSY = (".jpg", ".jpeg", ".webp")
FORMATS = ["PNG", "JPEG", "BMP", "WEBP", "PPM", "TIFF"]
SPLITS = ("train", "val", "test")


def fit(image: Any, size: int | None) -> Any:
    """A Pillow image with its shorter side resized to `size` (antialiased) and its centre cropped to a square."""
    from PIL import Image

    if size is None or image.size == (size, size):
        return image
    if image.mode in ("P", "1") or "transparency" in image.info:
        image = image.convert("RGBA" if "transparency" in image.info else "RGB" if image.mode == "P" else "L")
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


def _check(image: Any, *, name: str) -> None:
    """What Pillow would cut down without a word. Raises: FormatError."""
    count = getattr(image, "n_frames", 1)
    if count > 1 and image.format != "MPO":  # a camera's MPO is a JPEG with its own preview behind it
        raise FormatError(f"{name}: holds {count} pictures, expected one; extract one first")
    if image.mode == "F" or image.mode.startswith("I"):
        raise FormatError(f"{name}: more than 8 bits per channel, expected 8; try `convert -depth 8`")


def decode(path: Path, *, size: int | None, max_pixels: int) -> np.ndarray:
    """One picture file as uint8 (C, H, W), upright. Raises: FormatError, LimitError, OSError."""
    from PIL import Image, ImageOps

    shown = printable(os.fspath(path), limit=200)
    if path.suffix.lower() == ".png":
        pixels = png.open_picture(os.fspath(path), max_pixels=max_pixels).pixels
        image = Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0))
        return png.to_pixels(fit(image, size)) if size else pixels
    Image.MAX_IMAGE_PIXELS = None  # our own limit is applied before any pixel is decoded
    with path.open("rb") as file:
        try:
            with Image.open(file, formats=FORMATS) as image:
                if image.width * image.height > max_pixels:
                    raise LimitError(f"{shown}: {image.width} x {image.height} pixels, limit {max_pixels}")
                _check(image, name=shown)
                return png.to_pixels(fit(ImageOps.exif_transpose(image), size))
        except FormatError:
            raise
        except Exception as error:  # Pillow raises many kinds; each means that the file is bad
            raise FormatError(f"{shown}: not a readable image ({type(error).__name__})") from None


def stack(pictures: Sequence[np.ndarray], names: Sequence[str]) -> np.ndarray:
    """Pictures of one shape as one array. Raises: FormatError naming the first that differs."""
    for picture, name in zip(pictures, names, strict=True):
        if picture.shape != pictures[0].shape:
            found, expected = (" x ".join(map(str, p.shape)) for p in (picture, pictures[0]))
            what = "try --grey or --rgb" if picture.shape[1:] == pictures[0].shape[1:] else "try --size"
            raise FormatError(f"{printable(name, limit=200)}: {found}, the others are {expected}; {what}")
    return np.stack(pictures)


def recolour(pixels: np.ndarray, channels: int | None) -> np.ndarray:
    """Pixels (C, H, W) with `channels` channels: grey is repeated, colour becomes ITU-R 601 luma (rounded)."""
    if channels is None or len(pixels) == channels:
        return pixels
    if channels == 3:
        return np.repeat(pixels, 3, axis=0)
    luma = np.tensordot(np.array([299, 587, 114]), pixels.astype(np.int64), 1)
    return ((luma + 500) // 1000).astype(np.uint8)[None]


def files(
    paths: Sequence[Path],
    names: Sequence[str],
    *,
    labels: np.ndarray | None,
    classes: list[str] | None = None,
    size: int | None = None,
    channels: int | None = None,
    max_pixels: int = png.MAX_PIXELS,
    carved: bool = False,
) -> DataSet:
    """A data set of picture files: `names` are shown, kept and hashed to ids. Raises: FormatError."""
    first_shape: list[tuple[int, ...]] = []
    encoded = encode_names(names)

    def fetch(indices: np.ndarray) -> dict[str, np.ndarray]:
        pictures = [recolour(decode(paths[i], size=size, max_pixels=max_pixels), channels) for i in indices.tolist()]
        image = stack(pictures, [names[i] for i in indices.tolist()])
        first_shape.append(image.shape[1:])
        if image.shape[1:] != first_shape[0]:
            found, expected = (" x ".join(map(str, s)) for s in (image.shape[1:], first_shape[0]))
            raise FormatError(f"{printable(names[int(indices[0])])}: {found}, the others are {expected}; try --size")
        rows = {"image": image, "name": encoded[indices]}
        if labels is not None:
            rows["label"] = labels[indices]
        return rows

    ids = path_ids(names)
    lossy = any(path.suffix.lower() in LOSSY for path in paths)
    return DataSet(ids, fetch, classes, lossy=lossy, carved=carved)


def _shown(names: Iterable[str]) -> list[str]:
    """Names that a shell's * matches: what notebooks and other systems hide in a folder is no class and no picture."""
    return [name for name in names if not name.startswith(".")]


def _fail(error: OSError) -> None:
    raise error


def _files(folder: Path) -> list[Path]:
    """All files below a folder, but for hidden ones, in the order of their names. Raises: OSError, which os.walk passes over."""
    found: list[Path] = []
    for place, folders, names in os.walk(folder, onerror=_fail):
        folders[:] = _shown(folders)
        found += [path for path in map(Path(place).joinpath, _shown(names)) if path.is_file()]
    return sorted(found, key=os.fsencode)


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES


def _pictures(folder: Path) -> list[Path]:
    return [path for path in _files(folder) if _is_picture(path)]


def _others(files: Iterable[Path]) -> tuple[str, ...]:
    """What files that are no pictures end in, and how many do so."""
    endings = Counter(printable(p.suffix.lower() or p.name, limit=40) for p in files if not _is_picture(p))
    return tuple(f"{ending} ({count} {'file' if count == 1 else 'files'})" for ending, count in sorted(endings.items()))


def _folders(folder: Path) -> list[str]:
    """Sorted names of the folders in one."""
    return sorted(_shown(path.name for path in folder.iterdir() if path.is_dir()), key=os.fsencode)


def class_root(root: Path) -> Path:
    """Where the class folders of a tree like ImageNet's are: ROOT/train if there is one, else ROOT."""
    return root / "train" if (root / "train").is_dir() else root


def class_folders(root: Path) -> list[str]:
    """Sorted names of the class folders. Raises: FormatError where there are none, OSError."""
    shown = printable(os.fspath(root), limit=200)
    if not root.is_dir():
        raise FormatError(f"{shown}: no folder; expected CLASS/PICTURE or train/CLASS/PICTURE in it")
    names = _folders(root)
    if not names:
        raise FormatError(f"{shown}: no class folders; expected CLASS/PICTURE or train/CLASS/PICTURE")
    return names


def pictures_of(root: Path, name: str) -> list[str]:
    """Sorted names, from `root`, of the pictures of one class."""
    return [os.fspath(path.relative_to(root)) for path in _pictures(root / name)]


def digest_line(root: Path, name: str) -> bytes:
    """A line as sha256sum(1) writes it for a file below `root`. Raises: OSError."""
    with (root / name).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    raw = os.fsencode(name)
    escaped = raw.replace(b"\\", b"\\\\").replace(b"\n", b"\\n").replace(b"\r", b"\\r")
    return (b"\\" if escaped != raw else b"") + digest.encode() + b"  " + escaped + b"\n"


def _places(root: Path, split: str, *, carved: bool) -> list[Path]:
    """The folders of class folders that a split of ROOT is read from. Raises: FormatError where one is not there."""
    shown = printable(os.fspath(root), limit=200)
    if split == "all":
        splits = [name for name in SPLITS if (root / name).is_dir() and _folders(root / name)]
        if splits:
            raise FormatError(
                f"{shown}: has splits ({', '.join(splits)}), expected CLASS/PICTURE in it; try --split {splits[0]}"
            )
        return [root]
    if carved and split in ("val", "trainval"):
        names = ["train"]
    else:
        names = ["train", "val"] if split == "trainval" else [split]
    for name in names:
        if not (root / name).is_dir():
            raise FormatError(
                f"{shown}: no folder {name!r}; expected SPLIT/CLASS/PICTURE in it; try another --split, or --split all for CLASS/PICTURE"
            )
    return [root / name for name in names]


def _labelled(place: Path, classes: list[str]) -> list[tuple[Path, int]]:
    """The files of PLACE/CLASS, each with the number of its class. Raises: FormatError for folders that are no class."""
    strange = [name for name in _folders(place) if name not in classes]
    if not classes or strange:
        what = f"class folders {strange[:3]} that train lacks" if strange else "no class folders"
        raise FormatError(f"{printable(os.fspath(place), limit=200)}: {what}")
    folders = [(place / name, label) for label, name in enumerate(classes) if (place / name).is_dir()]
    return [(path, label) for folder, label in folders for path in _files(folder)]


def image_folder(
    root: Path, *, split: str, size: int | None = None, channels: int | None = None, max_pixels: int = png.MAX_PIXELS
) -> DataSet:
    """ROOT/SPLIT/CLASS/*.png|jpg|...: classes are the sorted folder names of `train`, so that splits agree.

    `val` is a folder of its own or, where there is none, carved from `train` by the caller. `all` is ROOT/CLASS/*, without splits.
    Raises: FormatError (no such split, no class folders, no pictures), OSError.
    """
    carved = not (root / "val").is_dir()
    places = _places(root, split, carved=carved)
    classes = _folders(root / "train" if split != "all" and (root / "train").is_dir() else places[0])
    found = [pair for place in places for pair in _labelled(place, classes)]
    pictures = [(path, label) for path, label in found if _is_picture(path)]
    if not pictures:
        raise FormatError(f"{printable(os.fspath(places[0]), limit=200)}: no pictures ({', '.join(SUFFIXES)})")
    paths, labels = [path for path, _ in pictures], np.array([label for _, label in pictures], np.int64)
    names = [os.fspath(path.relative_to(root)) for path in paths]
    data = files(
        paths, names, labels=labels, classes=classes, size=size, channels=channels, max_pixels=max_pixels,
        carved=carved and split != "all",
    )  # fmt: skip
    return replace(data, unused=_others(path for path, _ in found))
