"""rb-model: weights of others come in without running their code, and go out again."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from conftest import execute
from safetensors import numpy as st

FACTORY = """
import torch


def make(num_classes):
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, num_classes))
"""


DEEP = """
import torch


def make(num_classes):
    return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 40), torch.nn.Flatten(), torch.nn.Linear(4, num_classes))
"""


class Evil:
    """A pickle that would make a folder."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (self.path,)


def test_import_of_a_wrapped_checkpoint(tmp_path: Path, stream_file: Path) -> None:
    (tmp_path / "mymod.py").write_text(FACTORY)
    torch.manual_seed(0)
    net = torch.nn.Linear(3 * 32 * 32, 10)
    state = {f"module.1.{k}": v for k, v in net.state_dict().items()}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "w.pt")
    arch = ("--arch", "mymod:make")
    done = execute("rb-model", "import", "w.pt", *arch, "--classes", 10, "-o", "m.safetensors", cwd=tmp_path)
    assert done.status == 0, done.err
    attack = ("rb-attack", stream_file, "-m", "m.safetensors", "--steps", 1, "-q", "-o", "o.safetensors")
    without = execute(*attack, cwd=tmp_path)
    assert without.status == 2 and "--arch mymod:make" in without.err
    assert execute(*attack, *arch, cwd=tmp_path).status == 0
    assert execute("rb-model", "export", "m.safetensors", "-o", "e.safetensors", cwd=tmp_path).status == 0
    assert set(st.load_file(tmp_path / "e.safetensors")) == {"1.weight", "1.bias"}
    torch.save({"1.weight": net.weight.detach(), "odd": torch.zeros(2)}, tmp_path / "bad.pt")
    bad = execute("rb-model", "import", "bad.pt", *arch, "--classes", 10, "-o", "b.safetensors", cwd=tmp_path)
    assert bad.status == 3 and "1.bias" in bad.err and "odd" in bad.err


def test_malicious_pickle(tmp_path: Path) -> None:
    torch.save({"state_dict": Evil(str(tmp_path / "owned"))}, tmp_path / "evil.pt")
    done = execute(
        "rb-model", "import", tmp_path / "evil.pt", "--arch", "resnet8", "--classes", 10, "-o", tmp_path / "m"
    )
    assert done.status == 3 and done.err.count("\n") == 1
    assert not (tmp_path / "owned").exists() and not (tmp_path / "m").exists()


def test_a_network_that_does_not_run_on_the_images_is_told(
    tmp_path: Path, stream_file: Path, train_file: Path, model_file: Path
) -> None:
    """By rb-train before anything is done, by others at the first images, never by the import; nothing is left behind."""
    (tmp_path / "deep.py").write_text(DEEP)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 40), torch.nn.Flatten(), torch.nn.Linear(4, 8))
    torch.save(net.state_dict(), tmp_path / "w.pt")
    arch, both = ("--arch", "deep:make"), ("--arch", "resnet8", "--arch", "deep:make")
    given = ("rb-model", "import", "w.pt", *arch, "--classes", 8, "--input", "3x32x32")
    assert execute(*given, "-o", "m.safetensors", cwd=tmp_path).status == 0
    one, two = ("-m", "m.safetensors", *arch, "-q"), ("-m", model_file, *both, "-q")
    asked = [(2, "rb-train", train_file, *arch, "-q")]
    asked += [(3, tool, stream_file, *one) for tool in ("rb-attack", "rb-saliency", "rb-score", "rb-invert")]
    asked += [(3, "rb-attack", stream_file, *two, "--surrogate", "m.safetensors")]
    asked += [(3, "rb-score", stream_file, *two, "-m", "m.safetensors")]
    for status, *line in asked:
        done = execute(*line, "-o", "o.st", cwd=tmp_path)
        assert done.status == status and "images of 3x32x32 (" in done.err and "try rb-data" in done.err, (
            line,
            done.err,
        )
        assert done.err.count("\n") == 1 and not (tmp_path / "o.st").exists()
