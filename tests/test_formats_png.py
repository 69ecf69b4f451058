"""PNG: exact pixels, heat maps that keep their values, and files that lie."""

from __future__ import annotations

import io
import itertools
import os
import struct
import threading
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from rbkit.formats import png
from rbkit.formats.errors import FormatError, LimitError
from rbkit.formats.names import decode_names, path_id
from rbkit.formats.reader import Reader

# ------------------------------------------------------------------------- a PNG writer that can lie


def chunk(kind: bytes, body: bytes = b"", *, crc: int = 0) -> bytes:
    """One chunk; `crc` spoils the checksum."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body) ^ crc)


def header(width: int, height: int, depth: int = 8, colour: int = 0, interlace: int = 0) -> bytes:
    """An IHDR chunk."""
    return chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlace))


def packed(*lines: bytes) -> bytes:
    """Image data of rows that use no filter."""
    return zlib.compress(b"".join(b"\0" + line for line in lines))


def build(*chunks: bytes, end: bool = True) -> bytes:
    """A PNG of these chunks."""
    return png.SIGNATURE + b"".join(chunks) + (chunk(b"IEND") if end else b"")


def decode(raw: bytes, **options: Any) -> np.ndarray:
    """The pixels of one PNG."""
    return png.read(io.BytesIO(raw[8:]), name="in", **options).pixels


GREY = packed(b"\x01\x02\x03", b"\x04\x05\x06")  # 3 wide, 2 high
PICTURE = [header(3, 2), chunk(b"IDAT", GREY)]
COLOURS = chunk(b"PLTE", bytes([9, 8, 7, 200, 100, 50]))  # two colours


def test_the_generator_makes_a_good_picture() -> None:
    np.testing.assert_array_equal(decode(build(*PICTURE)), [[[1, 2, 3], [4, 5, 6]]])


# ------------------------------------------------------------------------------------------ pixels


@settings(max_examples=60, deadline=None)
@given(hnp.arrays(np.uint8, st.tuples(st.sampled_from([1, 3]), st.integers(1, 6), st.integers(1, 7))))
def test_pixels_survive_exactly(pixels: np.ndarray) -> None:
    raw = png.encode(pixels, text={"é": [1.5, None]})
    file = io.BytesIO(raw[8:])
    picture = png.read(file, name="in")
    np.testing.assert_array_equal(picture.pixels, pixels)
    assert picture.pixels.dtype == np.uint8 and picture.text == {"é": [1.5, None]} and not file.read()
    assert raw == png.encode(pixels, text={"é": [1.5, None]}) and b"tIME" not in raw
    shown = np.asarray(Image.open(io.BytesIO(raw)))
    np.testing.assert_array_equal(shown, pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0))


@pytest.mark.parametrize(
    "pixels",
    [np.zeros((2, 3, 4), np.uint8), np.zeros((3, 4), np.uint8), np.zeros((1, 3, 4), np.float32), np.zeros((4, 2, 3))],
)
def test_other_arrays_are_not_encoded(pixels: np.ndarray) -> None:
    with pytest.raises(FormatError, match="PNG needs uint8"):
        png.encode(pixels)


@pytest.mark.parametrize(("depth", "step"), [(1, 255), (2, 85), (4, 17), (8, 1)])
def test_grey_of_few_bits_is_scaled(depth: int, step: int) -> None:
    values = np.arange(5) % min(2**depth, 4)
    bits = "".join(f"{v:0{depth}b}" for v in values)
    line = bytes(int(bits.ljust(-(-len(bits) // 8) * 8, "0")[i : i + 8], 2) for i in range(0, len(bits), 8))
    raw = build(header(5, 1, depth), chunk(b"IDAT", packed(line)))
    np.testing.assert_array_equal(decode(raw), [[values * step]])
    clear = build(header(5, 1, depth), chunk(b"tRNS", b"\0\1"), chunk(b"IDAT", packed(line)))
    np.testing.assert_array_equal(decode(clear), [[np.where(values == 1, 255, values * step)]])


def test_transparency_is_laid_over_white() -> None:
    pixels = [(10, 20, 30, 255), (10, 20, 30, 0), (0, 0, 0, 51)]
    raw = build(header(3, 1, 8, 6), chunk(b"IDAT", packed(bytes(itertools.chain(*pixels)))))
    np.testing.assert_array_equal(decode(raw)[:, 0].T, [(10, 20, 30), (255, 255, 255), (204, 204, 204)])
    raw = build(header(3, 1, 8, 4), chunk(b"IDAT", packed(bytes([9, 255, 9, 0, 0, 51]))))
    np.testing.assert_array_equal(decode(raw), [[[9, 255, 204]]])
    key = chunk(b"tRNS", bytes([0, 10, 0, 20, 0, 30]))
    raw = build(header(2, 1, 8, 2), key, chunk(b"IDAT", packed(bytes([10, 20, 30, 30, 20, 10]))))
    np.testing.assert_array_equal(decode(raw)[:, 0].T, [(255, 255, 255), (30, 20, 10)])


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
def test_palettes_are_expanded(depth: int) -> None:
    line = bytes([0b01 << (8 - 2 * depth)]) if depth < 8 else b"\0\1"
    raw = build(header(2, 1, depth, 3), COLOURS, chunk(b"IDAT", packed(line)))
    np.testing.assert_array_equal(decode(raw)[:, 0].T, [(9, 8, 7), (200, 100, 50)])
    clear = build(header(2, 1, depth, 3), COLOURS, chunk(b"tRNS", b"\xff\0"), chunk(b"IDAT", packed(line)))
    np.testing.assert_array_equal(decode(clear)[:, 0].T, [(9, 8, 7), (255, 255, 255)])


@pytest.mark.parametrize(("place", "after"), [(1, False), (2, True)], ids=["before the data", "after the data"])
def test_orientation_is_applied(place: int, after: bool) -> None:
    tiff = b"MM\0\x2a\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"  # orientation 6: turn clockwise
    raw = build(*PICTURE[:place], chunk(b"eXIf", tiff), *PICTURE[place:])
    np.testing.assert_array_equal(decode(raw), [[[4, 1], [5, 2], [6, 3]]])


def test_interlaced_pictures_are_read() -> None:
    pixels = np.arange(143, dtype=np.uint8).reshape(11, 13)
    passes = [pixels[y::dy, x::dx] for x, y, dx, dy in png.ADAM7]
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for rows in passes for row in rows if rows.size))
    np.testing.assert_array_equal(decode(build(header(13, 11, interlace=1), chunk(b"IDAT", data)))[0], pixels)


def test_text_of_others_is_ignored_and_ours_must_be_an_object() -> None:
    for body in (b"rb\0[1]", b"rb\0{", b"Comment\0{}", b"rb\0" + b"[" * 100_000, b"rb"):
        picture = png.read(io.BytesIO(build(PICTURE[0], chunk(b"tEXt", body), PICTURE[1])[8:]), name="in")
        assert picture.text == {}


# ------------------------------------------------------------------------------------------ files that lie

ANIMATION = chunk(b"acTL", struct.pack(">II", 3, 0))
HOSTILE = {
    "nothing": (png.SIGNATURE, "truncated PNG"),
    "no IEND": (build(*PICTURE, end=False), r"truncated PNG \(no IEND\)"),
    "cut in IEND": (build(*PICTURE)[:-3], "truncated PNG in .*IEND"),
    "cut in the data": (build(*PICTURE)[:-25], "truncated PNG in .*IDAT"),
    "wrong CRC of the data": (build(PICTURE[0], chunk(b"IDAT", GREY, crc=1)), "bad CRC in .*IDAT.* at byte 33"),
    "wrong CRC of the header": (build(b"".join([PICTURE[0][:-1], b"\0"]), PICTURE[1]), "bad CRC in .*IHDR"),
    "no data": (build(PICTURE[0]), "inflates to 0 bytes, expected 8|corrupt"),
    "a row missing": (build(header(3, 3), PICTURE[1]), "inflates to 8 bytes, expected 12"),
    "a row too many": (build(header(3, 1), PICTURE[1]), "inflates to 5 bytes, expected 4"),
    "data without its end": (build(PICTURE[0], chunk(b"IDAT", GREY[:-4])), "rows are missing"),
    "data no zlib": (build(PICTURE[0], chunk(b"IDAT", b"abcdefgh")), "corrupt"),
    "wrong Adler sum": (build(PICTURE[0], chunk(b"IDAT", GREY[:-1] + b"\0")), "corrupt"),
    "unknown filter": (build(header(1, 1), chunk(b"IDAT", zlib.compress(b"\x09\0"))), "not a readable PNG"),
    "IHDR not first": (build(PICTURE[1], PICTURE[0]), "first chunk is .*IDAT"),
    "two IHDR": (build(PICTURE[0], header(20_000, 20_000), PICTURE[1]), "second IHDR"),
    "short IHDR": (build(chunk(b"IHDR", b"\0" * 12)), "12 bytes, expected 13"),
    "no width": (build(header(0, 2), PICTURE[1]), "0 x 2 pixels"),
    "bomb": (build(header(20_000, 20_000), PICTURE[1]), "20000 x 20000 pixels, more than the limit .*--max-pixels"),
    "bomb of one row": (build(header(2**31 - 1, 1), PICTURE[1]), "more than the limit"),
    "data bomb": (build(PICTURE[0], chunk(b"IDAT", zlib.compress(bytes(10**7)))), "inflates to 9 bytes"),
    "16-bit grey": (build(header(3, 2, 16), chunk(b"IDAT", packed(bytes(6), bytes(6)))), "16 bits per channel"),
    "16-bit colour": (build(header(1, 1, 16, 2), chunk(b"IDAT", packed(bytes(6)))), "16 bits per channel"),
    "depth 3": (build(header(3, 2, 3), chunk(b"IDAT", packed(bytes(2), bytes(2)))), "not a readable PNG"),
    "depth 0": (build(header(3, 2, 0), chunk(b"IDAT", packed(b"", b""))), "not a readable PNG"),
    "colour type 5": (build(header(3, 2, 8, 5), PICTURE[1]), "colour type 5"),
    "interlace 2": (build(header(3, 2, 8, 0, 2), PICTURE[1]), "interlace method 2"),
    "index beyond the palette": (
        build(header(3, 2, 8, 3), COLOURS, PICTURE[1]), "a pixel points beyond the 2 colours",
    ),
    "no palette": (build(header(3, 2, 8, 3), PICTURE[1]), "palette|not a readable PNG"),
    "animated": (build(PICTURE[0], ANIMATION, PICTURE[1]), "animated PNG"),
    "huge chunk": (build(PICTURE[0], end=False) + b"\x7f\xff\xff\xffteSt", "more than"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_files_that_lie_are_refused(name: str) -> None:
    raw, words = HOSTILE[name]
    with pytest.raises(FormatError, match=words) as error:
        list(Reader(io.BytesIO(raw), name="x.png"))
    message = str(error.value)
    assert message.startswith("x.png: image 1: ") and message.isprintable() and len(message) < 300


def test_every_cut_of_a_picture_is_refused() -> None:
    raw = build(*PICTURE)
    for place in range(8, len(raw)):
        with pytest.raises(FormatError, match="truncated PNG"):
            decode(raw[:place])


def test_every_flipped_bit_is_refused_or_harmless() -> None:
    raw = build(*PICTURE)
    for place in range(8, len(raw)):
        damaged = bytearray(raw)
        damaged[place] ^= 1 << (place % 8)
        with pytest.raises(FormatError):
            decode(bytes(damaged))


def test_compressed_text_is_never_inflated() -> None:
    bomb = zlib.compress(bytes(20_000_000))
    for kind, body in ((b"zTXt", b"a\0\0" + bomb), (b"iTXt", b"a\0\1\0\0\0" + bomb), (b"iCCP", b"a\0\0" + bomb)):
        np.testing.assert_array_equal(decode(build(PICTURE[0], chunk(kind, body), PICTURE[1])), decode(build(*PICTURE)))


def test_the_pixel_limit_can_be_set() -> None:
    assert decode(build(*PICTURE), max_pixels=6).shape == (1, 2, 3)
    with pytest.raises(LimitError, match="3 x 2 pixels, more than the limit of 5"):
        decode(build(*PICTURE), max_pixels=5)


@pytest.mark.parametrize(("before", "after"), [(None, None), (2, 6), (100, 100)])
def test_the_limit_of_pillow_is_never_lowered(
    before: int | None, after: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", before)
    decode(build(*PICTURE))
    found = Image.MAX_IMAGE_PIXELS
    assert found == after


def test_many_small_chunks_have_a_limit_together() -> None:
    piece = chunk(b"teSt", bytes(1 << 20))
    with pytest.raises(LimitError, match="bytes of PNG, more than"):
        decode(build(PICTURE[0], *[piece] * 17, PICTURE[1]))


@pytest.mark.parametrize("form", ["JPEG", "TIFF", "GIF", "BMP"])
def test_other_formats_named_png_are_refused(form: str, tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    Image.new("RGB", (3, 2)).save(path, form)
    with pytest.raises(FormatError, match="expected a PNG"):
        png.open_picture(str(path))


# ------------------------------------------------------------------------------------------ many pictures


def pictures(count: int) -> np.ndarray:
    """Different pictures of 3 x 4 x 5."""
    return (np.arange(count * 60).reshape(count, 3, 4, 5) % 251).astype(np.uint8)


@pytest.mark.parametrize("size", [1, 2, 3, 512])
def test_pictures_back_to_back_are_a_stream(size: int) -> None:
    raw = b"".join(map(png.encode, pictures(3)))
    chunks = list(Reader(io.BytesIO(raw), name="in", rows=size))
    np.testing.assert_array_equal(np.concatenate([c.arrays["image"] for c in chunks]), pictures(3))
    assert [c.last for c in chunks] == [False] * (len(chunks) - 1) + [True]
    assert [c.first for c in chunks] == list(range(0, 3, size))
    assert all(c.arrays.keys() == {"image"} for c in chunks)


@pytest.mark.parametrize("step", [1, 5, 13])
def test_a_raw_pipe_that_delivers_a_few_bytes_at_a_time(step: int) -> None:
    raw = b"".join(map(png.encode, pictures(2)))
    read_end, write_end = os.pipe()

    def feed() -> None:
        with os.fdopen(write_end, "wb", buffering=0) as file:
            for start in range(0, len(raw), step):
                file.write(raw[start : start + step])

    feeder = threading.Thread(target=feed)
    feeder.start()
    with os.fdopen(read_end, "rb", buffering=0) as file:
        (found,) = Reader(file, name="in")  # type: ignore[arg-type]
    feeder.join()
    np.testing.assert_array_equal(found.arrays["image"], pictures(2))


class Dribble(io.RawIOBase):
    """A raw source of one byte at a time: a pipe at its slowest, without its timing."""

    def __init__(self, raw: bytes) -> None:
        self.source = io.BytesIO(raw)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        return self.source.readinto(memoryview(buffer)[:1])


def test_short_reads_lose_nothing() -> None:
    raw = b"".join(map(png.encode, pictures(2)))
    (found,) = Reader(Dribble(raw), name="in")  # type: ignore[arg-type]
    np.testing.assert_array_equal(found.arrays["image"], pictures(2))


def test_pictures_of_a_file_are_named_after_it() -> None:
    raw = b"".join(map(png.encode, pictures(3)))
    chunks = list(Reader(io.BytesIO(raw), name="in", path="a/b.png", rows=2))
    names = [name for c in chunks for name in decode_names(c.arrays["name"])]
    assert names == ["a/b.png#1", "a/b.png#2", "a/b.png#3"]
    assert [i for c in chunks for i in c.arrays["id"].tolist()] == [path_id(name) for name in names]
    (alone,) = Reader(io.BytesIO(png.encode(pictures(1)[0])), name="in", path="a/b.png")
    assert decode_names(alone.arrays["name"]) == ["a/b.png"]


@pytest.mark.parametrize(
    ("raw", "words"), [(b"", r"empty \(0 bytes\)"), (b"GIF89a, and more", "starts with b'GIF89a, '")]
)
def test_a_file_that_is_no_png_is_told_by_what_it_holds(tmp_path: Path, raw: bytes, words: str) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(raw)
    with pytest.raises(FormatError, match=f"a.png: {words}, expected a PNG"):
        png.open_picture(str(path))


def test_pictures_of_other_sizes_and_what_is_no_picture_are_named() -> None:
    one, other = png.encode(pictures(1)[0]), build(*PICTURE)
    with pytest.raises(FormatError, match=r"in: image 2 is 1 x 2 x 3, the first is 3 x 4 x 5"):
        list(Reader(io.BytesIO(one + other), name="in"))
    with pytest.raises(FormatError, match="image 2: 5 bytes after the last image are no PNG"):
        list(Reader(io.BytesIO(one + b"hello"), name="in"))
    with pytest.raises(FormatError, match="image 2: truncated PNG"):
        list(Reader(io.BytesIO(one + one[:-1]), name="in"))


def test_a_file_of_one_picture(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(build(*PICTURE))
    assert png.open_picture(str(path)).pixels.shape == (1, 2, 3)
    path.write_bytes(build(*PICTURE) * 2)
    with pytest.raises(FormatError, match="more than one image"):
        png.open_picture(str(path))


# ------------------------------------------------------------------------------------------ heat maps

PALETTE = np.stack([np.arange(256), np.arange(256)[::-1], np.full(256, 7)], 1).astype(np.uint8)


@settings(max_examples=60, deadline=None)
@given(
    hnp.arrays(np.float64, st.tuples(st.integers(1, 5), st.integers(1, 6)), elements=st.floats(-1e6, 1e6)),
    st.floats(-1e6, 1e6),
    st.floats(1e-3, 1e6),
)
def test_heat_maps_keep_their_values_to_half_a_step(values: np.ndarray, low: float, span: float) -> None:
    high = low + span
    raw = png.encode_map(values, vmin=low, vmax=high, palette=PALETTE, text={"method": "ig"})
    found, text = png.decode_map(raw)
    assert text == {"method": "ig", "vmin": low, "vmax": high}
    assert np.abs(found - np.clip(values, low, high)).max() <= (high - low) / 255 / 2 * (1 + 1e-6) + 1e-9


def test_heat_maps_show_the_palette() -> None:
    values = np.array([[0.0, 1.0, 0.5], [-3.0, 9.0, 0.2]])
    raw = png.encode_map(values, vmin=0, vmax=1, palette=PALETTE)
    shown = decode(raw)
    np.testing.assert_array_equal(shown[0], [[0, 255, 128], [0, 255, 51]])
    np.testing.assert_array_equal(shown[1], 255 - shown[0].astype(int))
    np.testing.assert_array_equal(png.decode_map(raw)[0][1], [0, 1, 0.2])


def test_a_constant_map_is_the_middle_of_the_palette_and_keeps_its_value() -> None:
    raw = png.encode_map(np.full((2, 3), 4.5), vmin=4.5, vmax=4.5, palette=PALETTE)
    np.testing.assert_array_equal(decode(raw)[0], np.full((2, 3), 128))
    np.testing.assert_array_equal(png.decode_map(raw)[0], np.full((2, 3), 4.5))


def test_other_pictures_are_no_heat_maps() -> None:
    bad = png.encode_map(np.zeros((2, 3)), vmin=0, vmax=1, palette=PALETTE).replace(b'"vmin":0', b'"vmin":[')
    words = chunk(b"tEXt", b'rb\0{"vmax":1,"vmin":"0"}')
    strings = build(header(3, 2, 8, 3), COLOURS, words, chunk(b"IDAT", packed(bytes(3), bytes(3))))
    for raw in (png.encode(pictures(1)[0]), png.encode(pictures(1)[0], text={"vmin": 0, "vmax": 1}), strings, bad):
        with pytest.raises(FormatError):
            png.decode_map(raw)
