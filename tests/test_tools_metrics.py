"""Metrics against closed forms and slow references; rounding that stays in the ball."""

from __future__ import annotations

import math

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import C, H, K, N, W, convnet, evaluation, generator, images, linear, weights_of

from rbkit.tools import metrics as tool
from rbkit.tools.metrics import METRICS, Batch, applicable
from rbkit.tools.norms import NORMS
from rbkit.tools.quantise import leaves_ball, round_inside
from rbkit.tools.saliency import Saliency, explain

IDS = torch.arange(N) * 2 + 1
TARGET = torch.arange(N) % K


def batch_of(maps=None, *, model=None, x=None, **more):
    """A batch whose map per location (N, H, W) is `maps`, in one channel."""
    x = images() if x is None else x
    model = evaluation(convnet()) if model is None else model
    attribution = None if maps is None else maps[:, None]
    return Batch(model, IDS, x, attribution=attribution, explained=x, target=TARGET, **more)


def random_maps(seed=0):
    return torch.randn(N, H, W, generator=generator(seed))


# --------------------------------------------------------------------------------------- complexity


def test_gini_and_entropy_equal_their_definitions():
    batch = batch_of(random_maps())
    for row, g, e in zip(batch.maps.flatten(1).double().tolist(), tool.gini(batch), tool.entropy(batch), strict=True):
        assert float(g) == pytest.approx(reference.gini(row), abs=1e-9)
        assert float(e) == pytest.approx(reference.entropy(row), abs=1e-9)


def test_gini_and_entropy_of_constant_one_hot_and_zero_maps():
    """M9."""
    d = H * W
    maps = torch.zeros(N, H, W)
    maps[0], maps[1, 2, 3] = 0.7, -5.0
    batch = batch_of(maps)
    assert tool.gini(batch)[:2].tolist() == pytest.approx([0, 1 - 1 / d], abs=1e-9)
    assert tool.entropy(batch)[:2].tolist() == pytest.approx([math.log(d), 0], abs=1e-9)
    assert tool.gini(batch)[2:].isnan().all() and tool.entropy(batch)[2:].isnan().all()
    scaled = batch_of(random_maps() * 1e4)
    assert torch.allclose(tool.gini(scaled), tool.gini(batch_of(random_maps())), atol=1e-6)


def test_channels_are_reduced_by_the_scorer():
    """S8."""
    attribution = torch.randn(N, C, H, W, generator=generator(0))
    batch = Batch(evaluation(convnet()), IDS, images(), attribution=attribution)
    assert torch.allclose(batch.maps, attribution.sum(1))
    unsigned = Batch(evaluation(convnet()), IDS, images(), attribution=attribution, signed=False)
    assert torch.allclose(unsigned.maps, attribution.abs().sum(1))


# ------------------------------------------------------------------------------------- localisation


def masks():
    """Row 0 empty, row 1 full, the others a rectangle each."""
    mask = torch.zeros(N, H, W, dtype=torch.uint8)
    mask[1] = 1
    for row in range(2, N):
        mask[row, 1 : 2 + row % 3, 2 : 4 + row % 2] = 1
    return mask


def test_localisation_equals_its_definition_with_ties():
    """Integers make ties, at the bar of the rank and at the maximum."""
    maps = torch.randint(-2, 3, (N, H, W), generator=generator(2)).float()
    batch = batch_of(maps, mask=masks())
    mass, rank, hit = (f(batch) for f in (tool.relevance_mass, tool.relevance_rank, tool.pointing_game))
    for found in (mass, rank, hit):
        assert found[:2].isnan().all() and not found[2:].isnan().any()
    for row in range(2, N):
        values, inside = maps[row].flatten().tolist(), [bool(v) for v in masks()[row].flatten()]
        positive = [max(v, 0) for v in values]
        assert float(mass[row]) == pytest.approx(
            sum(p for p, i in zip(positive, inside, strict=True) if i) / sum(positive)
        )
        assert float(rank[row]) == pytest.approx(reference.relevance_rank(values, inside))
        best = [i for v, i in zip(values, inside, strict=True) if v == max(values)]
        assert len(best) > 1 and float(hit[row]) == pytest.approx(sum(best) / len(best))


def test_localisation_of_oracle_inverse_constant_and_nothing():
    mask = masks()
    rows = slice(2, N)
    share = (mask.flatten(1).double().mean(1))[rows]
    everything = (tool.relevance_mass, tool.relevance_rank, tool.pointing_game)
    for maps, expected in ((mask.float(), 1.0), (1 - mask.float(), 0.0), (torch.ones(N, H, W), share)):
        for function in everything:
            found = function(batch_of(maps, mask=mask))[rows]
            assert torch.allclose(found, torch.as_tensor(expected).double().expand_as(found))
    negative = batch_of(-torch.ones(N, H, W), mask=mask)
    assert tool.relevance_mass(negative).isnan().all()
    assert torch.allclose(tool.relevance_rank(negative)[rows], share)


# ------------------------------------------------------------------------------------- faithfulness

FLIPS = ["insertion", "deletion", "insertion_mean", "deletion_mean"]


@pytest.mark.parametrize("name", FLIPS)
def test_a_constant_map_equals_random_order_exactly(name):
    """M1."""
    assert (METRICS[name].function(batch_of(torch.full((N, H, W), 0.3))) == 0).all()


@pytest.mark.parametrize("name", FLIPS)
def test_curves_equal_the_slow_loop(name):
    """One location at a time, all channels together, on the declared grid, minus the same for the random order."""
    model = convnet()
    maps, x = random_maps(), images()
    batch = batch_of(maps, model=evaluation(model), x=x)
    found = METRICS[name].function(batch)
    fill = tool._fill(batch, "mean" if name.endswith("mean") else "blur")
    assert (fill - x).abs().mean() > 0.05
    if name.endswith("mean"):
        assert torch.allclose(fill, torch.tensor([0.4, 0.5, 0.6]).reshape(1, 3, 1, 1).expand_as(x))
    orders = {"map": maps.flatten(1).argsort(1, descending=True), "random": tool._random_order(batch)}
    areas = {}
    for label, order in orders.items():
        areas[label] = []
        for row in range(N):
            begin, end = (fill[row], x[row]) if name.startswith("insertion") else (x[row], fill[row])
            curve = []
            for step in range(11):
                now = begin.clone()
                for location in order[row, : round(step * H * W / 10)].tolist():
                    now[:, location // W, location % W] = end[:, location // W, location % W]
                curve.append(float(model(now[None]).detach().double().softmax(1)[0, TARGET[row]]))
            areas[label].append(reference.area(curve))
    slow = [a - b for a, b in zip(areas["map"], areas["random"], strict=True)]
    assert found.tolist() == pytest.approx(slow, abs=1e-5) and found.abs().max() > 1e-3


def test_an_oracle_beats_random_order():
    """A linear model whose weights lie within a mask: that mask inserts early and deletes early."""
    model = linear(2, scale=0.0)
    mask = torch.zeros(H, W)
    mask[1:3, 2:5] = 1
    with torch.no_grad():
        model.net[1].weight.copy_(torch.stack([mask.expand(C, H, W), -mask.expand(C, H, W)]).flatten(1))
        model.net[1].bias.zero_()
    x = images() * 0.2
    x[:, :, 1:3, 2:5] += 0.7
    batch = batch_of(mask.expand(N, H, W), model=evaluation(model), x=x)
    batch.target = torch.zeros(N, dtype=torch.int64)
    inverse = batch.with_maps(-mask.expand(N, H, W))
    assert (tool.insertion(batch) > 0).all() and (tool.deletion(batch) < 0).all()
    assert (tool.insertion(inverse) < 0).all() and (tool.deletion(inverse) > 0).all()


def test_chance_maps_come_from_the_same_images():
    batch = batch_of(random_maps(), mask=masks())
    names = ["gini", "insertion", "relevance_mass"]
    found = tool.chance(batch, names)
    assert set(found) == {f"{n}@{r}" for n in names for r in ("random", "edges", "magnitude", "centre", "oracle")}
    assert (found["relevance_mass@oracle"][2:] == 1).all()
    again = tool.chance(batch_of(random_maps(seed=5), mask=masks()), names)
    for key, values in found.items():
        assert torch.equal(values.nan_to_num(-1), again[key].nan_to_num(-1))  # whatever the method's map is


# ---------------------------------------------------------------------------- alignment and stability


def test_alignment_is_a_centred_cosine():
    x = images()
    grey = x.sum(1)
    centred = grey - grey.mean((1, 2), keepdim=True)
    ones = torch.ones(N, dtype=torch.float64)
    assert torch.allclose(tool.alignment(batch_of(-3 * grey + 7, x=x)), ones, atol=1e-5)
    assert tool.alignment(batch_of(torch.ones(N, H, W), x=x)).isnan().all()
    other = random_maps()
    other = other - other.mean((1, 2), keepdim=True)
    expected = (other * centred).flatten(1).sum(1).abs() / (
        other.flatten(1).norm(dim=1) * centred.flatten(1).norm(dim=1)
    )
    assert torch.allclose(tool.alignment(batch_of(other, x=x)), expected.double(), atol=1e-5)


def test_etmann_alignment_of_a_linear_binary_model_is_the_distance_to_the_boundary():
    """M12; without biases, as in Etmann et al.; the scale of the logits drops out."""
    for scale in (1.0, 50.0):
        model = linear(2, scale=scale)
        with torch.no_grad():
            model.net[1].bias.zero_()
        w, x = weights_of(model).double(), images()
        difference = w[0] - w[1]
        distance = (difference * x.double()).flatten(1).sum(1).abs() / difference.norm()
        found = tool.etmann_alignment(batch_of(model=evaluation(model), x=x))
        assert found.tolist() == pytest.approx(distance.tolist(), abs=1e-5)


def test_max_sensitivity_of_constant_gradients_is_zero_and_needs_a_kept_prediction():
    """M6: a linear model's gradient does not move; where no noisy copy keeps the prediction there is no value."""
    model, x = linear(scale=0.2), images()
    spec = Saliency("gradient")
    form = evaluation(model)
    map_ = explain(form, x, TARGET, spec, ids=IDS).attribution
    batch = Batch(form, IDS, x, attribution=map_, explained=x, target=TARGET, saliency=spec)
    assert (tool.max_sensitivity(batch) < 1e-6).all()
    curved = evaluation(convnet())
    map_ = explain(curved, x, TARGET, spec, ids=IDS).attribution
    batch = Batch(curved, IDS, x, attribution=map_, explained=x, target=TARGET, saliency=spec)
    assert (tool.max_sensitivity(batch).nan_to_num(1) > 0).all()
    prediction = curved.logits(x).argmax(1)
    changed = {}

    class Flipping:
        """A model whose prediction on anything but the stored images is another one."""

        block, model = curved.block, curved.model

        def __call__(self, at):
            return curved(at)

        def logits(self, at):
            same = torch.equal(at, x)
            changed[same] = True
            return torch.eye(K)[prediction if same else (prediction + 1) % K]

    batch.evaluation = Flipping()
    assert tool.max_sensitivity(batch).isnan().all() and set(changed) == {True, False}


# ----------------------------------------------------------------------------------------- robustness


def test_accuracies_are_recomputed_from_the_stored_bytes():
    model = evaluation(linear())
    x, other = images(), images(seed=3)
    label = model.logits(x).argmax(1)
    wrong = torch.where(torch.arange(N) < 2, (label + 1) % K, label)
    batch = Batch(model, IDS, x, wrong, adversarial=other, norm="linf", eps=0.5)
    right = model.logits(other).argmax(1) == wrong
    assert tool.clean_accuracy(batch).tolist() == [0, 0, 1, 1, 1, 1, 1]
    assert tool.robust_accuracy(batch).tolist() == (right & (torch.arange(N) >= 2)).double().tolist()
    assert tool.perturbation(batch).tolist() == pytest.approx((other - x).abs().amax((1, 2, 3)).tolist())
    assert tool.ball_violation(batch).tolist() == ((other - x).abs().amax((1, 2, 3)) > 0.5).double().tolist()
    batch.attack_target = model.logits(other).argmax(1)
    assert tool.target_rate(batch).tolist() == [1] * N


def test_ties_are_neither_broken_nor_safe():
    batch = Batch(evaluation(linear()), IDS[:3], images(3), torch.zeros(3, dtype=torch.int64))
    batch.__dict__["adversarial_logits"] = torch.tensor([[1.0, 1.0, 0], [1.0, 1.1, 0], [1.1, 1.0, 0]])
    assert tool.ties(batch).tolist() == [1, 0, 0]


def test_applicable_asks_for_what_a_metric_needs():
    form = evaluation(convnet())
    bare = applicable("attributions", Batch(form, IDS, images()))
    assert bare == []
    full = applicable("attributions", batch_of(random_maps(), mask=masks(), model=form))
    assert {"gini", "relevance_mass", "insertion"} <= set(full) and "ssim" not in full and "max_sensitivity" not in full
    assert "relevance_mass" not in applicable("attributions", batch_of(random_maps(), model=form))


def test_every_metric_declares_unit_direction_and_source():
    for name, entry in METRICS.items():
        assert entry.better in ("higher", "lower") and entry.unit and entry.source, name


# ------------------------------------------------------------------------------------------ inversions


def test_ssim_equals_the_slow_reference():
    a, b = images(3, 2, 13, 17), images(3, 2, 13, 17, seed=8) * 0.3
    mixed = (a * 0.8 + b * 0.5).clamp(0, 1)
    batch = Batch(evaluation(linear()), IDS[:3], a, inverted=mixed)
    slow = [reference.ssim(p.double().numpy(), q.double().numpy(), size=11) for p, q in zip(a, mixed, strict=True)]
    assert tool.ssim(batch).tolist() == pytest.approx(slow, abs=1e-8)
    small = Batch(evaluation(linear()), IDS, images(), inverted=images(seed=1))
    slow = [
        reference.ssim(p.double().numpy(), q.double().numpy(), size=5)
        for p, q in zip(small.image, small.inverted, strict=True)
    ]
    assert tool.ssim(small).tolist() == pytest.approx(slow, abs=1e-8)


def test_an_image_is_itself():
    x = images(N, C, 13, 17)
    batch = Batch(evaluation(convnet()), IDS, x, inverted=x.clone())
    assert tool.ssim(batch).tolist() == pytest.approx([1.0] * N, abs=1e-12)
    for function in (tool.latent_error, tool.pixel_error, tool.low_frequency_error):
        assert (function(batch) == 0).all()


def test_inversion_errors_have_their_units():
    x = images(low=0.2, high=0.5)
    batch = Batch(evaluation(convnet()), IDS, x, inverted=x + 0.25)
    assert tool.pixel_error(batch).tolist() == pytest.approx([0.25] * N, abs=1e-6)
    assert tool.low_frequency_error(batch).tolist() == pytest.approx([0.25] * N, abs=1e-6)
    form = evaluation(convnet())
    with torch.no_grad():
        padded = torch.cat([x, x[:1].expand(32 - N, -1, -1, -1)])
        goal, found = form.features(padded)[:N], form.features(padded + 0.25)[:N]
    expected = (found - goal).norm(dim=1) / goal.norm(dim=1)
    assert tool.latent_error(batch).tolist() == pytest.approx(expected.tolist(), abs=1e-5)


def test_judge_is_the_other_model():
    own, other, x = evaluation(linear(seed=1)), evaluation(linear(seed=7)), images()
    label = other.logits(x).argmax(1)
    batch = Batch(own, IDS, x, label, inverted=x, judge=other)
    assert (tool.judge_accuracy(batch) == 1).all()
    assert torch.equal(tool.own_accuracy(batch), (own.logits(x).argmax(1) == label).double())


# -------------------------------------------------------------------------------------------- rounding


def lattice(x):
    return (x * 255 - (x.double() * 255).round()).abs().max() < 1e-4


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    norm=st.sampled_from(["l2", "linf"]),
    eps=st.floats(0.003, 1.5),
    reach=st.floats(0.2, 1.0),
)
def test_rounding_stays_in_the_ball_of_a_lattice_image(seed, norm, eps, reach):
    """A16: clean images on k / 255, adversarial ones anywhere in ball and box, also on the ball's surface."""
    source = generator(seed)
    clean = torch.randint(0, 256, (3, 2, 4, 5), generator=source).float() / 255
    delta = torch.randn(clean.shape, generator=source)
    delta = NORMS[norm].project(delta * 1e3, eps * reach)
    adversarial = (clean + delta).clamp(0, 1)
    rounded = round_inside(adversarial, clean, norm=norm, eps=eps)
    assert lattice(rounded) and not leaves_ball(rounded, clean, norm=norm, eps=eps).any()
    assert ((rounded - adversarial).abs() < 1 / 255 + 1e-6).all()


def test_rounding_is_to_nearest_where_the_ball_allows():
    clean, adversarial = torch.full((1, 1, 2, 3), 100 / 255), torch.full((1, 1, 2, 3), 101.6 / 255)
    for norm in ("l2", "linf"):
        assert (round_inside(adversarial, clean, norm=norm, eps=1.0) * 255 - 102).abs().max() < 1e-4
    assert (round_inside(adversarial, clean, norm="linf", eps=1.7 / 255) * 255 - 101).abs().max() < 1e-4


def test_round_trip_of_all_levels_is_exact():
    x = (torch.arange(256).float() / 255).reshape(1, 1, 16, 16)
    for norm in ("l2", "linf"):
        found = round_inside(x, x, norm=norm, eps=0.1)
        assert torch.equal(found, x)
        assert torch.equal((found.double() * 255).round().long().flatten(), torch.arange(256))


def test_what_leaves_the_ball_is_seen():
    x = torch.full((5, 1, 2, 3), 0.5)
    y = x.clone()
    y[1] += 0.1001
    y[2, 0, 0, 0] = 1.01
    y[3, 0, 0, 0] = torch.nan
    y[4] += 0.0999
    assert leaves_ball(y, x, norm="linf", eps=0.1).tolist() == [False, True, True, True, False]
    assert leaves_ball(y, x, norm="l2", eps=0.245).tolist() == [False, True, True, True, False]
