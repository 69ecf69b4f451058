"""Shapley values of blocks: the definition in float64, shap's, closed forms, and permutations that say how far off."""

from __future__ import annotations

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from toys import IDS, TARGET, C, H, K, N, W, convnet, evaluation, generator, images, linear, weights_of

from rbkit.tools import shapley
from rbkit.tools.attribution import Saliency
from rbkit.tools.batch import Batch
from rbkit.tools.masking import MASKERS, blurred
from rbkit.tools.models import Classifier
from rbkit.tools.saliency import explain

NET, X, BACKGROUND = convnet(), images(), images(4, seed=6)
METHODS = ("permutation-shap", "exact-shap")
SIX = {"players": 2, "players_across": 3}  # blocks of 2 and 3 rows by 2 columns
ROWS, COLUMNS = (slice(0, 3), slice(3, 5)), (slice(0, 2), slice(2, 4), slice(4, 6))


def explained(model=NET, x=X, *, target=TARGET, ids=IDS, background=BACKGROUND, method="exact-shap", block=32, **spec):
    return explain(evaluation(model, block), x, target, Saliency(method, **spec), ids=ids, background=background)


def blocks(maps):
    """Sums over the six blocks, float64 (N, 6)."""
    sums = [maps[..., rows, columns].double().sum((1, 2, 3)) for rows in ROWS for columns in COLUMNS]
    return torch.stack(sums, 1)


def hidden_by(masker, x):
    """What hidden pixels take, as a list over which values are averaged."""
    if masker == "data":
        return [image.expand_as(x) for image in BACKGROUND]
    return [{"black": torch.zeros_like(x), "mean": NET.mean.expand_as(x), "blur": blurred(x)}[masker]]


@torch.no_grad()
def game(masker, row):
    """The value of every coalition of the six blocks for one image, in float64."""
    double, found = copy.deepcopy(NET).double(), {}
    for size in range(7):
        for kept in itertools.combinations(range(6), size):
            total = 0.0
            hidden = hidden_by(masker, X)
            for fill in hidden:
                shown = fill[row].double().clone()
                for player in kept:
                    rows, columns = ROWS[player // 3], COLUMNS[player % 3]
                    shown[:, rows, columns] = X[row].double()[:, rows, columns]
                total += float(double(shown[None])[0, TARGET[row]]) / len(hidden)
            found[kept] = total
    return found


def defined(worth):
    """Shapley 1953: the mean over all orders of what a player adds."""
    total = np.zeros(6)
    for order in itertools.permutations(range(6)):
        before: tuple[int, ...] = ()
        for player in order:
            after = tuple(sorted((*before, player)))
            total[player] += worth[after] - worth[before]
            before = after
    return total / math.factorial(6)


@pytest.mark.parametrize("masker", MASKERS)
def test_exact_values_are_the_definition(masker):
    found = explained(masker=masker, **SIX)
    for row in (0, 4):
        worth = game(masker, row)
        assert blocks(found.attribution)[row].numpy() == pytest.approx(defined(worth), abs=2e-5)
        change = worth[tuple(range(6))] - worth[()]
        assert float(found.output_change[row]) == pytest.approx(change, abs=1e-5)
    # A block's value is shared evenly by its pixels and channels.
    for rows, columns in itertools.product(ROWS, COLUMNS):
        part = found.attribution[..., rows, columns].flatten(1)
        assert torch.equal(part, part[:, :1].expand_as(part))


@pytest.mark.filterwarnings("ignore")  # of the peer
def test_they_are_shaps():
    """By its permutations: its exact ones, with which these agree too, spend 10 seconds on compiling themselves."""
    import shap

    worth = game("mean", 2)

    def play(kept):
        return np.array([worth[tuple(np.flatnonzero(row))] for row in kept])

    walks = 2000
    theirs = shap.explainers.Permutation(play, np.zeros((1, 6)), seed=0)(np.ones((1, 6)), max_evals=walks * 13)
    exact = explained(masker="mean", **SIX)
    found = explained(method="permutation-shap", masker="mean", samples=200, **SIX)
    error = found.block_standard_error[2].flatten().numpy()
    off = np.abs(blocks(exact.attribution)[2].numpy() - theirs.values[0])
    assert (off < 4 * error * (200 / walks) ** 0.5 + 2e-5).all()
    off = np.abs(blocks(found.attribution)[2].numpy() - theirs.values[0])
    assert (off < 4 * error * (1 + 200 / walks) ** 0.5 + 2e-5).all()
    assert float(theirs.base_values[0]) == pytest.approx(worth[()])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("masker", ["black", "data"])
def test_of_a_linear_model_they_are_weight_times_step(method, masker):
    model = linear()
    base = torch.zeros(C, H, W) if masker == "black" else BACKGROUND[0]
    exact = weights_of(model)[TARGET] * (X - base)
    found = explained(model, method=method, masker=masker, background=BACKGROUND[:1], samples=2, **SIX)
    torch.testing.assert_close(blocks(found.attribution), blocks(exact), rtol=0, atol=1e-5)
    assert (found.completeness_error < 1e-5).all()
    if method == "permutation-shap":  # the order makes no difference
        assert (found.block_standard_error < 1e-5).all()


class Pairs(torch.nn.Module):
    """Logit k is x' A_k x: players meet in pairs only."""

    def __init__(self):
        super().__init__()
        self.forms = torch.nn.Parameter(torch.randn(K, C * H * W, C * H * W, generator=generator(5)) / 20)

    def forward(self, x):
        return torch.einsum("ni,kij,nj->nk", x.flatten(1), self.forms, x.flatten(1))


def test_one_walk_both_ways_is_exact_where_players_meet_in_pairs():
    """What the reverse is for: each pair of players meets once in each order."""
    model = Classifier(Pairs(), mean=[0.0] * C, std=[1.0] * C)
    one = explained(model, method="permutation-shap", masker="black", samples=1, **SIX)
    exact = explained(model, masker="black", **SIX)
    assert exact.attribution.std() > 0.01
    torch.testing.assert_close(one.attribution, exact.attribution, rtol=0, atol=1e-6)
    assert one.block_standard_error is None


@pytest.mark.parametrize("masker", ["mean", "data"])
def test_permutations_are_as_far_off_as_they_say(masker):
    exact = explained(masker=masker, **SIX)
    scores, errors = [], {20: [], 80: []}
    for seed, samples in itertools.product(range(8), errors):
        found = explained(method="permutation-shap", masker=masker, samples=samples, seed=seed, **SIX)
        error = found.block_standard_error.flatten(1)
        assert found.block_standard_error.shape == (N, 2, 3) and (error > 0).all()
        scores.append((blocks(found.attribution) - blocks(exact.attribution)) / error)
        errors[samples].append(float(error.mean()))
        assert (found.completeness_error < 1e-5).all()
        off = (found.output_change - exact.output_change).abs()
        if masker == "data":
            assert (off < 5 * found.standard_error).all() and (off > 0).any()
        else:
            assert found.standard_error is None and (off < 1e-6).all()
    assert 0.8 < float(torch.stack(scores).square().mean()) < 1.25
    assert float(torch.stack(scores).mean().abs()) < 0.1
    assert 1.7 < sum(errors[20]) / sum(errors[80]) < 2.3


def test_the_values_of_pixels_add_up_to_the_change():
    """Efficiency, at the finest grid: 30 players, one a pixel."""
    found = explained(method="permutation-shap", masker="blur", samples=3)
    rows = torch.arange(N)
    change = (NET(X) - NET(blurred(X)))[rows, TARGET].detach().double()
    torch.testing.assert_close(found.output_change, change, rtol=0, atol=1e-5)
    assert (found.completeness_error < 1e-6).all() and found.block_standard_error.shape == (N, H, W)
    gap = (found.attribution.flatten(1).double().sum(1) - found.output_change).abs()
    assert torch.equal(found.completeness_error, gap)


@pytest.mark.parametrize("method", METHODS)
def test_a_block_that_the_model_ignores_gets_nothing(method):
    model = linear()
    with torch.no_grad():
        model.net[1].weight.reshape(K, C, H, W)[:, :, ROWS[1], COLUMNS[1]] = 0
    found = explained(model, method=method, samples=3, **SIX).attribution
    assert (found[:, :, ROWS[1], COLUMNS[1]].abs() < 1e-6).all() and (found[:, :, ROWS[0]].abs() > 1e-6).all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("masker", MASKERS)
def test_a_map_depends_on_no_other_image(method, masker):
    """Nor on how many draws are walked together, which depends on the number of images."""
    spec = {"method": method, "masker": masker, "samples": 70, "seed": 1, **SIX}
    whole = explained(**spec)
    order = torch.tensor([3, 0, 6, 2, 5, 1, 4])
    parts = [(order, slice(None)), (torch.tensor([4]), slice(6, 7))]
    for rows, kept in parts:
        found = explained(x=X[rows], target=TARGET[rows], ids=IDS[rows], **spec)
        for name in ("attribution", "completeness_error", "output_change", "standard_error", "block_standard_error"):
            ours, theirs = getattr(found, name), getattr(whole, name)
            assert (ours is None) == (theirs is None)
            assert ours is None or torch.equal(ours, theirs[order][kept]), name


def test_orders_are_permutations_by_seed_id_and_draw():
    ids, draws = IDS.repeat_interleave(3), torch.arange(3).repeat(N)
    found = shapley.orders(ids, draws, 11, seed=2)
    assert torch.equal(found.sort(1).values, torch.arange(11).expand(3 * N, 11))
    assert len(found.unique(dim=0)) == 3 * N
    assert torch.equal(found[4:5], shapley.orders(ids[4:5], draws[4:5], 11, seed=2))
    assert not torch.equal(found, shapley.orders(ids, draws, 11, seed=3))
    many = shapley.orders(torch.arange(6000), torch.zeros(6000, dtype=torch.int64), 3, seed=0)
    counts = (many * torch.tensor([9, 3, 1])).sum(1).bincount()
    assert len(counts[counts > 0]) == 6 and ((counts[counts > 0] - 1000).abs() < 4 * 1000**0.5).all()


def test_maps_of_other_seeds_and_ids_differ():
    spec = {"method": "permutation-shap", "samples": 2, **SIX}
    first = explained(**spec).attribution
    assert not torch.equal(first, explained(seed=1, **spec).attribution)
    other = explained(ids=IDS + 1, **spec).attribution
    assert not torch.equal(first, other)


def test_the_grid_covers_the_image_in_blocks_of_like_size():
    spec = Saliency("exact-shap", players=3, players_across=4)
    found = shapley.grid(spec, 10, 9, default=8)
    assert found.shape == (10, 9) and found.flatten().bincount().tolist() == [12, 8, 8, 8, 9, 6, 6, 6, 9, 6, 6, 6]
    assert shapley.grid(Saliency("exact-shap"), 3, 2, default=8).tolist() == [[0, 1], [2, 3], [4, 5]]
    assert int(shapley.grid(Saliency("exact-shap", players=5), 32, 32, default=8).max()) == 24
    assert int(shapley.grid(Saliency("permutation-shap"), 32, 32, default=8).max()) == 63
    for wrong in ({"players": 6}, {"players": 2, "players_across": 7}, {"players": 0}):
        with pytest.raises(ValueError, match="expected at most one per pixel, 5 x 6"):
            shapley.grid(Saliency("exact-shap", **wrong), H, W, default=3)


def test_twelve_players_are_exact_and_no_more():
    twelve = explained(x=X[:2], target=TARGET[:2], ids=IDS[:2], players=3, players_across=4)
    assert twelve.attribution[0, 0].unique().numel() == 12 and (twelve.completeness_error < 1e-5).all()
    with pytest.raises(ValueError, match=r"15 players have 2\*\*15 coalitions, expected at most 12"):
        explained(players=3, players_across=5)


def test_one_player_takes_all():
    for method in METHODS:
        found = explained(method=method, players=1, samples=2)
        torch.testing.assert_close(found.attribution.flatten(1).sum(1).double(), found.output_change, rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_data_needs_a_background(method):
    for background in (None, BACKGROUND[:0]):
        with pytest.raises(ValueError, match="needs background images"):
            explained(method=method, masker="data", background=background)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("masker", ["mean", "data"])
def test_no_image_is_no_map(method, masker):
    found = explained(x=X[:0], target=TARGET[:0], ids=IDS[:0], method=method, masker=masker, samples=2)
    assert found.attribution.shape == (0, C, H, W) and found.completeness_error.shape == (0,)


def test_blocks_are_full_and_permutations_cost_what_is_said():
    judged, seen = evaluation(NET), []
    judged.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    explain(judged, X, TARGET, Saliency("permutation-shap", samples=40, **SIX), ids=IDS)
    # 10 images a draw, 7 draws at a time; the last 5, and the two ends, fill no block.
    assert set(seen) == {32} and len(seen) <= 40 * N * 10 / 32 + 6 + 2


def test_outputs_are_the_objects_they_name():
    found = explained(output="probability", masker="black", **SIX).output_change
    ends = [NET(x).detach().double().softmax(1)[torch.arange(N), TARGET] for x in (X, torch.zeros_like(X))]
    torch.testing.assert_close(found, ends[0] - ends[1], rtol=0, atol=1e-6)
    found = explained(method="permutation-shap", output="probability", masker="data", samples=40, **SIX)
    mean = NET(BACKGROUND).detach().double().softmax(1)[:, TARGET].mean(0)
    assert ((ends[0] - mean - found.output_change).abs() < 4 * found.standard_error).all()


def test_the_judge_makes_maps_against_data_again_only_with_a_background():
    for method in METHODS:
        for masker, background, able in (("data", None, False), ("data", BACKGROUND, True), ("mean", None, True)):
            rows = Batch(evaluation(NET), IDS, X, saliency=Saliency(method, masker=masker), background=background)
            assert rows.can_explain == able
