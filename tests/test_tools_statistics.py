"""Intervals, the keyed bootstrap, and pools that do not care how their examples arrived."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import reference
import torch
from scipy import stats

from rbkit.tools.pool import Pools
from rbkit.tools.statistics import (
    CHUNK,
    bootstrap_means,
    bootstrap_median,
    finite_or_none,
    mcnemar,
    poisson_weights,
    wilson,
    z_score,
)

torch.set_num_threads(1)


@pytest.mark.parametrize(("successes", "n"), [(0, 5), (5, 5), (3, 7), (250, 1000), (1, 1)])
def test_wilson_is_the_formula(successes, n):
    found = wilson(successes, n)
    low, high = reference.wilson(successes, n)
    assert found.value == successes / n and found.n == n
    assert found.low == pytest.approx(low, abs=1e-12)
    assert found.high == pytest.approx(high, abs=1e-12)
    narrow = wilson(successes, n, confidence=0.5)
    assert narrow.high - narrow.low < found.high - found.low


def test_wilson_of_nothing_is_nothing():
    found = wilson(0, 0)
    assert (found.value, found.low, found.high, found.n) == (None, None, None, 0)


def test_bootstrap_weights_are_poisson_of_mean_one():
    weights = poisson_weights(torch.arange(2000), 100)
    assert weights.shape == (2000, 100)
    assert abs(weights.mean() - 1) < 5 / 200_000**0.5
    assert abs(weights.var() - 1) < 0.03
    for k in range(5):
        share, p = float((weights == k).double().mean()), stats.poisson.pmf(k, 1.0)
        assert abs(share - p) < 5 * math.sqrt(p * (1 - p) / 200_000)
    # Neither examples nor draws go together.
    assert abs(torch.corrcoef(weights[:, :2].T)[0, 1]) < 0.1
    assert abs(torch.corrcoef(weights[:2])[0, 1]) < 0.4


def test_bootstrap_weights_are_keyed_by_id_and_draw():
    ids = torch.tensor([9, 2**40, 3, 77])
    whole = poisson_weights(ids, 50)
    assert torch.equal(poisson_weights(ids[[2, 0]], 50), whole[[2, 0]])
    assert torch.equal(poisson_weights(ids, 20), whole[:, :20])
    assert not torch.equal(poisson_weights(ids, 50, seed=1), whole)


def test_bootstrap_means_are_weighted_means_of_what_is_known():
    ids = torch.arange(600) * 7  # more than a chunk
    values = torch.randn(600, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    values[::3, 1] = torch.nan
    values[:, 2] = torch.nan
    values[4, 2] = 0.25
    found = bootstrap_means(ids, values, draws=200)
    weights = poisson_weights(ids, 200)
    for column in (0, 1):
        known = ~values[:, column].isnan()
        means = (weights[known] * values[known, column][:, None]).sum(0) / weights[known].sum(0)
        low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        assert found[column].value == pytest.approx(values[known, column].mean().item(), abs=1e-12)
        assert (found[column].low, found[column].high) == (
            pytest.approx(low, abs=1e-12),
            pytest.approx(high, abs=1e-12),
        )
        assert found[column].n == int(known.sum())
    assert (found[2].value, found[2].low, found[2].high, found[2].n) == (0.25, None, None, 1)
    empty = bootstrap_means(ids[:3], torch.full((3, 1), torch.nan, dtype=torch.float64))[0]
    assert (empty.value, empty.low, empty.high, empty.n) == (None, None, None, 0)


def test_bootstrap_intervals_cover_the_mean_as_often_as_they_say():
    # Each column is a study of its own with the same ids, hence the same weights: 400 studies for the price of one.
    values = torch.randn(80, 400, generator=torch.Generator().manual_seed(1), dtype=torch.float64).exp() ** 0.5
    truth = math.exp(0.125)
    found = bootstrap_means(torch.arange(80), values)
    assert 0.91 < sum(i.low < truth < i.high for i in found) / 400 < 0.97
    half = bootstrap_means(torch.arange(80), values, confidence=0.5)
    assert 0.42 < sum(i.low < truth < i.high for i in half) / 400 < 0.58


@pytest.mark.parametrize(("only_first", "only_second"), [(0, 0), (4, 0), (3, 9), (20, 21)])
def test_mcnemar_is_twice_the_binomial_tail(only_first, only_second):
    first = torch.tensor([True] * only_first + [False] * only_second + [True] * 5 + [False] * 6)
    second = torch.tensor([False] * only_first + [True] * only_second + [True] * 5 + [False] * 6)
    assert mcnemar(first, second) == pytest.approx(reference.mcnemar(only_first, only_second), abs=1e-12)


def test_z_score_and_finite_or_none():
    assert z_score(3.0, 1.0, 0.5) == 4.0
    assert z_score(3.0, 1.0, 0.0) is None
    assert [finite_or_none(x) for x in (1.5, None, math.nan, math.inf)] == [1.5, None, None, None]


# ------------------------------------------------------------------------------------------------------ pools

ABOUT = {"kind": "attributions", "model_sha": "a", "method": "ig"}
IDS = torch.randperm(90, generator=torch.Generator().manual_seed(6)) * 3
SOURCE = torch.Generator().manual_seed(7)
VALUES = {
    "clean_accuracy": torch.randint(0, 2, (90,), generator=SOURCE).double(),
    "insertion": torch.randn(90, generator=SOURCE, dtype=torch.float64),
    "insertion_mean": torch.randn(90, generator=SOURCE, dtype=torch.float64),
    "deletion": torch.randn(90, generator=SOURCE, dtype=torch.float64) - 1,
    "deletion@random": torch.randn(90, generator=SOURCE, dtype=torch.float64),
    "deletion@edges": torch.full((90,), 0.5, dtype=torch.float64),
}
VALUES["insertion"][[3, 50]] = torch.nan


def pooled(*parts, values=VALUES, about=ABOUT, total=None):
    """Records of rows that arrive in these parts, by metric."""
    pools = Pools()
    for number, rows in enumerate(parts):
        columns = {name: column[rows] for name, column in values.items()}
        pools.of(about).add(IDS[rows], columns, origin=str(number), total=total, first=0)
    return {r["metric"]: r for r in pools.records()}


def test_records_hold_estimates_intervals_and_what_was_left_out():
    found = pooled(torch.arange(90))
    accuracy, insertion = found["clean_accuracy"], found["insertion"]
    low, high = reference.wilson(int(VALUES["clean_accuracy"].sum()), 90)
    assert (accuracy["low"], accuracy["high"]) == (pytest.approx(low), pytest.approx(high))
    assert accuracy["excluded"] == 0 and accuracy["n"] == 90 and accuracy["model_sha"] == "a"
    assert insertion["excluded"] == 2 and insertion["n"] == 88
    assert insertion["value"] == pytest.approx(VALUES["insertion"].nanmean().item())
    assert insertion["low"] < insertion["value"] < insertion["high"]
    known = ~VALUES["insertion"].isnan()
    rho = stats.spearmanr(VALUES["insertion"][known], VALUES["insertion_mean"][known]).statistic
    assert found["insertion_agreement"]["value"] == pytest.approx(rho)
    assert found["insertion_agreement"]["n"] == 88
    assert "deletion_agreement" not in found


def test_bands_are_paired_with_the_random_map_and_know_which_way_is_better():
    record = pooled(torch.arange(90))["deletion"]
    gain = VALUES["deletion@random"] - VALUES["deletion"]  # lower is better
    assert record["band"] == {"random": pytest.approx(VALUES["deletion@random"].mean().item()), "edges": 0.5}
    assert record["z"] == pytest.approx((gain.mean() / (gain.std() / 90**0.5)).item())
    assert record["z"] > 3
    assert record["win_rate"] == pytest.approx((gain > 0).double().mean().item())


def test_a_map_equal_to_the_random_one_wins_half_the_time():
    values = {"gini": VALUES["deletion"], "gini@random": VALUES["deletion"]}
    record = pooled(torch.arange(90), values=values)["gini"]
    assert record["win_rate"] == 0.5 and record["z"] is None


@pytest.mark.parametrize("cuts", [[1, 89], [30, 30, 30], [17, 5, 68]])
def test_any_partition_in_any_order_gives_the_same_records(cuts):
    whole = pooled(torch.arange(90))
    order = torch.randperm(90, generator=torch.Generator().manual_seed(sum(cuts[:1])))
    found = pooled(*reversed(order.split(cuts)))
    assert found.keys() == whole.keys()
    for metric, record in whole.items():
        for name, value in record.items():
            if isinstance(value, float):
                assert found[metric][name] == pytest.approx(value, abs=1e-10), (metric, name)
            elif name != "band":
                assert found[metric][name] == value, (metric, name)


def test_an_id_may_not_appear_twice():
    with pytest.raises(ValueError, match=f"id {int(IDS[4])} appears twice"):
        pooled(torch.arange(5), torch.arange(4, 9))
    with pytest.raises(ValueError, match="appears twice"):
        pooled(torch.tensor([2, 2]))


def test_the_same_id_may_appear_for_another_subject():
    pools = Pools()
    for method in ("ig", "shap"):
        pools.of({**ABOUT, "method": method}).add(IDS, VALUES, origin="-", total=90, first=0)
    assert [r["method"] for r in pools.records() if r["metric"] == "deletion"] == ["ig", "shap"]


def test_parts_that_differ_in_what_can_be_scored_are_refused():
    pools = Pools()
    pools.of(ABOUT).add(IDS[:5], {"gini": torch.zeros(5)}, origin="a", total=None, first=0)
    with pytest.raises(ValueError, match="entropy"):
        pools.of(ABOUT).add(
            IDS[5:9], {"gini": torch.zeros(4), "entropy": torch.zeros(4)}, origin="b", total=None, first=5
        )


def test_complete_means_that_all_announced_rows_are_here():
    assert all(r["complete"] for r in pooled(torch.arange(90), total=90).values())
    assert not any(r["complete"] for r in pooled(torch.arange(89), total=90).values())
    assert all(r["complete"] for r in pooled(torch.arange(40), torch.arange(40, 90), total=45).values())
    assert all(r["complete"] for r in pooled(torch.arange(3), total=None).values())


def test_a_metric_defined_nowhere_says_so():
    record = pooled(torch.arange(90), values={"gini": torch.full((90,), torch.nan)})["gini"]
    assert record["value"] is None and record["excluded"] == 90 and record["reason"]
    constant = pooled(torch.arange(90), values={"insertion": VALUES["deletion"], "insertion_mean": torch.ones(90)})
    assert constant["insertion_agreement"]["value"] is None and constant["insertion_agreement"]["reason"]


def attacks(*sets, eps=(0.5, 0.5, 0.5), rows=None):
    """Pools of several attacks, each with its robust accuracy per example."""
    pools = Pools()
    for number, (values, radius) in enumerate(zip(sets, eps, strict=False)):
        about = {"kind": "adversarial", "model_sha": "a", "norm": "l2", "eps": radius, "attack": f"attack{number}"}
        order = torch.arange(len(values)) if number % 2 == 0 else torch.arange(len(values) - 1, -1, -1)
        count = rows[number] if rows else len(values)
        chosen = order[:count]
        pools.of(about).add(IDS[chosen], {"robust_accuracy": values[chosen]}, origin=str(number), total=None, first=0)
    return pools.records()


def test_the_worst_case_is_pointwise_over_attacks():
    first, second = torch.randint(0, 2, (2, 90), generator=torch.Generator().manual_seed(8)).double()
    records = attacks(first, second)
    worst = [r for r in records if r["attack"] == "worst"]
    assert len(worst) == 1
    assert worst[0]["value"] == pytest.approx((first * second).mean().item())
    assert worst[0]["value"] < min(r["value"] for r in records if r["attack"] != "worst")
    assert worst[0]["params"]["over"] == ["attack0", "attack1"]


def test_there_is_no_worst_case_over_other_balls_or_other_rows():
    first = torch.ones(90)
    assert not [r for r in attacks(first, first, eps=(0.5, 0.25)) if r["attack"] == "worst"]
    assert not [r for r in attacks(first, first, rows=(90, 89)) if r["attack"] == "worst"]
    assert not [r for r in attacks(first) if r["attack"] == "worst"]


def test_a_median_may_be_of_infinite_values():
    """Of an even number the mean of the middle two; NaN is left out; in any order; None for what is infinite."""
    values = torch.tensor([3.0, math.inf, 1.0, math.nan, 2.0, 8.0], dtype=torch.float64)
    ids = torch.arange(6)
    found = bootstrap_median(ids, values)
    assert (found.value, found.n) == (3.0, 5) and found.low in (1.0, 2.0) and found.high is None
    order = torch.tensor([5, 0, 3, 1, 4, 2])
    assert bootstrap_median(ids[order], values[order]) == found
    assert bootstrap_median(ids[[0, 4]], values[[0, 4]]).value == 2.5
    assert bootstrap_median(ids[[1, 1, 0]], values[[1, 1, 0]]).value is None
    assert bootstrap_median(ids[:0], values[:0]).n == 0 and bootstrap_median(ids[3:4], values[3:4]).value is None


def test_the_interval_of_a_median_is_that_of_all_weights_at_once():
    """Rows of several parts, the median between two of them, against each draw's values repeated by its weights."""
    n = 3 * CHUNK + 7
    values = torch.rand(n, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    ids = torch.arange(n).flip(0)
    medians = []
    for weights in poisson_weights(ids, 50).T.long():
        drawn = values.repeat_interleave(weights).sort().values
        medians.append(float(drawn[(len(drawn) - 1) // 2]))
    medians.sort()
    found = bootstrap_median(ids, values, draws=50, confidence=0.9)
    assert (found.low, found.high) == (medians[2], medians[47])


def test_interval_of_a_median_covers_it():
    """95 % of the intervals of 300 samples of 61 exponential numbers hold ln 2."""
    hits = 0
    for draw in range(300):
        generator = torch.Generator().manual_seed(draw)
        values = -torch.rand(61, generator=generator, dtype=torch.float64).log()
        found = bootstrap_median(torch.arange(61) + 1000 * draw, values, draws=400)
        hits += found.low <= math.log(2) <= found.high
    assert 0.90 <= hits / 300 <= 0.99


def test_a_pool_of_distances_is_told_by_its_median():
    pools = Pools()
    ids, distance = torch.arange(5), torch.tensor([0.0, 0.5, 0.2, math.inf, 0.4])
    pool = pools.of({"attack": "fab-t"})
    pool.add(ids, {"minimal_distance": distance.double()}, origin="a", total=5, first=0)
    (record,) = pools.records()
    assert (record["metric"], record["value"], record["n"]) == ("minimal_distance", pytest.approx(0.4), 5)
    assert record["statistic"] == "median" and record["low"] == 0.0 and record["high"] is None


GROWTH = """
import resource, torch
from rbkit.cli._compute import keep_freed_memory
from rbkit.tools.pool import Pool

keep_freed_memory()
pool, peaks = Pool({}), []
for part in range(40):
    document = torch.zeros(512, 4100, dtype=torch.int64)  # 16 MiB, of which the ids are a view
    document[:, 0] = torch.arange(512) + 512 * part
    blocks = [torch.ones(2**20 + n) for n in range(3)]
    pool.add(document[:, 0], {f"metric {k}": torch.zeros(512) for k in range(8)}, origin="a", total=None, first=0)
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
print(peaks[-1] - peaks[4])
"""


def test_a_pool_grows_by_its_values_alone():
    """Neither whole documents nor the holes between small pieces stay: 20,000 rows of 9 numbers are 1.5 MiB."""
    done = subprocess.run([sys.executable, "-c", GROWTH], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 150
