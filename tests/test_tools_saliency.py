"""Attributions: exact for linear and quadratic models, complete, honest about their error, independent of order."""

from __future__ import annotations

import numpy as np
import pytest
import reference
import torch
from torch import nn
from toys import C, H, K, N, Quadratic, W, convnet, evaluation, generator, images, linear, weights_of

from rbkit.tools import attribution, random
from rbkit.tools.attribution import OUTPUTS, Saliency
from rbkit.tools.masking import blurred
from rbkit.tools.models import Classifier
from rbkit.tools.saliency import METHODS, explain

IDS = torch.arange(N) * 5 + 2
TARGET = torch.arange(N) % K
PIXELWISE = ("gradient", "input-x-gradient", "ig", "smoothgrad", "shap")  # the others give blocks of pixels one value


def explained(model, x=None, *, target=TARGET, ids=IDS, background=None, block=32, **spec):
    x = images() if x is None else x
    return explain(evaluation(model, block), x, target, Saliency(**spec), ids=ids, background=background)


def quadratic():
    factors = torch.randn(K, C, H, W, generator=generator(4))
    return Classifier(Quadratic(factors), mean=[0.0] * C, std=[1.0] * C), factors


# ----------------------------------------------------------------------------------- models of known answer


def test_gradient_of_a_linear_model_is_its_weight():
    model = linear()
    assert torch.allclose(explained(model, method="gradient").attribution, weights_of(model)[TARGET], atol=1e-6)


def test_input_x_gradient_of_a_linear_model():
    """Complete only if the bias cancels: the path starts at black."""
    model, x = linear(), images()
    found = explained(model, x, method="input-x-gradient")
    assert torch.allclose(found.attribution, x * weights_of(model)[TARGET], atol=1e-6)
    assert (found.completeness_error < 1e-5).all()


BASES = {
    "black": lambda x: torch.zeros_like(x),
    "white": lambda x: torch.ones_like(x),
    "mean": lambda x: torch.tensor([0.1, 0.6, 0.9]).reshape(1, 3, 1, 1).expand_as(x),
    "blur": blurred,
    "uniform": lambda x: random.uniform(IDS, (C, H, W), seed=0, purpose="baseline"),
}


@pytest.mark.parametrize("baseline", BASES)
def test_ig_of_a_linear_model_is_weight_times_step(baseline):
    """S2, for each baseline, and S3: the normalisation drops out."""
    mean, std = [0.1, 0.6, 0.9], [0.2, 0.3, 0.5]
    net, x = linear().net, images()
    model = Classifier(net, mean=mean, std=std)
    weight = weights_of(model)[TARGET] / torch.tensor(std).reshape(3, 1, 1)
    found = explained(model, x, method="ig", steps=3, baseline=baseline)
    assert torch.allclose(found.attribution, weight * (x - BASES[baseline](x)), atol=2e-6)
    assert (found.completeness_error < 1e-4).all()


def test_ig_averages_over_baselines():
    model, x = linear(), images()
    base = torch.stack([random.uniform(IDS, (C, H, W), seed=0, purpose="baseline", draw=d) for d in range(3)]).mean(0)
    found = explained(model, x, method="ig", steps=2, baseline="uniform", baselines=3)
    assert torch.allclose(found.attribution, weights_of(model)[TARGET] * (x - base), atol=2e-6)


def test_data_baseline_is_a_background_image_by_id():
    model, x, background = linear(), images(), images(9, seed=6)
    found = explained(model, x, method="ig", steps=2, baseline="data", background=background)
    base = x - found.attribution / weights_of(model)[TARGET]
    near = (base[:, None] - background).abs().amax((2, 3, 4))
    assert (near.amin(1) < 1e-3).all() and near.argmin(1).unique().numel() > 1
    with pytest.raises(ValueError, match="needs background images"):
        explained(model, x, method="ig", baseline="data")


def test_ig_of_a_quadratic_model_is_exact_at_any_steps():
    model, factors = quadratic()
    x = images()
    for steps in (1, 4):
        found = explained(model, x, method="ig", steps=steps)
        assert torch.allclose(found.attribution, factors[TARGET] * x**2, atol=1e-5)


def test_a_pixel_that_the_model_ignores_gets_nothing():
    model = linear()
    with torch.no_grad():
        model.net[1].weight[:, 17] = 0
    background = images(9, seed=6)
    for method in PIXELWISE:
        found = explained(model, method=method, steps=3, samples=5, background=background)
        flat = found.attribution.flatten(1)
        assert (flat[:, 17] == 0).all() and (flat[:, 16] != 0).all()


# -------------------------------------------------------------------------------- integrated gradients


def test_ig_equals_the_slow_trapezoid():
    model, x = convnet(), images()
    double = Classifier(model.net, mean=[0.4, 0.5, 0.6], std=[0.2, 0.25, 0.3]).eval()
    found = explained(model, x, method="ig", steps=11).attribution
    double.double()
    for i in (0, 3, N - 1):

        def gradient(point, k=int(TARGET[i])):
            at = torch.tensor(point)[None].requires_grad_()
            return torch.autograd.grad(double(at)[0, k], at)[0][0].numpy()

        image = x[i].double().numpy()
        slow = reference.integrated_gradients(image, np.zeros_like(image), gradient, 11)
        assert found[i].numpy() == pytest.approx(slow, abs=1e-5)


def test_completeness_error_shrinks_with_steps():
    """S1: a smooth network, where the trapezoid rule is of second order."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(C * H * W, 16), nn.Softplus(), nn.Linear(16, K))
    source = generator(1)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=source) * 0.5)
    model = Classifier(net, mean=[0.0] * C, std=[1.0] * C)
    errors = [float(explained(model, method="ig", steps=s).completeness_error.mean()) for s in (4, 8, 16)]
    assert errors[0] / errors[1] > 3 and errors[1] / errors[2] > 3


def test_completeness_error_is_what_it_says():
    model, x = convnet(), images()
    found = explained(model, x, method="ig", steps=5)
    rows = torch.arange(N)
    change = (model(x) - model(torch.zeros_like(x)))[rows, TARGET].detach().double()
    assert found.output_change.numpy() == pytest.approx(change.numpy(), abs=1e-5)
    gap = (found.attribution.flatten(1).double().sum(1) - found.output_change).abs()
    assert torch.equal(found.completeness_error, gap) and (gap > 1e-4).any()


def test_refinement_meets_its_tolerance_and_equals_the_plain_rule():
    model, x = convnet(), images()
    plain = explained(model, x, method="ig", steps=4)
    found = explained(model, x, method="ig", steps=4, tolerance=0.01, max_steps=4096)
    assert (found.completeness_error <= 0.01 * found.output_change.abs().clamp_min(1e-3)).all()
    assert not found.missed.any()
    steps = found.steps.tolist()
    assert len(set(steps)) > 1 and all(s & (s - 1) == 0 and 4 <= s <= 4096 for s in steps)
    for row, count in enumerate(steps):
        again = explained(
            model, x[row : row + 1], target=TARGET[row : row + 1], ids=IDS[row : row + 1], method="ig", steps=count
        )
        assert found.attribution[row].numpy() == pytest.approx(again.attribution[0].numpy(), abs=1e-6)
    # No more steps than needed: with half of them the tolerance was missed.
    more = [row for row, count in enumerate(steps) if count > 4]
    assert (plain.completeness_error > 0.01 * plain.output_change.abs())[more].all()


def test_refinement_stops_at_max_steps():
    found = explained(convnet(), method="ig", steps=3, tolerance=1e-12, max_steps=13)
    assert found.steps.tolist() == [12] * N and found.missed.all()
    assert explained(convnet(), method="ig", steps=3).missed is None


def test_what_missed_its_tolerance_is_told_by_row():
    spec = {"method": "ig", "steps": 2, "max_steps": 32, "output": "probability", "seed": 2}
    found = explained(convnet(), tolerance=0.01, **spec)
    assert 0 < int(found.missed.sum()) < N and (found.steps[found.missed] == 32).all()
    assert torch.equal(found.missed, found.completeness_error > 0.01 * found.output_change.abs().clamp_min(1e-3))
    # Of several baselines, any: what the first few missed stays missed.
    before = torch.zeros(N, dtype=torch.bool)
    for baselines in range(1, 7):
        found = explained(convnet(), tolerance=0.1, baseline="uniform", baselines=baselines, **spec)
        assert not (before & ~found.missed).any()
        before = found.missed
    assert before.any()


def test_refinement_of_a_map_depends_on_no_other_image():
    spec = {"method": "ig", "steps": 4, "tolerance": 0.01, "max_steps": 4096}
    whole = explained(convnet(), **spec)
    order = torch.tensor([3, 0, 6, 2, 5, 1, 4])
    other = explained(convnet(), images()[order], target=TARGET[order], ids=IDS[order], **spec)
    assert torch.equal(other.attribution, whole.attribution[order]) and torch.equal(other.steps, whole.steps[order])
    alone = explained(convnet(), images()[4:5], target=TARGET[4:5], ids=IDS[4:5], **spec)
    assert torch.equal(alone.attribution[0], whole.attribution[4]) and int(alone.steps[0]) == int(whole.steps[4])


# ------------------------------------------------------------------------------------- smoothgrad, shap


def test_smoothgrad_without_noise_is_the_gradient():
    model = convnet()
    found = explained(model, method="smoothgrad", samples=3, sigma=0.0).attribution
    assert torch.allclose(found, explained(model, method="gradient").attribution, atol=1e-6)


def test_smoothgrad_is_the_mean_gradient_under_keyed_noise():
    model, x = convnet(), images()
    total = torch.zeros_like(x)
    for draw in range(4):
        noise = random.normal(IDS, (C, H, W), seed=3, purpose="smoothgrad", draw=draw)
        total += explained(model, x + 0.2 * noise, method="gradient").attribution
    found = explained(model, x, method="smoothgrad", samples=4, sigma=0.2, seed=3).attribution
    assert torch.allclose(found, total / 4, atol=1e-6)


def test_expected_gradients_of_a_linear_model():
    """Each draw gives w (x - b): the mean is exact up to which backgrounds were drawn."""
    model, x, background = linear(), images(), images(9, seed=6)
    found = explained(model, x, method="shap", samples=2000, background=background)
    exact = weights_of(model)[TARGET] * (x - background.mean(0))
    spread = weights_of(model)[TARGET].abs() * background.std(0)
    assert ((found.attribution - exact).abs() <= 5 * spread / 2000**0.5).all()
    one = explained(model, x, method="shap", samples=3, background=background[:1])
    assert torch.allclose(one.attribution, weights_of(model)[TARGET] * (x - background[0]), atol=1e-5)
    assert (one.completeness_error < 1e-4).all() and (one.standard_error < 1e-3).all()


def test_standard_error_of_shap_is_honest():
    """S5: over seeds, the spread of the sum is what one run says it is, and it falls with the root of the draws."""
    model, x, background = convnet(), images(), images(9, seed=6)

    def runs(samples):
        return [explained(model, x, method="shap", samples=samples, background=background, seed=s) for s in range(40)]

    few, many = runs(10), runs(40)
    for found in (few, many):
        sums = torch.stack([f.attribution.flatten(1).double().sum(1) for f in found])
        claimed = torch.stack([f.standard_error for f in found]).square().mean(0).sqrt()
        assert 0.8 < float((sums.std(0) / claimed).mean()) < 1.2
    ratio = few[0].standard_error.mean() / many[0].standard_error.mean()
    assert 1.6 < float(ratio) < 2.5
    inside = torch.stack([f.completeness_error <= 2 * f.standard_error for f in many]).double().mean()
    assert 0.9 < float(inside) <= 1


def test_shap_needs_a_background():
    for background in (None, images()[:0]):
        with pytest.raises(ValueError, match="needs background images"):
            explained(convnet(), method="shap", background=background)


# --------------------------------------------------------------------------- order, memory, outputs, inputs


@pytest.mark.parametrize("method", METHODS)
def test_a_map_depends_on_no_other_image(method):
    """Bit for bit, for any order and neighbours: blocks hold (image, point) pairs of several images."""
    model, x, background = convnet(), images(), images(9, seed=6)
    spec = {"method": method, "steps": 6, "samples": 5, "background": background, "tolerance": None}
    whole = explained(model, x, **spec).attribution
    order = torch.tensor([3, 0, 6, 2, 5, 1, 4])
    other = explained(model, x[order], target=TARGET[order], ids=IDS[order], **spec).attribution
    assert torch.equal(other, whole[order])
    for row in (0, 4):
        alone = explained(model, x[row : row + 1], target=TARGET[row : row + 1], ids=IDS[row : row + 1], **spec)
        assert torch.equal(alone.attribution[0], whole[row])


@pytest.mark.parametrize("method", ["ig", "smoothgrad", "shap"])
def test_a_map_does_not_depend_on_how_many_blocks_are_drawn_for_at_once(method, monkeypatch):
    net, asked = convnet(), {"method": method, "samples": 11, "steps": 10, "background": images(3, seed=8)}
    whole = explained(net, **asked)
    sizes, words = [], random.words
    monkeypatch.setattr(attribution, "STRETCH", 1)
    monkeypatch.setattr(random, "words", lambda ids, *a, **k: sizes.append(len(ids)) or words(ids, *a, **k))
    parts = explained(net, **asked)
    assert torch.equal(whole.attribution, parts.attribution)
    if method == "shap":
        assert torch.equal(whole.standard_error, parts.standard_error)
        assert max(sizes) == 32  # so that memory does not grow with the samples


@pytest.mark.parametrize("method", PIXELWISE)
def test_only_whole_blocks_are_computed(method, monkeypatch):
    """Memory is flat in steps and samples: no pass is larger than the block, and few slots are wasted."""
    model, background, seen = evaluation(convnet()), images(9, seed=6), []
    model.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    spec = Saliency(method, steps=99, samples=100)
    explain(model, images(), TARGET, spec, ids=IDS, background=background)
    points = {"gradient": 1, "input-x-gradient": 1}.get(method, 100)
    assert set(seen) == {32} and len(seen) <= -(-N * points // 32) + 3


@pytest.mark.parametrize("output", OUTPUTS)
def test_outputs_are_the_objects_they_name(output):
    """S6, in float64 by central differences along the attribution itself."""
    model, x = convnet(), images()
    found = explained(model, x, method="gradient", output=output).attribution.double()
    step = 1e-3 * found / found.flatten(1).norm(dim=1)[:, None, None, None]
    double = Classifier(model.net, mean=[0.4, 0.5, 0.6], std=[0.2, 0.25, 0.3]).double().eval()
    rule = {"logit": lambda z: z, "probability": lambda z: z.softmax(1), "log-probability": lambda z: z.log_softmax(1)}

    def value(at):
        return rule[output](double(at)).detach()[torch.arange(N), TARGET]

    slope = (value(x.double() + step) - value(x.double() - step)) / 2e-3
    assert slope.numpy() == pytest.approx(found.flatten(1).norm(dim=1).numpy(), rel=2e-3)


@pytest.mark.parametrize("method", METHODS)
def test_inputs_are_left_alone(method):
    """S9."""
    x, background = images(), images(9, seed=6)
    kept = x.clone(), background.clone(), TARGET.clone()
    explained(convnet(), x, method=method, steps=2, samples=2, background=background)
    assert torch.equal(x, kept[0]) and torch.equal(background, kept[1]) and torch.equal(TARGET, kept[2])
    assert not x.requires_grad


def test_blur_keeps_constants_and_means_and_spreads_a_point():
    assert torch.allclose(blurred(torch.full((2, 3, 9, 7), 0.3)), torch.full((2, 3, 9, 7), 0.3), atol=1e-6)
    point = torch.zeros(1, 1, 31, 41)
    point[0, 0, 15, 20] = 1
    found = blurred(point, sigma=2.0)[0, 0]
    assert float(found.sum()) == pytest.approx(1, abs=1e-5)
    y, x = torch.meshgrid(torch.arange(31.0) - 15, torch.arange(41.0) - 20, indexing="ij")
    for axis in (y, x):
        assert float((found * axis**2).sum()) == pytest.approx(4.0, rel=0.05)


def test_refinement_computes_no_point_twice():
    judged, calls = evaluation(linear()), []
    judged.model.register_forward_pre_hook(lambda _, inputs: calls.append(inputs[0].requires_grad))
    spec = Saliency("ig", output="probability", steps=2, tolerance=0.01, max_steps=4096)
    found = explain(judged, images(), TARGET, spec, ids=IDS)
    assert len(found.steps.unique()) > 1
    expected, steps = -(-N * (spec.steps + 1) // judged.block), spec.steps
    while (still_open := int((found.steps > steps).sum())) > 0:
        expected += -(-still_open * steps // judged.block)  # the midpoints alone
        steps *= 2
    assert sum(calls) == expected


@pytest.mark.parametrize("method", ["gradient", "input-x-gradient"])
def test_a_gradient_tells_the_prediction_that_it_passed(method):
    model, x = convnet(), images(40)
    best = evaluation(model)
    target = (best.logits(x).argmax(1) + 1) % K
    found = explain(best, x, target, Saliency(method), ids=torch.arange(40))
    assert torch.equal(found.prediction, best.logits(x).argmax(1))
