"""Faithfulness by removal: infidelity, sensitivity-n and ROAD against slow loops, captum and closed forms."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import reference
import reference_metrics as slow
import torch
import toys

from rbkit.tools import infidelity as tool
from rbkit.tools import random, road
from rbkit.tools.attribution import Saliency
from rbkit.tools.batch import Batch
from rbkit.tools.faithfulness import random_order
from rbkit.tools.metrics import METRICS, chance, evaluate
from rbkit.tools.saliency import explain

torch.set_num_threads(1)
D = toys.H * toys.W
X = toys.images()
IDS, TARGET = toys.IDS, toys.TARGET
NET = toys.convnet()
EVALUATION = toys.evaluation(NET)
REMOVAL = ("infidelity", "infidelity_scaled", "sensitivity_n", "road_morf", "road_lerf")


def batch(spec=Saliency("ig", steps=8), evaluation=EVALUATION, *, attribution=None, target=TARGET):
    """A batch of attributions by the method of `spec`, or of given ones."""
    if attribution is None:
        attribution = explain(evaluation, X, target, spec, ids=IDS).attribution
    return Batch(evaluation, IDS, X, explained=X, target=target, attribution=attribution, saliency=spec)


def values(name, given):
    return evaluate(given, [name])[name].tolist()


def linear(seed=1):
    """A linear model and its weights (K, C, H, W)."""
    model = toys.linear(seed=seed)
    return model, toys.weights_of(model)


def output_of(classifier, target):
    """The target's logit of one float64 image."""
    double = copy.deepcopy(classifier).double().eval()
    return lambda image: float(double(torch.tensor(image)[None])[0, target].detach())


# ------------------------------------------------------------------------------------- infidelity, sensitivity-n


@pytest.mark.parametrize("method", ["gradient", "ig"])
def test_infidelity_is_the_papers_for_gradients_and_for_contributions(method):
    given = batch(Saliency(method, steps=8))
    masks = tool.squares(IDS, toys.H, toys.W).reshape(toys.N, -1, toys.H, toys.W).numpy()
    found, scaled = values("infidelity", given), values("infidelity_scaled", given)
    for row in range(toys.N):
        image = X[row].double().numpy()
        fill = np.broadcast_to(NET.mean.double().numpy(), image.shape)
        part = given.attribution[row].double().numpy() * ((image - fill) if method == "gradient" else 1)
        output = output_of(NET, int(TARGET[row]))
        assert found[row] == pytest.approx(
            slow.infidelity(part.sum(0), image, fill, output, list(masks[row])), rel=1e-3, abs=1e-8
        )
        sums = [float(part.sum(0)[m].sum()) for m in masks[row]]
        changes = [output(image) - output(np.where(m, fill, image)) for m in masks[row]]
        assert scaled[row] == pytest.approx(slow.infidelity_scaled(sums, changes), abs=1e-3)


def test_infidelity_is_captums_on_the_same_squares():
    from captum.metrics import infidelity

    given = batch(Saliency("gradient"))
    masks = tool.squares(IDS, toys.H, toys.W).reshape(toys.N, -1, 1, toys.H, toys.W)
    for normalise in (False, True):
        drawn = {"number": 0}

        def perturb(inputs, drawn=drawn):
            mask = masks[:, drawn["number"]].float()
            drawn["number"] += 1
            removed = mask * (inputs - NET.mean)
            return removed, inputs - removed

        theirs = infidelity(
            NET, perturb, X, given.attribution, target=TARGET, n_perturb_samples=masks.shape[1],
            max_examples_per_batch=toys.N, normalize=normalise,
        )  # fmt: skip
        if not normalise:
            assert values("infidelity", given) == pytest.approx(theirs.tolist(), rel=1e-3, abs=1e-8)
            continue
        sums, changes = tool._square_sums(given)
        up = (sums * changes).sum(1) > 0  # captum also takes negative factors
        assert up.any()
        ours = torch.tensor(values("infidelity_scaled", given)) * changes.square().mean(1)
        assert ours[up].tolist() == pytest.approx(theirs[up].tolist(), rel=1e-3, abs=1e-7)


def test_the_gradient_of_a_linear_model_is_without_error_and_at_any_scale():
    # Trap M5.
    model, weights = linear()
    evaluation = toys.evaluation(model)
    for factor in (1.0, 1e-4, 300.0):
        given = batch(Saliency("gradient"), evaluation, attribution=weights[TARGET] * factor)
        assert values("infidelity_scaled", given) == pytest.approx([0.0] * toys.N, abs=1e-9)
        assert values("sensitivity_n", given) == pytest.approx([1.0] * toys.N, abs=1e-6)
        exact = values("infidelity", given)
        assert max(exact) < 1e-8 if factor == 1.0 else min(exact) > 1e-3
    upside_down = batch(Saliency("gradient"), evaluation, attribution=-weights[TARGET])
    assert values("infidelity_scaled", upside_down) == [1.0] * toys.N
    assert values("sensitivity_n", upside_down) == pytest.approx([-1.0] * toys.N, abs=1e-6)


def test_contributions_of_a_linear_model_are_without_error():
    model, _ = linear()
    given = batch(Saliency("ig", steps=3, baseline="mean"), toys.evaluation(model))
    assert max(values("infidelity", given)) < 1e-8
    assert values("sensitivity_n", given) == pytest.approx([1.0] * toys.N, abs=1e-6)


def test_sensitivity_n_is_the_papers():
    given = batch()
    found = values("sensitivity_n", given)
    sizes = [max(1, round(share * D)) for share in tool.SHARES]
    for row in (0, 3, 6):
        image, output = X[row].double().numpy(), output_of(NET, int(TARGET[row]))
        fill = np.broadcast_to(NET.mean.double().numpy(), image.shape)
        part = given.attribution[row].double().numpy().sum(0)
        expected = []
        for size in sizes:
            masks = tool.subsets(IDS, D, size)[row].reshape(-1, toys.H, toys.W).numpy()
            assert (masks.sum((1, 2)) == size).all()
            changes = [output(image) - output(np.where(m, fill, image)) for m in masks]
            expected.append(slow.correlation([float(part[m].sum()) for m in masks], changes))
        assert found[row] == pytest.approx(np.mean(expected), abs=1e-3)


def test_one_example_has_its_own_sensitivity_n():
    # Trap M13: Quantus correlates over the batch, so that a batch of one is undefined.
    given = batch()
    one = Batch(
        EVALUATION, IDS[4:5], X[4:5], explained=X[4:5], target=TARGET[4:5], attribution=given.attribution[4:5],
        saliency=given.saliency,
    )  # fmt: skip
    (alone,) = values("sensitivity_n", one)
    assert math.isfinite(alone) and alone == values("sensitivity_n", given)[4]


def test_a_map_that_says_nothing():
    constant = batch(attribution=torch.full_like(X, 0.7))
    assert all(math.isnan(v) for v in values("sensitivity_n", constant))
    zero = batch(attribution=torch.zeros_like(X))
    assert values("infidelity_scaled", zero) == [1.0] * toys.N
    dead = toys.linear(scale=0.0)  # an output that never changes
    assert all(math.isnan(v) for v in values("infidelity_scaled", batch(evaluation=toys.evaluation(dead))))


def test_the_explained_output_is_what_is_measured():
    given = batch(Saliency("gradient"))
    other = replace(given, saliency=replace(given.saliency, output="probability"), shared=given.shared)
    logits, probabilities = tool._square_sums(given)[1], tool._square_sums(other)[1]
    assert probabilities.abs().max() <= 1 and not torch.allclose(logits, probabilities)


def test_reference_maps_are_taken_as_contributions_whatever_the_method():
    bands = [chance(batch(Saliency(m, steps=4)), ["infidelity_scaled"]) for m in ("gradient", "ig")]
    for name, found in bands[0].items():
        assert torch.equal(found, bands[1][name])
    assert all(0.0 <= v <= 1.0 for found in bands[0].values() for v in found.tolist())


# ---------------------------------------------------------------------------------------------------------- ROAD


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_imputation_solves_the_papers_equations(share):
    images = toys.images(4, 2, 9, 12, seed=6)
    removed = torch.rand(4, 1, 9, 12, generator=toys.generator(2)) < share
    removed[0, 0, :8] = True  # a hole that reaches three borders
    found = road.impute(images, removed)
    assert torch.equal(torch.where(removed, 0, found), torch.where(removed, 0, images))
    for row in range(4):
        expected = slow.impute(images[row].double().numpy(), removed[row, 0].numpy())
        np.testing.assert_allclose(found[row].numpy(), expected, atol=2e-3)


def test_imputation_continues_what_is_even_and_does_not_see_other_rows():
    even = torch.full((2, 3, 7, 8), 0.3)
    removed = torch.rand(2, 1, 7, 8, generator=toys.generator(1)) < 0.6
    torch.testing.assert_close(road.impute(even, removed), even, atol=1e-4, rtol=0)
    # A row of small holes is done long before its neighbour, of which little is left.
    images, removed = toys.images(2, 3, 16, 18), torch.ones(2, 1, 16, 18, dtype=torch.bool)
    removed[0] = torch.rand(16, 18, generator=toys.generator(3)) < 0.2
    removed[1, 0, 0, :3] = False
    assert torch.equal(road.impute(images, removed)[:1], road.impute(images[:1], removed[:1]))


def test_road_is_the_slow_loop_above_random_order():
    given = batch()
    shuffle = random_order(given)
    noise = 0.01 * random.normal(IDS, (3, toys.H, toys.W), seed=0, purpose="road").double().numpy()
    for row in (1, 5):
        double = copy.deepcopy(NET).double().eval()
        ranked = np.argsort(-given.maps[row].flatten().numpy(), kind="stable")
        means = []
        for order in (ranked, ranked[::-1], shuffle[row].numpy()):
            looks = []
            for share in (0.1, 0.3, 0.5, 0.7, 0.9):
                removed = np.zeros(D, dtype=bool)
                removed[order[: round(share * D)]] = True
                removed = removed.reshape(toys.H, toys.W)
                image = slow.impute(X[row].double().numpy(), removed) + noise[row] * removed
                logits = double(torch.tensor(image.clip(0, 1))[None])[0].detach().numpy()
                looks.append(float(np.exp(reference.log_softmax(logits)[int(TARGET[row])])))
            means.append(np.mean(looks))
        assert values("road_morf", given)[row] == pytest.approx(means[0] - means[2], abs=1e-3)
        assert values("road_lerf", given)[row] == pytest.approx(means[1] - means[2], abs=1e-3)


def test_road_of_a_constant_map_is_random_order_and_of_a_good_one_beyond_it():
    constant = batch(attribution=torch.full_like(X, -0.7))
    for name in ("road_morf", "road_lerf"):
        assert values(name, constant) == [0.0] * toys.N
    given = batch(Saliency("gradient"))
    swapped = replace(given, attribution=-given.attribution)
    assert values("road_morf", swapped) == values("road_lerf", given)
    # A model that sees how bright a rectangle is, on images that are bright there alone.
    pattern = torch.zeros(toys.H, toys.W)
    pattern[1:4, 2:4] = 1
    model = toys.linear(2, scale=0.0)
    with torch.no_grad():
        model.net[1].weight[1] = pattern.expand(3, -1, -1).flatten()
        model.net[1].bias[1] = -1.5 * pattern.sum()
    bright = toys.images(low=0.8) * pattern
    oracle = pattern.expand(toys.N, 1, -1, -1)
    given = Batch(
        toys.evaluation(model), IDS, bright, explained=bright, target=torch.ones_like(TARGET), attribution=oracle
    )  # fmt: skip
    for name, sign in (("road_morf", -1), ("road_lerf", 1)):
        assert all(sign * v > 0.02 for v in values(name, given)), name
        assert METRICS[name].better == ("higher" if sign > 0 else "lower")


def test_the_random_order_is_drawn_once_for_all_metrics_methods_and_reference_maps(monkeypatch):
    """A draw and a sort took a twentieth of pixel flipping."""
    draws, order = [], random.order

    def counted(*arguments, purpose, **options):
        draws.append(purpose)
        return order(*arguments, purpose=purpose, **options)

    monkeypatch.setattr(random, "order", counted)
    given = batch()
    evaluate(given, ["insertion", "deletion", "deletion_mean", "road_morf", "road_lerf"])
    evaluate(given.with_maps(given.maps.flip(0)), ["deletion", "road_morf"])
    assert draws.count("random order") == 1
