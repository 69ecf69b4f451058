"""rb-score: records, pools, gates and streams of scores."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import execute


def records(*argv: object) -> dict[tuple[str, str | None], dict]:
    result = execute("rb-score", *argv)
    assert result.status == 0, result.err
    lines = [json.loads(line) for line in result.out.splitlines()]
    return {(r["metric"], r.get("attack")): r for r in lines}


def test_scores_merge(tmp_path: Path, stream_file: Path, model_file: Path) -> None:
    """Shards are incomplete; their scores pooled by cat, without a model, say what the whole says."""
    names = []
    for k in (1, 2):
        names.append(tmp_path / f"{k}.rbs")
        part = records("-m", model_file, stream_file, "--shard", f"{k}/2", "-o", names[-1])
        assert part["clean_accuracy", None]["complete"] is False
    whole = records("-m", model_file, stream_file)["clean_accuracy", None]
    merged = records(*names)["clean_accuracy", None]
    assert {"metric", "value", "low", "high", "n", "unit", "better"} <= set(whole)
    assert whole["n"] == merged["n"] == 40 and whole["low"] < whole["high"]
    for key in ("value", "low", "high"):
        assert merged[key] == pytest.approx(whole[key], abs=1e-10)
    twice = execute("rb-score", names[0], names[0])
    assert twice.status == 3 and twice.err.count("\n") == 1


def test_pooled_scores_print_what_the_whole_prints(tmp_path: Path, stream_file: Path, model_file: Path) -> None:
    """The same bytes: order of records, of their keys and of bands, and every digit."""
    maps = tmp_path / "maps.safetensors"
    argv = ("rb-saliency", stream_file, "-m", model_file, "--method", "gradient", "-q", "-o", maps)
    assert execute(*argv).status == 0
    names = [tmp_path / f"{k}.rbs" for k in (1, 2, 3)]
    for k, name in enumerate(names, 1):
        assert execute("rb-score", maps, "-m", model_file, "--shard", f"{k}/3", "-o", name).status == 0
    whole = execute("rb-score", maps, "-m", model_file)
    assert whole.status == 0 and b'"band":{' in whole.out
    assert execute("rb-score", *names).out == whole.out


def test_records_are_told_where_the_values_cannot_be_kept(tmp_path: Path, stream_file: Path, model_file: Path) -> None:
    """Two maps are two streams, of which a document holds one; that shows when all is computed."""
    maps, argv = [], ("rb-saliency", stream_file, "-m", model_file, "-q")
    for method in ("gradient", "input-x-gradient"):
        maps.append(tmp_path / f"{method}.safetensors")
        assert execute(*argv, "--method", method, "-o", maps[-1]).status == 0
    judge = ("rb-score", *maps, "-m", model_file, "--metrics", "gini,clean_accuracy")
    result = execute(*judge, "-o", tmp_path / "scores.safetensors")
    assert result.status == 2 and result.err.count("\n") == 1 and ".rbs" in result.err
    assert result.out == execute(*judge).out and result.out
    assert not (tmp_path / "scores.safetensors").exists()


def test_values_go_to_standard_output_in_place_of_the_records(stream_file: Path, model_file: Path) -> None:
    """And through a pipe to where they are pooled."""
    values = execute("rb-score", "-m", model_file, stream_file, "-o", "-")
    assert values.status == 0, values.err
    pooled = execute("rb-score", "-", stdin=values.out)
    assert pooled.status == 0 and pooled.out == execute("rb-score", "-m", model_file, stream_file).out


def test_an_output_that_cannot_be_written_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    for output in (tmp_path / "nowhere" / "scores.rbs", f"{tmp_path}/"):
        result = execute("rb-score", tmp_path / "missing.rbs", "-m", tmp_path / "no-model", "-o", output)
        assert result.status == 4 and str(output) in result.err and result.err.count("\n") == 1


@pytest.mark.parametrize(
    "option", [("--flags",), ("--expect", "clean_accuracy >= 1"), ("--paired",), ("--tag", "a"), ("-o", "x.rbs")]
)
def test_rows_on_their_own_are_asked_for_nothing_else(option, stream_file: Path, model_file: Path) -> None:
    """A gate that is not judged passes everything."""
    result = execute("rb-score", "-m", model_file, stream_file, "--per-example", *option)
    assert result.status == 2 and f"leave out {option[0]}" in result.err and result.err.count("\n") == 1


def test_gates(stream_file: Path, model_file: Path) -> None:
    value = records("-m", model_file, stream_file)["clean_accuracy", None]["value"]
    gates = {"clean_accuracy >= 0": 0, "clean_accuracy >= 1.5": 8, f"clean_accuracy >= {value}": 9, "nonsense": 2}
    for gate, status in gates.items():
        assert execute("rb-score", "-m", model_file, stream_file, "--expect", gate).status == status, gate


def test_paired_models(stream_file: Path, model_file: Path, tmp_path: Path, train_file: Path) -> None:
    """Two models on one stream give their difference; one model alone is a usage error."""
    other = tmp_path / "other.safetensors"
    argv = ("rb-train", train_file, "--width", 4, "--epochs", 1, "--batch", 32, "--seed", 1, "-q", "-o", other)
    assert execute(*argv).status == 0
    result = execute("rb-score", stream_file, "-m", model_file, "-m", other, "--paired")
    found = [json.loads(line) for line in result.out.splitlines()]
    first, second, gap = found
    assert [r["metric"] for r in found] == ["clean_accuracy", "clean_accuracy", "clean_accuracy_difference"]
    assert gap["value"] == pytest.approx(second["value"] - first["value"]) and gap["against"] == first["model_sha"]
    for gate, status in (("clean_accuracy_difference >= -1", 0), ("clean_accuracy_difference >= 1.5", 8)):
        assert (
            execute("rb-score", stream_file, "-m", model_file, "-m", other, "--paired", "--expect", gate).status
            == status
        )
    alone = execute("rb-score", stream_file, "-m", model_file, "--paired")
    assert alone.status == 2 and alone.err.count("\n") == 1


def test_a_metric_that_no_stream_has_is_told(tmp_path: Path, stream_file: Path, model_file: Path) -> None:
    """Not left out in silence; and where none is left, the error names what was asked for and what the stream is."""
    maps = tmp_path / "maps.safetensors"
    common = ("-m", model_file, "-q")
    assert execute("rb-saliency", stream_file, "--method", "gradient", *common, "-o", maps).status == 0
    some = execute("rb-score", maps, "-m", model_file, "--metrics", "gini,robust_accuracy", "--json")
    assert some.status == 0 and b"gini" in some.out and b"robust_accuracy" not in some.out
    assert "--metrics robust_accuracy: of no stream here" in some.err
    assert not execute("rb-score", maps, "-m", model_file, "--metrics", "gini", "--json").err
    none = execute("rb-score", maps, "-m", model_file, "--metrics", "robust_accuracy", "--json")
    assert none.status == 3 and "robust_accuracy" in none.err and "attributions" in none.err
