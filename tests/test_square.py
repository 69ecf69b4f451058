"""Square: schedule, patches, the ball, and the optimum that a random search comes near."""

from __future__ import annotations

import pytest
import torch
from toys import C, H, K, N, W, convnet, evaluation, images, linear, weights_of

from rbkit.tools import attack, flow, losses, random, sameness, square, stages, tries
from rbkit.tools.flow import polling
from rbkit.tools.norms import L2, LINF, NORMS
from rbkit.tools.slots import Batch
from rbkit.tools.square import Square, covered, pyramid

BOTH = pytest.mark.parametrize("norm", ["l2", "linf"])
IDS = torch.arange(N) * 3 + 1


def attacked(model, spec, x, label, *, ids=IDS):
    return next(stages.run(evaluation(model), spec, polling([Batch(ids, x, {"label": label})])))[1]


def test_schedule_halves_the_share_and_scales_with_the_queries():
    edges = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
    for power, edge in enumerate(edges):
        assert covered(edge, 10000) == 0.8 / 2**power and covered(edge + 1, 10000) == 0.8 / 2 ** (power + 1)
    assert [covered(q, 100) for q in (0, 1, 11, 100)] == [0.8, 0.8 / 4, 0.8 / 2**5, 0.8 / 2**9]


def test_pyramid_equals_the_sum_of_equation_2():
    side = 7
    left, right = side // 2, side - side // 2
    wanted = torch.zeros(side, side, dtype=torch.float64)
    for width, offset, sign in ((left, 0, 1), (right, left, -1)):
        n = side // 2
        for r in range(1, side + 1):
            for s in range(1, width + 1):
                m = n - max(abs(r - n - 1), abs(s - width // 2 - 1))
                wanted[r - 1, offset + s - 1] = sign * sum(1 / (n + 1 - k) ** 2 for k in range(m + 1))
    assert pyramid(side).numpy() == pytest.approx((wanted / wanted.norm()).numpy(), abs=1e-6)
    for other in (1, 2, 3, 4):
        assert pyramid(other).shape == (other, other) and float(pyramid(other).norm()) == pytest.approx(1)


class Watching:
    """An objective that keeps what it is asked about, and never gets better than at first."""

    def __init__(self):
        self.asked = []

    def __call__(self, x, context):
        self.asked.append(x.clone())
        return torch.full((len(x),), -float(len(self.asked))), torch.zeros(len(x), dtype=torch.bool)


def searched(norm, queries, x, eps, *, of=1000, restarts=1):
    """The first images that are asked about, of a search of many more."""
    goal = Watching()
    slots = Square(norm, eps, of, restarts=restarts).slots(goal, Batch(IDS, x, {}), block=N)
    first = slots.started(IDS, x, torch.zeros_like(IDS))
    slots.load(torch.arange(N), Batch(IDS, x, {}), torch.arange(N), first)
    for _ in range(queries):
        slots.advance()
    return goal.asked


def test_linf_begins_with_stripes_and_then_changes_one_square_per_image():
    x = images(low=0.3, high=0.7)
    first, *others = searched(LINF, 100, x, 0.1)
    delta = first - x
    assert delta.abs().numpy() == pytest.approx(0.1, abs=1e-6)
    assert torch.equal(delta.sign(), delta.sign()[:, :, :1].expand(-1, -1, H, -1))  # constant along a column
    assert len({tuple(row.flatten().tolist()) for row in delta.sign()}) == N
    places, sides = set(), set()
    for tried in others:
        step = tried - x
        assert step.abs().numpy() == pytest.approx(0.1, abs=1e-6)
        for row in range(N):
            rows, columns = (tried[row] != first[row]).any(0).nonzero().T
            if len(rows):
                height, width = rows.max() - rows.min() + 1, columns.max() - columns.min() + 1
                sides.add(int(max(height, width)))
                places.add((row, int(rows.min()), int(columns.min())))
    assert max(sides) == 5 and min(sides) == 1  # 0.8 of 5 x 6 pixels at first
    assert {p[1] for p in places} == set(range(H)) and {p[2] for p in places} == set(range(W))


def test_patches_are_large_again_after_a_restart():
    x = images(low=0.3, high=0.7)
    asked = searched(LINF, 43, x, 0.1, of=20, restarts=3)
    for start in (0, 20, 40):
        first, second, third = asked[start : start + 3]
        assert [int((tried != first).any(1).sum((1, 2)).max()) for tried in (second, third)] == [4, 1]


def test_l2_keeps_the_norm_of_the_ball_and_moves_it_between_two_squares():
    x = images(low=0.4, high=0.6)
    first, *others = searched(L2, 60, x, 0.5)
    assert L2.size(first - x).numpy() == pytest.approx(0.5, rel=1e-5)
    for tried in others:
        size = L2.size(tried - x)
        assert (size <= 0.5 * (1 + 1e-6)).all() and size.numpy() == pytest.approx(0.5, rel=1e-5)
    emptied = [int(((tried - x).abs() < 1e-7).sum()) for tried in others]
    assert max(emptied) > 0
    last = others[-1] != first
    assert 0 < float(last.double().mean()) <= 2 * 9 / (H * W) + 0.01  # two squares of 3 x 3 at most


@BOTH
def test_search_comes_near_the_optimum_of_a_linear_model(norm):
    """Margin plus eps times the dual norm is the most that can be had; without gradients much of it is found."""
    model, eps = linear(2), 0.02
    x = images(low=0.3, high=0.7)
    label = evaluation(model).logits(x).argmax(1)
    found = attacked(model, attack.square(norm=norm, eps=eps, queries=600, until="end"), x, label).outcome
    w = weights_of(model).double()
    dual = float((w[0] - w[1]).norm() if norm == "l2" else (w[0] - w[1]).abs().sum())
    gain = (found.value - losses.margin(evaluation(model).logits(x), label)).double() / (eps * dual)
    assert (gain <= 1 + 1e-4).all() and (gain > {"l2": 0.4, "linf": 0.85}[norm]).all(), gain
    assert found.forwards.tolist() == [600] * N and not found.backwards.any() and not found.zero_gradients.any()


@BOTH
def test_result_lies_in_ball_and_box_and_success_is_what_the_model_says(norm):
    model, x = convnet(), images(40, low=-0.3, high=1.3).clamp(0, 1)
    ids, label = torch.arange(40), evaluation(model).logits(x).argmax(1)
    eps = {"l2": 0.4, "linf": 0.05}[norm]
    found = attacked(model, attack.square(norm=norm, eps=eps, queries=60), x, label, ids=ids)
    image = found.outcome.images
    assert image.min() >= 0 and image.max() <= 1
    assert (NORMS[norm].size(image.double() - x.double()) <= eps * (1 + 1e-6) + 1e-7).all()
    assert torch.equal(losses.is_broken(evaluation(model).logits(image), label), found.success)
    assert 5 < int(found.success.sum()) < 40
    assert (found.outcome.forwards[found.success] < 60).any() and (found.outcome.forwards[~found.success] == 60).all()


def test_more_queries_and_restarts_break_no_fewer():
    model, x = convnet(), images(30)
    ids, label = torch.arange(30), evaluation(model).logits(x).argmax(1)
    once = attacked(model, attack.square(norm="linf", eps=0.02, queries=30), x, label, ids=ids)
    thrice = attacked(model, attack.square(norm="linf", eps=0.02, queries=30, restarts=3), x, label, ids=ids)
    assert (thrice.success >= once.success).all() and int(thrice.success.sum()) > int(once.success.sum())
    left = ~thrice.success
    assert (thrice.outcome.forwards[left] == 90).all() and (thrice.outcome.value >= once.outcome.value)[left].all()


def test_another_seed_asks_other_questions():
    model, x = convnet(), images()
    label = torch.arange(N) % K
    specs = [attack.square(norm="l2", eps=0.1, queries=3, seed=s, until="end") for s in (0, 1)]
    first, second = (attacked(model, s, x, evaluation(model).logits(x).argmax(1)).outcome.images for s in specs)
    assert first.shape == (N, C, H, W) and len(label) == N and not torch.equal(first, second)


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_a_row_does_not_depend_on_the_steps_of_its_neighbours(norm):
    """To the last bit: rows that come one after the other are at patches of other sizes than those that start together."""
    draw = torch.Generator().manual_seed(5)
    x, weight = (torch.rand(8, 3, 17, 14, generator=draw) for _ in range(2))

    def goal(images, context):
        return (images * (context["w"] - 0.5)).sum((1, 2, 3)), torch.zeros(len(images), dtype=torch.bool)

    def searched(gap: int) -> torch.Tensor:
        """Each row after 100 queries, where a row starts every `gap` turns, the first ones with queries tried ahead; 0: all
        at once."""
        rows, found = Batch(torch.arange(8), x, {"w": weight}), torch.zeros_like(x)
        slots = Square(NORMS[norm], 0.8 if norm == "l2" else 0.1, 100).slots(goal, rows, block=8)
        begin = torch.arange(8) * gap
        for turn in range(7 * gap + 100):
            new = (begin == turn).nonzero()[:, 0]
            if len(new):
                slots.load(new, rows, new, slots.started(new, x[new], torch.zeros_like(new)))
            done = slots.advance()
            found[done] = slots.best.images[done]
        assert not slots.active.any() and (slots.best.forwards == 100).all()
        return found

    assert torch.equal(searched(0), searched(9))


@BOTH
@pytest.mark.parametrize(("queries", "restarts", "until"), [(45, 1, "broken"), (20, 3, "broken"), (31, 2, "end")])
def test_queries_tried_ahead_are_as_if_tried_one_by_one(norm, queries, restarts, until, monkeypatch):
    """Results, success and passes, to the last bit; fewer evaluations."""
    model, x = convnet(), images(5)
    ids, label = torch.arange(5), evaluation(model).logits(x).argmax(1)
    spec = attack.square(
        norm=norm, eps={"l2": 0.3, "linf": 0.03}[norm], queries=queries, restarts=restarts, until=until
    )
    turns = []
    advance = square.SquareSlots.advance
    monkeypatch.setattr(square.SquareSlots, "advance", lambda slots: turns.append(1) or advance(slots))
    ahead = attacked(model, spec, x, label, ids=ids)
    fewer = len(turns)
    turns.clear()
    monkeypatch.setattr(tries.Tries, "of", lambda active, like: tries.Tries.single(like))
    one = attacked(model, spec, x, label, ids=ids)
    assert fewer < len(turns)
    assert 0 < int(one.success.sum()) < 5
    for name in ("images", "value", "reached", "forwards"):
        assert torch.equal(getattr(ahead.outcome, name), getattr(one.outcome, name)), name


class Dealer:
    """A deck whose cards are the words and the sides that they were made of; each deal is looked at, and how many were drawn."""

    def __init__(self, sides):
        self.deck, self.drawn = tries.Deck(sides, 6, seed=3, purpose="square"), []

    def make(self, words, side):
        self.drawn.append(len(words) * side**2)
        return words, torch.full((len(words),), side)

    def deal(self, ids, step, busy=None):
        """Each row has what belongs to its query, and rows that come together have one side."""
        asked, draw = tries.Tries.of(torch.arange(len(ids)) < (busy or len(ids)), torch.zeros(len(ids), 1)), step + 2000
        words = random.words(ids[asked.owner], 6, seed=3, purpose="square", draw=draw[asked.owner] + asked.later)
        sides = self.deck.sides[(step[asked.owner] + asked.later).clamp_max(len(self.deck.sides) - 1)]
        places = []
        for rows, cards in self.deck.deal(self.make, asked, ids, step, draw):
            assert torch.equal(cards[0], words[rows]) and torch.equal(cards[1], sides[rows])
            assert len(sides[rows].unique()) == 1
            places += rows.tolist()
        assert sorted(places) == list(range(len(asked.owner)))


def test_a_deck_deals_what_belongs_to_each_query_and_draws_few_times():
    """Slots at different queries go on by one or several, begin anew, are given to other examples and become fewer."""
    ids, step = torch.arange(8) + 2**40, torch.arange(8) * 7
    table = Dealer(torch.full((2000,), 3))
    for turn in range(60):
        table.deal(ids, step)
        step = step + torch.arange(8) % (1 + turn % 2) + 1
    assert 0 < len(table.drawn) <= 8  # 1, 2, 4, 8, 16 and then 32 queries at once
    table.deal(ids + 1, step)
    table.deal(ids + 1, step - 9)
    table.deal(ids[:4], step[:4])
    table.deal(ids[:4], step[:4] + 1000)
    for busy in (4, 2, 1):
        for turn in range(10):
            table.deal(ids, step + turn * 8 // busy, busy)
    assert len(table.drawn) < 26


def test_a_deck_deals_patches_of_several_sides_in_turn():
    table, ids, step = Dealer(9 - torch.arange(1001) // 112), torch.arange(8), torch.arange(8) * 120
    for _ in range(70):
        table.deal(ids, step)
        step += 1
    assert len(table.drawn) < 70


def test_a_deck_forgets_where_a_slot_begins_anew():
    """Its next query has the number that was to come, and the side of a first one."""
    table, ids, step = Dealer(9 - torch.arange(9)), torch.arange(8), torch.arange(8)
    table.deal(ids, step)
    table.deck.forget()
    table.deal(ids, step * 0)


def test_large_patches_are_drawn_for_few_queries_at_once():
    table, ids = Dealer(torch.full((2000,), 200)), torch.arange(8)
    for turn in range(9):
        table.deal(ids, torch.full((8,), turn))
    assert max(table.drawn) <= tries.PIXELS and len(table.drawn) > 2


def test_a_network_without_a_gradient_is_searched_all_the_same(monkeypatch):
    """Whether its rows depend on slots and on the width of a block is told by its logits."""
    model, x = convnet(), images()
    model.register_forward_pre_hook(lambda _, inputs: ((inputs[0] * 16).round().detach() / 16,))
    victim = evaluation(model)
    label = victim.logits(x).argmax(1)
    assert not sameness.slots_matter(victim, x, label)
    monkeypatch.setattr(flow, "PATIENCE", 0)
    spec = attack.square(norm="linf", eps=0.1, queries=30)
    found = next(stages.run(victim, spec, polling([Batch(IDS, x, {"label": label})])))[1]
    assert int(found.success.sum()) > 0
    assert torch.equal(found.success, losses.is_broken(victim.logits(found.outcome.images), label))
