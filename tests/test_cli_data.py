"""rb-data: every source, samples, splits and shards."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import execute
from PIL import Image
from safetensors import numpy as st


def load(path: Path, *argv: object) -> dict[str, np.ndarray]:
    result = execute("rb-data", *argv, "-o", path)
    assert result.status == 0, result.err
    return st.load_file(path)


def picture(path: Path, shade: int) -> None:
    """A colour picture of 6 x 5 pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((6, 5, 3), shade, np.uint8)).save(path)


def test_npz(tmp_path: Path) -> None:
    images = np.arange(5 * 3 * 6 * 7, dtype=np.uint8).reshape(5, 3, 6, 7)
    np.savez(tmp_path / "a.npz", image=images, label=np.arange(5))
    found = load(tmp_path / "o.safetensors", "npz", tmp_path / "a.npz", "--layout", "nchw")
    assert np.array_equal(found["image"], images) and found["label"].tolist() == [0, 1, 2, 3, 4]
    assert found["id"].tolist() == [0, 1, 2, 3, 4]


def test_arrays_of_an_archive_that_are_not_taken_are_told(tmp_path: Path) -> None:
    """As a result of an attack beside its images, or training images beside those of the test."""
    images = np.zeros((2, 1, 4, 6), np.uint8)
    np.savez(tmp_path / "a.npz", x=images, adversarial=images, y=np.arange(2), x_train=images)
    told = execute("rb-data", "npz", tmp_path / "a.npz").err
    assert told == "rb-data: not taken: adversarial, x_train\n"
    assert execute("rb-data", "npz", tmp_path / "a.npz", "-q").err == ""


def test_idx(tmp_path: Path) -> None:
    images = np.arange(4 * 5 * 7, dtype=np.uint8)
    (tmp_path / "i").write_bytes(bytes([0, 0, 8, 3]) + np.array([4, 5, 7], ">i4").tobytes() + images.tobytes())
    (tmp_path / "l").write_bytes(bytes([0, 0, 8, 1]) + np.array([4], ">i4").tobytes() + bytes([3, 1, 2, 0]))
    found = load(tmp_path / "o.safetensors", "idx", tmp_path / "i", tmp_path / "l")
    assert np.array_equal(found["image"], images.reshape(4, 1, 5, 7)) and found["label"].tolist() == [3, 1, 2, 0]


def test_cifar10(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 256, (6, 3073), dtype=np.uint8)
    rows[:, 0] %= 10
    rows.tofile(tmp_path / "test_batch.bin")
    found = load(tmp_path / "o.safetensors", "cifar10", "--root", tmp_path)
    assert np.array_equal(found["image"], rows[:, 1:].reshape(6, 3, 32, 32))
    assert found["label"].tolist() == rows[:, 0].tolist()


def test_fashion_mnist(tmp_path: Path) -> None:
    if not Path("/usr/share/datasets/fashion-mnist").is_dir():
        pytest.skip("the package dataset-fashion-mnist is not installed")
    found = load(tmp_path / "o.safetensors", "fashion-mnist", "--n", 7)
    assert found["image"].shape == (7, 1, 28, 28)


def test_files_that_cannot_be_read_are_left_out_on_request(tmp_path: Path) -> None:
    """As if they were not there: the stream, its samples and its shards are those of the folder without them."""
    for side in ("whole", "hurt"):
        for number in range(9):
            picture(tmp_path / side / "test" / "ab"[number % 2] / f"{number}.png", number)
    hurt = tmp_path / "hurt" / "test"
    (hurt / "a" / "2.png").write_bytes((hurt / "a" / "2.png").read_bytes()[:-9])
    (hurt / "b" / "3.png").write_bytes(b"no picture")
    for name in ("a/2.png", "b/3.png"):
        (tmp_path / "whole" / "test" / name).unlink()

    plain = execute("rb-data", "folder", tmp_path / "hurt", "-o", tmp_path / "none.safetensors")
    assert plain.status == 3 and "2.png" in plain.err and not (tmp_path / "none.safetensors").exists()

    for extra in ((), ("--n", 4), ("--shard", "2/3")):
        whole, found = tmp_path / "w.safetensors", tmp_path / "f.safetensors"
        assert execute("rb-data", "folder", tmp_path / "whole", *extra, "--no-history", "-o", whole).status == 0
        result = execute("rb-data", "folder", tmp_path / "hurt", "--keep-going", *extra, "--no-history", "-o", found)
        assert result.status == 7 and result.err.count("\n") == 3, result.err
        assert "2.png" in result.err and "3.png" in result.err and "2 files could not be read" in result.err
        one, other = st.load_file(whole), st.load_file(found)
        assert all(np.array_equal(one[name], other[name]) for name in one) and one.keys() == other.keys()
    assert execute("rb-data", "shapes", "--keep-going", "-o", tmp_path / "s.safetensors").status == 2
    assert execute("rb-data", "png", hurt / "b" / "3.png", "--keep-going").status == 3


def test_ids_of_a_folder_outlive_new_files(tmp_path: Path) -> None:
    for i, name in enumerate(("cat/b.png", "cat/d.png", "dog/a.png")):
        path = tmp_path / "pics" / "test" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((5, 7, 3), 40 * i, np.uint8)).save(path)
    before = load(tmp_path / "a.safetensors", "folder", tmp_path / "pics")
    Image.fromarray(np.zeros((5, 7, 3), np.uint8)).save(tmp_path / "pics/test/cat/a.png")
    after = load(tmp_path / "b.safetensors", "folder", tmp_path / "pics")
    assert before["label"].tolist() == [0, 0, 1] and len(after["id"]) == 4
    value = {int(i): int(x[0, 0, 0]) for i, x in zip(after["id"], after["image"], strict=True)}
    assert [value[int(i)] for i in before["id"]] == [0, 40, 80]


def test_png_sources(tmp_path: Path) -> None:
    pixels = np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    found = load(tmp_path / "o.safetensors", "png", tmp_path / "x.png", "--label", 2)
    assert np.array_equal(found["image"][0], pixels.transpose(2, 0, 1)) and found["label"].tolist() == [2]
    piped = execute(
        "rb-data", "png", "-", "-o", tmp_path / "p.safetensors", stdin=(tmp_path / "x.png").read_bytes() * 2
    )
    assert piped.status == 0, piped.err
    assert st.load_file(tmp_path / "p.safetensors")["image"].shape == (2, 3, 5, 7)


def test_samples_splits_and_shards(tmp_path: Path) -> None:
    """Samples are nested and in index order, splits share no row, shards are the rows of the whole."""
    rng = np.random.default_rng(1)
    for base in ("train", "test"):
        np.savez(tmp_path / f"{base}.npz", image=rng.integers(0, 256, (60, 1, 4, 6), dtype=np.uint8))
    out = tmp_path / "o.safetensors"
    source = ("npz", tmp_path / "test.npz", "--layout", "nchw")
    small, large = (load(out, *source, "--n", n)["id"].tolist() for n in (11, 30))
    assert small == sorted(small) and large == sorted(large) and set(small) < set(large)
    assert small != list(range(11))
    parts = [load(out, *source, "--n", 11, "--shard", f"{k}/3")["id"].tolist() for k in (1, 2, 3)]
    assert [len(p) for p in parts] == [3, 4, 4] and [*parts[0], *parts[1], *parts[2]] == small


def test_train_and_val_share_no_row(tmp_path: Path) -> None:
    rows = np.random.default_rng(2).integers(0, 10, (200, 3073), dtype=np.uint8)
    for k in range(1, 6):
        rows[40 * (k - 1) : 40 * k].tofile(tmp_path / f"data_batch_{k}.bin")
    split = {
        s: set(load(tmp_path / "o.safetensors", "cifar10", "--root", tmp_path, "--split", s)["id"].tolist())
        for s in ("train", "val", "trainval")
    }
    assert split["val"] and not split["train"] & split["val"] and split["train"] | split["val"] == split["trainval"]


@pytest.mark.parametrize(
    "argv",
    [
        ("shapes", "--grey"), ("shapes", "--rgb"), ("fashion-mnist", "--size", 32), ("cifar10", "--root", "x", "--label", 0),
        ("folder", "x", "--layout", "nchw"), ("cifar10", "--root", "x", "--split", "all"), ("npz", "x", "--size", 8), ("idx", "x", "--label", 0),
    ],
)  # fmt: skip
def test_options_of_other_sources_are_refused(argv: tuple[object, ...], tmp_path: Path) -> None:
    """Rather than taken, recorded, and without effect."""
    result = execute("rb-data", *argv, "-o", tmp_path / "o.safetensors")
    assert result.status == 2 and "goes with" in result.err and result.err.count("\n") == 1, result.err
    assert not list(tmp_path.iterdir())
