"""Muon: steps along the momentum of each weight matrix inside a network, made orthogonal first.

Source: Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks"; its coefficients and its rule of which
weights it takes. Every direction of a matrix moves by the same length, also those in which gradients are small.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

LENGTH = 0.4  # of a step in each direction at a rate of 1, so that SGD's rates suit both kinds of weights
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the polynomial that brings singular values near 1
ITERATIONS = 5


class Muon(torch.optim.SGD):
    """Muon for the weights of `hidden`, SGD with momentum for all others.

    The decay of hidden weights is not a part of their gradient: it shrinks them by rate times decay, as the paper has it.
    """

    def __init__(self, net: nn.Module, *, lr: float, momentum: float, nesterov: bool, weight_decay: float) -> None:
        self.hidden, self.momentum, self.nesterov = hidden(net), momentum, nesterov
        taken = {id(weight) for weight in self.hidden}
        others = [p for p in net.parameters() if id(p) not in taken]
        bare: dict[str, Any] = {"params": self.hidden, "momentum": 0.0, "nesterov": False}
        groups = [bare, {"params": others}]
        super().__init__(groups, lr=lr, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step along the gradients at hand; those of hidden weights are replaced by the directions they moved in."""
        for weight in self.hidden:
            if weight.grad is not None:
                weight.grad = LENGTH * self._direction(weight, weight.grad)
        super().step(closure)

    def _direction(self, weight: Tensor, gradient: Tensor) -> Tensor:
        state = self.state[weight]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        momentum = state["momentum_buffer"].mul_(self.momentum).add_(gradient)
        if self.nesterov:
            momentum = gradient + self.momentum * momentum
        return orthogonal(momentum.flatten(1)).view_as(weight)


def hidden(net: nn.Module) -> list[Tensor]:
    """The weights of convolutions and linear layers between the first and the last of them, those in groups left out."""
    layers = [m for m in net.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    return [m.weight for m in layers[1:-1] if getattr(m, "groups", 1) == 1]


def orthogonal(matrix: Tensor) -> Tensor:
    """The matrix with its singular values, but for the tiniest, brought to 0.7 to 1.2, times sqrt(rows / columns) above 1.

    Shapes: (R, C) to the same. A matrix of zeros stays one.
    """
    rows, columns = matrix.shape
    a, b, c = COEFFICIENTS
    x = matrix.T if rows > columns else matrix
    x = x / (x.norm() + 1e-30)
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if rows <= columns else x.T * (rows / columns) ** 0.5
