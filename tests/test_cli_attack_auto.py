"""rb-attack: the protocol, its parts by pipe, shards, distances, surrogates, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import execute, shell
from safetensors import numpy as st

from rbkit.cli import _attack_spec, attack
from rbkit.cli._compute import Model
from rbkit.cli._errors import Input
from rbkit.cli._history import recorded
from rbkit.formats.chunk import Chunk
from rbkit.formats.errors import FormatError
from rbkit.formats.rows import RowChecker

SHORT = ("--steps", 2, "--queries", 6)


@pytest.fixture(scope="module")
def whole(folder: Path, stream_file: Path, model_file: Path) -> Path:
    """The 40 rows under the shortened protocol."""
    path = folder / "auto.safetensors"
    done = execute("rb-attack", stream_file, "-m", model_file, "--attack", "auto", *SHORT, "-q", "-o", path)
    assert done.status == 0, done.err
    return path


def metadata(path: Path) -> dict:
    """What rb-info tells of a file."""
    return json.loads(execute("rb-info", "--json", path).out)


def test_auto_is_a_pipe_of_its_attacks(tmp_path: Path, stream_file: Path, model_file: Path, whole: Path) -> None:
    """The same images, verdicts and costs, bit by bit; the metadata names what was done."""
    out = tmp_path / "piped.safetensors"
    steps = [f"rb-attack -q -m {model_file} --attack {a}" for a in (
        "apgd-ce --steps 2", "apgd-t --steps 2", "fab-t --steps 2 --until broken", "square --queries 6",
    )]  # fmt: skip
    assert shell(f"cat {stream_file} | {' | '.join(steps)} > {out}").status == 0
    first, second = st.load_file(whole), st.load_file(out)
    assert first.keys() == second.keys() and "distance" not in first
    for name in first:
        assert np.array_equal(first[name], second[name]), name
    assert 0 < first["success"].sum() < 40 and (first["forwards"] > 0).any()
    told = metadata(whole)["attack"]
    assert (told["name"], told["steps"], told["queries"], told["targets"]) == ("auto", 2, 6, 7)
    assert "loss" not in told and "step_size" not in told
    assert metadata(out)["attack"]["name"] == "apgd-ce+apgd-t+fab-t+square"


def test_shards_of_auto_are_the_whole(tmp_path: Path, stream_file: Path, model_file: Path, whole: Path) -> None:
    parts = []
    for k in (1, 2):
        parts.append(tmp_path / f"{k}.safetensors")
        common = ("--attack", "auto", *SHORT, "-q", "--shard", f"{k}/2", "-o", parts[-1])
        assert execute("rb-attack", stream_file, "-m", model_file, *common).status == 0
    joined = tmp_path / "joined.safetensors"
    assert execute("rb-info", "--join", *parts, "-o", joined).status == 0
    assert joined.read_bytes() == whole.read_bytes()


def test_a_replayed_run_gives_the_same_bytes(tmp_path: Path, model_file: Path, whole: Path) -> None:
    line = execute("rb-info", "--replay", whole).out.decode().strip()
    (variable,) = {word.strip('"$') for word in line.split() if word.startswith('"$MODEL_')}
    done = shell(f"export {variable}={model_file}\n({line}) > {tmp_path / 'again.safetensors'}")
    assert done.status == 0, (line, done.err)
    assert (tmp_path / "again.safetensors").read_bytes() == whole.read_bytes(), line


@pytest.mark.parametrize("name", _attack_spec.NAMES)
def test_every_attack_takes_the_options_that_its_history_records(name: str) -> None:
    """A replay gives them all on the command line: none may be refused, and they lead to the same attack."""
    given = dict.fromkeys(
        (
            "steps",
            "step_size",
            "queries",
            "start",
            "loss",
            "until",
            "surrogate",
            "target",
            "eps",
            "keep",
            "last_iterate",
            "sprint",
            "tf32",
        )
    )
    given |= {"attack": name, "norm": "linf", "seed": 4, "restarts": 2, "targeted": False, "block": 64}
    spec = _attack_spec.spec(given, 0.03, 8)
    kept = recorded(_attack_spec.recorded(given, spec))
    again = (
        given | kept | {"eps": [str(kept["eps"])], "step_size": str(kept["step_size"]) if "step_size" in kept else None}
    )
    _attack_spec.check(again)
    assert _attack_spec.radii(again) == [0.03] and _attack_spec.spec(again, 0.03, 8) == spec
    assert ("queries" in kept) == (name in ("square", "auto")) and ("loss" in kept) == (name in ("fgsm", "pgd"))


def test_distances_are_stored_and_scored(tmp_path: Path, stream_file: Path, model_file: Path) -> None:
    """Inside the ball the image has that norm; outside it stays; the median is that of the rows, wrong ones at 0."""
    out = tmp_path / "fab.safetensors"
    common = (stream_file, "-m", model_file, "--attack", "fab-t", "--steps", 4, "--eps", "0.1", "-q")
    assert execute("rb-attack", *common, "-o", out).status == 0
    rows = st.load_file(out)
    distance, success = rows["distance"], rows["success"].astype(bool)
    assert distance.dtype == np.float32 and np.array_equal(success, distance <= np.float32(0.1))
    moved = (rows["adversarial"] - rows["image"].astype(np.float32) / np.float32(255)).reshape(40, -1)
    size = np.linalg.norm(moved.astype(np.float64), axis=1)
    assert success.any() and not success.all() and size[success] == pytest.approx(distance[success], rel=1e-5)
    assert not size[~success].any()
    lines = execute("rb-score", out, "-m", model_file, "--metrics", "minimal_distance,robust_accuracy", "--json").out
    records = {r["metric"]: r for r in map(json.loads, lines.splitlines())}
    assert records["robust_accuracy"]["value"] == pytest.approx(1 - success.mean())
    median = records["minimal_distance"]
    assert median["value"] == pytest.approx(float(np.median(distance.astype(np.float64))), rel=1e-6)
    assert median["statistic"] == "median" and median["low"] <= median["value"] <= median["high"]
    assert metadata(out)["attack"]["until"] == "end"
    again = tmp_path / "again.safetensors"
    second = ("rb-attack", out, *common[1:3], *common[3:5], "--steps", 1, "--eps", "0.1", "-q", "-o", again)
    assert execute(*second).status == 0
    after = st.load_file(again)  # fewer steps: nothing is moved away
    assert np.array_equal(after["distance"], distance) and np.array_equal(after["adversarial"], rows["adversarial"])
    early = tmp_path / "early.safetensors"
    assert execute("rb-attack", *common, "--until", "broken", "-o", early).status == 0
    assert "distance" not in (found := st.load_file(early)) and np.array_equal(found["success"], rows["success"])


@pytest.mark.parametrize(
    "bad", [np.full(4, np.nan, "f4"), np.full(4, -1, "f4"), np.zeros((4, 2), "f4"), np.zeros(4, int)]
)
def test_a_damaged_distance_is_refused(bad: np.ndarray) -> None:
    rows = {"image": np.zeros((4, 1, 2, 3), np.uint8), "distance": np.array([0, 1, np.inf, 2], np.float32)}
    checker = RowChecker()
    checker(Chunk(rows, {"first": 0, "count": 4}, False, "here"))
    with pytest.raises(FormatError, match="here: distance"):
        checker(Chunk({**rows, "distance": bad}, {"first": 4, "count": 4}, True, "here"))


def test_a_surrogate(tmp_path: Path, stream_file: Path, train_file: Path, model_file: Path) -> None:
    """Made to the end on another model, judged by this one; told in history and records."""
    other = tmp_path / "other.safetensors"
    train = ("rb-train", train_file, "--width", 4, "--epochs", 0, "--seed", 5, "-q", "-o", other)
    assert execute(*train).status == 0
    out = tmp_path / "o.safetensors"
    common = ("rb-attack", stream_file, "-m", model_file, "--surrogate", other)
    assert execute(*common, "--eps", 2, "--steps", 2, "-q", "-o", out).status == 0
    lines = execute("rb-score", out, "-m", model_file, "-m", other, "--metrics", "robust_accuracy", "--json").out
    told = {r["model_sha"]: r for r in map(json.loads, lines.splitlines())}
    info = metadata(out)
    victim, maker = info["attack"]["model"], info["attack"]["surrogate"]
    assert victim != maker and info["attack"]["until"] == "end" and {victim, maker} == set(told)
    assert {r["crafted_on"] for r in told.values()} == {maker}
    assert told[victim]["value"] == pytest.approx(1 - st.load_file(out)["success"].mean())
    assert '--surrogate "$INPUT_' in execute("rb-info", "--replay", out).out.decode()
    assert execute(*common, "--until", "broken", "-o", out).status == 2


@pytest.mark.parametrize(("classes", "size", "word"), [(3, [3, 32, 32], "3 classes"), (8, [1, 32, 32], "takes images")])
def test_a_surrogate_of_other_classes_or_images_is_refused(
    classes: int, size: list[int], word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def described(count: int, shape: list[int] | None) -> Model:
        return Model(None, {"num_classes": count, "input": shape}, "sha", "path")  # type: ignore[arg-type]

    monkeypatch.setattr(attack, "load_model", lambda path, **_: described(classes, size))
    with pytest.raises(Input, match=word):
        attack._surrogate("path", described(8, [3, 32, 32]), archs=None, device=None)
    monkeypatch.setattr(attack, "load_model", lambda path, **_: described(8, None))
    assert attack._surrogate("path", described(8, [3, 32, 32]), archs=None, device=None).classes == 8


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (("--attack", "square", "--steps", 3), "--steps goes with"),
        (("--attack", "apgd-ce", "--queries", 3), "--queries goes with"),
        (("--attack", "apgd-ce", "--loss", "dlr"), "--loss goes with"),
        (("--attack", "auto", "--targeted"), "--targeted goes with"),
        (("--attack", "fab-t", "--start", "random"), "--start goes with"),
        (("--attack", "apgd-t", "--step-size", "0.1"), "--step-size goes with"),
        (("--attack", "autoattack"), "expected one of"),
    ],
)
def test_options_that_an_attack_has_not(
    options: tuple[object, ...], word: str, tmp_path: Path, stream_file: Path, model_file: Path
) -> None:
    out = tmp_path / "o.safetensors"
    done = execute("rb-attack", stream_file, "-m", model_file, *options, "-o", out)
    assert done.status == 2 and word in done.err and done.err.count("\n") == 1 and not out.exists(), done.err
