"""FAB: the projection onto a plane within the box, and the distances of models whose boundary is known."""

from __future__ import annotations

import copy

import pytest
import torch
from toys import C, H, K, N, W, convnet, evaluation, generator, images, linear, weights_of

from rbkit.tools import attack, losses, stages
from rbkit.tools.fab import project
from rbkit.tools.flow import polling
from rbkit.tools.norms import NORMS
from rbkit.tools.slots import Batch

BOTH = pytest.mark.parametrize("norm", ["l2", "linf"])
IDS = torch.arange(N) * 3 + 1


def attacked(model, spec, x, label, *, ids=IDS, earlier=None):
    context = {"label": label} if earlier is None else {"label": label, "adversarial": earlier}
    return next(stages.run(evaluation(model), spec, polling([Batch(ids, x, context)])))[1]


def slow_project(image, normal, offset, norm):
    """By halving an interval of t in float64, for one image."""
    x, w = image.double().flatten(), normal.double().flatten() * (1 if offset >= 0 else -1)
    room = torch.where(w > 0, 1 - x, x)
    speed = w.abs() if norm == "l2" else torch.ones_like(w)
    low, high = 0.0, 1e6
    for _ in range(200):
        middle = (low + high) / 2
        gained = float((w.abs() * torch.minimum(middle * speed, room)).sum())
        low, high = (middle, high) if gained < abs(float(offset)) else (low, middle)
    return (w.sign() * torch.minimum(high * speed, room)).reshape(image.shape)


@BOTH
def test_projection_equals_the_slow_one(norm):
    """On both sides of the plane, near (nothing is cut), far (most entries are) and out of reach (a corner)."""
    x, normal = images(), torch.randn(N, C, H, W, generator=generator(2)) * 3
    offset = torch.tensor([0.01, -0.5, 4.0, -20.0, 60.0, 1e4, -1e4])
    found = project(x, normal, offset, norm=norm)
    assert ((x + found) >= -1e-6).all() and ((x + found) <= 1 + 1e-6).all()
    gained = (normal.double() * found.double()).sum((1, 2, 3))
    assert gained[:5].tolist() == pytest.approx(offset[:5].tolist(), rel=1e-4)
    for i in range(N):
        assert found[i].numpy() == pytest.approx(slow_project(x[i], normal[i], offset[i], norm).numpy(), abs=2e-5)
    cut = ((x + found) < 1e-6) | ((x + found) > 1 - 1e-6)
    assert int(cut[0].sum()) == 0 < int(cut[2].sum()) < int(cut[4].sum()) < C * H * W == int(cut[5].sum())


@BOTH
def test_projection_of_small_large_and_zero_normals(norm):
    x, normal = images(), torch.randn(N, C, H, W, generator=generator(2))
    plain = project(x, normal, torch.full((N,), 0.3), norm=norm)
    for scale in (1e-25, 1e20):
        scaled = project(x, normal * scale, torch.full((N,), 0.3 * scale), norm=norm)
        assert scaled.numpy() == pytest.approx(plain.numpy(), abs=1e-5)
    assert not project(x, torch.zeros_like(normal), torch.tensor([0.0, 1, -1, 0, 2, 3, 1e9]), norm=norm).any()


@BOTH
def test_a_row_of_the_projection_depends_on_nothing_but_itself(norm):
    x, normal = images(64), torch.randn(64, C, H, W, generator=generator(2))
    offset = torch.linspace(-60, 60, 64)
    whole = project(x, normal, offset, norm=norm)
    order = torch.randperm(64, generator=generator(3))
    assert torch.equal(project(x[order], normal[order], offset[order], norm=norm), whole[order])
    near = offset.abs() < 5  # rows that end early, now without the others that go on
    other = torch.where(near, offset, 0.0)
    assert torch.equal(project(x, normal, other, norm=norm)[near], whole[near])


def distances(model, x, label, norm):
    """To the nearest of the planes between the label and another class of `linear`, in float64, box included."""
    w, bias = weights_of(model).double(), model.net[1].bias.detach().double()
    found = []
    for i in range(len(x)):
        logits = (w * x[i].double()).sum((1, 2, 3)) + bias
        sizes = []
        for k in range(len(w)):
            if k != int(label[i]):
                way = slow_project(x[i], w[k] - w[label[i]], logits[label[i]] - logits[k], norm)
                sizes.append(float(NORMS[norm].size(way[None])[0]))
        found.append(min(sizes))
    return found


@BOTH
@pytest.mark.parametrize("classes", [2, 3, K])
def test_distance_of_a_linear_model_is_the_closed_form(norm, classes):
    """Gaps over the dual norm, and where the box binds the constrained optimum: never below, at most 1 % above (and
    what the tie margin asks for)."""
    model = linear(classes, scale=0.05)
    x = images(low=-0.2, high=1.2).clamp(0, 1)
    label = evaluation(model).logits(x).argmax(1)
    found = attacked(model, attack.fab_t(norm=norm, eps=0.01, steps=20), x, label)
    exact = torch.tensor(distances(model, x, label, norm), dtype=torch.float64)
    distance = found.distance.double()
    assert (distance > exact * (1 - 1e-4)).all() and (distance < 1.01 * exact + 1e-4).all(), distance / exact
    free = [float(losses.margin(evaluation(model).logits(x), label)[i]) for i in range(N)]
    if classes == 2:
        w = weights_of(model).double()
        dual = float((w[0] - w[1]).norm() if norm == "l2" else (w[0] - w[1]).abs().sum())
        assert (exact >= -torch.tensor(free, dtype=torch.float64) / dual - 1e-9).all()


def nearest_by_a_plain_loop(model, x, label, target, norm, steps):
    """Equation (9) and algorithm 1 of the paper for one image and one target in float64, where argmax alone decides."""
    size = NORMS[norm].size
    now, nearest = x.clone(), float("inf")
    for _ in range(steps):
        at = now.clone().requires_grad_()
        logits = model(at)[0]
        gap = logits[target] - logits[label]
        (normal,) = torch.autograd.grad(gap, at)
        value, along = gap.detach()[None], (normal * (now - x)).sum()
        near, far = (project(p, normal, o, norm=norm) for p, o in ((now, -value), (x, along - value)))
        sizes = [float(size(d)) for d in (near, far)]
        share = min(sizes[0] / max(sum(sizes), 1e-16), 0.1)
        now = ((now + 1.05 * near) * (1 - share) + (x + 1.05 * far) * share).clamp(0, 1)
        if int(model(now).argmax(1)) != label:
            nearest = min(nearest, float(size(now - x)))
            now = x + 0.9 * (now - x)
    return nearest


@BOTH
def test_no_search_stays_at_the_boundary(norm):
    """Each image is as near as by a loop in float64: from every point on the boundary the search goes on."""
    model, x = convnet(), images(12)
    label = evaluation(model).logits(x).argmax(1)
    order = evaluation(model).logits(x).argsort(1, descending=True)
    found = attacked(model, attack.fab_t(norm=norm, eps=0.01, steps=40, targets=2), x, label, ids=torch.arange(12))
    double = copy.deepcopy(model).double()
    for row in range(12):
        image = x[row : row + 1].double()
        plain = [
            nearest_by_a_plain_loop(double, image, int(label[row]), int(target), norm, 40) for target in order[row, 1:3]
        ]
        assert float(found.distance[row]) <= 1.01 * min(plain), row


@BOTH
def test_only_points_inside_the_ball_are_results(norm):
    """Success where the distance is at most eps: the image then has that norm; else the image stays as it was."""
    model, x = convnet(), images(30)
    ids, label = torch.arange(30), evaluation(model).logits(x).argmax(1)
    label[4] = (label[4] + 1) % K
    eps = {"l2": 0.06, "linf": 0.008}[norm]
    found = attacked(model, attack.fab_t(norm=norm, eps=eps, steps=15), x, label, ids=ids)
    inside = found.distance <= eps
    assert torch.equal(found.success, inside) and 3 < int(inside.sum()) < 27
    assert float(found.distance[4]) == 0 and torch.equal(found.outcome.images[4], x[4])
    assert torch.equal(found.outcome.images[~inside], x[~inside])
    size = NORMS[norm].size(found.outcome.images - x)
    # The search adds in another order, channels last.
    torch.testing.assert_close(size[inside], found.distance[inside], rtol=1e-6, atol=0)
    assert losses.is_broken(evaluation(model).logits(found.outcome.images), label)[inside].all()
    early = attacked(model, attack.fab_t(norm=norm, eps=eps, steps=15, until="broken"), x, label, ids=ids)
    assert torch.equal(early.success, found.success) and early.distance is None
    assert (early.outcome.backwards <= found.outcome.backwards).all()
    assert int(early.outcome.backwards.sum()) < int(found.outcome.backwards.sum())


def test_what_an_earlier_attack_found_bounds_the_distance_and_stays():
    model, x = convnet(), images(30)
    ids, label = torch.arange(30), evaluation(model).logits(x).argmax(1)
    first = attacked(model, attack.pgd(norm="l2", eps=0.3, steps=5), x, label, ids=ids)
    alone = attacked(model, attack.fab_t(norm="l2", eps=0.3, steps=1), x, label, ids=ids)
    both = attacked(model, attack.fab_t(norm="l2", eps=0.3, steps=1), x, label, ids=ids, earlier=first.outcome.images)
    before = NORMS["l2"].size(first.outcome.images - x)
    expected = torch.where(first.success, torch.minimum(before, alone.distance), alone.distance)
    assert torch.equal(both.distance, expected) and bool((before < alone.distance)[first.success].any())
    assert torch.equal(both.outcome.images[first.success], first.outcome.images[first.success])
    assert torch.equal(both.success, first.success | alone.success)


def test_more_steps_and_restarts_never_find_a_farther_point():
    model, x = convnet(), images(30)
    ids, label = torch.arange(30), evaluation(model).logits(x).argmax(1)
    specs = [attack.fab_t(norm="linf", eps=0.01, steps=s, restarts=r) for s, r in ((1, 1), (6, 1), (6, 3))]
    few, one, three = (attacked(model, spec, x, label, ids=ids) for spec in specs)
    assert (one.distance <= few.distance).all() and (one.distance < few.distance).any()
    assert (three.distance <= one.distance).all()
    assert [f.outcome.backwards.unique().tolist() for f in (few, one, three)] == [[3], [18], [54]]
