"""rb-report: what it makes of the records of rb-score and rb-link."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest
from conftest import execute


def record(model: int, metric: str, value: float, *, kind: str, **more: object) -> dict:
    """A line of rb-score for a model; the first is standard, the rest are trained at eps model / 4."""
    eps = model / 4
    return {
        "metric": metric, "value": value, "low": value - 0.01, "high": value + 0.01, "n": 200, "unit": "share",
        "better": "higher", "excluded": 0, "source": "-", "complete": True, "kind": kind, "model_sha": f"{model:064x}",
        "train_method": "pgd" if eps else "standard", "train_norm": "l2", "train_eps": eps, "train_seed": model, **more,
    }  # fmt: skip


def write(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def population(folder: Path) -> Path:
    """Records of rb-link for eight models whose alignment rises with robustness and whose Gini index is noise."""
    draw, records = random.Random(3), []
    for model in range(8):
        robust = 0.1 * model + draw.uniform(0, 0.02)
        attack = {"attack": "pgd", "norm": "l2", "eps": 0.5, "crafted_on": f"{model:064x}"}
        records += [
            record(model, "robust_accuracy", robust, kind="adversarial", **attack),
            record(model, "clean_accuracy", 0.9 + draw.uniform(-0.02, 0.02), kind="adversarial", **attack),
            record(model, "alignment", robust / 2 + draw.uniform(0, 0.01), kind="attributions", method="ig"),
            record(model, "gini", draw.uniform(0.3, 0.5), kind="attributions", method="ig"),
        ]
    result = execute("rb-link", write(folder / "scores.jsonl", records), "--json")
    assert result.status == 0, result.err
    (folder / "link.jsonl").write_bytes(result.out)
    return folder / "link.jsonl"


def test_a_population_is_answered_first(tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    assert execute("rb-report", population(tmp_path), "--title", "eight & more", "-o", page).status == 0
    text = page.read_text()
    start = text.index('class="answer"')
    answer = text[start : text.index("</p>", start)]
    assert "2 interpretability metrics over 8 models" in answer and "Rising with robustness" in answer
    assert re.search(r"held fixed: 1 \(alignment, ig (1\.00|0\.9\d)\)", answer)
    assert "eight &amp; more" in text and "half-effect radius" in text and text.count("<h1>") == 1
    assert "standard and one adversarially" not in text and "<script" not in text


def test_a_population_is_drawn(tmp_path: Path) -> None:
    """All correlations in one figure, and rb-link's own figures below the command that drew them."""
    link = population(tmp_path)
    assert execute("rb-link", tmp_path / "scores.jsonl", "--figures", tmp_path / "figures").status == 0
    drawn = sorted((tmp_path / "figures").glob("*.svg"))
    page = tmp_path / "report.html"
    assert execute("rb-report", link, *drawn, "-o", page).status == 0
    text = page.read_text()
    assert len(drawn) == 5 and text.count("<img") == 1 + len(drawn)
    assert text.count(f"<pre>rb-link {tmp_path / 'scores.jsonl'} --figures figures/</pre>") == 1
    (tmp_path / "bad.svg").write_text("<svg")
    result = execute("rb-report", link, tmp_path / "bad.svg", "-o", tmp_path / "r.html")
    assert result.status == 3 and "bad.svg" in result.err and result.err.count("\n") == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [({}, None), ({"value": 0.3}, "clean accuracy of 0.300"), ({"gain": 0.04}, "the best radius adds 0.040")],
)
def test_a_population_that_learned_nothing_is_told_of(tmp_path: Path, change: dict, words: str | None) -> None:
    first, *rest = population(tmp_path).read_text().splitlines()
    assert json.loads(first)["kind"] == "population"
    (tmp_path / "link.jsonl").write_text("\n".join([json.dumps(json.loads(first) | change), *rest]) + "\n")
    result = execute("rb-report", tmp_path / "link.jsonl", "--require", "-o", tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text()
    assert result.status == (0 if words is None else 8)
    assert ("decides nothing" in text) == (words is not None) and (words or "") in text
    assert (words or "") in result.err and result.err.count("\n") == (0 if words is None else 1)


def control(*, lost: float) -> list[dict]:
    """A standard and a robust model on images with a cue; the standard one loses `lost` when it is swapped."""
    records = []
    for model, loss in ((0, lost), (4, 0.02)):
        for shift in (0, 3):
            value = 0.95 - (loss if shift else 0)
            records.append(record(model, "clean_accuracy", value, kind="images", cue=0.5, cue_shift=shift))
        records.append(record(model, "cue_mass", 0.1 * model, kind="attributions", method="ig", cue=0.5, cue_shift=0))
    return records


def test_the_control_is_told_only_where_the_swap_proves_it(tmp_path: Path) -> None:
    link = population(tmp_path)
    for lost, shown, hidden in (
        (0.5, "tells them apart", "does not count"),
        (0.1, "does not count", "tells them apart"),
    ):
        page = tmp_path / "report.html"
        proof = write(tmp_path / "control.jsonl", control(lost=lost))
        assert execute("rb-report", link, proof, "-o", page).status == 0
        assert shown in page.read_text() and hidden not in page.read_text()


def test_only_records_make_a_report(tmp_path: Path) -> None:
    result = execute("rb-report", write(tmp_path / "control.jsonl", control(lost=0.5)), "-o", tmp_path / "r.html")
    assert result.status == 3 and result.err.count("\n") == 1 and not (tmp_path / "r.html").exists()


@pytest.mark.parametrize("option", [["-o", "none/page.html"], ["--figures", "file/x"]])
def test_what_cannot_be_written_is_told_before_anything_is_read(tmp_path: Path, option: list[str]) -> None:
    write(tmp_path / "file", [])
    result = execute("rb-report", tmp_path / "none.jsonl", option[0], tmp_path / option[1])
    assert result.status == 4 and result.err.count("\n") == 1 and str(tmp_path / option[1].split("/")[0]) in result.err
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_flags_are_told_with_what_fires_first(tmp_path: Path) -> None:
    about = {"kind": "adversarial", "attack": "pgd", "norm": "l2", "eps": 0.5}
    flags = [
        record(0, f"flag:{name}", 0.2, limit=0.1, flag=name, fires=fires, detail=f"about {name}", **about)
        for name, fires in (("noise", False), ("one_step", True), ("restarts", None))
    ]
    source = write(tmp_path / "scores.jsonl", [record(0, "robust_accuracy", 0.2, **about), *flags])
    assert execute("rb-report", source, "-o", tmp_path / "r.html").status == 0
    text = (tmp_path / "r.html").read_text()
    assert "1 of 3 checks fire" in text and "undecided" in text
    assert text.index("about one_step") < text.index("about noise")
