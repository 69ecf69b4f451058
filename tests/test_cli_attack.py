"""rb-attack: several radii, a second attack, targets."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from conftest import execute
from safetensors import numpy as st


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
