"""Models of known answer and odd-shaped batches for the tests of the science."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from rbkit.tools.architectures import resnet8
from rbkit.tools.models import Classifier, Evaluation

N, C, H, W, K = 7, 3, 5, 6, 4  # pairwise different, so that a swapped axis cannot pass


IDS = torch.tensor([3, 2**40, 0, 17, 9, 1, 250])  # of N rows: unsorted, far apart
TARGET = torch.tensor([0, 3, 1, 2, 2, 0, 1])


def generator(seed: int) -> torch.Generator:
    """A generator of its own: the global one is never used."""
    return torch.Generator().manual_seed(seed)


def images(
    n: int = N, c: int = C, h: int = H, w: int = W, *, seed: int = 0, low: float = 0.0, high: float = 1.0
) -> Tensor:
    """Uniform images (n, c, h, w) in [low, high]."""
    return torch.rand(n, c, h, w, generator=generator(seed)) * (high - low) + low


def reluctant(batches: list) -> tuple[list[bool], Callable]:
    """(what was asked, a source of batches that is ready only now and then unless it is waited for)."""
    left, asked = list(batches), []

    def poll(wait: bool) -> object:
        asked.append(wait)
        if not wait and len(asked) % 3:
            return None
        if not left:
            raise StopIteration
        return left.pop(0)

    return asked, poll


def linear(
    classes: int = K, shape: tuple[int, int, int] = (C, H, W), *, scale: float = 1.0, seed: int = 1
) -> Classifier:
    """Logits W x + b in pixel space: mean 0, std 1."""
    c, h, w = shape
    head = nn.Linear(c * h * w, classes)
    with torch.no_grad():
        head.weight.copy_(torch.randn(head.weight.shape, generator=generator(seed)) * scale)
        head.bias.copy_(torch.randn(classes, generator=generator(seed + 1)) * scale)
    return Classifier(nn.Sequential(nn.Flatten(), head), mean=[0.0] * c, std=[1.0] * c)


def weights_of(classifier: Classifier) -> Tensor:
    """The matrix of `linear`, (K, C, H, W)."""
    head = classifier.net[1]
    return head.weight.detach().reshape(len(head.weight), C, H, W)


class Quadratic(nn.Module):
    """Logit k is the sum of a_k x**2: its gradient 2 a_k x is linear along a path, so that IG is a x**2 exactly."""

    def __init__(self, factors: Tensor) -> None:
        super().__init__()
        self.factors = nn.Parameter(factors)

    def forward(self, x: Tensor) -> Tensor:
        return (x[:, None] ** 2 * self.factors).flatten(2).sum(2)


class SmallNet(nn.Module):
    """A convolution, BatchNorm and ReLU, twice, and a linear head.

    The width is a multiple of 4: with 5 features a row's logits depend in their last bit on its slot in the block.
    """

    def __init__(self, channels: int = C, classes: int = K, width: int = 8) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu1 = (
            nn.Conv2d(channels, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        )
        self.conv2, self.bn2, self.relu2 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()
        self.fc = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu1(self.bn1(self.conv1(x)))
        x = self.relu2(self.bn2(self.conv2(x)))
        return self.fc(x.mean((2, 3)))


def randomise(net: nn.Module, seed: int = 3) -> nn.Module:
    """Weights and running statistics that are far from the defaults, as a function of `seed`."""
    source = generator(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            fan = parameter[0].numel() if parameter.dim() > 1 else 4
            parameter.copy_(torch.randn(parameter.shape, generator=source) * (2 / fan) ** 0.5)
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.copy_(0.5 + torch.rand(module.weight.shape, generator=source))
                module.running_mean.copy_(torch.randn(module.running_mean.shape, generator=source) * 0.3)
                module.running_var.copy_(0.5 + torch.rand(module.running_var.shape, generator=source))
    return net


def convnet(classes: int = K, *, seed: int = 3) -> Classifier:
    """A small network with BatchNorm, in eval mode, with a normalisation per channel; no class is far ahead."""
    model = Classifier(randomise(SmallNet(classes=classes), seed), mean=[0.4, 0.5, 0.6], std=[0.2, 0.25, 0.3]).eval()
    with torch.no_grad():
        model.net.fc.bias -= model(images(200, seed=99)).mean(0)
    return model


def resnet(width: int = 4, *, classes: int = 8, seed: int = 3) -> Classifier:
    """The shipped resnet8, narrow, in eval mode."""
    net = randomise(resnet8(num_classes=classes, width=width), seed)
    return Classifier(net, mean=[0.5] * 3, std=[0.25] * 3).eval()


def evaluation(classifier: Classifier, block: int = 32, layer: str | None = None) -> Evaluation:
    """Its evaluation form."""
    return Evaluation(classifier, block=block, layer=layer)
