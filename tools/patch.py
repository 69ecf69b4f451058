"""Squares of pixels, one in each of some images, read and written several times faster than by four indices."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Squares:
    """Where squares lie: the uppermost row and the leftmost column of each, int64 (P,) both, and their side."""

    top: Tensor
    left: Tensor
    side: int

    @classmethod
    def anywhere(cls, words: Tensor, side: int, *, height: int, width: int) -> Squares:
        """Uniform where they fit in images of this size, by two words of 32 random bits each, int64 (P, 2)."""
        top, left = ((words[:, i] * (size - side + 1)) >> 32 for i, size in enumerate((height, width)))
        return cls(top, left, side)

    @property
    def _lines(self) -> tuple[Tensor, Tensor]:
        """Their rows (P, side, 1) and columns (P, 1, side)."""
        along = torch.arange(self.side, device=self.top.device)
        return (self.top[:, None] + along)[:, :, None], (self.left[:, None] + along)[:, None]

    def places(self, width: int) -> Tensor:
        """Their pixels, counted along the rows of an image so wide, int64 (P, side, side)."""
        down, across = self._lines
        return down * width + across

    def meet(self, other: Squares) -> Tensor:
        """Which of their pixels are in the other square as well, bool (P, side, side)."""
        inside = [
            (line >= start[:, None, None]) & (line < (start + other.side)[:, None, None])
            for line, start in zip(self._lines, (other.top, other.left), strict=True)
        ]
        return inside[0] & inside[1]


def read(images: Tensor, rows: Tensor, places: Tensor) -> Tensor:
    """What images (B, C, H, W), channels last, hold at the places (G, side, side) of these rows, int64 (G,); (G, C, side, side)."""
    found = _pixels(images).index_select(0, _of(images, rows, places))
    return found.view(*places.shape, images.shape[1]).permute(0, 3, 1, 2).contiguous()


def write_(images: Tensor, rows: Tensor, places: Tensor, values: Tensor) -> None:
    """Write values, which broadcast to (G, C, side, side), there."""
    whole = values.expand(len(rows), images.shape[1], *places.shape[1:]).permute(0, 2, 3, 1)
    _pixels(images).index_copy_(0, _of(images, rows, places), whole.reshape(-1, images.shape[1]))


def _of(images: Tensor, rows: Tensor, places: Tensor) -> Tensor:
    height, width = images.shape[2:]
    return (places + (rows * (height * width))[:, None, None]).flatten()


def _pixels(images: Tensor) -> Tensor:
    """Images (B, C, H, W), channels last, as the pixels that they are, (B * H * W, C): rows of one index are read and written
    several times faster than what four have to find."""
    return images.permute(0, 2, 3, 1).view(-1, images.shape[1])
