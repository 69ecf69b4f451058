"""Samples, validation parts and shards: nested, free of neighbours, and without gaps."""

from __future__ import annotations

import numpy as np
import pytest

from rbkit.tools.sample import in_validation, nested_sample, shard_range


def test_a_smaller_sample_lies_within_a_larger_one():
    small, large = nested_sample(203, 17, seed=4), nested_sample(203, 90, seed=4)
    assert len(set(small.tolist())) == 17 and len(set(large.tolist())) == 90
    assert set(small.tolist()) < set(large.tolist())
    assert (np.diff(small) > 0).all() and small.min() >= 0 and large.max() < 203
    assert set(small.tolist()) != set(nested_sample(203, 17, seed=5).tolist())


def test_a_sample_of_all_rows_is_all_rows_and_more_are_refused():
    assert nested_sample(9, None, seed=0).tolist() == list(range(9)) == nested_sample(9, 9, seed=0).tolist()
    assert nested_sample(9, 0, seed=0).tolist() == []
    with pytest.raises(ValueError, match="asked for 10 rows of 9"):
        nested_sample(9, 10, seed=0)


def test_each_row_is_sampled_equally_often():
    counts = np.zeros(20)
    for seed in range(400):
        counts[nested_sample(20, 5, seed=seed)] += 1
    assert abs(counts - 100).max() < 4.5 * np.sqrt(400 * 0.25 * 0.75)


def test_the_validation_part_is_a_function_of_the_id():
    ids = np.arange(5000)
    whole = in_validation(ids, seed=2)
    order = np.random.default_rng(0).permutation(5000)
    assert (in_validation(ids[order], seed=2) == whole[order]).all()
    assert [bool(in_validation(ids[i : i + 1], seed=2)[0]) for i in range(40)] == whole[:40].tolist()
    assert abs(whole.mean() - 0.1) < 4 * np.sqrt(0.1 * 0.9 / 5000)
    assert (in_validation(ids, seed=3) != whole).any()
    wider = in_validation(ids, fraction=0.3, seed=2)
    assert (wider >= whole).all() and abs(wider.mean() - 0.3) < 0.03


@pytest.mark.parametrize(("total", "shards"), [(10, 3), (2, 5), (0, 2), (101, 7), (6, 6)])
def test_shards_tile_the_rows(total, shards):
    ranges = [shard_range(total, k, shards) for k in range(1, shards + 1)]
    assert [i for low, high in ranges for i in range(low, high)] == list(range(total))
    sizes = [high - low for low, high in ranges]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("shard", [0, 4])
def test_a_shard_outside_the_count_is_refused(shard):
    with pytest.raises(ValueError, match="expected 1/3 to 3/3"):
        shard_range(10, shard, 3)
