"""What every attack of the protocol must hold to: rows depend on nothing but themselves, and sequences lose nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import toys
from toys import K, convnet, evaluation, generator, images, linear

from rbkit.tools import attack, flow, losses, sameness, stages
from rbkit.tools.flow import polling
from rbkit.tools.norms import NORMS
from rbkit.tools.slots import Batch, Slots

FIELDS = ("images", "value", "reached", "forwards", "backwards", "zero_gradients")
EPS = {"l2": 0.1, "linf": 0.012}
BOTH = pytest.mark.parametrize("norm", ["l2", "linf"])
NAMES = ("apgd-ce", "apgd-dlr", "apgd-t", "fab-t", "square", "auto")
IDS = torch.arange(45) + 100


def spec_of(name, norm, **options):
    """A short run, so that slots are given on at odd times."""
    lengths = {"square": {"queries": 25}, "auto": {"steps": 3, "queries": 20}}.get(name, {"steps": 4})
    return attack.ATTACKS[name](norm=norm, eps=EPS[norm], seed=3, **lengths, **options)


def batches_of(x, label, ids, sizes):
    parts = zip(x.split(sizes), label.split(sizes), ids.split(sizes), strict=True)
    return [Batch(i, a, {"label": b}, tag=i) for a, b, i in parts]


def by_id(model, spec, batches, *, refill=True):
    """{id: tuple of tensors}"""
    found = {}
    for ids, result in stages.run(evaluation(model), spec, polling(batches), refill=refill):
        columns = [getattr(result.outcome, f) for f in FIELDS] + [result.success]
        columns += [] if result.distance is None else [result.distance]
        found |= {int(i): tuple(column[row] for column in columns) for row, i in enumerate(ids)}
    return found


def same(first, second):
    return first.keys() <= second.keys() and all(
        torch.equal(a, b) for i in first for a, b in zip(first[i], second[i], strict=True)
    )


@BOTH
@pytest.mark.parametrize("name", NAMES)
def test_results_do_not_depend_on_order_batches_or_neighbours(name, norm):
    """45 rows through 32 slots; bit-equal in other batches, in another order, in a shard, and alone."""
    model, x = convnet(), images(45, high=0.9)
    label = evaluation(model).logits(x).argmax(1)
    label[7] = (label[7] + 1) % K
    spec = spec_of(name, norm)
    whole = by_id(model, spec, batches_of(x, label, IDS, [45]))
    assert len({int(v[3]) for v in whole.values()}) > (1 if name == "fab-t" else 2)  # rows finish at different times
    assert 0 < sum(bool(v[6]) for v in whole.values()) < 45
    assert same(whole, by_id(model, spec, batches_of(x, label, IDS, [1, 20, 3, 21])))
    order = torch.randperm(45, generator=generator(9))
    assert same(whole, by_id(model, spec, batches_of(x[order], label[order], IDS[order], [40, 5])))
    assert same(by_id(model, spec, batches_of(x[17:18], label[17:18], IDS[17:18], [1])), whole)
    assert same(by_id(model, spec, batches_of(x[30:], label[30:], IDS[30:], [15])), whole)
    assert same(whole, by_id(model, spec, batches_of(x, label, IDS, [20, 25]), refill=False))


@BOTH
@pytest.mark.parametrize("name", NAMES)
def test_ball_box_and_verdict_hold_for_the_images_as_they_are(name, norm):
    model, x = convnet(), images(40, low=-0.2, high=1.2).clamp(0, 1)
    label = evaluation(model).logits(x).argmax(1)
    label[[3, 5]] = (label[[3, 5]] + 1) % K
    batch = Batch(torch.arange(40), x, {"label": label})
    found = next(stages.run(evaluation(model), spec_of(name, norm), polling([batch])))[1]
    image = found.outcome.images
    assert image.dtype == torch.float32 and image.min() >= 0 and image.max() <= 1
    assert (NORMS[norm].size(image.double() - x.double()) <= EPS[norm] * (1 + 1e-6) + 1e-7).all()
    broken = losses.is_broken(evaluation(model).logits(image), label)
    assert torch.equal(found.success, broken) and 2 < int(broken.sum()) < 40
    assert torch.equal(image[[3, 5]], x[[3, 5]]) and not found.outcome.forwards[[3, 5]].any()


@BOTH
def test_auto_is_its_attacks_one_after_the_other(norm):
    """The same images, verdicts and cost as four runs that each begin where the one before stopped; never fewer broken."""
    model, x = convnet(), images(45, high=0.9)
    label = evaluation(model).logits(x).argmax(1)
    auto = spec_of("auto", norm)
    assert [s.name for s in auto.stages()] == ["apgd-ce", "apgd-t", "fab-t", "square"]
    whole = next(stages.run(evaluation(model), auto, polling([Batch(IDS, x, {"label": label})])))[1]
    context, cost, before = {"label": label}, torch.zeros(45, dtype=torch.int64), torch.zeros(45, dtype=torch.bool)
    for stage in auto.stages():
        part = next(stages.run(evaluation(model), stage, polling([Batch(IDS, x, dict(context))])))[1]
        assert (part.success >= before).all()
        kept = part.outcome.images[before]
        assert not before.any() or torch.equal(kept, context["adversarial"][before])
        assert not part.outcome.forwards[before].any()
        context["adversarial"], before = part.outcome.images, part.success
        cost = cost + part.outcome.forwards
    assert torch.equal(whole.outcome.images, context["adversarial"]) and torch.equal(whole.success, before)
    assert torch.equal(whole.outcome.forwards, cost)


def test_the_standard_protocol():
    """Croce and Hein 2020, section 5: 100 steps, one restart, 9 targets, 5,000 queries."""
    ce, targeted, fab, square = attack.auto(norm="l2", eps=0.5).stages()
    assert (ce.steps, ce.loss, ce.restarts) == (100, "ce", 1)
    assert (targeted.steps, targeted.targets, targeted.loss, targeted.restarts) == (100, 9, "dlr", 1)
    assert (fab.steps, fab.targets, fab.until, fab.restarts) == (100, 9, "broken", 1)
    assert (square.queries, square.loss, square.restarts) == (5000, "margin", 1)
    assert {s.until for s in attack.auto(norm="l2", eps=0.5, until="end").stages()} == {"end", "broken"}


def test_a_sequence_waits_for_input_only_where_no_row_can_climb():
    """`poll(False)` may answer None at any time; results and their order stay the same."""
    model, x = convnet(), images(45, high=0.9)
    label = evaluation(model).logits(x).argmax(1)
    whole = by_id(model, spec_of("auto", "l2"), batches_of(x, label, IDS, [45]))
    asked, poll = toys.reluctant(batches_of(x, label, IDS, [5, 30, 10]))
    found = list(stages.run(evaluation(model), spec_of("auto", "l2"), poll))
    assert torch.equal(torch.cat([ids for ids, _ in found]), IDS)
    for ids, result in found:
        for row, i in enumerate(ids.tolist()):
            assert torch.equal(result.outcome.images[row], whole[i][0]) and result.success[row] == whole[i][6]
    assert asked[0] is True and False in asked


def test_an_empty_batch_passes_through_a_sequence():
    model = convnet()
    empty = Batch(IDS[:0], images()[:0], {"label": IDS[:0]}, tag="empty")
    ((tag, found),) = stages.run(evaluation(model), spec_of("auto", "l2"), polling([empty]))
    assert tag == "empty" and len(found.outcome.images) == len(found.success) == 0


@pytest.mark.parametrize("name", ["pgd", "apgd-ce", "apgd-t", "square", "auto"])
def test_images_made_on_a_surrogate_are_judged_by_the_other_model(name):
    """Success is the judge's verdict; rows that it misclassifies stay as they are; to the end on the surrogate."""
    surrogate, judge = linear(scale=0.1), linear(scale=0.1)
    with torch.no_grad():
        judge.net[1].weight += 0.05 * torch.randn(judge.net[1].weight.shape, generator=generator(5))
    x, ids = images(40), torch.arange(40)
    label = evaluation(judge).logits(x).argmax(1)
    label[2] = (label[2] + 1) % K
    spec = replace(attack.pgd(norm="l2", eps=0.5, steps=4)) if name == "pgd" else spec_of(name, "l2", restarts=1)
    spec = replace(spec, eps=0.5)
    batch = Batch(ids, x, {"label": label})
    found = next(stages.run(evaluation(surrogate), spec, polling([batch]), judge=evaluation(judge)))[1]
    image = found.outcome.images
    assert torch.equal(found.success, losses.is_broken(evaluation(judge).logits(image), label))
    assert torch.equal(image[2], x[2]) and 1 < int(found.success.sum()) < 40
    moved = ~torch.isin(ids, torch.tensor([2]))
    assert (image[moved] != x[moved]).flatten(1).any(1).all()
    if name == "pgd":
        end = next(stages.run(evaluation(surrogate), replace(spec, until="end"), polling([batch])))[1]
        agree = evaluation(surrogate).logits(x).argmax(1) == label
        assert agree.sum() > 20
        assert image[agree & moved].numpy() == pytest.approx(end.outcome.images[agree & moved].numpy(), abs=1e-6)


# ------------------------------------------------------------------------------------------- which rows begin first


def test_the_hardest_rows_are_those_whose_clean_logits_are_farthest_from_the_goal():
    logits = torch.tensor([[5.0, 0.0, 4.0], [5.0, 1.0, 2.0], [1.0, 3.0, 2.0], [5.0, 0.0, 4.0]])
    label, target = torch.tensor([0, 0, 1, 0]), torch.tensor([1, 2, 0, 2])
    assert stages.hardest_first(logits, {"label": label}).tolist() == [1, 0, 2, 3]
    assert stages.hardest_first(logits, {"label": label, "target": target}, targeted=True).tolist() == [0, 1, 2, 3]
    aimed = {"label": label, "target": target, "targets": target[:, None]}  # any other class will do
    assert stages.hardest_first(logits, aimed).tolist() == [1, 0, 2, 3]


def test_rows_begin_in_the_order_of_their_batch(monkeypatch):
    begun = []
    load = Slots.load

    def noted(self, slots, batch, rows, first):
        begun.extend(rows.tolist())
        load(self, slots, batch, rows, first)

    monkeypatch.setattr(Slots, "load", noted)
    model, x = convnet(), images(45, high=0.9)
    label = evaluation(model).logits(x).argmax(1)
    label[7] = (label[7] + 1) % K
    prepared = stages.prepare(evaluation(model), spec_of("apgd-ce", "l2"), Batch(IDS, x, {"label": label}))
    next(stages.run(evaluation(model), spec_of("apgd-ce", "l2"), polling([Batch(IDS, x, {"label": label})])))
    assert begun == [row for row in prepared.order.tolist() if row != 7] != sorted(begun)


def test_rows_that_share_a_mean_are_not_reordered():
    model, x = convnet(), images(45, high=0.9)
    spec = attack.pgd(norm="l2", eps=0.5, keep="batch", until="end")
    assert stages.prepare(evaluation(model), spec, Batch(IDS, x, {"label": IDS % K})).order is None


# ------------------------------------------------------------------------------------------- narrower blocks


@BOTH
@pytest.mark.parametrize("name", ("pgd", *NAMES))
def test_the_last_rows_go_on_in_narrower_blocks_with_the_same_numbers(name, norm):
    """Against a flow that keeps the full block: bit-equal, though the model has seen fewer rows."""
    model, x = convnet(), images(45, high=0.9)
    label = evaluation(model).logits(x).argmax(1)
    spec = attack.pgd(norm=norm, eps=EPS[norm], steps=6) if name == "pgd" else spec_of(name, norm)
    found = []
    for narrow in (False, True):
        sizes, source = [], polling([Batch(IDS, x, {"label": label})])
        victim = evaluation(model)
        victim.register_forward_pre_hook(lambda _, inputs, sizes=sizes: sizes.append(len(inputs[0])))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(flow, "PATIENCE", 0)
            patch.setattr(sameness.Widths, "_is_same", lambda *_, narrow=narrow: narrow)
            result = next(stages.run(victim, spec, source))[1]
        found.append((result, sizes))
    (full, wide), (narrow, narrower) = found
    for field in FIELDS:
        assert torch.equal(getattr(full.outcome, field), getattr(narrow.outcome, field)), field
    assert torch.equal(full.success, narrow.success) and set(wide) == {32}
    assert set(narrower) - {32} and sum(narrower) < sum(wide)


@pytest.mark.parametrize(("steps", "asked"), [(flow.PATIENCE - 1, 0), (flow.PATIENCE + 3, 1)])
def test_a_short_attack_never_pays_for_the_question(steps, asked, monkeypatch):
    model, x = convnet(), images(5, high=0.9)
    times = []
    monkeypatch.setattr(sameness.Widths, "_is_same", lambda _, width, __: times.append(width) or True)
    batch = Batch(IDS[:5], x, {"label": evaluation(model).logits(x).argmax(1)})
    spec = attack.pgd(norm="l2", eps=0.1, steps=steps, until="end")
    next(stages.run(evaluation(model), spec, polling([batch])))
    assert times == [8] * asked


class _WidthDependent(torch.nn.Module):
    """A network whose answer depends on how many rows are computed with one."""

    def __init__(self, inner, least):
        super().__init__()
        self.inner, self.least = inner, least

    def forward(self, x):
        return self.inner(x) * (1 if len(x) >= self.least else 1.0001)


def test_the_last_rows_go_on_in_the_narrowest_block_of_the_same_numbers():
    model = convnet()
    fitting = sameness.Widths(evaluation(model, 64))
    assert [fitting.narrowest(count, images(64)) for count in (1, 4, 5, 9, 33, 57)] == [4, 4, 8, 12, 34, 58]
    for least, widths in ((16, [16, 16, 34]), (60, [60, 60, 60]), (64, [64, 64, 64])):
        model = convnet()
        model.net = _WidthDependent(model.net, least)
        fitting = sameness.Widths(evaluation(model, 64))
        assert [fitting.narrowest(count, images(20)) for count in (1, 5, 33)] == widths
    assert sameness.Widths(evaluation(convnet(), 96)).narrowest(41, images(20)) == 42
