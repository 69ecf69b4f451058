"""A label is a number: names of classes tell whether it means the same class to a model, or to other rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import execute, shell
from PIL import Image
from safetensors import numpy as st

from rbkit.tools.shapes import CLASSES

NAMED = ",".join(sorted(CLASSES))


@pytest.fixture(scope="module")
def pictures(folder: Path, stream_file: Path) -> Path:
    """The 40 test images as files in folders of their classes, which sort otherwise than the model numbers them."""
    rows = st.load_file(stream_file)
    for image, label, number in zip(rows["image"], rows["label"], rows["id"], strict=True):
        place = folder / "pictures" / CLASSES[label]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.transpose(1, 2, 0)).save(place / f"{number}.png")
    return folder / "pictures"


@pytest.fixture(scope="module")
def by_name(folder: Path, pictures: Path) -> Path:
    """Their stream as it comes: classes are numbered in the order of their names."""
    path = folder / "by-name.safetensors"
    assert execute("rb-data", "folder", pictures, "--split", "all", "-o", path).status == 0
    return path


@pytest.fixture(scope="module")
def renamed(folder: Path, model_file: Path) -> Path:
    """The model with the same names in another order."""
    assert execute("rb-model", "export", model_file, "-o", folder / "bare.safetensors").status == 0
    path = folder / "renamed.safetensors"
    asked = ("--arch", "resnet8", "--width", 4, "--classes", NAMED, "-o", path)
    assert execute("rb-model", "import", folder / "bare.safetensors", *asked).status == 0
    return path


@pytest.mark.parametrize(
    "command",
    [
        ("rb-score",), ("rb-attack", "--steps", 1), ("rb-saliency", "--method", "gradient"),
        ("rb-invert", "--mode", "representation", "--steps", 1),
    ],
)  # fmt: skip
def test_labels_that_mean_other_classes_to_the_model_are_refused(
    command: tuple[object, ...], by_name: Path, model_file: Path
) -> None:
    result = execute(command[0], by_name, "-m", model_file, *command[1:])
    assert result.status == 3 and not result.out and result.err.count("\n") == 1
    assert f"class 0 is bar, and disc in {model_file}: the same names at other numbers" in result.err
    assert f"try rb-data --classes-of {model_file}" in result.err


def test_an_attacked_stream_is_not_judged_by_other_numbers(
    tmp_path: Path, stream_file: Path, model_file: Path, renamed: Path
) -> None:
    attacked = tmp_path / "adv.safetensors"
    assert execute("rb-attack", stream_file, "-m", model_file, "--steps", 1, "-q", "-o", attacked).status == 0
    for command in ("rb-score", "rb-verify"):
        result = execute(command, attacked, "-m", renamed)
        assert result.status == 3 and "class 0 is disc, and bar in" in result.err, result.err
    result = execute("rb-score", stream_file, "-m", model_file, "-m", renamed)  # the second model counts too
    assert result.status == 3 and "class 0 is disc, and bar in" in result.err


def test_classes_of_a_model(tmp_path: Path, by_name: Path, pictures: Path, stream_file: Path, model_file: Path) -> None:
    """The labels of the same pixels in the stream that the model was made for, so the same accuracy."""
    target = tmp_path / "o.safetensors"
    result = execute("rb-data", "folder", pictures, "--split", "all", "--classes-of", model_file, "-o", target)
    assert result.status == 0, result.err
    found, original = st.load_file(target), st.load_file(stream_file)
    known = {image.tobytes(): label for image, label in zip(original["image"], original["label"], strict=True)}
    assert [known[image.tobytes()] for image in found["image"]] == found["label"].tolist()
    assert np.array_equal(found["id"], st.load_file(by_name)["id"])
    scores = [execute("rb-score", path, "-m", model_file, "--json").out for path in (target, stream_file)]
    assert scores[0] and len({score.split(b'"value":')[1].split(b",")[0] for score in scores}) == 1
    replay = execute("rb-info", "--replay", target).out.decode()
    assert "--classes-of" in replay and str(model_file) not in replay


def test_some_of_the_classes_of_a_model(tmp_path: Path, pictures: Path, model_file: Path) -> None:
    """A folder of a few classes numbers them from 0: refused as it is, right by the model's numbers."""
    for name in ("cross", "star"):
        (tmp_path / "few" / name).mkdir(parents=True)
        for file in (pictures / name).iterdir():
            (tmp_path / "few" / name / file.name).write_bytes(file.read_bytes())
    few = ("rb-data", "folder", tmp_path / "few", "--split", "all")
    refused = execute("rb-score", "-m", model_file, stdin=execute(*few).out)
    assert refused.status == 3 and "class 0 is cross, and disc in" in refused.err
    made = execute(*few, "--classes-of", model_file, "-o", tmp_path / "o.safetensors")
    assert made.status == 0, made.err
    assert set(st.load_file(tmp_path / "o.safetensors")["label"].tolist()) == {
        CLASSES.index("cross"),
        CLASSES.index("star"),
    }


def test_what_classes_of_cannot_tell(tmp_path: Path, pictures: Path, model_file: Path, folder: Path) -> None:
    picture = next((pictures / "disc").iterdir())
    result = execute("rb-data", "png", picture, "--label", 0, "--classes-of", model_file)
    assert result.status == 2 and "names its classes" in result.err
    (tmp_path / "two" / "disc").mkdir(parents=True)
    (tmp_path / "two" / "dodo").mkdir()
    (tmp_path / "two" / "disc" / "a.png").write_bytes(picture.read_bytes())
    few = ("rb-data", "folder", tmp_path / "two", "--split", "all", "--classes-of")
    result = execute(*few, model_file)
    assert result.status == 3 and "class dodo is not among its 8, expected once" in result.err
    execute("rb-model", "export", model_file, "-o", tmp_path / "bare.safetensors")
    for names, words in (("8", "names no classes"), ("disc,disc,dodo,d,e,f,g,h", "class disc is twice or more among")):
        model = tmp_path / "m.safetensors"
        asked = ("--arch", "resnet8", "--width", 4, "--classes", names, "-o", model)
        assert execute("rb-model", "import", tmp_path / "bare.safetensors", *asked).status == 0
        result = execute(*few, model)
        assert result.status == 3 and words in result.err, result.err


def test_names_that_are_others_are_left_alone(tmp_path: Path, stream_file: Path, model_file: Path) -> None:
    """Nothing is known of how they go together, so numbers count, as they do where a side names nothing."""
    execute("rb-model", "export", model_file, "-o", tmp_path / "bare.safetensors")
    for names in ("8", "a,b,c,d,e,f,g,h"):
        model = tmp_path / "m.safetensors"
        asked = ("--arch", "resnet8", "--width", 4, "--classes", names, "-o", model)
        assert execute("rb-model", "import", tmp_path / "bare.safetensors", *asked).status == 0
        assert execute("rb-score", stream_file, "-m", model, "--metrics", "clean_accuracy").status == 0


def test_two_models_must_number_alike(stream_file: Path, model_file: Path, renamed: Path) -> None:
    attack = execute("rb-attack", stream_file, "-m", model_file, "--surrogate", renamed)
    assert attack.status == 3 and f"{renamed}: class 0 is bar, and disc in {model_file}" in attack.err
    score = execute("rb-score", stream_file, "-m", model_file, "--judge", renamed)
    assert score.status == 3 and f"{renamed}: class 0 is bar, and disc in {model_file}" in score.err


def test_training_rows_must_number_alike(train_file: Path, by_name: Path, renamed: Path) -> None:
    short = ("--width", 4, "--epochs", 0, "-q")
    held = execute("rb-train", train_file, *short, "--val", by_name)
    assert held.status == 3 and f"{by_name}: class 0 is bar, and disc in the rows to train on" in held.err
    begun = execute("rb-train", train_file, *short, "--init", renamed)
    assert begun.status == 3 and f"the rows to train on: class 0 is disc, and bar in {renamed}" in begun.err
    joined = shell(f"cat {train_file} {by_name} | rb-train --width 4 --epochs 0 -q")
    assert joined.status == 3 and "class 0 is bar, and disc in the rows before them" in joined.err
