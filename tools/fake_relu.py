"""FakeReLU: the gradient passes the last ReLU of a network as if it were not there (Engstrom et al. 2019, arXiv 1906.00945)."""

from __future__ import annotations

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
    """Lets the gradient through at the last of `calls` uses per forward pass; forward values are those of ReLU."""

    def __init__(self, calls: int) -> None:
        super().__init__()
        self.calls, self.used = calls, 0

    def forward(self, x: Tensor) -> Tensor:
        self.used = self.used % self.calls + 1
        return _StraightThrough.apply(x) if self.used == self.calls else x.clamp_min(0)


def fake_last_relu(evaluation: Evaluation, images: Tensor) -> Evaluation:
    """A copy whose last ReLU lets gradients through; `images` (one block) show which ReLU runs last.

    Shapes: images (B, C, H, W). Raises: ValueError for a network without ReLU modules.
    """
    changed = copied(evaluation)
    order: list[str] = []
    relus = [(name, m) for name, m in changed.model.net.named_modules() if isinstance(m, nn.ReLU)]
    handles = [m.register_forward_hook(lambda *_, name=name: order.append(name)) for name, m in relus]
    with torch.no_grad():
        changed(images)
    for handle in handles:
        handle.remove()
    if not order:
        raise ValueError("the network has no ReLU modules; try without --fake-relu")
    replace_module(changed.model.net, order[-1], FakeReLU(order.count(order[-1])))
    return changed
