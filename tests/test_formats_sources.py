"""What other people keep images in: IDX, CIFAR-10, folders, NPZ; and shards that make a whole."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from rbkit.formats import cifar, folder, idx, npz, png
from rbkit.formats.dataset import in_memory
from rbkit.formats.errors import FormatError, LimitError
from rbkit.formats.join import order_shards, ranges
from rbkit.formats.names import decode_names, encode_names, path_id
from rbkit.formats.table import read_records

# ------------------------------------------------------------------------------------------------------- IDX


def idx_bytes(array: np.ndarray, *, magic: bytes = b"\0\0\x08") -> bytes:
    """An IDX file of bytes, written from its definition."""
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return magic + bytes([array.ndim]) + sizes + array.astype(np.uint8).tobytes()


IMAGES = (np.arange(60) * 4).reshape(3, 4, 5).astype(np.uint8)
LABELS = np.array([9, 0, 4], np.uint8)


@pytest.mark.parametrize("zipped", [False, True])
def test_idx_pairs(zipped: bool, tmp_path: Path) -> None:
    pack = gzip.compress if zipped else bytes
    (tmp_path / "i").write_bytes(pack(idx_bytes(IMAGES)))
    (tmp_path / "l").write_bytes(pack(idx_bytes(LABELS)))
    data = idx.pair(tmp_path / "i", tmp_path / "l")
    rows = data.fetch(np.array([2, 0]))
    np.testing.assert_array_equal(rows["image"], IMAGES[[2, 0]][:, None])
    assert rows["label"].tolist() == [4, 9] and rows["label"].dtype == np.int64
    assert data.ids.tolist() == [0, 1, 2] and not data.lossy
    assert "label" not in idx.pair(tmp_path / "i", None).fetch(np.array([0]))


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", "starts with nothing"),
        (b"\0\0\x08", "not an IDX file"),
        (idx_bytes(IMAGES, magic=b"\0\0\x0d"), "not an IDX file of bytes"),
        (idx_bytes(IMAGES, magic=b"\1\0\x08"), "not an IDX file of bytes"),
        (idx_bytes(IMAGES)[:-1], r"shape \[3, 4, 5\] needs 60 bytes, the file has 59"),
        (idx_bytes(IMAGES) + b"\0", "needs 60 bytes, the file has 61"),
        (idx_bytes(IMAGES)[:10], "needs|shape"),
        (b"\0\0\x08\x03" + b"\xff" * 12, "the file has 0"),
        (gzip.compress(idx_bytes(IMAGES), mtime=0)[:-9], "damaged gzip"),
        (gzip.compress(idx_bytes(IMAGES), mtime=0)[:-8] + bytes(8), "damaged gzip"),
        (idx_bytes(LABELS), r"shape \[3\] is no \(N, H, W\)"),
    ],
)
def test_bad_idx_files_are_refused(raw: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "i").write_bytes(raw)
    with pytest.raises(FormatError, match=words):
        idx.read_images(tmp_path / "i")


def test_idx_labels_must_fit_the_images(tmp_path: Path) -> None:
    (tmp_path / "i").write_bytes(idx_bytes(IMAGES))
    (tmp_path / "l").write_bytes(idx_bytes(LABELS[:2]))
    with pytest.raises(FormatError, match="2 labels for 3 images"):
        idx.pair(tmp_path / "i", tmp_path / "l")
    with pytest.raises(FormatError, match=r"is no \(N,\)"):
        idx.pair(tmp_path / "i", tmp_path / "i")


def test_fashion_mnist_takes_zipped_and_plain_files(tmp_path: Path) -> None:
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(idx_bytes(IMAGES))
    with pytest.raises(FormatError, match=r"no t10k-labels-idx1-ubyte\[.gz\]"):
        idx.fashion_mnist(tmp_path, split="test")
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx_bytes(LABELS), mtime=0))
    data = idx.fashion_mnist(tmp_path, split="test")
    assert data.count == 3 and data.carved and data.classes is not None and len(data.classes) == 10


# --------------------------------------------------------------------------------------------------- CIFAR-10


def cifar_rows(count: int, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(pixels uint8 (N, 3072), labels) of a batch."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, 3072)).astype(np.uint8), np.arange(count, dtype=np.uint8) % 10


def write_batches(root: Path, *, names: list[str], suffix: str, protocol: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Batches of three rows each; what the reader should find."""
    root.mkdir(parents=True, exist_ok=True)
    parts = [cifar_rows(3, seed=number) for number in range(len(names))]
    for name, (pixels, labels) in zip(names, parts, strict=True):
        raw = np.concatenate([labels[:, None], pixels], 1).tobytes()
        if not suffix:
            raw = pickle.dumps({b"data": pixels, b"labels": labels.tolist(), b"batch_label": b"x"}, protocol)
        (root / (name + suffix)).write_bytes(raw)
    pixels = np.concatenate([p for p, _ in parts]).reshape(-1, 3, 32, 32)
    return pixels, np.concatenate([labels for _, labels in parts])


@pytest.mark.parametrize(
    ("where", "suffix"), [("cifar-10-batches-bin", ".bin"), ("cifar-10-batches-py", ""), ("", ".bin"), ("", "")]
)
@pytest.mark.parametrize("split", ["train", "test"])
def test_cifar_batches(where: str, suffix: str, split: str, tmp_path: Path) -> None:
    images, labels = write_batches(tmp_path / where, names=cifar.FILES[split], suffix=suffix)
    data = cifar.cifar10(tmp_path, split=split)
    rows = data.fetch(np.arange(data.count))
    np.testing.assert_array_equal(rows["image"], images)
    assert rows["label"].tolist() == labels.tolist() and data.carved
    assert data.classes == cifar.CLASSES


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4])
def test_python_batches_of_every_protocol(protocol: int, tmp_path: Path) -> None:
    images, _ = write_batches(tmp_path, names=["test_batch"], suffix="", protocol=protocol)
    np.testing.assert_array_equal(cifar.read_python(tmp_path / "test_batch")[0], images)


def test_python_batches_as_python_2_wrote_them(tmp_path: Path) -> None:
    pixels, labels = cifar_rows(2)
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR(I1\n(I2\nI3072\ntcnumpy\ndtype\n"
    array += b"(S'u1'\nI0\nI1\ntR(I3\nS'|'\nNNNI-1\nI-1\nI0\ntbI00\nT" + (6144).to_bytes(4, "little")
    raw = b"(dS'data'\n" + array + pixels.tobytes() + b"tbsS'labels'\n(lI0\naI1\nas."
    (tmp_path / "b").write_bytes(raw)
    found, numbers = cifar.read_python(tmp_path / "b")
    np.testing.assert_array_equal(found.reshape(2, 3072), pixels)
    assert numbers.tolist() == labels.tolist()


DOUBLED: list[Any] = [1]  # 2^60 numbers, if they are counted
for _ in range(60):
    DOUBLED = [DOUBLED, DOUBLED]


class _Evil:
    """Asks the unpickler to run something."""

    def __init__(self, call: Any, *arguments: Any) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.call, self.arguments


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("where", ["whole", "labels", "key"])
@pytest.mark.parametrize("call", ["mkdir", "eval", "load"])
def test_a_malicious_pickle_is_refused_and_does_not_run(protocol: int, where: str, call: str, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    evil = {
        "mkdir": _Evil(os.mkdir, str(trace)),
        "eval": _Evil(eval, f"__import__('os').mkdir({str(trace)!r})"),
        "load": _Evil(np.load, str(trace)),
    }[call]
    pixels, labels = cifar_rows(2)
    whole: dict[str, Any] = {
        "whole": evil,
        "labels": {b"data": pixels, b"labels": evil},
        "key": {b"data": pixels, b"labels": labels.tolist(), evil: 1},
    }
    (tmp_path / "b").write_bytes(pickle.dumps(whole[where], protocol))
    with pytest.raises(FormatError, match=r"b: a pickle that asks for \w+\.\w+ is not a CIFAR-10 batch"):
        cifar.read_python(tmp_path / "b")
    assert not trace.exists()
    if call == "mkdir" and where == "whole":  # the trap works: a trusting reader falls into it
        pickle.loads((tmp_path / "b").read_bytes())
        assert trace.exists()


def test_attributes_of_the_admitted_names_are_out_of_reach(tmp_path: Path) -> None:
    for name in (b"ndarray.tofile", b"dtype.__class__", b"__builtins__", b"load", b"os"):
        text = b"\x80\x04\x8c\x05numpy\x8c" + bytes([len(name)]) + name + b"\x93."
        (tmp_path / "b").write_bytes(text)
        with pytest.raises(FormatError, match="a pickle that asks for numpy"):
            cifar.read_python(tmp_path / "b")


@pytest.mark.parametrize(
    "batch",
    [
        b"", b".", b"hello", b"\x80\x02}.", b"\x80\x02K\x05.", b"\x80\x02" + b"(" * 1000,
        pickle.dumps({b"data": 3, b"labels": [1]}),
        pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"labels": [1]}),
        pickle.dumps({b"data": np.zeros((1, 3071), np.uint8), b"labels": [1]}),
        pickle.dumps({b"data": np.zeros((1, 3072)), b"labels": [1]}),
        pickle.dumps({b"data": np.zeros((1, 3072), np.uint8), b"labels": 1}),
        pickle.dumps({b"data": np.zeros((1, 3072), np.uint8), b"labels": ["a"]}),
        pickle.dumps({b"data": np.zeros((1, 3072), np.uint8), b"labels": [[1], [2, 3]]}),
        pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"labels": [1, 2]})[:-30],
        pickle.dumps({b"data": np.zeros((1, 3072), np.uint8), b"labels": DOUBLED}),
        b"\x80\x02}r\xff\xff\xff\x7f.",  # an index that C's unpickler makes room for
        b"\x80\x05\x96" + bytes(5) + b"\xff\xff\0.",  # so many bytes
        b"\x80\x02J\0",
    ],
)  # fmt: skip
def test_pickles_that_are_no_batches(batch: bytes, tmp_path: Path) -> None:
    (tmp_path / "b").write_bytes(batch)
    with pytest.raises(FormatError, match="b: not a CIFAR-10 batch"):
        cifar.read_python(tmp_path / "b")


@pytest.mark.parametrize("size", [0, 3072, 3074, 2 * 3073 + 1])
def test_binary_batches_of_odd_length(size: int, tmp_path: Path) -> None:
    (tmp_path / "b").write_bytes(bytes(size))
    with pytest.raises(FormatError, match=f"{size} bytes are no whole number of CIFAR-10 rows"):
        cifar.read_binary(tmp_path / "b")


def test_labels_beyond_nine_and_missing_batches_are_named(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"no test_batch\[.bin\] here or in .*; pictures go with rb-data folder"):
        cifar.cifar10(tmp_path, split="test")
    (tmp_path / "test_batch.bin").write_bytes(bytes(3073) + b"\x0a" + bytes(3072))
    with pytest.raises(FormatError, match="label 10 is not one of"):
        cifar.cifar10(tmp_path, split="test")
    write_batches(tmp_path, names=cifar.FILES["train"][:4], suffix=".bin")
    with pytest.raises(FormatError, match="no data_batch_1"):
        cifar.cifar10(tmp_path, split="train")
    (tmp_path / "test_batch.bin").unlink()
    (tmp_path / "test_batch").write_bytes(pickle.dumps({b"data": np.zeros((1, 3072), np.uint8), b"labels": [-3]}))
    with pytest.raises(FormatError, match="label -3 is not one of"):
        cifar.cifar10(tmp_path, split="test")


# ----------------------------------------------------------------------------------------------------- folders


def paint(path: Path, value: int, *, size: tuple[int, int] = (5, 4), mode: str = "RGB", **options: Any) -> None:
    """A picture of one colour; `size` is width, height."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, (value,) * 3 if mode == "RGB" else value).save(path, **options)


@pytest.fixture
def zoo(tmp_path: Path) -> Path:
    """A folder of two classes."""
    for split, name, value in (
        ("train", "dog/b.png", 10), ("train", "dog/a.PNG", 20), ("train", "cat/deep/z.bmp", 30),
        ("test", "dog/x.png", 40), ("test", "cat/y.png", 50),
    ):  # fmt: skip
        paint(tmp_path / split / name, value)
    (tmp_path / "train" / "dog" / "readme.txt").write_text("no picture")
    return tmp_path


def test_folders_give_labels_names_and_stable_ids(zoo: Path) -> None:
    data = folder.image_folder(zoo, split="train")
    rows = data.fetch(np.arange(3))
    names = ["train/cat/deep/z.bmp", "train/dog/a.PNG", "train/dog/b.png"]
    assert decode_names(rows["name"]) == names
    assert rows["label"].tolist() == [0, 1, 1] and data.classes == ["cat", "dog"]
    assert rows["image"][:, 0, 0, 0].tolist() == [30, 20, 10] and rows["image"].shape == (3, 3, 4, 5)
    assert data.ids.tolist() == [path_id(n) for n in names] and data.carved and not data.lossy
    assert data.unused == (".txt (1 file)",)
    paint(zoo / "train" / "cat" / "a.png", 1)
    assert set(data.ids.tolist()) < set(folder.image_folder(zoo, split="train").ids.tolist())
    assert folder.image_folder(zoo, split="test").fetch(np.array([1]))["label"].tolist() == [1]


def test_a_class_missing_in_a_split_keeps_its_number(zoo: Path) -> None:
    (zoo / "test" / "cat" / "y.png").unlink()
    (zoo / "test" / "cat").rmdir()
    assert folder.image_folder(zoo, split="test").fetch(np.array([0]))["label"].tolist() == [1]


def test_validation_is_carved_only_where_it_has_no_folder(zoo: Path) -> None:
    assert folder.image_folder(zoo, split="val").carved
    assert folder.image_folder(zoo, split="val").count == 3
    paint(zoo / "val" / "cat" / "v.png", 60)
    data = folder.image_folder(zoo, split="val")
    assert not data.carved and data.count == 1


def test_trainval_is_both_also_where_val_has_a_folder(zoo: Path) -> None:
    assert folder.image_folder(zoo, split="trainval").count == 3
    paint(zoo / "val" / "cat" / "v.png", 60)
    both = folder.image_folder(zoo, split="trainval")
    parts = [set(folder.image_folder(zoo, split=split).ids.tolist()) for split in ("train", "val")]
    assert set(both.ids.tolist()) == parts[0] | parts[1] and both.count == 4
    assert both.fetch(np.arange(4))["label"].tolist() == [0, 1, 1, 0]


def test_class_folders_without_splits_are_one_whole(zoo: Path) -> None:
    data = folder.image_folder(zoo / "train", split="all")
    assert data.classes == ["cat", "dog"] and not data.carved
    assert decode_names(data.fetch(np.arange(3))["name"]) == ["cat/deep/z.bmp", "dog/a.PNG", "dog/b.png"]
    with pytest.raises(
        FormatError, match=r"has splits \(train, test\), expected CLASS/PICTURE in it; try --split train"
    ):
        folder.image_folder(zoo, split="all")
    paint(zoo / "train" / "train" / "engine.png", 5)  # a class may be called so
    assert folder.image_folder(zoo / "train", split="all").classes == ["cat", "dog", "train"]


def test_hidden_names_are_neither_classes_nor_pictures(zoo: Path) -> None:
    """What notebooks and other systems leave would move the number of every class."""
    paint(zoo / "train" / ".ipynb_checkpoints" / "a.png", 1)
    paint(zoo / "train" / "cat" / ".thumbnails" / "z.png", 1)
    (zoo / "train" / "cat" / "._z.png").write_bytes(b"no picture")
    data = folder.image_folder(zoo, split="train")
    assert data.classes == ["cat", "dog"] and data.count == 3 and data.unused == (".txt (1 file)",)
    assert folder.class_folders(zoo / "train") == ["cat", "dog"]


def test_a_folder_that_cannot_be_listed_is_an_error(zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a class without pictures. Root may list what nobody else may, so the listing itself is made to fail."""
    scandir = os.scandir

    def refuse(path: str) -> object:
        if os.fspath(path).endswith("deep"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError):
        folder.image_folder(zoo, split="train")


def test_bad_folders_are_refused(zoo: Path, tmp_path: Path) -> None:
    with pytest.raises(
        FormatError,
        match="no folder 'extra'; expected SPLIT/CLASS/PICTURE in it; try another --split, or --split all for CLASS/PICTURE",
    ):
        folder.image_folder(zoo, split="extra")
    paint(zoo / "test" / "emu" / "e.png", 0)
    with pytest.raises(FormatError, match=r"class folders \['emu'\] that train lacks"):
        folder.image_folder(zoo, split="test")
    (tmp_path / "bare" / "test").mkdir(parents=True)
    with pytest.raises(FormatError, match="no class folders"):
        folder.image_folder(tmp_path / "bare", split="test")
    (tmp_path / "bare" / "test" / "cat").mkdir()
    with pytest.raises(FormatError, match="no pictures"):
        folder.image_folder(tmp_path / "bare", split="test")


def test_pictures_of_other_shapes_are_named(zoo: Path) -> None:
    paint(zoo / "test" / "dog" / "y.png", 1, size=(6, 4))
    data = folder.image_folder(zoo, split="test")
    with pytest.raises(FormatError, match=r"test/dog/y.png: 3 x 4 x 6, the others are 3 x 4 x 5; try --size"):
        data.fetch(np.arange(3))
    data.fetch(np.array([0]))
    with pytest.raises(FormatError, match="the others are 3 x 4 x 5"):  # also when it comes in a later chunk
        data.fetch(np.array([2]))
    paint(zoo / "test" / "dog" / "y.png", 1, mode="L")
    with pytest.raises(FormatError, match=r"1 x 4 x 5, the others are 3 x 4 x 5; try --grey or --rgb"):
        folder.image_folder(zoo, split="test").fetch(np.arange(3))
    assert folder.image_folder(zoo, split="test", channels=1).fetch(np.arange(3))["image"].shape == (3, 1, 4, 5)
    assert folder.image_folder(zoo, split="test", channels=3, size=2).fetch(np.arange(3))["image"].shape == (3, 3, 2, 2)


def test_size_crops_the_centre(tmp_path: Path) -> None:
    pixels = np.zeros((1, 4, 9), np.uint8)
    pixels[:, :, 3:7] = 200  # columns (9 - 4) // 2 = 2 to 5 stay
    (tmp_path / "x.png").write_bytes(png.encode(pixels))
    found = folder.decode(tmp_path / "x.png", size=4, max_pixels=100)
    np.testing.assert_array_equal(found, pixels[:, :, 2:6])


def test_bad_pictures_are_named(tmp_path: Path) -> None:
    paint(tmp_path / "x.jpg", 7, size=(40, 30))
    assert folder.decode(tmp_path / "x.jpg", size=None, max_pixels=1200).shape == (3, 30, 40)
    with pytest.raises(LimitError, match="40 x 30 pixels, limit 1199"):
        folder.decode(tmp_path / "x.jpg", size=None, max_pixels=1199)
    raw = (tmp_path / "x.jpg").read_bytes()
    for bad in (b"", b"hello", raw[: len(raw) // 2]):
        (tmp_path / "x.jpg").write_bytes(bad)
        with pytest.raises(FormatError, match=r"x\.jpg: not a readable image"):
            folder.decode(tmp_path / "x.jpg", size=None, max_pixels=1200)


def test_what_pillow_would_cut_down_is_refused(tmp_path: Path) -> None:
    """Sixteen bits came out as white, and of several pictures the first was taken."""
    deep = np.full((4, 5), 30000, np.uint16)
    (tmp_path / "deep.pgm").write_bytes(b"P5 5 4 65535\n" + deep.astype(">u2").tobytes())
    Image.fromarray(deep).save(tmp_path / "deep.tif")
    Image.fromarray(deep.astype(np.float32)).save(tmp_path / "float.tiff")
    for name in ("deep.pgm", "deep.tif", "float.tiff"):
        with pytest.raises(
            FormatError, match=f"{name}: more than 8 bits per channel, expected 8; try `convert -depth 8`"
        ):
            folder.decode(tmp_path / name, size=None, max_pixels=100)
    more = [Image.new("RGB", (5, 4), (value,) * 3) for value in (90, 200)]
    for name in ("x.webp", "x.tif"):
        paint(tmp_path / name, 10, save_all=True, append_images=more)
        with pytest.raises(FormatError, match=f"{name}: holds 3 pictures, expected one; extract one first"):
            folder.decode(tmp_path / name, size=None, max_pixels=100)


def test_tiff_is_read_as_its_pixels(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 5, 3), np.uint8)
    for options in ({}, {"compression": "tiff_lzw"}):
        Image.fromarray(pixels).save(tmp_path / "x.tif", **options)
        found = folder.decode(tmp_path / "x.tif", size=None, max_pixels=20)
        np.testing.assert_array_equal(found, pixels.transpose(2, 0, 1))
    with pytest.raises(LimitError, match="5 x 4 pixels, limit 19"):
        folder.decode(tmp_path / "x.tif", size=None, max_pixels=19)


def test_a_camera_s_picture_with_its_preview_is_one(tmp_path: Path) -> None:
    paint(tmp_path / "x.jpg", 7, size=(8, 8), format="MPO", save_all=True, append_images=[Image.new("RGB", (4, 4))])
    with Image.open(tmp_path / "x.jpg") as image:
        assert image.format == "MPO" and image.n_frames == 2
    assert folder.decode(tmp_path / "x.jpg", size=None, max_pixels=100).shape == (3, 8, 8)


def test_jpeg_is_lossy_and_turned_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    paint(tmp_path / "x.jpg", 7, size=(40, 30), exif=exif)
    data = folder.files([tmp_path / "x.jpg"], ["x.jpg"], labels=None)
    assert data.lossy and data.fetch(np.array([0]))["image"].shape == (1, 3, 40, 30)


def test_grey_and_colour() -> None:
    pixels = np.array([[[10, 255]], [[20, 255]], [[30, 255]]], np.uint8)
    assert folder.recolour(pixels, 1).tolist() == [[[18, 255]]]  # 2.99 + 11.74 + 3.42 = 18.15
    assert folder.recolour(pixels[:1], 3).tolist() == [[[10, 255]]] * 3
    assert folder.recolour(pixels, None) is pixels and folder.recolour(pixels, 3) is pixels


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])), max_size=4))
def test_names_survive(names: list[str]) -> None:
    assert decode_names(encode_names(names)) == names


def test_ids_of_paths_are_pinned() -> None:
    assert path_id("cat.png") == 6_676_496_769_540_873_985
    assert 0 <= path_id("") < 2**63


# --------------------------------------------------------------------------------------------------------- NPZ

CUBE = np.arange(2 * 3 * 4 * 5, dtype=np.uint8).reshape(2, 3, 4, 5)


def test_npz_layouts(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    for image in (CUBE, CUBE.transpose(0, 2, 3, 1)):
        np.savez(path, x=image, y=np.array([[3], [1]], np.uint8))
        rows = npz.read(path).fetch(np.array([1, 0]))
        np.testing.assert_array_equal(rows["image"], CUBE[::-1])
        assert rows["label"].tolist() == [1, 3]
    np.savez_compressed(path, images=CUBE[:, 0].astype(np.float64) / 255)
    rows = npz.read(path).fetch(np.array([0]))
    assert rows["image"].shape == (1, 1, 4, 5) and rows["image"].dtype == np.float32 and "label" not in rows


def test_npz_layouts_that_two_readings_fit_must_be_named(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    for image in (CUBE[..., :3], np.zeros((2, 4, 5, 6), np.uint8)):
        np.savez(path, image=image)
        with pytest.raises(FormatError, match="try --layout nchw or nhwc"):
            npz.read(path)
    np.savez(path, image=CUBE[..., :3])
    assert npz.read(path, layout="nchw").fetch(np.array([0]))["image"].shape == (1, 3, 4, 3)
    assert npz.read(path, layout="nhwc").fetch(np.array([0]))["image"].shape == (1, 3, 3, 4)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"pictures": CUBE}, "no array named image or .*; it has pictures"),
        ({"x": CUBE, "y": np.arange(3)}, "3 labels for 2 images"),
        ({"x": CUBE, "y": np.array([0.5, 1.0])}, "labels are float64"),
        ({"x": CUBE[0, 0]}, r"images have shape \[4, 5\]"),
        ({"x": np.array([None, {}], object)}, "not a readable NPZ"),
    ],
)
def test_npz_archives_of_something_else(arrays: dict[str, np.ndarray], words: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", **arrays)  # type: ignore[arg-type]
    with pytest.raises(FormatError, match=words):
        npz.read(tmp_path / "x.npz")


def test_npz_files_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    np.savez(path, x=CUBE)
    good = path.read_bytes()
    damaged = bytearray(good)
    damaged[200] ^= 1
    with (tmp_path / "y.npy").open("wb") as file:
        np.save(file, CUBE)
    with zipfile.ZipFile(tmp_path / "z.npz", "w") as archive:
        archive.writestr("x.npy", b"no array")
    for text in ("(1000000000000,)", "(-1,)", "(2, 1, 4, 5", "((((", "(9223372036854775807, 3, 9, 9)"):
        with zipfile.ZipFile(path, "w") as archive:
            header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {text}, }}\n".encode()
            archive.writestr("x.npy", b"\x93NUMPY\x01\0" + len(header).to_bytes(2, "little") + header + bytes(40))
        with pytest.raises(FormatError, match="not a readable NPZ"):
            npz.read(path)
    cases = [b"", b"hello", good[:-30], bytes(damaged), pickle.dumps([1]), b"PK\x03\x04"]
    for raw in [*cases, (tmp_path / "y.npy").read_bytes(), (tmp_path / "z.npz").read_bytes()]:
        path.write_bytes(raw)
        with pytest.raises(FormatError, match="not a readable NPZ"):
            npz.read(path)


def test_labels_and_images_must_agree_in_number() -> None:
    with pytest.raises(FormatError, match="1 labels for 2 images"):
        in_memory(CUBE, np.zeros(1, np.int64))


# ------------------------------------------------------------------------------------------------------ shards


def shards(total: int, count: int, *, keep: list[int] | None = None, **more: Any) -> list[Any]:
    """(name, records) of shards 1 to `count`, those in `keep` alone."""
    parts = []
    for k in keep or range(1, count + 1):
        first = (k - 1) * total // count
        record = {"first": first, "rows": k * total // count - first, "total": total, "sha256": str(k), **more}
        parts.append((f"s{k}", [record]))
    return parts


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 20), st.integers(1, 12), st.randoms(use_true_random=False))
def test_shards_are_ordered_by_their_rows(total: int, count: int, random: Any) -> None:
    parts = shards(total, count)
    rows = {name: records[0]["rows"] for name, records in parts}
    random.shuffle(parts)
    (found,) = order_shards(parts)
    assert sorted(found) == sorted(rows)
    assert [n for n in found if rows[n]] == [f"s{k}" for k in range(1, count + 1) if rows[f"s{k}"]]


@pytest.mark.parametrize(
    ("keep", "rows", "array"),
    [
        ([1, 2, 4, 6], r"20 to 29, 40 to 49, 60 to 99", "3,5,7-10"),
        ([2, 3, 4, 5, 6, 7, 8, 9, 10], "0 to 9", "1"),
        ([1, 2, 3, 4, 5, 6, 7, 8, 9], "90 to 99", "10"),
    ],
)
def test_missing_shards_are_named_for_slurm(keep: list[int], rows: str, array: str) -> None:
    with pytest.raises(FormatError, match=f"rows {rows} of 100 are missing .*of 10.*; try sbatch --array={array}$"):
        order_shards(shards(100, 10, keep=keep))


def test_uneven_shards_are_counted_too() -> None:
    with pytest.raises(FormatError, match=r"rows 2 to 4 of 11 are missing \(shards of 4\); try sbatch --array=2$"):
        order_shards(shards(11, 4, keep=[1, 3, 4]))


def test_other_shards_are_refused() -> None:
    with pytest.raises(FormatError, match="s2: repeats rows from 2"):
        order_shards(shards(6, 3) + shards(6, 3, keep=[2]))
    with pytest.raises(FormatError, match="s2: made by other steps or options than s1"):
        order_shards(shards(6, 2, keep=[1], seed=1) + shards(6, 2, keep=[2], seed=2))
    records = shards(6, 1)[0][1]
    with pytest.raises(FormatError, match="s2: holds 2 streams, expected 1 stream as in s1"):
        order_shards([("s1", records), ("s2", records * 2)])
    with pytest.raises(FormatError, match=r"^rows 2 to 3 are missing$"):
        order_shards([(name, [{**records[0], "total": None}]) for name, records in shards(6, 3, keep=[1, 3])])


def test_shards_of_several_streams_are_ordered_stream_by_stream() -> None:
    few, many = shards(6, 3), shards(9, 3)
    pairs = [(name, records + its) for (name, records), (_, its) in zip(few, many, strict=True)]
    assert order_shards([pairs[2], pairs[0], pairs[1]]) == [["s1", "s2", "s3"]] * 2
    with pytest.raises(FormatError, match=r"rows 2 to 3 of 6 are missing \(shards of 3\); try sbatch --array=2"):
        order_shards([pairs[0], pairs[2]])
    with pytest.raises(FormatError, match="s2: made by other steps or options than s1"):
        order_shards([pairs[0], ("s2", [pairs[1][1][0], pairs[1][1][1] | {"seed": 1}]), pairs[2]])


@settings(max_examples=60, deadline=None)
@given(st.sets(st.integers(1, 30)))
def test_ranges_name_every_number_once_and_shortly(numbers: set[int]) -> None:
    text = ranges(sorted(numbers))
    spans = [tuple(map(int, span.split("-"))) for span in text.split(",") if span]
    assert [n for span in spans for n in range(span[0], span[-1] + 1)] == sorted(numbers)
    assert all(span[0] - before[-1] > 1 for before, span in itertools.pairwise(spans))


# ------------------------------------------------------------------------------------------------------ records


def test_records_are_objects_of_strict_json(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text('{"metric": "a", "value": 1}\n\n{"metric": "b", "value": null}\n')
    assert read_records(path) == [{"metric": "a", "value": 1}, {"metric": "b", "value": None}]
    for line in ("[1]", '{"a": NaN}', '{"a": 1, "a": 2}', "{", json.dumps("x")):
        path.write_text('{"metric": "a"}\n' + line)
        with pytest.raises(FormatError, match=r"r\.jsonl: line 2"):
            read_records(path)


def test_a_member_of_an_archive_is_not_larger_than_the_file(tmp_path: Path) -> None:
    """zipfile would reserve what the directory of the archive claims, here 3 GiB, before it reads anything."""
    path = tmp_path / "claim.npz"
    np.savez(path, image=np.zeros((2, 1, 4, 4), np.uint8))
    raw = bytearray(path.read_bytes())
    place = raw.index(b"PK\x01\x02") + 20  # compressed size, in the central directory
    raw[place : place + 4] = (3 << 30).to_bytes(4, "little")
    path.write_bytes(raw)
    with pytest.raises(FormatError, match="ValueError"):
        npz.read(path, layout="nchw")


def test_an_empty_idx_file_of_endless_dimensions_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "empty"
    path.write_bytes(b"\0\0\x08\x04" + b"\xff" * 12 + bytes(4))
    with pytest.raises(FormatError, match="too large"):
        idx.read(path)
