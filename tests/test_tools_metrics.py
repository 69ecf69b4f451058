"""Metrics: closed forms, slow loops, undefined rows, and the faults of other people's scorers that must not be here."""

from __future__ import annotations

import copy
import math
from dataclasses import fields, replace

import numpy as np
import pytest
import reference
import torch
import toys
from scipy import ndimage

from rbkit.tools import random
from rbkit.tools.attribution import Saliency
from rbkit.tools.batch import Batch, reduce_channels
from rbkit.tools.metrics import METRICS, applicable, chance, evaluate
from rbkit.tools.norms import NORMS
from rbkit.tools.pool import Pool
from rbkit.tools.references import reference_maps
from rbkit.tools.saliency import explain
from rbkit.tools.stability import NOISE_DRAWS, NOISE_RADIUS

torch.set_num_threads(1)
D = toys.H * toys.W
X = toys.images()
IDS, TARGET = toys.IDS, toys.TARGET
NET = toys.convnet()
EVALUATION = toys.evaluation(NET)
MAPS = torch.randn(toys.N, toys.H, toys.W, generator=toys.generator(4))
MASK = torch.zeros(toys.N, toys.H, toys.W, dtype=torch.uint8)
for row in range(toys.N):
    MASK[row, row % 3 : row % 3 + 2, row % 4 : row % 4 + 2 + row % 2] = 1


def batch(maps=MAPS, mask=None, evaluation=EVALUATION, **more):
    """A batch of attributions whose channels sum to `maps`."""
    n = len(maps)
    share = torch.tensor([0.5, 0.25, 0.25]).reshape(1, 3, 1, 1)
    given = {
        "ids": IDS[:n], "image": X[:n], "explained": X[:n], "target": TARGET[:n], "attribution": maps[:, None] * share,
    }  # fmt: skip
    return Batch(evaluation, mask=mask, **(given | more))


def value(name, given):
    """One metric of a batch, as a list."""
    return evaluate(given, [name])[name].tolist()


# ------------------------------------------------------------------------------------------------- complexity


def test_gini_and_entropy_of_constant_and_of_one_hot_maps():
    maps = torch.zeros(4, toys.H, toys.W)
    maps[0], maps[1, 2, 3], maps[2] = 0.3, -5.0, -0.2
    assert value("gini", batch(maps))[:3] == pytest.approx([0, 1 - 1 / D, 0], abs=1e-6)
    assert value("entropy", batch(maps))[:3] == pytest.approx([math.log(D), 0, math.log(D)], abs=1e-6)
    assert math.isnan(value("gini", batch(maps))[3]) and math.isnan(value("entropy", batch(maps))[3])


def test_gini_and_entropy_are_the_papers():
    for name, slow in (("gini", reference.gini), ("entropy", reference.entropy)):
        expected = [slow(row.flatten().tolist()) for row in batch().maps]
        assert value(name, batch()) == pytest.approx(expected, abs=1e-6)


def test_gini_does_not_depend_on_scale_or_place():
    shuffled = MAPS.flatten(1)[:, torch.randperm(D, generator=toys.generator(0))].reshape(MAPS.shape)
    assert value("gini", batch(shuffled * 1e-6)) == pytest.approx(value("gini", batch()), abs=1e-5)


def test_channels_are_summed_with_or_without_their_signs():
    attribution = torch.tensor([1.0, -3.0, 0.5]).reshape(1, 3, 1, 1).expand(2, 3, 5, 6)
    assert reduce_channels(attribution, signed=True).unique().tolist() == [-1.5]
    assert reduce_channels(attribution, signed=False).unique().tolist() == [4.5]
    given = batch(attribution=attribution, signed=False)
    assert given.maps.unique().tolist() == [4.5]
    assert torch.equal(given.with_maps(MAPS).maps, MAPS)  # reference maps keep their signs


# ----------------------------------------------------------------------------------------------- localisation

LOCAL = ("relevance_mass", "relevance_rank", "pointing_game")


def test_relevance_mass_counts_positive_relevance_alone():
    inside = MASK.bool()
    maps = batch().maps.double()
    expected = [row[m].clamp_min(0).sum() / row.clamp_min(0).sum() for row, m in zip(maps, inside, strict=True)]
    assert value("relevance_mass", batch(mask=MASK)) == pytest.approx([float(e) for e in expected], abs=1e-6)
    lowered = torch.where(MAPS < 0, MAPS * 100, MAPS)
    assert value("relevance_mass", batch(lowered, MASK)) == pytest.approx(value("relevance_mass", batch(mask=MASK)))
    assert all(math.isnan(v) for v in value("relevance_mass", batch(-MAPS.abs(), MASK)))


def test_relevance_rank_is_the_papers_with_and_without_ties():
    for maps in (MAPS, (MAPS * 1.5).round(), torch.ones_like(MAPS), -MAPS.abs()):
        given = batch(maps, MASK)
        expected = [
            reference.relevance_rank(row.flatten().tolist(), m.flatten().bool().tolist())
            for row, m in zip(given.maps, MASK, strict=True)
        ]
        assert value("relevance_rank", given) == pytest.approx(expected, abs=1e-12)


def test_pointing_game_counts_ties_in_part():
    maps = torch.zeros(4, toys.H, toys.W)
    mask = torch.zeros_like(maps, dtype=torch.uint8)
    mask[:, 1, 2:4] = 1
    maps[0, 1, 2] = 1  # a hit
    maps[1, 0, 0] = 1  # a miss
    maps[2, 1, 3] = maps[2, 4, 4] = maps[2, 0, 5] = 2  # one of three
    maps[3] -= 1  # all equal and negative: 2 of 30
    assert value("pointing_game", batch(maps, mask)) == pytest.approx([1, 0, 1 / 3, 2 / D])


def test_cue_mass_counts_both_signs_and_only_the_cue():
    given = replace(batch(mask=torch.ones_like(MASK)), cue_mask=MASK)
    size = given.maps.double().abs()
    expected = [row[m].sum() / row.sum() for row, m in zip(size, MASK.bool(), strict=True)]
    assert value("cue_mass", given) == pytest.approx([float(e) for e in expected], abs=1e-9)
    assert all(
        math.isnan(v) for v in value("cue_mass", replace(given, attribution=torch.zeros_like(given.attribution)))
    )
    assert "cue_mass" not in applicable("attributions", batch(mask=MASK))


@pytest.mark.parametrize("name", LOCAL)
def test_empty_and_full_masks_are_left_out(name):
    # Trap M7: an example without a mask is not a miss, nor one that is all mask a hit.
    mask = MASK.clone()
    mask[1], mask[4] = 0, 1
    undefined = [math.isnan(v) for v in value(name, batch(mask=mask))]
    assert undefined == [False, True, False, False, True, False, False]
    assert METRICS[name].share is False  # so that the share is taken over those that are defined


# ----------------------------------------------------------------------------------------------- faithfulness

CURVES = ("insertion", "deletion", "insertion_mean", "deletion_mean")


def slow_curve(classifier, image, fill, order, target, *, insert):
    """Petsiuk et al. 2018, algorithm 1, in 11 looks: probability of the target, location by location."""
    double = copy.deepcopy(classifier).double().eval()
    found = []
    for look in range(11):
        now = (fill if insert else image).copy()
        for location in order[: round(look * D / 10)]:
            y, x = divmod(int(location), toys.W)
            now[:, y, x] = (image if insert else fill)[:, y, x]
        logits = double(torch.tensor(now)[None])[0].detach().numpy()
        found.append(float(np.exp(reference.log_softmax(logits)[target])))
    return reference.area(found)


def slow_blur(image):
    for axis, radius in ((1, toys.H - 1), (2, toys.W - 1)):
        image = ndimage.gaussian_filter1d(image, 4.0, axis=axis, mode="mirror", radius=radius)
    return image


@pytest.mark.parametrize("name", CURVES)
def test_curves_are_the_slow_loop_above_random_order(name):
    given = batch()
    found = value(name, given)
    shuffles = random.uniform(IDS, (D,), seed=0, purpose="random order").argsort(dim=1, stable=True)
    for row in range(toys.N):
        image = X[row].double().numpy()
        mean = NET.mean.double().reshape(3, 1, 1).expand(3, toys.H, toys.W).numpy()
        fill = mean if name.endswith("_mean") else slow_blur(image)
        order = np.argsort(-given.maps[row].flatten().numpy(), kind="stable")
        areas = [
            slow_curve(NET, image, fill, o, int(TARGET[row]), insert=name.startswith("insertion"))
            for o in (order, shuffles[row].tolist())
        ]
        assert found[row] == pytest.approx(areas[0] - areas[1], abs=1e-5)


@pytest.mark.parametrize("name", CURVES)
def test_a_constant_map_is_exactly_random_order(name):
    assert value(name, batch(torch.full_like(MAPS, -0.7))) == [0.0] * toys.N
    assert max(map(abs, value(name, batch()))) > 1e-3


def telling_model():
    """Two classes told apart by the brightness inside the first mask, and images that are bright there alone."""
    pattern = MASK[0].float()
    model = toys.linear(2, scale=0.0)
    with torch.no_grad():
        model.net[1].weight[1] = pattern.expand(3, -1, -1).flatten()
        model.net[1].bias[1] = -1.5 * pattern.sum()  # half of what a bright mask gives
    return toys.evaluation(model), toys.images(low=0.8, high=1.0) * pattern


def test_the_oracle_beats_random_order():
    evaluation, images = telling_model()
    maps = MASK[:1].float().expand(toys.N, -1, -1)
    given = batch(maps, evaluation=evaluation, explained=images, target=torch.ones_like(TARGET))
    for name in CURVES:
        sign = 1 if METRICS[name].better == "higher" else -1
        assert all(sign * v > 0.02 for v in value(name, given)), name
    worst = replace(given, attribution=-given.attribution)
    for name in CURVES:
        sign = 1 if METRICS[name].better == "higher" else -1
        assert all(sign * v < -0.02 for v in value(name, worst)), name


# ----------------------------------------------------------------------------------------- alignment, stability


def test_alignment_is_the_absolute_correlation_of_map_and_image():
    expected = [
        abs(np.corrcoef(m.flatten().numpy(), x.sum(0).flatten().numpy())[0, 1])
        for m, x in zip(MAPS, X, strict=True)
    ]  # fmt: skip
    assert value("alignment", batch()) == pytest.approx(expected, abs=1e-5)
    assert value("alignment", batch(3 - 2 * X.sum(1))) == pytest.approx([1.0] * toys.N, abs=1e-6)
    assert all(math.isnan(v) for v in value("alignment", batch(torch.zeros_like(MAPS))))


def test_etmann_alignment_of_a_linear_binary_model_is_the_distance_to_its_boundary():
    model = toys.linear(2)
    with torch.no_grad():
        model.net[1].bias.zero_()
    weights = model.net[1].weight.detach()
    normal = (weights[1] - weights[0]).double()
    expected = ((X.flatten(1).double() @ normal).abs() / normal.norm()).tolist()
    assert value("etmann_alignment", batch(evaluation=toys.evaluation(model))) == pytest.approx(expected, rel=1e-4)


def test_completeness_error_is_the_stored_one():
    stored = torch.rand(toys.N, generator=toys.generator(1))
    assert value("completeness_error", batch(completeness=stored)) == stored.double().tolist()


def test_max_sensitivity_leaves_out_copies_that_change_the_prediction():
    model = toys.linear(2)
    evaluation, spec = toys.evaluation(model), Saliency("gradient", output="probability")
    images, ids, target = toys.images(40, low=0.3, high=0.7), torch.arange(40), torch.arange(40) % 2
    normal = model.net[1].weight.detach().diff(dim=0)
    lead = model(images).detach() @ torch.tensor([-1.0, 1.0])
    # The first 30 lie next to the boundary.
    images[:30] -= ((lead[:30, None] - 0.02) * normal / normal.square().sum()).reshape(30, 3, 5, 6)
    attribution = explain(evaluation, images, target, spec, ids=ids).attribution
    given = Batch(
        evaluation, ids, images, explained=images, target=target, attribution=attribution, saliency=spec
    )  # fmt: skip
    worst, kept = [math.nan] * 40, [0] * 40
    for draw in range(NOISE_DRAWS):
        noisy = (images + NORMS["linf"].start(ids, (3, 5, 6), NOISE_RADIUS, seed=0, draw=draw)).clamp(0, 1)
        assert 0.015 < (noisy - images).abs().max() <= NOISE_RADIUS + 1e-6
        again = explain(evaluation, noisy, target, spec, ids=ids).attribution
        for i in range(40):
            if model(noisy)[i].argmax() == model(images)[i].argmax():
                change = (again[i] - attribution[i]).double().norm() / attribution[i].double().norm()
                worst[i], kept[i] = max(float(change), worst[i] if kept[i] else 0.0), kept[i] + 1
    assert set(kept) == {0, 1, 2}
    assert value("max_sensitivity", given) == pytest.approx(worst, rel=1e-5, nan_ok=True)


# -------------------------------------------------------------------------------------------------- inversions


def inversion(inverted, **more):
    return Batch(EVALUATION, IDS, X, inverted=inverted, fit=torch.zeros(toys.N), **more)


def test_the_image_itself_has_no_error():
    given = inversion(X.clone())
    for name in ("latent_error", "pixel_error", "low_frequency_error"):
        assert value(name, given) == [0.0] * toys.N
    assert value("ssim", given) == pytest.approx([1.0] * toys.N, abs=1e-9)


def test_errors_of_inversions_are_their_formulas():
    other = toys.images(seed=9)
    given = inversion(other)
    double = copy.deepcopy(NET).double().eval()
    inputs = []
    double.net.fc.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach()))
    double(X.double()), double(other.double())
    goal, found = inputs
    expected = ((found - goal).norm(dim=1) / goal.norm(dim=1)).tolist()
    assert value("latent_error", given) == pytest.approx(expected, rel=1e-4)
    difference = (other.double() - X.double()).numpy()
    assert value("pixel_error", given) == pytest.approx([np.sqrt((d**2).mean()) for d in difference], rel=1e-6)
    assert value("low_frequency_error", given) == pytest.approx(
        [np.sqrt((slow_blur(d) ** 2).mean()) for d in difference], rel=1e-3
    )
    assert value("own_accuracy", replace(given, label=TARGET)) == (NET(other).argmax(1) == TARGET).double().tolist()
    judge = toys.evaluation(toys.linear())
    expected = (toys.linear()(other).argmax(1) == TARGET).double().tolist()
    assert value("judge_accuracy", replace(given, label=TARGET, judge=judge)) == expected
    assert expected != value("own_accuracy", replace(given, label=TARGET))
    # The linear judge's features are the pixels.
    expected = [float(np.linalg.norm(d)) for d in difference]
    assert value("feature_distance", replace(given, judge=judge)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("height", "width", "size"), [(5, 6, 5), (12, 14, 11), (4, 9, 3)])
def test_ssim_is_the_papers(height, width, size):
    first = toys.images(3, 2, height, width, seed=1)
    second = (first + 0.3 * toys.images(3, 2, height, width, seed=2, low=-1)).clamp(0, 1)
    found = value("ssim", Batch(EVALUATION, IDS[:3], first, inverted=second))
    slow = [
        reference.ssim(a.double().numpy(), b.double().numpy(), size=size) for a, b in zip(first, second, strict=True)
    ]
    assert found == pytest.approx(slow, abs=1e-9)
    assert max(found) < 0.95


# -------------------------------------------------------------------------------------------------- robustness


def test_robustness_metrics_of_a_linear_model():
    model = toys.linear()
    evaluation = toys.evaluation(model)
    label = model(X).argmax(1)
    label[5] = (label[5] + 1) % toys.K  # wrong on the clean image already
    weights = toys.weights_of(model)
    adversarial = X.clone()
    adversarial[1:3] = (X[1:3] + 0.4 * (weights[(label[1:3] + 1) % 4] - weights[label[1:3]]).sign()).clamp(0, 1)
    target = (label + 1) % toys.K
    given = Batch(
        evaluation, IDS, X, label=label, adversarial=adversarial, norm="linf", eps=0.3, attack_target=target
    )  # fmt: skip
    clean = [1.0, 1, 1, 1, 1, 0, 1]
    broken = model(adversarial).argmax(1) != label
    assert broken[1:3].all()
    assert value("clean_accuracy", given) == clean
    assert value("robust_accuracy", given) == [1.0, 0, 0, 1, 1, 0, 1]
    assert value("target_rate", given) == (model(adversarial).argmax(1) == target).double().tolist()
    assert value("perturbation", given) == pytest.approx([0, 0.4, 0.4, 0, 0, 0, 0], abs=1e-6)
    assert value("ball_violation", given) == [0, 1, 1, 0, 0, 0, 0]
    assert value("perturbation", replace(given, norm="l2")) == pytest.approx(
        (adversarial - X).double().flatten(1).norm(dim=1).tolist(), rel=1e-6
    )


def test_minimal_distance_is_capped_by_what_the_stored_images_prove():
    """A claim stands where nothing contradicts it: 0 where the clean image is misclassified, else at most the norm of a
    perturbation that breaks the row."""
    model = toys.linear()
    label = model(X).argmax(1)
    label[5] = (label[5] + 1) % toys.K
    weights = toys.weights_of(model)
    adversarial = X.clone()
    adversarial[1:3] = (X[1:3] + 0.4 * (weights[(label[1:3] + 1) % 4] - weights[label[1:3]]).sign()).clamp(0, 1)
    assert (model(adversarial).argmax(1) != label)[1:3].all()
    claimed = torch.tensor([0.7, 0.9, 0.1, 0.2, math.inf, 3.0, -1.0])
    given = Batch(
        toys.evaluation(model), IDS, X, label=label, adversarial=adversarial, norm="linf", eps=0.5, distance=claimed
    )
    found = value("minimal_distance", given)
    assert found == pytest.approx([0.7, 0.4, 0.1, 0.2, math.inf, 0, 0], abs=1e-6)


def test_an_attack_smaller_than_half_a_level_does_not_survive_the_png():
    model = toys.linear(2)
    image = ((X[:1] * 253 + 1).round() / 255).expand(2, -1, -1, -1).contiguous()
    difference = toys.weights_of(model)[1] - toys.weights_of(model)[0]
    with torch.no_grad():  # class 0 leads by what 0.3 levels in every entry undo
        lead = 0.3 / 255 * difference.abs().sum()
        model.net[1].bias[0] += (model(image)[0] @ torch.tensor([-1.0, 1.0])) + lead
    step = torch.tensor([0.4, 2.0]).reshape(2, 1, 1, 1) / 255
    adversarial = image + step * difference.sign()
    given = Batch(
        toys.evaluation(model), IDS[:2], image, label=torch.tensor([0, 0]), adversarial=adversarial, norm="linf", eps=0.01
    )  # fmt: skip
    assert value("robust_accuracy", given) == [0, 0]
    assert value("robust_accuracy_png", given) == [1, 0]


def test_a_tie_is_neither_broken_nor_clean_loss():
    model = toys.linear(2)
    with torch.no_grad():
        model.net[1].weight[1] = model.net[1].weight[0]
        model.net[1].bias.copy_(torch.tensor([0.0, 0.0]))
    given = Batch(toys.evaluation(model), IDS, X, label=torch.zeros_like(TARGET), adversarial=X)
    assert value("ties", given) == [1.0] * toys.N
    assert value("robust_accuracy", given) == [1.0] * toys.N
    other = Batch(EVALUATION, IDS, X, label=NET(X).argmax(1), adversarial=X)
    assert value("ties", other) == [0.0] * toys.N


# ------------------------------------------------------------------------------------- the table as a whole


def full_batch():
    """A batch that has everything."""
    spec = Saliency("shap", samples=3, output="probability")
    background = toys.images(11, seed=5)
    explained = explain(EVALUATION, X, TARGET, spec, ids=IDS, background=background)
    return Batch(
        EVALUATION, IDS, X, label=TARGET, adversarial=toys.images(seed=3), norm="l2", eps=0.5, attack_target=TARGET, distance=torch.rand(toys.N, generator=toys.generator(6)),
        attribution=explained.attribution, explained=X, target=TARGET, saliency=spec, mask=MASK, cue_mask=MASK,
        completeness=explained.completeness_error, inverted=toys.images(seed=4), fit=torch.zeros(toys.N),
        background=background, judge=toys.evaluation(toys.linear()),
    )  # fmt: skip


BANDED = [name for name, entry in METRICS.items() if entry.band]


def test_a_full_batch_has_all_metrics_and_a_bare_one_those_it_can():
    given = full_batch()
    kinds = ("adversarial", "attributions", "inversions")
    assert {name for kind in kinds for name in applicable(kind, given, METRICS)} == set(METRICS)
    assert {name for kind in kinds for name in applicable(kind, given)} == {n for n, e in METRICS.items() if e.default}
    assert "max_sensitivity" not in applicable("attributions", replace(given, background=None))  # shap needs them
    assert applicable("attributions", Batch(EVALUATION, IDS, X)) == []
    assert "relevance_mass" not in applicable("attributions", replace(given, mask=None))
    assert applicable("clean", given) == ["clean_accuracy"]


def test_no_metric_changes_its_input():
    # Trap S9: Quantus' sparseness adds 1e-7 to the caller's attributions.
    given = full_batch()
    before = {f.name: t.clone() for f in fields(given) if isinstance(t := getattr(given, f.name), torch.Tensor)}
    state = {name: t.clone() for name, t in EVALUATION.state_dict().items()}
    evaluate(given, list(METRICS))
    chance(given, BANDED)
    for name, tensor in before.items():
        assert torch.equal(getattr(given, name), tensor), name
    assert all(torch.equal(EVALUATION.state_dict()[name], t) for name, t in state.items())


def test_a_value_depends_on_no_other_row_and_no_other_metric():
    given = full_batch()
    whole = evaluate(given, list(METRICS)) | chance(given, BANDED)
    index = torch.tensor([5, 2, 6])
    shared = {"shared": {}, "background": given.background}
    rows = {
        f.name: t[index] for f in fields(given) if isinstance(t := getattr(given, f.name), torch.Tensor)
    } | shared  # fmt: skip
    for name in METRICS:
        alone = evaluate(replace(given, **rows | {"shared": {}}), [name])[name]
        assert torch.equal(alone.nan_to_num(-9), whole[name][index].nan_to_num(-9)), name
    part = chance(replace(given, **rows | {"shared": {}}), BANDED)
    assert all(torch.allclose(v, whole[n][index], atol=1e-12, equal_nan=True) for n, v in part.items())


# ------------------------------------------------------------------------------------------------ chance bands


def test_reference_maps_are_what_their_names_say():
    found = reference_maps(batch(mask=MASK))
    assert set(found) == {"random", "edges", "magnitude", "centre", "oracle"}
    assert set(reference_maps(batch())) == set(found) - {"oracle"}
    assert all(m.shape == MAPS.shape for m in found.values())
    grey = X.double().mean(1).numpy()
    edges = [np.hypot(*(ndimage.sobel(g, axis, mode="nearest") for axis in (0, 1))) for g in grey]
    np.testing.assert_allclose(found["edges"].numpy(), edges, atol=1e-5)
    np.testing.assert_allclose(found["magnitude"].numpy(), np.abs(grey - grey.mean((1, 2), keepdims=True)), atol=1e-6)
    assert found["centre"][0].argmax() in (14, 15)  # the middle row of 5, one of the middle columns of 6
    assert torch.equal(found["oracle"], MASK.float())


def test_chance_values_are_those_of_the_reference_maps_and_know_no_method():
    given = batch(mask=MASK, cue_mask=MASK)
    found = chance(given, BANDED)
    assert set(found) == {f"{n}@{r}" for n in BANDED for r in ("random", "edges", "magnitude", "centre", "oracle")}
    for name in ("gini", "relevance_mass", "deletion"):
        edges = batch(reference_maps(given)["edges"], MASK)
        assert found[f"{name}@edges"].tolist() == pytest.approx(value(name, edges), abs=1e-6)
    for name in LOCAL:
        assert found[f"{name}@oracle"].tolist() == [1.0] * toys.N
    other = chance(batch(-MAPS * 2, MASK, signed=False, cue_mask=MASK), BANDED)
    assert all(torch.equal(other[name], found[name]) for name in found)


def test_a_random_map_lies_within_its_chance_band():
    model = toys.evaluation(toys.linear(), block=256)
    names = ("insertion", "relevance_mass", "relevance_rank", "gini")
    z = []
    for study in range(25):
        ids = torch.arange(60) + 1000 * study
        images, maps = toys.images(60, seed=study), random.normal(ids, (5, 6), seed=1, purpose="test map").abs()
        mask = MASK[torch.arange(60) % toys.N]
        given = Batch(
            model, ids, images, explained=images, target=ids % 4, attribution=maps[:, None], mask=mask
        )  # fmt: skip
        pool = Pool({})
        pool.add(ids, evaluate(given, list(names)) | chance(given, list(names)), origin="-", total=60, first=0)
        z.append([r["z"] for r in pool.records() if r["metric"] in names])
    found = torch.tensor(z)
    assert found.mean(0).abs().max() < 4 / 25**0.5
    assert ((found.std(0) > 0.6) & (found.std(0) < 1.5)).all()
