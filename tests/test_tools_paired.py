"""Paired differences of two models: values, intervals and tests against their definitions."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats

from rbkit.tools.paired import differences
from rbkit.tools.pool import Pools

N = 37


def filled(*models, **about):
    """Pools of models (sha, ids, columns), all about the same question but for what `about` says of each."""
    pools = Pools()
    for sha, ids, columns in models:
        own = {key: value[sha] for key, value in about.items()}
        pool = pools.of({"kind": "adversarial", "model_sha": sha, "train_eps": 0.5, "eps": 1.0, **own})
        pool.add(torch.tensor(ids), columns, origin=sha, total=len(ids), first=0)
    return pools


def column(seed: int, *, share: bool) -> torch.Tensor:
    found = torch.rand(N, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (found > 0.4).double() if share else found


def test_shares_by_mcnemar_and_means_by_wilcoxon():
    """Rows come in another order, and each model misses images that the other has."""
    a, b = ({"clean_accuracy": column(s, share=True), "gini": column(s + 9, share=False)} for s in (1, 2))
    ids_a, ids_b = list(range(N)), [(5 * k) % N + 4 for k in range(N)]
    a["gini"][7] = math.nan
    found = {r["metric"]: r for r in differences(filled(("a", ids_a, a), ("b", ids_b, b)))}
    pairs = {
        name: [(a[name][i].item(), b[name][ids_b.index(i)].item()) for i in range(4, N)]
        for name in ("clean_accuracy", "gini")
    }
    record = found["clean_accuracy_difference"]
    assert (record["model_sha"], record["against"], record["n"]) == ("b", "a", N - 4)
    assert record["value"] == pytest.approx(sum(y - x for x, y in pairs["clean_accuracy"]) / (N - 4))
    only_a, only_b = (sum(p == q for p in pairs["clean_accuracy"]) for q in ((1.0, 0.0), (0.0, 1.0)))
    k, n = min(only_a, only_b), only_a + only_b
    assert record["p"] == pytest.approx(min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n))
    record = found["gini_difference"]
    moved = [y - x for x, y in pairs["gini"] if not math.isnan(x)]
    assert record["n"] == N - 5 and record["value"] == pytest.approx(sum(moved) / (N - 5))
    assert record["p"] == pytest.approx(stats.wilcoxon(moved).pvalue)
    assert record["low"] < record["value"] < record["high"]


def test_a_constant_gain_has_no_width_and_equal_models_no_p():
    gini = column(3, share=False)
    ids = list(range(N))
    record = differences(filled(("a", ids, {"gini": gini}), ("b", ids, {"gini": gini + 0.25})))[0]
    assert record["low"] == pytest.approx(0.25) and record["high"] == pytest.approx(0.25) and record["p"] < 1e-6
    same = differences(filled(("a", ids, {"gini": gini}), ("b", ids, {"gini": gini.clone()})))[0]
    assert same["value"] == 0 and same["p"] is None


def test_only_equal_questions_are_compared():
    values, ids = {"clean_accuracy": column(1, share=True)}, list(range(N))
    models = [(sha, ids, values) for sha in "abc"]
    other = differences(filled(*models, eps={"a": 1.0, "b": 0.5, "c": 1.0}))
    assert [(r["against"], r["model_sha"]) for r in other] == [("a", "c")]
    # a and b met their own images, c those of a: c is compared with a on these, and with b on none.
    crafted = differences(filled(*models, crafted_on={"a": "a", "b": "b", "c": "a"}))
    assert [(r["against"], r["model_sha"]) for r in crafted] == [("a", "b"), ("a", "c")]
    assert differences(filled(models[0])) == []


def test_images_without_a_value_give_a_reason():
    ids = list(range(N))
    nothing = torch.full((N,), math.nan, dtype=torch.float64)
    record = differences(filled(("a", ids, {"gini": nothing}), ("b", ids, {"gini": column(1, share=False)})))[0]
    assert record["value"] is None and record["n"] == 0 and "no image" in record["reason"]
