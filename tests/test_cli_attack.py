"""rb-attack: several radii, a second attack, targets."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import execute
from safetensors import numpy as st
from safetensors import safe_open

from rbkit.cli._attack_rows import check_ball
from rbkit.cli._errors import Numbers
from rbkit.tools.attack import ATTACKS


def test_radii_and_a_second_attack(tmp_path: Path, stream_file: Path, model_file: Path) -> None:
    """A stream per radius in order; one document cannot hold two; a second attack adds, only within the same ball."""
    common = (stream_file, "-m", model_file, "--steps", 1, "-q")
    many = execute("rb-attack", *common, "--eps", "0.25", "--eps", "0.5", "-o", tmp_path / "many.rbs")
    assert many.status == 0, many.err
    shown = execute("rb-info", "--json", tmp_path / "many.rbs").out.splitlines()
    assert [(json.loads(s)["attack"]["eps"], json.loads(s)["rows"]) for s in shown] == [(0.25, 40), (0.5, 40)]
    one = tmp_path / "one.safetensors"
    refusal = execute("rb-attack", *common, "--eps", "0.25", "--eps", "0.5", "-o", one)
    assert refusal.status == 2 and not one.exists()
    assert execute("rb-attack", *common, "--eps", "0.25", "-o", one).status == 0
    again = tmp_path / "again.safetensors"
    assert execute("rb-attack", one, *common[1:], "--eps", "0.25", "--seed", 1, "-o", again).status == 0
    first, second = st.load_file(one), st.load_file(again)
    assert (second["success"] >= first["success"]).all() and (second["forwards"] >= first["forwards"]).all()
    assert execute("rb-attack", one, *common[1:], "--eps", "0.5", "-o", again).status == 2


def test_without_a_radius_an_attack_adds_to_each_stream_within_its_own(
    tmp_path: Path, stream_file: Path, model_file: Path
) -> None:
    """As it does with that radius given, stream for stream; rows that nobody attacked yet have the usual one."""
    common = ("-m", model_file, "--steps", 1, "-q", "-o")
    radii, many, again = ("0.25", "0.1", "0.25"), tmp_path / "many.rbs", tmp_path / "again.rbs"
    parts = [tmp_path / f"{place}.safetensors" for place in range(len(radii))]
    for part, eps in zip(parts, radii, strict=True):
        assert execute("rb-attack", stream_file, "--eps", eps, *common, part).status == 0
    many.write_bytes(b"".join(part.read_bytes() for part in (*parts, stream_file)))
    added = execute("rb-attack", many, "--attack", "square", "--queries", 5, "-m", model_file, "-q", "-o", again)
    assert added.status == 0, added.err
    shown = [json.loads(line)["attack"] for line in execute("rb-info", "--json", again).out.splitlines()]
    assert [a["eps"] for a in shown] == [0.25, 0.1, 0.25, 0.5]
    assert [a["name"] for a in shown] == ["pgd+square"] * 3 + ["square"]
    alone = []
    for part, eps in zip((*parts, stream_file), (*radii, "0.5"), strict=True):
        out = tmp_path / "alone.safetensors"
        square = ("--attack", "square", "--queries", 5, "--eps", eps, "-m", model_file, "-q")
        assert execute("rb-attack", part, *square, "-o", out).status == 0
        alone.append(execute("rb-attack", part, *square, "-o", "-").out)
    assert again.read_bytes() == b"".join(alone)


@pytest.mark.parametrize("eps", ["0.1", 0, -1, None, [0.1]])
def test_a_radius_that_is_none_is_refused(eps: object, tmp_path: Path, stream_file: Path, model_file: Path) -> None:
    attacked, odd = tmp_path / "attacked.safetensors", tmp_path / "odd.safetensors"
    assert execute("rb-attack", stream_file, "-m", model_file, "--steps", 1, "-q", "-o", attacked).status == 0
    with safe_open(attacked, "np") as file:
        meta = file.metadata()
    about = json.loads(meta["rb"])
    about["attack"]["eps"] = eps
    st.save_file(st.load_file(attacked), odd, {**meta, "rb": json.dumps(about)})
    refused = execute("rb-attack", odd, "-m", model_file, "--steps", 1, "-q", "-o", tmp_path / "out.safetensors")
    assert refused.status == 2 and refused.err.count("\n") == 1, refused.err


def test_what_is_said_of_the_input_is_said_once_for_all_radii(
    tmp_path: Path, stream_file: Path, model_file: Path
) -> None:
    bare = tmp_path / "bare.safetensors"
    st.save_file({"image": st.load_file(stream_file)["image"][:3]}, bare)
    radii = ("--eps", "0.25,0.5", "-o", tmp_path / "many.rbs")
    done = execute("rb-attack", bare, "-m", model_file, "--steps", 1, *radii)
    assert done.status == 0 and done.err.count("no labels") == 1


def test_a_sprint_is_two_attacks_in_a_pipe(tmp_path: Path, stream_file: Path, model_file: Path) -> None:
    common = ("-m", model_file, "--eps", "0.25", "-q", "-o")
    one, first, two = (tmp_path / f"{name}.safetensors" for name in ("one", "first", "two"))
    lines = [
        (stream_file, "--steps", 5, "--sprint", 2, *common, one),
        (stream_file, "--steps", 2, "--step-size", 0.25, "--start", "clean", *common, first),
        (first, "--steps", 5, *common, two),
    ]
    assert [execute("rb-attack", *line).status for line in lines] == [0, 0, 0]
    quick, piped = st.load_file(one), st.load_file(two)
    assert all(np.array_equal(quick[name], piped[name]) for name in piped) and set(quick) == set(piped)
    assert json.loads(execute("rb-info", "--json", one).out)["attack"]["sprint"] == 2
    assert b"--sprint 2" in execute("rb-info", "--replay", one).out
    for extra in (("--until", "end"), ("--keep", "last"), ("--surrogate", model_file), ("--attack", "fgsm")):
        refused = execute("rb-attack", stream_file, "--sprint", 2, *extra, *common, two)
        assert refused.status == 2 and "--sprint" in refused.err


def test_fgsm_targeted(tmp_path: Path, stream_file: Path, model_file: Path) -> None:
    out = tmp_path / "o.safetensors"
    done = execute(
        "rb-attack", stream_file, "-m", model_file, "--attack", "fgsm", "--norm", "linf", "--eps", "8/255",
        "--targeted", "--target", 2, "--until", "end", "-q", "-o", out,
    )  # fmt: skip
    assert done.status == 0, done.err
    rows = st.load_file(out)
    moved = np.abs(rows["adversarial"] - rows["image"].astype(np.float32) / np.float32(255)).max()
    assert 0 < moved <= 8 / 255 + 1e-6
    assert "attack_target" in rows


FLAT = """
from torch import nn


class Flat(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.fc = nn.Linear(3 * 32 * 32, classes)

    def forward(self, x):
        return self.fc(x.detach().flatten(1))


def factory(num_classes):
    return Flat(num_classes)
"""


@pytest.mark.parametrize("command", ["rb-attack", "rb-saliency", "rb-invert"])
def test_a_model_without_gradients_is_told(command: str, tmp_path: Path, stream_file: Path, train_file: Path) -> None:
    """Detached on the way: a fault of the model, status 3, and nothing left behind."""
    (tmp_path / "flat.py").write_text(FLAT)
    model, out = tmp_path / "m.safetensors", tmp_path / "out.safetensors"
    argv = ("rb-train", train_file, "--arch", "flat:factory", "--epochs", 0, "-q", "-o", model)
    assert execute(*argv, cwd=tmp_path).status == 0
    result = execute(command, stream_file, "-m", model, "--arch", "flat:factory", "-q", "-o", out, cwd=tmp_path)
    assert result.status == 3 and "no gradient by its input" in result.err and result.err.count("\n") == 1, result.err
    assert not out.exists()


@pytest.mark.parametrize("command", ["rb-attack", "rb-saliency", "rb-score", "rb-train"])
def test_memory_that_does_not_suffice_is_told_with_what_to_try(
    command: str, tmp_path: Path, stream_file: Path, train_file: Path, model_file: Path
) -> None:
    """A block of a terabyte; status 6, and nothing left behind."""
    out = tmp_path / "out.safetensors"
    size = ("--block", 96 * 10**6, "-m", model_file)
    source, huge, words = stream_file, size, "out of memory at --block 96000000; try --block 48000000"
    if command == "rb-train":
        source, huge, words = train_file, ("--width", 10**9), "out of memory at --batch 32; try --batch 16"
    result = execute(command, source, *huge, "-q", "-o", out)
    assert result.status == 6 and words in result.err and result.err.count("\n") == 1, result.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_what_left_its_ball_is_not_written(norm: str) -> None:
    """Whatever went wrong before: one image of three beyond the radius, or one that is not finite."""
    clean = np.full((3, 1, 4, 5), 0.5, np.float32)
    chunk = SimpleNamespace(arrays={"image": clean, "id": np.array([5, 6, 7])}, count=3, place="x.rbs: document 1")
    spec = ATTACKS["pgd"](norm=norm, eps=0.1)
    for wrong in (0.2, float("nan")):
        images = torch.from_numpy(clean.copy())
        images[:, 0, 0, 0] += 0.1
        check_ball(chunk, SimpleNamespace(outcome=SimpleNamespace(images=images)), spec)  # type: ignore[arg-type]
        images[1, 0, 0, 0] = 0.5 + wrong
        with pytest.raises(Numbers, match=f"1 of 3 adversarial images left the {norm} ball of 0.1 .* first id 6;"):
            check_ball(chunk, SimpleNamespace(outcome=SimpleNamespace(images=images)), spec)  # type: ignore[arg-type]


def test_tf32_is_recorded_and_changes_nothing_on_a_cpu(stream_file: Path, model_file: Path, tmp_path: Path) -> None:
    common = ("rb-attack", stream_file, "-m", model_file, "--device", "cpu", "--eps", 0.25, "--steps", 5, "-q", "-o")
    for name, extra in (("plain", ()), ("fast", ("--tf32",))):
        assert execute(*common, tmp_path / f"{name}.safetensors", *extra).status == 0
    plain, fast = (st.load_file(tmp_path / f"{name}.safetensors") for name in ("plain", "fast"))
    assert all(np.array_equal(plain[key], fast[key]) for key in plain)
    lines = execute("rb-info", "--replay", tmp_path / "fast.safetensors").out.decode()
    assert (
        "--tf32" in lines
        and "--tf32" not in execute("rb-info", "--replay", tmp_path / "plain.safetensors").out.decode()
    )
    refused = execute(
        "rb-attack", stream_file, "-m", model_file, "--attack", "fab-t", "--tf32", "-o", tmp_path / "no.safetensors"
    )
    assert refused.status == 2 and "--tf32 goes with" in refused.err


@pytest.mark.parametrize(
    "line",
    [
        ("rb-attack", "--targeted", "--target", 8),
        ("rb-invert", "--mode", "class", "--class", 8),
        ("rb-saliency", "--target", 8),
    ],
)
def test_a_class_that_the_model_does_not_have_is_refused(
    line: tuple[object, ...], stream_file: Path, model_file: Path, tmp_path: Path
) -> None:
    done = execute(line[0], stream_file, "-m", model_file, *line[1:], "-q", "-o", tmp_path / "none.safetensors")
    assert done.status == 2 and f"{line[-2]} 8: the model has classes 0 to 7" in done.err
    assert done.err.count("\n") == 1 and not (tmp_path / "none.safetensors").exists()
