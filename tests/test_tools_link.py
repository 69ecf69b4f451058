"""Correlations against other implementations, intervals that cover, tests that keep their level, and verdicts."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
import torch
from scipy import optimize, stats

from rbkit.tools import correlation, dose, link, population, verdict

torch.set_num_threads(1)

RUNS = 8000  # populations per coverage: the share that covers is known to 0.0025


def draw(shape, rho, *, seed=0):
    """Two columns of normal numbers with correlation `rho`, observations last."""
    rng = np.random.default_rng(seed)
    x, noise = rng.standard_normal((2, *shape))
    return x, rho * x + math.sqrt(1 - rho**2) * noise


@pytest.fixture
def tied():
    """Eleven observations of three variables, two of them with ties."""
    rng = np.random.default_rng(5)
    x, z = rng.integers(0, 6, (2, 11)).astype(float)
    return x, x - z + rng.standard_normal(11), z


# ------------------------------------------------------------------------------------------------ coefficients


def test_coefficients_are_those_of_scipy(tied):
    x, y, z = tied
    assert correlation.pearson(x, y) == pytest.approx(stats.pearsonr(x, y).statistic, abs=1e-12)
    for a, b in ((x, y), (x, z)):
        assert correlation.spearman(a, b) == pytest.approx(stats.spearmanr(a, b).statistic, abs=1e-12)
        assert correlation.kendall(a, b) == pytest.approx(stats.kendalltau(a, b).statistic, abs=1e-12)


def test_partial_is_the_correlation_of_residuals(tied):
    x, y, z = tied
    design = np.stack([np.ones_like(z), z], 1)
    left = [v - design @ np.linalg.lstsq(design, v, rcond=None)[0] for v in (x, y)]
    assert correlation.partial(x, y, z) == pytest.approx(stats.pearsonr(*left).statistic, abs=1e-12)
    with pytest.raises(ValueError, match="held fixed"):
        correlation.coefficient("partial", x, y)


@pytest.mark.parametrize("kind", correlation.COEFFICIENTS)
def test_a_weight_is_a_repeated_observation(kind, tied):
    x, y, z = tied
    weights = correlation.bootstrap_counts(11, draws=7)
    found = correlation.coefficient(kind, x, y, z, weights)
    for row, value in zip(weights.astype(int), found, strict=True):
        chosen = np.repeat(np.arange(11), row)
        assert value == pytest.approx(float(correlation.coefficient(kind, x[chosen], y[chosen], z[chosen])), abs=1e-12)


def test_weighted_ranks_are_those_of_repeated_observations(tied):
    x, _, _ = tied
    weights = correlation.bootstrap_counts(11, draws=1)[0]
    chosen = np.repeat(np.arange(11), weights.astype(int))
    assert (correlation.weighted_ranks(x, weights)[chosen] == stats.rankdata(x[chosen])).all()


def test_what_is_not_defined_is_nan():
    x, flat = np.array([0.1, 0.7, 0.3, 0.2]), np.full(4, 0.1)  # the mean of 0.1, 0.1, ... is not exactly 0.1
    for kind in ("pearson", "spearman", "kendall"):
        assert np.isnan(correlation.coefficient(kind, x, flat)) and np.isnan(correlation.coefficient(kind, flat, x))
    assert np.isnan(correlation.partial(x, x**2, flat)) and np.isnan(correlation.partial(x, x**2, 3 * x + 1))
    assert np.isnan(correlation.pearson(x, x**2, np.array([0.0, 0.0, 4.0, 0.0])))


# --------------------------------------------------------------------------------------------------- intervals


def test_fisher_interval_of_pearson_is_that_of_scipy():
    x, y = draw((17,), 0.6)
    found = stats.pearsonr(x, y)
    low, high = correlation.fisher_interval("pearson", found.statistic, 17, confidence=0.9)
    assert (low, high) == pytest.approx(tuple(found.confidence_interval(0.9)), abs=1e-12)


def test_fisher_errors_are_their_formulas():
    r = np.array(0.5)
    assert correlation.fisher_error("pearson", r, 12) == pytest.approx(1 / 3)
    assert correlation.fisher_error("spearman", r, 12) == pytest.approx(math.sqrt(1.125 / 9))
    assert correlation.fisher_error("kendall", r, 12) == pytest.approx(math.sqrt(0.437 / 8))
    assert correlation.fisher_error("partial", r, 12, held=2) == pytest.approx(1 / math.sqrt(7))
    for kind, n in (("pearson", 3), ("spearman", 3), ("kendall", 4), ("partial", 4)):
        assert np.isnan(correlation.fisher_error(kind, r, n)) and not np.isnan(correlation.fisher_error(kind, r, n + 1))
    assert np.isnan(correlation.fisher_interval("pearson", np.array([1.0, -1 + 1e-15]), 12)).all()


@pytest.mark.parametrize(("n", "rho"), [(20, 0.0), (20, 0.6), (33, -0.8)])
def test_fisher_intervals_cover(n, rho):
    x, y = draw((RUNS, n), rho, seed=n)
    z = np.random.default_rng(7).standard_normal((RUNS, n))
    truth = {"pearson": rho, "spearman": 6 / math.pi * math.asin(rho / 2), "kendall": 2 / math.pi * math.asin(rho)}
    for kind in correlation.COEFFICIENTS:
        # What is held fixed moves both by as much as they vary.
        pair = (x + z, y + z) if kind == "partial" else (x, y)
        low, high = correlation.fisher_interval(kind, correlation.coefficient(kind, *pair, z), n)
        held = np.mean((low <= truth.get(kind, rho)) & (truth.get(kind, rho) <= high))
        assert 0.93 <= held <= 0.97, (kind, held)


def test_bootstrap_draws_as_many_clusters_as_there_are_and_is_keyed():
    counts = correlation.bootstrap_counts(9, draws=400)
    assert counts.shape == (400, 9) and (counts.sum(1) == 9).all()
    assert counts.mean(0) == pytest.approx(np.ones(9), abs=0.2) and counts.var() == pytest.approx(8 / 9, abs=0.1)
    assert (correlation.bootstrap_counts(9, draws=30) == counts[:30]).all()
    assert (correlation.bootstrap_counts(9, draws=400, seed=1) != counts).any()


def test_percentile_interval_leaves_out_what_is_not_defined():
    values = np.stack([np.arange(101.0), np.full(101, np.nan)], 1)
    values[60:, 1] = np.arange(41.0)
    low, high = correlation.percentile_interval(values, confidence=0.8, usable=0.4)
    assert (low, high) == (pytest.approx([10.0, 4.0]), pytest.approx([90.0, 36.0]))
    assert np.isnan(correlation.percentile_interval(values, usable=0.5)[0]).tolist() == [False, True]


def test_bootstrap_covers_about_as_often_as_documented():
    x, y = draw((150, 20), 0.5, seed=3)
    weights = correlation.bootstrap_counts(20, draws=300)
    held = 0
    for a, b in zip(x, y, strict=True):
        low, high = correlation.percentile_interval(correlation.pearson(a, b, weights))
        held += low <= 0.5 <= high
    assert 0.86 <= held / 150 <= 0.98


# -------------------------------------------------------------------------------------------------------- tests


def test_few_models_are_enumerated_and_many_are_drawn_by_seed():
    keys, exact = correlation.shuffles(4)
    assert (
        exact
        and sorted(map(tuple, keys)) == sorted(itertools.permutations(range(4)))
        and keys[0].tolist() == [0, 1, 2, 3]
    )
    keys, exact = correlation.shuffles(8, draws=50)
    assert not exact and keys.shape == (50, 8)
    assert (correlation.shuffles(8, draws=20)[0] == keys[:20]).all()
    assert (correlation.shuffles(8, draws=50, seed=1)[0] != keys).any()


def test_statistics_are_the_coefficients_of_permuted_columns(tied):
    x, y, z = tied
    columns = np.stack([y, y**2, np.full(11, 2.0)], 1)
    orders = np.stack([np.arange(11), np.random.default_rng(0).permutation(11)])
    found = correlation.statistics(x, columns, z, orders)
    assert found.shape == (2, 4, 3) and np.isnan(found[:, :, 2]).all()
    for row, order in enumerate(orders):
        for k, kind in enumerate(correlation.COEFFICIENTS[:3]):
            for c in (0, 1):
                expected = float(correlation.coefficient(kind, x[order], columns[:, c]))
                assert found[row, k, c] * correlation.null_scale(kind, 11) == pytest.approx(expected, abs=1e-12)
    assert found[0, 3, 0] / 3 == pytest.approx(float(correlation.partial(x, y, z)), abs=1e-12)
    # Freedman and Lane: fitted values plus permuted residuals.
    line = np.polynomial.Polynomial.fit(z, x, 1)(z)
    moved = line + (x - line)[orders[1]]
    assert found[1, 3, 0] / 3 == pytest.approx(float(correlation.partial(moved, y, z)), abs=1e-12)
    assert np.isnan(correlation.statistics(x, columns, None, orders)[:, 3]).all()


@pytest.mark.parametrize("kind", ["pearson", "spearman", "kendall"])
def test_statistics_have_unit_variance_over_all_orders(kind):
    x, y = draw((6,), 0.3)
    keys, _ = correlation.shuffles(6)
    found = correlation.statistics(x, y[:, None], None, keys)[:, correlation.COEFFICIENTS.index(kind), 0]
    assert found.mean() == pytest.approx(0, abs=1e-12) and found.std() == pytest.approx(1, abs=1e-12)


def test_permutation_p_is_that_of_brute_force():
    x, y = draw((5,), 0.9, seed=2)
    keys, exact = correlation.shuffles(5)
    null = correlation.statistics(x, y[:, None], None, keys)[:, 0]
    p, adjusted = correlation.step_down(null[0], null, exact=exact)
    seen = abs(np.corrcoef(x, y)[0, 1])
    hits = [abs(np.corrcoef(x[list(order)], y)[0, 1]) >= seen - 1e-9 for order in itertools.permutations(range(5))]
    assert p[0] == adjusted[0] == sum(hits) / 120 > 0


def test_step_down_is_westfall_and_young():
    rng = np.random.default_rng(1)
    observed, null = np.array([0.4, np.nan, -2.2, 1.4]), rng.standard_normal((199, 4))
    p, adjusted = correlation.step_down(observed, null, exact=False)
    order, expected, running = [2, 3, 0], {}, 0.0
    for place, test in enumerate(order):
        rest = np.abs(null[:, order[place:]]).max(1)
        running = max(running, (1 + (rest >= abs(observed[test])).sum()) / 200)
        expected[test] = running
    assert {t: adjusted[t] for t in order} == expected and np.isnan(adjusted[1]) and np.isnan(p[1])
    for test in order:
        assert p[test] == (1 + (np.abs(null[:, test]) >= abs(observed[test])).sum()) / 200 <= adjusted[test]


def test_the_family_keeps_its_level():
    """Nothing goes with anything: one family in twenty has a corrected p below 0.05."""
    rng = np.random.default_rng(11)
    keys = correlation.shuffles(12, draws=199)[0].argsort(1)
    least = []
    for _ in range(200):
        x, y = rng.standard_normal(12), rng.standard_normal((12, 9))
        null = correlation.statistics(x, y, None, keys)[:, :3].reshape(199, -1)
        seen = correlation.statistics(x, y, None, np.arange(12)[None])[0, :3].ravel()
        least.append(correlation.step_down(seen, null, exact=False)[1].min())
    assert 0.01 <= np.mean(np.array(least) < 0.05) <= 0.095


# --------------------------------------------------------------------------------------------- dose and response


def test_monotone_fit_is_the_best_of_all_that_do_not_turn_back():
    means, weights = np.array([0.2, 0.6, 0.3, 0.9]), np.array([1.0, 4.0, 2.0, 1.0])
    found = dose.monotone_fit(means, weights, rises=True)
    steps = optimize.LinearConstraint(np.diff(np.eye(4), axis=0), 0, np.inf)
    best = optimize.minimize(
        lambda f: (weights * (f - means) ** 2).sum(), np.full(4, 0.5), constraints=steps, tol=1e-12
    )
    assert found == pytest.approx(best.x, abs=1e-5)
    assert found.tolist() == pytest.approx([0.2, 0.5, 0.5, 0.9])
    assert dose.monotone_fit(-means, weights, rises=False) == pytest.approx(-found)
    assert dose.direction(means, weights) and not dose.direction(-means, weights)


@pytest.mark.parametrize("sign", [1, -1])
def test_half_effect(sign):
    doses = np.array([0.0, 0.5, 1.0, 3.0])
    assert dose.half_effect(doses, sign * np.array([1.0, 2.0, 4.0, 5.0])) == pytest.approx(0.75)
    assert dose.half_effect(doses, sign * np.array([1.0, 3.0, 3.0, 5.0])) == 0.5
    assert dose.half_effect(doses, sign * np.array([0.3, 0.3, 0.3, 0.3 + 1e-16])) is None


def test_dose_response_finds_a_known_curve_and_its_band():
    radii = np.repeat([0.0, 0.25, 0.5, 1.0, 2.0], 4)
    truth = 1 - np.exp(-2 * radii)
    response = truth + 0.03 * np.random.default_rng(0).standard_normal(20)
    found = dose.dose_response(radii, response, correlation.bootstrap_counts(20, draws=300))
    assert found.rises and found.defined > 0.9
    # Joined by lines, the true curve reaches half of its height between 0.25 and 0.5.
    expected = np.interp(truth[-1] / 2, truth[::4], radii[::4])
    assert found.half_low < expected < found.half_high and abs(found.half - expected) < 0.05
    assert (
        (found.low <= found.fit).all()
        and (found.fit <= found.high).all()
        and 0.8 < found.change_low < found.change_high < 1.1
    )
    fall = dose.dose_response(radii, -response, correlation.bootstrap_counts(20, draws=50))
    assert not fall.rises and fall.fit == pytest.approx(-found.fit) and fall.half == pytest.approx(found.half)
    with pytest.raises(ValueError, match="two doses"):
        dose.dose_response(np.ones(3), np.arange(3.0), np.ones((2, 3)))


def test_draws_that_miss_an_end_tell_no_half_effect():
    found = dose.dose_response(
        np.array([0.0, 1.0, 2.0]), np.array([0.0, 1.0, 4.0]), correlation.bootstrap_counts(3, draws=200)
    )
    assert found.half is not None and found.half_low is None and found.defined < 0.6 and np.isnan(found.change_low)


# --------------------------------------------------------------------------------------------------- population


def record(model, metric, value, **about):
    """A record as rb-score writes it."""
    base = {"low": None, "high": None, "n": 100, "unit": "share", "better": "higher", "complete": True}
    return {"metric": metric, "value": value, **base, "model_sha": model, "train_method": "pgd", **about}


def attacked(model, metric, value, eps=0.5, **about):
    """A record of an attacked stream."""
    ball = {"kind": "adversarial", "attack": "pgd", "norm": "l2", "eps": eps, "crafted_on": model}
    return record(model, metric, value, **(ball | about))


def mapped(model, metric, value, **about):
    """A record of attributions."""
    return record(model, metric, value, **({"kind": "attributions", "method": "ig", "params": {"steps": 24}} | about))


def simulated(n=21, *, seed=0, controls=()):
    """A population in which `alignment` follows robustness, `gini` clean accuracy, `entropy` falls, `insertion` nothing."""
    rng = np.random.default_rng(seed)
    records = []
    for i in range(n):
        model, eps = f"m{i:02}", (i % 5) / 4
        about = {"train_norm": "l2", "train_eps": eps, "train_method": "pgd" if eps else "standard"}
        if i < len(controls):
            about |= {"control": controls[i]}
        robust = 0.2 + 0.5 * eps + 0.05 * rng.standard_normal()
        clean = 0.9 - 0.3 * eps + 0.05 * rng.standard_normal()
        records += [
            attacked(model, "clean_accuracy", clean, **about),
            attacked(model, "robust_accuracy", robust, **about),
            mapped(model, "alignment", 0.1 + robust + 0.02 * rng.standard_normal(), **about),
            mapped(model, "gini", 1.5 - clean + 0.01 * rng.standard_normal(), **about),
            mapped(model, "entropy", 5 + robust + 0.02 * rng.standard_normal(), better="lower", **about),
            mapped(model, "insertion", rng.standard_normal(), **about),
            mapped(model, "pointing_game", 0.1, **about),
        ]
    return records


def analysed(records, **options):
    """(records of the link by (population, of, coefficient), verdicts by of)."""
    found = population.gather(records)
    rows = link.analyse(found, [population.choose(found)], permutations=999, draws=200, **options)
    json.dumps(rows, allow_nan=False)
    pairs = {(r["population"], r["of"].partition(",")[0], r["metric"]): r for r in rows if r["kind"] == "correlation"}
    return pairs, {r["target"]: r for r in rows if r["kind"] == "verdict"}


@pytest.fixture(scope="module")
def outcome():
    """A simulated population, analysed."""
    return analysed(simulated())


def test_verdicts_know_the_truth_of_a_simulated_population(outcome):
    _, said = outcome
    assert {name: v["verdict"] for name, v in said.items()} == {
        "alignment": verdict.RISES, "gini": verdict.ONLY, "entropy": verdict.NOT, "insertion": verdict.OPEN, "pointing_game": verdict.OPEN,
    }  # fmt: skip
    assert said["entropy"]["value"] < -0.9  # lower entropy is better: turned before it is correlated
    assert said["pointing_game"]["why"] == "the metric is the same for all models"


def test_pairs_hold_all_coefficients_intervals_and_p_values(outcome):
    pairs, said = outcome
    assert len(pairs) == 5 * 4
    records = simulated()
    column = {
        m: np.array([r["value"] for r in records if r["metric"] == m])
        for m in ("robust_accuracy", "alignment", "clean_accuracy")
    }
    x, y, z = column.values()
    expected = {"pearson": stats.pearsonr(x, y), "spearman": stats.spearmanr(x, y), "kendall": stats.kendalltau(x, y)}
    for kind in correlation.COEFFICIENTS:
        found = pairs["main", "alignment", kind]
        value = expected[kind].statistic if kind in expected else float(correlation.partial(x, y, z))
        assert found["value"] == pytest.approx(value, abs=1e-12)
        assert (found["low"], found["high"]) == pytest.approx(correlation.fisher_interval(kind, found["value"], 21))
        assert found["low"] < found["value"] < found["high"] and found["boot_low"] < found["value"] < found["boot_high"]
        assert found["n"] == found["runs"] == 21 and found["family"] == 16 and found["exact"] is False
        assert 0.001 <= found["p"] <= found["p_adjusted"] < 0.05
    for kind in correlation.COEFFICIENTS:
        flat = pairs["main", "pointing_game", kind]
        nothing = [flat[k] for k in ("value", "low", "high", "boot_low", "boot_high", "p", "p_adjusted")]
        assert nothing == [None] * 7 and "same for all models" in flat["reason"] and flat["p_reason"]
    assert said["alignment"]["partial"] == pairs["main", "alignment", "partial"]["value"]


def test_perfect_correlations_have_no_fisher_interval():
    rows = [
        make(f"m{i}", name, v)
        for i, v in enumerate((1.0, 2.0, 4.0, 8.0, 9.0))
        for make, name in ((attacked, "robust_accuracy"), (mapped, "gini"))
    ]
    pairs, _ = analysed(rows)
    for kind in ("pearson", "spearman", "kendall"):
        row = pairs["main", "gini", kind]
        assert row["value"] == pytest.approx(1) and row["low"] is None and "correlation of 1" in row["interval_reason"]
        assert row["p"] == pytest.approx(2 / 120 if kind != "pearson" else 1 / 120)


def test_nothing_depends_on_the_order_of_records():
    records = simulated(9)
    assert analysed(records) == analysed(records[::-1])


def test_fewer_than_five_models_get_no_p_value():
    pairs, said = analysed(simulated(4))
    for kind in correlation.COEFFICIENTS:
        row = pairs["main", "alignment", kind]
        assert row["value"] is not None and row["p"] is row["p_adjusted"] is None
        assert "4 models: fewer than 5" in row["p_reason"]
    assert said["alignment"]["verdict"] == verdict.OPEN and "fewer than 5" in said["alignment"]["why"]
    five, _ = analysed(simulated(5))
    assert five["main", "alignment", "pearson"]["exact"] and five["main", "alignment", "pearson"]["p"] >= 1 / 120
    two, _ = analysed(simulated(2))
    assert (
        two["main", "alignment", "pearson"]["value"] is None
        and "2 models" in two["main", "alignment", "pearson"]["reason"]
    )
    assert analysed(simulated(1))[1]["alignment"]["value"] is None


def test_a_missing_value_leaves_the_model_out_of_its_pairs_alone():
    records = [
        r
        for r in simulated(12)
        if (r["model_sha"], r["metric"]) not in (("m03", "alignment"), ("m07", "clean_accuracy"))
    ]
    pairs, _ = analysed(records)
    n = {(of, kind): pairs["main", of, kind]["n"] for of in ("alignment", "gini") for kind in ("pearson", "partial")}
    assert n == {
        ("alignment", "pearson"): 11,
        ("alignment", "partial"): 10,
        ("gini", "pearson"): 12,
        ("gini", "partial"): 11,
    }
    x, y = (
        [r["value"] for r in records if r["metric"] == m and r["model_sha"] != "m03"]
        for m in ("robust_accuracy", "alignment")
    )
    assert pairs["main", "alignment", "pearson"]["value"] == pytest.approx(stats.pearsonr(x, y).statistic)
    assert (
        pairs["main", "alignment", "partial"]["p"] is not None
        and pairs["main", "alignment", "partial"]["boot_low"] is not None
    )
    # Each model keeps its own draws where others are left out.
    kept = [i for i in range(12) if i not in (3, 7)]
    values = {(r["model_sha"], r["metric"]): r["value"] for r in records}
    columns = [[values[f"m{i:02}", name] for i in kept] for name in ("robust_accuracy", "alignment", "clean_accuracy")]
    drawn = correlation.partial(*map(np.array, columns), correlation.bootstrap_counts(12, draws=200)[:, kept])
    assert pairs["main", "alignment", "partial"]["boot_low"] == pytest.approx(
        float(correlation.percentile_interval(drawn)[0])
    )
    without = [r for r in records if r["metric"] != "clean_accuracy"]
    pairs, said = analysed(without)
    assert pairs["main", "gini", "partial"]["reason"] == "the clean accuracy is not known"
    assert said["alignment"]["verdict"] == verdict.OPEN and "cannot be held fixed" in said["alignment"]["why"]


def test_controls_stand_apart_and_are_left_out_one_by_one():
    pairs, said = analysed(simulated(16, controls=("shuffled", "untrained", "shuffled")))
    n = {population: pairs[population, "alignment", "pearson"]["n"] for population in {key[0] for key in pairs}}
    assert n == {"main": 13, "with controls": 16, "without shuffled": 14, "without untrained": 15}
    assert said["alignment"]["n"] == 13 and set(said["alignment"]["elsewhere"]) == set(n) - {"main"}
    found = population.gather(
        [*simulated(3), attacked("m77", "robust_accuracy", 0.1, train_method="noise")], controls={"m01": "early"}
    )
    assert found.controls == {"m01": "early", "m77": "noise"}
    assert set(found.named()) == {"main", "with controls", "without early", "without noise"}


def test_models_of_one_run_are_not_independent():
    records = [r | {"job": r["model_sha"][:2]} for r in simulated(20)]
    found = population.gather(records, run="job")
    rows = [
        r
        for r in link.analyse(found, [population.choose(found)], permutations=99, draws=200)
        if r["of"] == "alignment, ig"
    ]
    for row in rows[:-1]:
        assert (row["n"], row["runs"]) == (20, 2) and row["low"] is row["p"] is row["boot_low"] is None
        assert "not independent" in row["interval_reason"] and "not independent" in row["p_reason"]
    records = [r | {"job": str(int(r["model_sha"][1:]) // 2)} for r in simulated(20)]
    found = population.gather(records, run="job")
    row = next(
        r
        for r in link.analyse(found, [population.choose(found)], permutations=99, draws=200)
        if r["of"] == "alignment, ig"
    )
    assert row["runs"] == 10 and row["boot_low"] is not None and row["low"] is None


# ----------------------------------------------------------------------------------------------------- gathering


def test_records_that_contradict_each_other_are_refused():
    one = mapped("m0", "alignment", 0.5)
    assert len(population.gather([one, dict(one)]).values) == 1
    with pytest.raises(ValueError, match=r"alignment of model m0 \(alignment, ig\): 0.5 on 100 rows and 0.6 on 100"):
        population.gather([one, one | {"value": 0.6}])
    with pytest.raises(ValueError, match="on 50"):
        population.gather([one, one | {"n": 50}])
    with pytest.raises(ValueError, match="lower is better here"):
        population.gather([one, mapped("m1", "alignment", 0.4, better="lower")])
    with pytest.raises(ValueError, match="fewer rows"):
        population.gather([one | {"complete": False}])
    assert population.gather([one | {"complete": False}], incomplete=True).values
    assert not population.gather([one | {"value": None}]).values


def test_what_differs_in_method_mode_or_parameters_is_kept_apart():
    rows = [
        mapped("m0", "alignment", 0.1), mapped("m0", "alignment", 0.2, method="gradient"), mapped("m0", "alignment", 0.3, params={"steps": 50}),
        mapped("m1", "alignment", 0.4, params={"steps": 24, "seed": 9}), mapped("m0", "clean_accuracy", 0.9), mapped("m0", "ties", 0.0),
        mapped("m0", "insertion_agreement", 0.5), mapped("m0", "etmann_alignment", 2.0), mapped("m0", "etmann_alignment", 2.0, method="gradient"),
    ]  # fmt: skip
    found = population.gather(rows)
    labels = [found.label(s) for s in population.interpretability(found)]
    assert labels == ["alignment, gradient", "alignment, ig, steps 24", "alignment, ig, steps 50", "etmann_alignment"]
    (same,) = [s for s in found.values if found.label(s) == "alignment, ig, steps 24"]
    assert set(found.values[same]) == {"m0", "m1"}  # seeds do not tell subjects apart
    assert np.array_equal(found.column(same, ["m1", "m2", "m0"]), [0.4, np.nan, 0.1], equal_nan=True)


def test_clean_accuracy_is_that_of_attacked_streams_then_of_the_most_rows():
    rows = [
        mapped("m0", "clean_accuracy", 0.1, n=900), attacked("m0", "clean_accuracy", 0.2, n=50), attacked("m0", "clean_accuracy", 0.3, n=80, eps=1.0),
        mapped("m1", "clean_accuracy", 0.4, n=7), mapped("m1", "clean_accuracy", 0.5, n=8, method="gradient"), mapped("m2", "gini", 0.5),
    ]  # fmt: skip
    found = population.gather(rows)
    assert np.array_equal(population.clean_accuracy(found, list(found.about)), [0.3, 0.5, np.nan], equal_nan=True)


def test_robustness_is_chosen_by_radius_attack_and_norm():
    rows = [attacked(m, "robust_accuracy", 0.5, eps=e) for m in ("m0", "m1") for e in (0.25, 0.5, 1.0, 2.0)]
    rows += [
        attacked("m0", "robust_accuracy", 0.4, eps=8.0),
        attacked("m0", "robust_accuracy", 0.4, eps=0.5, crafted_on="m1"),
    ]
    found = population.gather(rows)
    assert population.choose(found).short == "robust_accuracy, pgd l2 0.5"
    assert population.choose(found, "robust_accuracy@2").eps == 2.0
    rows += [attacked(m, "robust_accuracy", 0.3, eps=0.5, attack="worst") for m in ("m0", "m1")]
    assert population.choose(population.gather(rows)).attack == "worst"
    assert population.choose(population.gather(rows), "robust_accuracy@pgd").attack == "pgd"
    rows += [attacked("m0", "robust_accuracy", 0.3, eps=0.03, norm="linf")]
    found = population.gather(rows)
    with pytest.raises(ValueError, match="say which"):
        population.choose(found)
    assert population.choose(found, "robust_accuracy@linf").eps == 0.03
    with pytest.raises(ValueError, match=r"nothing has '0\.7'"):
        population.choose(found, "robust_accuracy@l2:0.7")
    with pytest.raises(ValueError, match="no record of gini; there are robust_accuracy"):
        population.choose(found, "gini")


# -------------------------------------------------------------------------------------------- verdicts and doses


def estimate(value, p, *, low=-0.5, high=0.9, **more):
    """What a verdict reads of a record."""
    return {"value": value, "p_adjusted": p, "low": low, "high": high, **more}


@pytest.mark.parametrize(
    ("raw", "held", "expected"),
    [
        (estimate(0.8, 0.01), estimate(0.7, 0.04, accuracy=-0.5), verdict.RISES),
        (estimate(0.8, 0.01), estimate(0.7, 0.06, accuracy=-0.5), verdict.ONLY),
        (estimate(0.8, 0.01), estimate(-0.7, 0.01, accuracy=-0.5), verdict.ONLY),
        (estimate(0.8, 0.01), estimate(0.7, 0.06, accuracy=0.5), verdict.OPEN),
        (estimate(0.8, 0.06), estimate(0.7, 0.01, accuracy=-0.5), verdict.OPEN),
        (estimate(-0.8, 0.01), estimate(0.7, 0.01, accuracy=-0.5), verdict.NOT),
        (estimate(-0.1, 0.5, high=0.29), estimate(0.7, 0.01, accuracy=-0.5), verdict.NOT),
        (estimate(-0.1, 0.5, high=0.31), estimate(0.7, 0.01, accuracy=-0.5), verdict.OPEN),
        (estimate(0.9, None, p_reason="few"), estimate(0.7, None), verdict.OPEN),
        (estimate(0.9, 0.01), estimate(None, None, p_reason="none"), verdict.OPEN),
    ],
)
def test_verdict(raw, held, expected):
    assert verdict.verdict(raw, held)[0] == expected


def test_doses_are_radii_of_training_without_controls():
    records = [
        *simulated(20, seed=5, controls=("early",)),
        mapped("m99", "alignment", 9.0, train_method="noise", train_eps=0.0),
    ]
    found = population.gather(records)
    subjects = population.interpretability(found)
    rows = {r["target"]: r for r in dose.dose_responses(found, subjects)}
    json.dumps(list(rows.values()), allow_nan=False)
    rises, falls = rows["alignment"], rows["entropy"]
    assert rises["n"] == 19 and rises["eps"] == [0, 0.25, 0.5, 0.75, 1.0] and rises["norm"] == "l2"
    values = [r["value"] for r in records if r["metric"] == "alignment" and r.get("train_eps") == 1.0]
    assert rises["mean"][-1] == pytest.approx(np.mean(values))
    assert rises["low"] < rises["value"] < rises["high"] and rises["improves"] is True and rises["change_low"] > 0
    # Better when lower, but in its own units: it rises, and that is worse.
    assert (
        falls["improves"] is False
        and falls["fit"] == sorted(falls["fit"])
        and falls["mean"][0] > 5
        and falls["change_low"] > 0
    )
    assert all(a <= b <= c for a, b, c in zip(falls["fit_low"], falls["fit"], falls["fit_high"], strict=True))
    assert rows["insertion"]["value"] is None and "not told from 0" in rows["insertion"]["reason"]
    assert rows["pointing_game"]["reason"] == "the fit is flat"


def test_doses_are_apart_by_norm_and_need_three_radii():
    rows = [
        mapped(f"m{i}", "alignment", i / 7, train_norm="linf" if i % 2 else "l2", train_eps=i / 4) for i in range(8)
    ]
    found = population.gather(rows)
    curves = {r["norm"]: r for r in dose.dose_responses(found, population.interpretability(found))}
    assert curves["l2"]["eps"] == [0, 0.5, 1.0, 1.5] and curves["linf"]["eps"] == [0, 0.25, 0.75, 1.25, 1.75]
    found = population.gather(rows[:3])
    (curve, other) = dose.dose_responses(found, population.interpretability(found))
    assert curve["reason"] == other["reason"] == "2 radii of training; 3 are needed"
