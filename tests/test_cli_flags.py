"""rb-score --flags: records, status and what it does not depend on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch as st
import torch
from conftest import Result, execute
from toys import generator

from rbkit.tools.flags import FLAGS

ARCH = ("--arch", "guarded:make")
FACTORY = """
import torch

class Rounded(torch.nn.Module):
    def forward(self, images):
        return (images * 16).round() / 16

def make(num_classes):
    return torch.nn.Sequential(Rounded(), torch.nn.Flatten(), torch.nn.Linear(3 * 6 * 8, num_classes))
"""


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model that masks its gradient (m), 90 unlabelled images (x) and an attack on them (adv)."""
    folder = tmp_path_factory.mktemp("guarded")
    (folder / "guarded.py").write_text(FACTORY)
    weight = torch.randn(5, 3 * 6 * 8, generator=generator(0))
    torch.save({"2.weight": weight, "2.bias": torch.zeros(5)}, folder / "w.pt")
    st.save_file({"image": 0.2 + 0.6 * torch.rand(90, 3, 6, 8, generator=generator(1))}, folder / "x.safetensors")
    made = execute("rb-model", "import", "w.pt", *ARCH, "--classes", 5, "-o", "m.safetensors", cwd=folder)
    assert made.status == 0, made.err
    attack(folder, "-o", "adv.safetensors")
    return folder


def attack(folder: Path, *argv: object) -> None:
    options = ("-m", "m.safetensors", *ARCH, "--norm", "l2", "--eps", 1.0, "--steps", 10, "-q")
    done = execute("rb-attack", "x.safetensors", *options, *argv, cwd=folder)
    assert done.status == 0, done.err


def flagged(folder: Path, *argv: object) -> tuple[Result, list[dict]]:
    """What rb-score says, and its records of flags."""
    done = execute("rb-score", "-m", "m.safetensors", *ARCH, "--flags", "-q", *argv, cwd=folder)
    return done, [r for r in map(json.loads, done.out.splitlines()) if "flag" in r]


def test_a_masked_model_ends_in_status_8_after_all_records(guarded: Path) -> None:
    done, records = flagged(guarded, "adv.safetensors")
    assert done.status == 8 and done.err.count("\n") == 1 and "zero_gradients" in done.err
    assert [r["flag"] for r in records] == list(FLAGS)
    fired = {r["flag"] for r in records if r["fires"]}
    assert {"zero_gradients", "flat_loss", "black_box", "unbounded"} <= fired
    assert not fired & {"probabilities", "randomised", "batch_dependent", "nan_gradients"}
    for record in records:
        assert record["metric"] == f"flag:{record['flag']}" and record["fires"] == (record["value"] > record["limit"])
        assert {"low", "high", "n", "unit", "better", "detail", "model_sha", "attack", "norm", "eps"} <= set(record)
        assert record["n"] == 64 and record["complete"] is True
    assert b'"metric":"robust_accuracy"' in done.out


def test_flags_do_not_depend_on_pieces_or_order(guarded: Path) -> None:
    """Shards and a stream of short documents, joined the wrong way round, have the flags of the whole."""
    for k in (1, 2, 3):
        attack(guarded, "--shard", f"{k}/3", "-o", f"part{k}.rbs")
    _, whole = flagged(guarded, "adv.safetensors")
    _, parts = flagged(guarded, "part3.rbs", "part1.rbs", "part2.rbs")
    assert parts == whole


def test_flags_leave_the_scores_as_they_are(guarded: Path) -> None:
    flagged(guarded, "adv.safetensors", "-o", "with.safetensors")
    done = execute(
        "rb-score", "-m", "m.safetensors", *ARCH, "adv.safetensors", "-o", "without.safetensors", cwd=guarded
    )
    assert done.status == 0 and b"flag" not in done.out
    assert (guarded / "with.safetensors").read_bytes() == (guarded / "without.safetensors").read_bytes()


def test_what_flags_cannot_be_told_of(guarded: Path) -> None:
    """Scores and clean images have none, nor have rows one by one; a firing flag outranks rows that are missing."""
    execute("rb-score", "-m", "m.safetensors", *ARCH, "adv.safetensors", "-o", "s.safetensors", cwd=guarded)
    clean = execute("rb-score", "--flags", "s.safetensors", cwd=guarded)
    assert clean.status == 2 and "rb-attack" in clean.err
    assert flagged(guarded, "adv.safetensors", "--per-example")[0].status == 2
    part, records = flagged(guarded, "part1.rbs")
    assert part.status == 8 and not any(r["complete"] for r in records)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 640 training and 80 test images and two models of 8 channels: standard and robust."""
    folder = tmp_path_factory.mktemp("trained")
    recipe = ("--width", 8, "--epochs", 3, "--batch", 32, "--augment", "none", "-q")
    lines: list[tuple[object, ...]] = [
        ("rb-data", "shapes", "--split", "train", "--n", 640, "-o", "train.safetensors"),
        ("rb-data", "shapes", "--n", 80, "-o", "test.safetensors"),
        ("rb-train", "train.safetensors", *recipe, "-o", "standard.safetensors"),
        ("rb-train", "train.safetensors", *recipe, "--norm", "l2", "--eps", 0.1, "--steps", 2, "-o", "robust.safetensors"),
    ]  # fmt: skip
    for line in lines:
        done = execute(*line, cwd=folder)
        assert done.status == 0, done.err
    return folder


@pytest.mark.parametrize("name", ["standard", "robust"])
def test_plain_models_have_no_flags_and_weak_attacks_do(trained: Path, name: str) -> None:
    model = ("-m", f"{name}.safetensors")
    made = execute("rb-attack", "test.safetensors", *model, "--eps", 0.2, "-q", "-o", "adv.safetensors", cwd=trained)
    assert made.status == 0, made.err
    done = execute("rb-score", "adv.safetensors", *model, "--flags", "-q", cwd=trained)
    records = [r for r in map(json.loads, done.out.splitlines()) if "flag" in r]
    assert done.status == 0, (done.err, [r for r in records if r["fires"] is not False])
    assert len(records) == len(FLAGS) and not any(r["fires"] for r in records)
    weak = ("--eps", 0.5, "--steps", 1, "--step-size", 0.001, "--start", "clean")
    made = execute("rb-attack", "test.safetensors", *model, *weak, "-q", "-o", "weak.safetensors", cwd=trained)
    assert made.status == 0, made.err
    done = execute("rb-score", "weak.safetensors", *model, "--flags", "-q", cwd=trained)
    assert done.status == 8 and "few_steps" in done.err
    # Not all rows: undecided, as no gate passes on a part.
    execute(
        "rb-attack", "test.safetensors", *model, "--eps", 0.2, "--shard", "1/2", "-q", "-o", "half.rbs", cwd=trained
    )
    assert execute("rb-score", "half.rbs", *model, "--flags", "-q", cwd=trained).status == 9
