"""Occlusion (Zeiler and Fergus 2014): how much the output falls while a square hides a part of the image."""

from __future__ import annotations

import torch
from torch import Tensor

from rbkit.tools.attribution import Explained, Saliency, values
from rbkit.tools.masking import filler, masked_values
from rbkit.tools.models import Evaluation


def sides(spec: Saliency, height: int, width: int) -> tuple[int, int]:
    """Window and stride in pixels. Raises: ValueError for a window beyond the image, or a stride that leaves gaps."""
    window = max(1, min(height, width) // 4) if spec.window is None else spec.window
    stride = max(1, window // 2) if spec.stride is None else spec.stride
    if not 1 <= window <= min(height, width):
        raise ValueError(f"window {window}: expected 1 to {min(height, width)}, the shorter side of the image")
    if not 1 <= stride <= window:
        raise ValueError(f"stride {stride}: expected 1 to {window}, the window, so that every pixel is hidden once")
    return window, stride


def windows(height: int, width: int, *, window: int, stride: int) -> Tensor:
    """Top, bottom, left and right of every window, int64 (M, 4); those at the lower and right border may be cut."""
    spans = [
        [(start, min(start + window, side)) for start in range(0, side - window + stride, stride)]
        for side in (height, width)
    ]
    return torch.tensor([[*down, *across] for down in spans[0] for across in spans[1]])


def _inside(start: Tensor, stop: Tensor, side: int) -> Tensor:
    """Which of `side` positions lie in each span, bool (B, side)."""
    position = torch.arange(side, device=start.device)
    return (position >= start[:, None]) & (position < stop[:, None])


def _spread(drops: Tensor, places: Tensor, shape: torch.Size) -> Tensor:
    """Each drop (N, M) shared evenly by the pixels and channels of its window, averaged over the windows of a pixel."""
    n, channels, height, width = shape
    total = torch.zeros(n, height, width, dtype=torch.float64, device=drops.device)
    cover = torch.zeros(height, width, dtype=torch.float64, device=drops.device)
    for number, (top, bottom, left, right) in enumerate(places.tolist()):
        share = drops[:, number] / ((bottom - top) * (right - left) * channels)
        total[:, top:bottom, left:right] += share[:, None, None]
        cover[top:bottom, left:right] += 1
    return (total / cover).float()[:, None].repeat(1, channels, 1, 1)


def occlusion(
    evaluation: Evaluation, images: Tensor, target: Tensor, spec: Saliency, **unused: Tensor | None
) -> Explained:
    """The fall of the output under a square that moves over the image (Zeiler and Fergus 2014, section 4.2).

    A window's fall is shared evenly by its pixels and channels, and a pixel takes the mean over its windows: where they
    do not overlap, a window keeps its sum. The completeness error is against the image that is all hidden; nothing
    promises that it is small. Raises: ValueError for a window or stride that does not fit, or the masker data.
    """
    height, width = images.shape[2:]
    window, stride = sides(spec, height, width)
    places = windows(height, width, window=window, stride=stride).to(images.device)
    hidden = filler(spec.masker, evaluation, images)

    def keep(rows: Tensor, numbers: Tensor) -> Tensor:
        top, bottom, left, right = places[numbers].unbind(1)
        return ~(_inside(top, bottom, height)[:, :, None] & _inside(left, right, width)[:, None])

    seen = masked_values(
        evaluation, images, target, spec.output, masks=len(places), keep=keep,
        fill=lambda rows, numbers: hidden.index_select(0, rows),
    )  # fmt: skip
    clear = values(evaluation, images, target, spec.output)
    change = clear - values(evaluation, hidden, target, spec.output)
    attribution = _spread(clear[:, None] - seen, places, images.shape)
    return Explained(attribution, target, (attribution.flatten(1).double().sum(1) - change).abs(), change)
