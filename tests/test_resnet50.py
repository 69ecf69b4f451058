"""ResNet-50 with the ImageNet stem at 128 x 128, as the paper's second network, through every tool."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import execute
from safetensors import numpy as st


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three labelled images, and a network of fresh weights."""
    here = tmp_path_factory.mktemp("resnet50")
    pixels = np.random.default_rng(0).integers(0, 256, (3, 3, 128, 128), dtype=np.uint8)
    st.save_file({"image": pixels, "label": np.array([0, 2, 1]), "id": np.array([5, 1, 9])}, here / "x.safetensors")
    options = ("--arch", "torchvision:resnet50", "--epochs", 0, "--val", 0, "-q", "-o", here / "m.safetensors")
    result = execute("rb-train", here / "x.safetensors", *options)
    assert result.status == 0, result.err
    return here


def run(place: Path, command: str, source: str, *options: object) -> bytes:
    """What a command says, which runs on both cores: a block has 32 images, of which 29 are padding."""
    result = execute(command, source, *options, cwd=place, RB_THREADS="2")
    assert result.status == 0, result.err
    return result.out


def test_every_tool_runs(place: Path) -> None:
    """In as few passes of a block as each tool can do."""
    model = ("-m", "m.safetensors", "--block", 32, "-q")
    run(place, "rb-attack", "x.safetensors", *model, "--eps", 1.5, "--steps", 1, "--no-refill", "-o", "a.safetensors")
    found = st.load_file(place / "a.safetensors")
    size = np.linalg.norm((found["adversarial"] - found["image"] / np.float32(255)).reshape(3, -1), axis=1)
    right = size > 0  # images that fresh weights misclassify are left alone
    assert found["adversarial"].shape == (3, 3, 128, 128) and (size[right] <= 1.5 + 1e-5).all()
    run(place, "rb-saliency", "x.safetensors", *model, "--method", "gradient", "-o", "s.safetensors")
    maps = st.load_file(place / "s.safetensors")["attribution"]
    assert maps.shape == (3, 3, 128, 128) and (np.abs(maps).sum((1, 2, 3)) > 0).all()
    run(place, "rb-invert", "x.safetensors", *model, "--steps", 1, "-o", "i.safetensors")
    assert (st.load_file(place / "i.safetensors")["loss"] >= 0).all()
    lines = (
        run(place, "rb-score", "a.safetensors", *model, "--metrics", "robust_accuracy", "--json").decode().splitlines()
    )
    assert {json.loads(line)["n"] for line in lines} == {3}
    run(place, "rb-view", "s.safetensors", "-o", "s.png")
    assert (place / "s.png").stat().st_size > 1000
    assert b"torchvision:resnet50" in run(place, "rb-info", "m.safetensors")


def test_a_robust_step_moves_its_weights(place: Path) -> None:
    """One step of adversarial training with the paper's options for it."""
    options = "--arch torchvision:resnet50 --epochs 1 --batch 2 --eps 1.5 --steps 1 --optimizer adam --lr 1e-3"
    options += " --schedule constant --augment resized"
    run(place, "rb-train", "x.safetensors", *options.split(), "--val", 0, "-q", "-o", "trained.safetensors")
    before, after = (st.load_file(place / f"{name}.safetensors")["fc.weight"] for name in ("m", "trained"))
    assert before.shape == (3, 2048) and np.abs(after - before).max() > 5e-4
