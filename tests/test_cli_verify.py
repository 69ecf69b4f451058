"""rb-verify: planted faults, each under its own name; streams of others; and what is no stream at all."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import Result, execute
from safetensors import numpy as st

EPS = 0.75


@pytest.fixture(scope="module")
def attacked(folder: Path, stream_file: Path, model_file: Path) -> Path:
    """The 40 images under attack."""
    path = folder / "verify.safetensors"
    argv = ("rb-attack", stream_file, "-m", model_file, "--eps", EPS, "--steps", 3, "-q", "-o", path)
    assert execute(*argv).status == 0
    return path


def checks(result: Result) -> dict[str, dict]:
    return {record["check"]: record for record in map(json.loads, result.out.splitlines())}


def failures(result: Result) -> dict[str, list[int]]:
    return {name: record["ids"] for name, record in checks(result).items() if not record["holds"]}


def foreign(path: Path, attacked: Path, change: Callable[[dict[str, np.ndarray]], None] = lambda a: None) -> Path:
    """The attacked rows as another tool writes them, in another order, after a change."""
    arrays = {
        k: v[::-1].copy() for k, v in st.load_file(attacked).items() if k in ("id", "image", "adversarial", "label")
    }
    change(arrays)
    st.save_file(arrays, path)
    return path


def test_a_sound_stream_holds(attacked: Path, stream_file: Path, model_file: Path) -> None:
    """Through a file and through a pipe; the predictions are those of rb-score."""
    for argv, stdin in (((attacked,), b""), ((), attacked.read_bytes())):
        result = execute("rb-verify", *argv, "-m", model_file, "--clean", stream_file, stdin=stdin)
        assert result.status == 0 and failures(result) == {}, result.err
    found = checks(result)
    assert found["ball"]["rows"] == found["success"]["rows"] == found["clean-images"]["rows"] == 40
    scores = [json.loads(line) for line in execute("rb-score", attacked, "-m", model_file).out.splitlines()]
    robust = next(r["value"] for r in scores if r["metric"] == "robust_accuracy")
    broken = int(found["predictions"]["detail"].split()[0])
    assert broken <= round(40 * (1 - robust)) <= 40  # misclassified clean images count as broken there


def pixel(a: dict[str, np.ndarray]) -> None:
    flat = a["adversarial"][3].reshape(-1)
    flat[7] = 0.0 if flat[7] > 0.5 else 1.0
    a["adversarial"][3] = np.where(np.arange(flat.size) < 40, flat.round(), flat).reshape(a["adversarial"][3].shape)


def label(a: dict[str, np.ndarray]) -> None:
    a["label"][5] = (a["label"][5] + 1) % 8


def identity(a: dict[str, np.ndarray]) -> None:
    a["id"][6] = 4000


def nan(a: dict[str, np.ndarray]) -> None:
    a["adversarial"][8, 1, 2, 3] = np.nan


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (pixel, {"ball": [36]}),
        (label, {"clean-labels": [34]}),
        (identity, {"clean-ids": [4000], "complete": [33]}),
        (nan, {"finite": [31]}),
    ],
)
def test_four_planted_faults_are_four_failures(
    change: Callable, expected: dict, attacked: Path, stream_file: Path, model_file: Path, tmp_path: Path
) -> None:
    path = foreign(tmp_path / "planted.safetensors", attacked, change)
    argv = ("rb-verify", path, "-m", model_file, "--clean", stream_file, "--norm", "l2", "--eps", EPS)
    result = execute(*argv)
    assert result.status == 8 and failures(result) == expected, result.err
    assert result.err.count("\n") == 1 and all(name in result.err for name in expected)


OTHERS = {
    "outside the box": (lambda a: a["adversarial"].__setitem__((2, 0, 0, 0), 1.0001), "box"),
    "no class": (lambda a: a["label"].__setitem__(2, 8), "labels"),
    "id twice": (lambda a: a["id"].__setitem__(2, a["id"][0]), "ids"),
    "another image": (lambda a: a["image"].__setitem__(2, a["image"][0]), "clean-images"),
    "a row is missing": (lambda a: a.update({k: v[1:] for k, v in a.items()}), "complete"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_faults_are_findings(
    name: str, attacked: Path, stream_file: Path, model_file: Path, tmp_path: Path
) -> None:
    change, check = OTHERS[name]
    path = foreign(tmp_path / "planted.safetensors", attacked, change)
    argv = ("rb-verify", path, "-m", model_file, "--clean", stream_file, "--norm", "l2", "--eps", EPS)
    result = execute(*argv)
    assert result.status == 8 and check in failures(result), result.out


def test_a_changed_byte_is_a_finding_and_half_a_file_is_not_read(attacked: Path, model_file: Path) -> None:
    raw = bytearray(attacked.read_bytes())
    raw[-9] ^= 1
    result = execute("rb-verify", "-m", model_file, stdin=bytes(raw))
    assert result.status == 8 and "checksum" in failures(result)
    for stdin in (bytes(raw[:-100]), b"", b"no stream at all"):
        result = execute("rb-verify", "-m", model_file, stdin=stdin)
        assert result.status == 3 and result.err.count("\n") == 1 and result.out == b""


def test_a_stream_that_lies_about_itself(attacked: Path, model_file: Path) -> None:
    """Success, history and eps are told again, not believed."""
    raw = attacked.read_bytes()
    for old, new, check in (
        (rb"\"steps\":3", rb"\"steps\":9", "history"),
        (rb"\"eps\":0.75", rb"\"eps\":0.25", "ball"),
    ):
        assert old in raw
        result = execute("rb-verify", "-m", model_file, stdin=raw.replace(old, new))
        assert result.status == 8 and check in failures(result), result.err
    result = execute("rb-verify", attacked, "-m", model_file, "--eps", 0.5)
    assert result.status == 8 and set(failures(result)) == {"declared"}
    broken = st.load_file(attacked) | {"success": 1 - st.load_file(attacked)["success"]}
    result = execute("rb-verify", "-m", model_file, "--norm", "l2", "--eps", EPS, stdin=st.save(broken))
    assert result.status == 8 and set(failures(result)) == {"success"} and checks(result)["success"]["failed"] == 40


def test_a_transferred_attack_holds(attacked: Path, train_file: Path, tmp_path: Path) -> None:
    """Judged on another model: what it says of success no longer holds there, its ball and box do."""
    other = tmp_path / "other.safetensors"
    argv = ("rb-train", train_file, "--width", 4, "--epochs", 0, "--seed", 1, "-q", "-o", other)
    assert execute(*argv).status == 0
    arrays = {k: v for k, v in st.load_file(attacked).items() if k != "success"}
    result = execute("rb-verify", "-m", other, "--norm", "l2", "--eps", EPS, stdin=st.save(arrays))
    assert result.status == 0 and failures(result) == {}
    assert "made on another model" in checks(execute("rb-verify", attacked, "-m", other))["predictions"]["detail"]


def test_usage(attacked: Path, stream_file: Path, model_file: Path, tmp_path: Path) -> None:
    silent = foreign(tmp_path / "silent.safetensors", attacked)
    for argv, status in (((silent, "-m", model_file), 2), ((attacked,), 2), ((stream_file, "-m", model_file), 3),
                         (("--selftest", attacked), 2), ((tmp_path / "none", "-m", model_file), 3)):  # fmt: skip
        result = execute("rb-verify", *argv)
        assert result.status == status and result.err.count("\n") == 1, result.err


def test_selftest_holds() -> None:
    result = execute("rb-verify", "--selftest")
    found = [json.loads(line) for line in result.out.splitlines()]
    assert result.status == 0 and len(found) >= 8 and all(r["holds"] and r["error"] <= r["tolerance"] for r in found)
