"""rb-data imagenet-subset: a seeded draw of classes and pictures from a tree like ImageNet's."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest
from conftest import execute, shell
from PIL import Image
from safetensors import numpy as st

from rbkit.cli._sources import Manifest
from rbkit.formats.folder import class_folders, digest_line, pictures_of
from rbkit.formats.names import decode_names, encode_names
from rbkit.tools.sample import drawn, splits

CLASSES, PICTURES = 5, 9


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stand-in: 5 classes of 9 pictures of odd sizes, one of them grey, and a val folder that is left alone."""
    root = tmp_path_factory.mktemp("imagenet")
    rng = np.random.default_rng(0)
    for number in range(CLASSES):
        folder = root / "train" / f"n{number:04d}"
        folder.mkdir(parents=True)
        for i in range(PICTURES):
            shape = (21 + i, 30) if (number, i) == (0, 0) else (21 + i, 30, 3)
            Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(folder / f"n{number:04d}_{i}.JPEG")
    (root / "val" / "n0000").mkdir(parents=True)
    return root


def names(root: Path, split: str, *, classes: int = 3, counts: str = "3,2,2", seed: int = 0) -> dict[str, int]:
    """Labels by name of picture."""
    out = root.parent / "draw.safetensors"
    result = execute(
        "rb-data", "imagenet-subset", root, "--split", split, "--classes", classes, "--per-class", counts,
        "--seed", seed, "--size", 16, "-q", "-o", out,
    )  # fmt: skip
    assert result.status == 0, result.err
    found = st.load_file(out)
    assert found["image"].shape == (len(found["id"]), 3, 16, 16)
    return dict(zip(decode_names(found["name"]), found["label"].tolist(), strict=True))


def test_splits_are_disjoint_and_as_large_as_asked_for(tree: Path) -> None:
    train, val, test, both = (names(tree, split) for split in ("train", "val", "test", "trainval"))
    assert [len(s) for s in (train, val, test, both)] == [9, 6, 6, 15]
    assert not set(train) & set(val) and not set(train) & set(test) and not set(val) & set(test)
    assert both == train | val and list(both) == sorted(both)
    labels: dict[str, int] = {}
    for name, label in (train | val | test).items():
        assert labels.setdefault(name.split("/")[0], label) == label  # one label per class in all splits
    assert sorted(labels.values()) == [0, 1, 2] and sorted(labels, key=labels.__getitem__) == sorted(labels)


def test_draws_are_nested_and_change_with_the_seed(tree: Path) -> None:
    small, large = (names(tree, "train", classes=2, counts=c) for c in ("2,2,2", "4,2,2"))
    assert set(small) < set(large)
    more = names(tree, "train", classes=4, counts="4,2,2")
    assert set(large) < set(more)
    fewer, test = (names(tree, "test", classes=2, counts=c) for c in ("5,1,1", "2,2,2"))
    assert set(fewer) < set(test)
    assert set(names(tree, "train", seed=1)) != set(names(tree, "train"))
    assert names(tree / "train", "train") == names(tree, "train")  # the folder of the classes does as well


def test_the_order_of_a_listing_does_not_matter(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = class_folders(tree / "train"), pictures_of(tree / "train", "n0002")
    for name in ("iterdir", "rglob"):
        plain = getattr(Path, name)
        monkeypatch.setattr(Path, name, lambda *a, plain=plain: reversed(list(plain(*a))))
    assert (class_folders(tree / "train"), pictures_of(tree / "train", "n0002")) == before
    ids = np.array([7, 3, 2**62, 1, 12, 9])
    order = np.array([4, 0, 5, 3, 1, 2])
    kept = drawn(ids, 4, seed=0, purpose="classes")
    assert set(ids[order][drawn(ids[order], 4, seed=0, purpose="classes")]) == set(ids[kept])
    for name, rows in splits(ids, (2, 1, 2), seed=3).items():
        assert set(ids[order][splits(ids[order], (2, 1, 2), seed=3)[name]]) == set(ids[rows])


def test_a_draw_is_fair() -> None:
    """Over many seeds every id is drawn about as often, into every split."""
    ids = np.arange(10)
    counts = {name: np.zeros(10) for name in ("train", "val", "test")}
    for seed in range(600):
        for name, rows in splits(ids, (4, 2, 3), seed=seed).items():
            counts[name][rows] += 1
    for name, share in (("train", 0.4), ("val", 0.2), ("test", 0.3)):
        assert np.abs(counts[name] / 600 - share).max() < 0.08, name


def test_the_manifest_is_checked_by_sha256sum(tree: Path, tmp_path: Path) -> None:
    options = "--classes 2 --per-class 3,1,2 --size 8 -q"
    for split in ("train", "test"):
        line = (
            f"rb-data imagenet-subset {tree} --split {split} {options} --manifest {split}.sha256 > {split}.safetensors"
        )
        assert shell(line, cwd=tmp_path).status == 0
    check = subprocess.run(
        ["sha256sum", "--strict", "-c", tmp_path / "train.sha256", tmp_path / "test.sha256"],
        cwd=tree / "train", capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert check.returncode == 0 and check.stdout.count(": OK") == 10, check.stdout + check.stderr
    rows = decode_names(st.load_file(tmp_path / "train.safetensors")["name"])
    assert [line.split("  ")[1] for line in (tmp_path / "train.sha256").read_text().splitlines()] == rows


def test_a_manifest_gathers_the_parts_of_a_stream(tree: Path, tmp_path: Path) -> None:
    listed = Manifest(str(tmp_path / "m.sha256"), {"paths": [str(tree)], "no_clobber": False})
    names = [f"n0001/n0001_{i}.JPEG" for i in (4, 2, 7)]
    listed.add(encode_names(names[:2]))
    listed.add(encode_names(names[2:]))
    assert not (tmp_path / "m.sha256").exists()
    listed.write()
    assert [line.split("  ")[1] for line in (tmp_path / "m.sha256").read_text().splitlines()] == names


def test_strange_names_are_escaped_as_sha256sum_does(tmp_path: Path) -> None:
    for name in ("a b.png", "a\\b.png", "a\nb.png"):
        (tmp_path / name).write_bytes(b"x")
        told = subprocess.run(["sha256sum", name], cwd=tmp_path, capture_output=True, check=True).stdout
        assert digest_line(tmp_path, name) == told


@pytest.mark.parametrize(
    ("options", "status", "words"),
    [
        ("", 3, "5 classes, expected at least 150"),
        ("--classes 2 --per-class 6,2,2", 3, "9 pictures, expected at least 10 (6 + 2 + 2)"),
        ("--classes 2 --per-class 6,2", 2, "--per-class"),
        ("--classes 2 --per-class 0,0,0", 2, "--per-class"),
        ("--classes 2 --per-class 2,2,2 --manifest -", 2, "--manifest - needs -o"),
        ("--classes 2 --per-class 2,2,2 --manifest no/m.sha256", 4, "no/m.sha256"),
    ],
)
def test_what_cannot_be_drawn_is_told_in_one_line(
    tree: Path, tmp_path: Path, options: str, status: int, words: str
) -> None:
    result = shell(f"rb-data imagenet-subset {tree} {options} > /dev/null", cwd=tmp_path)
    assert result.status == status and result.err.count("\n") == 1 and words in result.err, result.err


def test_no_tree_and_no_classes(tmp_path: Path) -> None:
    for root in (tmp_path / "none", tmp_path):
        result = execute("rb-data", "imagenet-subset", root)
        assert result.status == 3 and result.err.count("\n") == 1 and "train/CLASS/PICTURE" in result.err
    result = execute("rb-data", "shapes", "--classes", 3)
    assert result.status == 2 and "goes with imagenet-subset, not with shapes" in result.err
