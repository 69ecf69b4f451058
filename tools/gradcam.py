"""Grad-CAM (Selvaraju et al. 2017): where a feature map pulls the output up, at the map's own resolution."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from rbkit.tools.attribution import Explained, Saliency, output_of
from rbkit.tools.models import Evaluation, in_blocks


def _is_map(found: object) -> bool:
    """Whether it is (N, K, h, w) with more than one location."""
    return isinstance(found, Tensor) and found.dim() == 4 and found.shape[2] * found.shape[3] > 1


def _collapses(before: Tensor, after: object) -> bool:
    """Whether a map's locations are pooled to one, or flattened away: (N, K, 1, 1) or (N, F)."""
    if not isinstance(after, Tensor) or after.dim() not in (2, 4) or len(after) != len(before):
        return False
    return after.dim() == 2 or after.shape[1:] == (before.shape[1], 1, 1)


class _LastMap(TorchFunctionMode):
    """Watches a forward pass for the last feature map: what is pooled or flattened last, after some convolution.

    Functions are watched, not modules: an activation that is no module of its own counts too, and tokens of a
    transformer, which never lose their locations so, do not.
    """

    def __init__(self) -> None:
        super().__init__()
        self.map: Tensor | None = None
        self.convolved = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = args[0] if args and _is_map(args[0]) else None
        after = func(*args, **(kwargs or {}))
        if before is not None and self.convolved and _collapses(before, after):
            self.map = before
        self.convolved = self.convolved or "conv" in getattr(func, "__name__", "")
        return after


def _last_map(evaluation: Evaluation, images: Tensor) -> tuple[Tensor, Tensor]:
    """The last feature map before the head, and the logits. Raises: ValueError where there is none."""
    with _LastMap() as watch:
        logits = evaluation(images)
    if watch.map is None:
        raise ValueError("the network pools or flattens no feature map (N, K, h, w) before its head; try --layer NAME")
    return watch.map, logits


def _map_of(evaluation: Evaluation, images: Tensor, layer: str) -> tuple[Tensor, Tensor]:
    """The feature map that a layer gives (the last time it runs), and the logits. Raises: ValueError if it is none."""
    found, logits = evaluation.at_layer(images, layer)
    if not _is_map(found):
        raise ValueError(f"layer {layer} gives {list(found.shape[1:])} per image, expected a feature map (K, h, w)")
    return found, logits


def cam(evaluation: Evaluation, images: Tensor, target: Tensor, spec: Saliency) -> Tensor:
    """Sum of the maps of one padded block, weighted by the mean gradient of each (eq. 1 and 2), (B, 1, h, w)."""
    images = images.detach().requires_grad_()
    with torch.enable_grad():
        found, logits = _last_map(evaluation, images) if spec.layer is None else _map_of(evaluation, images, spec.layer)
        total = output_of(logits, target, spec.output).sum()
    gradient = torch.autograd.grad(total, found, allow_unused=True)[0]
    if gradient is None:
        raise ValueError(f"layer {spec.layer} does not reach the output")
    weights = gradient.mean((2, 3), keepdim=True)
    summed = (weights * found.detach()).sum(1, keepdim=True)
    return summed if spec.signed else summed.clamp_min(0)


def grad_cam(
    evaluation: Evaluation, images: Tensor, target: Tensor, spec: Saliency, **unused: Tensor | None
) -> Explained:
    """Grad-CAM on the last feature map, or on that of `layer` (Selvaraju et al. 2017, eq. 1 and 2).

    Negative values are dropped as in the paper unless `signed`; the map is upsampled bilinearly to the image and shared
    evenly by its channels, whose sum is the map. Raises: ValueError where there is no such feature map.
    """
    channels, *size = images.shape[1:]

    def upsampled(part: Tensor, goal: Tensor) -> Tensor:
        return F.interpolate(cam(evaluation, part, goal, spec), size, mode="bilinear")

    maps = in_blocks(upsampled, images, target, block=evaluation.block)
    return Explained((maps / channels).repeat(1, channels, 1, 1), target)
