"""Norms: steps, projections and starts of L2 and Linf (traps A1, A7, A8)."""

from __future__ import annotations

import math

import numpy as np
import pytest
import reference
import torch
from scipy import stats
from toys import C, H, N, W, generator

from rbkit.tools.norms import L2, LINF, NORMS, l2_project_, l2_size

BOTH = pytest.mark.parametrize("name", ["l2", "linf"])


def deltas(scale: float = 1.0) -> torch.Tensor:
    return torch.randn(N, C, H, W, generator=generator(0)) * scale


@BOTH
@pytest.mark.parametrize("scale", [1.0, 1e-12, 1e-30, 1e-36, 1e20])
def test_step_has_norm_one_in_the_direction_of_the_gradient(name, scale):
    gradient = deltas(scale)
    step = NORMS[name].step(gradient)
    assert NORMS[name].size(step) == pytest.approx(torch.ones(N), abs=1e-6)
    for found, g in zip(step.numpy(), gradient.double().numpy() / scale, strict=True):
        assert found == pytest.approx(reference.sign_or_unit(g, name), abs=1e-5)


@BOTH
def test_step_of_a_zero_gradient_is_zero_and_leaves_the_other_rows_alone(name):
    gradient = deltas()
    gradient[2] = 0
    step = NORMS[name].step(gradient)
    assert (step[2] == 0).all() and step.isfinite().all()
    others = [i for i in range(N) if i != 2]
    assert torch.equal(step[others], NORMS[name].step(gradient[others]))


@BOTH
def test_projection_is_the_nearest_point_of_the_ball(name):
    outside = deltas()
    outside[3] *= 1e-3  # one row lies inside
    found = NORMS[name].project_(outside.clone(), 0.7)
    for row, x in zip(found.numpy(), outside.double().numpy(), strict=True):
        assert row == pytest.approx(reference.onto_ball(x, 0.7, name), abs=1e-6)
    assert torch.equal(found[3], outside[3])
    assert (NORMS[name].size(found.double()) <= 0.7 * (1 + 1e-7)).all()
    assert torch.equal(NORMS[name].project_(torch.zeros_like(outside), 0.0), torch.zeros_like(outside))
    assert (NORMS[name].project_(outside.clone(), 0.0) == 0).all()


def test_size_is_per_example():
    delta = deltas().double()
    assert L2.size(delta).tolist() == pytest.approx([math.sqrt(float((d**2).sum())) for d in delta.numpy()])
    assert LINF.size(delta).tolist() == pytest.approx([float(np.abs(d).max()) for d in delta.numpy()])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_large_delta_of_equal_values_is_measured_and_projected_exactly(layout):
    delta = torch.zeros(2, 3, 224, 224)
    delta[0, :, :112, :112], delta[0, :, 112:] = 0.05, 0.001
    delta[1] = 0.013
    delta = delta.contiguous(memory_format=layout)
    exact = delta.double().flatten(1).norm(dim=1)
    torch.testing.assert_close(l2_size(delta).double(), exact, rtol=1e-7, atol=0)
    assert (l2_project_(delta, 1.5).double().flatten(1).norm(dim=1) <= 1.5 * (1 + 1e-7)).all()


def test_linf_start_is_uniform_per_coordinate():
    eps = 0.3
    found = LINF.start(torch.arange(400), (3, 4, 5), eps, seed=1).double()
    assert float(found.abs().max()) <= eps
    assert float(found.mean()) == pytest.approx(0, abs=4 * eps / math.sqrt(3 * found.numel()))
    assert float(found.var()) == pytest.approx(eps**2 / 3, rel=0.02)
    assert stats.kstest(found.flatten().numpy(), "uniform", (-eps, 2 * eps)).pvalue > 1e-3


def test_l2_start_is_uniform_in_the_ball():
    """Radius**d is uniform and directions have no preferred axis; a uniform radius (A7) fails both of these."""
    eps, shape = 0.5, (3, 2, 4)
    found = L2.start(torch.arange(3000), shape, eps, seed=1).double()
    radius = L2.size(found) / eps
    assert float(radius.max()) <= 1 + 1e-6
    assert stats.kstest((radius ** math.prod(shape)).numpy(), "uniform").pvalue > 1e-3
    direction = (found / L2.size(found)[:, None, None, None]).flatten(1)
    assert direction.mean(0).abs().max() < 5 / math.sqrt(24 * 3000)
    assert (direction.square().mean(0) * 24 - 1).abs().max() < 0.15


@BOTH
def test_starts_are_keyed_by_id_and_draw(name):
    ids = torch.tensor([4, 9, 2])
    first = NORMS[name].start(ids, (C, H, W), 0.1, seed=0, draw=torch.tensor([0, 1, 0]))
    again = NORMS[name].start(ids.flip(0), (C, H, W), 0.1, seed=0, draw=0).flip(0)
    assert torch.equal(first[[0, 2]], again[[0, 2]]) and not torch.equal(first[1], again[1])


def test_no_rows_are_no_rows():
    """An attack on an empty stream projects and steps as any other."""
    empty = torch.zeros(0, C, H, W)
    for norm in NORMS.values():
        assert norm.step(empty).shape == norm.project_(empty, 0.5).shape == empty.shape
