"""rb-score --flags: records, status and what it does not depend on."""

from __future__ import annotations

import json
import re
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
    attack(guarded, "--shard", "1/2", "-o", "half.rbs")
    part, records = flagged(guarded, "half.rbs")
    assert part.status == 8 and not any(r["complete"] for r in records)


def marked(path: Path) -> None:
    """Shapes of 24 x 32 in 4 classes that are quick to learn: the quarter k of the picture is brighter."""
    tensors = st.load_file(path)
    image, label = tensors["image"][:, :, 4:28].float() / 255 * 0.7, tensors["id"] % 4
    for k in range(4):
        image[label == k, :, 12 * (k // 2) : 12 + 12 * (k // 2), 16 * (k % 2) : 16 + 16 * (k % 2)] += 0.15
    st.save_file({"image": image.contiguous(), "label": label, "id": tensors["id"]}, path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 256 training and 32 test images and two models of 8 channels: standard and robust."""
    folder = tmp_path_factory.mktemp("trained")
    for split, n in (("train", 256), ("test", 32)):
        path = folder / f"{split}.safetensors"
        assert execute("rb-data", "shapes", "--split", split, "--n", n, "-o", path).status == 0
        marked(path)
    recipe = ("train.safetensors", "--width", 8, "--epochs", 4, "--batch", 32, "--augment", "none", "-q")
    for name, options in (("standard", ()), ("robust", ("--norm", "l2", "--eps", 0.25, "--steps", 2))):
        done = execute("rb-train", *recipe, *options, "-o", f"{name}.safetensors", cwd=folder)
        assert done.status == 0, done.err
    return folder


@pytest.mark.parametrize("name", ["standard", "robust"])
def test_plain_models_attacked_properly_have_no_flags(trained: Path, name: str) -> None:
    done = judged(trained, name, "whole.safetensors")
    records = [r for r in map(json.loads, done.out.splitlines()) if "flag" in r]
    assert done.status == 0, (done.err, [r for r in records if r["fires"] is not False])
    assert len(records) == len(FLAGS) and not any(r["fires"] for r in records)


def test_no_flag_of_a_part_of_the_rows_lets_it_pass(trained: Path) -> None:
    done = judged(trained, "robust", "half.rbs", "--shard", "1/2")
    assert done.status == 9 and "not all rows" in done.err


def judged(folder: Path, name: str, output: str, *argv: object) -> Result:
    model = ("-m", f"{name}.safetensors", "--block", 32, "-q")
    made = execute("rb-attack", "test.safetensors", *model, "--eps", 0.5, *argv, "-o", output, cwd=folder)
    assert made.status == 0, made.err
    return execute("rb-score", output, *model, "--flags", cwd=folder)


def test_the_page_has_a_paragraph_for_each_flag() -> None:
    page = (Path(__file__).parents[1] / "man" / "rb-score.1.in").read_text()
    section = page.split("\n## FLAGS\n")[1].split("\n## ")[0]
    assert re.findall(r"^(\w+)\n: ", section, flags=re.M) == list(FLAGS)
