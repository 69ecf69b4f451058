"""Eight-bit images inside the ball, and the check that finds images outside it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rbkit.tools.norms import NORMS
from rbkit.tools.quantise import leaves_ball, round_inside

torch.set_num_threads(1)
SHAPE = (5, 3, 4, 6)


def pair(norm: str, eps: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Clean images on the lattice, some entries at 0 and 1, and adversarial ones on the sphere or inside, in the box."""
    source = torch.Generator().manual_seed(seed)
    clean = torch.randint(-40, 296, SHAPE, generator=source).clamp(0, 255) / 255
    delta = torch.randn(SHAPE, generator=source)
    delta = NORMS[norm].project_(delta * 10 * eps * torch.rand(5, 1, 1, 1, generator=source), eps)
    return clean, (clean + delta).clamp(0, 1)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(norm=st.sampled_from(["l2", "linf"]), levels=st.floats(0, 40), seed=st.integers(0, 2**31))
def test_rounded_images_stay_in_the_ball_and_on_the_lattice(norm, levels, seed):
    eps = levels / 255
    clean, adversarial = pair(norm, eps, seed)
    found = round_inside(adversarial, clean, norm=norm, eps=eps)
    assert found.dtype == torch.float32
    steps = found.double() * 255
    assert (steps - steps.round()).abs().max() < 1e-4
    size = NORMS[norm].size(found.double() - clean.double())
    assert (size <= eps * (1 + 1e-6) + 1e-6).all()
    assert (found >= 0).all() and (found <= 1).all()
    assert ((found.double() - adversarial.double()).abs() * 255 < 1 + 1e-4).all()
    assert not leaves_ball(found, clean, norm=norm, eps=eps).any()


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_rounding_is_to_nearest_where_the_ball_allows_it(norm):
    clean, adversarial = pair(norm, 20 / 255, 3)
    found = round_inside(adversarial, clean, norm=norm, eps=2.0)
    assert torch.equal((found * 255).round(), (adversarial.double() * 255).round().float())


def test_only_entries_that_leave_the_linf_ball_move_inward():
    clean = torch.full((1, 1, 1, 4), 100 / 255)
    adversarial = torch.tensor([102.5, 101.6, 97.4, 98.3]).reshape(1, 1, 1, 4) / 255
    found = round_inside(adversarial, clean, norm="linf", eps=2.6 / 255) * 255
    assert found.flatten().round().tolist() == [102, 102, 98, 98]  # 97 would be 3 away


def test_the_l2_ball_is_reached_by_the_moves_that_gain_most():
    clean = torch.zeros(1, 1, 1, 3)
    adversarial = torch.tensor([9.6, 3.6, 0.4]).reshape(1, 1, 1, 3) / 255
    eps = float((adversarial * 255).norm()) / 255
    found = round_inside(adversarial, clean, norm="l2", eps=eps) * 255
    assert found.flatten().round().tolist() == [9, 4, 0]  # 10 and 4 are too far; moving the 10 is enough


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_every_level_survives_the_round_trip(norm):
    levels = (torch.arange(256) / 255).to(torch.float32).reshape(1, 1, 16, 16)
    assert torch.equal(round_inside(levels, levels, norm=norm, eps=0.0), levels)
    shifted = levels.flip(3).contiguous()
    found = round_inside(shifted, levels, norm=norm, eps=20.0)
    assert torch.equal(found, shifted)
    assert (levels * 255).round().flatten().tolist() == list(range(256))


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_leaves_ball_finds_each_way_out_and_nothing_else(norm):
    eps = 0.1
    clean = torch.full(SHAPE, 0.5)
    delta = NORMS[norm].project_(torch.ones(SHAPE), eps)
    assert not leaves_ball(clean + delta, clean, norm=norm, eps=eps).any()
    assert leaves_ball(clean + delta * 1.001, clean, norm=norm, eps=eps).all()
    bad = clean.clone()
    bad[1, 2, 3, 5] = torch.nan
    bad[2, 0, 1, 4] = torch.inf
    assert leaves_ball(bad, clean, norm=norm, eps=eps).tolist() == [False, True, True, False, False]
    edge = torch.zeros(SHAPE)
    below, above = edge.clone(), edge.clone() + 1
    below[3, 1, 0, 2], above[4, 0, 0, 0] = -1e-6, 1 + 1e-6
    assert leaves_ball(below, edge, norm=norm, eps=eps).tolist() == [False, False, False, True, False]
    assert leaves_ball(above, edge + 1, norm=norm, eps=eps).tolist() == [False, False, False, False, True]
