"""A network without BatchNorm, as a factory for --arch: what is gained where nothing can be folded."""

from __future__ import annotations

from torch import nn


def small_cnn(*, num_classes: int) -> nn.Module:
    """Two strided convolutions and two linear layers, for RGB images of 32 x 32 (the small network of Wong and Kolter 2018,
    arXiv 1711.00851, with four times the channels)."""
    return nn.Sequential(
        nn.Conv2d(3, 64, 4, 2, 1), nn.ReLU(),
        nn.Conv2d(64, 128, 4, 2, 1), nn.ReLU(),
        nn.Flatten(), nn.Linear(128 * 8 * 8, 100), nn.ReLU(), nn.Linear(100, num_classes),
    )  # fmt: skip
