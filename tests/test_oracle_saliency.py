"""Attributions against captum and shap: other people's code on the same network."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import toys

from rbkit.tools.attribution import Saliency
from rbkit.tools.saliency import explain

pytestmark = pytest.mark.filterwarnings("ignore")  # of the peers, not of ours

torch.set_num_threads(1)
X = toys.images()
BACKGROUND = toys.images(11, seed=5)
IDS = torch.tensor([3, 2**40, 0, 17, 9, 1, 250])
TARGET = torch.tensor([0, 3, 1, 2, 2, 0, 1])
NET = toys.convnet()


def ours(spec, background=None):
    return explain(toys.evaluation(NET), X, TARGET, spec, ids=IDS, background=background)


@pytest.mark.parametrize("level", [0.0, 1.0])
def test_integrated_gradients_are_captums(level):
    from captum.attr import IntegratedGradients

    points = 11  # captum weighs n points by 1/n and the ends by half of it: (n - 1)/n in all
    theirs = IntegratedGradients(NET).attribute(
        X, torch.full_like(X, level), target=TARGET, n_steps=points, method="riemann_trapezoid"
    )
    found = ours(Saliency("ig", steps=points - 1, baseline="white" if level else "black")).attribution
    torch.testing.assert_close(found, (theirs * points / (points - 1)).float(), rtol=0, atol=1e-5)


def test_gradient_and_input_x_gradient_are_captums():
    from captum.attr import InputXGradient
    from captum.attr import Saliency as Gradient

    theirs = Gradient(NET).attribute(X, target=TARGET, abs=False)
    torch.testing.assert_close(ours(Saliency("gradient")).attribution, theirs, rtol=0, atol=1e-5)
    theirs = InputXGradient(NET).attribute(X, target=TARGET).detach()
    torch.testing.assert_close(ours(Saliency("input-x-gradient")).attribution, theirs, rtol=0, atol=1e-5)


def test_smoothgrad_lies_within_sampling_error_of_captums():
    from captum.attr import NoiseTunnel
    from captum.attr import Saliency as Gradient

    torch.manual_seed(0)
    samples = 400
    theirs = NoiseTunnel(Gradient(NET)).attribute(
        X, target=TARGET, abs=False, nt_type="smoothgrad", nt_samples=samples, stdevs=0.1
    )
    found = ours(Saliency("smoothgrad", samples=samples, sigma=0.1)).attribution
    between = (found - theirs).flatten(1).norm(dim=1) / theirs.flatten(1).norm(dim=1)
    again = ours(Saliency("smoothgrad", samples=samples, sigma=0.1, seed=1)).attribution
    within = (found - again).flatten(1).norm(dim=1) / theirs.flatten(1).norm(dim=1)
    assert between.mean() < 1.5 * within.mean()
    assert within.mean() < 0.2


def test_expected_gradients_lie_within_sampling_error_of_shaps():
    import shap

    samples = 1500
    explainer = shap.GradientExplainer(NET, BACKGROUND)
    theirs = np.asarray(explainer.shap_values(X, nsamples=samples, rseed=0))
    theirs = torch.tensor(np.stack([theirs[i, ..., t] for i, t in enumerate(TARGET.tolist())]))
    found = ours(Saliency("shap", samples=samples), BACKGROUND)
    gap = (found.attribution - theirs).double().sum((1, 2, 3)).abs()
    assert (gap < 4 * 2**0.5 * found.standard_error).all()
    size = theirs.flatten(1).norm(dim=1)
    assert ((found.attribution - theirs).flatten(1).norm(dim=1) < 0.15 * size).all()
