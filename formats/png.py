"""PNG in and out.

Framing is our own, because Pillow accepts files without an end, with wrong checksums or with missing rows: chunks,
CRCs, IEND and the inflated length are checked first, then Pillow decodes the exact bytes. Heat maps are palette PNGs
that keep their values: one byte per pixel is the value, the palette only colours it, and text chunks carry the scale.
"""

from __future__ import annotations

import io
import itertools
import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from rbkit.formats.errors import FormatError, LimitError, printable

SIGNATURE = b"\x89PNG\r\n\x1a\n"
MAX_PIXELS = 1 << 24
SLACK = 1 << 24  # bytes for chunks that are no pixels
CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by PNG colour type
GREY, PALETTE = 0, 3
ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
TEXT_KEY = "rb"


@dataclass(frozen=True)
class Picture:
    """One decoded image: `pixels` uint8 (C, H, W), C = 1 (grey) or 3, and the `rb` text chunk if it has one."""

    pixels: np.ndarray
    text: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Shape:
    width: int
    height: int
    depth: int
    colour: int
    interlaced: bool


class _Chunks:
    """(type, body, raw bytes) of each chunk after the signature, up to and with IEND; together at most `limit` bytes."""

    def __init__(self, file: BinaryIO, *, name: str) -> None:
        self.file, self.name, self.limit = file, name, SLACK

    def __iter__(self) -> Iterator[tuple[bytes, bytes, bytes]]:
        offset, name = 8, self.name
        while True:
            head = _read_exactly(self.file, 8)  # a raw pipe may deliver less at a time
            if len(head) < 8:
                raise FormatError(f"{name}: truncated PNG (no IEND); the file ends at byte {offset + len(head)}")
            size, kind = int.from_bytes(head[:4], "big"), head[4:]
            if offset + size > self.limit:
                raise LimitError(f"{name}: {offset + size} bytes of PNG, more than {self.limit}, which its pixels need")
            body = _read_exactly(self.file, size + 4)
            if len(body) < size + 4:
                raise FormatError(f"{name}: truncated PNG in {printable(repr(kind))} at byte {offset}")
            if zlib.crc32(kind + body[:size]) != int.from_bytes(body[size:], "big"):
                raise FormatError(f"{name}: bad CRC in {printable(repr(kind))} at byte {offset}")
            yield kind, body[:size], head + body
            if kind == b"IEND":
                return
            offset += 12 + size


def _read_exactly(file: BinaryIO, size: int) -> bytes:
    pieces, left = [], size
    while left and (piece := file.read(min(left, 1 << 20))):
        pieces.append(piece)
        left -= len(piece)
    return b"".join(pieces)


def _header(body: bytes, *, name: str, max_pixels: int) -> _Shape:
    if len(body) != 13:
        raise FormatError(f"{name}: IHDR has {len(body)} bytes, expected 13")
    width, height = int.from_bytes(body[:4], "big"), int.from_bytes(body[4:8], "big")
    depth, colour, interlace = body[8], body[9], body[12]
    if not width or not height:
        raise FormatError(f"{name}: image of {width} x {height} pixels")
    if width * height > max_pixels:
        raise LimitError(f"{name}: {width} x {height} pixels, more than the limit of {max_pixels}; try --max-pixels")
    if colour not in CHANNELS or interlace > 1:
        raise FormatError(f"{name}: colour type {colour} or interlace method {interlace} is not PNG")
    if depth == 16:
        raise FormatError(f"{name}: 16 bits per channel, expected 8; try `convert -depth 8`")
    return _Shape(width, height, depth, colour, interlace == 1)


def _inflated_size(shape: _Shape) -> int:
    """Bytes that the image data must inflate to: a filter byte and the packed pixels of every row of every pass."""
    bits = shape.depth * CHANNELS[shape.colour]
    passes = ADAM7 if shape.interlaced else ((0, 0, 1, 1),)
    total = 0
    for x, y, dx, dy in passes:
        columns, rows = -(-(shape.width - x) // dx), -(-(shape.height - y) // dy)
        if columns > 0 and rows > 0:
            total += rows * (1 + (columns * bits + 7) // 8)
    return total


def _check_data(packed: bytes, shape: _Shape, *, name: str) -> None:
    wanted = _inflated_size(shape)
    inflater = zlib.decompressobj()
    try:
        found = len(inflater.decompress(packed, wanted + 1))
    except zlib.error as error:
        raise FormatError(f"{name}: image data is corrupt ({error})") from None
    if found != wanted or not inflater.eof:
        raise FormatError(
            f"{name}: image data inflates to {found} bytes, expected {wanted} (rows are missing or extra)"
        )


def _text(body: bytes) -> dict[str, Any]:
    """The `rb` text chunk as JSON; other text chunks are nobody's business."""
    key, _, value = body.partition(b"\0")
    if key != TEXT_KEY.encode() or len(value) > 1 << 20:
        return {}
    try:
        parsed = json.loads(value.decode("latin-1"))
    except (ValueError, RecursionError):
        return {}
    return parsed if isinstance(parsed, dict) else {}


def read(file: BinaryIO, *, name: str, max_pixels: int = MAX_PIXELS) -> Picture:
    """One PNG from `file`, positioned after its signature; reads not a byte beyond IEND.

    Raises: FormatError (truncated, corrupt, 16 bits, animated), LimitError (more than `max_pixels`).
    """
    raw: list[bytes] = [SIGNATURE]
    packed: list[bytes] = []
    text: dict[str, Any] = {}
    shape = None
    chunks = _Chunks(file, name=name)
    for kind, body, piece in chunks:
        if shape is not None and kind == b"IHDR":
            raise FormatError(f"{name}: a second IHDR")
        if shape is None:
            if kind != b"IHDR":
                raise FormatError(f"{name}: the first chunk is {printable(repr(kind))}, expected IHDR")
            shape = _header(body, name=name, max_pixels=max_pixels)
            chunks.limit += 2 * _inflated_size(shape)  # stored deflate blocks add little; the rest is for other chunks
        if kind == b"acTL":
            raise FormatError(f"{name}: animated PNG; extract one frame first")
        if kind == b"tEXt":
            text |= _text(body)
        if kind == b"IDAT":
            packed.append(body)
        if kind not in (b"tEXt", b"zTXt", b"iTXt", b"iCCP"):  # not needed for pixels; some inflate without bound
            raw.append(piece)
    assert shape is not None
    _check_data(b"".join(packed), shape, name=name)
    return Picture(_decode(b"".join(raw), shape, name=name), text)


def _decode(raw: bytes, shape: _Shape, *, name: str) -> np.ndarray:
    from PIL import Image, ImageOps

    # Our own limit was applied above; Pillow's, where there is one, is raised to what passed it, never lowered.
    if Image.MAX_IMAGE_PIXELS is not None:
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, shape.width * shape.height)
    try:
        with Image.open(io.BytesIO(raw), formats=["PNG"]) as image:
            image.load()
            _check_palette(image, name=name)
            if shape.colour == GREY and "transparency" in image.info:
                image.info["transparency"] *= 255 // (2**shape.depth - 1)  # Pillow scales the pixels, not their key
            upright = ImageOps.exif_transpose(image)
    except FormatError:
        raise
    except Exception as error:  # Pillow raises many kinds; each means that the file is bad
        raise FormatError(f"{name}: not a readable PNG ({type(error).__name__}: {printable(str(error))})") from None
    return to_pixels(upright)


def _check_palette(image: Any, *, name: str) -> None:
    if image.mode == "P":
        entries = len(image.getpalette() or ()) // 3
        if int(np.asarray(image).max()) >= entries:
            raise FormatError(f"{name}: a pixel points beyond the {entries} colours of the palette")


def to_pixels(image: Any) -> np.ndarray:
    """A Pillow image as uint8 (C, H, W): grey stays one channel, palettes expand, alpha is laid over white."""
    from PIL import Image

    if image.mode in ("1", "L"):
        grey = np.where(np.asarray(image), 255, 0).astype(np.uint8) if image.mode == "1" else np.array(image)
        return np.where(grey == image.info.get("transparency", -1), np.uint8(255), grey)[None]
    if image.mode == "LA":
        grey, alpha = image.split()
        return np.asarray(Image.composite(grey, Image.new("L", image.size, 255), alpha))[None].copy()
    if image.mode in ("RGBA", "PA") or "transparency" in image.info:
        over = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, over)
    return np.ascontiguousarray(np.asarray(image.convert("RGB")).transpose(2, 0, 1))


def read_many(file: BinaryIO, *, name: str, start: bytes, max_pixels: int = MAX_PIXELS) -> Iterator[Picture]:
    """PNG images back to back; `start` holds the first 8 bytes, already read."""
    for number in itertools.count(1):
        label = f"{name}: image {number}"
        if start != SIGNATURE and number > 1:
            raise FormatError(f"{label}: {len(start)} bytes after the last image are no PNG")
        if start != SIGNATURE:
            found = f"starts with {start!r}" if start else "empty (0 bytes)"
            raise FormatError(f"{name}: {found}, expected a PNG")
        yield read(file, name=label, max_pixels=max_pixels)
        start = _read_exactly(file, 8)
        if not start:
            return


def open_picture(path: str, *, max_pixels: int = MAX_PIXELS) -> Picture:
    """A PNG file that holds one image. Raises: FormatError, OSError."""
    with Path(path).open("rb") as file:
        pictures = read_many(file, name=printable(path, limit=200), start=file.read(8), max_pixels=max_pixels)
        picture = next(pictures)
        if next(pictures, None) is not None:
            raise FormatError(f"{printable(path, limit=200)}: holds more than one image; try `rb-data png - < FILE`")
        return picture


def _info(text: Mapping[str, Any] | None) -> Any:
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    if text:
        info.add_text(TEXT_KEY, json.dumps(text, sort_keys=True, separators=(",", ":"), allow_nan=False))
    return info


def encode(pixels: np.ndarray, *, text: Mapping[str, Any] | None = None) -> bytes:
    """PNG bytes of uint8 (C, H, W) pixels, C = 1 or 3; `text` goes to the `rb` text chunk as JSON."""
    from PIL import Image

    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[0] not in (1, 3):
        raise FormatError(f"PNG needs uint8 (1 or 3, H, W), got {pixels.dtype} {pixels.shape}")
    image = Image.fromarray(pixels[0] if pixels.shape[0] == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=_info(text))
    return buffer.getvalue()


def encode_map(
    values: np.ndarray, *, vmin: float, vmax: float, palette: np.ndarray, text: Mapping[str, Any] | None = None
) -> bytes:
    """A heat map (H, W) as a palette PNG that keeps its values.

    Byte b stands for vmin + b (vmax - vmin) / 255; `palette` is uint8 (256, 3). A constant scale maps to byte 128.
    """
    from PIL import Image

    span = vmax - vmin
    index = np.full(values.shape, 128.0) if span <= 0 else (values - vmin) / span * 255
    image = Image.fromarray(np.clip(np.rint(index), 0, 255).astype(np.uint8))
    image.putpalette(palette.astype(np.uint8).tobytes())
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=_info({**(text or {}), "vmin": vmin, "vmax": vmax}))
    return buffer.getvalue()


def decode_map(raw: bytes, *, name: str = "heat map") -> tuple[np.ndarray, dict[str, Any]]:
    """The values of a heat map written by `encode_map`, to half a step of (vmax - vmin) / 255, and its text.

    Raises: FormatError when the PNG is no palette image or carries no scale.
    """
    from PIL import Image

    text = read(io.BytesIO(raw[8:]), name=name).text
    with Image.open(io.BytesIO(raw), formats=["PNG"]) as image:
        if image.mode != "P" or not all(isinstance(text.get(key), int | float) for key in ("vmin", "vmax")):
            raise FormatError(f"{name}: no heat map of rbkit (palette PNG with vmin and vmax)")
        index = np.asarray(image).astype(np.float64)
    return text["vmin"] + index * (text["vmax"] - text["vmin"]) / 255, text
