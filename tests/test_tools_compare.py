"""Two models side by side: verdicts need intervals that do not touch, and a worthless study says why."""

from __future__ import annotations

import pytest

from rbkit.tools.compare import accuracies, by_metric, failings, interpretability, is_standard, paired, separated
from rbkit.tools.control import control_failings, swap_losses, validated


def record(metric, value, *, robust=False, half=0.01, better="higher", kind="attributions", **more):
    """A record as the pools make it."""
    low, high = (None, None) if half is None else (value - half, value + half)
    return {
        "metric": metric, "value": value, "low": low, "high": high, "better": better, "kind": kind,
        "train_eps": 0.5 if robust else None, **more,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [((0, 1), (2, 3), True), ((2, 3), (0, 1), True), ((0, 1), (1, 2), False), ((0, 3), (1, 2), False)],
)
def test_intervals_are_separated_only_if_they_do_not_touch(first, second, expected):
    one, other = (dict(zip(("low", "high"), bounds, strict=True)) for bounds in (first, second))
    assert separated(one, other) == expected
    assert not separated({**one, "low": None}, other)
    assert not separated(one, {**other, "high": None})


def test_a_model_trained_at_eps_zero_or_unknown_is_standard():
    assert is_standard({}) and is_standard({"train_eps": 0.0}) and is_standard({"train_eps": None})
    assert not is_standard({"train_eps": 0.25})


@pytest.mark.parametrize(
    ("better", "standard", "robust", "half", "verdict"),
    [
        ("higher", 0.1, 0.5, 0.01, "robust"),
        ("higher", 0.5, 0.1, 0.01, "standard"),
        ("lower", 0.1, 0.5, 0.01, "standard"),
        ("lower", 0.5, 0.1, 0.01, "robust"),
        ("higher", 0.1, 0.5, 0.3, "open"),
        ("lower", 0.5, 0.1, None, "open"),
    ],
)
def test_the_verdict_knows_which_way_is_better(better, standard, robust, half, verdict):
    records = [
        record("deletion", standard, better=better, half=half, method="ig"),
        record("deletion", robust, robust=True, better=better, half=half, method="ig"),
    ]
    for order in (records, records[::-1]):
        (row,) = paired(order)
        assert row["verdict"] == verdict
        assert row["difference"] == pytest.approx(robust - standard)
        assert row["standard"]["value"] == standard and row["robust"]["value"] == robust


@pytest.mark.parametrize("name", ["attack", "norm", "eps", "method", "mode", "kind"])
def test_only_records_of_the_same_subject_are_paired(name):
    one, other = record("gini", 0.1), record("gini", 0.9, robust=True)
    assert len(paired([one, other])) == 1
    assert paired([{**one, name: "x"}, {**other, name: "y"}]) == []


def test_undefined_values_are_not_paired():
    assert paired([record("gini", 0.1), {**record("gini", 0.1, robust=True), "value": None}]) == []
    assert paired([{**record("gini", 0.1), "value": None}, record("gini", 0.1, robust=True)]) == []


def both(metric, standard, robust, **more):
    return [record(metric, standard, **more), record(metric, robust, robust=True, **more)]


def test_interpretability_leaves_out_robustness_sanity_and_agreement_and_counts_once_what_is_of_the_model():
    records = [
        *both("gini", 0.1, 0.9, method="ig"),
        *both("gini", 0.1, 0.9, method="shap"),
        *both("etmann_alignment", 0.1, 0.9, method="ig"),
        *both("etmann_alignment", 0.1, 0.9, method="shap"),
        *both("clean_accuracy", 0.9, 0.1, method="ig"),
        *both("insertion_agreement", 0.9, 0.1, method="ig"),
        *both("ssim", 0.1, 0.9, kind="inversions"),
        *both("perturbation", 0.1, 0.9, kind="adversarial"),
    ]
    names = [row["metric"] for row in interpretability(paired(records))]
    assert names == ["gini", "gini", "etmann_alignment", "ssim"]


def test_metrics_are_grouped_by_what_their_methods_say_together():
    def rows(name, *verdicts):
        return [{"metric": name, "verdict": v} for v in verdicts]

    groups = by_metric(
        rows("a", "robust", "open") + rows("b", "standard", "standard") + rows("c", "robust", "standard", "open")
        + rows("d", "open", "open")
    )  # fmt: skip
    assert groups == {"robust": ["a"], "standard": ["b"], "mixed": ["c"], "open": ["d"]}


def study(*, clean=0.95, attacked=0.05, robust=0.6, gini=0.9, eps=0.5):
    """A study that passes, unless told otherwise."""
    common = {"kind": "adversarial", "norm": "l2", "eps": eps, "attack": "pgd"}
    return [
        *both("clean_accuracy", clean, 0.85, **common),
        *both("robust_accuracy", attacked, robust, **common),
        *both("gini", 0.1, gini, method="ig"),
    ]


def judged(records, eps=0.5):
    return failings(records, eps=eps, clean=(0.9, 0.99))


def test_a_sound_study_has_no_failings():
    assert judged(study()) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"clean": 0.89}, "clean accuracy is 0.890"),
        ({"clean": 1.0}, "clean accuracy is 1.000"),
        ({"attacked": 0.21}, "a weak attack"),
        ({"robust": 0.34}, "expected at least 0.350"),
        ({"gini": 0.1}, "no interpretability metric"),
        ({"eps": 0.25}, "no accuracies"),
    ],
)
def test_each_failing_is_told_alone(change, words):
    found = judged(study(**change))
    assert len(found) == 1 and words in found[0]


def test_failings_without_one_of_the_models_or_metrics():
    for keep in (is_standard, lambda r: not is_standard(r)):
        assert "no accuracies" in judged([r for r in study() if keep(r)])[0]
    assert "no accuracies" in judged([])[0]


def test_several_failings_are_all_told():
    assert len(judged(study(clean=0.5, attacked=0.4, robust=0.4, gini=0.1))) == 4


def test_accuracies_are_by_eps_and_leave_the_worst_case_out():
    records = study(eps=1.0) + study(eps=0.25, attacked=0.15)
    records += both("robust_accuracy", 0.0, 0.0, kind="adversarial", eps=1.0, attack="worst")
    found = accuracies(records, standard=True)
    assert list(found["robust"]) == [0.25, 1.0]
    assert [r["value"] for r in found["robust"].values()] == [0.15, 0.05]
    assert found["clean"]["value"] == 0.95


# ------------------------------------------------------------------------------------------ the positive control


def swapped(standard, robust):
    """Accuracies of both models with a true cue (1.0) and with a swapped one."""
    return [
        record("clean_accuracy", 1.0 - (lost if shift else 0.0), robust=side, kind="images", cue=0.5, cue_shift=shift)
        for side, lost in ((False, standard), (True, robust))
        for shift in (0, 3)
    ]


@pytest.mark.parametrize(
    ("standard", "robust", "words"),
    [(0.4, 0.05, []), (0.2, 0.05, ["standard model loses 0.200"]), (0.4, 0.2, ["robust model loses 0.200"])],
)
def test_the_control_counts_only_if_the_swap_proves_it(standard, robust, words):
    records = swapped(standard, robust)
    assert swap_losses(records) == pytest.approx({"standard": standard, "robust": robust})
    reasons = control_failings(records)
    assert len(reasons) == len(words) and all(w in r for w, r in zip(words, reasons, strict=True))
    assert control_failings(records[:3]) == ["the cue was not swapped for a standard and a robust model"]


def test_a_robust_model_that_knows_nothing_is_no_control():
    """It has nothing to lose by the swap."""
    weak = [{**r, "value": r["value"] * (0.3 if not is_standard(r) else 1.0)} for r in swapped(0.4, 0.05)]
    assert control_failings(weak) == ["the robust model has 0.300 clean accuracy, expected 0.5 or more"]


def test_a_metric_is_validated_on_true_cues_alone():
    """A gain of the robust model tells; a loss tells the wrong way; swapped and cue-free images do not count."""
    true, swap = {"cue": 0.5, "cue_shift": 0, "method": "ig"}, {"cue": 0.5, "cue_shift": 3, "method": "ig"}
    records = both("gini", 0.1, 0.5, **true) + both("deletion", 0.1, 0.5, better="lower", **true)
    records += both("insertion", 0.1, 0.105, **true) + both("entropy", 0.1, 0.5, **swap) + both("alignment", 0.1, 0.5)
    assert {row["metric"]: row["tells"] for row in validated(records)} == {
        "gini": "yes", "deletion": "no", "insertion": "open",
    }  # fmt: skip


def test_inversions_are_paired_where_they_began_alike():
    begun = {
        "noise": {"start": "noise", "seed": 0},
        "image": {"start": "image", "seed": 0},
        "other": {"start": "image", "seed": 1},
    }
    records = [
        record("latent_error", value, robust=robust, kind="inversions", mode="representation", params=begun[name])
        for robust, values in ((False, (0.1, 0.2, 0.3)), (True, (0.4, 0.5, 0.6)))
        for name, value in zip(begun, values, strict=True)
    ]
    assert [round(row["difference"], 6) for row in paired(records)] == [0.3, 0.3, 0.3]
    maps = [record("gini", 0.5, robust=robust, method="ig", params={"seed": int(robust)}) for robust in (False, True)]
    assert len(paired(maps)) == 1


def test_accuracies_are_those_of_one_attack_and_norm():
    """Others, also at the same radius, stand on another scale."""
    about = ({"attack": "pgd", "norm": "l2", "eps": 0.5}, {"attack": "auto", "norm": "l2", "eps": 0.5},
             {"attack": "pgd", "norm": "linf", "eps": 0.03})  # fmt: skip
    records = [
        record("robust_accuracy", v, kind="adversarial", **a) for v, a in zip((0.6, 0.5, 0.4), about, strict=True)
    ]
    found = accuracies(records, standard=True)["robust"]
    assert {eps: r["value"] for eps, r in found.items()} == {0.5: 0.6}
