"""rb-link as a process: records in, records, tables and figures out, and its refusals."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import execute, shell


def lines(model, *, eps, robust, clean, alignment, entropy, **about):
    """What rb-score writes of one model: an attacked stream and one of maps."""
    trained = {"model_sha": model, "arch": "resnet8", "train_method": "pgd" if eps else "standard", "train_norm": "l2"}
    trained |= {"train_eps": eps, "train_seed": 0, "complete": True, "n": 100, "unit": "share", "better": "higher"}
    ball = trained | {"kind": "adversarial", "attack": "pgd", "norm": "l2", "eps": 0.5, "crafted_on": model} | about
    maps = trained | {"kind": "attributions", "method": "ig", "params": {"method": "ig", "steps": 24}} | about
    rows = [
        ball | {"metric": "clean_accuracy", "value": clean}, ball | {"metric": "robust_accuracy", "value": robust},
        maps | {"metric": "clean_accuracy", "value": clean, "n": 30}, maps | {"metric": "alignment", "value": alignment},
        maps | {"metric": "entropy", "value": entropy, "better": "lower"},
    ]  # fmt: skip
    return [{**row, "low": row["value"] - 0.02, "high": row["value"] + 0.02} for row in rows]


def write(path: Path, rows) -> Path:
    """Records as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def scores(tmp_path_factory) -> Path:
    """Files of 12 models, of two controls, and what is wrong in some way beside them."""
    here = tmp_path_factory.mktemp("link")
    rng = np.random.default_rng(1)
    for i in range(14):
        eps = (i % 4) / 3
        robust = 0.1 + 0.6 * eps + 0.03 * rng.standard_normal()
        clean = 0.9 - 0.2 * eps + 0.03 * rng.standard_normal()
        entropy = 6 + rng.standard_normal()
        name = f"eps{i:02}" if i < 12 else f"shuffled-{i}"
        rows = lines(
            f"{i:064x}",
            eps=eps,
            robust=robust,
            clean=clean,
            alignment=robust / 2 + 0.01 * rng.standard_normal(),
            entropy=entropy,
        )
        write(here / f"{name}.jsonl", rows)
    return here


def records(result):
    """The records that a run printed."""
    assert result.status == 0, result.err
    return [json.loads(line) for line in result.out.splitlines()]


def test_a_population_becomes_records(scores):
    files = sorted(scores.glob("eps*.jsonl"))
    result = execute("rb-link", *files)
    rows = records(result)
    assert result.err == ""
    assert [sum(r["kind"] == kind for r in rows) for kind in ("correlation", "verdict", "dose_response")] == [8, 2, 3]
    for row in rows:
        assert {"metric", "value", "low", "high", "n", "unit", "better"} <= set(row) and row["n"] == 12
        assert all(value is not None for value in (row["value"], row["low"])) or any(
            "reason" in key or key == "why" for key in row
        )
    said = {r["target"]: r["verdict"] for r in rows if r["kind"] == "verdict"}
    assert said == {"alignment": "rises", "entropy": "open"}
    assert {r["robustness"] for r in rows if r["kind"] == "verdict"} == {"robust_accuracy, pgd l2 0.5"}
    # The same through a pipe and in another order; another seed moves what is drawn and nothing else.
    again = shell(f"cat {' '.join(map(str, files[::-1]))} | rb-link")
    assert again.status == 0 and again.out == result.out
    other = records(execute("rb-link", *files, "--seed", 1, "--json"))
    assert [r["low"] for r in other if r["kind"] == "verdict"] == [r["low"] for r in rows if r["kind"] == "verdict"]
    assert [r.get("boot_low") for r in other] != [r.get("boot_low") for r in rows]


def test_controls_are_named_by_file_or_by_hand(scores):
    main = sorted(scores.glob("eps*.jsonl"))
    first, second = sorted(scores.glob("shuffled*.jsonl"))
    rows = records(execute("rb-link", *main, second, "--controls", first, "--controls", f"late={second}"))
    n = {r["population"]: r["n"] for r in rows if r["kind"] == "correlation"}
    assert n == {"main": 12, "with controls": 14, "without shuffled": 13, "without late": 13}
    assert {r["n"] for r in rows if r["kind"] == "dose_response"} == {12}
    result = execute("rb-link", *main, "--controls", first, "--controls", f"other={first}")
    assert result.status == 2 and "given as shuffled and as other" in result.err


def test_few_models_are_told_of(scores):
    files = sorted(scores.glob("eps*.jsonl"))[:4]
    result = execute("rb-link", *files)
    rows = records(result)
    assert result.err == "rb-link: 4 models besides controls: no p-value, 5 are needed\n"
    assert {r["p"] for r in rows if r["kind"] == "correlation"} == {None}
    assert execute("rb-link", *files, "-q").err == ""


def test_a_table_on_a_terminal(scores):
    files = " ".join(map(str, sorted(scores.glob("eps*.jsonl"))))
    result = shell(f"script -qec 'stty cols 200; rb-link {files}' /dev/null", TERM="dumb")
    text = result.out.decode()
    assert (
        result.status == 0 and "with robust_accuracy, pgd l2 0.5" in text and "over the radius of training (l2)" in text
    )
    (row,) = [line for line in text.splitlines() if "alignment, ig" in line and "rises" in line]
    assert row.split()[2] == "12" and row.count("*") == 4 and row.count(" to ") == 4


def test_figures_are_the_same_every_time_and_in_three_forms(scores, tmp_path):
    files = [*sorted(scores.glob("eps*.jsonl")), "--controls", *scores.glob("shuffled-12.jsonl")]
    for folder in ("a", "b"):
        assert execute("rb-link", *files, "--figures", tmp_path / folder).status == 0
    names = {
        "scatter-alignment-ig",
        "scatter-entropy-ig",
        "dose-l2-alignment-ig",
        "dose-l2-entropy-ig",
        "dose-l2-robust-accuracy-pgd-l2-0.5",
    }
    assert {p.name for p in (tmp_path / "a").iterdir()} == {
        f"{n}.{form}" for n in names for form in ("png", "svg", "pdf")
    }
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
    assert (tmp_path / "a" / "scatter-alignment-ig.png").read_bytes().startswith(b"\x89PNG")
    blocked = write(tmp_path / "file", [])
    result = execute("rb-link", *files, "--figures", blocked / "x")
    assert result.status == 4 and result.out == b""


def test_what_is_wrong_is_refused_in_one_line(scores, tmp_path):
    good = sorted(scores.glob("eps*.jsonl"))
    row = json.loads(good[0].read_text().splitlines()[3])
    for change, status, words in [
        ({"value": 0.9}, 3, "expected one value"),
        ({"model_sha": None}, 3, "no model_sha; expected records of rb-score"),
        ({"n": True}, 3, "no n"),
        ({"better": "up"}, 3, "better is 'up', expected higher or lower"),
        ({"better": "lower", "model_sha": "x"}, 3, "is better here"),
        ({"value": "0.3"}, 3, "value is '0.3', expected a finite number"),
        ({"method": 7}, 3, "method is '7', expected a text or null"),
        ({"params": []}, 3, "params is '[]', expected an object"),
        ({"complete": False, "model_sha": "x"}, 3, "try --allow-incomplete"),
    ]:
        result = execute("rb-link", *good, write(tmp_path / "bad.jsonl", [row | change]))
        assert (result.status, result.out) == (status, b"") and words in result.err and result.err.count("\n") == 1, (
            words
        )
    (tmp_path / "bad.jsonl").write_text(json.dumps(row).replace(str(row["value"]), "1e999"))
    assert execute("rb-link", *good, tmp_path / "bad.jsonl").status == 3
    (tmp_path / "bad.jsonl").write_text("{")
    assert execute("rb-link", *good, tmp_path / "bad.jsonl").status == 3
    partial = write(tmp_path / "partial.jsonl", [row | {"complete": False, "model_sha": "x"}])
    assert execute("rb-link", *good, partial, "--allow-incomplete").status == 0


def test_usage(scores, tmp_path):
    good = sorted(scores.glob("eps*.jsonl"))
    assert execute("rb-link").status == 3  # an empty standard input
    assert execute("rb-link", tmp_path / "none.jsonl").status == 3
    result = execute("rb-link", *good, "--robustness", "robust_accuracy@0.7")
    assert result.status == 2 and "nothing has '0.7'; there are robust_accuracy, pgd l2 0.5" in result.err
    result = execute("rb-link", *good, "--run", "job")
    assert result.status == 2 and "--run job: no record has that field" in result.err
    maps = [json.loads(line) for path in good for line in path.read_text().splitlines() if "attributions" in line]
    assert "no record of robust_accuracy" in execute("rb-link", write(tmp_path / "maps.jsonl", maps)).err
    attacks = [json.loads(line) for path in good for line in path.read_text().splitlines() if "adversarial" in line]
    result = execute("rb-link", write(tmp_path / "attacks.jsonl", attacks))
    assert result.status == 3 and "no interpretability metric" in result.err


def test_runs_of_several_models(scores, tmp_path):
    rows = [json.loads(line) for path in sorted(scores.glob("eps*.jsonl")) for line in path.read_text().splitlines()]
    rows = [r | {"job": int(r["model_sha"], 16) // 2} for r in rows]
    found = records(execute("rb-link", write(tmp_path / "jobs.jsonl", rows), "--run", "job"))
    row = found[0]
    assert (
        (row["n"], row["runs"]) == (12, 6) and row["low"] is None and row["p"] is None and row["boot_low"] is not None
    )
