"""Randomness: known answers of Philox, numpy equal to torch, moments, and independence of batch and order."""

from __future__ import annotations

import numpy as np
import pytest
import reference
import torch
from scipy import stats

from rbkit.tools import random
from rbkit.tools.lanes import threads
from rbkit.tools.philox import key_of, philox, uniform_rows

IDS = torch.tensor([5, 0, 7, 2**40 + 3, -1, 123456789])

# Random123, tests/kat_vectors: philox4x32 10.
KNOWN = [
    ([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ([0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], [0xA4093822, 0x299F31D0], "d16cfe09 94fdcceb 5001e420 24126ea1"),
]  # fmt: skip


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN, ids=["zeros", "ones", "pi"])
def test_philox_gives_the_published_answers(counter, key, answer):
    expected = [int(word, 16) for word in answer.split()]
    assert [int(w) for w in philox(tuple(torch.tensor([c]) for c in counter), tuple(key))] == expected
    with np.errstate(over="ignore"):
        assert [
            int(w[0]) for w in philox(tuple(np.array([c], dtype=np.int64) for c in counter), tuple(key))
        ] == expected
    assert list(reference.philox4x32(counter, key)) == expected


def test_words_are_philox_of_position_draw_and_id():
    found = random.words(IDS, 9, seed=11, purpose="test", draw=3)
    key = key_of(11, "test")
    for row, i in zip(found, IDS.tolist(), strict=True):
        low, high = i & 0xFFFFFFFF, (i >> 32) & 0xFFFFFFFF
        slow = [w for position in range(3) for w in reference.philox4x32([position, 3, low, high], key)]
        assert row.tolist() == slow[:9]


def test_numpy_and_torch_sides_agree():
    """The 53-bit number of the numpy side is made of the first two words of the torch side."""
    two = random.words(IDS, 2, seed=4, purpose="sample").numpy()
    expected = ((two[:, 0] >> 5) * 2.0**26 + (two[:, 1] >> 6)) / 2.0**53
    assert (uniform_rows(IDS.numpy(), seed=4, purpose="sample") == expected).all()


@pytest.mark.parametrize("rows", [42, 43])
def test_words_of_a_whole_block_are_those_of_its_rows_on_any_number_of_threads(rows):
    """On both sides of the size from which torch shares the work."""
    ids = torch.arange(rows) + 2**33
    assert (rows * 768 >= random.SHARED) == (rows == 43)
    for count in (1, 2):
        with threads(count):
            found = random.words(ids, 3072, seed=2, purpose="test", draw=ids - 2**33)
        for row in (0, 17, rows - 1):
            assert torch.equal(found[row], random.words(ids[row : row + 1], 3072, seed=2, purpose="test", draw=row)[0])


@pytest.mark.parametrize("draw_of", ["uniform", "normal"])
def test_rows_do_not_depend_on_batch_or_order(draw_of):
    draw = getattr(random, draw_of)
    whole = draw(IDS, (3, 5, 2), seed=1, purpose="p", draw=2)
    order = torch.tensor([4, 2, 0, 5, 1, 3])
    assert torch.equal(draw(IDS[order], (3, 5, 2), seed=1, purpose="p", draw=2), whole[order])
    for i in range(len(IDS)):
        assert torch.equal(draw(IDS[i : i + 1], (3, 5, 2), seed=1, purpose="p", draw=2)[0], whole[i])
    each = torch.tensor([0, 1, 2, 3, 4, 2])
    mixed = draw(IDS, (3, 5, 2), seed=1, purpose="p", draw=each)
    assert torch.equal(mixed[[2, 5]], whole[[2, 5]]) and not torch.equal(mixed[0], whole[0])


def test_every_part_of_the_key_matters():
    base = random.uniform(IDS, (4,), seed=1, purpose="p", draw=0)
    for other in (
        random.uniform(IDS, (4,), seed=2, purpose="p", draw=0),
        random.uniform(IDS, (4,), seed=1, purpose="q", draw=0),
        random.uniform(IDS, (4,), seed=1, purpose="p", draw=1),
        random.uniform(IDS + 2**32, (4,), seed=1, purpose="p", draw=0),
    ):
        assert not (other == base).any()


def test_global_generator_is_not_used():
    before = torch.random.get_rng_state()
    random.normal(IDS, (3,), seed=0, purpose="p")
    assert torch.equal(torch.random.get_rng_state(), before)


def test_uniform_is_uniform():
    x = random.uniform(torch.arange(500), (41,), seed=3, purpose="p").double().flatten().numpy()
    assert x.min() >= 0 and x.max() < 1
    assert stats.kstest(x, "uniform").pvalue > 1e-3
    assert abs(x.mean() - 1 / 2) < 4 * (1 / 12 / len(x)) ** 0.5


def test_normal_is_normal():
    x = random.normal(torch.arange(500), (41,), seed=3, purpose="p").double()
    assert stats.kstest(x.flatten().numpy(), "norm").pvalue > 1e-3
    size = x.numel() ** 0.5
    for power, moment, spread in ((1, 0, 1), (2, 1, 2**0.5), (3, 0, 15**0.5), (4, 3, 96**0.5)):
        assert abs(float((x**power).mean()) - moment) < 4 * spread / size
    # Box and Muller's two halves share a radius but must not be correlated, nor may neighbouring ids be.
    assert abs(float((x[:, 0] * x[:, 21]).mean())) < 4 / 500**0.5
    assert abs(float((x[1:] * x[:-1]).mean())) < 4 / size


def test_integers_are_balanced():
    found = random.integers(torch.arange(7000), 7, seed=0, purpose="p")
    assert int(found.min()) == 0 and int(found.max()) == 6
    assert stats.chisquare(torch.bincount(found).numpy()).pvalue > 1e-3


def test_permutation_is_one_and_depends_on_the_draw():
    first, second = (random.permutation(101, seed=0, purpose="order", draw=d) for d in (0, 1))
    assert first.sort().values.tolist() == list(range(101)) == second.sort().values.tolist()
    assert not torch.equal(first, second) and not torch.equal(first, torch.arange(101))


@pytest.mark.parametrize("count", [1, 7, 20000])
def test_an_order_rises_by_uniform_numbers_and_equal_ones_stay_as_they_come(count):
    found = random.order(IDS, count, seed=3, purpose="test", draw=2)
    drawn = random.uniform(IDS, (count,), seed=3, purpose="test", draw=2)
    assert torch.equal(found, drawn.argsort(dim=1, stable=True))
    if count == 20000:  # some are equal
        assert (drawn.sort(dim=1).values.diff(dim=1) == 0).any()
