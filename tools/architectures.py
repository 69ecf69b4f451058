"""Networks: the CIFAR-stem ResNet-18 of the paper, a small ResNet, torchvision's by name, and anybody's factory.

One module per activation and no in-place addition, so that hooks see every step.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut (He et al. 2016); names as in torchvision."""

    def __init__(self, channels: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.relu2 = nn.ReLU()
        self.downsample: nn.Module | None = None
        # oneDNN 3.12 writes out of bounds in the weight gradient of a strided 1 x 1 convolution of fewer channels than
        # its block (8 on AVX2, 16 on AVX-512): there every other pixel is taken first, which gives the same sums.
        self.skip = stride if channels < 16 else 1
        if stride != 1 or channels != planes:
            shortcut = nn.Conv2d(channels, planes, 1, stride // self.skip, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(planes))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        thinned = x if self.skip == 1 else x[:, :, :: self.skip, :: self.skip]
        shortcut = x if self.downsample is None else self.downsample(thinned)
        return self.relu2(out + shortcut)


class ResNet(nn.Module):
    """Stages of `blocks` basic blocks behind a 3 x 3 stem of stride 1; the first block of each stage has its stride.

    Shapes: images (N, channels, H, W) to logits (N, num_classes); the features before `fc` are (N, widths[-1]).
    """

    def __init__(
        self, blocks: int, widths: list[int], strides: list[int], *, stem: int, num_classes: int, channels: int
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, stem, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        self.relu = nn.ReLU()
        inputs = stem
        for stage, (planes, stride) in enumerate(zip(widths, strides, strict=True), start=1):
            first = BasicBlock(inputs, planes, stride)
            rest = [BasicBlock(planes, planes, 1) for _ in range(blocks - 1)]
            self.add_module(f"layer{stage}", nn.Sequential(first, *rest))
            inputs = planes
        self.stages = len(widths)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(inputs, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        for stage in range(self.stages):
            x = getattr(self, f"layer{stage + 1}")(x)
        return self.fc(self.avgpool(x).flatten(1))


def resnet8(*, num_classes: int, channels: int = 3, width: int = 16) -> nn.Module:
    """The small ResNet for laptops and CI: a stem of `width` channels, then three stages of one block each.

    Every stage halves the image and doubles the channels: at the cost of one that keeps the first stage at full size
    and has half the channels, it is far more accurate under adversarial training (benchmarks/TARGETS.md).
    """
    widths = [2 * width, 4 * width, 8 * width]
    return ResNet(1, widths, [2, 2, 2], stem=width, num_classes=num_classes, channels=channels)


def resnet18(*, num_classes: int, channels: int = 3, width: int = 64) -> nn.Module:
    """ResNet-18 with the CIFAR stem (3 x 3, stride 1, no pooling) and torchvision's keys."""
    widths = [width, 2 * width, 4 * width, 8 * width]
    return ResNet(2, widths, [1, 2, 2, 2], stem=width, num_classes=num_classes, channels=channels)


WITH_AUXILIARY_HEADS = ("googlenet", "inception_v3")  # which would be outputs beside the logits
OWN: dict[str, Callable[..., nn.Module]] = {"resnet8": resnet8, "resnet18": resnet18}
FACTORY = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def is_factory(arch: str) -> bool:
    """Whether `arch` names a factory of the user (`package.module:function`)."""
    return FACTORY.fullmatch(arch) is not None and not arch.startswith("torchvision:")


def _torchvision(name: str, *, num_classes: int, channels: int) -> nn.Module:
    from torchvision import models

    if name not in models.list_models(module=models):
        raise ValueError(f"torchvision has no classifier {name!r}; try torchvision:resnet50")
    options = {"aux_logits": False, "init_weights": False} if name in WITH_AUXILIARY_HEADS else {}
    net = models.get_model(name, weights=None, num_classes=num_classes, **options)
    if channels != 3:
        raise ValueError(f"torchvision:{name} takes 3 channels, got {channels}; try rb-data --rgb, or resnet18")
    return net


def load_factory(arch: str) -> Callable[..., Any]:
    """Import `package.module:function`; the current folder is the last place to look, and only during the import.

    Raises: ValueError when it cannot be imported or is not callable.
    """
    module_name, _, name = arch.partition(":")
    here = str(Path.cwd())
    sys.path.append(here)
    try:
        factory = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"cannot import {arch} ({error}); it is looked for on PYTHONPATH and in the current folder"
        ) from None
    finally:
        sys.path.remove(here)
    if not callable(factory):
        raise ValueError(f"{arch} is not callable; expected a factory called as {name}(num_classes=K)")
    return factory


def build(arch: str, *, num_classes: int, channels: int = 3, width: int | None = None) -> nn.Module:
    """A network of fresh weights by name. Raises: ValueError for an unknown name or a channel count it cannot take."""
    if arch in OWN:
        options = {} if width is None else {"width": width}
        return OWN[arch](num_classes=num_classes, channels=channels, **options)
    if width is not None:
        raise ValueError(f"a width goes with {' or '.join(OWN)}, not with {arch}")
    if arch.startswith("torchvision:"):
        return _torchvision(arch.partition(":")[2], num_classes=num_classes, channels=channels)
    if not is_factory(arch):
        raise ValueError(
            f"unknown architecture {arch!r}; expected {', '.join(OWN)}, torchvision:NAME or package.module:factory"
        )
    net = load_factory(arch)(num_classes=num_classes)
    if not isinstance(net, nn.Module):
        raise ValueError(f"{arch} returned {type(net).__name__}, expected a torch.nn.Module")
    return net
