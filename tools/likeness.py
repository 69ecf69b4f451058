"""Inverted and generated images: how close they come, and who recognises them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from rbkit.tools.batch import Batch, defined
from rbkit.tools.masking import blurred
from rbkit.tools.models import features_of


def judged_features(batch: Batch) -> dict[str, Tensor]:
    """Features of the judge model, float32 (N, D), of the images made (`generated`), of the `real` ones and, where they
    are stored, of the `start` images: what the Fréchet distance is computed of."""
    assert batch.judge is not None
    images = {"generated": batch.inverted, "real": batch.image, "start": batch.start}
    return {name: features_of(batch.judge, x).float() for name, x in images.items() if x is not None}


def latent_error(batch: Batch) -> Tensor:
    """|R(inverted) - R(image)| / |R(image)| in the features before the head, per example."""
    assert batch.inverted is not None
    goal, found = (features_of(batch.evaluation, x).double() for x in (batch.image, batch.inverted))
    size = goal.norm(dim=1)
    return defined(size > 0, (found - goal).norm(dim=1) / size.clamp_min(1e-300))


def pixel_error(batch: Batch) -> Tensor:
    """Root mean square difference to the image, in [0, 1] pixels."""
    assert batch.inverted is not None
    return (batch.inverted.double() - batch.image.double()).flatten(1).square().mean(1).sqrt()


def low_frequency_error(batch: Batch) -> Tensor:
    """Root mean square difference after a blur of 4 pixels: layout and colour without detail."""
    assert batch.inverted is not None
    return (blurred(batch.inverted) - blurred(batch.image)).double().flatten(1).square().mean(1).sqrt()


def feature_distance(batch: Batch) -> Tensor:
    """Euclidean distance to the image in the judge model's features before the head, per example."""
    assert batch.inverted is not None and batch.judge is not None
    first, second = (features_of(batch.judge, x).double() for x in (batch.inverted, batch.image))
    return (first - second).norm(dim=1)


def _window(size: int, device: torch.device) -> Tensor:
    offset = torch.arange(size, device=device, dtype=torch.float64) - (size - 1) / 2
    kernel = torch.exp(-0.5 * (offset / 1.5) ** 2)
    return kernel / kernel.sum()


def structural_similarity(first: Tensor, second: Tensor) -> Tensor:
    """SSIM (Wang et al. 2004) of images (N, C, H, W) in [0, 1], float64 (N,): window of 11 pixels and sigma 1.5."""
    a, b = (x.double().flatten(0, 1)[:, None] for x in (first, second))
    size = min(11, a.shape[2] - (a.shape[2] + 1) % 2, a.shape[3] - (a.shape[3] + 1) % 2)
    line = _window(size, a.device)
    kernel = (line[:, None] * line[None, :])[None, None]

    def smooth(x: Tensor) -> Tensor:
        return F.conv2d(x, kernel)

    ma, mb = smooth(a), smooth(b)
    va, vb, cov = smooth(a * a) - ma * ma, smooth(b * b) - mb * mb, smooth(a * b) - ma * mb
    c1, c2 = 0.01**2, 0.03**2
    index = ((2 * ma * mb + c1) * (2 * cov + c2)) / ((ma * ma + mb * mb + c1) * (va + vb + c2))
    return index.flatten(1).mean(1).reshape(len(first), -1).mean(1)


def ssim(batch: Batch) -> Tensor:
    """Structural similarity (Wang et al. 2004): Gaussian window of 11 pixels and sigma 1.5, valid region, channel mean."""
    assert batch.inverted is not None
    return structural_similarity(batch.image, batch.inverted)


def judge_accuracy(batch: Batch) -> Tensor:
    """1 where an independent model sees the label in the inverted or generated image."""
    assert batch.inverted is not None and batch.judge is not None and batch.label is not None
    return (batch.judge.logits(batch.inverted).argmax(1) == batch.label).double()


def own_accuracy(batch: Batch) -> Tensor:
    """1 where the model itself sees the label in the inverted or generated image."""
    assert batch.inverted is not None and batch.label is not None
    return (batch.evaluation.logits(batch.inverted).argmax(1) == batch.label).double()
