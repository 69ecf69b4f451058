"""Pictures for people: colours of maps, overlays, and labelled contact sheets."""

from __future__ import annotations

import functools
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

CELL = 96  # smallest side of a cell in pixels; small images are enlarged by whole factors
GAP = 6
LINE = 14  # height of a line of text
PLAIN = frozenset(string.printable + "±")  # what Pillow's own font can write
COLD, WARM = np.array([33, 102, 172.0]), np.array([178, 24, 43.0])


def diverging() -> np.ndarray:
    """Palette (256, 3) uint8: blue for negative, white for zero, red for positive."""
    t = np.linspace(-1, 1, 256)[:, None]
    end = np.where(t < 0, COLD, WARM)
    return np.rint(255 + np.abs(t) ** 0.8 * (end - 255)).astype(np.uint8)


def scale_of(maps: np.ndarray) -> float:
    """The symmetric scale of a map: the 99.9th percentile of its absolute values, or its maximum if that is 0."""
    values = np.abs(maps[np.isfinite(maps)])
    if not values.size:
        return 0.0
    return float(np.percentile(values, 99.9)) or float(values.max())


def to_rgb(image: np.ndarray) -> np.ndarray:
    """Pixels (C, H, W), uint8 or float in [0, 1], as RGB (H, W, 3) uint8; a channel count that is neither 1 nor 3 is
    shown by its mean."""
    if image.dtype != np.uint8:
        image = np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8)
    if len(image) not in (1, 3):
        image = np.rint(image.mean(0, keepdims=True)).astype(np.uint8)
    return np.ascontiguousarray(np.broadcast_to(image, (3, *image.shape[1:])).transpose(1, 2, 0))


def colour_map(values: np.ndarray, *, scale: float) -> np.ndarray:
    """A map (H, W) as RGB, from -scale (blue) to scale (red)."""
    index = np.full(values.shape, 127.5) if scale <= 0 else (np.nan_to_num(values) / scale + 1) * 127.5
    return diverging()[np.clip(np.rint(index), 0, 255).astype(np.uint8)]


def overlay(image: np.ndarray, values: np.ndarray, *, scale: float) -> np.ndarray:
    """The grey image with the map's colours on it, as strong as its values."""
    grey = to_rgb(image).mean(2, keepdims=True) * 0.5 + 110
    strength = np.zeros(values.shape) if scale <= 0 else np.clip(np.abs(values) / scale, 0, 1)
    weight = 0.85 * strength[:, :, None] ** 0.7
    colour = np.where((values < 0)[:, :, None], COLD, WARM)
    return np.clip(np.rint(grey * (1 - weight) + colour * weight), 0, 255).astype(np.uint8)


def difference(image: np.ndarray, other: np.ndarray, *, scale: float) -> np.ndarray:
    """A perturbation around middle grey; `scale` maps to full contrast."""
    delta = (other.astype(np.float64) - image.astype(np.float64)) / (2 * scale if scale > 0 else 1)
    return to_rgb(np.clip(0.5 + delta, 0, 1).astype(np.float32))


@dataclass
class Row:
    """A line of a sheet: cells RGB (H, W, 3), each with a caption."""

    cells: list[np.ndarray]
    captions: list[str] = field(default_factory=list)


def _enlarged(cell: np.ndarray) -> np.ndarray:
    factor = max(1, -(-CELL // max(cell.shape[:2])))
    return cell.repeat(factor, 0).repeat(factor, 1)


@functools.cache
def _many_letters() -> Any:
    import matplotlib
    from PIL import ImageFont

    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), 10)


def _write(
    draw: Any, place: tuple[int, int], text: str, *, fill: tuple[int, int, int], limit: int | None = None
) -> None:
    """One line of text, of no more than `limit` letters: names of files and classes may be in any script and hold line ends."""
    line = " ".join(text.split())[:limit]
    draw.text(place, line, fill=fill, font=None if PLAIN.issuperset(line) else _many_letters())


def contact_sheet(
    rows: Sequence[Row],
    *,
    heads: Sequence[str],
    title: str,
    foot: str,
    columns: int = 1,
    sources: Mapping[int, str] | None = None,
) -> np.ndarray:
    """Rows of cells under column heads, `columns` groups of rows side by side, as pixels (3, H, W) uint8.

    sources: names that stand above the heads, each from the cell of its number on.
    """
    from PIL import Image, ImageDraw

    grid = [[_enlarged(cell) for cell in row.cells] for row in rows]
    side = max((cell.shape[1] for row in grid for cell in row), default=CELL)
    height = max((cell.shape[0] for row in grid for cell in row), default=CELL)
    per_group = max((len(row) for row in grid), default=1)
    lines = max(1, -(-len(rows) // columns))
    captioned = any(any(row.captions) for row in rows)
    step_y, group = height + GAP + (LINE if captioned else 0), per_group * (side + GAP) + GAP
    width = max(GAP + columns * group, 7 * max(len(title), len(foot)) + 2 * GAP)
    names = dict(sources or {})
    top = GAP + (3 if names else 2) * LINE
    image = Image.new("RGB", (width, top + lines * step_y + LINE + GAP), (255, 255, 255))
    draw = ImageDraw.Draw(image)
    _write(draw, (GAP, GAP // 2), title, fill=(0, 0, 0))
    for number, cells in enumerate(grid):
        left, y = GAP + number // lines * group, top + number % lines * step_y
        for column, cell in enumerate(cells):
            x = left + column * (side + GAP)
            if number % lines == 0 and column < len(heads):
                _write(draw, (x, top - GAP // 2 - LINE), heads[column], fill=(90, 90, 90), limit=side // 6)
            if number % lines == 0 and column in names:
                span = min((other for other in names if other > column), default=per_group) - column
                _write(draw, (x, GAP // 2 + LINE), names[column], fill=(0, 0, 0), limit=span * side // 6)
            image.paste(Image.fromarray(cell), (x, y))
            if column < len(rows[number].captions):
                _write(draw, (x, y + cell.shape[0]), rows[number].captions[column], fill=(60, 60, 60), limit=side // 6)
    _write(draw, (GAP, image.height - LINE), foot, fill=(90, 90, 90))
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))
