"""Guided backpropagation (Springenberg et al. 2015): the negative control of the sanity checks, and no explanation.

It paints the edges of the image whatever the model has learnt (Nie et al. 2018; Adebayo et al. 2018).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from rbkit.tools.attribution import Explained, Saliency, accumulated
from rbkit.tools.models import Evaluation

RELUS = (F.relu, torch.relu, Tensor.relu)
IN_PLACE = (torch.relu_, Tensor.relu_)  # F.relu_ is the first of them


class _Guide(torch.autograd.Function):
    """ReLU forward; backward, what is positive in both the input and the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x > 0)
        return x.clamp_min(0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0].clamp_min(0) * ctx.saved_tensors[0]


class _Guided(TorchFunctionMode):
    """Guides the gradient at every ReLU, be it a module, a function or a method, also in place; counts them."""

    def __init__(self) -> None:
        super().__init__()
        self.relus = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in RELUS and func not in IN_PLACE:
            return func(*args, **kwargs)
        self.relus += 1
        x = args[0] if args else kwargs["input"]
        guided = _Guide.apply(x)
        in_place = func in IN_PLACE or kwargs.get("inplace", False)  # F.relu hands it on by name
        return x.copy_(guided) if in_place else guided


def guided_backprop(
    evaluation: Evaluation, images: Tensor, target: Tensor, spec: Saliency, **unused: Tensor | None
) -> Explained:
    """The gradient with negative parts dropped at every ReLU on the way back (Springenberg et al. 2015).

    A negative control: a sanity check that it passes is wrong. Activations other than ReLU keep their gradient. Raises: ValueError for a network without ReLU.
    """
    one = torch.ones((), device=images.device)
    with _Guided() as guide:
        total, _ = accumulated(
            evaluation, images, target, spec, points=1, point=lambda rows, numbers: (images[rows], one)
        )
    if len(images) and not guide.relus:
        raise ValueError("the network has no ReLU, of whose gradient it is the rule; try --method gradient")
    return Explained(total, target)
