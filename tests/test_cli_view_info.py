"""rb-view and rb-info as processes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import execute, shell
from PIL import Image

from rbkit.cli._pictures import PictureWriter, names_of
from rbkit.formats.figures import training_curves
from rbkit.formats.png import open_picture
from rbkit.formats.sheet import CELL, GAP, Row, contact_sheet


def test_view(tmp_path: Path) -> None:
    assert execute("rb-data", "shapes", "--n", 3, "-o", tmp_path / "s.safetensors").status == 0
    assert execute("rb-view", tmp_path / "s.safetensors", "-o", tmp_path / "sheet.png").status == 0
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size[0] > 32
    assert execute("rb-view", tmp_path / "s.safetensors", "-o", f"{tmp_path}/out/").status == 0
    assert len(list((tmp_path / "out").rglob("*.png"))) == 3
    piped = execute("rb-view", tmp_path / "s.safetensors")
    assert piped.status == 0 and piped.out.count(b"\x89PNG\r\n\x1a\n") == 3


def captioned(text: str) -> np.ndarray:
    return contact_sheet([Row([np.zeros((CELL, CELL, 3), np.uint8)], [text])], heads=["image"], title="one", foot="")


def test_letters_of_other_scripts_are_told_apart_and_a_caption_is_one_line() -> None:
    """A font that lacks a letter draws the same box for each."""
    drawn = [captioned(text) for text in ("Bär", "Bör", "кот", "кит", "±1", "1", "c d")]
    assert len({sheet.tobytes() for sheet in drawn}) == len(drawn)
    assert np.array_equal(captioned("c\nd"), drawn[-1])


def test_rows_of_a_sheet_spread_over_the_stream(tmp_path: Path, stream_file: Path) -> None:
    """3 of 40 rows, at even distances: another sheet than that of the first 3, and it says how it was drawn."""
    found = {}
    for name, options in {"first": ["--rows", 3], "even": ["--rows", 3, "--spread"]}.items():
        assert execute("rb-view", stream_file, *options, "-o", tmp_path / f"{name}.png").status == 0
        found[name] = open_picture(str(tmp_path / f"{name}.png"))
        assert found[name].text["sheet"] == {"rows": 3, "spread": name == "even"}
    assert found["first"].pixels.shape == found["even"].pixels.shape
    assert (found["first"].pixels != found["even"].pixels).any()


def test_even_rows_do_not_depend_on_how_a_stream_is_cut() -> None:
    """Of 8 rows in parts of 3 and 5 the ones at 0, 3 and 6; of 2 rows both."""
    writer = PictureWriter("x.png", rows=3, spread=True)
    meta = {"kind": "images", "total": 8}
    rows = [writer._wanted(meta | {"first": first}, row) for first, count in ((0, 3), (3, 5)) for row in range(count)]
    assert [place for place, wanted in enumerate(rows) if wanted] == [0, 3, 6]
    assert all(writer._wanted({"kind": "images", "total": 2, "first": 0}, row) for row in range(2))


def test_curves_of_a_training(tmp_path: Path, model_file: Path) -> None:
    for metric in ("accuracy", "loss"):
        result = execute("rb-view", model_file, "--metric", metric, "-o", tmp_path / f"{metric}.png")
        assert result.status == 0, result.err
    assert (tmp_path / "accuracy.png").read_bytes() != (tmp_path / "loss.png").read_bytes()
    only_loss = [{"epochs": [{"epoch": 1, "train_loss": 2.0}, {"epoch": 2, "train_loss": 1.5}]}]
    assert training_curves(only_loss, quantity="loss", form="svg").startswith(b"<?xml")
    with pytest.raises(ValueError, match="no model has"):
        training_curves(only_loss, form="svg")
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


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["out/standard.ig.safetensors", "out/robust.ig.safetensors"], ["standard", "robust"]),
        (["eps0.5-3.classes.safetensors", "eps1.5-3.classes.safetensors"], ["eps0.5-3", "eps1.5-3"]),
        (["a.ig.safetensors", "a.shap.safetensors"], ["a.ig", "a.shap"]),
        (["a.safetensors", "b.rbs"], ["a.safetensors", "b.rbs"]),
        (["x.safetensors", "y/x.safetensors"], ["x", "x"]),
        (["-"], ["-"]),
    ],
)
def test_streams_of_a_sheet_are_called_by_their_files(paths: list[str], names: list[str]) -> None:
    assert names_of(paths) == names


def test_inversions_begun_alike_show_their_start_once(tmp_path: Path, stream_file: Path, model_file: Path) -> None:
    """Image, start and both results are four cells in a row; of other starts it is five."""
    few = tmp_path / "few.safetensors"
    assert execute("rb-data", "shapes", "--n", 2, "-o", few).status == 0
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        argv = (
            few,
            "-m",
            model_file,
            "--start",
            "noise",
            "--steps",
            1,
            "--seed",
            seed,
            "-q",
            "-o",
            tmp_path / f"{name}.safetensors",
        )
        assert execute("rb-invert", *argv).status == 0
    for pair, cells in (("ab", 4), ("ac", 5)):
        sheet = tmp_path / f"{pair}.png"
        result = execute("rb-view", *(tmp_path / f"{name}.safetensors" for name in pair), "-o", sheet)
        assert result.status == 0, result.err
        with Image.open(sheet) as drawn:
            assert drawn.width == GAP + cells * (CELL + GAP) + GAP
        made = open_picture(str(sheet)).text["sheet"]
        assert made["files"] == [f"{name}.safetensors" for name in pair]
