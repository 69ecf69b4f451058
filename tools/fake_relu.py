"""FakeReLU: the gradient passes the last ReLU before a representation as if it were not there (Engstrom et al. 2019,
arXiv 1906.00945)."""

from __future__ import annotations

from contextlib import ExitStack

import torch
from torch import Tensor, nn

from rbkit.tools.models import Evaluation, copied, replace_module


class _StraightThrough(torch.autograd.Function):
    """ReLU forward, identity backward."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clamp_min(0)

    @staticmethod
    def backward(ctx: object, *gradients: Tensor) -> Tensor:
        return gradients[0]


class FakeReLU(nn.Module):
    """Lets the gradient through at one of its `calls` uses per forward pass, the one numbered `at` (from 1); forward values
    are those of ReLU."""

    def __init__(self, *, calls: int, at: int) -> None:
        super().__init__()
        self.calls, self.at, self.used = calls, at, 0

    def forward(self, x: Tensor) -> Tensor:
        self.used = self.used % self.calls + 1
        return _StraightThrough.apply(x) if self.used == self.at else x.clamp_min(0)


def fake_last_relu(evaluation: Evaluation, images: Tensor, *, layer: str | None = None) -> Evaluation:
    """A copy in which the last ReLU before `layer` is done (None: of the network) lets gradients through.

    `images` (B, C, H, W), one block, show which it is. Raises: ValueError where no ReLU module runs before it.
    """
    changed = copied(evaluation)
    order, before = _relus(changed, images, layer)
    if not order[:before]:
        where = "the network has no ReLU modules" if not order else f"no ReLU runs before layer {layer} is done"
        raise ValueError(f"{where}; try without --fake-relu")
    name = order[before - 1]
    fake = FakeReLU(calls=order.count(name), at=order[:before].count(name))
    replace_module(changed.model.net, name, fake)
    return changed


def _relus(evaluation: Evaluation, images: Tensor, layer: str | None) -> tuple[list[str], int]:
    """Names of ReLU modules in the order of a forward pass, and how many of them run before `layer` has its last output."""
    order: list[str] = []
    done: list[int] = []
    with ExitStack() as hooks, torch.no_grad():
        for name, module in evaluation.model.net.named_modules():
            if isinstance(module, nn.ReLU):
                hooks.enter_context(module.register_forward_hook(lambda *_, name=name: order.append(name)))
        if layer is not None:
            hooks.enter_context(evaluation.layer(layer).register_forward_hook(lambda *_: done.append(len(order))))
        evaluation(images)
    return order, done[-1] if done else len(order)
