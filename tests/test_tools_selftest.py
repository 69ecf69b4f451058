"""The oracles hold, and each finds its own tool broken."""

from __future__ import annotations

import pytest

from rbkit.tools import alignment, attack, faithfulness, integrated_gradients, localisation, saliency, selftest


def failing() -> set[str]:
    return {name for name, error in selftest.errors().items() if not selftest.holds(error)}


def test_all_hold() -> None:
    assert failing() == set()


def test_nan_does_not_hold() -> None:
    assert not selftest.holds(float("nan"))


@pytest.mark.parametrize(
    ("module", "name", "oracle"),
    [
        (localisation, "relevance_mass", "relevance-mass-planted"),
        (localisation, "relevance_rank", "relevance-rank-planted"),
        (localisation, "pointing_game", "pointing-planted"),
        (alignment, "etmann_alignment", "etmann-linear"),
        (faithfulness, "insertion_mean", "insertion-single"),
        (faithfulness, "deletion_mean", "deletion-single"),
    ],
)
def test_a_scaled_metric_fails_its_oracle(monkeypatch, module, name, oracle) -> None:
    true = getattr(module, name)
    monkeypatch.setattr(module, name, lambda rows: true(rows) * 1.001)
    assert failing() == {oracle}


@pytest.mark.parametrize(
    ("module", "name", "oracle"),
    [(integrated_gradients, "integrated_gradients", "ig-quadratic"), (saliency, "expected_gradients", "shap-linear")],
)
def test_a_scaled_attribution_fails_its_oracle(monkeypatch, module, name, oracle) -> None:
    true = getattr(module, name)

    def scaled(*args, **options):
        made = true(*args, **options)
        made.attribution = made.attribution * 1.001
        return made

    monkeypatch.setattr(module, name, scaled)
    assert failing() == {oracle}


def test_a_short_attack_fails_both_norms(monkeypatch) -> None:
    true = attack.pgd
    monkeypatch.setattr(attack, "pgd", lambda *, eps, **options: true(eps=0.99 * eps, **options))
    assert failing() == {"pgd-linf-linear", "pgd-l2-linear", "least-linf-linear", "least-l2-linear"}
