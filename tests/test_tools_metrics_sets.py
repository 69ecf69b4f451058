"""Metrics of sets and records: the Fréchet distance, merging, and what is never pooled or compared."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
import toys
from conftest import execute
from scipy import linalg, stats

from rbkit.tools import frechet as tool
from rbkit.tools.batch import Batch
from rbkit.tools.compare import interpretability, paired
from rbkit.tools.frechet import frechet
from rbkit.tools.likeness import judged_features
from rbkit.tools.models import features_of
from rbkit.tools.pool import Pool, Pools

torch.set_num_threads(1)


def features(n, d, seed, *, mean=0.0, scale=1.0):
    """Correlated features (n, d), float32 as networks give them."""
    source = toys.generator(seed)
    mix = torch.randn(d, d, generator=source)
    return mean + scale * torch.randn(n, d, generator=source) @ mix


def slow(first, second):
    """Heusel et al. 2017, equation 6, with a root of the product of the covariances."""
    a, b = (x.double().numpy() for x in (first, second))
    root = linalg.sqrtm(np.cov(a, rowvar=False) @ np.cov(b, rowvar=False)).real
    trace = np.trace(np.cov(a, rowvar=False)) + np.trace(np.cov(b, rowvar=False)) - 2 * np.trace(root)
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + trace)


def test_frechet_is_the_papers():
    for n, m in ((50, 70), (9, 8)):
        first, second = features(n, 7, 1), features(m, 7, 2, mean=0.5, scale=1.5)
        assert frechet(first, second) == pytest.approx(slow(first, second), rel=1e-9)


@pytest.mark.parametrize("n", [3, 60])
def test_frechet_of_a_set_to_itself_is_zero_and_both_ways_the_same(n):
    # Trap I5, also where the covariance is singular and where features lie far from 0.
    first, second = features(n, 8, 1, mean=1e3), features(n, 8, 2, mean=1e3)
    size = float(first.double().var(0).sum())
    assert abs(frechet(first, first)) < 1e-9 * size
    assert frechet(first, second) == pytest.approx(frechet(second, first), rel=1e-9)
    assert frechet(first, first.flip(0)) < 1e-9 * size
    assert frechet(first, second) > 1e-3 * size


def test_frechet_of_shifted_and_of_stretched_sets():
    first = features(40, 5, 3).double()
    shift = torch.arange(5.0).double()
    assert frechet(first, first + shift) == pytest.approx(30.0, rel=1e-9)
    stretched = 1.75 * (first - first.mean(0)) + first.mean(0)
    assert frechet(first, stretched) == pytest.approx(0.75**2 * float(first.var(0).sum()), rel=1e-9)
    one, other = first[:, :1], 2 * first[:, 1:2] - 3
    expected = (one.mean() - other.mean()) ** 2 + (one.std() - other.std()) ** 2
    assert frechet(one, other) == pytest.approx(float(expected), rel=1e-9)
    with pytest.raises(ValueError, match="1 rows"):
        frechet(first[:1], first)


def test_extrapolation_takes_off_the_bias_of_small_sets():
    ids, found = torch.arange(200), []
    for study in range(6):
        first, second = (torch.randn(200, 20, generator=toys.generator(2 * study + k)) for k in (0, 1))
        found.append((frechet(first, second), tool.extrapolated(ids + 200 * study, first, second)))
    plain, better = np.abs(np.array(found)).mean(0)
    assert plain > 0.5 and better < plain / 3  # the true distance is 0
    assert tool.extrapolated(ids[:40], first[:40], second[:40]) is None


def test_features_are_those_of_the_judge_before_its_head():
    judge, model = toys.evaluation(toys.convnet(seed=7)), toys.evaluation(toys.convnet())
    x, made, start = (toys.images(seed=seed) for seed in (0, 1, 2))
    given = Batch(model, torch.arange(toys.N), x, inverted=made, start=start, judge=judge)
    found = judged_features(given)
    for name, images in (("real", x), ("generated", made), ("start", start)):
        assert torch.equal(found[name], features_of(judge, images))
    assert set(judged_features(Batch(model, torch.arange(toys.N), x, inverted=made, judge=judge))) == {
        "real",
        "generated",
    }


# ---------------------------------------------------------------------------------------------------------- pools


def pooled(parts, sets, columns):
    pool = Pool({"judge": "abc"})
    for rows in parts:
        pool.add(
            rows, {name: v[rows] for name, v in columns.items()}, origin="-", total=30, first=0,
            features={name: v[rows] for name, v in sets.items()},
        )  # fmt: skip
    return pool.records()


def test_any_partition_gives_the_same_distance():
    sets = {name: features(30, 4, seed) for seed, name in enumerate(("generated", "real", "start"))}
    columns = {"own_accuracy": torch.ones(30)}
    whole = pooled([torch.arange(30)], sets, columns)
    parted = pooled([torch.arange(17, 30), torch.arange(17).flip(0)], sets, columns)
    assert whole == parted
    (record,) = [r for r in whole if r["metric"] == "frechet_distance"]
    assert record["value"] == pytest.approx(frechet(sets["generated"], sets["real"]), rel=1e-9)
    assert record["floor"] == pytest.approx(frechet(sets["start"], sets["real"]), rel=1e-9)
    assert (record["n"], record["dimensions"], record["rank_deficient"], record["extractor"]) == (30, 4, False, "abc")
    assert record["low"] is record["high"] is None and record["extrapolated"] is not None


def test_a_set_too_small_for_a_covariance_says_so():
    sets = {name: features(30, 40, seed) for seed, name in enumerate(("generated", "real"))}
    (record,) = pooled([torch.arange(30)], sets, {})
    assert record["rank_deficient"] is True and record["floor"] is None and record["extrapolated"] is None
    assert math.isfinite(record["value"])
    (record,) = pooled([torch.arange(1)], sets, {})
    assert record["value"] is None and record["reason"] == "fewer than 2 examples"


def test_agreement_of_deletion_with_road():
    pool = Pool({})
    first = torch.rand(9, generator=toys.generator(0))
    columns = {"deletion": first, "road_morf": first**3}
    pool.add(torch.arange(9), columns, origin="-", total=9, first=0)
    (record,) = [r for r in pool.records() if r["metric"].endswith("_agreement")]
    assert record["metric"] == "road_agreement" and record["value"] == pytest.approx(1.0)
    assert stats.spearmanr(first, first**3).statistic == pytest.approx(record["value"])


# ----------------------------------------------------------------------------------------- what goes not together


def completeness(tolerance, *, robust=False):
    params = {"method": "ig", "steps": 50, "tolerance": tolerance}
    return {
        "kind": "attributions", "method": "ig", "model_sha": str(robust), "train_eps": 0.5 if robust else None, "params": params
    }  # fmt: skip


def test_paths_of_different_tolerance_are_not_pooled_or_compared():
    pools = Pools()
    for tolerance in (None, 0.05, 0.01):
        pools.of(completeness(tolerance)).add(
            torch.arange(4), {"completeness_error": torch.rand(4)}, origin="-", total=4, first=0
        )  # fmt: skip
    assert len(pools.records()) == 3
    for tolerance in (0.05, 0.01):
        pools.of(completeness(tolerance, robust=True)).add(
            torch.arange(4), {"completeness_error": torch.rand(4)}, origin="-", total=4, first=0
        )  # fmt: skip
    pairs = [
        (r["standard"]["params"]["tolerance"], r["robust"]["params"]["tolerance"]) for r in paired(pools.records())
    ]
    assert pairs == [(0.05, 0.05), (0.01, 0.01)]
    alone = Pools()
    for about in (completeness(0.05), completeness(0.01, robust=True)):
        alone.of(about).add(torch.arange(4), {"completeness_error": torch.rand(4)}, origin="-", total=4, first=0)
    assert paired(alone.records()) == []


def test_scale_and_floor_are_no_verdict_on_two_models():
    rows = [
        {"metric": name, "robust": {"kind": "attributions"}} for name in ("infidelity", "randomisation_floor", "gini")
    ]
    assert [row["metric"] for row in interpretability(rows)] == ["gini"]


# -------------------------------------------------------------------------------------------------- the command


def records(result):
    assert result.status == 0, result.err
    return {r["metric"]: r for r in map(json.loads, result.out.decode().splitlines())}


def test_the_judge_keeps_features_so_that_scores_merge_by_cat(tmp_path, stream_file, model_file):
    made = tmp_path / "made.safetensors"
    done = execute("rb-invert", stream_file, "-m", model_file, "--mode", "class", "--steps", 2, "-q", "-o", made)
    assert done.status == 0, done.err
    judge = ("-m", model_file, "--judge", model_file, "-q", "--json")
    whole = records(execute("rb-score", made, *judge))
    assert whole["frechet_distance"]["floor"] > 0 and whole["frechet_distance"]["n"] == 40
    scores = b""
    for part in (1, 2):
        path = tmp_path / f"{part}.safetensors"
        done = execute(
            "rb-score", made, *judge, "--shard", f"{part}/2", "-o", path, "--metrics", "frechet_distance,own_accuracy"
        )
        assert records(done)["frechet_distance"]["complete"] is False
        scores += path.read_bytes()
    merged = records(execute("rb-score", "-q", "--json", stdin=scores))
    assert set(merged) == {"own_accuracy", "frechet_distance"}
    for name, record in merged.items():
        assert record.keys() == whole[name].keys()
        for key, found in record.items():
            expected = whole[name][key]
            assert found == (pytest.approx(expected, rel=1e-10) if isinstance(expected, float) else expected), key


def test_slow_metrics_are_computed_by_name_and_all(tmp_path, stream_file, model_file):
    maps = tmp_path / "maps.safetensors"
    done = execute("rb-saliency", stream_file, "-m", model_file, "--method", "gradient", "-q", "-o", maps)
    assert done.status == 0, done.err
    judge = ("-m", model_file, "-q", "--json", "--no-bands", "--n", 3)
    slow_ones = {"sensitivity_n", "road_morf", "attack_sensitivity", "randomisation", "random_logit"}
    quick = set(records(execute("rb-score", maps, *judge)))
    assert {"infidelity_scaled", "low_frequency_energy"} <= quick and not slow_ones & quick
    assert slow_ones | quick <= set(records(execute("rb-score", maps, *judge, "--metrics", "all")))


def test_a_median_is_that_of_the_values_and_says_so():
    """Of nine values one is huge: the mean follows it, the median does not."""
    values = torch.tensor([0.5, 0.1, 0.9, 0.3, 0.7, 0.2, 0.8, 0.6, 100.0])
    pool = Pool({})
    columns = {"completeness_error": values, "completeness_error_median": values}
    pool.add(torch.arange(9), columns, origin="-", total=9, first=0)
    mean, median = pool.records()
    assert mean["value"] == pytest.approx(float(values.double().mean())) and "statistic" not in mean
    assert median["value"] == pytest.approx(0.6) and median["statistic"] == "median"
    assert 0.1 <= median["low"] <= 0.6 <= median["high"] <= 100 and median["excluded"] == 0
