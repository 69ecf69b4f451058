"""Squares of pixels, one in each of some images, read and written several times faster than by four indices."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Patch:
    """A square of pixels in each of some images: which images (G,), their rows and columns (G, side) each; all int64."""

    images: Tensor
    rows: Tensor
    columns: Tensor

    def of(self, images: Tensor) -> Tensor:
        """What images (B, C, H, W), channels last, hold in it, (G, C, side, side)."""
        pixels = _pixels(images).index_select(0, self._places(images))
        return pixels.view(*self.rows.shape, -1, images.shape[1]).permute(0, 3, 1, 2).contiguous()

    def put(self, images: Tensor, values: Tensor) -> None:
        """Write values, which broadcast to (G, C, side, side), into images (B, C, H, W), channels last."""
        whole = values.expand(len(self.images), images.shape[1], *self.rows.shape[1:], *self.columns.shape[1:])
        _pixels(images).index_copy_(0, self._places(images), whole.permute(0, 2, 3, 1).reshape(-1, images.shape[1]))

    def meets(self, other: Patch) -> Tensor:
        """Which of its pixels are in the other one of the same image, bool (G, 1, side, side)."""
        rows, columns = (
            (mine >= theirs[:, :1]) & (mine <= theirs[:, -1:])
            for mine, theirs in ((self.rows, other.rows), (self.columns, other.columns))
        )
        return (rows[:, :, None] & columns[:, None, :])[:, None]

    def _places(self, images: Tensor) -> Tensor:
        height, width = images.shape[2:]
        lines = self.images[:, None] * height + self.rows
        return (lines[:, :, None] * width + self.columns[:, None]).flatten()


def _pixels(images: Tensor) -> Tensor:
    """Images (B, C, H, W), channels last, as the pixels that they are, (B * H * W, C): rows of one index are read and written
    several times faster than what four have to find."""
    return images.permute(0, 2, 3, 1).view(-1, images.shape[1])
