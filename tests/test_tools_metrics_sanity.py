"""Stability under attack, randomised models and classes, spectra: closed forms, limits and captum."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import toys
from scipy import stats
from torch import nn

from rbkit.tools import random, saliency, sanity, stability
from rbkit.tools.attribution import Saliency
from rbkit.tools.batch import Batch
from rbkit.tools.metrics import evaluate
from rbkit.tools.models import Classifier
from rbkit.tools.saliency import explain

torch.set_num_threads(1)
D = toys.H * toys.W
X = toys.images()
IDS, TARGET = toys.IDS, toys.TARGET
NET = toys.convnet()
EVALUATION = toys.evaluation(NET)
GRADIENT = Saliency("gradient")
SHAPE = (toys.C, toys.H, toys.W)


def batch(spec=GRADIENT, evaluation=EVALUATION, *, images=X, target=TARGET, ids=IDS, **more):
    attribution = explain(evaluation, images, target, spec, ids=ids).attribution
    return Batch(
        evaluation, ids, images, explained=images, target=target, attribution=attribution, saliency=spec, **more
    )  # fmt: skip


def values(name, given):
    return evaluate(given, [name])[name].tolist()


def bare(images):
    """A classifier without normalisation around a network."""
    return lambda net: toys.evaluation(Classifier(net, mean=[0.0] * images, std=[1.0] * images).eval())


# ----------------------------------------------------------------------------------------------------- stability


def quadratic(gap=1.0):
    """Class 0 is ahead by `gap` of its own factors; the logits are sums of a_k x**2."""
    factors = torch.rand(1, *SHAPE, generator=toys.generator(5)) + 0.5
    return factors[0], bare(toys.C)(toys.Quadratic(torch.cat([factors, factors * (1 - gap)])))


def test_the_attack_reaches_the_optimum_of_a_quadratic_model():
    # The gradient 2 a x moves by 2 a delta: the farthest at every corner of the ball.
    factors, evaluation = quadratic()
    images, target = toys.images(low=0.3, high=0.7), torch.zeros(toys.N, dtype=torch.long)
    given = batch(evaluation=evaluation, images=images, target=target)
    best = stability.NOISE_RADIUS * factors.norm() / (factors * images).flatten(1).norm(dim=1)
    assert values("attack_sensitivity", given) == pytest.approx(best.tolist(), rel=1e-3)
    assert max(a / b for a, b in zip(values("max_sensitivity", given), best.tolist(), strict=True)) < 0.9


@pytest.mark.parametrize("method", ["gradient", "ig", "smoothgrad"])
def test_the_attack_keeps_ball_box_and_prediction_and_beats_noise(method):
    given = batch(Saliency(method, steps=4, samples=3))
    found = stability.attacked(given)
    assert (found - X).abs().max() <= stability.NOISE_RADIUS + 1e-6 and (found != X).flatten(1).any(1).all()
    assert found.min() >= 0 and found.max() <= 1
    assert torch.equal(NET(found).argmax(1), NET(X).argmax(1))
    attack, noise = (torch.tensor(values(name, given)) for name in ("attack_sensitivity", "max_sensitivity"))
    known = ~noise.isnan()
    assert known.sum() > 3 and (attack[known] >= noise[known]).all()
    assert attack[known].mean() > 1.2 * noise[known].mean()


def test_steps_that_change_the_prediction_are_not_taken():
    _, evaluation = quadratic()
    factors = evaluation.model.net.factors
    with torch.no_grad():
        factors[1] = factors[0] + toys.images(seed=8)[0] - 0.5
    images = toys.images(400, low=0.3, high=0.7)
    lead = evaluation.logits(images).diff(dim=1).abs()[:, 0]
    images = images[lead.argsort()[:20]]  # the nearest to the boundary
    ids, prediction = torch.arange(20), evaluation.logits(images).argmax(1)
    given = batch(evaluation=evaluation, images=images, target=torch.zeros_like(ids), ids=ids)
    found = stability.attacked(given)
    assert torch.equal(evaluation.logits(found).argmax(1), prediction)
    # The corner that free steps from the same start end in is on the other side for some.
    corner = images + stability.NOISE_RADIUS * (stability._noisy(given, stability.NOISE_DRAWS) - images).sign()
    assert (evaluation.logits(corner).argmax(1) != prediction).any()


def test_maps_of_a_linear_model_do_not_move():
    given = batch(evaluation=toys.evaluation(toys.linear()))
    known = [v for v in values("attack_sensitivity", given) if not math.isnan(v)]
    assert known and max(known) == 0.0
    assert values("attack_overlap", given) == [1.0] * toys.N


def test_overlap_is_the_share_of_the_highest_tenth_that_stays():
    given = batch(Saliency("input-x-gradient"))
    again = given.explain_again(stability.attacked(given))
    count = round(0.1 * D)
    for row, share in enumerate(values("attack_overlap", given)):
        first, second = (
            set(np.argsort(-m[row].sum(0).abs().flatten().numpy(), kind="stable")[:count].tolist())
            for m in (given.attribution, again)
        )
        assert share == pytest.approx(len(first & second) / count)


def test_softening_changes_a_copy_alone_and_gives_a_second_derivative():
    before = EVALUATION.logits(X)
    soft = stability.softened(EVALUATION)
    assert not any(isinstance(m, nn.ReLU) for m in soft.modules()) and torch.equal(EVALUATION.logits(X), before)
    given = batch()
    moved = X + 0.01
    assert (stability._uphill(given, soft, moved) != 0).flatten(1).any(1).all()
    hard = stability._uphill(given, EVALUATION, moved)
    assert (hard == 0).all()  # what ReLU alone would give


def test_max_sensitivity_is_captums_on_the_same_noise():
    from captum.metrics import sensitivity_max

    given = batch()
    draws = iter(range(stability.NOISE_DRAWS))
    theirs = sensitivity_max(
        lambda images: (explain(EVALUATION, images[0], TARGET, GRADIENT, ids=IDS).attribution,),
        X, lambda _: (stability._noisy(given, next(draws)),),
        n_perturb_samples=stability.NOISE_DRAWS, max_examples_per_batch=toys.N,
    )  # fmt: skip
    kept = torch.stack(
        [NET(stability._noisy(given, d)).argmax(1) == NET(X).argmax(1) for d in range(stability.NOISE_DRAWS)]
    ).all(0)
    ours = torch.tensor(values("max_sensitivity", given))
    assert kept.sum() > 3
    assert ours[kept].tolist() == pytest.approx(theirs[kept].tolist(), rel=1e-4)


# -------------------------------------------------------------------------------------------------------- sanity


class Stack(nn.Module):
    """Three linear layers, the first two of one shape."""

    def __init__(self):
        super().__init__()
        size = math.prod(SHAPE)
        self.one, self.two, self.fc = nn.Linear(size, size), nn.Linear(size, size), nn.Linear(size, toys.K)

    def forward(self, x):
        return self.fc(torch.relu(self.two(torch.relu(self.one(x.flatten(1))))))


def stack():
    return bare(toys.C)(toys.randomise(Stack()))


def test_layers_of_equal_shape_are_drawn_apart():
    # Trap M10: Quantus seeds each layer with the same number, so that equal shapes become equal weights.
    net = sanity.randomised(stack(), SHAPE).model.net
    rows = torch.stack([net.one.weight.flatten(), net.two.weight.flatten()])
    assert abs(float(torch.corrcoef(rows)[0, 1])) < 0.1
    other = sanity.randomised(stack(), SHAPE, draw=1).model.net
    assert abs(float(torch.corrcoef(torch.stack([net.one.weight.flatten(), other.one.weight.flatten()]))[0, 1])) < 0.1


def test_the_cascade_begins_at_the_head_and_leaves_model_and_generator_alone():
    evaluation = stack()
    before = {name: t.clone() for name, t in evaluation.state_dict().items()}
    generator = torch.get_rng_state()
    for count, fresh in ((1, {"fc"}), (2, {"fc", "two"}), (None, {"fc", "two", "one"})):
        net = sanity.randomised(evaluation, SHAPE, count=count).model.net
        moved = {n.split(".")[0] for n, p in net.named_parameters() if not torch.equal(p, before[f"model.net.{n}"])}
        assert moved == fresh
    assert all(torch.equal(evaluation.state_dict()[name], t) for name, t in before.items())
    assert torch.equal(torch.get_rng_state(), generator)
    assert sanity.stages(3) == [1, 2, 3] and sanity.stages(1) == [1] and sanity.stages(10) == [1, 4, 7, 10]


def test_drawn_layers_keep_the_statistics_of_their_outputs():
    # What estimating BatchNorm again would do; with statistics reset to 0 and 1 the maps of a deep network die.
    for evaluation, shape in ((EVALUATION, SHAPE), (toys.evaluation(toys.resnet()), (3, 16, 18))):
        images = sanity.probes(evaluation, shape)
        old = sanity.layers(evaluation, images)
        for count, name in enumerate(reversed(old), start=1):
            _, new = sanity.layers(sanity.randomised(evaluation, shape, count=count), images)[name]
            dims = [0] if new.dim() == 2 else [0, 2, 3]
            was = old[name][1]
            torch.testing.assert_close(new.mean(dims), was.mean(dims), atol=1e-3, rtol=1e-3)
            torch.testing.assert_close(new.std(dims), was.std(dims), atol=1e-3, rtol=1e-2)
            assert not torch.allclose(new, was, atol=1e-2)


class Attending(torch.nn.Module):
    """A patch embedding, attention, a layer and the head."""

    def __init__(self):
        super().__init__()
        self.patch, self.fc = torch.nn.Conv2d(toys.C, 8, 4, stride=4), torch.nn.Linear(8, toys.K)
        self.attention = torch.nn.MultiheadAttention(8, 2, batch_first=True)
        self.after = torch.nn.Linear(8, 8)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.fc(torch.relu(self.after(x)).mean(1))


def test_maps_of_attention_are_attacked_too():
    """Its fused kernels have no second derivative; by the metric's own search the map moves further than by noise."""
    images, ids = toys.images(4, h=8, w=12, low=0.3, high=0.7), torch.arange(4)
    evaluation = bare(toys.C)(toys.randomise(Attending()))
    given = batch(evaluation=evaluation, images=images, target=evaluation.logits(images).argmax(1), ids=ids)
    attack, noise = (torch.tensor(values(name, given)) for name in ("attack_sensitivity", "max_sensitivity"))
    assert (attack >= noise).all() and attack.mean() > 1.2 * noise.mean()


def test_attention_is_drawn_anew_in_its_turn():
    """Its weights belong to no layer that runs by itself."""
    evaluation = bare(toys.C)(toys.randomise(Attending()))
    assert list(sanity.layers(evaluation, sanity.probes(evaluation, SHAPE))) == ["patch", "attention", "after", "fc"]
    old = dict(evaluation.model.net.named_parameters())
    for count, fresh in ((2, set()), (3, {"in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"})):
        new = sanity.randomised(evaluation, SHAPE, count=count).model.net.attention
        assert {n for n, p in new.named_parameters() if not torch.equal(p, old[f"attention.{n}"])} == fresh
    for part in ("in_proj_weight", "out_proj.weight"):
        was, is_now = old[f"attention.{part}"], new.get_parameter(part)
        assert float(is_now.std() / was.square().mean().sqrt()) == pytest.approx(1, abs=0.25)
        assert abs(float(torch.corrcoef(torch.stack([was.flatten(), is_now.flatten()]))[0, 1])) < 0.35
    assert not new.in_proj_bias.any()


def spearman(first, second):
    return stats.spearmanr(first.flatten().numpy(), second.flatten().numpy()).statistic


@pytest.mark.parametrize("signed", [True, False])
def test_randomisation_is_the_mean_rank_correlation_over_the_stages(signed):
    given = batch(Saliency("input-x-gradient"), signed=signed)
    number = len(sanity.layers(EVALUATION, X))
    models = [sanity.randomised(EVALUATION, SHAPE, count=count) for count in sanity.stages(number)]
    maps = [explain(m, X, TARGET, given.saliency, ids=IDS).attribution for m in models]

    def shown(attribution):
        return attribution.sum(1).abs() if signed else attribution.abs().sum(1)

    for row in range(toys.N):
        own = given.attribution[row : row + 1]
        expected = np.mean([spearman(shown(own), shown(m[row : row + 1])) for m in maps])
        assert values("randomisation", given)[row] == pytest.approx(expected, abs=1e-9)
        expected = np.mean([spearman(own.sum(1), m[row].sum(0)) for m in maps])
        assert values("randomisation_signed", given)[row] == pytest.approx(expected, abs=1e-9)
    other = explain(sanity.randomised(EVALUATION, SHAPE, draw=1), X, TARGET, given.saliency, ids=IDS).attribution
    floor = [spearman(shown(a[None]), shown(b[None])) for a, b in zip(maps[-1], other, strict=True)]
    assert values("randomisation_floor", given) == pytest.approx(floor, abs=1e-9)


def test_a_method_that_does_not_read_the_model_fails_all_checks(monkeypatch):
    # Trap M11: what such a method gets is the worst value there is.
    monkeypatch.setitem(
        saliency.METHODS, "edges", lambda evaluation, images, target, spec, **_: saliency.Explained(images - 0.5, target)
    )  # fmt: skip
    given = batch(Saliency("edges"))
    for name in ("randomisation", "randomisation_signed", "randomisation_ssim", "randomisation_floor", "random_logit"):
        assert values(name, given) == pytest.approx([1.0] * toys.N), name
    honest = batch()
    for name in ("randomisation", "randomisation_ssim", "random_logit"):
        assert np.mean(values(name, honest)) < 0.9, name


def test_guided_backpropagation_fails_where_the_gradient_does_not():
    # Trap M11 (Nie et al. 2018): it paints the image whatever the weights.
    evaluation, coarse = toys.evaluation(toys.resnet()), toys.images(12, 3, 5, 5)
    images, ids = nn.functional.interpolate(coarse, (16, 18), mode="bilinear"), torch.arange(12)
    found = {
        method: batch(Saliency(method), evaluation, images=images, target=ids % 4, ids=ids, signed=False)
        for method in ("gradient", "guided-backprop")
    }
    for name in ("randomisation", "randomisation_signed", "randomisation_ssim", "random_logit"):
        plain, painted = (np.mean(values(name, found[method])) for method in ("gradient", "guided-backprop"))
        assert painted > plain + 0.1, name


def test_random_logit_compares_with_another_class_by_id():
    model = toys.linear(5)
    weights = model.net[1].weight.detach().reshape(5, *SHAPE).sum(1).abs()
    ids = torch.arange(60)
    images, target = toys.images(60), ids % 5
    given = batch(evaluation=toys.evaluation(model), images=images, target=target, ids=ids)
    step = 1 + random.integers(ids, 4, seed=0, purpose="random logit")
    other = (target + step) % 5
    assert (other != target).all() and len(set(step.tolist())) == 4
    expected = [spearman(weights[a], weights[b]) for a, b in zip(target.tolist(), other.tolist(), strict=True)]
    assert values("random_logit", given) == pytest.approx(expected, abs=1e-9)


# ----------------------------------------------------------------------------------------------------- alignment


def map_batch(maps, images=X):
    n = len(maps)
    return Batch(
        EVALUATION, IDS[:n], images[:n], explained=images[:n], target=TARGET[:n], attribution=maps[:, None]
    )  # fmt: skip


def test_alignment_without_centring_is_the_cosine_in_pixels():
    maps = torch.randn(toys.N, toys.H, toys.W, generator=toys.generator(4))
    images = X.sum(1)
    expected = [float((m * x).sum().abs() / (m.norm() * x.norm())) for m, x in zip(maps, images, strict=True)]
    assert values("alignment_uncentred", map_batch(maps)) == pytest.approx(expected, abs=1e-6)
    assert values("alignment_uncentred", map_batch(-3e-4 * images)) == pytest.approx([1.0] * toys.N, abs=1e-6)
    constant = map_batch(torch.full_like(maps, 0.3))
    assert min(values("alignment_uncentred", constant)) > 0.7  # why both are reported
    assert all(math.isnan(v) for v in values("alignment_uncentred", map_batch(torch.zeros_like(maps))))


def test_low_frequency_energy_is_the_share_below_an_eighth_cycle_per_pixel():
    height, width = 20, 24
    y, x = torch.arange(height, dtype=torch.float64)[:, None], torch.arange(width, dtype=torch.float64)[None, :]
    slow, fast = torch.cos(2 * math.pi * 2 / height * y), torch.cos(2 * math.pi * 8 / width * x)
    slanted = torch.cos(2 * math.pi * (2 / height * y + 2 / width * x))  # at 0.13 cycles per pixel, both parts below
    maps = torch.stack(
        [slow + 0 * x, fast + 0 * y, slow + 2 * fast, slanted, slow + 0 * x + 7, torch.ones(height, width)]
    )
    images = toys.images(6, 3, height, width)
    found = values("low_frequency_energy", map_batch(maps, images))
    assert found[:5] == pytest.approx([1, 0, 0.2, 0, 1], abs=1e-9)
    assert math.isnan(found[5])
    scaled = values("low_frequency_energy", replace(map_batch(maps, images), attribution=1e-3 * maps[:, None]))
    assert scaled[:5] == pytest.approx(found[:5], abs=1e-9)
