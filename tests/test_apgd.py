"""APGD: its schedule, the algorithm of the paper step by step, optima, targets, and models of few classes."""

from __future__ import annotations

import pytest
import reference
import torch
from toys import C, H, K, N, W, convnet, evaluation, generator, images, linear, weights_of

from rbkit.tools import attack, losses, stages
from rbkit.tools.apgd import Apgd, checkpoints
from rbkit.tools.ascend import ascend
from rbkit.tools.flow import polling
from rbkit.tools.models import Classifier
from rbkit.tools.norms import NORMS
from rbkit.tools.slots import Batch

BOTH = pytest.mark.parametrize("norm", ["l2", "linf"])
IDS = torch.arange(N) * 3 + 1


def attacked(model, spec, x, label, *, ids=IDS):
    return next(stages.run(evaluation(model), spec, polling([Batch(ids, x, {"label": label})])))[1]


def predictions(model, x):
    return evaluation(model).logits(x).argmax(1)


def test_checkpoints_are_those_of_the_paper():
    assert checkpoints(100) == [22, 41, 57, 70, 80, 87, 93, 99]
    assert checkpoints(10) == [3, 5, 6, 7, 8, 9]
    assert checkpoints(1) == []


# ----------------------------------------------------------------------------------- the algorithm, slowly


def slow_apgd(x, measure, *, norm, eps, steps):
    """Algorithm 1 in float64 for one image, from the image itself: (best value, best point, halvings)."""

    def project(point):
        delta = point - x
        if norm == "l2":
            delta = delta * min(1.0, eps / max(float(delta.norm()), 1e-30))
        return (x + delta.clamp(-eps, eps) if norm == "linf" else x + delta).clamp(0, 1)

    def rise(point, size):
        gradient = measure(point)[1]
        unit = gradient.sign() if norm == "linf" else gradient / gradient.norm()
        return project(point + size * unit)

    size, points, values = 2 * eps, [x], [measure(x)[0]]
    points.append(rise(x, size))
    values.append(measure(points[1])[0])
    best = max(range(2), key=lambda k: values[k])
    top, best_value, halvings = points[best], values[best], []
    last, seen, changed, rises = 0, values[0], True, int(values[1] > values[0])
    for k in range(1, steps + 1):
        if k in checkpoints(steps):
            few = rises < 0.75 * (k - last)
            stuck = not changed and best_value <= seen
            changed = few or stuck
            if changed:
                size, halvings = size / 2, [*halvings, k]
                points[k], values[k] = top, best_value
            last, seen, rises = k, best_value, 0
        if k == steps:
            break
        aim = rise(points[k], size)
        points.append(project(points[k] + 0.75 * (aim - points[k]) + 0.25 * (points[k] - points[k - 1])))
        values.append(measure(points[-1])[0])
        rises += values[-1] > values[-2]
        if values[-1] > best_value:
            top, best_value = points[-1], values[-1]
    return best_value, top, halvings


@BOTH
def test_apgd_equals_the_slow_algorithm(norm):
    """Steps too long at first, so that halving and going back happen, at different checkpoints in different rows."""
    model, eps, steps = convnet(), {"l2": 1.2, "linf": 0.15}[norm], 18
    x = images(high=0.7)
    label = predictions(model, x)
    plan = Apgd(NORMS[norm], eps, steps)
    found = ascend(attack.objective(evaluation(model)), plan, Batch(IDS, x, {"label": label}), block=32)
    double = Classifier(model.net, mean=[0.4, 0.5, 0.6], std=[0.2, 0.25, 0.3]).double().eval()
    halved = set()
    for i in range(N):

        def measure(point, y=label[i : i + 1]):
            at = point[None].clone().requires_grad_()
            value = losses.cross_entropy(double(at), y).sum()
            return float(value.detach()), torch.autograd.grad(value, at)[0][0]

        value, top, halvings = slow_apgd(x[i].double(), measure, norm=norm, eps=eps, steps=steps)
        halved.add(tuple(halvings))
        assert float(found.value[i]) == pytest.approx(value, rel=2e-3)
        assert (found.images[i] - top).abs().mean() < 0.02 * eps
    assert len(halved) > 1 and any(halved)
    model.float()


@BOTH
def test_apgd_reaches_the_analytic_optimum_of_a_linear_model(norm):
    """Two classes, where the margin stands in for dlr: it grows by eps times the dual norm."""
    model, eps = linear(2), 0.02
    x = images(low=0.3, high=0.7)
    label = predictions(model, x)
    found = attacked(model, attack.apgd_dlr(norm=norm, eps=eps, steps=10, until="end"), x, label).outcome
    w, bias = weights_of(model).double(), model.net[1].bias.detach()
    for i in range(N):
        y = int(label[i])
        logits = [float((w[k] * x[i].double()).sum()) + float(bias[k]) for k in range(2)]
        best = reference.linear_optimum((w[1 - y] - w[y]).numpy(), logits[1 - y] - logits[y], eps, norm)
        assert float(found.value[i]) == pytest.approx(best, abs=5e-5)


@BOTH
def test_result_lies_in_ball_and_box(norm):
    model, x = convnet(), images(40, low=-0.3, high=1.3).clamp(0, 1)
    eps = {"l2": 1.3, "linf": 0.11}[norm]
    spec = attack.apgd_ce(norm=norm, eps=eps, steps=6, until="end")
    found = attacked(model, spec, x, predictions(model, x), ids=torch.arange(40)).outcome.images
    assert found.dtype == torch.float32 and found.min() >= 0 and found.max() <= 1
    size = NORMS[norm].size(found.double() - x.double())
    assert (size <= eps * (1 + 1e-6) + 1e-7).all() and (size > 0.5 * eps).all()


def test_k_steps_are_k_gradients_for_each_restart_and_target():
    model, x = convnet(), images()
    label = predictions(model, x)
    common = {"norm": "l2", "eps": 1e-4, "steps": 5}
    ce = attacked(model, attack.apgd_ce(**common, restarts=2), x, label).outcome
    assert ce.backwards.tolist() == [10] * N and ce.forwards.tolist() == [12] * N
    aimed = attacked(model, attack.apgd_t(**common, restarts=2), x, label).outcome
    assert aimed.backwards.tolist() == [10 * (K - 1)] * N and aimed.forwards.tolist() == [12 * (K - 1)] * N


def test_a_refilled_slot_starts_over():
    """70 rows through 32 slots; some fall at once, so that slots are given on in the middle of others' schedules."""
    model, x, ids = convnet(), images(70), torch.arange(70)
    label = predictions(model, x)
    plan = attack.apgd_ce(norm="l2", eps=0.2, steps=7).ascent()
    goal = attack.objective(evaluation(model))
    whole = ascend(goal, plan, Batch(ids, x, {"label": label}), block=32)
    assert whole.backwards.unique().numel() > 3
    for row in (3, 40, 69):
        alone = ascend(
            goal, plan, Batch(ids[row : row + 1], x[row : row + 1], {"label": label[row : row + 1]}), block=32
        )
        assert torch.equal(alone.images[0], whole.images[row]) and alone.backwards[0] == whole.backwards[row]


# ----------------------------------------------------------------------------------------------- targets


def test_targeted_losses_equal_their_definitions():
    logits = torch.randn(N, 6, generator=generator(0))
    label, target = torch.arange(N) % 6, (torch.arange(N) + 2) % 6
    for i, row in enumerate(logits.double().tolist()):
        top = sorted(row, reverse=True)
        gap = row[int(target[i])] - row[int(label[i])]
        assert float(losses.targeted_margin(logits, label, target)[i]) == pytest.approx(gap, abs=1e-6)
        ratio = gap / (top[0] - (top[2] + top[3]) / 2)
        assert float(losses.targeted_dlr(logits, label, target)[i]) == pytest.approx(ratio, rel=1e-5)
    with pytest.raises(ValueError, match="at least 4 classes"):
        losses.targeted_dlr(logits[:, :3], label % 3, target % 3)


def test_targets_are_the_likeliest_others_in_order():
    logits = torch.tensor([[3.0, 1.0, 2.0, 5.0], [0.0, 0.0, 9.0, 0.0]])
    assert stages.likeliest_others(logits, torch.tensor([0, 2]), 9).tolist() == [[3, 2, 1], [0, 1, 3]]
    assert stages.likeliest_others(logits, torch.tensor([3, 0]), 2).tolist() == [[0, 2], [2, 1]]
    with pytest.raises(ValueError, match="at least 2 classes"):
        stages.likeliest_others(logits[:, :1], torch.tensor([0, 0]), 9)


def test_each_target_has_its_turn_in_each_restart():
    asked = []

    def measure(x, context):
        asked.append(context["target"][:2].tolist())
        return x.flatten(1).sum(1), torch.zeros(len(x), dtype=torch.bool)

    targets = torch.tensor([[3, 1, 2], [0, 2, 3]])
    context = {"targets": targets, "target": targets[:, 0].clone()}
    plan = Apgd(NORMS["l2"], 0.1, 2, restarts=2)
    ascend(measure, plan, Batch(torch.arange(2), images(2), context), block=32)
    turn = [[3, 0]] * 3 + [[1, 2]] * 3 + [[2, 3]] * 3
    assert asked == turn * 2


def test_any_wrong_class_is_a_success():
    """Only class 3 can be reached, the last of the targets."""
    model = linear(4)
    with torch.no_grad():
        model.net[1].weight.zero_()
        model.net[1].weight[3] = 1.0
        model.net[1].bias.copy_(torch.tensor([0.5, 0.3, 0.2, -C * H * W * 0.5]))
    x, label = torch.full((N, C, H, W), 0.5), torch.zeros(N, dtype=torch.int64)
    found = attacked(model, attack.apgd_t(norm="linf", eps=0.1, steps=3), x, label)
    assert found.success.all() and found.target is None and (found.outcome.backwards > 3).all()


@pytest.mark.parametrize("classes", [2, 3, 4, 5])
def test_models_of_few_classes(classes):
    """The margin stands in where dlr is not defined, targets are as many as there are other classes; both recorded."""
    model, x = linear(classes, scale=0.2), images()
    label = predictions(model, x)
    for make, loss, least in ((attack.apgd_t, "dlr", 4), (attack.apgd_dlr, "dlr", 3), (attack.apgd_ce, "ce", 2)):
        spec = make(norm="l2", eps=5.0, steps=6)
        assert attacked(model, spec, x, label).success.all()
        assert spec.settled(classes).loss == (loss if classes >= least else "margin")
    assert attack.apgd_t(norm="l2", eps=1.0).settled(classes).targets == classes - 1
    assert attack.pgd(norm="l2", eps=1.0, loss="dlr").settled(classes).loss == "dlr"  # asked for by name: refused


def test_one_channel_and_odd_shapes():
    shape = (1, 4, 9)
    model = linear(4, shape=shape, scale=0.2)
    x = images(5, *shape)
    label = predictions(model, x)
    for spec in (
        attack.apgd_ce(norm="linf", eps=0.8, steps=8),
        attack.apgd_t(norm="l2", eps=4.0, steps=8),
        attack.fab_t(norm="l2", eps=4.0, steps=8),
        attack.square(norm="linf", eps=0.8, queries=50),
        attack.square(norm="l2", eps=4.0, queries=50),
    ):
        found = attacked(model, spec, x, label, ids=torch.arange(5))
        assert found.outcome.images.shape == x.shape and int(found.success.sum()) >= 3, spec
