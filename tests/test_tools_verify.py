"""Each recheck finds its own fault and no other."""

from __future__ import annotations

import pytest
import torch
import toys
from torch import Tensor

from rbkit.tools import verify

EPS = 8 / 255


def pair() -> tuple[Tensor, Tensor]:
    clean = toys.images(low=0.2, high=0.8)
    return clean, clean + EPS / 2


def found(adversarial: Tensor, clean: Tensor) -> dict[str, list[int]]:
    rows = {
        "finite": verify.not_finite(adversarial),
        "box": verify.box_excess(adversarial) > 0,
        "ball": verify.off_ball(adversarial, clean, norm="linf", eps=EPS)[0],
    }
    return {name: failed.nonzero()[:, 0].tolist() for name, failed in rows.items() if failed.any()}


def test_a_good_batch_has_no_finding() -> None:
    clean, adversarial = pair()
    assert found(adversarial, clean) == {}


@pytest.mark.parametrize(("value", "name"), [(float("nan"), "finite"), (float("inf"), "finite"), (1.0, "ball")])
def test_one_wrong_pixel_is_one_finding(value: float, name: str) -> None:
    clean, adversarial = pair()
    adversarial[4, 2, 1, 3] = value
    assert found(adversarial, clean) == {name: [4]}


def test_a_pixel_outside_the_box_within_the_ball_is_a_box_finding() -> None:
    clean, adversarial = pair()
    clean[2, 1, 0, 5], adversarial[2, 1, 0, 5] = 0.99, 1.01
    assert found(adversarial, clean) == {"box": [2]}
    assert verify.box_excess(adversarial)[2].item() == pytest.approx(0.01, abs=1e-6)


def test_the_excess_is_the_norm_less_eps() -> None:
    clean, adversarial = pair()
    adversarial[4] = clean[4]
    adversarial[4, 2, 1, 3] = clean[4, 2, 1, 3] + 0.1
    for norm in ("linf", "l2"):
        assert verify.off_ball(adversarial, clean, norm=norm, eps=EPS)[1][4].item() == pytest.approx(
            0.1 - EPS, abs=1e-6
        )


def test_labels_and_success() -> None:
    logits = torch.tensor([[2.0, 0.0, 1.0], [0.0, 3.0, 1.0], [0.0, 3.0, 1.0], [0.0, 3.0, 1.0]])
    labels = torch.tensor([0, 0, 3, -1])
    assert verify.out_of_range(labels, 3).tolist() == [False, False, True, True]
    assert verify.success_differs(torch.tensor([0, 1, 0, 0]), logits, labels).tolist() == [False] * 4
    assert verify.success_differs(torch.tensor([1, 0, 1, 1]), logits, labels).tolist() == [True, True, False, False]
