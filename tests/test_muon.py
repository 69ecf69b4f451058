"""Muon: directions against an exact decomposition, steps against torch's own, and which weights it takes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_tools_train import fresh, recipe
from torch import nn
from toys import generator

from rbkit.tools.architectures import build
from rbkit.tools.muon import LENGTH, Muon, hidden, orthogonal
from rbkit.tools.train import begin


@pytest.mark.parametrize(("rows", "columns"), [(5, 19), (19, 5), (7, 7), (1, 9)])
def test_singular_values_come_near_one_and_directions_stay(rows: int, columns: int) -> None:
    matrix = torch.randn(rows, columns, generator=generator(0))
    u, _, vt = torch.linalg.svd(matrix.double(), full_matrices=False)
    scale = max(1, rows / columns) ** 0.5
    inner = u.T @ (orthogonal(matrix).double() / scale) @ vt.T
    values = inner.diagonal()
    assert values.min() > 0.6 and values.max() < 1.3
    assert (inner - values.diag()).abs().max() < 1e-3


@pytest.mark.parametrize("size", [1e-12, 1e-3, 1e6])
def test_the_size_of_a_gradient_does_not_matter(size: float) -> None:
    matrix = torch.randn(4, 9, generator=generator(1))
    assert torch.allclose(orthogonal(size * matrix), orthogonal(matrix), atol=1e-5)


def test_a_gradient_of_zeros_moves_nothing() -> None:
    assert not orthogonal(torch.zeros(3, 4)).any()


def linear() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 5), nn.Linear(5, 3))


def descended(net: nn.Sequential, *optimisers: torch.optim.Optimizer, steps: int = 4) -> nn.Sequential:
    """The network after steps along gradients that are the same for every network."""
    draws = generator(2)
    for _ in range(steps):
        for parameter in net.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=draws)
        for optimiser in optimisers:
            optimiser.step()
    return net


@pytest.mark.parametrize("nesterov", [True, False])
def test_steps_are_those_of_torch(nesterov: bool) -> None:
    """The weights between first and last by torch's Muon, whose products are of bfloat16; biases and the others by its SGD."""
    lr, decay, momentum = 0.05, 0.1, 0.8
    ours = linear()
    options = {"lr": lr, "momentum": momentum, "nesterov": nesterov, "weight_decay": decay}
    descended(ours, Muon(ours, **options))
    theirs = linear()
    inner = [theirs[1].weight]
    others = [p for p in theirs.parameters() if p is not inner[0]]
    muon = torch.optim.Muon(
        inner,
        lr=LENGTH * lr,
        weight_decay=decay / LENGTH,
        momentum=momentum,
        nesterov=nesterov,
        adjust_lr_fn="original",
    )
    descended(theirs, muon, torch.optim.SGD(others, **options))
    for (name, mine), other, start in zip(
        ours.named_parameters(), theirs.parameters(), linear().parameters(), strict=True
    ):
        moved = (other - start).norm()
        assert moved > 0 and (mine - other).norm() < (0.02 if name == "1.weight" else 1e-6) * moved, name


def test_it_takes_what_lies_between_first_and_last_layer() -> None:
    net = build("resnet8", num_classes=10, channels=1)
    names = {id(p): n for n, p in net.named_parameters()}
    taken = [names[id(p)] for p in hidden(net)]
    assert taken == [f"layer{k}.0.{name}.weight" for k in (1, 2, 3) for name in ("conv1", "conv2", "downsample.0")]
    grouped = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 4, 1), nn.Linear(4, 2))
    assert [p is grouped[2].weight for p in hidden(grouped)] == [True]


def test_a_network_without_inner_weights_is_trained_by_sgd() -> None:
    nets = []
    for kind in (Muon, torch.optim.SGD):
        torch.manual_seed(1)
        net = nn.Sequential(nn.Linear(6, 3))
        options = {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-3}
        nets.append(descended(net, kind(net if kind is Muon else net.parameters(), **options)))
    assert all(torch.equal(a, b) for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True))


def test_the_recipe_chooses_it() -> None:
    plan = recipe(method="standard", eps=0.0, optimizer="muon")
    assert isinstance(begin(fresh(), plan).optimiser, Muon)
    assert not isinstance(begin(fresh(), replace(plan, optimizer="sgd")).optimiser, Muon)
