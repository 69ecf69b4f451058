"""rb-view and rb-info as processes."""

from __future__ import annotations

from pathlib import Path

from conftest import execute, shell
from PIL import Image


def test_view(tmp_path: Path) -> None:
    assert execute("rb-data", "shapes", "--n", 3, "-o", tmp_path / "s.safetensors").status == 0
    assert execute("rb-view", tmp_path / "s.safetensors", "-o", tmp_path / "sheet.png").status == 0
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size[0] > 32
    assert execute("rb-view", tmp_path / "s.safetensors", "-o", f"{tmp_path}/out/").status == 0
    assert len(list((tmp_path / "out").rglob("*.png"))) == 3
    piped = execute("rb-view", tmp_path / "s.safetensors")
    assert piped.status == 0 and piped.out.count(b"\x89PNG\r\n\x1a\n") == 3


def test_curves_of_a_training(tmp_path: Path, model_file: Path) -> None:
    for metric in ("accuracy", "loss"):
        result = execute("rb-view", model_file, "--metric", metric, "-o", tmp_path / f"{metric}.png")
        assert result.status == 0, result.err
    assert (tmp_path / "accuracy.png").read_bytes() != (tmp_path / "loss.png").read_bytes()
    result = execute("rb-view", model_file, "--metric", "gini", "-o", tmp_path / "no.png")
    assert (
        result.status == 3 and "curves of accuracy and loss, not of gini" in result.err and result.err.count("\n") == 1
    )


def test_check_and_replay(tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    assert execute("rb-data", "shapes", "--n", 3, "--seed", 4, "-o", path).status == 0
    good = execute("rb-info", "--check", path)
    assert (good.status, good.out, good.err) == (0, b"", "")
    (tmp_path / "cut").write_bytes(path.read_bytes()[:-1])
    assert execute("rb-info", "--check", tmp_path / "cut").status == 8
    line = execute("rb-info", "--replay", path).out.decode().strip()
    assert shell(f"{line} > again.safetensors", cwd=tmp_path).status == 0
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()
