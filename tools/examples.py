"""Labelled examples in memory, and what is measured of their pixels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Data:
    """Examples in memory: image uint8 or float32 (N, C, H, W), label (N,), ids (N,)."""

    image: Tensor
    label: Tensor
    ids: Tensor

    def __len__(self) -> int:
        return len(self.label)

    def rows(self, index: Tensor) -> Data:
        """The rows of `index`, int64 or bool (M,)."""
        return Data(self.image[index], self.label[index], self.ids[index])

    def to(self, device: torch.device) -> Data:
        """The same on a device."""
        return Data(self.image.to(device), self.label.to(device), self.ids.to(device))


def as_float(images: Tensor) -> Tensor:
    """Images of any shape as float32 in [0, 1]; uint8 is divided by 255."""
    return images.to(torch.float32) / 255 if images.dtype == torch.uint8 else images.to(torch.float32)


def statistics(images: Tensor) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of images (N, C, H, W) per channel over all pixels, in [0, 1]: two lists of C numbers,
    summed in float64 and rounded to 6 places."""
    count = 0
    sums = torch.zeros(2, images.shape[1], dtype=torch.float64)
    for part in images.split(1024):
        x = as_float(part).to(torch.float64).cpu()
        sums += torch.stack([x.sum((0, 2, 3)), (x * x).sum((0, 2, 3))])
        count += x[:, 0].numel()
    total, square = sums[0] / count, sums[1] / count
    std = (square - total * total).clamp_min(1e-12).sqrt()
    return [round(v, 6) for v in total.tolist()], [round(v, 6) for v in std.tolist()]
