"""Inversion, class images, units and the Gaussian seeds: exact identities and numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torchmetrics
import toys

from rbkit.tools.invert import (
    Inversion,
    class_images,
    differentiable,
    invert,
    top_images,
    total_variation,
    unit_activations,
    unit_images,
    unit_objective,
)
from rbkit.tools.models import features_of
from rbkit.tools.starts import RIDGE, draw_seeds, fit_seeds, grey_noise

torch.set_num_threads(1)
X = toys.images()
IDS = torch.tensor([3, 2**40, 0, 17, 9, 1, 250])
LABELS = torch.tensor([0, 3, 1, 2, 2, 0, 1])
NET = toys.convnet()


def grey(draw=0, seed=0, ids=IDS):
    return grey_noise(ids, tuple(X.shape[1:]), seed=seed, draw=draw)


def test_grey_noise_is_grey_and_keyed_by_id():
    noise = grey()
    assert noise.min() >= 0.5 and noise.max() < 0.55
    assert abs(noise.mean() - 0.525) < 0.003
    assert torch.equal(grey(ids=IDS.flip(0)), noise.flip(0))
    assert not torch.equal(grey(draw=1), noise)


@pytest.mark.parametrize("layer", [None, "conv2", "relu1"])
def test_starting_from_the_image_returns_it_with_loss_zero(layer):
    spec = Inversion("representation", layer=layer, steps=4)
    found, loss = invert(toys.evaluation(NET, layer=layer), X, [X], spec, ids=IDS)
    assert torch.equal(found, X)
    assert torch.equal(loss, torch.zeros(toys.N))


def test_inversion_lowers_the_relative_distance_that_it_reports():
    evaluation, spec = toys.evaluation(NET), Inversion("representation", steps=30, step_size=0.2)
    found, loss = invert(evaluation, X, [grey()], spec, ids=IDS)
    goal = features_of(evaluation, X)
    told = (features_of(evaluation, found) - goal).norm(dim=1) / goal.norm(dim=1)
    before = (features_of(evaluation, grey()) - goal).norm(dim=1) / goal.norm(dim=1)
    torch.testing.assert_close(loss, told, rtol=1e-4, atol=1e-5)
    assert (loss < 0.5 * before).all()
    assert found.min() >= 0 and found.max() <= 1


def test_eps_bounds_the_distance_to_the_start():
    spec = Inversion("representation", steps=20, eps=0.3)
    found, _ = invert(toys.evaluation(NET), X, [grey()], spec, ids=IDS)
    away = (found - grey()).flatten(1).norm(dim=1)
    assert away.max() <= 0.3 + 1e-6 and away.min() > 0.05


def loss_of(evaluation, images):
    """The relative latent error of tests that differentiate it by themselves."""
    goal = features_of(evaluation, X)
    return (evaluation.features(images, layer=None).flatten(1) - goal).norm(dim=1) / goal.norm(dim=1)


def test_adam_is_that_of_torch_for_each_example():
    evaluation, start = toys.evaluation(NET), grey()
    spec = Inversion("representation", steps=12, step_size=0.03, optimizer="adam")
    found, loss = invert(evaluation, X, [start], spec, ids=IDS)
    for row in range(toys.N):
        image = start.clone().requires_grad_()
        optimizer = torch.optim.Adam([image], lr=0.03)
        best, lowest = None, float("inf")
        for _ in range(13):
            value = loss_of(evaluation, image)[row]
            if value.item() < lowest:
                best, lowest = image.detach()[row].clone(), value.item()
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            with torch.no_grad():
                image.clamp_(0, 1)
        assert loss[row].item() == pytest.approx(lowest, rel=1e-3)
        torch.testing.assert_close(found[row], best, rtol=1e-3, atol=1e-3)


def test_plain_steps_follow_the_gradient_as_it_is():
    evaluation, start = toys.evaluation(NET), grey()
    spec = Inversion("representation", steps=1, step_size=0.1, optimizer="plain")
    found, _ = invert(evaluation, X, [start], spec, ids=IDS)
    image = start.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss_of(evaluation, image).sum(), image)
    torch.testing.assert_close(found, (start - 0.1 * gradient).clamp(0, 1), rtol=1e-4, atol=1e-6)


def test_the_penalty_smooths_and_is_not_part_of_the_loss():
    evaluation = toys.evaluation(NET)
    rough, _ = invert(evaluation, X, [grey()], Inversion("representation", steps=30, step_size=0.1), ids=IDS)
    spec = Inversion("representation", steps=30, step_size=0.1, tv=0.01)
    found, loss = invert(evaluation, X, [grey()], spec, ids=IDS)
    assert (total_variation(found) < total_variation(rough)).all()
    torch.testing.assert_close(loss, loss_of(evaluation, found).detach(), rtol=1e-4, atol=1e-5)


def test_total_variation_is_that_of_torchmetrics():
    oracle = torchmetrics.functional.image.total_variation
    expected = torch.stack([oracle(image[None]) for image in X])
    torch.testing.assert_close(total_variation(X), expected)


@pytest.mark.parametrize("optimizer", ["normalised", "plain", "adam"])
@pytest.mark.parametrize("mode", ["representation", "class", "feature"])
def test_a_batch_equals_single_runs(mode, optimizer):
    evaluation, spec = toys.evaluation(NET), Inversion(mode, steps=5, step_size=0.02, optimizer=optimizer, tv=1e-3)

    def run(rows):
        starts = [grey()[rows], grey(1)[rows]]
        if mode == "representation":
            return invert(evaluation, X[rows], starts, spec, ids=IDS[rows])
        if mode == "class":
            return class_images(evaluation, LABELS[rows], starts, spec, ids=IDS[rows])
        return unit_images(evaluation, LABELS[rows], starts, spec)

    whole, values = run(torch.arange(toys.N))
    for row in range(toys.N):
        image, value = run(torch.tensor([row]))
        assert torch.equal(image, whole[row : row + 1])
        assert torch.equal(value, values[row : row + 1])


def test_restarts_keep_the_best_of_each_example():
    evaluation, spec = toys.evaluation(NET), Inversion("representation", steps=3, step_size=0.1)
    starts = [grey(), X.roll(1, 0), grey(1), grey(2), grey(3), X.flip(3)]  # a block has room for four runs of 7 rows
    single = [invert(evaluation, X, [start], spec, ids=IDS) for start in starts]
    found, loss = invert(evaluation, X, starts, spec, ids=IDS)
    losses = torch.stack([value for _, value in single])
    best = losses.argmin(0)
    assert len(best.unique()) > 1
    assert torch.equal(loss, losses.amin(0))
    assert torch.equal(found, torch.stack([single[b][0][i] for i, b in enumerate(best.tolist())]))


@pytest.mark.parametrize(
    ("keep", "restarts", "widest"), [("best", 3, 22), ("last", 3, 22), ("batch", 3, 8), ("best", 1, 8)]
)
def test_restarts_lie_side_by_side_and_few_rows_in_a_narrow_block(keep, restarts, widest):
    """7 rows are computed 8 at a time once it pays to ask, and those of 3 restarts 22 at a time, unless the mean of each counts."""
    evaluation, spec = toys.evaluation(NET, 64), Inversion("representation", steps=20, step_size=0.1, keep=keep)
    sizes = []
    evaluation.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    invert(evaluation, X, [grey(draw) for draw in range(restarts)], spec, ids=IDS)
    narrow = [size for size in sizes if size < evaluation.block]
    evaluations = (20 + 1) * (restarts if keep == "batch" else 1)
    assert max(narrow) == widest
    assert sizes.count(evaluation.block) < 0.4 * evaluations
    assert len(sizes) < evaluations + 10 * restarts


@pytest.mark.parametrize("objective", ["ce", "logit"])
def test_class_images_raise_their_class(objective):
    evaluation, spec = toys.evaluation(NET), Inversion("class", steps=25, step_size=0.2, objective=objective)
    found, loss = class_images(evaluation, LABELS, [grey()], spec, ids=IDS)
    logits, before = evaluation.logits(found), evaluation.logits(grey())
    pick = LABELS[:, None]
    if objective == "ce":
        told, start = (-x.log_softmax(1).gather(1, pick)[:, 0] for x in (logits, before))
    else:
        told, start = (-x.gather(1, pick)[:, 0] for x in (logits, before))
    torch.testing.assert_close(loss, told, rtol=1e-4, atol=1e-5)
    assert (told < start).all()
    assert (logits.softmax(1).gather(1, pick) > before.softmax(1).gather(1, pick)).all()


def test_class_image_of_a_linear_model_is_the_corner_of_the_box():
    model = toys.linear()
    spec = Inversion("class", steps=40, step_size=1.0, objective="logit")
    found, _ = class_images(toys.evaluation(model), LABELS, [grey()], spec, ids=IDS)
    gap = ((toys.weights_of(model)[LABELS] > 0).float() - found) * toys.weights_of(model)[LABELS]
    assert (gap.sum((1, 2, 3)) < 0.002 * toys.weights_of(model)[LABELS].abs().sum((1, 2, 3))).all()


@pytest.mark.parametrize("layer", [None, "conv2"])
def test_unit_images_raise_their_unit(layer):
    evaluation, units = toys.evaluation(NET, layer=layer), torch.tensor([5, 0, 3])
    spec = Inversion("feature", layer=layer, steps=20, step_size=0.2)
    start = X[:3]
    found, value = unit_images(evaluation, units, [start], spec)

    def activation(images):
        block = torch.cat([images, images[:1].expand(29, -1, -1, -1)])
        return unit_activations(evaluation.features(block, layer=layer))[torch.arange(3), units]

    torch.testing.assert_close(value, activation(found), rtol=1e-4, atol=1e-5)
    assert (value > activation(start)).all()


def test_unit_activations_are_spatial_means():
    activations = torch.rand(3, 4, 5, 6)
    torch.testing.assert_close(unit_activations(activations), activations.mean((2, 3)))
    assert unit_activations(activations[:, :, 0, 0]).equal(activations[:, :, 0, 0])


def test_an_open_last_relu_reaches_a_unit_that_is_silent():
    net = toys.convnet()
    with torch.no_grad():
        net.net.bn2.bias[2] = -50.0  # far below 0 everywhere: no gradient passes the ReLU
        net.net.bn2.weight[2] = 1.0
    evaluation, units = toys.evaluation(net), torch.tensor([2])
    spec = Inversion("feature", steps=3, step_size=0.2)
    closed, _ = unit_images(evaluation, units, [X[:1]], spec)
    assert torch.equal(closed, X[:1])

    # The value stays 0, so the best iterate is the start; what opens up is the gradient.
    def gradient(through):
        images = X[:1].expand(32, -1, -1, -1).clone().requires_grad_()
        value, _ = unit_objective(through, layer=None)(images, {"unit": units.expand(32)})
        return torch.autograd.grad(value.sum(), images)[0]

    opened = differentiable(evaluation, Inversion("feature", fake_relu=True), X)
    assert gradient(evaluation).abs().max() == 0
    assert gradient(opened).abs().max() > 0
    assert torch.equal(opened.logits(X), evaluation.logits(X))


def test_the_last_relu_before_a_layer_is_the_one_that_opens():
    """Up to conv2 there is one ReLU, not the last of the network."""
    evaluation = toys.evaluation(NET, layer="conv2")
    found = [
        invert(evaluation, X, [grey()], Inversion("representation", layer="conv2", steps=2, fake_relu=fake), ids=IDS)[0]
        for fake in (False, True)
    ]
    assert not torch.equal(*found)


def test_top_images_excite_the_unit_most():
    evaluation, images = toys.evaluation(NET), toys.images(50, seed=4)
    values = features_of(evaluation, images)
    units = values.std(0).topk(2).indices  # some units are silent on every image
    found = top_images(evaluation, images, units, layer=None, count=5)
    assert found.shape == (2, 5)
    for unit, row in zip(units.tolist(), found, strict=True):
        assert row.tolist() == np.argsort(-values[:, unit].numpy(), kind="stable")[:5].tolist()
    assert top_images(evaluation, images[:3], units, layer=None, count=5).shape == (2, 3)
    with pytest.raises(ValueError, match="unit 8: the layer has units 0 to 7"):
        top_images(evaluation, images, torch.tensor([8]), layer=None, count=1)


# ------------------------------------------------------------------------------------------------------ seeds

TRAIN = 0.5 + 0.15 * torch.randn(60, 3, 4, 6, generator=toys.generator(1)).cumsum(3) / 2
CLASS = torch.arange(60) % 2
TRAIN[CLASS == 1] *= 0.6


def averaged(images):
    """Means of 2 x 2 blocks, (N, 3 * 2 * 3) float64, by numpy."""
    return images.double().numpy().reshape(-1, 3, 2, 2, 3, 2).mean((3, 5)).reshape(len(images), -1)


def test_seeds_are_fitted_per_class_as_numpy_does():
    seeds = fit_seeds(TRAIN, CLASS, 2, grid=2)
    assert seeds.shape == (3, 4, 6) and seeds.grid == 2
    for label in (0, 1):
        small = averaged(TRAIN[label == CLASS])
        np.testing.assert_allclose(seeds.mean[label].numpy(), small.mean(0), atol=1e-6)
        covariance = (seeds.factor[label] @ seeds.factor[label].T).numpy()
        np.testing.assert_allclose(covariance, np.cov(small.T) + RIDGE * np.eye(18), atol=1e-7)
        assert (seeds.factor[label].triu(1) == 0).all()
    assert (seeds.mean[0] - seeds.mean[1]).abs().max() > 0.1


def test_drawn_seeds_have_the_mean_and_covariance_of_their_class():
    seeds = fit_seeds((TRAIN - 0.4) * 0.2 + 0.5, CLASS, 2, grid=2)  # far from 0 and 1, where clipping would bias
    many = 8000
    for label in (0, 1):
        found = draw_seeds(seeds, torch.full((many,), label), ids=torch.arange(many), seed=3)
        assert found.shape == (many, 3, 4, 6) and found.dtype == torch.float32
        assert found.min() > 0 and found.max() < 1
        blocks = found.reshape(many, 3, 2, 2, 3, 2)
        assert (blocks == blocks[:, :, :, :1, :, :1]).all()
        small = averaged(found)
        covariance = (seeds.factor[label] @ seeds.factor[label].T).numpy()
        spread = np.sqrt(np.diag(covariance))
        assert np.abs((small.mean(0) - seeds.mean[label].numpy()) / spread).max() < 5 / many**0.5
        gap = (np.cov(small.T) - covariance) / np.outer(spread, spread)
        assert np.abs(gap).max() < 5 * (2 / many) ** 0.5


def test_drawn_seeds_are_cut_to_the_box_and_keyed_by_id():
    seeds = fit_seeds((TRAIN - 0.35) * 8 + 0.5, CLASS, 2, grid=2)
    ids, labels = torch.tensor([8, 2**40, 1]), torch.tensor([1, 0, 1])
    whole = draw_seeds(seeds, labels, ids=ids, seed=0)
    assert whole.min() == 0 and whole.max() == 1
    assert torch.equal(draw_seeds(seeds, labels[[2]], ids=ids[[2]], seed=0), whole[[2]])
    assert not torch.equal(draw_seeds(seeds, labels, ids=ids, seed=1), whole)
    assert not torch.equal(draw_seeds(seeds, labels, ids=ids, seed=0, draw=1), whole)


def test_seeds_of_one_image_or_of_misfit_sizes():
    one = fit_seeds(TRAIN[:2], CLASS[:2], 2, grid=2)
    torch.testing.assert_close(one.factor[0], torch.eye(18, dtype=torch.float64) * RIDGE**0.5)
    with pytest.raises(ValueError, match="4 x 6 do not divide into blocks of 4"):
        fit_seeds(TRAIN, CLASS, 2, grid=4)
    with pytest.raises(ValueError, match="do not divide"):
        fit_seeds(TRAIN, CLASS, 2, grid=3)
    with pytest.raises(ValueError, match="no training image of class 2"):
        fit_seeds(TRAIN, CLASS, 3, grid=2)
