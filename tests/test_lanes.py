"""Blocks that are computed side by side: the same numbers as one block at a time, whatever comes when."""

from __future__ import annotations

import copy
import pickle
import threading
import time
from itertools import pairwise

import pytest
import torch
from toys import convnet, evaluation, generator, images

from rbkit.cli._compute import Model
from rbkit.tools import attack, flow, lanes, stages
from rbkit.tools.attribution import Saliency
from rbkit.tools.batch import Batch as Judged
from rbkit.tools.flow import Flow, finished, polling
from rbkit.tools.metrics import METRICS
from rbkit.tools.saliency import METHODS, explain
from rbkit.tools.slots import PER_SLOT, Batch

IDS = torch.arange(150) + 100
EPS = {"l2": 0.1, "linf": 0.012}
SEVERAL = ("ig", "smoothgrad", "shap", "occlusion", "permutation-shap", "exact-shap")
NAMES = ("pgd", "apgd-ce", "apgd-t", "fab-t", "square", "auto")


@pytest.fixture
def two_threads():
    """Two threads, of which each lane has one, and no evaluations before they are taken."""
    with pytest.MonkeyPatch.context() as patch, lanes.threads(2):
        patch.setattr(flow, "PATIENCE", 0)
        yield


def spec_of(name, norm, **options):
    """A short run, so that slots are given on at odd times."""
    lengths = {"square": {"queries": 25}, "auto": {"steps": 3, "queries": 20}, "pgd": {"steps": 6}}
    return attack.ATTACKS[name](norm=norm, eps=EPS[norm], seed=3, **lengths.get(name, {"steps": 4}), **options)


def seen(victim, of=lambda images: len(images)):
    """The threads that run a model, each with what `of` tells of a pass: its rows, where nothing else is said.

    A pass in a lane lingers: a thread that is done before the next lane begins would take that one too.
    """
    found = []

    def look(_, inputs):
        found.append((threading.get_ident(), of(inputs[0])))
        if threading.current_thread() is not threading.main_thread():
            time.sleep(0.001)

    victim.register_forward_pre_hook(look)
    return found


def threads_of(images):
    return torch.get_num_threads()


def labelled(count):
    x = images(count, high=0.9)
    return x, evaluation(convnet()).logits(x).argmax(1)


def in_parts(x, label, sizes):
    parts = zip(x.split(sizes), label.split(sizes), IDS[: len(x)].split(sizes), strict=True)
    return [Batch(i, a, {"label": b}, tag=i) for a, b, i in parts]


def results(victim, spec, poll, count):
    victim.lanes = lanes.Lanes(count)
    return list(stages.run(victim, spec, poll))


def assert_same(found, expected):
    assert len(found) == len(expected)
    for (tag, mine), (other, its) in zip(found, expected, strict=True):
        assert torch.equal(tag, other) and torch.equal(mine.success, its.success)
        for name in PER_SLOT:
            assert torch.equal(getattr(mine.outcome, name), getattr(its.outcome, name)), name


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("sizes", "patience", "until"), [([40, 60, 50], 0, "broken"), ([20, 30], 1, "end")])
def test_rows_have_the_numbers_that_one_block_gives(name, norm, sizes, patience, until, monkeypatch):
    """Rows that fill two blocks, and rows for which one, where some are at work already, is too narrow."""
    monkeypatch.setattr(flow, "PATIENCE", patience)
    x, label = labelled(sum(sizes))
    spec = spec_of(name, norm, restarts=1 if name in ("auto", "apgd-t") else 2, until=until)
    expected = results(evaluation(convnet()), spec, polling(in_parts(x, label, sizes)), 1)
    victim = evaluation(convnet())
    used = seen(victim)
    found = results(victim, spec, polling(in_parts(x, label, sizes)), 2)
    assert_same(found, expected)
    assert len({thread for thread, _ in used}) == 3  # two lanes, and the one in which all threads compute the last rows


class Stub:
    """Slots whose first is done after so many evaluations."""

    def __init__(self, after, look=lambda: None):
        self.after, self.look, self.block, self.evaluations = after, look, 4, 0

    def advance(self):
        self.evaluations += 1
        self.look()
        return torch.arange(int(self.evaluations >= self.after))


@pytest.mark.parametrize(
    ("after", "owners", "wanted", "evaluations"),
    [(3, 4, False, 3), (99, 4, False, flow.STRETCH), (3, 3, False, 1), (3, 4, True, 1)],
)
def test_a_lane_goes_on_alone_while_nobody_can_be_served(after, owners, wanted, evaluations):
    slots = Stub(after)
    lane = flow._Lane(slots, dict.fromkeys(range(owners)), wanted=wanted)
    assert len(lane.advance()) == (evaluations == after) and slots.evaluations == evaluations


def test_a_lane_that_is_wanted_comes_to_rest_after_the_evaluation_that_it_is_at():
    slots = Stub(99, look=lambda: setattr(lane, "wanted", slots.evaluations == 5))
    lane = flow._Lane(slots, dict.fromkeys(range(4)))
    lane.advance()
    assert slots.evaluations == 5


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(("most", "fewest"), [(2, 6), (3, 1)])
def test_full_lanes_are_begun_again_when_a_row_is_done(most, fewest, monkeypatch):
    """Or after every evaluation, while more of them might be opened."""
    monkeypatch.setattr(flow.Lanes, "opened", lambda self, count, *_: min(count, 2))
    x, label = labelled(96)
    victim, spec, begun = evaluation(convnet()), spec_of("pgd", "l2", until="end"), []
    side = lanes.Lanes(2)
    start = side.start
    side.start = lambda count, task, *given: begun.append(task) or start(count, task, *given)
    made = Flow(spec.goal(victim), spec.ascent(), polling(in_parts(x, label, [96])), block=8, lanes=side)
    made.most = most
    list(finished(made.poll))
    passes = 96 // 8 * (spec.steps + 1)
    assert passes // fewest >= len(begun) > passes // (2 * fewest)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(("rows", "width"), [(50, 25), (64, 32), (32, None)])
def test_rows_that_would_wait_for_a_block_are_shared_evenly(rows, width):
    x, label = labelled(rows)
    victim, spec = evaluation(convnet()), spec_of("pgd", "l2", until="end")
    used = seen(victim)
    flows = Flow(
        spec.goal(victim), spec.ascent(), polling(in_parts(x, label, [rows])),
        block=32, widths=lambda count, _: count, lanes=lanes.Lanes(2),
    )  # fmt: skip
    list(finished(flows.poll))
    lanes_of = {thread for thread, _ in used} - {threading.get_ident()}
    widths = [{count for thread, count in used if thread == lane} - {32} for lane in lanes_of]
    assert widths == ([] if width is None else [{width} - {32}] * 2)


@pytest.mark.usefixtures("two_threads")
def test_rows_wait_for_a_block_where_a_narrower_one_gives_other_numbers():
    x, label = labelled(50)
    victim, spec, asked = evaluation(convnet()), spec_of("pgd", "l2", until="end"), []
    flows = Flow(
        spec.goal(victim), spec.ascent(), polling(in_parts(x, label, [50])),
        block=32, widths=lambda count, _: asked.append(count) or 32, lanes=lanes.Lanes(2),
    )  # fmt: skip
    list(finished(flows.poll))
    assert asked.count(25) == 1 and len(flows.open) == 1  # once is enough


@pytest.mark.usefixtures("two_threads")
def test_the_last_rows_are_computed_in_one_block_by_all_threads():
    x, label = labelled(90)  # two blocks, and then less than one: where two were left, their lanes might end together
    victim = evaluation(convnet())
    used = seen(victim, threads_of)
    results(victim, spec_of("pgd", "l2", until="end"), polling(in_parts(x, label, [90])), 2)
    main = threading.get_ident()
    assert {count for thread, count in used if thread != main} == {1}
    assert used[-1] == (main, 2) and torch.get_num_threads() == 2


@pytest.mark.usefixtures("two_threads")
def test_input_that_comes_slowly_is_awaited_by_no_row():
    """Batches of which the next one is ready only after some questions: blocks open and close, and nothing changes."""
    x, label = labelled(150)
    spec, parts = spec_of("apgd-ce", "l2"), in_parts(x, label, [70, 20, 10, 50])
    expected = results(evaluation(convnet()), spec, polling(parts), 1)
    victim, questions = evaluation(convnet()), []
    used = seen(victim)

    def slowly(wait):
        questions.append(wait)
        if not wait and len(questions) % 4:
            return None
        return next(source)

    source = iter(parts)
    assert_same(results(victim, spec, slowly, 2), expected)
    alone = [thread == threading.get_ident() for thread, _ in used]
    assert sum(before != after for before, after in pairwise(alone)) > 2 and sum(questions) == 1


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("count", [2, 3])
def test_blocks_of_few_rows_come_together_in_one_of_full_width(count):
    """Blocks that have become narrower fill up again with rows that count for nothing."""
    x, label = labelled(106)
    victim, spec = evaluation(convnet()), spec_of("square", "l2")
    goal, plan = spec.goal(victim), spec.ascent()
    with lanes.threads(count):
        side = lanes.Lanes(count)
        made = Flow(goal, plan, polling(in_parts(x, label, [106])), block=32, widths=lambda rows, _: rows, lanes=side)
        ((_, outcome),) = finished(made.poll)
    ((_, expected),) = finished(Flow(goal, plan, polling(in_parts(x, label, [106])), block=32).poll)
    for name in PER_SLOT:
        assert torch.equal(getattr(outcome, name), getattr(expected, name)), name


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(("most", "rows", "refill"), [(1, 150, True), (2, 32, True), (2, 150, False)])
def test_one_block_at_a_time(most, rows, refill):
    """Where only one is allowed, where there is room for all rows in one, and where a block is one batch."""
    x, label = labelled(rows)
    victim = evaluation(convnet())
    victim.lanes, used = lanes.Lanes(most), seen(victim)
    list(stages.run(victim, spec_of("pgd", "l2"), polling(in_parts(x, label, [rows])), refill=refill))
    assert {thread for thread, _ in used} == {threading.get_ident()}


@pytest.mark.usefixtures("two_threads")
def test_a_model_whose_numbers_depend_on_the_threads_has_one_block_at_a_time():
    x, label = labelled(150)
    model = convnet()
    model.register_forward_hook(lambda _, __, logits: logits * (1 + 1e-6 * torch.get_num_threads()))
    victim = evaluation(model)
    used = seen(victim)
    results(victim, spec_of("pgd", "l2"), polling(in_parts(x, label, [150])), 2)
    assert sum(thread != threading.get_ident() for thread, _ in used) == 1  # the trial


def test_a_short_attack_never_pays_for_the_trial(monkeypatch):
    tried = []
    monkeypatch.setattr(lanes.Lanes, "opened", lambda *_: tried.append(True) or 1)
    x, label = labelled(150)
    with lanes.threads(2):
        results(evaluation(convnet()), spec_of("pgd", "l2"), polling(in_parts(x, label, [150])), 2)
        enough = len(tried)
        short = attack.fgsm(norm="l2", eps=0.1)
        results(evaluation(convnet()), short, polling(in_parts(x[:64], label[:64], [64])), 2)
    assert len(tried) == enough > 0


def test_large_images_are_not_computed_side_by_side():
    with lanes.threads(2):
        side = lanes.Lanes(2)
        assert side.fit(torch.zeros(1, 3, 64, 64)) and not side.fit(torch.zeros(1, 3, 64, 65))


@pytest.mark.usefixtures("two_threads")
def test_lanes_are_no_more_than_there_is_room_for(monkeypatch):
    x, label = labelled(150)
    with lanes.kept_bytes() as kept:
        whole = evaluation(convnet())(x[:32].requires_grad_())
    size = sum(kept.values())
    assert size > 32 * 8 * 30 * 4  # at least the feature maps behind the first convolution, 8 channels of 6 x 5 pixels
    del whole
    with lanes.kept_bytes() as weights:
        torch.nn.Linear(30, 1000).requires_grad_(False)(x.detach().flatten(1)[:, :30].requires_grad_())
    assert not weights  # all lanes have the same ones
    for room, opened in ((4.5, 4), (3.5, 2), (1.5, 0)):
        monkeypatch.setattr(lanes, "ROOM", int(room * size))
        victim = evaluation(convnet())
        used = seen(victim)
        with lanes.threads(4):
            results(victim, spec_of("pgd", "l2"), polling(in_parts(x.detach(), label, [150])), 4)
        assert len({thread for thread, _ in used} - {threading.get_ident()}) == opened


@pytest.mark.parametrize(
    ("threads", "blocks", "count", "each"),
    [
        (1, 9, 1, 1),
        (2, 9, 2, 1),
        (16, 9, 8, 2),
        (12, 9, 6, 2),
        (10, 9, 5, 2),
        (16, 3, 2, 8),
        (8, 4, 4, 2),
        (8, 0, 1, 8),
    ],
)
def test_lanes_share_the_threads_and_leave_none_idle(threads, blocks, count, each):
    with lanes.threads(threads):
        side = lanes.Lanes()
    assert side.to_open(blocks) == count and side.each(count) == each


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(
    ("threads", "most", "rows", "opened"), [(8, 8, 150, 4), (8, 3, 150, 2), (4, 8, 110, 4), (4, 8, 200, 4)]
)
def test_as_many_lanes_are_opened_as_there_are_rows_for(threads, most, rows, opened):
    x, label = labelled(rows)
    ids = torch.arange(rows)
    victim = evaluation(convnet())
    used = seen(victim, threads_of)
    spec = spec_of("pgd", "l2", until="end")
    expected = list(stages.run(evaluation(convnet()), spec, polling([Batch(ids, x, {"label": label}, tag=ids)])))
    with lanes.threads(threads):
        found = results(victim, spec, polling([Batch(ids, x, {"label": label}, tag=ids)]), most)
    assert_same(found, expected)
    side = {thread: count for thread, count in used if thread != threading.get_ident()}
    assert len(side) == opened and set(side.values()) == {threads // opened}


def test_more_lanes_are_opened_when_more_rows_come(monkeypatch):
    """Once those that are open have computed for some time, and are at rest for the trial."""
    monkeypatch.setattr(flow, "PATIENCE", 1)
    x, label = labelled(150)
    victim, questions, busy = evaluation(convnet()), [], []
    spec, parts = spec_of("pgd", "l2", until="end"), in_parts(x, label, [70, 80])
    goal, plan = spec.goal(victim), spec.ascent()
    expected = [outcome for _, outcome in finished(Flow(goal, plan, polling(parts), block=32).poll)]
    used = seen(victim, threads_of)

    def late(wait):
        questions.append(wait)
        return next(source) if wait or len(questions) > 4 else None

    source = iter(parts)
    with lanes.threads(4):
        side = lanes.Lanes(4)
        trial = side.opened
        side.opened = lambda *given: busy.extend(lane.turn for lane in made.open) or trial(*given)
        made = Flow(goal, plan, late, block=32, lanes=side)
        for (_, outcome), its in zip(finished(made.poll), expected, strict=True):
            assert torch.equal(outcome.images, its.images) and torch.equal(outcome.forwards, its.forwards)
    each = [count for thread, count in used if thread != threading.get_ident()]
    assert each == sorted(each, reverse=True) and set(each) == {2, 1}
    assert len(busy) == 3 and not any(busy)  # one block was open at the first trial, two at the second


@pytest.mark.usefixtures("two_threads")
def test_what_was_not_alike_is_not_tried_again(monkeypatch):
    tried = []
    monkeypatch.setattr(lanes.Lanes, "opened", lambda *_: tried.append(True) or 1)
    x, label = labelled(150)
    results(evaluation(convnet()), spec_of("pgd", "l2"), polling(in_parts(x, label, [150])), 2)
    assert len(tried) == 1


@pytest.mark.usefixtures("two_threads")
def test_what_goes_wrong_in_a_lane_is_told():
    x, label = labelled(150)
    victim = evaluation(convnet())

    def fail(*_):
        if threading.current_thread() is not threading.main_thread():
            raise MemoryError("no room")

    victim.register_forward_pre_hook(fail)
    with pytest.raises(MemoryError, match="no room"):
        results(victim, spec_of("pgd", "l2"), polling(in_parts(x, label, [150])), 2)


@pytest.mark.parametrize(("arch", "several"), [("resnet8", True), ("torchvision:resnet18", True), ("mine:net", False)])
def test_code_of_others_is_run_by_one_thread(arch, several):
    """It may keep things of a pass in itself."""
    assert (Model(convnet(), {"arch": arch}, "", "").evaluation(32).lanes is not None) == several


# ------------------------------------------------------------------------------------------------------ scores


def judged(batch):
    return {
        name: METRICS[name].function(batch)
        for name in ("insertion", "deletion_mean", "infidelity", "sensitivity_n", "road_morf", "max_sensitivity")
    }


@pytest.mark.usefixtures("two_threads")
def test_scores_are_those_of_one_block_at_a_time():
    x, label = labelled(250)
    maps = torch.rand(x.shape, generator=generator(4))
    found = []
    for side in (None, lanes.Lanes(2)):
        victim = evaluation(convnet())
        victim.lanes, used = side, seen(victim)
        batch = Judged(
            victim, torch.arange(250), x, attribution=maps, explained=x, target=label, saliency=Saliency("gradient")
        )
        found.append(judged(batch))
        assert (len({thread for thread, _ in used}) > 1) == (side is not None)
    for name, values in found[0].items():
        assert torch.equal(values.nan_to_num(-1), found[1][name].nan_to_num(-1)), name


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(("method", "several"), [(name, name in SEVERAL) for name in METHODS])
def test_maps_are_those_of_one_block_at_a_time(method, several):
    """Also of methods that watch layers or change ReLU, which have one block at a time."""
    x, label = labelled(40)
    spec, found = Saliency(method, steps=10, samples=10, tolerance=1e-4 if method == "ig" else None, players=2), []
    for side in (None, lanes.Lanes(2)):
        victim = evaluation(convnet())
        victim.lanes, used = side, seen(victim)
        found.append(explain(victim, x, label, spec, ids=IDS[:40], background=images(7, seed=2)))
        assert (len({thread for thread, _ in used}) > 1) == (several and side is not None)
    for name, values in vars(found[0]).items():
        assert values is None or torch.equal(values, getattr(found[1], name)), name


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("method", ["gradient", "input-x-gradient"])
def test_gradients_of_many_images_are_computed_side_by_side(method):
    x, label = labelled(250)
    found = []
    for side in (None, lanes.Lanes(2)):
        victim = evaluation(convnet())
        victim.lanes, used = side, seen(victim)
        found.append(explain(victim, x, label, Saliency(method), ids=torch.arange(250)))
        assert (len({thread for thread, _ in used}) > 1) == (side is not None)
    for name, values in vars(found[0]).items():
        assert values is None or torch.equal(values, getattr(found[1], name)), name
    assert found[1].attribution.is_contiguous()


@pytest.mark.usefixtures("two_threads")
def test_a_function_whose_numbers_depend_on_the_threads_stays_with_all_of_them():
    side = lanes.Lanes(2)

    def look(rows):
        return rows * torch.get_num_threads()

    rows = [[torch.full((4,), float(i))] for i in range(1, 21)]
    assert torch.equal(torch.stack(list(side.map(look, rows)))[:, 0], torch.arange(1, 21) * 2.0)
    assert side.tried == {(look.__qualname__, 2): 1}


@pytest.mark.usefixtures("two_threads")
def test_blocks_come_back_in_order_with_gradients_on_or_off_as_here():
    side = lanes.Lanes(2)

    def look(rows):
        return rows + float(torch.is_grad_enabled())

    rows = [[torch.full((4,), float(i))] for i in range(20)]
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            assert torch.equal(torch.stack(list(side.map(look, rows)))[:, 0], torch.arange(20.0) + enabled)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("slow", ["in lanes", "with all threads"])
def test_blocks_go_on_the_way_that_is_faster(slow):
    """After a stretch of each; also in later calls, and in those that are too short for both."""
    side, main = lanes.Lanes(2), threading.current_thread()

    def look(number):
        here = threading.current_thread() is main
        where.append(here)
        if here == (slow == "with all threads"):
            time.sleep(0.005)
        return number * torch.ones(1)

    for count in (40, 30, 10):
        where = []
        assert torch.cat(list(side.map(look, [(i,) for i in range(count)]))).tolist() == list(range(count))
        trials = {40: 2 + 16, 30: 0, 10: 0}[count]  # whether numbers are the same, and a stretch of 8 either way
        assert set(where[trials:]) == {slow == "in lanes"}


def test_the_way_that_was_slower_is_tried_again_for_a_stretch():
    pace = lanes.Pace()
    assert pace.plan(100, stretch=8) == (True, 8)
    pace.note(True, 1.0)
    assert pace.plan(92, stretch=8) == (False, 8)
    pace.note(False, 1.1)
    turns = []
    for _ in range(12):
        turns.append(pace.plan(50, stretch=8))
        pace.note(turns[-1][0], 1.0 if turns[-1][0] else 1.1)
    assert turns.count((False, 8)) == 1
    assert turns.count((True, 8)) == 2 and turns.count((True, 50)) == 9  # a stretch to go back, each time
    pace.note(True, 2.0)  # other programs have come
    assert pace.plan(5, stretch=8) == (False, 5)


def test_blocks_that_are_few_are_tried_either_way_in_turn():
    pace = lanes.Pace()
    assert pace.plan(8, stretch=8) == (True, 8)
    pace.note(True, 1.0)
    assert pace.plan(8, stretch=8) == (False, 8)


def test_a_copy_of_a_model_shares_the_lanes():
    victim = evaluation(convnet())
    victim.lanes = lanes.Lanes(2)
    assert copy.deepcopy(victim).lanes is victim.lanes
    assert pickle.loads(pickle.dumps(victim.lanes)).most == 2  # in another process
