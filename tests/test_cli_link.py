"""rb-link as a process: records in, records, tables and figures out, and its refusals."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import execute, shell

from rbkit.cli import _output
from rbkit.cli._errors import Input, Output, Usage
from rbkit.cli.link import link
from rbkit.formats.figures import command_of


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
    whole = rows[0]
    plain = [r["value"] for f in files[::4] for r in map(json.loads, f.read_text().splitlines()[:1])]
    assert whole["kind"] == "population" and whole["best_eps"] == 1 and 0.5 < whole["gain"] < 0.7
    assert [whole[k] for k in ("value", "low", "high")] == pytest.approx([np.mean(plain), min(plain), max(plain)])
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


def test_few_models_are_told_of(scores):
    files = sorted(scores.glob("eps*.jsonl"))[:4]
    result = execute("rb-link", *files)
    rows = records(result)
    assert result.err == "rb-link: 4 models besides controls: no p-value, 5 are needed\n"
    assert {r["p"] for r in rows if r["kind"] == "correlation"} == {None}


def test_a_table_on_a_terminal(scores):
    files = " ".join(map(str, sorted(scores.glob("eps*.jsonl"))))
    result = shell(f"script -qec 'rb-link {files}' /dev/null", TERM="xterm", COLUMNS="200", NO_COLOR="1")
    text = result.out.decode()
    assert (
        result.status == 0 and "with robust_accuracy, pgd l2 0.5" in text and "over the radius of training (l2)" in text
    )
    (row,) = [line for line in text.splitlines() if "alignment, ig" in line and "rises" in line]
    assert row.split()[2] == "12" and row.count("*") == 4 and row.count(" to ") == 4


def test_figures_are_the_same_every_time_and_in_three_forms(scores, tmp_path, capfd):
    files = sorted(map(str, scores.glob("eps*.jsonl")))
    control = str(scores / "shuffled-12.jsonl")
    link(files, controls=[control], figures=str(tmp_path / "a"), json_=True)
    assert execute("rb-link", *files, "--controls", control, "--figures", tmp_path / "b").status == 0
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
    drawn = tmp_path / "a" / "scatter-alignment-ig.svg"
    assert command_of(drawn.read_bytes()) == f"rb-link {' '.join(files)} --controls {control} --figures figures/"


def test_records_are_not_lost_with_the_figures(scores, tmp_path, capfd, monkeypatch):
    """A folder that cannot be made is told of before records are read; one that fails later fails behind the records."""
    blocked = write(tmp_path / "file", []) / "x"
    with pytest.raises(Output, match="file"):
        link([str(tmp_path / "none.jsonl")], figures=str(blocked))
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]
    monkeypatch.setattr(_output.Folder, "check", lambda folder: None)
    with pytest.raises(Output, match="file"):
        link(sorted(map(str, scores.glob("eps*.jsonl"))), figures=str(blocked), json_=True)
    assert capfd.readouterr().out.count('"kind":"verdict"') == 2


BAD = [
    ({"value": 0.9}, "expected one value"),
    ({"model_sha": None}, "no model_sha; expected records of rb-score"),
    ({"n": True}, "no n"),
    ({"better": "up"}, "better is 'up', expected higher or lower"),
    ({"better": "lower", "model_sha": "x"}, "is better here"),
    ({"value": "0.3"}, "value is '0.3', expected a finite number"),
    ({"value": 10**400}, "expected a finite number"),
    ({"method": 7}, "method is '7', expected a text or null"),
    ({"params": []}, "params is '\\[\\]', expected an object"),
    ({"complete": False, "model_sha": "x"}, "try --allow-incomplete"),
]


@pytest.mark.parametrize(("change", "words"), BAD, ids=[words for _, words in BAD])
def test_wrong_records_are_refused(scores, tmp_path, change, words):
    good = sorted(map(str, scores.glob("eps*.jsonl")))
    row = json.loads(Path(good[0]).read_text().splitlines()[3])
    with pytest.raises(Input, match=words):
        link([*good, str(write(tmp_path / "bad.jsonl", [row | change]))])


def test_refusals_are_one_line_and_a_status(scores, tmp_path, capfd):
    good = sorted(map(str, scores.glob("eps*.jsonl")))
    row = json.loads(Path(good[0]).read_text().splitlines()[3])
    bad = tmp_path / "bad.jsonl"
    bad.write_text(json.dumps(row).replace(str(row["value"]), "1e999"))
    result = execute("rb-link", *good, bad)
    assert (result.status, result.out, result.err.count("\n")) == (3, b"", 1) and "value is 'inf'" in result.err
    assert execute("rb-link").status == 3  # an empty standard input
    bad.write_text("{")
    for sources in ([str(bad)], [str(tmp_path / "none.jsonl")]):
        with pytest.raises(Input):
            link(sources)
    link([*good, str(write(bad, [row | {"complete": False, "model_sha": "x"}]))], allow_incomplete=True)
    assert '"n":12' in capfd.readouterr().out


def test_usage(scores, tmp_path):
    good = sorted(scores.glob("eps*.jsonl"))
    names = [str(path) for path in good]
    with pytest.raises(Usage, match=r"nothing has '0\.7'; there are robust_accuracy, pgd l2 0\.5"):
        link(names, robustness=["robust_accuracy@0.7"])
    with pytest.raises(Usage, match="--run job: no record has that field"):
        link(names, run="job")
    first = str(scores / "shuffled-12.jsonl")
    with pytest.raises(Usage, match="given as shuffled and as other"):
        link(names, controls=[first, f"other={first}"])
    parts = {
        kind: [json.loads(line) for path in good for line in path.read_text().splitlines() if kind in line]
        for kind in ("attributions", "adversarial")
    }
    with pytest.raises(Input, match="no record of robust_accuracy"):
        link([str(write(tmp_path / "maps.jsonl", parts["attributions"]))])
    with pytest.raises(Input, match="no interpretability metric"):
        link([str(write(tmp_path / "attacks.jsonl", parts["adversarial"]))])


def test_runs_of_several_models(scores, tmp_path, capfd):
    rows = [json.loads(line) for path in sorted(scores.glob("eps*.jsonl")) for line in path.read_text().splitlines()]
    rows = [r | {"job": int(r["model_sha"], 16) // 2} for r in rows]
    link([str(write(tmp_path / "jobs.jsonl", rows))], run="job", json_=True)
    row = json.loads(capfd.readouterr().out.splitlines()[1])
    assert (
        (row["n"], row["runs"]) == (12, 6) and row["low"] is None and row["p"] is None and row["boot_low"] is not None
    )
