"""The ascent loop and the attacks on it: optima, budgets, best iterates, restarts, order and refilling."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace

import pytest
import reference
import torch
import toys
from toys import C, H, K, N, W, convnet, evaluation, generator, images, linear, randomise, weights_of

from rbkit.tools import ascend as loop
from rbkit.tools import attack, losses, stages
from rbkit.tools.architectures import build
from rbkit.tools.ascend import Plan, ascend
from rbkit.tools.flow import Flow, finished, polling
from rbkit.tools.models import Classifier
from rbkit.tools.norms import L2, LINF, NORMS, per_row
from rbkit.tools.slots import Batch

BOTH = pytest.mark.parametrize("norm", ["l2", "linf"])
IDS = torch.arange(N) * 3 + 1


def attacked(model, spec, x, label, *, ids=IDS, context=None, block=32):
    """The result of one batch."""
    batch = Batch(ids, x, {"label": label} | (context or {}))
    return next(stages.run(evaluation(model, block), spec, polling([batch])))[1]


def predictions(model, x):
    return evaluation(model).logits(x).argmax(1)


# ------------------------------------------------------------------------------------------ losses


def test_losses_equal_their_definitions():
    logits = torch.randn(N, K, generator=generator(0))
    label = torch.arange(N) % K
    for i, row in enumerate(logits.double().numpy()):
        y = int(label[i])
        others = sorted((v for k, v in enumerate(row) if k != y), reverse=True)
        top = sorted(row, reverse=True)
        assert float(losses.cross_entropy(logits, label)[i]) == pytest.approx(-reference.log_softmax(row)[y], abs=1e-6)
        assert float(losses.margin(logits, label)[i]) == pytest.approx(others[0] - row[y], abs=1e-6)
        assert float(losses.dlr(logits, label)[i]) == pytest.approx((others[0] - row[y]) / (top[0] - top[2]), rel=1e-5)


def test_dlr_refuses_two_classes():
    with pytest.raises(ValueError, match="at least 3 classes"):
        losses.dlr(torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64))


def test_cross_entropy_survives_large_and_shifted_logits():
    logits = torch.tensor([[1e4, 0.0, -1e4]])
    assert losses.cross_entropy(logits, torch.tensor([2])).item() == pytest.approx(2e4)
    small = torch.randn(3, 5, generator=generator(0))
    label = torch.tensor([0, 1, 2])
    assert losses.cross_entropy(small + 100, label) == pytest.approx(losses.cross_entropy(small, label), abs=1e-4)


def test_a_tie_is_not_broken():
    logits = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0 + 5e-6, 0.0], [1.0, 1.0 + 5e-5, 0.0], [1.0, 0.5, 0.0]])
    label = torch.zeros(4, dtype=torch.int64)
    assert losses.is_broken(logits, label).tolist() == [False, False, True, False]


# ------------------------------------------------------------------------------- one model, one optimum


@BOTH
def test_pgd_reaches_the_analytic_optimum_of_a_linear_model(norm):
    """A9: two classes, eps small enough for the box: the margin grows by eps times the dual norm."""
    model, eps = linear(2), 0.02
    x = images(low=0.3, high=0.7)
    label = predictions(model, x)
    spec = attack.pgd(norm=norm, eps=eps, steps=5, start="clean", loss="margin", until="end")
    found = attacked(model, spec, x, label).outcome
    w, bias = weights_of(model).double(), model.net[1].bias.detach()
    for i in range(N):
        y = int(label[i])
        direction = (w[1 - y] - w[y]).numpy()
        logits = [float((w[k] * x[i].double()).sum()) + float(bias[k]) for k in range(2)]
        best = reference.linear_optimum(direction, logits[1 - y] - logits[y], eps, norm)
        assert float(found.value[i]) == pytest.approx(best, abs=2e-5)
        reached = x[i].double().numpy() + eps * reference.sign_or_unit(direction, norm)
        assert found.images[i].numpy() == pytest.approx(reached, abs=1e-5)


@BOTH
def test_iterates_equal_the_slow_loop(norm):
    """Box and ball both bind, and the direction changes on the way; the last iterate is compared."""
    model, eps, steps = convnet(), 0.3, 4
    x = images(high=0.4)
    label = predictions(model, x)
    plan = Plan(NORMS[norm], eps, 0.15, steps, keep="last")
    found = ascend(attack.objective(evaluation(model)), plan, Batch(IDS, x, {"label": label}), block=32)
    double = Classifier(model.net, mean=[0.4, 0.5, 0.6], std=[0.2, 0.25, 0.3]).double().eval()
    for i in range(N):

        def gradient(point, y=label[i : i + 1]):
            at = torch.tensor(point)[None].requires_grad_()
            return torch.autograd.grad(losses.cross_entropy(double(at), y).sum(), at)[0][0].numpy()

        slow = reference.pgd(x[i].double().numpy(), gradient, norm=norm, eps=eps, step=0.15, steps=steps)
        assert found.images[i].numpy() == pytest.approx(slow[-1], abs=2e-4)
    model.float()


@BOTH
def test_fgsm_is_one_step_of_pgd(norm):
    model, x = convnet(), images()
    label = predictions(model, x)
    one = attacked(model, attack.fgsm(norm=norm, eps=0.1), x, label)
    pgd = attacked(model, attack.pgd(norm=norm, eps=0.1, steps=1, step_size=0.1, start="clean"), x, label)
    assert torch.equal(one.outcome.images, pgd.outcome.images)
    assert not torch.equal(one.outcome.images, x)


@BOTH
def test_eps_zero_returns_the_image(norm):
    model, x = convnet(), images()
    found = attacked(model, attack.pgd(norm=norm, eps=0.0, steps=3), x, predictions(model, x))
    assert torch.equal(found.outcome.images, x) and not found.success.any()


@BOTH
def test_result_lies_in_ball_and_box_as_stored(norm):
    """A1, on float32, with images that touch the box and starts at random."""
    model = convnet()
    x = images(40, low=-0.3, high=1.3).clamp(0, 1)
    eps = {"l2": 1.3, "linf": 0.11}[norm]
    spec = attack.pgd(norm=norm, eps=eps, steps=3, until="end")
    found = attacked(model, spec, x, predictions(model, x), ids=torch.arange(40)).outcome.images
    assert found.dtype == torch.float32 and found.min() >= 0 and found.max() <= 1
    size = NORMS[norm].size(found.double() - x.double())
    assert (size <= eps * (1 + 1e-6) + 1e-7).all() and (size > 0.5 * eps).all()


# ----------------------------------------------------------------------------------- budget and iterates


class Counting:
    """An objective that notes how often it is called and differentiated, and the value of every row it saw."""

    def __init__(self, values=None):
        self.forwards, self.values = 0, values

    def __call__(self, x, context):
        self.forwards += 1
        return (x * context["slope"][:, None, None, None]).flatten(1).sum(1), torch.zeros(len(x), dtype=torch.bool)


def test_k_steps_are_k_gradients_and_one_forward_more(monkeypatch):
    """A5, counted at the autograd engine and in the outcome."""
    calls = Counter()
    real = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: calls.update(["backward"]) or real(*a, **k))
    goal = Counting()
    batch = Batch(IDS, images(), {"slope": torch.ones(N)})
    found = ascend(goal, Plan(L2, 1.0, 0.1, 6), batch, block=32)
    assert (goal.forwards, calls["backward"]) == (7, 6)
    assert found.forwards.tolist() == [7] * N and found.backwards.tolist() == [6] * N
    twice = ascend(goal, Plan(L2, 1.0, 0.1, 6, restarts=3), batch, block=32)
    assert twice.forwards.tolist() == [21] * N and twice.backwards.tolist() == [18] * N


def scripted(table):
    """An objective whose value at the t-th evaluation of each row is table[t][row]; its gradient is all ones."""
    seen = Counter()

    def measure(x, context):
        rows = context["row"].tolist()
        seen["turn"] += 1
        value = torch.tensor([table[min(seen["turn"], len(table)) - 1][r] for r in rows])
        return value + (x - x.detach()).flatten(1).sum(1), torch.zeros(len(x), dtype=torch.bool)

    return measure


def test_best_iterate_is_per_example_and_the_last_one_counts():
    """Row 0 peaks at the start, row 1 in the middle, row 2 after the last step."""
    table = [[9.0, 1.0, 1.0], [2.0, 7.0, 2.0], [3.0, 2.0, 3.0], [4.0, 3.0, 8.0]]
    x = images(3, low=0.2, high=0.3)
    batch = Batch(torch.arange(3), x, {"row": torch.arange(3)})
    found = ascend(scripted(table), Plan(NORMS["linf"], 0.5, 0.1, 3), batch, block=32)
    assert found.value.tolist() == [9.0, 7.0, 8.0]
    for row, steps in enumerate((0, 1, 3)):
        assert found.images[row].numpy() == pytest.approx((x[row] + 0.1 * steps).numpy(), abs=1e-6)
    last = ascend(scripted(table), Plan(NORMS["linf"], 0.5, 0.1, 3, keep="last"), batch, block=32)
    assert last.value.tolist() == [4.0, 3.0, 8.0]


def test_a_reached_goal_beats_a_higher_value():
    def measure(x, context):
        level = x.flatten(1).mean(1)
        return -level, (level < 0.35) & (level > 0.25)

    x = torch.full((2, C, H, W), 0.4)
    start = Plan(NORMS["linf"], 0.4, 0.1, 3, stop=False)
    found = ascend(measure, start, Batch(torch.arange(2), x, {}), block=32)
    assert found.reached.all() and found.images.mean().item() == pytest.approx(0.3, abs=1e-6)


def test_zero_gradients_leave_the_image_and_are_counted():
    """A8."""
    batch = Batch(IDS, images(), {"slope": torch.tensor([0.0] + [1.0] * (N - 1))})
    found = ascend(Counting(), Plan(L2, 1.0, 0.1, 4), batch, block=32)
    assert torch.equal(found.images[0], batch.clean[0]) and found.images.isfinite().all()
    assert found.zero_gradients.tolist() == [4] + [0] * (N - 1)


def test_restarts_keep_the_worst_of_each_example():
    """A6: each row is broken in exactly one restart, another one for each row."""

    def start(ids, clean, restart):
        return torch.where((restart == ids)[:, None, None, None], torch.ones_like(clean), clean)

    def measure(x, context):
        level = x.flatten(1).mean(1)
        return level, level > 0.99

    x = torch.full((4, C, H, W), 0.5)
    plan = Plan(L2, 100.0, 0.0, 1, restarts=4, start=start)
    found = ascend(measure, plan, Batch(torch.arange(4), x, {}), block=32)
    assert found.reached.all()
    fewer = ascend(measure, replace(plan, restarts=2), Batch(torch.arange(4), x, {}), block=32)
    assert fewer.reached.tolist() == [True, True, False, False]


@BOTH
def test_more_restarts_never_help_the_defender(norm):
    """A2: starts are nested, so success and loss can only grow."""
    model, x = convnet(), images(30)
    ids, label = torch.arange(30), predictions(model, x)
    values = []
    for restarts in (1, 2, 4):
        spec = attack.pgd(norm=norm, eps=0.05, steps=2, restarts=restarts, until="end")
        found = attacked(model, spec, x, label, ids=ids)
        values.append((found.success, found.outcome.value))
    for (few, low), (many, high) in itertools.pairwise(values):
        assert (many >= few).all()
        assert (high >= low)[few == many].all()
    assert (values[2][1] > values[0][1]).any()


def test_stopping_at_the_first_success_saves_gradients_and_changes_no_verdict():
    model, x = convnet(), images(30)
    ids, label = torch.arange(30), predictions(model, x)
    spec = attack.pgd(norm="l2", eps=0.4, steps=10)
    early = attacked(model, spec, x, label, ids=ids)
    late = attacked(model, replace(spec, until="end"), x, label, ids=ids)
    assert torch.equal(early.success, late.success) and 0 < int(early.success.sum()) < 30
    broken = early.success
    assert (early.outcome.backwards[broken] < 10).any() and (early.outcome.backwards[~broken] == 10).all()


@pytest.mark.parametrize("targeted", [False, True])
def test_a_sprint_breaks_no_fewer_and_leaves_the_others_as_they_were(targeted):
    """What it breaks costs its steps alone; whatever stands it gets the whole attack, to the last bit."""
    model, x = convnet(), images(60)
    ids, label = torch.arange(60), predictions(model, x)
    context = {"target": (label + 1) % K} if targeted else {}
    spec = attack.pgd(norm="l2", eps=0.3, steps=10, targeted=targeted)
    plain = attacked(model, spec, x, label, ids=ids, context=context)
    quick = attacked(model, replace(spec, sprint=2), x, label, ids=ids, context=context)
    first = replace(spec, steps=2, step_size=0.3, start="clean")
    alone = attacked(model, first, x, label, ids=ids, context=context)
    easy = alone.success
    assert 0 < int(easy.sum()) < 60 and not quick.success.all()
    assert torch.equal(quick.success, easy | plain.success)
    assert torch.equal(quick.outcome.images[easy], alone.outcome.images[easy])
    assert torch.equal(quick.outcome.images[~easy], plain.outcome.images[~easy])
    assert torch.equal(quick.outcome.forwards, alone.outcome.forwards + torch.where(easy, 0, plain.outcome.forwards))
    if targeted:
        reached = predictions(model, quick.outcome.images)[quick.success]
        assert torch.equal(reached, context["target"][quick.success])


# ------------------------------------------------------------------------------------- labels and targets


def test_misclassified_rows_are_returned_unmodified_and_cost_nothing():
    """A13."""
    model, x = convnet(), images()
    label = predictions(model, x)
    label[[1, 4]] = (label[[1, 4]] + 1) % K
    found = attacked(model, attack.pgd(norm="l2", eps=0.5, steps=3), x, label)
    assert torch.equal(found.outcome.images[[1, 4]], x[[1, 4]])
    assert found.success[[1, 4]].all() and (found.outcome.backwards[[1, 4]] == 0).all()
    others = [0, 2, 3, 5, 6]
    assert (found.outcome.forwards[others] > 0).all()


def test_targeted_attack_lowers_the_loss_of_the_target():
    """A10, and success means that the target is predicted."""
    model, x = linear(scale=0.2), images(40)
    ids, label = torch.arange(40), predictions(model, x)
    before = evaluation(model).logits(x)
    found = attacked(model, attack.pgd(norm="l2", eps=0.5, steps=5, targeted=True), x, label, ids=ids)
    after = evaluation(model).logits(found.outcome.images)
    target = found.target
    assert (target != label).all() and target.unique().numel() == K
    moved = found.outcome.backwards > 0
    assert (losses.cross_entropy(after, target) < losses.cross_entropy(before, target))[moved].float().mean() > 0.95
    assert int(found.success.sum()) > 0 and torch.equal(found.success, after.argmax(1) == target)


def test_untargeted_first_step_raises_the_loss():
    model, x = convnet(), images(40)
    label = predictions(model, x)
    spec = attack.fgsm(norm="linf", eps=1e-3, until="end")
    found = attacked(model, spec, x, label, ids=torch.arange(40))
    before = losses.cross_entropy(evaluation(model).logits(x), label)
    assert (found.outcome.value > before).float().mean() > 0.95


def test_given_targets_are_used_and_one_class_is_refused():
    model, x = convnet(), images()
    label = predictions(model, x)
    target = (label + 2) % K
    spec = attack.fgsm(norm="l2", eps=0.1, targeted=True)
    assert torch.equal(attacked(model, spec, x, label, context={"target": target}).target, target)
    with pytest.raises(ValueError, match="at least 2 classes"):
        stages.choose_targets(IDS, torch.zeros(N, dtype=torch.int64), 1, seed=0)


def test_without_labels_the_prediction_stands_in():
    model, x = convnet(), images()
    batch = Batch(IDS, x, {})
    spec = attack.pgd(norm="l2", eps=0.3, steps=3)
    found = next(stages.run(evaluation(model), spec, polling([batch])))[1]
    assert torch.equal(found.outcome.images, attacked(model, spec, x, predictions(model, x)).outcome.images)


def test_an_earlier_attack_is_kept_where_it_broke_the_row():
    model, x = linear(scale=0.2), images(30)
    ids, label = torch.arange(30), predictions(model, x)
    weak = attacked(model, attack.fgsm(norm="l2", eps=0.3), x, label, ids=ids)
    broken = weak.success
    assert 0 < int(broken.sum()) < 30
    earlier = {"adversarial": weak.outcome.images}
    both = attacked(model, attack.pgd(norm="l2", eps=0.3, steps=3, seed=5), x, label, ids=ids, context=earlier)
    assert torch.equal(both.outcome.images[broken], weak.outcome.images[broken])
    assert (both.success >= broken).all() and (both.outcome.backwards[broken] == 0).all()


# ---------------------------------------------------------------------------------- order and neighbours

FIELDS = ("images", "value", "reached", "forwards", "backwards", "zero_gradients")


def by_id(results):
    """{id: tuple of tensors} of (Batch ids, Outcome) pairs."""
    return {
        int(i): tuple(getattr(outcome, f)[row] for f in FIELDS) for ids, outcome in results for row, i in enumerate(ids)
    }


def same(first, second):
    return all(torch.equal(a, b) for i in first for a, b in zip(first[i], second[i], strict=True))


def climbed(model, spec, batches, *, block=32):
    found = stages.run(evaluation(model, block), spec, polling(batches))
    return by_id([(tag, result.outcome) for tag, result in found])


def batches_of(x, label, ids, sizes):
    parts = zip(x.split(sizes), label.split(sizes), ids.split(sizes), strict=True)
    return [Batch(i, a, {"label": b}, tag=i) for a, b, i in parts]


def test_results_do_not_depend_on_order_batches_or_neighbours():
    """45 rows through 32 slots, left early at success, so that slots are refilled at odd times."""
    model, x, ids = convnet(), images(45), torch.arange(45) + 100
    label = predictions(model, x)
    spec = attack.pgd(norm="l2", eps=0.4, steps=4, restarts=2)
    whole = climbed(model, spec, batches_of(x, label, ids, [45]))
    assert len({int(v[4]) for v in whole.values()}) > 2  # rows finish at different times
    assert same(whole, climbed(model, spec, batches_of(x, label, ids, [1, 20, 3, 21])))
    order = torch.randperm(45, generator=generator(9))
    assert same(whole, climbed(model, spec, batches_of(x[order], label[order], ids[order], [40, 5])))
    alone = climbed(model, spec, batches_of(x[17:18], label[17:18], ids[17:18], [1]))
    assert same(alone, whole)


def test_where_rows_begin_is_drawn_a_block_at_a_time():
    """Rows leave by ones and twos, for which a draw takes nearly as long as for a block."""
    drawn = []

    def start(ids, clean, restart):
        drawn.append(ids.tolist())
        return clean + per_row(ids.float()) / 100

    def goal(x, context):
        return x.sum((1, 2, 3)), x.mean((1, 2, 3)) > context["wanted"]

    batch = Batch(
        torch.arange(18), torch.zeros(18, 1, 2, 2), {"wanted": 0.2 + torch.arange(18) % 5 / 10}, torch.arange(18) == 3
    )
    outcome = ascend(goal, Plan(LINF, 1.0, 0.1, 20, start=start, stop=True), batch, block=8)
    ids = [i for i in range(18) if i != 3]
    assert drawn == [ids[:8], ids[8:16], ids[16:]]
    begun = [i / 100 + 0.1 * (int(outcome.forwards[i]) - 1) for i in ids]
    assert outcome.images[ids].mean((1, 2, 3)).tolist() == pytest.approx(begun, abs=1e-5)
    assert len(set(outcome.forwards[ids].tolist())) > 2 and outcome.forwards[3] == 0


def test_batches_leave_in_the_order_in_which_they_came():
    model, x, ids = convnet(), images(45), torch.arange(45)
    label = predictions(model, x)
    label[:20] = (label[:20] + 1) % K  # the first batch has nothing to climb
    batches = batches_of(x, label, ids, [20, 3, 22])
    found = stages.run(evaluation(model), attack.pgd(norm="l2", eps=0.4, steps=4), polling(batches))
    assert [tag.tolist() for tag, _ in found] == [b.ids.tolist() for b in batches]


def test_a_source_that_is_not_ready_is_never_waited_for():
    """`poll(False)` may answer None; `poll(True)` is asked only when no row can climb, and nothing changes."""
    model, x, ids = convnet(), images(45), torch.arange(45)
    label = predictions(model, x)
    spec = attack.pgd(norm="l2", eps=0.4, steps=4)
    whole = climbed(model, spec, batches_of(x, label, ids, [45]))
    asked, poll = toys.reluctant(batches_of(x, label, ids, [5, 30, 10]))
    found = stages.run(evaluation(model), spec, poll)
    assert same(whole, by_id([(tag, r.outcome) for tag, r in found]))
    assert asked[0] is True and False in asked


def test_an_empty_source_and_an_empty_batch():
    model = convnet()
    spec = attack.pgd(norm="l2", eps=0.4, steps=2)
    assert list(stages.run(evaluation(model), spec, polling([]))) == []
    empty = Batch(IDS[:0], images()[:0], {"label": IDS[:0]}, tag="empty")
    (tag, found), (other, _) = stages.run(
        evaluation(model), spec, polling([empty, Batch(IDS, images(), {"label": IDS % K}, tag="full")])
    )
    assert (tag, other) == ("empty", "full") and found.outcome.images.shape == (0, C, H, W)


ARCHITECTURES = [
    ("resnet8", {"width": 4}),
    ("resnet8", {}),
    ("resnet18", {"width": 4}),
    pytest.param("torchvision:resnet18", {}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("classes", [7, 10])
@pytest.mark.parametrize(("arch", "options"), ARCHITECTURES)
def test_a_row_of_a_shipped_architecture_depends_on_nothing_but_itself(arch, options, classes):
    """At the default block of 64: rows permuted, their neighbours replaced; logits and gradients are bit-equal."""
    net = randomise(build(arch, num_classes=classes, **options))
    model = evaluation(Classifier(net, mean=[0.5] * 3, std=[0.25] * 3), block=64)
    x, other = images(64, 3, 16, 24), images(64, 3, 16, 24, seed=5)

    def both(block):
        at = block.clone().requires_grad_()
        logits = model(at)
        loss = losses.cross_entropy(logits, torch.zeros(len(at), dtype=torch.int64))
        return logits.detach(), torch.autograd.grad(loss.sum(), at)[0]

    logits, gradient = both(x)
    assert gradient.abs().sum() > 0
    order = torch.randperm(64, generator=generator(1))
    permuted = both(x[order])
    assert torch.equal(permuted[0], logits[order]) and torch.equal(permuted[1], gradient[order])
    kept = torch.arange(64) % 3 == 0
    mixed = both(torch.where(kept[:, None, None, None], x, other))
    assert torch.equal(mixed[0][kept], logits[kept]) and torch.equal(mixed[1][kept], gradient[kept])


def test_slots_hold_only_one_block():
    """Memory: an objective never sees more rows than the block, however many wait."""
    widths = set()

    def measure(x, context):
        widths.add(len(x))
        return x.flatten(1).sum(1), torch.zeros(len(x), dtype=torch.bool)

    batch = Batch(torch.arange(100), images(100), {})
    results = list(finished(Flow(measure, Plan(L2, 1.0, 0.1, 2), polling([batch]), block=32).poll))
    assert widths == {32} and len(results) == 1


def test_drive_is_the_same_ascent():
    model, x = convnet(), images()
    label = predictions(model, x)
    plan = Plan(L2, 0.3, 0.1, 4, start=attack.random_start(L2, 0.3, seed=0), keep="last")
    batch = Batch(IDS, x, {"label": label})
    goal = attack.objective(evaluation(model))
    slow = ascend(goal, plan, batch, block=32)
    assert loop.drive(goal, plan, batch).numpy() == pytest.approx(slow.images.numpy(), abs=1e-4)
